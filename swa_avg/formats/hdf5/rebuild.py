"""Write HDF5 files with libhdf5: without some groups, or with the record of how they were made."""

from __future__ import annotations

import io
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import IO, Any

import h5py
import numpy as np
from h5py import h5d, h5o, h5p, h5s, h5t

from swa_avg.errors import SwaAvgError, UnreadableError, first_line
from swa_avg.files.location import Location
from swa_avg.files.region import Region, RegionFile
from swa_avg.files.sources import LocalSource
from swa_avg.formats.base import RECORD_NAME, Checkpoint, Tensor
from swa_avg.formats.hdf5.layout import Layout, read_layout
from swa_avg.formats.hdf5.libhdf5 import attributes_of
from swa_avg.formats.hdf5.messages import (
    Attribute,
    AttributeReader,
    DamagedStructureError,
    decode,
    whole_name,
)
from swa_avg.formats.hdf5.objects import Structures

__all__ = ["strip", "write_record"]

_ATTRIBUTE_BYTES = 60_000  # HDF5 takes 64 kB an attribute


def strip(checkpoint: Checkpoint, groups: Sequence[str], scratch: Callable[[], IO[bytes]]) -> dict[str, Any]:
    """Return shards and tensors of a checkpoint without some top-level groups.

    HDF5 does not free the space of what is deleted, so each region is built anew from what has been read and
    checked; libhdf5 only writes here, and does not read the input.

    Raises:
        UnreadableError: an attribute is damaged, or of a type that Keras does not write.
    """
    shards = []
    tensors: dict[str, Tensor] = {}
    for index, region in enumerate(checkpoint.shards):
        file = scratch()
        layout = read_layout(region, index)
        kept = {name: t for name, t in layout.tensors.items() if name.split("/")[0] not in groups}
        with _hdf5(file, "w") as target:
            _rebuild(target, region, layout, groups, kept)
        file.flush()
        stripped = Region(LocalSource(region.path, file))
        shards.append(stripped)
        for name, tensor in read_layout(stripped, index).tensors.items():
            own = checkpoint.tensors[name]
            tensors[name] = replace(tensor, dtype=own.dtype, role=own.role)
            file.seek(tensor.offset)
            for chunk in region.chunks(own.offset, own.stop):
                file.write(chunk)
        file.flush()
        shards[-1] = Region(LocalSource(region.path, file))  # it was written to since
    return {"shards": tuple(shards), "tensors": tensors}


def _rebuild(
    target: Any, region: Region, layout: Layout, groups: Sequence[str], kept: Mapping[str, Tensor]
) -> None:
    """Create the groups and attributes of a layout, and allocate its tensors."""
    reader = AttributeReader(region)
    for path, messages in layout.groups.items():
        if path.split("/")[0] not in groups:
            _copy_attributes(reader, messages, path, target.require_group(path) if path else target)
    places: dict[tuple[int, int], str] = {}
    for name, tensor in kept.items():
        first = places.setdefault((tensor.offset, tensor.nbytes), name)
        if tensor.nbytes and first != name:
            target[name] = target[first]
            continue
        properties = h5p.create(h5p.DATASET_CREATE)
        properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)  # equal inputs give equal bytes
        dtype = np.dtype("V2" if tensor.dtype in ("bfloat16", "opaque16") else tensor.dtype)
        space = h5s.create_simple(tensor.shape) if tensor.shape else h5s.create(h5s.SCALAR)
        identifier = h5d.create(
            target.id, name.encode(), h5t.py_create(dtype, logical=True), space, properties
        )
        _copy_attributes(reader, layout.datasets[name], name, h5py.Dataset(identifier))


def _copy_attributes(reader: AttributeReader, messages: Sequence[bytes], path: str, target: Any) -> None:
    try:
        for attribute in map(decode, messages):
            values = _values(reader, attribute)
            target.attrs.create(attribute.name.decode(), values, attribute.shape, values.dtype)
    except (DamagedStructureError, ValueError) as error:
        problem = f"an attribute cannot be copied ({error})"
        raise UnreadableError(
            reader.region.path, problem, tensor=path, hint="use --optimizer keep"
        ) from error


def _values(reader: AttributeReader, attribute: Attribute) -> np.ndarray[Any, Any]:
    """Return an attribute's value in the type that h5py is to store."""
    if attribute.number is not None:
        count = math.prod(attribute.shape)
        return np.frombuffer(attribute.data, attribute.number, count).reshape(attribute.shape)
    strings = reader.values(attribute)
    if strings is None or not (attribute.is_fixed_string or attribute.is_variable_string):
        raise DamagedStructureError("it has a type that Keras does not write")
    length = attribute.size if attribute.is_fixed_string else None
    return np.array(strings, h5py.string_dtype(attribute.encoding, length)).reshape(attribute.shape)


class _GuardedFile(io.RawIOBase):
    """A file object for h5py that lets it write anywhere but over the tensors.

    libhdf5 believes what the file says is free space, and that may be wrong. It is not told of errors, since
    it then loses track of what it has open, and 1.14.2 crashes as the process ends: `error` keeps the first.
    After an interrupt, an h5py object may outlive the file, and flush what nobody keeps.
    """

    def __init__(self, file: IO[bytes], tensors: Iterable[Tensor]) -> None:
        self.error: OSError | ValueError | None = None
        self._file = file
        extents = sorted((tensor.offset, tensor.stop) for tensor in tensors if tensor.nbytes)
        self._starts = [start for start, _ in extents]
        self._stops = [stop for _, stop in extents]

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._keeping_errors():
            return self._file.seek(offset, whence)
        return 0

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]

    def write(self, data: Any) -> int:
        with self._keeping_errors():
            self._check(self._file.tell(), len(data))
            self._file.write(data)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        with self._keeping_errors():
            self._check(size, max(self._stops, default=0) - size)
            self._file.truncate(size)
        return size

    def flush(self) -> None:
        with self._keeping_errors():
            self._file.flush()

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def _check(self, position: int, size: int) -> None:
        """Raise ValueError if a write of `size` bytes at `position` touches a tensor."""
        index = bisect_right(self._stops, position)
        if size > 0 and index < len(self._starts) and self._starts[index] < position + size:
            raise ValueError("its free space is not free")


@contextmanager
def _hdf5(file: IO[bytes], mode: str, tensors: Iterable[Tensor] = ()) -> Iterator[h5py.File]:
    """Open a file with h5py: through a Python object, since h5py crashes where it cannot write to a path.

    Raises:
        OSError: the disk is full.
        ValueError: (as it is closed) libhdf5 would have written over the tensors.
    """
    guarded = _GuardedFile(file, tensors)
    try:
        with h5py.File(guarded, mode) as hdf5:
            yield hdf5
    finally:
        if guarded.error is not None:
            raise guarded.error


def write_record(
    file: IO[bytes], record: Mapping[str, Any], path: Location, tensors: Iterable[Tensor]
) -> None:
    """Add the record to an HDF5 file as JSON in the root attribute `swa_avg`, in parts if it is long.

    Raises:
        UnreadableError: HDF5 cannot, or the attribute does not read back: what the file was copied from,
            `path`, is damaged.
    """
    text = json.dumps(record, separators=(",", ":")).encode("ascii")
    parts = [text[start : start + _ATTRIBUTE_BYTES] for start in range(0, len(text), _ATTRIBUTE_BYTES)]
    names = [RECORD_NAME] if len(parts) == 1 else [f"{RECORD_NAME}{number}" for number in range(len(parts))]
    try:
        with _hdf5(file, "r+", tensors) as hdf5:
            root = h5o.get_info(hdf5.id).addr
            region = Region(LocalSource(path, file))
            for body in attributes_of(Structures(region), root):  # of an average that was an input
                if whole_name(decode(body).name) == RECORD_NAME:
                    del hdf5.attrs[decode(body).name.decode()]
            for name, part in zip(names, parts, strict=True):
                hdf5.attrs[name] = np.bytes_(part)
        file.flush()
        with h5py.File(RegionFile(Region(LocalSource(path, file))), "r") as hdf5:
            if b"".join(bytes(hdf5.attrs[name]) for name in names) != text:
                raise ValueError("the record of how it was made does not read back")
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, SwaAvgError) or (isinstance(error, OSError) and error.errno):
            raise
        raise UnreadableError(path, f"damaged HDF5 file ({first_line(error)})") from error
