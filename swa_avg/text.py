"""Numbers, counts and this release as text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

__all__ = [
    "Progress",
    "__version__",
    "counted",
    "finite_or_none",
    "first_few",
    "listed_text",
    "number_text",
    "ranges_text",
    "short_names",
    "size_text",
]

__version__ = "0.1.0"

Progress = Callable[[int | None, int], None]
"""Told how much there is to do in all, where that is known, and how much was done since the last call."""


def size_text(count: float) -> str:
    """Return a number of bytes as text, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return `1 checkpoint`, `2 checkpoints`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def first_few(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def listed_text(names: Sequence[str], most: int = 5) -> str:
    """Return all names of a few checkpoints; of more, how many they are, the first two and the last."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{len(names)} checkpoints, {names[0]}, {names[1]} ... {names[-1]}"


def ranges_text(numbers: Sequence[int]) -> str:
    """Return whole numbers, those of three or more in a row as a range: `1, 2, 5 to 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def short_names(paths: Sequence[object]) -> list[str]:
    """Return the last part of each path; if two are the same, as many parts of all as tell them apart."""
    parts = [re.split(r"[/\\]", str(path)) for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(map(str, paths))


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it, which has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number with that many significant digits; nothing for one that is missing or NaN."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"
