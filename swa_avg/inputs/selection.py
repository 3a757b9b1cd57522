"""Which of the listed checkpoints are averaged."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from numbers import Integral
from pathlib import Path

from swa_avg.errors import Finding, MismatchError, UsageError
from swa_avg.files.location import Location, identity
from swa_avg.inputs.index import MODES
from swa_avg.inputs.listing import Listed, Listing
from swa_avg.inputs.ranking import best_of, with_log
from swa_avg.text import counted

__all__ = ["Selection", "parse_epochs", "select"]

_EPOCHS = re.compile(r"([0-9]{1,18})?:([0-9]{1,18})?(?::([0-9]{1,18}))?$|([0-9]{1,18})$")


@dataclass(frozen=True)
class Selection:
    """Which checkpoints are wanted: by epoch, then the best, then the last, then every K-th from the end."""

    epochs: str | int | range | None = None
    """`A:B[:STEP]`, both ends included; a single epoch, or a range."""
    best: int | None = None
    monitor: str | None = None
    """The metric of `best`, where it is not clear."""
    mode: str | None = None
    """`min` or `max`: which of its values are better."""
    metrics: str | Path | None = None
    """The log of the training that holds it; see `with_log`."""
    last: int | None = None
    every: int | None = None

    def check(self) -> None:
        """Raise UsageError if it is none that any files could meet."""
        for name, number in (("best", self.best), ("last", self.last), ("every", self.every)):
            if number is not None and not (isinstance(number, Integral) and number >= 1):
                raise UsageError(f"{name} is {number!r}; expected 1 or more")
        if self.mode not in (None, *MODES):
            raise UsageError(f"mode is {' or '.join(MODES)}, not {self.mode!r}")
        if self.best is None and (self.monitor, self.mode, self.metrics) != (None, None, None):
            raise UsageError("monitor, mode and metrics go with best")


def parse_epochs(epochs: str | int | range) -> range:
    """Return `A:B`, `A:B:STEP`, `A:`, `:B` or `A`, both ends included, as a range; a range stays as it is.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(epochs, range):
        return epochs
    match = _EPOCHS.match(str(epochs))
    if match is None or match.group(3) == "0":
        raise UsageError(f"epochs {epochs!r}; expected A:B or A:B:STEP, such as 140:150 or 100:200:10")
    first, last, step, single = match.groups()
    if single is not None:
        return range(int(single), int(single) + 1)
    return range(int(first or 0), int(last) + 1 if last else 2**62, int(step or 1))


def select(listing: Listing, wanted: Selection) -> Listing:
    """Choose among listed checkpoints, and keep their order.

    Raises:
        MismatchError: two names lead to one file.
        UsageError: what to select by is not known of a file, nothing is left, or what is left are two runs.
    """
    _check_distinct(listing.paths)
    wanted.check()
    if wanted.best is not None:  # which epochs there are says from which number they count
        listing = with_log(listing, wanted.metrics)
    chosen = list(listing.files)
    if wanted.epochs is not None:
        numbers, known = parse_epochs(wanted.epochs), listing.epochs(f"epochs {wanted.epochs}")
        chosen = [listed for listed, epoch in zip(chosen, known, strict=True) if epoch in numbers]
        if not chosen:
            there = sorted(set(known))
            shown = ", ".join(map(str, there)) if len(there) < 6 else f"{there[0]} to {there[-1]}"
            raise UsageError(f"epochs {wanted.epochs}: none of the checkpoints; their epochs are {shown}")
    if wanted.best is not None:
        among = replace(listing, files=tuple(chosen))
        listing = best_of(among, wanted.best, wanted.monitor, wanted.mode)
        chosen = list(listing.files)
    if wanted.last is not None:
        listing.check_order("last")
        if wanted.last > len(chosen):
            raise UsageError(f"last is {wanted.last}, but found only {counted(len(chosen), 'checkpoint')}")
        chosen = chosen[-wanted.last :]
    if wanted.every is not None:
        listing.check_order("every")
        chosen = chosen[::-1][:: wanted.every][::-1]
    _check_one_run(chosen)
    return replace(listing, files=tuple(chosen))


def _check_one_run(chosen: Sequence[Listed]) -> None:
    """Raise UsageError if a checkpoint was saved before one of an earlier epoch: by another, longer run."""
    times = []
    for listed in chosen:
        with contextlib.suppress(ValueError):
            if listed.index is not None:
                times.append((datetime.fromisoformat(listed.time), listed))
    for (before, earlier), (after, later) in pairwise(times):
        comparable = (before.tzinfo is None) == (after.tzinfo is None) and earlier.index == later.index
        if comparable and after < before:
            raise UsageError(
                f"{later.index} names {later.path.name}, which was saved before {earlier.path.name}: it is "
                "of an earlier run; name the checkpoints of one run"
            )


def _check_distinct(paths: Sequence[Location]) -> None:
    seen: dict[Hashable, Location] = {}
    findings = []
    for path in paths:
        first = seen.setdefault(identity(path), path)
        if first is not path:
            findings.append(Finding(path, "file", f"the same file as {first}; name it once"))
    if findings:
        raise MismatchError(findings)
