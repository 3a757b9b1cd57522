"""Plan -> averaged bytes, streamed in bounded memory.

The template's images are cut into blocks. For each block, every input's bytes of the tensors in it are read
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
from itertools import accumulate, groupby, islice
from pathlib import Path
from threading import local
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from isal.isal_zlib import crc32, crc32_combine

from swa_avg.blocks import Block, Source, blocks_of, read_pieces
from swa_avg.errors import Finding, MismatchError, SystemRefusalError, UnreadableError
from swa_avg.formats.base import Image, Tensor, Written
from swa_avg.plan import Plan
from swa_avg.policy import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "BlockWorker",
    "Combiner",
    "UnfitError",
    "block_memory",
    "checksum_of",
    "round_to_bfloat16",
    "stream_values",
    "unfit",
]

_PENDING = 2  # blocks a thread: one worked on, one waiting to be written
_SLACK = 64
_CHUNK = 2**18
_STRETCH = 2**30  # bytes of an input that are checked at a time, where its blocks are not the template's


_Row = tuple[tuple[float, ...], float]
"""What each input is multiplied with, and what the sum is divided by."""
_Averaged = tuple["NDArray[np.uint8] | Written", list[int]]
"""Averages of a block, of shape (rows, bytes), or word that they are in the output; and the CRC-32 of the
block's bytes in each of the checked inputs."""
_Target = tuple[str, int]
"""The output's name, and where in it the image starts."""
_Underway = tuple[tuple[Block, ...], "NDArray[np.uint8] | None", "Future[list[_Averaged]]"]
"""Blocks, the buffer that they are averaged into, and the work."""


@dataclass
class Combiner:
    """Averages the images of one plan, one after the other, for one or several rows of coefficients.

    After the last image, `checksums` holds what was computed on the way.
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
    progress: Callable[[int], None] = lambda count: None
    """Told how many more bytes have been read."""
    together: int = 0
    """Blocks a task, where workers have memory of their own; 0: they are threads, and fill buffers here."""
    sent: int = 0
    """Tasks under way at most while averages are sent back: they may all arrive at once."""
    checksums: list[list[int | None]] = field(init=False)
    """CRC-32 of each input's images: as declared by its container, and as computed once an image is done."""

    def __post_init__(self) -> None:
        self._written = not self.together
        """Whether averages take no memory here but buffers of ours: threads fill these, or workers have
        written to the output."""
        self.checksums = [[image.crc32 for image in source.images] for source in self.plan.inputs]
        self.worker = BlockWorker(
            tuple(map(Source.of, self.plan.inputs)),
            Source.of(self.plan.template),
            tuple(map(_factors, self.rows)),
            self.block_bytes,
            self.verify,
        )

    def image(self, index: int, file: IO[bytes] | None = None) -> Iterator[memoryview | Written]:
        """Yield the bytes of the first row's image `index`; each view is good until the next is asked for.

        Workers that see `file`, the output, write there, from where it stands. Errors as for `blocks`.
        """
        target = None
        if self.together and file is not None:
            file.flush()
            target = str(Path(file.name).absolute()), file.tell()
        for _, averages in self._averages(index, target):
            yield averages if isinstance(averages, Written) else averages[0].data

    def blocks(self, index: int) -> Iterator[tuple[Block, NDArray[np.uint8]]]:
        """Yield each block of image `index` and its averages, of shape (rows, bytes), until the next is asked
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
        self, index: int, target: _Target | None
    ) -> Iterator[tuple[Block, NDArray[np.uint8] | Written]]:
        checked = self.worker.checked()
        running = [0] * len(checked)
        shape = (len(self.rows), self.block_bytes + _SLACK)
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
        self, blocks: tuple[Block, ...], buffer: NDArray[np.uint8] | None, target: _Target | None
    ) -> Future[list[_Averaged]]:
        if self.together and not self.verify and not any(block.pieces for block in blocks):
            # There is nothing to do but to copy the template.
            done: Future[list[_Averaged]] = Future()
            done.set_result(self.worker(blocks))
            return done
        try:
            if target is not None:
                return self.executor.submit(self.worker.write, blocks, target)
            room = None if buffer is None else _aligned(buffer, blocks[0])
            return self.executor.submit(self.worker, blocks, room)
        except RuntimeError as error:  # the interpreter's word for a thread that the system refused
            raise SystemRefusalError(errno.EAGAIN, f"{error}; use fewer --threads") from error

    def _take(
        self, under_way: deque[_Underway], free: list[NDArray[np.uint8] | None], running: list[int]
    ) -> Iterator[tuple[Block, NDArray[np.uint8] | Written]]:
        """Yield the first blocks under way; once the next is asked for, their buffer is free again."""
        blocks, buffer, work = under_way.popleft()
        try:
            results = work.result()
        except UnfitError:
            raise MismatchError(list(unfit(self.plan, self.block_bytes))) from None
        for block, (averages, checksums) in zip(blocks, results, strict=True):
            self.progress(block.cost(self.plan, self.verify))
            for position, checksum in enumerate(checksums):
                running[position] = crc32_combine(running[position], checksum, block.size)
            self._written = not self.together or isinstance(averages, Written)
            yield block, averages
        free.append(buffer)

    def _verified(self, source: int, index: int, checksum: int) -> None:
        image = self.plan.inputs[source].images[index]
        if image.crc32 is not None and image.crc32 != checksum:
            problem = f"damaged: its CRC-32 is {checksum:08x}, the archive says {image.crc32:08x}"
            raise UnreadableError(image.path, problem, hint="leave this file out, or restore it")
        self.checksums[source][index] = checksum

    def _verify_others(self, checked: Sequence[int]) -> None:
        """Check the inputs whose bytes lie elsewhere than the template's: block by block would not do."""
        work = {
            (number, index): [
                self.executor.submit(self.worker.checksum, number, index, start)
                for start in range(0, image.size, _STRETCH)
            ]
            for number, source in enumerate(self.plan.inputs)
            for index, image in enumerate(source.images)
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


@dataclass(frozen=True)
class BlockWorker:
    """Combines one block at a time, on any thread; it can be pickled."""

    inputs: tuple[Source, ...]
    template: Source
    rows: tuple[_Row, ...]
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
        return source.tensors is template.tensors and (self.verify or source.images is template.images)

    def __call__(self, blocks: Sequence[Block], averages: NDArray[np.uint8] | None = None) -> list[_Averaged]:
        """Average each block, into `averages`, of shape (rows, bytes), where it is one block; else into new
        arrays."""
        results: list[_Averaged] = []
        for block in blocks:
            room = averages
            if room is None:
                room = _aligned(np.empty((len(self.rows), block.size + _SLACK), np.uint8), block)
            results.append((room, self._combine(block, room)))
        return results

    def write(self, blocks: Sequence[Block], target: _Target) -> list[_Averaged]:
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
        """Return the CRC-32 of a stretch of image `index` of input `number`, and its bytes."""
        image = self.inputs[number].images[index]
        stop = min(start + _STRETCH, image.size)
        checksum = 0
        for position in range(start, stop, self.block_bytes):
            checksum = crc32(image.read(position, min(self.block_bytes, stop - position)), checksum)
        return checksum, stop - start

    def _combine(self, block: Block, averages: NDArray[np.uint8]) -> list[int]:
        """Average a block into `averages`; return the CRC-32 of its bytes in each of the `checked` inputs."""
        with np.errstate(all="ignore"):  # what is not finite is found at the end
            return self._combined(block, averages)

    def _combined(self, block: Block, averages: NDArray[np.uint8]) -> list[int]:
        template = self.template
        checksums = []
        last = len(self.inputs) - 1
        scratch = self._buffer(block) if block.pieces else averages[0]
        pieces = _Pieces(block, scratch)
        sums = _Sums(block, self.rows, self._accumulator(block))
        for number, source in enumerate(self.inputs):
            raw = scratch
            if self._is_read_whole(source):
                if number == last:  # the newest input, whose bytes are the output's
                    raw = averages[0]
                source.images[block.image].read_into(raw.data, block.start)
                checksums.append(crc32(raw))
            elif block.pieces:
                read_pieces(source, template, block, raw)
            if block.pieces:
                sums.add(number, pieces if raw is scratch else _Pieces(block, raw))
        if not self._is_read_whole(self.inputs[last]):
            template.images[block.image].read_into(averages[0].data, block.start)
        if block.pieces:
            sums.finish(averages, template.path)
        return checksums

    def _buffer(self, block: Block) -> NDArray[np.uint8]:
        """Return this thread's input buffer."""
        if not hasattr(self._scratch, "raw"):
            self._scratch.raw = np.empty((1, self.block_bytes + _SLACK), np.uint8)
        raw: NDArray[np.uint8] = _aligned(self._scratch.raw, block)[0]
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


def _aligned(buffer: NDArray[np.uint8], block: Block) -> NDArray[np.uint8]:
    """Return room for a block in the rows of a buffer, such that a float at the first piece is aligned."""
    first = block.pieces[0].start - block.start if block.pieces else 0
    shift = -(buffer.ctypes.data + first) % 8
    return buffer[:, shift : shift + block.size]


def _factors(coefficients: Sequence[float]) -> _Row:
    """Return factors and divisor of a row: of equal coefficients 1/n, or 0, a plain sum to divide by n.

    Each product and 1/n itself would be rounded.
    """
    used = [coefficient for coefficient in coefficients if coefficient]
    if used == [1.0 / len(used)] * len(used):
        return tuple(float(coefficient != 0) for coefficient in coefficients), float(len(used))
    return tuple(coefficients), 1.0


class UnfitError(Exception):
    """A block holds values that cannot be averaged; which ones is found by a second look at all files."""


class _Pieces:
    """The values of a block's pieces in a buffer that holds the block's bytes of one input."""

    def __init__(self, block: Block, raw: NDArray[np.uint8]) -> None:
        self.values: list[NDArray[Any]] = []
        self.integers: list[NDArray[np.uint8]] = []
        for piece in block.pieces:
            view = raw[piece.start - block.start : piece.stop - block.start]
            if piece.average:
                dtype = piece.tensor.dtype
                self.values.append(view.view(np.uint16 if dtype == "bfloat16" else dtype))
            else:
                self.integers.append(view)


class _Sums:
    """The float64 sums of one block, a row for each average."""

    def __init__(self, block: Block, rows: Sequence[_Row], sums: NDArray[np.float64]) -> None:
        self.block = block
        self.rows = rows
        self.sums = sums
        self.averaged = [piece for piece in block.pieces if piece.average]
        self.integers: list[bytes] | None = None
        sizes = [(piece.stop - piece.start) // FLOATS[piece.tensor.dtype] for piece in self.averaged]
        stops = list(accumulate(sizes))
        spans = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        self.parts = [[row[span] for span in spans] for row in sums]
        """Of each row, the sums of each piece."""
        self.begun = [False] * len(rows)

    def add(self, number: int, pieces: _Pieces) -> None:
        """Add the values of input `number`."""
        integers = [view.tobytes() for view in pieces.integers]
        if self.integers is None:
            self.integers = integers
        elif integers != self.integers:
            raise UnfitError
        values = [
            _widen(view) if piece.tensor.dtype == "bfloat16" else view
            for piece, view in zip(self.averaged, pieces.values, strict=True)
        ]
        for row, (factors, _) in enumerate(self.rows):
            if factors[number]:
                self._add(row, factors[number], values)

    def _add(self, row: int, factor: float, values: Sequence[NDArray[Any]]) -> None:
        for sums, value in zip(self.parts[row], values, strict=True):
            if factor != 1.0:
                value = np.multiply(value, factor, dtype=np.float64)  # noqa: PLW2901
            if self.begun[row]:
                np.add(sums, value, out=sums)
            else:
                sums[:] = value
        self.begun[row] = True

    def finish(self, averages: NDArray[np.uint8], path: Path) -> None:
        """Round the averages once to their stored type, into their places."""
        for row, (factors, divisor) in enumerate(self.rows):
            if divisor != 1.0:
                np.divide(self.sums[row], divisor, out=self.sums[row])
            if not np.isfinite(self.sums[row]).all():
                raise UnfitError
            for piece, sums in zip(self.averaged, self.parts[row], strict=True):
                dtype = piece.tensor.dtype
                target = averages[row, piece.start - self.block.start : piece.stop - self.block.start]
                if dtype == "bfloat16":
                    target.view(np.uint16)[:] = round_to_bfloat16(sums)
                else:
                    target.view(dtype)[:] = sums
                if min(factors) < 0 and not _all_finite(target, dtype):  # else it lies between the inputs
                    problem = f"the average does not fit into {dtype}"
                    raise MismatchError([Finding(path, piece.tensor.name, problem)])


def _widen(view: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 values as float32: the same bits, followed by sixteen zeros."""
    return (view.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Round float64 to bfloat16 once, ties to even, and return the bits.

    By way of float32, rounded to odd (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums:
    proved algorithms using rounding to odd"), since rounding to nearest twice is wrong next to ties.
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    bits -= np.abs(nearest) > np.abs(values)  # towards zero
    bits |= bits.view(np.float32) != values
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _all_finite(data: NDArray[np.uint8], dtype: str) -> bool:
    values = _widen(data.view(np.uint16)) if dtype == "bfloat16" else data.view(dtype)
    return bool(np.isfinite(values).all())


def unfit(plan: Plan, block_bytes: int) -> Iterator[Finding]:
    """Read everything again to name each file and tensor whose values cannot be averaged."""
    found = False
    for source in plan.inputs:
        for expected in (*plan.averaged, *plan.compared):
            tensor = source.tensors[expected.name]
            image = source.images[tensor.image]
            first = plan.inputs[0].tensors[expected.name]
            for start in range(0, tensor.nbytes, block_bytes):
                size = min(block_bytes, tensor.nbytes - start)
                data = np.frombuffer(bytearray(image.read(tensor.offset + start, size)), np.uint8)
                if tensor.dtype in FLOATS:
                    fits = _all_finite(data, tensor.dtype)
                    problem = "holds NaN or infinity; leave this checkpoint out"
                else:
                    fits = (
                        plan.inputs[0].images[first.image].read(first.offset + start, size) == data.tobytes()
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


def checksum_of(image: Image, start: int = 0, stop: int | None = None) -> int:
    """Return the CRC-32 of an image, or of a part of it."""
    stop = image.size if stop is None else stop
    checksum = 0
    for position in range(start, stop, _CHUNK):
        checksum = crc32(image.read(position, min(_CHUNK, stop - position)), checksum)
    return checksum


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
    buffer = np.empty((1, block_bytes + _SLACK), np.uint8)
    template = Source.of(plan.template)
    sources = [
        template if checkpoint is plan.template else Source.of(checkpoint) for checkpoint in plan.inputs
    ]
    for index in range(len(plan.template.images)):
        for block in blocks_of(plan, index, block_bytes):
            if block.pieces:
                raw = _aligned(buffer, block)[0]
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
            view = _widen(view.view(np.uint16)) if dtype == "bfloat16" else view.view(dtype)
        values.append((piece.tensor, view))
    return values
