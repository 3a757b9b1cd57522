"""The best checkpoints, by a metric of each: where it is found, which one decides, and what is better."""

from __future__ import annotations

import glob
import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace

from swa_avg.errors import SystemRefusalError, UnreadableError, UsageError
from swa_avg.files.location import Location, location, matches
from swa_avg.inputs.index import INDEX_NAME, Index
from swa_avg.inputs.listing import Listed, Listing, Ranking
from swa_avg.inputs.metrics import badness, direction
from swa_avg.inputs.training_log import TrainingLog, read_log
from swa_avg.text import counted, first_few

__all__ = ["best_of", "ranked", "with_log"]

_RATES = ("learning_rate", "lr")
"""What Keras logs beside the metrics."""
_UNNAMED = re.compile("number[0-9]*")
"""What `read_names` calls decimals that have no label."""
_SHOWN = 8


def with_log(listing: Listing, named: str | Location | None = None) -> Listing:
    """Return the listing with what the log of the training says of each epoch that one checkpoint is of.

    A log that is named goes before everything else. Without one, that is the only log beside the checkpoints,
    which goes before their names and fills in what an index does not say.

    Raises:
        UnreadableError: what was named is no log.
        UsageError: a log was named, and the names of the checkpoints can be read in two ways.
    """
    logs: dict[Location, TrainingLog] = {}
    if named is not None:
        listing.check_reading("metrics")
        logs = dict.fromkeys([listed.path.parent for listed in listing.files], read_log(location(named)))
    elif listing.ambiguity is None:
        for folder in dict.fromkeys(listed.path.parent for listed in listing.files):
            found = _logs_in(folder)
            if len(found) == 1:
                logs[folder] = found[0]
    alike = Counter(listed.epoch for listed in listing.files)
    # `fit` counts from 1 in names, and from 0 in logs; who names files from 0 does as the log does.
    first = 0 if alike[0] else 1
    files = []
    for listed in listing.files:
        log = logs.get(listed.path.parent)
        if log is not None and listed.epoch is not None and alike[listed.epoch] == 1:
            files.append(_logged(listed, log, listed.epoch - first, prefer=named is not None))
        else:
            files.append(listed)
    return replace(listing, files=tuple(files))


def _logs_in(folder: Location) -> list[TrainingLog]:
    """Return the logs that lie in a folder; other CSV files do not count."""
    logs = []
    with suppress(SystemRefusalError):  # not every service lists what it has
        for path in sorted(matches(glob.escape(str(folder)).rstrip("/") + "/*.csv"), key=str):
            with suppress(UnreadableError, SystemRefusalError):
                logs.append(read_log(path))
    return logs


def _logged(listed: Listed, log: TrainingLog, epoch: int, *, prefer: bool) -> Listed:
    metrics = dict(log.epochs.get(epoch, {}))
    rates = [metrics.pop(name) for name in _RATES if name in metrics]
    if listed.index is not None and not prefer:
        metrics = {name: value for name, value in metrics.items() if name not in listed.metrics}
    return replace(
        listed,
        metrics={**listed.metrics, **metrics},
        sources={**listed.sources, **dict.fromkeys(metrics, log.path.name)},
        learning_rate=rates[0] if rates and listed.learning_rate is None else listed.learning_rate,
    )


def best_of(listing: Listing, count: int, monitor: str | None = None, mode: str | None = None) -> Listing:
    """Return the best checkpoints by a metric, in training order; those without it are left out, with a note.

    Raises:
        UsageError: there are fewer, or as for `ranked`.
        UnreadableError: an index beside the files is damaged.
    """
    listing.check_indices()
    if count > len(listing.files):
        raise UsageError(f"best is {count}, but found only {counted(len(listing.files), 'checkpoint')}")
    ranking, order = ranked(listing, monitor, mode)
    notes = listing.notes
    lacking = [listed for row, listed in enumerate(listing.files) if row not in order]
    if lacking:
        of = f"{len(lacking)} of {len(listing.files)} have none, or NaN, such as {lacking[0].path.name}"
        having = f"{counted(len(order), 'checkpoint')} with the metric {ranking.monitor!r}; {of}"
        if count > len(order):
            raise UsageError(f"best is {count}, but found only {having}")
        notes = (*notes, f"the best {count} of {having}")
    files = tuple(listing.files[row] for row in sorted(order[:count]))
    return replace(listing, files=files, ranking=ranking, notes=notes)


def ranked(listing: Listing, monitor: str | None, mode: str | None) -> tuple[Ranking, list[int]]:
    """Return what ranks the checkpoints, and their rows, the best first; of equals, the newer first.

    It is the metric `monitor`, else the one that an index monitors, else the only one that is known. Those
    that have none, as with `validation_freq`, or NaN, have no place.

    Raises:
        UsageError: the metric must be named, or which of its values are better; or no checkpoint has it.
    """
    name = monitor or _monitor(listing)
    values = [listed.metrics.get(name, math.nan) for listed in listing.files]
    rows = [row for row, value in enumerate(values) if not math.isnan(value)]
    if not rows:
        there = dict.fromkeys(known for listed in listing.files for known in listed.metrics)
        if name in there:
            raise UsageError(f"the metric {name!r} is NaN in each of the checkpoints")
        has = f"{listing.files[0].path.name} has no metric {name!r}, but {', '.join(there) or 'none'}"
        raise UsageError(has)
    better = mode or _direction(listing, name)
    return Ranking(name, better), sorted(rows, key=lambda row: (badness(values[row], better), -row))


def _monitor(listing: Listing) -> str:
    """Return the metric that decides where none is named.

    Raises:
        UsageError: no metric is known, or several are.
    """
    monitored = {name for index in _indices(listing) if (name := index.monitor) is not None}
    known = dict.fromkeys(name for listed in listing.files for name in listed.metrics if name not in _RATES)
    choice = [*monitored] or [name for name in known if not _UNNAMED.fullmatch(name)] or [*known]
    if len(choice) == 1:
        return choice[0]
    if not choice:
        problem = f"best needs a metric in {INDEX_NAME}, in a log as CSVLogger writes it, or in the names"
    else:
        example = max(listing.files, key=lambda listed: len(listed.metrics))
        shown = [f"{name} ({value:g})" for name, value in example.metrics.items() if name in known]
        problem = f"best needs monitor, a metric of {example.path.name}: {first_few(shown, _SHOWN)}"
    for folder in dict.fromkeys(listed.path.parent for listed in listing.files):
        if len(logs := _logs_in(folder)) > 1:
            problem += f"; or name one of the logs with metrics: {first_few([str(log.path) for log in logs])}"
    raise UsageError(problem)


def _direction(listing: Listing, name: str) -> str:
    """Return which values of a metric are better, as an index or the name says.

    Raises:
        UsageError: neither does.
    """
    for index in _indices(listing):
        if index.monitor == name and index.mode is not None:
            return index.mode
    try:
        return direction(None, name)
    except UsageError as error:
        example = next(listed for listed in listing.files if name in listed.metrics)
        raise UsageError(f"{error}; {example.path.name} has {example.metrics[name]:g}") from None


def _indices(listing: Listing) -> list[Index]:
    """Return the indices that name one of the files."""
    paths = dict.fromkeys(listed.index for listed in listing.files if listed.index is not None)
    return [listing.indices[path] for path in paths]
