"""Decode the messages of HDF5 objects: attributes, datatypes and dataspaces.

libhdf5 loops forever or crashes on damaged variable-length strings, the form in which Keras stores
`model_config` and layer names. So these few structures are decoded here, with every length checked, after
the HDF5 file format specification (version 3.0): attribute (IV.A.2.m), datatype (IV.A.2.d), dataspace
(IV.A.2.b) and global heap (III.E).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from swa_avg.files.region import Region

__all__ = [
    "Attribute",
    "AttributeReader",
    "DamagedStructureError",
    "decode",
    "number_of",
    "shape_of",
    "whole_name",
]

_INTEGER, _FLOAT, _FIXED_STRING, _VARIABLE_LENGTH = 0, 1, 3, 9
_TYPE_BYTES = {_INTEGER: 12, _FLOAT: 20}  # a message is padded to a multiple of eight
_CHARACTERS = bytes.fromhex("00 10000000 10000000 01000000 00000800").rstrip(b"\0")
"""The end of the type of variable-length strings: 16 bytes each, which refer to unsigned bytes."""
_PADDING = 8
_MAX_BYTES = 96 * 2**20  # more than the longest configuration that is parsed
_NUMBERS = {  # class and the rest of a datatype message -> NumPy's name
    (
        _INTEGER,
        struct.pack("<3BI2H", signed, 0, 0, size, 0, 8 * size),
    ): f"{'int' if signed else 'uint'}{8 * size}"
    for size in (1, 2, 4, 8)
    for signed in (0, 8)
} | {
    (
        _FLOAT,
        struct.pack(
            "<3BI2H4BI", 0x20, 8 * size - 1, 0, size, 0, 8 * size, mantissa, exponent, 0, mantissa, bias
        ),
    ): f"float{8 * size}"
    for size, mantissa, exponent, bias in ((2, 10, 5, 15), (4, 23, 8, 127), (8, 52, 11, 1023))
}


class DamagedStructureError(ValueError):
    """A structure of an HDF5 region does not follow the specification."""


@dataclass(frozen=True)
class Attribute:
    """One attribute, as stored in its message."""

    name: bytes
    shape: tuple[int, ...]
    datatype: bytes
    data: bytes

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return int.from_bytes(self.datatype[4:8], "little")

    @property
    def number(self) -> str | None:
        """NumPy's name for its type, if that is a plain little-endian number."""
        return number_of(self.datatype)

    @property
    def is_fixed_string(self) -> bool:
        return self.datatype[0] == 0x10 | _FIXED_STRING

    @property
    def is_variable_string(self) -> bool:
        return (
            self.datatype[0] == 0x10 | _VARIABLE_LENGTH
            and self.datatype[1] & 15 == 1
            and self.datatype[3:].rstrip(b"\0") == _CHARACTERS
        )

    @property
    def is_text(self) -> bool:
        """Whether it can be one of Keras's own, whose empty lists of names are empty arrays of numbers."""
        if 0 in self.shape and self.number is not None:
            return True
        return self.is_fixed_string or self.is_variable_string

    @property
    def encoding(self) -> str:
        """The character set of a string type."""
        bits = self.datatype[2] if self.is_variable_string else self.datatype[1] >> 4
        return "utf-8" if bits & 15 else "ascii"


class AttributeReader:
    """Reads attributes of one region.

    A hostile file may refer to the same bytes again and again; the total read is limited in proportion to
    the size of the region.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        self._budget = 4 * region.size + 2**20
        self._heaps: dict[int, dict[int, memoryview]] = {}
        self._heap_bytes = 0

    def strings(self, messages: Iterable[bytes], names: Sequence[str]) -> dict[str, list[bytes]]:
        """Return the attributes in `names` that an object's attribute messages hold.

        Keras splits an attribute above 64 kB into `name0`, `name1`, ...; the parts are joined under `name`.
        Each value is the flat list of its strings: one for a scalar, none for an empty array of any type.

        Raises:
            DamagedStructureError: a length or an address points outside the region, or a structure is
                malformed.
        """
        found = {}
        for attribute in map(decode, messages):
            if whole_name(attribute.name) in names:
                values = self.values(attribute)
                if values is not None:
                    found[attribute.name] = values
        joined: dict[str, list[bytes]] = {}
        for name in sorted(found, key=lambda part: (len(part), part)):
            joined.setdefault(whole_name(name), []).extend(found[name])
        return joined

    def values(self, attribute: Attribute) -> list[bytes] | None:
        """Return an attribute's strings, or None if it has another type; errors as for `strings`."""
        count, size, data = math.prod(attribute.shape), attribute.size, attribute.data
        if count == 0:
            return []
        if size == 0 or count > len(data):
            raise DamagedStructureError("an attribute is cut short")
        if attribute.is_fixed_string:
            return [data[i * size : (i + 1) * size].rstrip(b"\0") for i in range(count)]
        if attribute.is_variable_string:
            return [self._heap_object(data[i * 16 : i * 16 + 16]) for i in range(count)]
        return None

    def _heap_object(self, reference: bytes) -> bytes:
        length, address, index = struct.unpack("<IQI", reference)
        if length == 0:
            return b""
        if address not in self._heaps:
            self._heaps[address] = self._heap(address)
        found = self._heaps[address].get(index)
        if found is None or len(found) < length:
            raise DamagedStructureError("an attribute's string is missing from its heap")
        self._spend(length)
        return bytes(found[:length])

    def _heap(self, address: int) -> dict[int, memoryview]:
        signature, version, size = struct.unpack("<4sBxxxQ", self._read(address, 16))
        if signature != b"GCOL" or version != 1:
            raise DamagedStructureError("an attribute's heap is not a heap")
        self._heap_bytes += size
        if self._heap_bytes > _MAX_BYTES:
            raise DamagedStructureError(f"its attributes take more than {_MAX_BYTES >> 20} MiB")
        collection = memoryview(self._read(address, size))
        objects = {}
        position = 16
        while position + 16 <= size:
            index, length = struct.unpack_from("<HxxxxxxQ", collection, position)
            if index == 0:  # free space, to the end
                break
            if position + 16 + length > size:
                raise DamagedStructureError("an attribute's heap is cut short")
            objects[index] = collection[position + 16 : position + 16 + length]
            position += 16 + -(-length // 8) * 8
        return objects

    def _read(self, position: int, size: int) -> bytes:
        if position + size > self.region.size:
            raise DamagedStructureError("an attribute points outside the file")
        self._spend(size)
        return self.region.read(position, size)

    def _spend(self, size: int) -> None:
        self._budget -= size
        if size > _MAX_BYTES or self._budget < 0:
            raise DamagedStructureError("its attributes overlap, or are too long")


def whole_name(part: bytes) -> str:
    """Return the name of the attribute to which one of Keras's numbered parts belongs."""
    return part.rstrip(b"0123456789").decode("utf-8", "backslashreplace")


def decode(body: bytes) -> Attribute:
    """Return the attribute that an attribute message holds.

    Raises:
        DamagedStructureError: it is malformed or cut short.
    """
    try:
        version, name_size, type_size, space_size = struct.unpack_from("<BxHHH", body)
        if version not in (1, 2, 3):
            raise DamagedStructureError("an attribute has an unknown version")
        parts = []
        position = 9 if version == 3 else 8
        for size in (name_size, type_size, space_size):
            if position + size > len(body):
                raise DamagedStructureError("an attribute is cut short")
            parts.append(body[position : position + size])
            position += -(-size // 8) * 8 if version == 1 else size
        name, datatype, space = parts
        if len(datatype) < 8:
            raise DamagedStructureError("an attribute is cut short")
        if name.find(b"\0") != len(name) - 1:
            raise DamagedStructureError("an attribute's name has the wrong length")
        attribute = Attribute(name[:-1], shape_of(space), datatype, body[position:])
        left = len(attribute.data) - math.prod(attribute.shape) * attribute.size
        if not 0 <= left < _PADDING:
            raise DamagedStructureError("an attribute is cut short, or too long")
        return attribute
    except (struct.error, IndexError) as error:
        raise DamagedStructureError("an attribute is cut short") from error


def shape_of(space: bytes) -> tuple[int, ...]:
    """Return the shape in a dataspace message; (0,) for one without values.

    Raises:
        DamagedStructureError: its version is unknown, or it could grow, which nothing contiguous can.
        struct.error, IndexError: it is cut short.
    """
    version, rank, flags = space[0], space[1], space[2]
    start = {1: 8, 2: 4}.get(version)
    if start is None or flags not in (0, 1):
        raise DamagedStructureError("a dataspace is of an unknown version")
    if version == 2 and space[3] == 2:
        return (0,)
    shape = struct.unpack_from(f"<{rank}Q", space, start)
    if flags and struct.unpack_from(f"<{rank}Q", space, start + 8 * rank) != shape:
        raise DamagedStructureError("a dataspace could grow")
    return shape


def number_of(datatype: bytes) -> str | None:
    """Return NumPy's name for a datatype message, if it is a plain little-endian number."""
    version, kind = datatype[0] >> 4, datatype[0] & 15
    if not 1 <= version <= 3:
        return None
    return _NUMBERS.get((kind, datatype[1 : _TYPE_BYTES.get(kind, 0)]))
