"""Derive an output again from the inputs that it names, and compare."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.combine.blocks import Block
from swa_avg.combine.budget import fit_memory
from swa_avg.combine.combiner import Combiner
from swa_avg.errors import Finding, MismatchError, SystemRefusalError, UnreadableError
from swa_avg.files.location import Location, cached_locally, location
from swa_avg.formats import Checkpoint, Tensor, open_checkpoint
from swa_avg.formats.archive import ArchiveCheckpoint
from swa_avg.formats.bare import WEIGHTS, Hdf5Checkpoint
from swa_avg.formats.base import PROVENANCE
from swa_avg.formats.sharded import ShardedCheckpoint
from swa_avg.inputs.opening import opened, resolve_dtypes
from swa_avg.planning.output import as_output
from swa_avg.planning.plan import Plan, config_differences, make_plan
from swa_avg.planning.record import Record, RecordedInput, read_record

__all__ = ["Verification", "verify"]


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    output: Location
    inputs: tuple[Location, ...]
    record: Record
    averaged: int
    """Tensors that were averaged again and compared."""
    copied: int
    """Tensors that were compared with the newest input's."""
    digests: tuple[str, ...]
    """BatchNorm statistics that a refresh replaced: without its data, held against their CRC-32 only."""
    findings: tuple[Finding, ...]
    """What differs."""

    @property
    def equal(self) -> bool:
        return not self.findings


def verify(
    output: str | Path,
    inputs: str | Path | Sequence[str | Path] = (),
    *,
    max_memory: int | None = None,
    threads: int | None = None,
) -> Verification:
    """Derive an output of swa-avg again from the inputs that it names, in bounded memory, without Keras.

    Every tensor is compared, copied ones too, and the configuration. What a refresh of BatchNorm replaced
    cannot be derived without its data, and is held against the CRC-32 in the output's record.

    Args:
        output: What `average` or `sweep` wrote.
        inputs: Folder of the inputs, or folders; the output's own by default.
        max_memory: Bytes of resident memory to stay under.
        threads: Worker threads; the machine's cores up to 4 by default.

    Raises:
        UnreadableError: the output cannot be read or does not say how it was made, or an input is missing.
        MismatchError: the inputs are not those of then; every one of them is named.
        SystemRefusalError: the system could not read.
    """
    target = location(output)
    block_bytes, threads = fit_memory(max_memory, threads)
    with ExitStack() as stack:
        found = stack.enter_context(closing(open_checkpoint(stack.enter_context(cached_locally(target)))))
        record = read_record(found)
        (found,) = resolve_dtypes([found], record.dtype)
        named = [inputs] if isinstance(inputs, str | Path) else inputs
        paths = _paths(record, target, list(dict.fromkeys(map(location, named))) or [target.parent])
        checkpoints = stack.enter_context(opened(paths, record.dtype))
        _check_inputs(checkpoints, record)
        template = as_output(checkpoints[-1], target)
        if record.optimizer == "drop":
            template = template.without_optimizer(_scratch(stack))
        coefficients = [entry.coefficient for entry in record.inputs]
        plan = make_plan(checkpoints, template, coefficients, drop_optimizer=record.optimizer == "drop")
        executor = stack.enter_context(ThreadPoolExecutor(threads))
        # The inputs' bytes have just been read and found to be those of then.
        combiner = Combiner(plan, [coefficients], executor, block_bytes, threads, verify=False)
        digests = tuple(name for name in record.values if name in found.tensors)
        findings = [
            *_shape_findings(found, plan, record),
            *_digest_findings(found, record),
            *_value_findings(found, combiner, record),
            *_surroundings(found, plan.template, rebuilt=record.optimizer == "drop"),
        ]
        found.check_unchanged()
    count = sum(tensor.name not in record.values for tensor in plan.averaged)
    copied = len(plan.copied) + len(plan.compared)
    return Verification(target, tuple(paths), record, count, copied, digests, tuple(findings))


def _paths(record: Record, output: Location, folders: Sequence[Location]) -> list[Location]:
    """Return the path of each input: of several files of its name, of the one that the record tells of."""
    wanted = Counter(entry.name for entry in record.inputs)
    held = {name: [path for folder in folders if (path := folder / name).exists()] for name in wanted}
    where = " or ".join(map(str, folders))
    for name, count in wanted.items():
        if len(held[name]) < count > 1:
            problem = f"was made from {count} checkpoints named {name}, {len(held[name])} found in {where}"
            raise UnreadableError(output, problem, hint="name each folder with --inputs")
    missing = [name for name, found in held.items() if not found]
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        hint = "say with --inputs which folder holds them"
        raise UnreadableError(output, f"was made from {shown}, not found in {where}", hint=hint)
    paths = []
    for entry in record.inputs:
        left = held[entry.name]
        path = left[0]
        if len(left) > 1:
            path = next((path for path in left if _is_that_of_then(path, entry)), path)
        if wanted[entry.name] > 1:
            left.remove(path)
        paths.append(path)
    return paths


def _is_that_of_then(path: Location, entry: RecordedInput) -> bool:
    try:
        with closing(open_checkpoint(path)) as checkpoint:
            return not any(_changes(checkpoint, entry))
    except UnreadableError:
        return False


def _scratch(stack: ExitStack) -> Callable[[], IO[bytes]]:
    def scratch() -> IO[bytes]:
        try:
            return stack.enter_context(tempfile.TemporaryFile())
        except OSError as error:
            raise SystemRefusalError(error.errno, str(error.strerror), tempfile.gettempdir()) from error

    return scratch


def _check_inputs(checkpoints: Sequence[Checkpoint], record: Record) -> None:
    """Raise MismatchError if an input is not what it was when the output was made."""
    pairs = zip(checkpoints, record.inputs, strict=True)
    findings = [finding for checkpoint, entry in pairs for finding in _changes(checkpoint, entry)]
    if findings:
        raise MismatchError(findings)


def _changes(checkpoint: Checkpoint, entry: RecordedInput) -> Iterator[Finding]:
    if checkpoint.size != entry.size or len(checkpoint.shards) != len(entry.crc32):
        problem = f"has changed since: {entry.size} bytes of weights then, {checkpoint.size} now"
        yield Finding(checkpoint.path, "weights", problem)
        return
    for shard, expected in zip(checkpoint.shards, entry.crc32, strict=True):
        now = f"{shard.checksum():08x}"
        then = expected or (now if shard.crc32 is None else f"{shard.crc32:08x}")
        if now != then:
            problem = f"has changed since: its CRC-32 was {then}, and is {now} now"
            yield Finding(checkpoint.path, shard.path.name, problem)


def _shape_findings(found: Checkpoint, plan: Plan, record: Record) -> Iterator[Finding]:
    """Yield the tensors that are missing, too many, or of another shape."""
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


def _digest_findings(found: Checkpoint, record: Record) -> Iterator[Finding]:
    """Yield the refreshed statistics that are not those of then."""
    for name, expected in record.values.items():
        tensor = found.tensors.get(name)
        if tensor is not None:
            now = f"{found.shards[tensor.shard].checksum(tensor.offset, tensor.stop):08x}"
            if now != expected:
                problem = f"its CRC-32 is {now}; the refresh of BatchNorm left {expected}"
                yield Finding(found.path, name, problem)


def _value_findings(found: Checkpoint, combiner: Combiner, record: Record) -> Iterator[Finding]:
    """Yield the tensors whose bytes differ, with the first value that does."""
    template = combiner.plan.template
    differing: dict[str, int] = {}
    for index in range(len(template.shards)):
        tensors = [
            tensor
            for name, tensor in template.tensors.items()
            if tensor.shard == index
            and name not in record.values
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
    """Return the first byte of a tensor, of those in a block, that is not as expected."""
    start, stop = max(tensor.offset, block.start), min(tensor.stop, block.stop)
    twin = found.tensors[tensor.name]
    data = found.shards[twin.shard].read(twin.offset + start - tensor.offset, max(0, stop - start))
    differs = np.frombuffer(data, np.uint8) != expected[start - block.start : max(start, stop) - block.start]
    return int(differs.argmax()) + start - tensor.offset if differs.any() else None


def _surroundings(found: Checkpoint, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
    """Yield what differs outside the tensors.

    In a bare HDF5 file the record itself lies between them, so that only what Keras reads there is compared.
    """
    if template.kind != WEIGHTS:  # these have no configuration, but for one that an archive lent its weights
        for where, expected, value in config_differences(template.config, found.config):
            yield Finding(found.path, where, f"expected {expected}, found {value}")
    if _layer_names(found) != _layer_names(template):
        yield Finding(found.path, "layer names", "differ from the newest input's")
    for shard in found.shards:
        if shard.crc32 is not None and (now := shard.checksum()) != shard.crc32:
            problem = f"damaged: its CRC-32 is {now:08x}, the archive says {shard.crc32:08x}"
            yield Finding(found.path, "model.weights.h5", problem)
    if not isinstance(found, Hdf5Checkpoint) and not rebuilt and not template.shares_layout(found.shards):
        yield Finding(found.path, "HDF5 metadata", "bytes outside the tensors differ from the newest input's")
    if isinstance(found, ArchiveCheckpoint) and isinstance(template, ArchiveCheckpoint):
        yield from _member_findings(found, template)
    if (
        isinstance(found, ShardedCheckpoint)
        and isinstance(template, ShardedCheckpoint)
        and _without(found.map, PROVENANCE, "weight_map") != _without(template.map, PROVENANCE, "weight_map")
    ):
        yield Finding(found.path, "map", "differs from the newest input's, the names of shards apart")


def _layer_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the names of layers, without what a dropped optimizer was called."""
    return {
        group: name for group, name in checkpoint.layer_names.items() if not group.startswith("optimizer")
    }


def _without(value: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
    return {key: item for key, item in (value or {}).items() if key not in keys}


def _member_findings(found: ArchiveCheckpoint, template: ArchiveCheckpoint) -> Iterator[Finding]:
    """Yield the members of an archive that are not the newest input's, weights apart."""
    if found.config_bytes != template.config_bytes:
        yield Finding(found.path, "config.json", "differs from the newest input's")
    if _without(found.metadata, PROVENANCE) != _without(template.metadata, PROVENANCE):
        yield Finding(found.path, "metadata.json", "differs from the newest input's")
    own = found.others()
    theirs = template.others()
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            yield Finding(found.path, name, "differs from the newest input's")
