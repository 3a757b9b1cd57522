"""Plan -> averaged bytes, streamed in bounded memory.

The template's images are cut into blocks. For each block, every input's bytes of the tensors in it are read
into one buffer and added up in float64, in checkpoint order; blocks are independent of each other, go to an
executor, and come back in order.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from threading import local
from typing import Any

import numpy as np
from isal.isal_zlib import crc32, crc32_combine
from numpy.typing import NDArray

from swa_avg.errors import Finding, MismatchError, SystemRefusalError, UnreadableError
from swa_avg.formats.base import Checkpoint, Image, Tensor
from swa_avg.plan import Plan
from swa_avg.policy import FLOATS

__all__ = ["Combiner", "block_memory", "bytes_to_read", "round_to_bfloat16", "stream_values", "unfit"]

_PENDING = 2  # blocks a thread: one worked on, one waiting to be written
_SLACK = 64


@dataclass(frozen=True)
class _Piece:
    """The part of one tensor that lies in one block."""

    tensor: Tensor
    start: int
    """Bytes from the start of the image, as the template lays it out."""
    stop: int
    average: bool


@dataclass(frozen=True)
class _Block:
    image: int
    start: int
    stop: int
    pieces: tuple[_Piece, ...]

    def cost(self, plan: Plan, verify: bool) -> int:
        """Return the bytes that are read to combine it."""
        size = self.stop - self.start
        return (
            size * len(plan.inputs)
            if verify
            else (size + (len(plan.inputs) - 1) * sum(piece.stop - piece.start for piece in self.pieces))
        )


_Underway = tuple[_Block, "NDArray[np.uint8]", "Future[list[int]]"]
"""A block, the buffer that it is averaged into, and the work."""


@dataclass
class Combiner:
    """Averages the images of one plan, one after the other.

    After the last image, `checksums` holds what was computed on the way.
    """

    plan: Plan
    executor: Executor
    block_bytes: int
    threads: int
    """Workers of the executor; with them the number of blocks under way, and the memory, is bounded."""
    verify: bool = True
    """Read every byte of every input and hold its CRC-32 against the one that its container declares."""
    progress: Callable[[int], None] = lambda count: None
    """Told how many more bytes have been read."""
    checksums: list[list[int | None]] = field(init=False)
    """CRC-32 of each input's images: as declared by its container, and as computed once an image is done."""
    _scratch: local = field(default_factory=local)

    def __post_init__(self) -> None:
        self.checksums = [[image.crc32 for image in source.images] for source in self.plan.inputs]

    def image(self, index: int) -> Iterator[memoryview]:
        """Yield the bytes of the output's image `index`; each view is good until the next is asked for.

        Averages are summed in float64 in checkpoint order (a uniform average is the plain sum, divided once)
        and rounded once to the stored type, ties to even.

        Raises:
            MismatchError: an input holds NaN or infinity, or integers that differ.
            UnreadableError: an input became shorter or fails its checksum.
            SystemRefusalError: the system could not read.
        """
        template = self.plan.template
        shared = [n for n, source in enumerate(self.plan.inputs) if source.tensors is template.tensors]
        running = [0] * len(shared)
        free = [np.empty(self.block_bytes, np.uint8) for _ in range(_PENDING * self.threads)]
        under_way: deque[_Underway] = deque()
        try:
            for block in _blocks(self.plan, index, template.images[index].size, self.block_bytes):
                if not free:
                    yield from self._take(under_way, free, running)
                output = free.pop()
                work = self._submit(block, output[: block.stop - block.start])
                under_way.append((block, output, work))
            while under_way:
                yield from self._take(under_way, free, running)
        finally:
            for _, _, work in under_way:
                work.cancel()
        if self.verify:
            for position, source in enumerate(shared):
                self._verified(source, index, running[position])
            if index == 0:
                self._verify_others(shared)

    def _submit(self, block: _Block, output: NDArray[np.uint8]) -> Future[list[int]]:
        try:
            return self.executor.submit(self._combine, block, output)
        except RuntimeError as error:  # the interpreter's word for a thread that the system refused
            raise SystemRefusalError(errno.EAGAIN, f"{error}; use fewer --threads") from error

    def _take(
        self, under_way: deque[_Underway], free: list[NDArray[np.uint8]], running: list[int]
    ) -> Iterator[memoryview]:
        """Yield the first block under way; once the next is asked for, its buffer is free again."""
        block, output, work = under_way.popleft()
        try:
            checksums = work.result()
        except _UnfitError:
            raise MismatchError(list(unfit(self.plan, self.block_bytes))) from None
        size = block.stop - block.start
        self.progress(block.cost(self.plan, self.verify))
        for position, checksum in enumerate(checksums):
            running[position] = crc32_combine(running[position], checksum, size)
        yield output[:size].data
        free.append(output)

    def _verified(self, source: int, index: int, checksum: int) -> None:
        image = self.plan.inputs[source].images[index]
        if image.crc32 is not None and image.crc32 != checksum:
            problem = f"damaged: its CRC-32 is {checksum:08x}, the archive says {image.crc32:08x}"
            raise UnreadableError(image.path, problem, hint="leave this file out, or restore it")
        self.checksums[source][index] = checksum

    def _verify_others(self, shared: Sequence[int]) -> None:
        """Check the inputs whose bytes lie elsewhere than the template's: block by block would not do."""
        for number, source in enumerate(self.plan.inputs):
            if number not in shared:
                for index, image in enumerate(source.images):
                    self._verified(number, index, self._checksum(image))

    def _checksum(self, image: Image) -> int:
        checksum = 0
        for start in range(0, image.size, self.block_bytes):
            checksum = crc32(image.read(start, min(self.block_bytes, image.size - start)), checksum)
        return checksum

    def _combine(self, block: _Block, output: NDArray[np.uint8]) -> list[int]:
        """Average one block into `output`, on any thread.

        Return the CRC-32 of the block's bytes in each input of the template's layout, when verifying.
        """
        template = self.plan.template
        checksums = []
        sums = None
        raw = output
        for number, source in enumerate(self.plan.inputs):
            raw = self._buffer(block) if block.pieces else output
            if source.tensors is template.tensors and (self.verify or source is template):
                source.images[block.image].read_into(raw.data, block.start)
                if self.verify:
                    checksums.append(crc32(raw))
            elif block.pieces:
                _read_pieces(source, template, block, raw)
            if block.pieces:
                sums = sums or _Sums(block, raw, self._accumulator(block))
                with np.errstate(all="ignore"):  # what is not finite is found at the end
                    sums.add(number, self.plan)
        if self.plan.inputs[-1] is not template:
            template.images[block.image].read_into(output.data, block.start)
        elif raw is not output:
            output[:] = raw  # the newest input, read last, and whole
        if sums is not None:
            sums.finish(self.plan, output, block)
        return checksums

    def _buffer(self, block: _Block) -> NDArray[np.uint8]:
        """Return this thread's input buffer, so shifted that a float at the first piece is aligned."""
        if not hasattr(self._scratch, "raw"):
            self._scratch.raw = np.empty(self.block_bytes + _SLACK, np.uint8)
        first = block.pieces[0].start - block.start if block.pieces else 0
        shift = -(self._scratch.raw.ctypes.data + first) % 8
        raw: NDArray[np.uint8] = self._scratch.raw[shift : shift + block.stop - block.start]
        return raw

    def _accumulator(self, block: _Block) -> NDArray[np.float64]:
        values = sum((p.stop - p.start) // FLOATS[p.tensor.dtype] for p in block.pieces if p.average)
        if not hasattr(self._scratch, "sums") or len(self._scratch.sums) < values:
            self._scratch.sums = np.empty(values, np.float64)
        sums: NDArray[np.float64] = self._scratch.sums[:values]
        return sums


class _UnfitError(Exception):
    """A block holds values that cannot be averaged; which ones is found by a second look at all files."""


class _Sums:
    """The float64 sums of one block, with a view of the input buffer for each piece."""

    def __init__(self, block: _Block, raw: NDArray[np.uint8], sums: NDArray[np.float64]) -> None:
        self.rows: list[tuple[_Piece, NDArray[Any], NDArray[np.float64]]] = []
        self.integers: list[tuple[_Piece, NDArray[np.uint8], bytes]] = []
        self.sums = sums
        position = 0
        for piece in block.pieces:
            view = raw[piece.start - block.start : piece.stop - block.start]
            if piece.average:
                dtype = piece.tensor.dtype
                values = view.view(np.uint16 if dtype == "bfloat16" else dtype)
                self.rows.append((piece, values, sums[position : position + len(values)]))
                position += len(values)
            else:
                self.integers.append((piece, view, view.tobytes()))

    def add(self, number: int, plan: Plan) -> None:
        """Add the buffer's values: they are those of input `number`."""
        coefficient = plan.coefficients[number]
        for piece, view, row in self.rows:
            values = _widen(view) if piece.tensor.dtype == "bfloat16" else view
            if not plan.uniform:
                values = np.multiply(values, coefficient, dtype=np.float64)
            if number:
                np.add(row, values, out=row)
            else:
                row[:] = values
        for _, view, first in self.integers:
            if view.tobytes() != first:
                raise _UnfitError

    def finish(self, plan: Plan, output: NDArray[np.uint8], block: _Block) -> None:
        """Round the averages once to their stored type, into their places in `output`."""
        if plan.uniform:
            np.divide(self.sums, len(plan.inputs), out=self.sums)
        if not np.isfinite(self.sums).all():
            raise _UnfitError
        for piece, _, row in self.rows:
            target = output[piece.start - block.start : piece.stop - block.start]
            if piece.tensor.dtype == "bfloat16":
                target.view(np.uint16)[:] = round_to_bfloat16(row)
            else:
                with np.errstate(over="ignore"):
                    target.view(piece.tensor.dtype)[:] = row
            if not plan.uniform and not _all_finite(target, piece.tensor.dtype):
                problem = f"the average does not fit into {piece.tensor.dtype}"
                raise MismatchError([Finding(plan.template.path, piece.tensor.name, problem)])


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


def _read_pieces(source: Checkpoint, template: Checkpoint, block: _Block, raw: NDArray[np.uint8]) -> None:
    """Read the block's tensors from `source` into the places that the template's layout gives them.

    Neighbours that lie equally far from the template's places are read together, gaps included.
    """
    first = block.pieces[0]
    run = _moved(source, template, first)
    start, stop = first.start, first.stop
    for piece in block.pieces[1:]:
        moved = _moved(source, template, piece)
        if moved == run:
            stop = piece.stop
            continue
        _read_run(source, run, start, stop, block, raw)
        run, start, stop = moved, piece.start, piece.stop
    _read_run(source, run, start, stop, block, raw)


def _moved(source: Checkpoint, template: Checkpoint, piece: _Piece) -> tuple[int, int]:
    """Return the image of `source` that holds the piece, and how much further on it lies there."""
    if source.tensors is template.tensors:
        return piece.tensor.image, 0
    tensor = source.tensors[piece.tensor.name]
    return tensor.image, tensor.offset - piece.tensor.offset


def _read_run(
    source: Checkpoint, run: tuple[int, int], start: int, stop: int, block: _Block, raw: NDArray[np.uint8]
) -> None:
    image, distance = run
    target = raw[start - block.start : stop - block.start].data
    source.images[image].read_into(target, start + distance)


def _blocks(plan: Plan, image: int, size: int, block_bytes: int) -> Iterator[_Block]:
    """Cut an image of the template into blocks, inside large tensors at multiples of eight bytes of data."""
    tensors = sorted(
        [(t, True) for t in plan.averaged if t.image == image]
        + [(t, False) for t in plan.compared if t.image == image],
        key=lambda entry: entry[0].offset,
    )
    start = 0
    pieces: list[_Piece] = []
    for tensor, average in tensors:
        position = tensor.offset
        while position < tensor.stop:
            room = start + block_bytes - position
            if room < 8:
                stop = min(start + block_bytes, position)
                yield _Block(image, start, stop, tuple(pieces))
                start, pieces = stop, []
                continue
            stop = min(tensor.stop, position + room // 8 * 8)
            pieces.append(_Piece(tensor, position, stop, average))
            position = stop
    while start < size:
        stop = min(start + block_bytes, size)
        yield _Block(image, start, stop, tuple(pieces))
        start, pieces = stop, []


def bytes_to_read(plan: Plan, verify: bool) -> int:
    """Return how many bytes a Combiner reads for a plan, gaps between tensors and metadata apart."""
    size = plan.template.size
    if verify:
        return size * len(plan.inputs)
    return size + (len(plan.inputs) - 1) * sum(t.nbytes for t in (*plan.averaged, *plan.compared))


def block_memory(block_bytes: int, threads: int) -> int:
    """Return the bytes that a Combiner takes at most: buffers a thread, and finished blocks.

    A thread holds one block of input, its float64 sums (up to four times as many bytes, of two-byte
    values) and as much again while converting.
    """
    return block_bytes * threads * (1 + 2 * 4 + _PENDING)


def stream_values(plan: Plan, block_bytes: int) -> Iterator[Iterator[list[tuple[Tensor, NDArray[Any]]]]]:
    """Yield block by block, input by input, the values of the tensors that are averaged or compared.

    Each value array is of one piece of a tensor: of its stored type, float32 of bfloat16, bytes of integers.
    It is good until the next input is asked for.

    Raises:
        UnreadableError, SystemRefusalError: as for `Image.read_into`.
    """
    raw = np.empty(block_bytes, np.uint8)
    for index, image in enumerate(plan.template.images):
        for block in _blocks(plan, index, image.size, block_bytes):
            if block.pieces:
                yield (_values(source, plan.template, block, raw) for source in plan.inputs)


def _values(
    source: Checkpoint, template: Checkpoint, block: _Block, raw: NDArray[np.uint8]
) -> list[tuple[Tensor, NDArray[Any]]]:
    _read_pieces(source, template, block, raw)
    values: list[tuple[Tensor, NDArray[Any]]] = []
    for piece in block.pieces:
        view: NDArray[Any] = raw[piece.start - block.start : piece.stop - block.start]
        dtype = piece.tensor.dtype
        if piece.average:
            view = _widen(view.view(np.uint16)) if dtype == "bfloat16" else view.view(dtype)
        values.append((piece.tensor, view))
    return values
