"""Where the structures of an HDF5 image lie, apart from the data of its datasets.

HDF5 keeps no checksum of addresses, so that a damaged one reads other bytes without an error. What it leads
to is mostly a structure or another tensor, and that nothing overlaps can be checked. Source: the HDF5 file
format specification (version 3.0), superblock (II.A), version 1 B-trees (III.A.1), symbol table nodes
(III.B), local heaps (III.D), global heaps (III.E), object headers (IV.A.1.a).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from swa_avg.formats.attributes import Attribute, DamagedAttributeError, decode
from swa_avg.formats.base import Image

__all__ = ["Extent", "structures"]

Extent = tuple[int, int]
"""First byte, and the one after the last."""

_ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x000C, 0x0010, 0x0011
_MAX_BLOCK = 2**26


def structures(image: Image, headers: Iterable[int]) -> set[Extent]:
    """Return the extents of the structures that the objects with these header addresses consist of.

    Of objects in newer layouts than Keras writes, the first bytes alone.

    Raises:
        DamagedAttributeError: a structure is not what the format says, or lies outside the image.
    """
    try:
        return _Structures(image).of(headers)
    except (struct.error, IndexError) as error:
        raise DamagedAttributeError("a structure is cut short") from error


class _Structures:
    def __init__(self, image: Image) -> None:
        self.image = image
        self.found: set[Extent] = set()
        self.heaps: set[int] = set()
        self.budget = image.size + 2**20
        version = self._read(8, 1)[0]
        leaf, internal = struct.unpack("<2H", self._read(16, 4)) if version < 2 else (4, 16)
        self.node_size, self.tree_size = 8 + 2 * leaf * 40, 32 + 2 * internal * 16
        self.found.add((0, {0: 96, 1: 100}.get(version, 48)))

    def of(self, headers: Iterable[int]) -> set[Extent]:
        for header in set(headers):
            version, count, size = struct.unpack("<BxHxxxxI", self._read(header, 12))
            if version != 1:  # newer layouts have checksums
                self.found.add((header, header + 4))
                continue
            self._header(header, count, size)
        return self.found

    def _header(self, header: int, count: int, size: int) -> None:
        blocks = [(header, 16, size)]
        while blocks:
            start, prefix, size = blocks.pop()
            block = self._take(start, prefix + size)[prefix:]
            position = 0
            while position + 8 <= size and count:
                kind, length, flags = struct.unpack_from("<HHB", block, position)
                body = block[position + 8 : position + 8 + length]
                if kind == _CONTINUATION:
                    address, more = struct.unpack_from("<QQ", body)
                    blocks.append((address, 0, more))
                elif kind == _SYMBOL_TABLE:
                    self._symbols(*struct.unpack_from("<QQ", body))
                elif kind == _ATTRIBUTE and not flags & 2:
                    self._global_heaps(decode(body))
                position += 8 + length
                count -= 1

    def _symbols(self, tree: int, heap: int) -> None:
        signature, size, data = struct.unpack("<4sxxxxQxxxxxxxxQ", self._take(heap, 32))
        self._expect(signature, b"HEAP")
        self._take(data, size)
        pending = [tree]
        while pending:
            node = self._take(pending.pop(), self.tree_size)
            signature, kind, level, used = struct.unpack_from("<4sBBH", node)
            self._expect(signature + bytes([kind]), b"TREE\0")
            for child in range(used):
                (address,) = struct.unpack_from("<Q", node, 32 + 16 * child)
                if level:
                    pending.append(address)
                else:
                    self._expect(self._take(address, self.node_size)[:4], b"SNOD")

    def _global_heaps(self, attribute: Attribute) -> None:
        if not attribute.is_variable_string:
            return
        for position in range(0, len(attribute.data) - 15, 16):
            length, address = struct.unpack_from("<IQ", attribute.data, position)
            if length and address not in self.heaps:
                self.heaps.add(address)
                signature, size = struct.unpack("<4sxxxxQ", self._read(address, 16))
                self._expect(signature, b"GCOL")
                self.found.add((address, address + size))

    def _take(self, start: int, size: int) -> bytes:
        """Return the bytes of a structure, and note where it lies."""
        self.found.add((start, start + size))
        return self._read(start, size)

    def _read(self, start: int, size: int) -> bytes:
        self.budget -= size
        if start + size > self.image.size or size > _MAX_BLOCK or self.budget < 0:
            raise DamagedAttributeError("a structure lies outside the file, or overlaps another")
        return self.image.read(start, size)

    @staticmethod
    def _expect(found: bytes, expected: bytes) -> None:
        if found != expected:
            raise DamagedAttributeError("an address leads to another structure than it should")
