"""Cut the template's shards into blocks, and read each input's bytes of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.formats.base import Checkpoint, Tensor
from swa_avg.planning.plan import Plan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Block", "Piece", "Source", "blocks_of", "is_same", "read_pieces"]

_CHUNK = 64 * 1024  # bytes of each input that are held to be compared
_GAP = 16 * 1024  # bytes; reading them takes no longer than a second read


@dataclass(frozen=True)
class Source:
    """The part of a checkpoint that reading its blocks takes; it can be pickled."""

    path: Location
    shards: tuple[Region, ...]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        return cls(checkpoint.path, checkpoint.shards, checkpoint.tensors)


@dataclass(frozen=True)
class Piece:
    """The part of one tensor that lies in one block."""

    tensor: Tensor
    start: int
    """Bytes from the start of the shard, as the template lays it out."""
    stop: int
    average: bool
    """Else, it holds integers that must be equal in all inputs."""


@dataclass(frozen=True)
class Block:
    """A run of bytes of one of the template's shards, and the pieces in it that are averaged or compared."""

    shard: int
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cost(self, plan: Plan, verify: bool) -> int:
        """Return the number of bytes that are read to average it."""
        if verify:
            return self.size * len(plan.inputs)
        return self.size + (len(plan.inputs) - 1) * sum(piece.stop - piece.start for piece in self.pieces)


def is_same(inputs: Sequence[Source], tensor: Tensor) -> bool:
    """Tell whether a tensor has the same bytes in all inputs; errors as for `Region.read_into`."""
    first, *others = ((source.shards, source.tensors[tensor.name]) for source in inputs)
    for start in range(0, tensor.nbytes, _CHUNK):
        size = min(_CHUNK, tensor.nbytes - start)
        expected, *found = (
            shards[twin.shard].read(twin.offset + start, size) for shards, twin in (first, *others)
        )
        if any(data != expected for data in found):
            return False
    return True


def read_pieces(source: Source, template: Source, block: Block, raw: NDArray[np.uint8]) -> None:
    """Read the block's pieces from `source` into `raw`, in the places that the template's layout gives them.

    Neighbours that are displaced by the same distance are read together, small gaps included.
    """
    first = block.pieces[0]
    run = _displaced(source, template, first)
    start, stop = first.start, first.stop
    for piece in block.pieces[1:]:
        here = _displaced(source, template, piece)
        if here == run and piece.start - stop <= _GAP:
            stop = piece.stop
            continue
        _read_run(source, run, start, stop, block, raw)
        run, start, stop = here, piece.start, piece.stop
    _read_run(source, run, start, stop, block, raw)


def _displaced(source: Source, template: Source, piece: Piece) -> tuple[int, int]:
    """Return the shard of `source` that holds the piece, and its displacement there in bytes."""
    if source.tensors is template.tensors:
        return piece.tensor.shard, 0
    tensor = source.tensors[piece.tensor.name]
    return tensor.shard, tensor.offset - piece.tensor.offset


def _read_run(
    source: Source, run: tuple[int, int], start: int, stop: int, block: Block, raw: NDArray[np.uint8]
) -> None:
    shard, distance = run
    target = raw[start - block.start : stop - block.start].data
    source.shards[shard].read_into(target, start + distance)


def blocks_of(plan: Plan, shard: int, block_bytes: int) -> Iterator[Block]:
    """Cut a shard of the template into blocks, inside large tensors at multiples of eight bytes of data."""
    tensors = sorted(
        [(t, True) for t in plan.averaged if t.shard == shard]
        + [(t, False) for t in plan.compared if t.shard == shard],
        key=lambda entry: entry[0].offset,
    )
    size = plan.template.shards[shard].size
    start = 0
    pieces: list[Piece] = []
    for tensor, average in tensors:
        position = tensor.offset
        while position < tensor.stop:
            room = start + block_bytes - position
            if room < 8:
                stop = min(start + block_bytes, position)
                yield Block(shard, start, stop, tuple(pieces))
                start, pieces = stop, []
                continue
            stop = min(tensor.stop, position + room // 8 * 8)
            pieces.append(Piece(tensor, position, stop, average))
            position = stop
    while start < size:
        stop = min(start + block_bytes, size)
        yield Block(shard, start, stop, tuple(pieces))
        start, pieces = stop, []
