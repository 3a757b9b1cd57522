"""SHA-256 digests that the user expects of the inputs, in the form that `sha256sum` writes.

Bare HDF5 has no checksum of its own: a flipped bit in a value is another value. A list that was written next
to the checkpoints, when they were known to be good, tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import closing, nullcontext

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source
from swa_avg.formats.base import Checkpoint

__all__ = ["check_digests", "read_digests"]

_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_MAX_BYTES = 64 * 2**20


def read_digests(path: Location) -> dict[Location, str]:
    """Read a list as `sha256sum` writes it: file -> digest in lower case.

    Names are relative to the folder of the list.

    Raises:
        UnreadableError: it is missing, or a line is something else, or two lines disagree on a file.
    """
    with closing(open_source(path)) as source:
        if source.size > _MAX_BYTES:
            raise UnreadableError(path, f"a list of digests larger than {_MAX_BYTES >> 20} MiB")
        text = os.fsdecode(Region(source).read(0, source.size))  # as the names of files are
    digests: dict[Location, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.removesuffix("\r"))
        if match is None:
            raise UnreadableError(
                path, f"line {number} is not what sha256sum writes: DIGEST, two spaces, NAME"
            )
        escaped, digest, name = match.groups()
        if escaped:  # sha256sum's way of putting a newline into a name
            name = re.sub(r"\\([\\nr])", lambda found: {"n": "\n", "r": "\r"}.get(found[1], "\\"), name)
        known = digests.setdefault((path.parent / name).absolute(), digest.lower())
        if known != digest.lower():
            raise UnreadableError(
                path, f"line {number} gives another digest than an earlier one", tensor=name
            )
    return digests


def check_digests(
    checkpoints: Sequence[Checkpoint], digests: dict[Location, str], listed_in: Location
) -> None:
    """Hold every file of the checkpoints, as it is open, against the list.

    Raises:
        UsageError: the list does not name a file.
        UnreadableError: a file has another digest.
    """
    for checkpoint in checkpoints:
        opened = {shard.path: shard for shard in checkpoint.shards}
        for path in checkpoint.files:
            expected = digests.get(path.absolute())
            if expected is None:
                raise UsageError(f"{listed_in} does not name {path}: add it with sha256sum")
            found = _sha256(opened.get(path), path)
            if found != expected:
                problem = f"damaged: its SHA-256 is {found}, {listed_in.name} says {expected}"
                raise UnreadableError(path, problem, hint="leave this file out, or restore it")


def _sha256(opened: Region | None, path: Location) -> str:
    """Return the digest of a whole file: by the descriptor that is averaged from, or of a map by its name."""
    import hashlib  # which loads OpenSSL

    digest = hashlib.sha256()
    with nullcontext(opened.source) if opened else closing(open_source(path)) as source:
        for chunk in Region(source).chunks():
            digest.update(chunk)
    return digest.hexdigest()
