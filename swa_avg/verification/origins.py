"""The inputs that an output names: found, unchanged, and none of them the output itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing

from swa_avg.errors import Finding, MismatchError, UnreadableError
from swa_avg.files.location import Location
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.inputs.opening import check_contents, check_shared_files
from swa_avg.planning.record import Record, RecordedInput
from swa_avg.text import first_few

__all__ = ["check_inputs", "check_not_the_output", "input_paths"]


def input_paths(record: Record, output: Location, folders: Sequence[Location]) -> list[Location]:
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


def check_not_the_output(checkpoints: Sequence[Checkpoint], record: Record, output: Checkpoint) -> None:
    """Raise UnreadableError if an input is the output itself, or a copy: all is the average of itself.

    A copy may carry another record. Of one input alone that is an output, a copy is all there is to prove.
    """
    own = {shard.identity() for shard in output.shards}
    used = [checkpoints[number] for number in record.used]
    if len(used) == 1 and used[0].is_average and used[0].record != output.record:
        problem = f"is no average, but made from {used[0].path.name} alone, which swa-avg wrote"
        raise UnreadableError(output.path, problem, hint="verify that one")
    for checkpoint in checkpoints:
        if own & {shard.identity() for shard in checkpoint.shards}:
            raise UnreadableError(output.path, f"names itself as an input ({checkpoint.path.name})")
        if checkpoint.record == output.record:
            raise UnreadableError(output.path, f"names a copy of itself as an input ({checkpoint.path.name})")


def check_inputs(checkpoints: Sequence[Checkpoint], record: Record) -> None:
    """Raise MismatchError if an input is not what it was when the output was made, or is there twice."""
    checked = [
        _changes(checkpoint, entry) for checkpoint, entry in zip(checkpoints, record.inputs, strict=True)
    ]
    findings = [finding for _, changes in checked for finding in changes]
    if findings:
        raise MismatchError(findings)
    check_shared_files(checkpoints)
    check_contents(checkpoints, [checksums for checksums, _ in checked])


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
