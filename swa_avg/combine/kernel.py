"""Averages one block at a time, on any thread or machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import local
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from isal.isal_zlib import crc32

from swa_avg.combine.blocks import Block, Source, read_pieces
from swa_avg.combine.sums import Pieces, Row, Sums
from swa_avg.errors import SystemRefusalError
from swa_avg.formats.base import Written
from swa_avg.planning.policy import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SLACK", "STRETCH", "Averaged", "BlockWorker", "Target", "aligned"]

SLACK = 64
"""Bytes that a buffer has more than a block, to shift it by."""
STRETCH = 2**30
"""Bytes of an input that are checked at a time, where its blocks are not the template's."""

Averaged = tuple["NDArray[np.uint8] | Written", list[int]]
"""Averages of a block, of shape (rows, bytes), or word that they are in the output; and the CRC-32 of the
block's bytes in each of the checked inputs."""
Target = tuple[str, int]
"""The output's name, and where in it the shard starts."""


@dataclass(frozen=True)
class BlockWorker:
    """Combines one block at a time, on any thread; it can be pickled."""

    inputs: tuple[Source, ...]
    template: Source
    rows: tuple[Row, ...]
    block_bytes: int
    verify: bool
    _scratch: local = field(default_factory=local, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockWorker, (self.inputs, self.template, self.rows, self.block_bytes, self.verify)

    @property
    def subject(self) -> str:
        """The file that it is about, for messages."""
        return str(self.template.path)

    def checked(self) -> list[int]:
        """Return the inputs whose bytes are all read and checked block by block: their tensors lie where the
        template's do."""
        return [number for number, source in enumerate(self.inputs) if self._is_read_whole(source)]

    def _is_read_whole(self, source: Source) -> bool:
        template = self.template
        return source.tensors is template.tensors and (self.verify or source.shards is template.shards)

    def __call__(self, blocks: Sequence[Block], averages: NDArray[np.uint8] | None = None) -> list[Averaged]:
        """Average each block, into `averages`, of shape (rows, bytes), where it is one block; else into new
        arrays."""
        results: list[Averaged] = []
        for block in blocks:
            room = averages
            if room is None:
                room = aligned(np.empty((len(self.rows), block.size + SLACK), np.uint8), block)
            results.append((room, self._combine(block, room)))
        return results

    def write(self, blocks: Sequence[Block], target: Target) -> list[Averaged]:
        """Average each block and write the first row to its place in a file.

        Where this process does not see the file, nothing is written, and the averages are returned.

        Raises:
            SystemRefusalError: the disk is full, or writing failed.
        """
        name, start = target
        results = self(blocks)
        try:
            file = open(name, "r+b", buffering=0)  # noqa: SIM115
        except OSError:
            return results
        try:
            with file:
                return [
                    (_put(file, start + block.start, averages), checksums)
                    for block, (averages, checksums) in zip(blocks, results, strict=True)
                ]
        except OSError as error:
            raise SystemRefusalError(error.errno, f"cannot write: {error.strerror}", name) from error

    def checksum(self, number: int, index: int, start: int) -> tuple[int, int]:
        """Return the CRC-32 of a stretch of shard `index` of input `number`, and its bytes."""
        shard = self.inputs[number].shards[index]
        stop = min(start + STRETCH, shard.size)
        return shard.checksum(start, stop, self.block_bytes), stop - start

    def _combine(self, block: Block, averages: NDArray[np.uint8]) -> list[int]:
        """Average a block into `averages`; return the CRC-32 of its bytes in each of the `checked` inputs."""
        with np.errstate(all="ignore"):  # what is not finite is found at the end
            return self._combined(block, averages)

    def _combined(self, block: Block, averages: NDArray[np.uint8]) -> list[int]:
        template = self.template
        checksums = []
        last = len(self.inputs) - 1
        scratch = self._buffer(block) if block.pieces else averages[0]
        pieces = Pieces(block, scratch)
        sums = Sums(block, self.rows, self._accumulator(block))
        for number, source in enumerate(self.inputs):
            raw = scratch
            if self._is_read_whole(source):
                if number == last:  # the newest input, whose bytes are the output's
                    raw = averages[0]
                source.shards[block.shard].read_into(raw.data, block.start)
                checksums.append(crc32(raw))
            elif block.pieces:
                read_pieces(source, template, block, raw)
            if block.pieces:
                sums.add(number, pieces if raw is scratch else Pieces(block, raw))
        if not self._is_read_whole(self.inputs[last]):
            template.shards[block.shard].read_into(averages[0].data, block.start)
        if block.pieces:
            sums.finish(averages, template.path)
        return checksums

    def _buffer(self, block: Block) -> NDArray[np.uint8]:
        """Return this thread's input buffer."""
        if not hasattr(self._scratch, "raw"):
            self._scratch.raw = np.empty((1, self.block_bytes + SLACK), np.uint8)
        raw: NDArray[np.uint8] = aligned(self._scratch.raw, block)[0]
        return raw

    def _accumulator(self, block: Block) -> NDArray[np.float64]:
        """Return this thread's sums, of shape (rows, averaged values in the block)."""
        values = sum((p.stop - p.start) // FLOATS[p.tensor.dtype] for p in block.pieces if p.average)
        size = values * len(self.rows)
        if not hasattr(self._scratch, "sums") or len(self._scratch.sums) < size:
            self._scratch.sums = np.empty(size, np.float64)
        sums: NDArray[np.float64] = self._scratch.sums[:size].reshape(len(self.rows), values)
        return sums


def _put(file: IO[bytes], position: int, averages: NDArray[np.uint8] | Written) -> Written:
    """Write the first row of averages to a place in a file."""
    assert not isinstance(averages, Written)
    data = averages[0].data
    file.seek(position)
    done = 0
    while done < len(data):
        done += file.write(data[done:])
    return Written(len(data), crc32(data))


def aligned(buffer: NDArray[np.uint8], block: Block) -> NDArray[np.uint8]:
    """Return room for a block in the rows of a buffer, such that a float at the first piece is aligned."""
    first = block.pieces[0].start - block.start if block.pieces else 0
    shift = -(buffer.ctypes.data + first) % 8
    return buffer[:, shift : shift + block.size]
