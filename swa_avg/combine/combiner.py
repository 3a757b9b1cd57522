"""Plan -> averaged bytes, streamed in bounded memory.

The template's shards are cut into blocks. For each block, every input's bytes of the tensors in it are read
into one buffer and added up in float64, in checkpoint order, once for each row of coefficients; blocks are
independent of each other, go to an executor, and come back in order. Threads fill buffers here; workers on
other machines get several blocks at a time, and write averages to the output where they see it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from isal.isal_zlib import crc32_combine

from swa_avg.combine.blocks import Block, Source, blocks_of, read_pieces
from swa_avg.combine.kernel import SLACK, STRETCH, Averaged, BlockWorker, Target, aligned
from swa_avg.combine.sums import UnfitError, all_finite, factors_of, widen
from swa_avg.errors import Finding, MismatchError, SystemRefusalError, UnreadableError
from swa_avg.formats.base import Tensor, Written
from swa_avg.planning.plan import Plan
from swa_avg.planning.policy import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Combiner", "block_memory", "stream_values", "unfit"]

_PENDING = 2  # blocks a thread: one worked on, one waiting to be written

_Underway = tuple[tuple[Block, ...], "NDArray[np.uint8] | None", "Future[list[Averaged]] | None"]
"""Blocks, the buffer that they are averaged into, and the work."""


@dataclass
class Combiner:
    """Averages the shards of one plan, one after the other, for one or several rows of coefficients.

    After the last shard, `checksums` holds what was computed on the way.
    """

    plan: Plan
    rows: Sequence[Sequence[float]]
    """Coefficients, one an input: of each average one row."""
    executor: Executor
    block_bytes: int
    threads: int
    """Workers of the executor; with them the number of blocks under way, and the memory, is bounded."""
    verify: bool = True
    """Read every byte of every input and hold its CRC-32 against the one that its container declares; else,
    only that of the newest, which is read whole anyway."""
    progress: Callable[[int], None] | None = None
    """Told how many more bytes have been read."""
    together: int = 0
    """Blocks a task, where workers have memory of their own; 0: they are threads, and fill buffers here."""
    sent: int = 0
    """Most tasks under way while workers send averages back, since all of them may arrive together."""
    checksums: list[list[int | None]] = field(init=False)
    """CRC-32 of each input's shards: as declared by its container, and as computed once a shard is done."""

    def __post_init__(self) -> None:
        self._written = not self.together
        """Whether averages take no memory here but buffers of ours: threads fill these, or workers have
        written to the output."""
        self.checksums = [[shard.crc32 for shard in source.shards] for source in self.plan.inputs]
        self.worker = BlockWorker(
            tuple(map(Source.of, self.plan.inputs)),
            Source.of(self.plan.template),
            tuple(map(factors_of, self.rows)),
            self.block_bytes,
            self.verify,
        )

    def stream(self, index: int, file: IO[bytes] | None = None) -> Iterator[memoryview | Written]:
        """Yield the bytes of the first row's shard `index`; each view is good until the next is asked for.

        Workers that see `file`, the output, write there, from where it stands. Errors as for `blocks`.
        """
        target = None
        if self.together and file is not None:
            file.flush()
            target = str(Path(file.name).absolute()), file.tell()
        for _, averages in self._averages(index, target):
            yield averages if isinstance(averages, Written) else averages[0].data

    def blocks(self, index: int) -> Iterator[tuple[Block, NDArray[np.uint8]]]:
        """Yield each block of shard `index` and its averages, of shape (rows, bytes), until the next is asked
        for.

        Averages are summed in float64 in checkpoint order (a uniform average is the plain sum, divided once)
        and rounded once to the stored type, ties to even. Outside the block's pieces, the first row holds the
        template's bytes, and the others hold nothing.

        Raises:
            MismatchError: an input holds NaN or infinity, or integers that differ.
            UnreadableError: an input became shorter or fails its checksum.
            SystemRefusalError: the system could not read.
        """
        for block, averages in self._averages(index, None):
            assert not isinstance(averages, Written)
            yield block, averages

    def _averages(
        self, index: int, target: Target | None
    ) -> Iterator[tuple[Block, NDArray[np.uint8] | Written]]:
        checked = self.worker.checked()
        running = [0] * len(checked)
        shape = (len(self.rows), self.block_bytes + SLACK)
        free = [None if self.together else np.empty(shape, np.uint8) for _ in range(self.limit)]
        under_way: deque[_Underway] = deque()
        try:
            for blocks in self.tasks(index):
                while len(under_way) >= (self.limit if self._written else min(self.limit, self.sent)):
                    yield from self._take(under_way, free, running)
                buffer = free.pop()
                under_way.append((blocks, buffer, self._submit(blocks, buffer, target)))
            while under_way:
                yield from self._take(under_way, free, running)
        finally:
            for _, _, work in under_way:
                if work is not None:
                    work.cancel()
        for position, source in enumerate(checked):
            self._verified(source, index, running[position])
        if self.verify and index == 0:
            self._verify_others(checked)

    @property
    def limit(self) -> int:
        """Tasks under way at most."""
        return _PENDING * self.threads

    def tasks(self, index: int) -> Iterator[tuple[Block, ...]]:
        """Yield what is handed out at a time: one block, or several, all with pieces or all without."""
        blocks = blocks_of(self.plan, index, self.block_bytes)
        for _, alike in groupby(blocks, key=lambda block: bool(block.pieces)):
            while some := tuple(islice(alike, self.together or 1)):
                yield some

    def _submit(
        self, blocks: tuple[Block, ...], buffer: NDArray[np.uint8] | None, target: Target | None
    ) -> Future[list[Averaged]] | None:
        """Hand out a task; None where the template is only to be copied, when its turn comes."""
        if self.together and not self.verify and not any(block.pieces for block in blocks):
            return None
        try:
            if target is not None:
                return self.executor.submit(self.worker.write, blocks, target)
            room = None if buffer is None else aligned(buffer, blocks[0])
            return self.executor.submit(self.worker, blocks, room)
        except RuntimeError as error:  # the interpreter's word for a thread that the system refused
            raise SystemRefusalError(errno.EAGAIN, f"{error}; use fewer --threads") from error

    def _take(
        self, under_way: deque[_Underway], free: list[NDArray[np.uint8] | None], running: list[int]
    ) -> Iterator[tuple[Block, NDArray[np.uint8] | Written]]:
        """Yield the first blocks under way; once the next is asked for, their buffer is free again."""
        blocks, buffer, work = under_way.popleft()
        try:
            results = self.worker(blocks) if work is None else work.result()
        except UnfitError:
            raise MismatchError(list(unfit(self.plan, self.block_bytes))) from None
        for block, (averages, checksums) in zip(blocks, results, strict=True):
            if self.progress is not None:
                self.progress(block.cost(self.plan, self.verify))
            for position, checksum in enumerate(checksums):
                running[position] = crc32_combine(running[position], checksum, block.size)
            self._written = not self.together or isinstance(averages, Written)
            yield block, averages
        free.append(buffer)

    def _verified(self, source: int, index: int, checksum: int) -> None:
        shard = self.plan.inputs[source].shards[index]
        if shard.crc32 is not None and shard.crc32 != checksum:
            problem = f"damaged: its CRC-32 is {checksum:08x}, the archive says {shard.crc32:08x}"
            raise UnreadableError(shard.path, problem, hint="leave this file out, or restore it")
        self.checksums[source][index] = checksum

    def _verify_others(self, checked: Sequence[int]) -> None:
        """Check the inputs whose bytes lie elsewhere than the template's: block by block would not do."""
        work = {
            (number, index): [
                self.executor.submit(self.worker.checksum, number, index, start)
                for start in range(0, shard.size, STRETCH)
            ]
            for number, source in enumerate(self.plan.inputs)
            for index, shard in enumerate(source.shards)
            if number not in checked
        }
        try:
            for (number, index), stretches in work.items():
                whole = 0
                for stretch in stretches:
                    checksum, size = stretch.result()
                    whole = crc32_combine(whole, checksum, size)
                self._verified(number, index, whole)
        finally:
            for stretches in work.values():
                for stretch in stretches:
                    stretch.cancel()


def unfit(plan: Plan, block_bytes: int) -> Iterator[Finding]:
    """Read everything again to name each file and tensor whose values cannot be averaged."""
    found = False
    for source in plan.inputs:
        for expected in (*plan.averaged, *plan.compared):
            tensor = source.tensors[expected.name]
            shard = source.shards[tensor.shard]
            first = plan.inputs[0].tensors[expected.name]
            for start in range(0, tensor.nbytes, block_bytes):
                size = min(block_bytes, tensor.nbytes - start)
                data = np.frombuffer(bytearray(shard.read(tensor.offset + start, size)), np.uint8)
                if tensor.dtype in FLOATS:
                    fits = all_finite(data, tensor.dtype)
                    problem = "holds NaN or infinity; leave this checkpoint out"
                else:
                    fits = (
                        plan.inputs[0].shards[first.shard].read(first.offset + start, size) == data.tobytes()
                    )
                    problem = (
                        f"holds integers that differ from {plan.inputs[0].path.name}, and is not a counter"
                    )
                if not fits:
                    found = True
                    yield Finding(source.path, tensor.name, problem)
                    break
    if not found:
        yield Finding(plan.template.path, "sum", "does not fit into float64")


def block_memory(block_bytes: int, threads: int, rows: int = 1) -> int:
    """Return the bytes that a Combiner takes at most: buffers a thread, and finished blocks.

    A thread holds one block of input, of each row the float64 sums (up to four times as many bytes, of
    two-byte values), and as much again while converting.
    """
    return block_bytes * threads * (1 + 4 + rows * (4 + _PENDING))


def stream_values(plan: Plan, block_bytes: int) -> Iterator[Iterator[list[tuple[Tensor, NDArray[Any]]]]]:
    """Yield block by block, input by input, the values of the tensors that are averaged or compared.

    Each value array is of one piece of a tensor: of its stored type, float32 of bfloat16, bytes of integers.
    It is good until the next input is asked for.

    Raises:
        UnreadableError, SystemRefusalError: as for `Image.read_into`.
    """
    buffer = np.empty((1, block_bytes + SLACK), np.uint8)
    template = Source.of(plan.template)
    sources = [
        template if checkpoint is plan.template else Source.of(checkpoint) for checkpoint in plan.inputs
    ]
    for index in range(len(plan.template.shards)):
        for block in blocks_of(plan, index, block_bytes):
            if block.pieces:
                raw = aligned(buffer, block)[0]
                yield (_values(source, template, block, raw) for source in sources)


def _values(
    source: Source, template: Source, block: Block, raw: NDArray[np.uint8]
) -> list[tuple[Tensor, NDArray[Any]]]:
    read_pieces(source, template, block, raw)
    values: list[tuple[Tensor, NDArray[Any]]] = []
    for piece in block.pieces:
        view: NDArray[Any] = raw[piece.start - block.start : piece.stop - block.start]
        dtype = piece.tensor.dtype
        if piece.average:
            view = widen(view.view(np.uint16)) if dtype == "bfloat16" else view.view(dtype)
        values.append((piece.tensor, view))
    return values
