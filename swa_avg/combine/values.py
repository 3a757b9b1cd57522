"""Look at the values that are averaged, one block of all inputs at a time, without averaging them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from swa_avg.combine.blocks import Block, Source, blocks_of, is_same, read_pieces
from swa_avg.combine.kernel import SLACK, aligned
from swa_avg.combine.sums import all_finite
from swa_avg.errors import Finding
from swa_avg.formats.base import Tensor
from swa_avg.formats.values import values_of
from swa_avg.planning.plan import Plan
from swa_avg.planning.policy import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["invalid_values", "stream_values"]


def stream_values(plan: Plan, block_bytes: int) -> Iterator[Iterator[list[tuple[Tensor, NDArray[Any]]]]]:
    """Yield block by block, input by input, the values of the tensors that are averaged or compared.

    Each array holds the values of one piece of a tensor: in its stored type, bfloat16 as float32, integers as
    bytes. It is good until the next input is asked for.

    Raises:
        UnreadableError, SystemRefusalError: as for `Region.read_into`.
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
        if piece.average:
            view = values_of(view, piece.tensor.dtype)
        values.append((piece.tensor, view))
    return values


def invalid_values(plan: Plan, block_bytes: int) -> Iterator[Finding]:
    """Read all inputs again, and yield each tensor that holds NaN, infinity, or integers that differ.

    NaN and infinity are valid in a tensor that is the same in all inputs.
    """
    found = False
    first = plan.inputs[0]
    sources = list(map(Source.of, plan.inputs))
    for source in plan.inputs:
        for expected in (*plan.averaged, *plan.compared):
            tensor = source.tensors[expected.name]
            if tensor.dtype in FLOATS:
                problem = "holds NaN or infinity; leave this checkpoint out"
            else:
                problem = f"holds integers that differ from {first.path.name}, and is not a counter"
            twin = first.tensors[expected.name]
            for start in range(0, tensor.nbytes, block_bytes):
                size = min(block_bytes, tensor.nbytes - start)
                data = source.shards[tensor.shard].read(tensor.offset + start, size)
                if tensor.dtype in FLOATS:
                    values = np.frombuffer(bytearray(data), np.uint8)
                    valid = all_finite(values, tensor.dtype) or is_same(sources, tensor)
                else:
                    valid = data == first.shards[twin.shard].read(twin.offset + start, size)
                if not valid:
                    found = True
                    yield Finding(source.path, tensor.name, problem)
                    break
    if not found:
        yield Finding(plan.template.path, "sum", "does not fit into float64")
