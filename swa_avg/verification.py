"""Derive an output again from the inputs that it names, and compare."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.combine import Combiner, open_workers
from swa_avg.combine.blocks import Block
from swa_avg.errors import Finding, MismatchError, SystemRefusalError, UnreadableError, escape
from swa_avg.files.location import Location, any_remote, cached_locally, folder_itself, location
from swa_avg.formats import Checkpoint, Tensor, open_checkpoint
from swa_avg.inputs.listing import list_again
from swa_avg.inputs.opening import check_contents, check_shared_files, opened, resolve_dtypes
from swa_avg.planning.configuration import config_differences
from swa_avg.planning.derivation import ContradictionError, derive_method
from swa_avg.planning.output import as_output
from swa_avg.planning.plan import Plan, make_plan
from swa_avg.planning.policy import batchnorm_statistics
from swa_avg.planning.record import Record, RecordedInput, read_record
from swa_avg.text import counted, first_few

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found; its text is one line."""

    output: Location
    """What was compared."""
    inputs: tuple[Location, ...]
    """What it was derived from, in training order."""
    record: Record
    method: str | None
    """The method that gives the coefficients for these inputs; None where the record alone says them."""
    unchecked: tuple[str, ...]
    """Inputs without a digest in the record: whether they have changed since cannot be known."""
    averages: tuple[str, ...]
    """Inputs that are outputs of swa-avg themselves: only their bytes are known, not how they came about."""
    averaged: int
    """Tensors that were averaged again and compared."""
    copied: int
    """Tensors that were compared with the newest input's."""
    digests: tuple[str, ...]
    """BatchNorm statistics that are not the inputs' average, since a refresh replaced them: without its data
    they cannot be derived, and only their CRC-32 is compared with the record's."""
    findings: tuple[Finding, ...]
    """What differs."""

    @property
    def equal(self) -> bool:
        """Whether the output is what the inputs give."""
        return not self.findings

    def __str__(self) -> str:
        if not self.equal:
            return (
                f"different: {self.output} is not {self._average()}: {counted(len(self.findings), 'finding')}"
            )
        equal = "equal"
        if self.digests:
            count = counted(len(self.digests), "statistic")
            equal += f", but for {count} that a refresh replaced and that cannot be derived without its data"
        again = f"{counted(self.averaged, 'tensor')} averaged again"
        compared = f"{again}, {self.copied} compared with the newest input's"
        return f"{equal}: {self.output} is {self._average()} ({compared})"

    def _average(self) -> str:
        count = len(self.inputs)
        if count == 1:
            return self.inputs[0].name
        if self.method is not None:
            return f"the {self.method} average of {count} checkpoints"
        coefficients = first_few([f"{entry.coefficient:.6g}" for entry in self.record.inputs])
        return f"the average of {count} checkpoints with the coefficients in its record ({coefficients})"

    def __repr__(self) -> str:
        return f"<Verification: {escape(self)}>"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        return {
            "output": str(self.output),
            "equal": self.equal,
            "method": "weights" if self.method is None else self.record.method,
            "inputs": [str(path) for path in self.inputs],
            "averaged": self.averaged,
            "copied": self.copied,
            "by_digest": list(self.digests),
            "findings": [
                {"path": str(f.path), "subject": f.subject, "problem": f.problem} for f in self.findings
            ],
        }


def verify(
    output: str | Path,
    inputs: str | Path | Sequence[str | Path] = (),
    *,
    max_memory: int | str | None = None,
    threads: int | None = None,
) -> Verification:
    """Derive an output of swa-avg again from the inputs that it names, in bounded memory, without Keras.

    Every tensor is compared, copied ones included, and so is the configuration. The output's record is a
    claim: the coefficients are derived again from its method and the inputs. What a refresh of BatchNorm
    replaced cannot be derived without its data; its CRC-32 is compared with the one in the record.

    Args:
        output: What `average` or `sweep` wrote.
        inputs: Folder of the inputs, or folders; the output's own by default.
        max_memory: Bytes of resident memory to stay under; or as text, such as `200M`.
        threads: Worker threads; the machine's cores up to 4 by default, 10 where a file is named by a URL.

    Returns:
        What was compared, and what differs.

    Raises:
        UnreadableError: the output cannot be read or does not say how it was made, or an input is missing,
            or is the output itself.
        MismatchError: inputs have changed since the output was made, or are the same; every one is named.
        SystemRefusalError: the system could not read.

    Example:
        >>> verify("swa.keras", "run").equal
        True
    """
    target = folder_itself(location(output))
    with ExitStack() as stack:
        found = stack.enter_context(closing(open_checkpoint(stack.enter_context(cached_locally(target)))))
        record = read_record(found)
        (found,) = resolve_dtypes([found], record.dtype)
        named = [inputs] if isinstance(inputs, str | Path) else inputs
        paths = _paths(record, target, list(dict.fromkeys(map(location, named))) or [target.parent])
        far = any_remote([target, *paths])
        workers = stack.enter_context(open_workers(None, threads, max_memory, remote=far))
        checkpoints = stack.enter_context(opened(paths, record.dtype))
        _check_not_the_output(checkpoints, record, found)
        _check_inputs(checkpoints, record)
        template = as_output(checkpoints[-1], target)
        if record.optimizer == "drop":
            template = template.without_optimizer(_scratch(stack))
        coefficients = [entry.coefficient for entry in record.inputs]
        plan = make_plan(checkpoints, template, coefficients, drop_optimizer=record.optimizer == "drop")
        # The inputs' bytes have just been read and found to be unchanged.
        combiner = Combiner(plan, [coefficients], workers, verify=False)
        statistics = batchnorm_statistics(checkpoints[-1])
        excused = {name for name in record.values if name in statistics and name in found.tensors}
        method, contradictions = _derived(found, record, paths)
        findings = [
            *contradictions,
            *_shape_findings(found, plan, record),
            *_digest_findings(found, record, statistics),
            *_value_findings(found, combiner, excused),
            *_surroundings(found, plan.template, rebuilt=record.optimizer == "drop"),
        ]
        found.check_unchanged()
    plan = combiner.settled
    return Verification(
        target,
        tuple(paths),
        record,
        method,
        tuple(entry.name for entry in record.inputs if None in entry.crc32),
        tuple(checkpoint.path.name for checkpoint in checkpoints if checkpoint.is_average),
        averaged=sum(tensor.name not in excused for tensor in plan.averaged),
        copied=len(plan.copied) + len(plan.compared),
        digests=tuple(name for name in record.values if name in excused),
        findings=tuple(findings),
    )


def _paths(record: Record, output: Location, folders: Sequence[Location]) -> list[Location]:
    """Return the path of each input: of several files of that name, the one that fits the record."""
    wanted = Counter(entry.name for entry in record.inputs)
    held = {name: [path for folder in folders if (path := folder / name).exists()] for name in wanted}
    where = " or ".join(map(str, folders))
    for name, count in wanted.items():
        if len(held[name]) < count > 1:
            problem = f"was made from {count} checkpoints named {name}, {len(held[name])} found in {where}"
            raise UnreadableError(output, problem, hint="name each folder (inputs)")
    missing = [name for name, found in held.items() if not found]
    if missing:
        hint = "name the folder that holds them (inputs)"
        problem = f"was made from {first_few(missing)}, not found in {where}"
        raise UnreadableError(output, problem, hint=hint)
    paths = []
    for entry in record.inputs:
        left = held[entry.name]
        path = left[0]
        if len(left) > 1:
            path = next((path for path in left if _is_unchanged(path, entry)), path)
        if wanted[entry.name] > 1:
            left.remove(path)
        paths.append(path)
    return paths


def _is_unchanged(path: Location, entry: RecordedInput) -> bool:
    try:
        with closing(open_checkpoint(path)) as checkpoint:
            return not _changes(checkpoint, entry)[1]
    except UnreadableError:
        return False


def _scratch(stack: ExitStack) -> Callable[[], IO[bytes]]:
    def scratch() -> IO[bytes]:
        try:
            return stack.enter_context(tempfile.TemporaryFile())
        except OSError as error:
            raise SystemRefusalError(error.errno, str(error.strerror), tempfile.gettempdir()) from error

    return scratch


def _check_not_the_output(checkpoints: Sequence[Checkpoint], record: Record, output: Checkpoint) -> None:
    """Raise UnreadableError if an input is the output itself, or a copy: all is the average of itself.

    A copy may carry another record. Of one input alone that is an output, a copy is all there is to prove.
    """
    own = {shard.identity() for shard in output.shards}
    used = [c for c, entry in zip(checkpoints, record.inputs, strict=True) if entry.coefficient]
    if len(used) == 1 and used[0].is_average and used[0].record != output.record:
        problem = f"is no average, but made from {used[0].path.name} alone, which swa-avg wrote"
        raise UnreadableError(output.path, problem, hint="verify that one")
    for checkpoint in checkpoints:
        if own & {shard.identity() for shard in checkpoint.shards}:
            raise UnreadableError(output.path, f"names itself as an input ({checkpoint.path.name})")
        if checkpoint.record == output.record:
            raise UnreadableError(output.path, f"names a copy of itself as an input ({checkpoint.path.name})")


def _check_inputs(checkpoints: Sequence[Checkpoint], record: Record) -> None:
    """Raise MismatchError if an input is not what it was when the output was made, or is there twice."""
    checked = [
        _changes(checkpoint, entry) for checkpoint, entry in zip(checkpoints, record.inputs, strict=True)
    ]
    findings = [finding for _, changes in checked for finding in changes]
    if findings:
        raise MismatchError(findings)
    check_shared_files(checkpoints)
    check_contents(checkpoints, [checksums for checksums, _ in checked])


def _derived(
    found: Checkpoint, record: Record, paths: Sequence[Location]
) -> tuple[str | None, list[Finding]]:
    """Return the method that gives the record's coefficients, if it is known, and what contradicts it.

    The order of inputs from several folders was that of their paths then, which is not recorded.
    """
    listings = []
    if len({path.parent for path in paths}) == 1:
        known = list_again(paths)
        listings = [listing for listing in known if listing.paths == paths]
        if not listings:
            order = first_few([path.name for path in known[0].paths])
            return None, [Finding(found.path, "inputs", f"not in training order, which is {order}")]
    try:
        return derive_method(record, listings), []
    except ContradictionError as error:
        return None, [Finding(found.path, "coefficients", str(error))]


def _changes(checkpoint: Checkpoint, entry: RecordedInput) -> tuple[list[int], list[Finding]]:
    """Return the CRC-32 of each shard of an input, and what has changed since it was recorded."""
    if checkpoint.size != entry.size or len(checkpoint.shards) != len(entry.crc32):
        problem = f"has changed since: {entry.size} bytes of weights then, {checkpoint.size} now"
        return [], [Finding(checkpoint.path, "weights", problem)]
    checksums = [shard.checksum() for shard in checkpoint.shards]
    findings = []
    for shard, checksum, expected in zip(checkpoint.shards, checksums, entry.crc32, strict=True):
        now = f"{checksum:08x}"
        then = expected or (now if shard.crc32 is None else f"{shard.crc32:08x}")
        if now != then:
            problem = f"has changed since: its CRC-32 was {then}, and is {now} now"
            findings.append(Finding(checkpoint.path, shard.path.name, problem))
    return checksums, findings


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
