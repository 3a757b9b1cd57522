"""Averages for several rows of coefficients, on disk: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

import numpy as np

from swa_avg.combine.blocks import Block, Piece, blocks_of
from swa_avg.combine.combiner import Combiner

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Spill"]


class Spill:
    """The averaged tensors of every row, one row after the other in one file."""

    def __init__(self, combiner: Combiner, file: IO[bytes]) -> None:
        """Average everything, and keep it in `file`.

        Raises:
            OSError: the disk is full.
            MismatchError, UnreadableError, SystemRefusalError: as for `Combiner.blocks`.
        """
        self._plan = combiner.plan
        self._block_bytes = combiner.workers.budget.block_bytes
        self._file = file
        self._starts: dict[str, int] = {}
        self.row_bytes = 0
        for tensor in self._plan.averaged:
            self._starts[tensor.name] = self.row_bytes
            self.row_bytes += tensor.nbytes
        for index in range(len(self._plan.template.shards)):
            for block, averages in combiner.blocks(index):
                self._add(block, averages)
        file.flush()

    def stream(self, row: int, index: int) -> Iterator[memoryview]:
        """Yield the bytes of the template's shard `index` with the averages of `row` in their places."""
        shard = self._plan.template.shards[index]
        for block in blocks_of(self._plan, index, self._block_bytes):
            data = bytearray(block.size)
            shard.read_into(memoryview(data), block.start)
            for piece in block.pieces:
                if piece.average:
                    self._file.seek(self._place(row, piece))
                    data[piece.start - block.start : piece.stop - block.start] = self._file.read(
                        piece.stop - piece.start
                    )
            yield memoryview(data)

    def _add(self, block: Block, averages: NDArray[np.uint8]) -> None:
        for row, values in enumerate(averages):
            for piece in block.pieces:
                if piece.average:
                    self._file.seek(self._place(row, piece))
                    self._file.write(values[piece.start - block.start : piece.stop - block.start].data)

    def _place(self, row: int, piece: Piece) -> int:
        return row * self.row_bytes + self._starts[piece.tensor.name] + piece.start - piece.tensor.offset
