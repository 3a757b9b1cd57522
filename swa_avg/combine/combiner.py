"""Plan -> averaged bytes, streamed in bounded memory.

The template's shards are cut into blocks. For each block, every input's bytes of the tensors in it are read
into one buffer and added up in float64, in checkpoint order, once for each row of coefficients. Blocks are
independent of each other: workers average them, and they come back in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from isal.isal_zlib import crc32_combine

from swa_avg.combine.blocks import Block, Source, blocks_of
from swa_avg.combine.kernel import Kernel, Stretch
from swa_avg.combine.sums import InvalidValuesError, factors_of
from swa_avg.combine.values import invalid_values
from swa_avg.combine.workers import Workers
from swa_avg.errors import Finding, MismatchError, UnreadableError
from swa_avg.planning.plan import Plan
from swa_avg.text import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Combiner"]

_STRETCH = 2**28  # bytes of an input that are checked at a time, where its blocks are not the template's


@dataclass
class Combiner:
    """Averages the shards of one plan, one after the other, for one or several rows of coefficients."""

    plan: Plan
    rows: Sequence[Sequence[float]]
    """One row for each average, with a coefficient for each input."""
    workers: Workers
    verify: bool = True
    """Read every byte of every input, and compare its CRC-32 with the one that its container declares; else,
    only that of the newest, which is read whole anyway."""
    progress: Progress | None = None
    """Told how many bytes have been read."""
    constants: set[str] = field(init=False, default_factory=set)
    """Tensors that were to be averaged, found to hold values that are not finite and the same bytes in all
    inputs, and so copied."""
    checksums: list[list[int | None]] = field(init=False)
    """CRC-32 of each input's shards: as declared by its container, and as computed once a shard is done."""

    def __post_init__(self) -> None:
        self.checksums = [[shard.crc32 for shard in source.shards] for source in self.plan.inputs]
        self.kernel = Kernel(
            tuple(map(Source.of, self.plan.inputs)),
            Source.of(self.plan.template),
            tuple(map(factors_of, self.rows)),
            self.workers.budget.block_bytes,
            self.verify,
        )

    @cached_property
    def bytes_to_read(self) -> int:
        """Bytes that are read in all, gaps between tensors and metadata apart."""
        plan = self.plan
        if self.verify:
            return plan.template.size * len(plan.inputs)
        combined = sum(tensor.nbytes for tensor in (*plan.averaged, *plan.compared))
        return plan.template.size + (len(plan.inputs) - 1) * combined

    @property
    def peak_memory(self) -> int:
        """Predicted peak of this process's resident memory in bytes, without Keras."""
        return self.workers.budget.memory(len(self.rows))

    @property
    def settled(self) -> Plan:
        """The plan, with the tensors that turned out to be constants among those that are compared."""
        plan = self.plan
        return replace(
            plan,
            averaged=tuple(tensor for tensor in plan.averaged if tensor.name not in self.constants),
            compared=(*plan.compared, *(t for t in plan.averaged if t.name in self.constants)),
        )

    def stream(self, index: int) -> Iterator[memoryview]:
        """Yield the bytes of shard `index` with the averages of the first row; each view is good until the
        next is asked for. Errors as for `blocks`."""
        for _, averages in self.blocks(index):
            yield averages[0].data

    def blocks(self, index: int) -> Iterator[tuple[Block, NDArray[np.uint8]]]:
        """Yield each block of shard `index` and its averages, of shape (rows, bytes).

        They are good until the next are asked for.

        Averages are summed in float64 in checkpoint order (a uniform average is the plain sum, divided once)
        and rounded once to the stored type, ties to even. Values that are not finite are the template's, if
        the tensor that holds them is the same in all inputs. Outside the block's pieces, the first row holds
        the template's bytes, and the others hold nothing.

        Raises:
            MismatchError: an input holds NaN or infinity in a tensor that differs, or integers that do.
            UnreadableError: an input became shorter or fails its checksum.
            SystemRefusalError: the system could not read.
        """
        read_whole = self.kernel.read_whole()
        checksums = dict.fromkeys(read_whole, 0)
        blocks = blocks_of(self.plan, index, self.kernel.block_bytes)
        try:
            for block, averaged in self.workers.average(self.kernel, blocks):
                if self.progress is not None:
                    self.progress(self.bytes_to_read, block.cost(self.plan, self.verify))
                for number, checksum in zip(read_whole, averaged.checksums, strict=True):
                    checksums[number] = crc32_combine(checksums[number], checksum, block.size)
                self.constants |= averaged.constants
                yield block, averaged.averages
        except InvalidValuesError:
            raise MismatchError(list(invalid_values(self.plan, self.kernel.block_bytes))) from None
        if self.constants and not self.settled.averaged:
            newest = self.plan.inputs[-1].path
            raise MismatchError([Finding(newest, "weights", "holds NaN or infinity in all that is averaged")])
        for number, checksum in checksums.items():
            self._check(number, index, checksum)
        if self.verify and index == 0:
            self._check_others(read_whole)

    def _check_others(self, read_whole: Sequence[int]) -> None:
        """Check the inputs that no block reads whole: their tensors lie elsewhere than the template's."""
        stretches = (
            Stretch(number, index, start, min(start + _STRETCH, shard.size))
            for number, source in enumerate(self.plan.inputs)
            if number not in read_whole
            for index, shard in enumerate(source.shards)
            for start in range(0, shard.size, _STRETCH)
        )
        checksum = 0
        for stretch, of_stretch in self.workers.run(self.kernel.checksum, stretches):
            checksum = crc32_combine(checksum, of_stretch, stretch.stop - stretch.start)
            if stretch.stop == self.plan.inputs[stretch.number].shards[stretch.shard].size:
                self._check(stretch.number, stretch.shard, checksum)
                checksum = 0

    def _check(self, number: int, index: int, checksum: int) -> None:
        """Compare the CRC-32 of an input's shard with the one that its container declares, and keep it."""
        shard = self.plan.inputs[number].shards[index]
        if shard.crc32 is not None and shard.crc32 != checksum:
            problem = f"damaged: its CRC-32 is {checksum:08x}, the archive says {shard.crc32:08x}"
            raise UnreadableError(shard.path, problem, hint="leave this file out, or restore it")
        self.checksums[number][index] = checksum
