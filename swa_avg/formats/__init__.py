"""Bytes on disk -> `Checkpoint`: named tensors, each with an extent."""

from __future__ import annotations

import re
from collections.abc import Mapping

from swa_avg.errors import SwaAvgError, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import NotRegularError, open_source, refusal
from swa_avg.formats import archive, hdf5_file, sharded
from swa_avg.formats.base import Checkpoint, Format, Tensor
from swa_avg.formats.folder import is_model_alone, is_model_folder, open_folder

__all__ = [
    "SUFFIXES",
    "TENSORFLOW",
    "TENSORFLOW_FILE",
    "Checkpoint",
    "Tensor",
    "is_model_alone",
    "is_model_folder",
    "open_checkpoint",
    "suffix_of",
]

_FORMATS: tuple[Format, ...] = (archive.FORMAT, sharded.FORMAT, hdf5_file.FORMAT)
SUFFIXES = tuple(suffix for file_format in _FORMATS for suffix in file_format.suffixes)
"""What the names of checkpoints usually end with: `.weights.h5` before `.h5`, a set before its shards."""

TENSORFLOW_FILE = re.compile(r"\.(index|data-[0-9]+-of-[0-9]+)$")
"""What the names of the files of a TensorFlow checkpoint end with."""
TENSORFLOW = "in TensorFlow, load it with model.load_weights, then model.save_weights to a .weights.h5"
"""What to do with a TensorFlow checkpoint."""

_FEW = 2


def suffix_of(path: Location) -> str:
    """Return what the name of a checkpoint ends with: all of `.weights.h5`; of a folder, nothing."""
    if path.is_dir():
        return ""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)


def open_checkpoint(path: Location, like: Checkpoint | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, whose content tells the format.

    `like` is a checkpoint of the same run; where `path` has its layout, it is not parsed again.

    Raises:
        UnreadableError: the file is missing, damaged or of no known format.
        SystemRefusalError: the system could not open or read it.
    """
    try:
        checkpoint = _open(path, like)
        if not checkpoint.tensors:  # a single shard of several may be empty
            checkpoint.close()
            raise UnreadableError(path, "holds no tensors")
        if like is not None and checkpoint.tensors is not like.tensors:
            _check_places(checkpoint, like)
        for shard in checkpoint.shards:
            shard.settle()
    except OSError as error:
        if isinstance(error, SwaAvgError):
            raise
        raise refusal(path, error) from error
    return checkpoint


def _open(path: Location, like: Checkpoint | None) -> Checkpoint:
    try:
        whole = Region(open_source(path))
    except NotRegularError:  # a folder has no first bytes: what is in it tells
        if is_model_folder(path):
            return open_folder(path, like, _open)
        raise
    try:
        head = whole.read(0, min(64, whole.size))
        if not head:
            raise UnreadableError(path, "the file is empty")
        # A name says nothing of the format: TensorFlow 2.12 writes HDF5 files named `.keras`.
        for file_format in _FORMATS:
            if head.lstrip().startswith(file_format.signature):
                return file_format.open(whole, like)
        if TENSORFLOW_FILE.search(path.name):
            raise UnreadableError(path, "of a TensorFlow checkpoint, which is not read", hint=TENSORFLOW)
        known = ", nor ".join(file_format.description for file_format in _FORMATS)
        raise UnreadableError(path, f"not a Keras checkpoint: neither {known}")
    except BaseException:
        whole.close()
        raise


def _check_places(checkpoint: Checkpoint, like: Checkpoint) -> None:
    """Raise UnreadableError if only one or two tensors lie elsewhere than in `like`.

    HDF5 allocates space in order: whatever moves one tensor moves those after it, and the end of the file. A
    tensor that moved alone was moved by a damaged address, which no HDF5 checksum covers.
    """
    theirs = like.tensors
    moved = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if name in theirs and (tensor.shard, tensor.offset) != (theirs[name].shard, theirs[name].offset)
    ]
    names = {tensor.name for tensor in moved}
    stayed = len(theirs) - len(moved)
    same_size = checkpoint.size == like.size
    alone = len(moved) == 1 <= stayed and same_size
    last = all(_are_last(names, tensors) for tensors in (checkpoint.tensors, theirs))
    few = 0 < len(moved) <= _FEW < stayed and (same_size or not last)
    if checkpoint.tensors.keys() == theirs.keys() and (few or alone):
        checkpoint.close()
        place = f"lies at another offset than in {like.path.name}"
        problem = f"{place}, and nothing else does: one of the two is damaged"
        raise UnreadableError(checkpoint.path, problem, tensor=moved[0].name)


def _are_last(names: set[str], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the named tensors lie behind all others."""
    ordered = sorted(tensors, key=lambda name: (tensors[name].shard, tensors[name].offset))
    return set(ordered[-len(names) :]) == names
