"""Which files are meant, in training order, and what is known of each before it is opened."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swa_avg.errors import SystemRefusalError, UnreadableError, UsageError
from swa_avg.files.location import Location, folder_itself, identity, location, matches
from swa_avg.formats import SUFFIXES, TENSORFLOW, TENSORFLOW_FILE, is_model_folder
from swa_avg.inputs.index import INDEX_NAME, Index, read_index
from swa_avg.inputs.names import Ambiguity, read_names
from swa_avg.text import finite_or_none

__all__ = ["Listed", "Listing", "Ranking", "list_again", "list_checkpoints"]

_OWN_NAME = "the file name"
"""The source of what the name of a checkpoint says."""


@dataclass(frozen=True)
class Listed:
    """One checkpoint, and what the index beside it or its name says of it."""

    path: Location
    epoch: int | None = None
    """The 1-based number that `fit` prints."""
    step: int | None = None
    learning_rate: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """May hold NaN and infinities."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Metric -> where its value was found: the name of a file that holds it, or `the file name`."""
    time: str = ""
    """When it was saved, ISO 8601; empty where no index says it."""
    index: Location | None = None
    """The index that says all this; of a file that none names, its name does."""

    @property
    def position(self) -> tuple[int, int]:
        """What orders the checkpoints of a run: epoch and step."""
        return -1 if self.epoch is None else self.epoch, -1 if self.step is None else self.step


@dataclass(frozen=True)
class Ranking:
    """What the best checkpoints were chosen by."""

    monitor: str
    """The metric."""
    mode: str
    """`min` or `max`: which of its values are better."""

    def as_json(self, files: Iterable[Listed]) -> dict[str, Any]:
        """Return it with the value of each file, and where that was found."""
        values = [
            {"value": finite_or_none(file.metrics[self.monitor]), "source": file.sources[self.monitor]}
            for file in files
        ]
        return {"monitor": self.monitor, "mode": self.mode, "values": values}


@dataclass(frozen=True)
class Listing:
    """Checkpoints in training order."""

    files: tuple[Listed, ...]
    indices: Mapping[Location, Index] = field(default_factory=dict)
    """Those that lie beside the files, by path."""
    damage: UnreadableError | None = None
    """What is wrong with an index beside files that were named themselves: it matters where it is asked."""
    ambiguity: Ambiguity | None = None
    """How else the epochs in the names could be read."""
    ranking: Ranking | None = None
    """Where these are the best of more."""
    notes: tuple[str, ...] = ()
    """What the user may not expect of the order."""

    @property
    def paths(self) -> list[Location]:
        return [listed.path for listed in self.files]

    def epochs(self, purpose: str) -> list[int]:
        """Return each checkpoint's epoch.

        Raises:
            UsageError: it is not known of one, or the names can be read in two ways; `purpose` needs it.
        """
        self.check_reading(purpose)
        unknown = next((listed for listed in self.files if listed.epoch is None), None)
        if unknown is not None:
            missing = f"{unknown.path.name} has none"
            raise UsageError(f"{purpose} needs the epoch in an index or as a number in each name; {missing}")
        return [listed.epoch for listed in self.files if listed.epoch is not None]

    def check_order(self, purpose: str) -> None:
        """Raise UsageError if the names can be read in two ways that put them into different orders."""
        if self.ambiguity is not None and self.ambiguity.order_differs:
            self.check_reading(purpose)

    def check_indices(self) -> None:
        """Raise UnreadableError if an index beside the files cannot be read."""
        if self.damage is not None:
            raise self.damage

    def check_reading(self, purpose: str) -> None:
        """Raise UsageError if the names can be read in two ways, UnreadableError if an index cannot be."""
        self.check_indices()
        if self.ambiguity is not None:
            name, (one, other) = self.ambiguity.name, self.ambiguity.epochs
            raise UsageError(
                f"{purpose}: the names can be read in two ways, by one of which {name} is of epoch {one}, by "
                f"the other of epoch {other}; mark the epoch in the names, as in ep{one:02d}"
            )


def list_checkpoints(patterns: str | Path | Sequence[str | Path]) -> Listing:
    """Return the files that names, folders and shell patterns stand for, in training order.

    That is the order of their epochs, where every file has one of its own, by the index beside it or by
    its name, as `read_names` reads it; else the natural order of the names, `ckpt_2` before `ckpt_10`. One
    run may lie in several folders.

    A folder stands for what its index names, in training order; with no pattern, the current folder does. A
    URL may be a pattern, too, or with a `/` at its end a folder.

    Raises:
        SystemRefusalError: the service that a URL names did not answer or refused.
        UnreadableError: a name that is no pattern does not exist, a folder has no index, an index is damaged
            or names a file that is missing.
        UsageError: a pattern matches nothing, or nothing was named and there is no index.
    """
    if isinstance(patterns, str | Path):
        patterns = [patterns]
    if not patterns:
        if not Path(INDEX_NAME).exists():
            example = "swa-avg 'ckpt_*.keras' -o swa.keras"
            raise UsageError(f"no checkpoints named, and no {INDEX_NAME} here; such as: {example}")
        return _described(_indexed(Path()))
    named: list[Location] = []
    for pattern in patterns:
        if not glob.has_magic(str(pattern)):
            named.append(_existing(location(pattern)))
            continue
        found = sorted(matches(str(pattern)), key=str)
        if not found:
            problem = f"no file matches {str(pattern)!r}"
            if matches(f"{pattern}.index"):
                problem += f"; TensorFlow checkpoints do, which are not read: {TENSORFLOW}"
            raise UsageError(problem)
        named.extend(map(_existing, found))
    if len(named) == 1:
        return _described(_files_of(named[0]))
    return _ordered(_described(_naturally(file for path in named for file in _files_of(path))))


def list_again(paths: Sequence[Location]) -> list[Listing]:
    """Return the ways in which files of one folder may once have been listed, with what is known of them.

    Names are read together: these alone, and together with what else is there of their kind, of which they
    may have been chosen. Where that makes no difference, there is one way.
    """
    wanted = set(paths)
    suffix = next((suffix for suffix in SUFFIXES if paths[0].name.endswith(suffix)), "")
    try:
        there = matches(glob.escape(str(paths[0].parent)).rstrip("/") + "/*" + suffix)
    except SystemRefusalError:  # not every service lists what it has
        there = []
    alone = _ordered(_described(_naturally(wanted)))
    among = _described(_naturally({*wanted, *there}))
    chosen = tuple(listed for listed in among.files if listed.path in wanted)
    among = _ordered(replace(among, files=chosen))
    return [alone] if among == alone else [alone, among]


def _files_of(path: Location) -> list[Location]:
    """Return what a name stands for: a file, a model in a folder, or what the index of a folder names."""
    if not path.is_dir():
        return [path]
    return [folder_itself(path)] if is_model_folder(path) else _indexed(path)


def _naturally(paths: Iterable[Location]) -> list[Location]:
    return sorted(paths, key=lambda path: (_natural_key(path), str(path)))


def _existing(path: Location) -> Location:
    """Return the path of what exists; errors as for `list_checkpoints`."""
    try:
        identity(path)
    except UnreadableError:
        if os.path.lexists(f"{path}.index"):
            raise UnreadableError(
                path, "a TensorFlow checkpoint, which is not read", hint=TENSORFLOW
            ) from None
        raise
    return path


def _described(paths: Sequence[Location]) -> Listing:
    """Return the files in this order, with what indices and names say of them."""
    indices, known, damage = {}, {}, None
    for folder in dict.fromkeys(path.parent for path in paths):
        index_path = folder / INDEX_NAME
        try:
            if not index_path.exists():
                continue
            index = indices[index_path] = read_index(index_path)
        except UnreadableError as error:
            damage = error
        except SystemRefusalError:  # it will refuse the checkpoints, too
            continue
        else:
            known.update({folder / entry.file: entry for entry in index.entries})
    unknown = [path for path in paths if path not in known]
    readings, ambiguity = read_names([path.name for path in unknown])
    read = dict(zip(unknown, readings, strict=True))
    files = []
    for path in paths:
        entry = known.get(path)
        if entry is None:
            reading = read[path]
            sources = dict.fromkeys(reading.metrics, _OWN_NAME)
            files.append(Listed(path, reading.epoch, reading.step, None, reading.metrics, sources))
            continue
        rate, metrics, sources = entry.learning_rate, entry.metrics, dict.fromkeys(entry.metrics, INDEX_NAME)
        index_path = path.parent / INDEX_NAME
        files.append(Listed(path, entry.epoch, entry.step, rate, metrics, sources, entry.time, index_path))
    return Listing(tuple(files), indices, damage, ambiguity)


def _ordered(listing: Listing) -> Listing:
    """Return the files in the order of epochs and steps, if each has a position of its own."""
    files = sorted(listing.files, key=lambda listed: listed.position)
    positions = [listed.position for listed in files]
    alone = len({listed.path for listed in files}) == len(set(positions))
    if any(listed.epoch is None for listed in files) or not alone:
        return listing  # several runs, or one that began to count anew: the names alone tell
    if listing.ambiguity is not None and listing.ambiguity.order_differs:
        return listing
    notes = listing.notes
    if files != list(listing.files) and len({listed.path.parent for listed in files}) == 1:
        first, last = files[0], files[-1]
        notes = (*notes, f"in the order of their epochs, {first.epoch} to {last.epoch}, not of their names")
    return replace(listing, files=tuple(files), notes=notes)


def _natural_key(path: Location) -> list[tuple[int, int, str]]:
    """Return a sort key that puts ckpt_2 before ckpt_10.

    Numbers go by their digits, not as integers, of which Python reads 4,300 digits at most.
    """
    parts = re.split(r"([0-9]+)", str(path))
    return [
        (1, len(part.lstrip("0")), part.lstrip("0")) if part.isdecimal() and part.isascii() else (0, 0, part)
        for part in parts
    ]


def _indexed(folder: Location) -> list[Location]:
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        every = glob.escape(str(folder)).rstrip("/") + "/*"
        names = [path.name for path in matches(every)]
        if "saved_model.pb" in names:
            hint = "load it in TensorFlow, and save its weights with model.save_weights to a .weights.h5"
            raise UnreadableError(folder, "a SavedModel, which is not read", hint=hint)
        models = [path for path in matches(every) if path.is_dir() and is_model_folder(path)]
        if models:
            raise UnreadableError(
                folder, f"a folder without {INDEX_NAME}", hint=f"name its models, such as '{every}/'"
            )
        if any(map(TENSORFLOW_FILE.search, names)) and not any(name.endswith(SUFFIXES) for name in names):
            raise UnreadableError(folder, "holds TensorFlow checkpoints, which are not read", hint=TENSORFLOW)
        suffix = next((suffix for suffix in SUFFIXES for name in names if name.endswith(suffix)), ".keras")
        hint = f"name its checkpoints, such as '{every}{suffix}'"
        raise UnreadableError(folder, f"a folder without {INDEX_NAME}", hint=hint)
    paths = [folder / entry.file for entry in read_index(index_path).entries]
    for path in paths:
        if not path.exists():
            hint = "name the checkpoints themselves, or restore it"
            raise UnreadableError(index_path, f"names {path.name}, which is not there", hint=hint)
    if not paths:
        raise UsageError(f"{index_path} names no checkpoints")
    return paths
