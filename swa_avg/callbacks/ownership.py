"""Which files of a run's folder are checkpoints that this tool wrote: those it may delete or replace."""

from __future__ import annotations

from contextlib import closing
from hashlib import blake2b
from pathlib import Path

from swa_avg.errors import SwaAvgError
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source
from swa_avg.formats import open_checkpoint
from swa_avg.inputs.index import INDEX_NAME

__all__ = ["SUFFIXES", "fingerprint", "why_not_ours"]

SUFFIXES = (".keras", ".weights.h5")
"""What the names of the files that callbacks save end with."""

_PIECE = 2**16
_PIECES = 64


def fingerprint(path: Path) -> str:
    """Return a digest of a file's size and content, which a copy of the file has, too.

    Up to 4 MiB it covers every byte; of a larger file, 64 evenly spread pieces of 64 KiB, the first and the
    last bytes among them: a checkpoint of any other moment of any training differs in nearly all of them, and
    to read all of a large file back would take longer. Times and inodes would not survive a copy.

    Raises:
        UnreadableError: it is missing, cannot be read, or is a symbolic link or no regular file.
        SystemRefusalError: the system cannot open it.
    """
    with closing(Region(open_source(path, follow=False))) as whole:
        size = whole.size
        digest = blake2b(str(size).encode(), digest_size=16)
        spread = [(size - _PIECE) * number // (_PIECES - 1) for number in range(_PIECES)]
        for position in range(0, size, _PIECE) if size <= _PIECE * _PIECES else spread:
            digest.update(whole.read(position, min(_PIECE, size - position)))
    return digest.hexdigest()


def why_not_ours(path: Path, recorded: str | None, *, written: bool = False) -> str | None:
    """Return why a file is not to be touched, or None if it is a checkpoint that this tool wrote.

    `recorded` is its fingerprint in the index, None or empty without one. The index may have been written by
    anyone: that it names a file is not enough, and whatever it says, only a checkpoint is ever ours. Who can
    write the index and has read a checkpoint in the folder can record its fingerprint, and so have that one
    deleted: no more than the right to write into the folder allows them anyway. An inode or a time would not
    hinder them either, and would be lost with a copy of the folder.
    If this process itself has `written` what has this fingerprint, it is a checkpoint.
    """
    if not recorded:
        return f"{INDEX_NAME} has no fingerprint for it, so that another program may have written it"
    if not path.name.endswith(SUFFIXES):
        return "it does not have the name of a checkpoint"
    try:
        if fingerprint(path) != recorded:
            return "it has changed since it was saved"
        if not written:
            open_checkpoint(path).close()
    except SwaAvgError:
        return "it is not a readable checkpoint"
    return None
