"""What is left to libhdf5: to read structures of newer kinds, and to check that an output can be read.

Keras's files use these newer structures, which have checksums, for groups with a name that is not ASCII.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Mapping
from typing import Any

import h5py
from h5py import h5a, h5d, h5g, h5l, h5o, h5s, h5t

from swa_avg.errors import SwaAvgError, UnreadableError, first_line
from swa_avg.files.region import Region, RegionFile
from swa_avg.formats.base import Tensor
from swa_avg.formats.hdf5.objects import NewerStructureError, Structures
from swa_avg.formats.hdf5.walk import Walk

__all__ = ["attributes_of", "check_readable", "walk_newer"]

_KNOWN_TYPES: dict[tuple[int, int], tuple[tuple[str, Any], ...]] = {
    (h5t.FLOAT, 2): (("float16", h5t.IEEE_F16LE),),
    (h5t.FLOAT, 4): (("float32", h5t.IEEE_F32LE),),
    (h5t.FLOAT, 8): (("float64", h5t.IEEE_F64LE),),
    (h5t.INTEGER, 1): (("int8", h5t.STD_I8LE), ("uint8", h5t.STD_U8LE)),
    (h5t.INTEGER, 2): (("int16", h5t.STD_I16LE), ("uint16", h5t.STD_U16LE)),
    (h5t.INTEGER, 4): (("int32", h5t.STD_I32LE), ("uint32", h5t.STD_U32LE)),
    (h5t.INTEGER, 8): (("int64", h5t.STD_I64LE), ("uint64", h5t.STD_U64LE)),
}


def walk_newer(walk: Walk, structures: Structures) -> None:
    """Visit every object that can be reached by hard links, without reading an attribute or a value.

    Raises:
        UnreadableError: libhdf5 cannot read the file.
        DamagedStructureError: a structure of the older kind is damaged.
    """
    addresses = _visit(walk)
    if structures.is_newer:
        structures.end = _end_of_file(walk)
    known: dict[int, tuple[bytes, ...]] = {}
    for objects in (walk.groups, walk.datasets):
        for path in objects:
            address = addresses[path]
            if address not in known:
                known[address] = attributes_of(structures, address)
            objects[path] = known[address]


def attributes_of(structures: Structures, address: int) -> tuple[bytes, ...]:
    """Return an object's attribute messages, and record its structures; a newer object yields none."""
    try:
        messages = structures.messages(address)
    except NewerStructureError:
        return ()
    with contextlib.suppress(NewerStructureError):
        for _ in structures.links(messages) or ():
            pass
    return structures.attributes(messages)


def check_readable(region: Region, tensors: Mapping[str, Tensor]) -> None:
    """Check that libhdf5, and so Keras, finds these tensors in a region, and no others.

    Raises:
        UnreadableError: it does not, because the file that it was copied from, `region.path`, is damaged.
    """
    walk = Walk(region, 0)
    _visit(walk)
    found = {name: (t.shape, t.offset, t.nbytes) for name, t in walk.tensors.items()}
    if found != {name: (t.shape, t.offset, t.nbytes) for name, t in tensors.items()}:
        raise UnreadableError(region.path, "damaged HDF5 file (libhdf5 finds other tensors in it)")


def _visit(walk: Walk) -> dict[str, int]:
    """Walk a region, and return path -> address of the object header."""
    addresses: dict[str, int] = {}
    try:
        with h5py.File(RegionFile(walk.region), "r") as file:
            _visit_all(walk, file.id, addresses)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, SwaAvgError):
            raise
        problem = f"damaged HDF5 file ({first_line(error)})"
        raise UnreadableError(walk.region.path, problem, tensor=walk.at) from error
    return addresses


def _visit_all(walk: Walk, file: Any, addresses: dict[str, int]) -> None:
    root = h5g.open(file, b"/")
    addresses[""] = h5o.get_info(root).addr
    walk.enter("", addresses[""], ())
    pending = [("", root)]
    while pending:
        path, group = pending.pop()
        for name in group:
            child = walk.child(path, name)
            if group.links.get_info(name).type != h5l.TYPE_HARD:
                raise walk.refuse_link(child)
            info = h5o.get_info(group, name)
            addresses[child] = info.addr
            if info.type == h5o.TYPE_GROUP:
                walk.enter(child, info.addr, ())
                pending.append((child, h5g.open(group, name)))
            elif info.type == h5o.TYPE_DATASET:
                walk.datasets[child] = ()
                _add_tensor(walk, child, h5d.open(group, name))
            else:
                raise walk.refuse_object(child)


def _add_tensor(walk: Walk, name: str, dataset: Any) -> None:
    # Storage first: asking a virtual dataset for its shape would open the files that it names.
    properties = dataset.get_create_plist()
    if (
        properties.get_layout() != h5d.CONTIGUOUS
        or properties.get_nfilters()
        or properties.get_external_count()
    ):
        raise walk.refuse_storage(name)
    kind = _type(dataset)
    if kind is None:
        raise walk.refuse_type(name)
    space = dataset.get_space()
    shape: tuple[int, ...] = space.shape if space.get_simple_extent_type() != h5s.NULL else (0,)
    nbytes = math.prod(shape) * kind[1]
    offset = dataset.get_offset()
    walk.check_size(name, nbytes, offset, dataset.get_storage_size())
    walk.add(name, shape, kind, offset or 0)


def _type(dataset: Any) -> tuple[str, int] | None:
    stored = dataset.get_type()
    kind, size = stored.get_class(), stored.get_size()
    for dtype, known in _KNOWN_TYPES.get((kind, size), ()):
        if stored.equal(known):
            return dtype, size
    if kind == h5t.OPAQUE and size == 2:
        # Keras 3 tags bfloat16 with an attribute; its presence is enough, its value is not read.
        return ("bfloat16" if h5a.exists(dataset, b"dtype") else "opaque16"), size
    if kind == h5t.ENUM and stored.equal(h5t.py_create(bool, logical=True)):
        return "bool", size
    return None


def _end_of_file(walk: Walk) -> int:
    """Return where the file ends according to the superblock; HDF5 treats what lies beyond as free space."""
    return int(min(walk.region.size, struct.unpack("<Q", walk.region.read(28, 8))[0]))
