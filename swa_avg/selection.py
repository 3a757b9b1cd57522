"""Which files, and in which order."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from swa_avg.errors import Finding, MismatchError, UnreadableError, UsageError

__all__ = ["epoch_number", "expand", "natural_key", "parse_epochs", "select"]

_DECIMALS = re.compile(r"(?<![\d.])\d+\.\d+")
_EPOCHS = re.compile(r"(\d+)?:(\d+)?(?::(\d+))?$|(\d+)$")


def natural_key(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key that puts ckpt_2 before ckpt_10."""
    parts = re.split(r"(\d+)", str(path))
    return [(1, int(part)) if part.isdecimal() and part.isascii() else (0, part) for part in parts]


def epoch_number(path: Path) -> int | None:
    """Return the last whole number in a file's name: 7 of `w.07-0.32.h5`; decimals are metrics."""
    stem = re.sub(r"(\.weights)?\.(keras|h5|hdf5|json)$", "", path.name)
    numbers = re.findall(r"[0-9]+", _DECIMALS.sub(" ", stem))
    return int(numbers[-1]) if numbers else None


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


def expand(patterns: Sequence[str | Path]) -> list[Path]:
    """Return the files that names and shell patterns stand for, in natural order.

    Raises:
        UnreadableError: a name that is no pattern does not exist.
        UsageError: nothing was named, or a pattern matches nothing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.exists() or path.is_symlink() or not glob.has_magic(str(pattern)):
            if not path.exists():
                raise UnreadableError(path, "no such file")
            paths.append(path)
            continue
        matches = [Path(match) for match in glob.glob(str(pattern))]  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not matches:
            raise UsageError(f"no file matches {str(pattern)!r}")
        paths.extend(matches)
    if not paths:
        raise UsageError("no checkpoints named; for example: swa-avg 'ckpt_*.keras' -o swa.keras")
    return sorted(paths, key=natural_key)


def select(
    paths: Sequence[Path], *, epochs: str | None = None, last: int | None = None, every: int | None = None
) -> list[Path]:
    """Choose among files in natural order: by epoch, then the last N, then every K-th counted from the end.

    Raises:
        MismatchError: two names lead to one file.
        UsageError: a file has no number to select by, or nothing is left.
    """
    _check_distinct(paths)
    chosen = list(paths)
    if epochs is not None:
        wanted = parse_epochs(epochs)
        for path in chosen:
            if epoch_number(path) is None:
                raise UsageError(f"--epochs needs a number in each name; {path.name} has none")
        chosen = [path for path in chosen if epoch_number(path) in wanted]
    for option, number in (("--last", last), ("--every", every)):
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}; expected 1 or more")
    if last is not None:
        if last > len(chosen):
            raise UsageError(f"--last {last}, but only {len(chosen)} checkpoints were found")
        chosen = chosen[-last:]
    if every is not None:
        chosen = chosen[::-1][::every][::-1]
    if not chosen:
        raise UsageError(f"none of the {len(paths)} checkpoints was selected")
    return chosen


def _check_distinct(paths: Sequence[Path]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    findings = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise UnreadableError(path, (error.strerror or str(error)).lower()) from error
        first = seen.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            findings.append(Finding(path, "file", f"the same file as {first}; name it once"))
    if findings:
        raise MismatchError(findings)
