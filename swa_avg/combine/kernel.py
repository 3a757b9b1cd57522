"""Averages one block at a time, on any thread or machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from isal.isal_zlib import crc32

from swa_avg.combine.blocks import Block, Source, is_same, read_pieces
from swa_avg.combine.sums import Pieces, Row, Sums
from swa_avg.planning.policy import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SLACK", "Averaged", "Kernel", "Stretch", "aligned"]

SLACK = 64
"""Bytes by which a buffer is longer than a block, so that the block can be aligned in it."""


class Averaged(NamedTuple):
    """One block of every average."""

    averages: NDArray[np.uint8]
    """Of shape (rows, bytes). Outside the block's pieces, the first row holds the template's bytes, and the
    others hold nothing."""
    checksums: list[int]
    """CRC-32 of the block's bytes in each of the inputs that are `read_whole`."""
    constants: frozenset[str] = frozenset()
    """Tensors that hold values here which are not finite, and the same bytes in all inputs."""


class Stretch(NamedTuple):
    """A run of bytes of one input, of which only the checksum is needed."""

    number: int
    """Of the input."""
    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Kernel:
    """Averages one block at a time, on any thread; it can be pickled."""

    inputs: tuple[Source, ...]
    template: Source
    rows: tuple[Row, ...]
    block_bytes: int
    verify: bool
    _scratch: local = field(default_factory=local, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return Kernel, (self.inputs, self.template, self.rows, self.block_bytes, self.verify)

    @property
    def subject(self) -> str:
        """The file that messages about a lost call name."""
        return str(self.template.path)

    def read_whole(self) -> list[int]:
        """Return the numbers of the inputs of which blocks are read whole, and checksums computed.

        Their tensors lie where the template's do.
        """
        return [number for number, source in enumerate(self.inputs) if self._is_read_whole(source)]

    def _is_read_whole(self, source: Source) -> bool:
        template = self.template
        return source.tensors is template.tensors and (self.verify or source.shards is template.shards)

    def buffer(self) -> NDArray[np.uint8]:
        """Return a new buffer for the averages of any block."""
        return np.empty((len(self.rows), self.block_bytes + SLACK), np.uint8)

    def averages(self, blocks: Sequence[Block]) -> list[Averaged]:
        """Average several blocks into new arrays; errors as for `average`."""
        shapes = [(len(self.rows), block.size + SLACK) for block in blocks]
        return [self.average(b, np.empty(shape, np.uint8)) for b, shape in zip(blocks, shapes, strict=True)]

    def average(self, block: Block, buffer: NDArray[np.uint8]) -> Averaged:
        """Average a block into a buffer.

        Raises:
            InvalidValuesError: an input holds NaN or infinity in a tensor that differs, or integers that do.
            MismatchError: an average exceeds the range of its type.
            UnreadableError, SystemRefusalError: as for `Region.read_into`.
        """
        averages = aligned(buffer, block)
        with np.errstate(all="ignore"):  # what is not finite is found at the end
            return self._average(block, averages)

    def checksum(self, stretch: Stretch) -> int:
        """Return the CRC-32 of a stretch."""
        shard = self.inputs[stretch.number].shards[stretch.shard]
        return shard.checksum(stretch.start, stretch.stop, self.block_bytes)

    def _average(self, block: Block, averages: NDArray[np.uint8]) -> Averaged:
        template = self.template
        checksums = []
        last = len(self.inputs) - 1
        scratch = self._input_buffer(block) if block.pieces else averages[0]
        pieces = Pieces(block, scratch)
        sums = Sums(block, self.rows, self._accumulator(block), partial(is_same, self.inputs))
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
        return Averaged(averages, checksums, frozenset(sums.constants))

    def _input_buffer(self, block: Block) -> NDArray[np.uint8]:
        """Return this thread's room for one input's bytes of a block."""
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


def aligned(buffer: NDArray[np.uint8], block: Block) -> NDArray[np.uint8]:
    """Return room for a block in the rows of a buffer, such that the first piece is aligned for any float."""
    first = block.pieces[0].start - block.start if block.pieces else 0
    shift = -(buffer.ctypes.data + first) % 8
    return buffer[:, shift : shift + block.size]
