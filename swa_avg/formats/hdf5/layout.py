"""Find where each tensor of an HDF5 region lies, and check that no two parts of the region overlap."""

from __future__ import annotations

import itertools
import math
import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from swa_avg.errors import UnreadableError
from swa_avg.files.region import Region
from swa_avg.formats.base import RECORD_NAME, Tensor
from swa_avg.formats.hdf5.messages import (
    AttributeReader,
    DamagedStructureError,
    decode,
    number_of,
    shape_of,
)
from swa_avg.formats.hdf5.objects import Extent, Message, NewerStructureError, Structures
from swa_avg.formats.hdf5.walk import Walk

__all__ = ["SIGNATURE", "Layout", "read_layout"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK_SIZE = 96

_DATASPACE, _DATATYPE, _EXTERNAL, _STORAGE, _FILTERS = 0x0001, 0x0003, 0x0007, 0x0008, 0x000B
_ROOT_ATTRIBUTES = {
    *(b"layer_names", b"keras_version", b"backend", b"model_config", b"training_config"),
    RECORD_NAME.encode(),
}
_GROUP_ATTRIBUTES = {b"name", b"weight_names", b"layer_names", b"keras_version", b"backend"}
_DATASET_ATTRIBUTES = {b"dtype"}
_SHARED = 2
_CONTIGUOUS = 1
_OPAQUE = 5
_BOOL = (  # h5py's: an enumeration of int8
    bytes.fromhex("18 020000 01000000 10 080000 01000000 00000800") + b"FALSE\0\0\0TRUE\0\0\0\0\0\1"
)
_UNALLOCATED = 2**64 - 1


@dataclass(frozen=True)
class Layout:
    """What one HDF5 region holds, apart from the values."""

    tensors: Mapping[str, Tensor]
    groups: Mapping[str, Sequence[bytes]]
    """Path -> attribute messages; the root is the empty path."""
    datasets: Mapping[str, Sequence[bytes]]
    """The same for datasets."""


def read_layout(region: Region, index: int = 0) -> Layout:
    """Find where the tensors of an HDF5 region lie; no value is read.

    libhdf5 is used only where a group stores its links in a newer way than Keras's files do, and never for
    attributes.

    Raises:
        UnreadableError: the file is damaged, or holds something other than plain contiguous tensors.
    """
    if region.size < len(SIGNATURE) or region.read(0, len(SIGNATURE)) != SIGNATURE:
        raise UnreadableError(region.path, "not an HDF5 file")
    walk = Walk(region, index)
    try:
        structures = Structures(region)
        try:
            _walk(walk, structures)
        except NewerStructureError:
            from swa_avg.formats.hdf5.libhdf5 import walk_newer

            walk, structures = Walk(region, index), Structures(region)
            walk_newer(walk, structures)
        _check_attributes(walk)
    except (DamagedStructureError, struct.error, IndexError, MemoryError) as error:
        problem = f"damaged HDF5 file ({error or 'a structure is too large'})"
        raise UnreadableError(region.path, problem, tensor=walk.at) from error
    layout = Layout({**walk.tensors, **walk.inner_optimizers()}, walk.groups, walk.datasets)
    _check_extents(region, layout.tensors.values(), structures)
    return layout


def _walk(walk: Walk, structures: Structures) -> None:
    """Visit every object that can be reached, without recursion, and read none twice.

    Raises:
        NewerStructureError: an object is of a newer kind than this parser reads.
    """
    if structures.is_newer:
        raise NewerStructureError
    known: dict[int, list[Message]] = {}
    root = structures.messages(structures.root)
    walk.enter("", structures.root, structures.attributes(root))
    pending = [("", root)]
    while pending:
        path, messages = pending.pop()
        links = structures.links(messages)
        if links is None:
            raise walk.refuse_object(path)
        for name, address in links:
            child = walk.child(path, name)
            if address is None:
                raise walk.refuse_link(child)
            if address not in known:
                known[address] = structures.messages(address)
            messages = known[address]
            attributes = structures.attributes(messages)
            if any(kind == _STORAGE for kind, _, _ in messages):
                walk.datasets[child] = attributes
                _add_tensor(walk, child, messages, attributes)
            else:
                walk.enter(child, address, attributes)
                pending.append((child, messages))


def _add_tensor(walk: Walk, name: str, messages: Sequence[Message], attributes: Iterable[bytes]) -> None:
    kinds = [kind for kind, _, _ in messages]
    if any(kinds.count(kind) > 1 for kind in (_DATASPACE, _DATATYPE, _STORAGE)):
        raise DamagedStructureError("a dataset has two shapes, types or places")
    bodies = {kind: body for kind, _, body in messages}
    flags = {kind: flag for kind, flag, _ in messages}
    storage = bodies[_STORAGE]
    if storage[0] not in (3, 4) or flags.get(_DATASPACE, 0) & _SHARED:
        raise NewerStructureError
    if storage[1] != _CONTIGUOUS or _FILTERS in bodies or _EXTERNAL in bodies:
        raise walk.refuse_storage(name)
    if not {_DATASPACE, _DATATYPE} <= bodies.keys():
        raise DamagedStructureError("a dataset has no shape or no type")
    if flags[_DATATYPE] & _SHARED:
        raise walk.refuse_type(name)
    kind = _type(bodies[_DATATYPE], attributes)
    if kind is None:
        raise walk.refuse_type(name)
    shape = shape_of(bodies[_DATASPACE])
    offset, stored = struct.unpack_from("<QQ", storage, 2)
    nbytes = math.prod(shape) * kind[1]
    walk.check_size(name, nbytes, None if offset == _UNALLOCATED else offset, stored)
    walk.add(name, shape, kind, offset)


def _type(datatype: bytes, attributes: Iterable[bytes]) -> tuple[str, int] | None:
    """Return the type of a datatype message and the bytes of a value; None if Keras has no such type."""
    number = number_of(datatype)
    kind, size = datatype[0] & 15, int.from_bytes(datatype[4:8], "little")
    if number is not None:
        return number, size
    if kind == _OPAQUE and size == 2:
        # Keras 3 tags bfloat16 with an attribute; its presence is enough.
        tagged = any(decode(body).name == b"dtype" for body in attributes)
        return ("bfloat16" if tagged else "opaque16"), size
    if datatype.rstrip(b"\0") == _BOOL:
        return "bool", size
    return None


def _check_attributes(walk: Walk) -> None:
    """Raise UnreadableError unless Keras's own attributes have their names and are text.

    Others may be there: people add their own, such as the names of classes.

    Raises:
        DamagedStructureError: an attribute is malformed.
    """
    reader = AttributeReader(walk.region)
    for path, messages in walk.groups.items():
        walk.at = path or None
        _check_names(walk, messages, _GROUP_ATTRIBUTES if path else _ROOT_ATTRIBUTES)
    for path, messages in walk.datasets.items():
        walk.at = path
        _check_names(walk, messages, _DATASET_ATTRIBUTES)
        if messages and reader.strings(messages, ["dtype"]).get("dtype") not in (None, [b"bfloat16"]):
            raise walk.refuse_type(path)


def _check_names(walk: Walk, messages: Iterable[bytes], known: set[bytes]) -> None:
    """Raise an error if an attribute's name is one letter off a known one, or a known one is not text."""
    found = {attribute.name.rstrip(b"0123456789"): attribute for attribute in map(decode, messages)}
    if not all(found[name].is_text for name in found.keys() & known):
        raise DamagedStructureError("an attribute is not text")
    for own, other in itertools.product(found.keys() - known, known - found.keys()):
        if len(own) == len(other) and sum(map(operator.ne, own, other)) == 1:
            shown = own.decode("utf-8", "backslashreplace")
            problem = f"has no attribute `{other.decode()}`, but one `{shown}`: its name is damaged"
            raise UnreadableError(walk.region.path, problem, tensor=walk.at, hint="leave this file out")


def _check_extents(region: Region, tensors: Iterable[Tensor], structures: Structures) -> None:
    """Raise UnreadableError unless every extent lies inside the region and overlaps nothing.

    The exact same extent twice is one dataset with two names.
    """
    stored = [tensor for tensor in tensors if tensor.nbytes]
    for tensor in stored:
        if tensor.offset < _SUPERBLOCK_SIZE or tensor.stop > structures.end:
            problem = f"its {tensor.nbytes} bytes lie outside the file; it was truncated or damaged"
            raise UnreadableError(region.path, problem, tensor=tensor.name)
    extents: dict[Extent, str] = {(tensor.offset, tensor.stop): tensor.name for tensor in stored}
    position, name = 0, ""
    for (start, stop), this in sorted([*extents.items(), *((extent, "") for extent in structures.found)]):
        if start < position:
            problem = "overlaps another part of the file; it is damaged"
            raise UnreadableError(region.path, problem, tensor=this or name or None)
        position, name = stop, this
