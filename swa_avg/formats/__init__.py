"""Bytes on disk -> `Checkpoint`: named tensors, each with an extent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from swa_avg.errors import SwaAvgError, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source, refusal
from swa_avg.formats import archive, bare, sharded
from swa_avg.formats.base import Checkpoint, Tensor

__all__ = ["FORMATS", "Checkpoint", "Region", "Tensor", "open_checkpoint"]

# First bytes of a file -> how it is opened. What a file is called says nothing: TensorFlow 2.12 writes
# HDF5 files named `.keras`.
FORMATS: dict[bytes, Callable[[Region, Checkpoint | None], Checkpoint]] = {
    archive.SIGNATURE: archive.open_archive,
    bare.SIGNATURE: bare.open_hdf5,
    b"{": sharded.open_sharded,
}

_FEW = 2


def open_checkpoint(path: Location, like: Checkpoint | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, whatever its format, going by content.

    `like` is a checkpoint of the same run; it saves parsing where `path` has its layout.

    Raises:
        UnreadableError: the file is missing, damaged or of no known format.
        SystemRefusalError: the system could not open or read it.
    """
    try:
        checkpoint = _open(path, like)
        if not checkpoint.tensors:  # of a set, Keras may leave one shard empty
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
    whole = Region(open_source(path))
    try:
        head = whole.read(0, min(64, whole.size))
        if not head:
            raise UnreadableError(path, "the file is empty")
        for signature, open_format in FORMATS.items():
            if head.lstrip().startswith(signature):
                return open_format(whole, like)
        raise UnreadableError(
            path, "not a Keras checkpoint: neither a .keras archive, nor HDF5, nor a .weights.json"
        )
    except BaseException:
        whole.close()
        raise


def _check_places(checkpoint: Checkpoint, like: Checkpoint) -> None:
    """Raise UnreadableError if a tensor or two lie elsewhere than in `like`, and no other does.

    HDF5 gives out room in order: whatever moves one tensor moves those after it, and the end of the file. One
    alone was moved by a damaged address, of which HDF5 keeps no checksum.
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
        problem = (
            f"lies at another place than in {like.path.name}, and everything else does not: one is damaged"
        )
        raise UnreadableError(checkpoint.path, problem, tensor=moved[0].name)


def _are_last(names: set[str], tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors lie behind all others."""
    ordered = sorted(tensors, key=lambda name: (tensors[name].shard, tensors[name].offset))
    return set(ordered[-len(names) :]) == names
