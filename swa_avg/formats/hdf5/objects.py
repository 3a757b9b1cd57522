"""Read the structures of an HDF5 region, object headers and groups, and record where each of them lies.

They are those that every Keras writer produces, after the HDF5 file format specification (version 3.0):
superblock versions 0 and 1 (II.A), version 1 B-trees (III.A.1), symbol table nodes (III.B, III.C), local
heaps (III.D), global heaps (III.E) and object headers of version 1 (IV.A.1.a). They have no checksums, so
with a damaged address other bytes are read without an error. Most often those belong to another structure or
to a tensor. The extents are recorded to check that nothing overlaps.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from swa_avg.files.region import Region
from swa_avg.formats.hdf5.messages import DamagedStructureError, decode

__all__ = ["Extent", "Message", "NewerStructureError", "Structures"]

Extent = tuple[int, int]
"""First byte, and the one after the last."""
Message = tuple[int, int, bytes]
"""Of an object header: kind, flags and body."""

_ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x000C, 0x0010, 0x0011
_NEWER_GROUP = (0x0002, 0x0006)  # link info, link
_OF_GROUPS = {_SYMBOL_TABLE, *_NEWER_GROUP}
_OF_DATASETS = {0x0001, 0x0003, 0x0007, 0x0008, 0x000B}
_USED = {*_OF_DATASETS, _ATTRIBUTE, *_OF_GROUPS}
# Nothing, fill values, group info, attribute info, references: what else an object may have.
_OLD_FILL_VALUE = 0x0004
_PASSED_OVER = {0x0000, _OLD_FILL_VALUE, 0x0005, 0x000A, 0x0015, 0x0016}
_LENGTHS = {0x000E: 16, _CONTINUATION: 16, _SYMBOL_TABLE: 16, 0x0012: 8}  # times among them
_MAX_BLOCK = 2**26
_UNDEFINED = 2**64 - 1
_SHARED = 2
_SOFT_LINK = 2
_LAST_FREE = 1


class NewerStructureError(ValueError):
    """A structure is of a newer kind than this parser reads."""


def _free_bytes(heap: bytes, free: int) -> int:
    """Return how many bytes of a heap of names are free.

    Raises:
        DamagedStructureError: the list of free blocks is endless, which libhdf5 would not notice.
    """
    total = 0
    for _ in range(len(heap) // 16):
        if free == _LAST_FREE:
            break
        if free + 16 > len(heap):
            raise DamagedStructureError("a free block lies outside its heap")
        free, size = struct.unpack_from("<QQ", heap, free)
        total += size
    if free != _LAST_FREE:
        raise DamagedStructureError("the list of free blocks of a heap is endless")
    return total


def _is_known(kind: int, body: bytes) -> bool:
    """Tell whether an object can have such a message; otherwise its kind or its length is damaged."""
    if kind in _LENGTHS:
        return len(body) == _LENGTHS[kind]
    if kind == _OLD_FILL_VALUE:
        return int.from_bytes(body[:4], "little") + 4 <= len(body)
    return kind in _USED or kind in _PASSED_OVER


class Structures:
    """Reads structures, and records where they lie."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.found: set[Extent] = set()
        """The extent of every structure read."""
        self._heaps: set[int] = set()
        self._budget = region.size + 2**20
        version = self._read(8, 1)[0]
        self.is_newer = version > 1
        self.found.add((0, {0: 96, 1: 100}.get(version, 48)))
        if self.is_newer:
            leaf, internal, self.end, self.root = 4, 16, region.size, 0
        else:
            shift = 4 * version  # version 1 holds one number more
            widths, leaf, internal = struct.unpack("<13xHxHH", self._read(0, 20))
            base, free, self.end, driver = struct.unpack("<4Q", self._read(24 + shift, 32))
            (self.root,) = struct.unpack("<Q", self._read(64 + shift, 8))
            if widths != 0x0808 or base or {free, driver} != {_UNDEFINED}:
                raise DamagedStructureError("the superblock is not one that Keras writes")
            if self.end > region.size:
                raise DamagedStructureError(f"it has {region.size} bytes of {self.end}")
        self._node_size, self._tree_size = 8 + 2 * leaf * 40, 32 + 2 * internal * 16

    def messages(self, header: int) -> list[Message]:
        """Return the messages that matter here of the object whose header is at this address.

        Raises:
            NewerStructureError: the header is of a newer kind, which has a checksum.
        """
        version, count, size = struct.unpack("<BxHxxxxI", self._read(header, 12))
        if version != 1:
            self.found.add((header, header + 4))
            raise NewerStructureError
        messages: list[Message] = []
        blocks = [(header, 16, size)]
        while blocks:
            start, prefix, size = blocks.pop(0)
            block = self._take(start, prefix + size)[prefix:]
            position = 0
            while position < size:
                kind, length, flags = struct.unpack_from("<HHB", block, position)
                body = block[position + 8 : position + 8 + length]
                if len(body) < length:
                    raise DamagedStructureError("an object header is cut short")
                if not _is_known(kind, body):
                    raise DamagedStructureError("an object header holds what Keras does not write")
                if kind == _CONTINUATION:
                    address, more = struct.unpack_from("<QQ", body)
                    blocks.append((address, 0, more))
                elif kind == _ATTRIBUTE and not flags & _SHARED:
                    self._global_heaps(body)
                messages.append((kind, flags, body))
                position += 8 + length
        if len(messages) != count:
            raise DamagedStructureError("an object header has the wrong number of messages")
        kinds = {kind for kind, _, _ in messages}
        if kinds & _OF_GROUPS and kinds & _OF_DATASETS:
            raise DamagedStructureError("an object is a group and a dataset at once")
        return [message for message in messages if message[0] in _USED]

    @staticmethod
    def attributes(messages: Iterable[Message]) -> tuple[bytes, ...]:
        """Return an object's attribute messages, without shared ones, which hold an address instead."""
        return tuple(body for kind, flags, body in messages if kind == _ATTRIBUTE and not flags & _SHARED)

    def links(self, messages: list[Message]) -> Iterator[tuple[bytes, int | None]] | None:
        """Return name and header address of everything in a group, or None if the object is not a group.

        A soft link has None instead of an address.

        Raises:
            NewerStructureError: the group stores its links in another way, as for names that are not ASCII.
        """
        kinds = {kind for kind, _, _ in messages}
        if kinds & set(_NEWER_GROUP):
            raise NewerStructureError
        for kind, _, body in messages:
            if kind == _SYMBOL_TABLE:
                return self._symbols(*struct.unpack_from("<QQ", body))
        return None

    def _symbols(self, tree: int, heap: int) -> Iterator[tuple[bytes, int | None]]:
        signature, size, free, data = struct.unpack("<4sxxxxQQQ", self._take(heap, 32))
        self._expect(signature, b"HEAP")
        names = self._take(data, size)
        unused = _free_bytes(names, free) + 8  # the first 8 are the empty name of the group itself
        empty = True
        for entry in self._entries(tree):
            offset, address, cached = struct.unpack("<QQI", entry[:20])
            end = names.find(b"\0", offset)
            if not offset or offset % 8 or offset >= size or end < 0:
                raise DamagedStructureError("a name does not begin where its heap has names")
            empty = False
            yield names[offset:end], None if cached == _SOFT_LINK else address
        if empty and unused != size:
            raise DamagedStructureError("a group is empty, and its heap is not")

    def _entries(self, tree: int) -> Iterator[bytes]:
        """Yield the entries of all symbol table nodes below a B-tree, in the order of their names."""
        nodes: list[tuple[int, int | None]] = [(tree, None)]
        while nodes:
            address, expected = nodes.pop()
            node = self._take(address, self._tree_size)
            signature, kind, level, used, left, right = struct.unpack_from("<4sBBHQQ", node)
            self._expect(signature + bytes([kind]), b"TREE\0")
            if expected is None and (left, right) != (_UNDEFINED, _UNDEFINED):
                raise DamagedStructureError("the root of a tree has siblings")
            if expected not in (None, level):
                raise DamagedStructureError("a tree has the wrong depth")
            children = [struct.unpack_from("<Q", node, 32 + 16 * child)[0] for child in range(used)]
            if level:
                nodes.extend((child, level - 1) for child in reversed(children))
                continue
            for child in children:
                leaf = self._take(child, self._node_size)
                signature, version, count = struct.unpack_from("<4sBxH", leaf)
                self._expect(signature + bytes([version]), b"SNOD\1")
                # Writers clear the rest of a node: anything behind its links is a link that was lost.
                if not count or 8 + 40 * count > len(leaf) or leaf[8 + 40 * count :].strip(b"\0"):
                    raise DamagedStructureError("a group has the wrong number of links")
                yield from (leaf[start : start + 40] for start in range(8, 8 + 40 * count, 40))

    def _global_heaps(self, body: bytes) -> None:
        """Record where the heaps lie that hold an attribute's strings."""
        attribute = decode(body)
        if not attribute.is_variable_string:
            return
        for position in range(0, len(attribute.data) - 15, 16):
            length, address = struct.unpack_from("<IQ", attribute.data, position)
            if length and address not in self._heaps:
                self._heaps.add(address)
                signature, size = struct.unpack("<4sxxxxQ", self._read(address, 16))
                self._expect(signature, b"GCOL")
                self.found.add((address, address + size))

    def _take(self, start: int, size: int) -> bytes:
        """Return the bytes of a structure, and record where it lies."""
        if (start, start + size) in self.found:
            raise DamagedStructureError("a structure belongs to two others")
        self.found.add((start, start + size))
        return self._read(start, size)

    def _read(self, start: int, size: int) -> bytes:
        self._budget -= size
        if start + size > self.region.size or size > _MAX_BLOCK or self._budget < 0:
            raise DamagedStructureError("a structure lies outside the file, or overlaps another")
        return self.region.read(start, size)

    @staticmethod
    def _expect(found: bytes, expected: bytes) -> None:
        if found != expected:
            raise DamagedStructureError("an address leads to the wrong kind of structure")
