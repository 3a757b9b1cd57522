"""The inputs of one run: opened, their types resolved, seen to be distinct, and unchanged to the end."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

from swa_avg.errors import Finding, MismatchError, UsageError
from swa_avg.files.location import Location, any_remote, cached_locally
from swa_avg.files.region import Region
from swa_avg.files.remote import CONNECTIONS
from swa_avg.files.untrusted_json import objects
from swa_avg.formats import Checkpoint, Tensor, open_checkpoint
from swa_avg.text import first_few

__all__ = ["check_averages", "check_contents", "check_shared_files", "opened", "resolve_dtypes"]

_SHARDS = 32  # of a checkpoint, as a rule at most


@contextmanager
def opened(
    paths: Sequence[Location], dtype: str | None = None, *, cache_newest: bool = False
) -> Iterator[list[Checkpoint]]:
    """Open checkpoints for as long as the block runs.

    The newest is opened first, since the others are compared with its layout; with `cache_newest` it is
    copied to this machine where it is named by a URL. Types are resolved as by `resolve_dtypes`.

    Raises:
        UnreadableError: one is missing or damaged; or, as the block ends well, was written to meanwhile.
        SystemRefusalError: the system, or a service, refused.
        UsageError: `dtype` is not one that can be named.
    """
    _allow_open_files(len(paths))
    with ExitStack() as stack:
        last = stack.enter_context(cached_locally(paths[-1])) if cache_newest else paths[-1]
        newest = stack.enter_context(closing(open_checkpoint(last)))

        def open_one(path: Location) -> Checkpoint:
            return stack.enter_context(closing(open_checkpoint(path, newest)))

        if any_remote(paths[:-1]):
            with ThreadPoolExecutor(CONNECTIONS) as executor:  # each waits for a dozen answers
                others = list(executor.map(open_one, paths[:-1]))
        else:
            others = list(map(open_one, paths[:-1]))
        checkpoints = resolve_dtypes([*others, newest], dtype)
        yield checkpoints
        for checkpoint in checkpoints:
            checkpoint.check_unchanged()


def resolve_dtypes(checkpoints: Sequence[Checkpoint], untagged: str | None) -> list[Checkpoint]:
    """Return the checkpoints with a type for their untagged two-byte tensors, where it can be known.

    Keras 2, and every legacy file, stores bfloat16 as two opaque bytes; that it is bfloat16 only the
    model's configuration says, or the user with `--dtype`. Checkpoints that share their tensors still do.

    Raises:
        UsageError: the user's is another type.
    """
    if untagged not in (None, "bfloat16"):
        raise UsageError(f"dtype is bfloat16, not {untagged!r}")
    resolved: dict[int, Mapping[str, Tensor]] = {}
    for checkpoint in checkpoints:
        tensors = checkpoint.tensors
        if id(tensors) in resolved:
            continue
        resolved[id(tensors)] = tensors
        if any(tensor.dtype == "opaque16" for tensor in tensors.values()):
            dtype = untagged or ("bfloat16" if _mentions_bfloat16(checkpoint.config) else "opaque16")
            resolved[id(tensors)] = {
                name: replace(tensor, dtype=dtype) if tensor.dtype == "opaque16" else tensor
                for name, tensor in tensors.items()
            }
    return [replace(c, tensors=resolved[id(c.tensors)]) for c in checkpoints]


def _mentions_bfloat16(config: Any) -> bool:
    return any(
        isinstance(value, str) and "bfloat16" in value
        for settings in objects(config)
        for value in settings.values()
    )


def check_shared_files(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if two inputs hold one file between them: a shard that both maps name."""
    seen: dict[Hashable, Checkpoint] = {}
    findings = []
    for checkpoint in checkpoints:
        shared = []
        for shard in checkpoint.shards:
            first = seen.setdefault(shard.identity(), checkpoint)
            if first is not checkpoint:
                problem = f"the same file as in {first.path.name}; name one of the two"
                shared.append(Finding(checkpoint.path, shard.path.name, problem))
        if len(shared) < len(checkpoint.shards):  # else they hold the same bytes, which is said once
            findings.extend(shared)
    if findings:
        raise MismatchError(findings)


def check_contents(checkpoints: Sequence[Checkpoint], checksums: Sequence[Sequence[int | None]]) -> None:
    """Raise MismatchError if two inputs hold the same bytes: one checkpoint, counted twice.

    `checksums` holds the CRC-32 of each input's shards, None where it is not known.
    """
    seen: dict[tuple[tuple[int, int], ...], Location] = {}
    findings = []
    for checkpoint, sums in zip(checkpoints, checksums, strict=True):
        if None not in sums:
            key = tuple(
                (shard.size, checksum or 0) for shard, checksum in zip(checkpoint.shards, sums, strict=True)
            )
            first = seen.setdefault(key, checkpoint.path)
            if first is not checkpoint.path:
                findings.append(
                    Finding(checkpoint.path, "weights", f"the same bytes as {first}; name one of the two")
                )
    if findings:
        raise MismatchError(findings)


def check_averages(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise MismatchError if an input is an average of others among them, which would count twice.

    By the digests in its record: a claim, of which only the form is checked. What no container declares is
    computed, where there is such a record.
    """
    digests: dict[Location, tuple[int, tuple[str, ...]]] = {}
    findings = []
    for average in checkpoints:
        recorded = list(_recorded(average))
        held = []
        for other in checkpoints if recorded else ():
            if other is not average and any(size == other.size for size, _ in recorded):
                if other.path not in digests:
                    digests[other.path] = other.size, tuple(map(_digest, other.shards))
                if digests[other.path] in recorded:
                    held.append(other.path.name)
        if held:
            problem = f"is an average of {first_few(held)}, which would count twice; leave this average out"
            findings.append(Finding(average.path, "record", problem))
    if findings:
        raise MismatchError(findings)


def _recorded(average: Checkpoint) -> Iterator[tuple[object, tuple[str, ...]]]:
    """Yield size and digests of each checkpoint that a record says was averaged, as far as it says so."""
    named = (average.record or {}).get("inputs")
    for entry in named if isinstance(named, list) else ():
        if isinstance(entry, dict) and entry.get("coefficient") and isinstance(entry.get("crc32"), list):
            yield entry.get("size"), tuple(map(str, entry["crc32"]))


def _digest(shard: Region) -> str:
    return f"{shard.checksum() if shard.crc32 is None else shard.crc32:08x}"


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files for this many checkpoints, each possibly a set of shards: all
    stay open for the run."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count * _SHARDS + 64
    if soft != resource.RLIM_INFINITY and soft < needed and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
