"""An output held against what its inputs give."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from swa_avg.combine import Combiner
from swa_avg.combine.blocks import Block
from swa_avg.errors import Finding
from swa_avg.formats import Checkpoint, Tensor
from swa_avg.planning.configuration import config_differences
from swa_avg.planning.plan import Plan
from swa_avg.planning.record import Record

__all__ = ["differences", "holds_the_same"]

_AT_A_TIME = 2**20


def differences(
    found: Checkpoint, combiner: Combiner, record: Record, statistics: Container[str], excused: Container[str]
) -> Iterator[Finding]:
    """Yield everything in which an output differs from what its inputs give.

    `statistics` are BatchNorm's; those that are `excused` are held against the digests in the record alone.
    """
    plan = combiner.plan
    yield from _shape_findings(found, plan, record)
    yield from _digest_findings(found, record, statistics)
    yield from _value_findings(found, combiner, excused)
    yield from _surroundings(found, plan.template, rebuilt=record.optimizer == "drop")


def holds_the_same(one: Checkpoint, other: Checkpoint, names: Sequence[str]) -> bool:
    """Tell whether two checkpoints hold the same bytes in these tensors, which have one size in both."""
    for name in names:
        ours, theirs = one.tensors[name], other.tensors[name]
        for start in range(0, ours.nbytes, _AT_A_TIME):
            size = min(_AT_A_TIME, ours.nbytes - start)
            mine = one.shards[ours.shard].read(ours.offset + start, size)
            if mine != other.shards[theirs.shard].read(theirs.offset + start, size):
                return False
    return True


def _shape_findings(found: Checkpoint, plan: Plan, record: Record) -> Iterator[Finding]:
    """Yield the tensors that are missing, extra, or of another shape."""
    expected = plan.template.tensors
    for name in sorted(expected.keys() | found.tensors.keys() | record.values.keys()):
        if name not in found.tensors:
            yield Finding(found.path, name, "missing; the inputs have it")
        elif name not in expected:
            yield Finding(found.path, name, "extra; the inputs do not have it")
        elif not _same_shape(found.tensors[name], expected[name]):
            yield Finding(found.path, name, f"expected {expected[name]}, found {found.tensors[name]}")


def _same_shape(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.nbytes) == (other.shape, other.dtype, other.nbytes)


def _digest_findings(found: Checkpoint, record: Record, statistics: Container[str]) -> Iterator[Finding]:
    """Yield the refreshed statistics that have changed since the refresh, and what is no statistic."""
    for name, expected in record.values.items():
        tensor = found.tensors.get(name)
        if name not in statistics:
            problem = "no BatchNorm statistic, which alone a refresh replaces, as its record says of it"
            yield Finding(found.path, name, problem)
        elif tensor is not None:
            now = f"{found.shards[tensor.shard].checksum(tensor.offset, tensor.stop):08x}"
            if now != expected:
                problem = f"its CRC-32 is {now}; the refresh of BatchNorm left {expected}"
                yield Finding(found.path, name, problem)


def _value_findings(found: Checkpoint, combiner: Combiner, excused: Container[str]) -> Iterator[Finding]:
    """Yield the tensors whose bytes differ, with the first value that does."""
    template = combiner.plan.template
    differing: dict[str, int] = {}
    for index in range(len(template.shards)):
        tensors = [
            tensor
            for name, tensor in template.tensors.items()
            if tensor.shard == index
            and name not in excused
            and name in found.tensors
            and _same_shape(found.tensors[name], tensor)
        ]
        tensors.sort(key=lambda tensor: (tensor.stop, tensor.offset))
        first = 0
        for block, averages in combiner.blocks(index):
            while first < len(tensors) and tensors[first].stop <= block.start:
                first += 1
            for tensor in islice(tensors, first, None):
                if tensor.offset >= block.stop:
                    break
                position = _first_difference(found, tensor, block, averages[0])
                if position is not None:
                    differing.setdefault(tensor.name, position)
    for name, position in sorted(differing.items()):
        tensor = template.tensors[name]
        count = max(1, int(np.prod(tensor.shape)))
        value = position // max(1, tensor.nbytes // count)
        problem = f"differs from what the inputs give, first at value {value} of {count}"
        yield Finding(found.path, name, problem)


def _first_difference(
    found: Checkpoint, tensor: Tensor, block: Block, expected: NDArray[np.uint8]
) -> int | None:
    """Return the first byte of a tensor that lies in a block and is not as expected."""
    start, stop = max(tensor.offset, block.start), min(tensor.stop, block.stop)
    twin = found.tensors[tensor.name]
    data = found.shards[twin.shard].read(twin.offset + start - tensor.offset, max(0, stop - start))
    differs = np.frombuffer(data, np.uint8) != expected[start - block.start : max(start, stop) - block.start]
    return int(differs.argmax()) + start - tensor.offset if differs.any() else None


def _surroundings(found: Checkpoint, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
    """Yield what differs outside the tensors."""
    if found.kind != template.kind:
        yield Finding(found.path, "format", f"expected {template.kind}, found {found.kind}")
        return
    for where, expected, value in config_differences(template.config, found.config):
        yield Finding(found.path, where, f"expected {expected}, found {value}")
    if _layer_names(found) != _layer_names(template):
        yield Finding(found.path, "layer names", "differ from the newest input's")
    yield from found.differences(template, rebuilt=rebuilt)


def _layer_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names of layers, without that of an optimizer, which may have been dropped."""
    return {
        group: name for group, name in checkpoint.layer_names.items() if not group.startswith("optimizer")
    }
