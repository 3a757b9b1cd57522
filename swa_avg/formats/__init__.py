"""Bytes on disk -> `Checkpoint`: named tensors, each with an extent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from swa_avg.errors import UnreadableError
from swa_avg.formats import archive, hdf5, sharded
from swa_avg.formats.base import Checkpoint, Image, Tensor, open_file

__all__ = ["FORMATS", "Checkpoint", "Image", "Tensor", "open_checkpoint"]

# First bytes of a file -> how it is opened. What a file is called says nothing: TensorFlow 2.12 writes
# HDF5 files named `.keras`.
FORMATS: dict[bytes, Callable[[Path, Checkpoint | None], Checkpoint]] = {
    archive.SIGNATURE: archive.open_archive,
    hdf5.SIGNATURE: hdf5.open_hdf5,
    b"{": sharded.open_sharded,
}


def open_checkpoint(path: Path, like: Checkpoint | None = None) -> Checkpoint:
    """Open the checkpoint at `path`, whatever its format, going by content.

    `like` is a checkpoint of the same run; it saves parsing where `path` has its layout.

    Raises:
        UnreadableError: the file is missing, damaged or of no known format.
        SystemRefusalError: the system could not open or read it.
    """
    with open_file(path) as file:
        head = file.read(64)
    if not head:
        raise UnreadableError(path, "the file is empty")
    for signature, open_format in FORMATS.items():
        if head.lstrip().startswith(signature):
            return open_format(path, like)
    raise UnreadableError(
        path, "not a Keras checkpoint: neither a .keras archive, nor HDF5, nor a .weights.json"
    )
