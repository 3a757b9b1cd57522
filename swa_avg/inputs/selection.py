"""Which files, and in which order."""

from __future__ import annotations

import contextlib
import glob
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from numbers import Integral
from pathlib import Path

from swa_avg.errors import Finding, MismatchError, UnreadableError, UsageError
from swa_avg.files.location import Location, identity, location, matches
from swa_avg.inputs.index import INDEX_NAME, MODES, Entry, Index, read_index
from swa_avg.inputs.metrics import direction
from swa_avg.text import counted

__all__ = ["epoch_number", "epochs_of", "expand", "natural_key", "parse_epochs", "read_indices", "select"]

_DECIMALS = re.compile(r"(?<![\d.])\d+\.\d+")
_EPOCHS = re.compile(r"([0-9]{1,18})?:([0-9]{1,18})?(?::([0-9]{1,18}))?$|([0-9]{1,18})$")
_MOST_DIGITS = 18
_SUFFIXES = (".keras", ".weights.json", ".weights.h5", ".h5", ".hdf5")


def natural_key(path: Location) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ckpt_2 before ckpt_10.

    Numbers go by their digits, not as integers, of which Python reads 4,300 digits at most.
    """
    parts = re.split(r"([0-9]+)", str(path))
    return [
        (1, len(part.lstrip("0")), part.lstrip("0")) if part.isdecimal() and part.isascii() else (0, 0, part)
        for part in parts
    ]


def epoch_number(path: Location) -> int | None:
    """Return the last whole number in a file's name: 7 of `w.07-0.32.h5`; decimals are metrics."""
    stem = re.sub(r"(\.weights)?\.(keras|h5|hdf5|json)$", "", path.name)
    numbers = re.findall(r"[0-9]+", _DECIMALS.sub(" ", stem))
    return int(numbers[-1]) if numbers and len(numbers[-1]) <= _MOST_DIGITS else None


def parse_epochs(text: str) -> range:
    """Parse `A:B`, `A:B:STEP`, `A:`, `:B` or `A`, both ends included, into a range.

    Raises:
        UsageError: it is none of these.
    """
    match = _EPOCHS.match(text)
    if match is None or match.group(3) == "0":
        raise UsageError(f"--epochs {text!r}; expected A:B or A:B:STEP, such as 140:150 or 100:200:10")
    first, last, step, single = match.groups()
    if single is not None:
        return range(int(single), int(single) + 1)
    return range(int(first or 0), int(last) + 1 if last else 2**62, int(step or 1))


def expand(patterns: str | Path | Sequence[str | Path]) -> list[Location]:
    """Return the files that names, folders and shell patterns stand for, in training order.

    That is the natural order of the names. Of several folders it is the order of epochs, where every file has
    one of its own, by the index beside it or its name: one run may have gone on in another folder.

    A folder stands for what its index names, in training order; with no pattern, the current folder does. A
    URL may be a pattern, too, or with a `/` at its end a folder.

    Raises:
        SystemRefusalError: the service that a URL names did not answer or refused.
        UnreadableError: a name that is no pattern does not exist, a folder has no index, or the index names a
            file that is missing.
        UsageError: a pattern matches nothing, or nothing was named and there is no index.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns:
        if not Path(INDEX_NAME).exists():
            example = "swa-avg 'ckpt_*.keras' -o swa.keras"
            raise UsageError(f"no checkpoints named, and no {INDEX_NAME} here; such as: {example}")
        return _indexed(Path())
    named: list[Location] = []
    for pattern in patterns:
        found = matches(str(pattern)) if glob.has_magic(str(pattern)) else [location(pattern)]
        if not found:
            raise UsageError(f"no file matches {str(pattern)!r}")
        for path in found:
            identity(path)  # it exists
        named.extend(found)
    if len(named) == 1 and named[0].is_dir():
        return _indexed(named[0])
    paths = [file for path in named for file in (_indexed(path) if path.is_dir() else [path])]
    return _ordered(paths)


def _ordered(paths: Sequence[Location]) -> list[Location]:
    by_name = sorted(paths, key=lambda path: (natural_key(path), str(path)))
    if len({path.parent for path in by_name}) < 2:
        return by_name
    indexed = read_indices(by_name)
    positions = {position: path for path in by_name if (position := _position(path, indexed)) is not None}
    if len(positions) < len(by_name):  # several runs, or one that began to count anew: the names alone tell
        return by_name
    return [positions[position] for position in sorted(positions)]


def _indexed(folder: Location) -> list[Location]:
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        every = glob.escape(str(folder)).rstrip("/") + "/*"
        names = [path.name for path in matches(every)]
        suffix = next((suffix for suffix in _SUFFIXES for name in names if name.endswith(suffix)), ".keras")
        hint = f"name its checkpoints, such as '{every}{suffix}'"
        raise UnreadableError(folder, f"a folder without {INDEX_NAME}", hint=hint)
    entries = read_index(index_path).entries
    _check_one_run(index_path, entries)
    paths = [folder / entry.file for entry in entries]
    for path in paths:
        if not path.exists():
            hint = "name the checkpoints themselves, or restore it"
            raise UnreadableError(index_path, f"names {path.name}, which is not there", hint=hint)
    if not paths:
        raise UsageError(f"{index_path} names no checkpoints")
    return paths


def _check_one_run(index_path: Location, entries: Sequence[Entry]) -> None:
    """Raise UsageError if a checkpoint was saved before one of an earlier epoch: by another, longer run."""
    times = []
    for entry in entries:
        with contextlib.suppress(ValueError):
            times.append((datetime.fromisoformat(entry.time), entry.file))
    for (before, earlier), (after, later) in pairwise(times):
        if (before.tzinfo is None) == (after.tzinfo is None) and after < before:
            raise UsageError(
                f"{index_path} names {later}, which was saved before {earlier}: it is of an earlier run; "
                "name the checkpoints of one run"
            )


def read_indices(paths: Sequence[Location]) -> dict[Location, tuple[Index, Entry]]:
    """Return what the indices beside the files, if there are any, say of each.

    Raises:
        UnreadableError: an index is damaged.
    """
    known = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        if (folder / INDEX_NAME).exists():
            index = read_index(folder / INDEX_NAME)
            known.update({folder / entry.file: (index, entry) for entry in index.entries})
    return {path: known[path] for path in paths if path in known}


def _position(path: Location, indexed: Mapping[Location, tuple[Index, Entry]]) -> tuple[int, int] | None:
    """Return epoch and step: by the index, else by the last whole number in the name; None without one."""
    if path in indexed:
        return indexed[path][1].position
    number = epoch_number(path)
    return None if number is None else (number, -1)


def epochs_of(paths: Sequence[Location], purpose: str) -> list[int]:
    """Return each checkpoint's epoch: by the index beside it, else the last whole number in its name.

    Raises:
        UsageError: neither says it; `purpose` is the option that needs it.
    """
    indexed = read_indices(paths)
    epochs = []
    for path in paths:
        position = _position(path, indexed)
        if position is None:
            raise UsageError(
                f"{purpose} needs the epoch in an index or as a number in each name; {path.name} has none"
            )
        epochs.append(position[0])
    return epochs


def select(
    paths: Sequence[Location],
    *,
    epochs: str | None = None,
    best: int | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    last: int | None = None,
    every: int | None = None,
) -> list[Location]:
    """Choose among files in training order, and keep that order.

    By epoch, then the best N by a metric of the index, then the last N, then every K-th counted from the end.

    Raises:
        MismatchError: two names lead to one file.
        UnreadableError: an index is damaged.
        UsageError: what to select by is not known of a file, or nothing is left.
    """
    _check_distinct(paths)
    chosen = list(paths)
    for option, number in (("--best", best), ("--last", last), ("--every", every)):
        if number is not None and not (isinstance(number, Integral) and number >= 1):
            raise UsageError(f"{option} is {number!r}; expected 1 or more")
    if mode not in (None, *MODES):
        raise UsageError(f"mode is {' or '.join(MODES)}, not {mode!r}")
    if best is None and (monitor is not None or mode is not None):
        raise UsageError("--monitor and --mode go with --best")
    if epochs is not None:
        wanted, known = parse_epochs(epochs), epochs_of(chosen, "--epochs")
        chosen = [path for path, epoch in zip(chosen, known, strict=True) if epoch in wanted]
        if not chosen:
            there = sorted(set(known))
            shown = ", ".join(map(str, there)) if len(there) < 6 else f"{there[0]} to {there[-1]}"
            raise UsageError(f"--epochs {epochs}: none of the checkpoints; their epochs are {shown}")
    if best is not None:
        chosen = _best(chosen, best, monitor, mode)
    if last is not None:
        if last > len(chosen):
            raise UsageError(f"--last {last}, but found only {counted(len(chosen), 'checkpoint')}")
        chosen = chosen[-last:]
    if every is not None:
        chosen = chosen[::-1][::every][::-1]
    return chosen


def _best(paths: Sequence[Location], count: int, monitor: str | None, mode: str | None) -> list[Location]:
    """Return the best `count` files by a metric, in training order; of equals the newer."""
    indexed = read_indices(paths)
    missing = [path.name for path in paths if path not in indexed]
    if missing:
        raise UsageError(f"--best goes by the metrics in {INDEX_NAME}, which does not name {missing[0]}")
    if count > len(paths):
        raise UsageError(f"--best {count}, but found only {counted(len(paths), 'checkpoint')}")
    values = []
    for path in paths:
        index, entry = indexed[path]
        name = monitor or index.monitor
        there = ", ".join(entry.metrics) or "none"
        if name is None:
            raise UsageError(f"--best needs --monitor NAME, a metric in the index: {there}")
        if name not in entry.metrics:
            raise UsageError(f"{path.name} has no metric {name!r} in the index, but {there}")
        better = mode or (index.mode if name == index.monitor else None) or direction(None, name)
        value = entry.metrics[name]
        values.append(math.inf if math.isnan(value) else -value if better == "max" else value)
    ranked = sorted(range(len(paths)), key=lambda position: (values[position], -position))
    return [paths[position] for position in sorted(ranked[:count])]


def _check_distinct(paths: Sequence[Location]) -> None:
    seen: dict[Hashable, Location] = {}
    findings = []
    for path in paths:
        first = seen.setdefault(identity(path), path)
        if first is not path:
            findings.append(Finding(path, "file", f"the same file as {first}; name it once"))
    if findings:
        raise MismatchError(findings)
