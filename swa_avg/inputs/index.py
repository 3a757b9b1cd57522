"""`checkpoints.json`: what each checkpoint of a training run is, and how good."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from swa_avg.errors import SwaAvgError, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.names import is_plain_name
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source, refusal
from swa_avg.files.untrusted_json import parse_json
from swa_avg.inputs.metrics import badness

__all__ = [
    "INDEX_NAME",
    "MODES",
    "Entry",
    "Index",
    "index_as_json",
    "read_index",
]

INDEX_NAME = "checkpoints.json"
MODES = ("min", "max")

_VERSION = 1
_MAX_BYTES = 16 * 2**20
_MAX_NUMBER = 2**53  # beyond it, a JSON number is another number elsewhere
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no numbers for them


@dataclass(frozen=True)
class Entry:
    """One saved checkpoint."""

    file: str
    """Name of the file, in the folder of the index."""
    epoch: int
    """The 1-based number that `fit` prints."""
    step: int | None = None
    """Training steps since the start of training, where that is known."""
    learning_rate: float | None = None
    """In effect when the checkpoint was saved; None without an optimizer."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As Keras logged them; may hold NaN and infinities."""
    time: str = ""
    """When it was saved, ISO 8601 with the offset from UTC."""
    fingerprint: str = ""
    """Digest of the file as it was saved; empty where none was recorded."""

    @property
    def position(self) -> tuple[int, int]:
        """What identifies a checkpoint of a run, and orders them: epoch and step."""
        return self.epoch, self.step if self.step is not None else -1


@dataclass(frozen=True)
class Index:
    """The checkpoints of one folder, in training order."""

    entries: tuple[Entry, ...] = ()
    monitor: str | None = None
    """The metric that ranks them."""
    mode: str | None = None
    """`min` or `max`: which values of the monitored metric are the better ones."""
    averages: Mapping[str, str] = field(default_factory=dict)
    """Averages that a callback wrote beside the checkpoints: the fingerprint by the name of the file."""

    def with_entry(self, entry: Entry) -> Index:
        """Return the index with one more entry, in the place of any of the same file or position."""
        others = [e for e in self.entries if e.file != entry.file and e.position != entry.position]
        return replace(self, entries=tuple(sorted([*others, entry], key=lambda e: e.position)))

    def without(self, files: set[str]) -> Index:
        """Return the index without the entries of `files`."""
        return replace(self, entries=tuple(e for e in self.entries if e.file not in files))

    def best(self, count: int) -> tuple[Entry, ...]:
        """Return the best `count` entries by the monitored metric, in training order.

        The newer of two equals is the better one; NaN counts as infinitely bad, and an entry without the
        metric is worse than any that has it.
        """
        if self.monitor is None or self.mode is None:
            raise ValueError("the index monitors no metric")
        monitor, mode = self.monitor, self.mode
        newest_first = self.entries[::-1]
        ranked = sorted(
            newest_first,
            key=lambda e: (monitor not in e.metrics, badness(e.metrics.get(monitor, math.nan), mode)),
        )
        return tuple(sorted(ranked[:count], key=lambda e: e.position))

    def pruned(self, keep_last: int | None, keep_best: int | None, newest: Entry | None = None) -> Index:
        """Return the index with only the entries that `keep_last` or `keep_best` keeps; with neither, all.

        The last are counted back from `newest`: what comes after it was saved by an earlier, longer run, and
        stays. As long as no entry has the monitored metric, there is nothing to rank by, and `keep_best`
        keeps all.
        """
        if keep_last is None and keep_best is None:
            return self
        kept: list[Entry] = []
        if keep_last:
            done = [e for e in self.entries if newest is None or e.position <= newest.position]
            kept.extend([*done[-keep_last:], *self.entries[len(done) :]])
        if keep_best:
            ranked = any(self.monitor in e.metrics for e in self.entries)
            kept.extend(self.best(keep_best) if ranked else self.entries)
        return self.without({e.file for e in self.entries} - {e.file for e in kept})


def read_index(path: Location) -> Index:
    """Read the index at `path`; it comes from elsewhere and may hold anything.

    Raises:
        UnreadableError: it cannot be read, is no index, or one of another version.
    """
    try:
        with closing(open_source(path)) as source:
            if source.size > _MAX_BYTES:
                raise UnreadableError(path, f"the index is larger than {_MAX_BYTES >> 20} MiB")
            data = Region(source).read(0, source.size)
    except OSError as error:
        raise (error if isinstance(error, SwaAvgError) else refusal(path, error)) from error
    value = parse_json(data, path, "the index")
    try:
        return _index(value)
    except (TypeError, ValueError) as error:
        hint = "move this file away, and name the checkpoints"
        raise UnreadableError(path, f"not an index of checkpoints: {error}", hint=hint) from error


def index_as_json(index: Index) -> str:
    """Return the text of an index file."""
    value = {
        "version": _VERSION,
        "monitor": index.monitor,
        "mode": index.mode,
        "checkpoints": [_as_json(entry) for entry in index.entries],
        "averages": dict(index.averages),
    }
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def _as_json(entry: Entry) -> dict[str, Any]:
    return {
        "file": entry.file,
        "epoch": entry.epoch,
        "step": entry.step,
        "learning_rate": None if entry.learning_rate is None else _number_as_json(entry.learning_rate),
        "metrics": {name: _number_as_json(value) for name, value in entry.metrics.items()},
        "time": entry.time,
        "fingerprint": entry.fingerprint,
    }


def _number_as_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _index(value: dict[str, Any]) -> Index:
    version = value.get("version")
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"version {str(version)[:40]}; this release reads version {_VERSION}")
    checkpoints = value.get("checkpoints")
    if not isinstance(checkpoints, list):
        raise TypeError("`checkpoints` is not a list")
    entries = [_entry(item, f"checkpoint {number}") for number, item in enumerate(checkpoints, 1)]
    if len({e.file for e in entries}) < len(entries):
        raise ValueError("a file appears twice")
    monitor, mode = value.get("monitor"), value.get("mode")
    if monitor is not None and (not isinstance(monitor, str) or mode not in MODES):
        raise ValueError("`monitor` is not a name with a `mode` of min or max")
    averages = value.get("averages", {})
    if not isinstance(averages, dict) or not all(isinstance(text, str) for text in averages.values()):
        raise TypeError("`averages` does not give a text for each file")
    if not all(map(is_plain_name, averages)):
        raise ValueError("`averages` does not name files in this folder alone")
    ordered = tuple(sorted(entries, key=lambda e: e.position))
    return Index(ordered, monitor, mode if monitor is not None else None, averages)


def _entry(item: object, where: str) -> Entry:
    if not isinstance(item, dict):
        raise TypeError(f"{where} is not an object")
    name = item.get("file")
    if not isinstance(name, str) or not is_plain_name(name):
        raise ValueError(f"{where}: `file` is not the name of a file in this folder: {str(name)[:200]!r}")
    step, rate, metrics = item.get("step"), item.get("learning_rate"), item.get("metrics", {})
    if not isinstance(metrics, dict):
        raise TypeError(f"{where}: `metrics` is not an object")
    time = item.get("time", "")
    if not isinstance(time, str):
        raise TypeError(f"{where}: `time` is not a text")
    fingerprint = item.get("fingerprint", "")
    if not isinstance(fingerprint, str):
        raise TypeError(f"{where}: `fingerprint` is not a text")
    return Entry(
        name,
        _count(item.get("epoch"), f"{where}: `epoch`", least=1),
        None if step is None else _count(step, f"{where}: `step`", least=0),
        None if rate is None else _number(rate, f"{where}: `learning_rate`"),
        {key: _number(number, f"{where}: `metrics`: {key}") for key, number in metrics.items()},
        time,
        fingerprint,
    )


def _count(value: object, what: str, *, least: int) -> int:
    if type(value) is not int or not least <= value <= _MAX_NUMBER:
        raise ValueError(f"{what} is not a whole number of at least {least}")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is not a number")
    if abs(value) > sys.float_info.max or not math.isfinite(value):  # isfinite fails on huge integers
        raise ValueError(f"{what} is out of range")
    return float(value)
