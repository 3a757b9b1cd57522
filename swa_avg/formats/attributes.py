"""Read string attributes from the bytes of an HDF5 image.

libhdf5 loops forever or crashes on damaged variable-length strings, the form in which Keras stores
`model_config` and layer names. So these few structures are decoded here, with every length checked, from
the HDF5 file format specification (version 3.0): object header version 1 (IV.A.1.a), continuation (IV.A.2.q),
attribute (IV.A.2.m), datatype (IV.A.2.d), dataspace (IV.A.2.b) and global heap (III.E). That is what every
Keras writer produces; an attribute stored in another way is reported as absent.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

from swa_avg.formats.base import Image

__all__ = ["DamagedAttributeError", "read_strings"]

_ATTRIBUTE, _CONTINUATION = 0x000C, 0x0010
_FIXED_STRING, _VARIABLE_LENGTH = 3, 9
_MAX_MESSAGES = 100_000
_MAX_VALUE = 256 * 2**20


class DamagedAttributeError(ValueError):
    """A structure that an attribute's bytes lead to is not what the format says."""


def read_strings(image: Image, header: int, names: Sequence[str]) -> dict[str, list[bytes]]:
    """Return those attributes in `names` that the object with header address `header` has.

    Keras splits an attribute above 64 kB into `name0`, `name1`, ...; the parts are joined under `name`. Each
    value is the flat list of its strings: one for a scalar, none for an empty array of any type.

    Raises:
        DamagedAttributeError: a length or an address points outside the image, or a structure is malformed.
    """
    wanted = {name.encode() for name in names}
    found = {}
    heaps: dict[int, dict[int, bytes]] = {}
    try:
        for body in _attribute_messages(image, header):
            name, value = _decode(image, body, wanted, heaps)
            if value is not None:
                found[name] = value
    except (struct.error, IndexError) as error:
        raise DamagedAttributeError("an attribute is cut short") from error
    joined: dict[str, list[bytes]] = {}
    for name in sorted(found, key=lambda part: (len(part), part)):
        joined.setdefault(_whole_name(name).decode(), []).extend(found[name])
    return joined


def _whole_name(part: bytes) -> bytes:
    return part.rstrip(b"0123456789")


def _read(image: Image, position: int, size: int) -> bytes:
    if position < 0 or size < 0 or size > _MAX_VALUE or position + size > image.size:
        raise DamagedAttributeError("an attribute points outside the file")
    return image.read(position, size)


def _attribute_messages(image: Image, header: int) -> Iterator[bytes]:
    version, count, size = struct.unpack("<BxHxxxxI", _read(image, header, 12))
    if version != 1:
        return
    blocks = [(header + 16, size)]
    seen = 0
    while blocks:
        start, size = blocks.pop(0)
        block = _read(image, start, size)
        position = 0
        while position + 8 <= size and seen < min(count, _MAX_MESSAGES):
            kind, length, flags = struct.unpack_from("<HHB", block, position)
            body = block[position + 8 : position + 8 + length]
            if len(body) < length:
                raise DamagedAttributeError("an object header is cut short")
            if kind == _CONTINUATION:
                blocks.append(struct.unpack_from("<QQ", body))
            elif kind == _ATTRIBUTE and not flags & 2:  # a shared message holds an address instead
                yield body
            position += 8 + length
            seen += 1


def _decode(
    image: Image, body: bytes, wanted: set[bytes], heaps: dict[int, dict[int, bytes]]
) -> tuple[bytes, list[bytes] | None]:
    version, name_size, type_size, space_size = struct.unpack_from("<BxHHH", body)
    if version not in (1, 2, 3):
        raise DamagedAttributeError("an attribute has an unknown version")
    parts = []
    position = 9 if version == 3 else 8
    for size in (name_size, type_size, space_size):
        if position + size > len(body):
            raise DamagedAttributeError("an attribute is cut short")
        parts.append(body[position : position + size])
        position += -(-size // 8) * 8 if version == 1 else size
    name, datatype, space = parts
    name = name.rstrip(b"\0")
    if _whole_name(name) not in wanted:
        return name, None
    count = _count(space)
    kind, size = datatype[0] & 15, struct.unpack_from("<I", datatype, 4)[0]
    if count == 0:
        return name, []
    data = body[position : position + count * size]
    if size == 0 or count > len(body) or len(data) < count * size:
        raise DamagedAttributeError("an attribute is cut short")
    if kind == _FIXED_STRING:
        return name, [data[i * size : (i + 1) * size].rstrip(b"\0") for i in range(count)]
    if kind == _VARIABLE_LENGTH and size == 16 and datatype[1] & 15 == 1:
        return name, [_heap_object(image, data[i * 16 : i * 16 + 16], heaps) for i in range(count)]
    return name, None


def _count(space: bytes) -> int:
    version, rank = space[0], space[1]
    if version == 1:
        return math.prod(struct.unpack_from(f"<{rank}Q", space, 8))
    if version == 2:
        return 0 if space[3] == 2 else math.prod(struct.unpack_from(f"<{rank}Q", space, 4))
    raise DamagedAttributeError("an attribute has an unknown dataspace")


def _heap_object(image: Image, reference: bytes, heaps: dict[int, dict[int, bytes]]) -> bytes:
    length, address, index = struct.unpack("<IQI", reference)
    if length == 0:
        return b""
    if address not in heaps:
        heaps[address] = _heap(image, address)
    try:
        return heaps[address][index][:length]
    except KeyError:
        raise DamagedAttributeError("an attribute's string is missing from its heap") from None


def _heap(image: Image, address: int) -> dict[int, bytes]:
    signature, version, size = struct.unpack("<4sBxxxQ", _read(image, address, 16))
    if signature != b"GCOL" or version != 1:
        raise DamagedAttributeError("an attribute's heap is not a heap")
    collection = _read(image, address, size)
    objects = {}
    position = 16
    while position + 16 <= size:
        index, length = struct.unpack_from("<HxxxxxxQ", collection, position)
        if index == 0:  # free space, to the end
            break
        if position + 16 + length > size:
            raise DamagedAttributeError("an attribute's heap is cut short")
        objects[index] = collection[position + 16 : position + 16 + length]
        position += 16 + -(-length // 8) * 8
    return objects
