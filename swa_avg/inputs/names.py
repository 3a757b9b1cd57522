"""What the names of checkpoints say: the names of a set are one template, filled in many times. Pure.

`ModelCheckpoint` fills in a format such as `weights.{epoch:02d}-{val_loss:.2f}.hdf5`. Read one by one, its
names are riddles (`ep03-acc63`, `f1=0.92_e7`, `03-1.35e+00`); read together, the fields are what differs, and
the epoch is the whole number that counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, permutations

from swa_avg.inputs.metrics import KNOWN

__all__ = ["Ambiguity", "NameReading", "read_names"]

# A minus is a sign only behind another separator: in `03-0.42` it separates, in `03--0.42` and `loss=-0.42`
# the second is a sign. Of three numbers joined by dots, as in `07.0.42`, the first stands alone.
_NUMBER = re.compile(
    r"(?:(?<=[-=_(])-)?"
    r"(?:[0-9]+(?=\.[0-9]+\.[0-9]+(?![0-9.]))|[0-9]+(?:\.[0-9]+)?(?:[eE][+-][0-9]{1,3})?"
    r"|(?<![A-Za-z])(?:nan|inf)(?![A-Za-z]))"
)
_SUFFIX = re.compile(r"(\.weights)?\.(keras|h5|hdf5|json|ckpt)$")
_UNIT = re.compile(r"[A-Za-z]+")
_SEPARATORS = " -_=.:,()[]{}"
_MOST_DIGITS = 18
_WIDE = 6  # digits that nobody gives to epochs or percentages

_EPOCH = re.compile(r"(^|[^a-z])(epochs?|epo|ep|e)$")
_STEP = re.compile(r"(^|[^a-z])(steps?|iters?|iterations?|batch(es)?|s|it)$")
_METRIC = re.compile(rf"({KNOWN}|score|map|val|lr|rate|pct|percent|metric|top[0-9]*)$")
_OWN_NAME = re.compile(rf"(?:^|[^a-z0-9])((?:val(?:idation|id)?[-_ ]*)?(?:{KNOWN}))$")
"""A label that ends with the well-known name of a metric, behind words that are no part of it."""
_NO_EPOCH = re.compile(r"(^|[^a-z])(folds?|seeds?|runs?|trials?|version|v|k|x|size|rank|worker|f)$")


@dataclass(frozen=True)
class NameReading:
    """What one name says."""

    epoch: int | None = None
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Label -> value. A decimal without a label is called `number`; of several that have one name, the first
    is `number1`."""


@dataclass(frozen=True)
class Ambiguity:
    """A set of names that can be read in two ways."""

    name: str
    """One of them."""
    epochs: tuple[int, int]
    """What its epoch is by either reading."""
    order_differs: bool
    """Whether the two readings put the names into different orders."""


@dataclass(frozen=True)
class _Field:
    """One place of a template, and what stands there in each name."""

    label: str
    texts: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return all(text.isdecimal() and len(text) <= _MOST_DIGITS for text in self.texts)

    @property
    def numbers(self) -> list[int]:
        return list(map(int, self.texts))


def read_names(names: Sequence[str]) -> tuple[list[NameReading], Ambiguity | None]:
    """Read the names of a set of checkpoints together, folders and suffixes apart.

    Names of one template differ in the template's fields alone, and what is the same in all of them
    (`resnet50`, `fold2`, `224x224`, `top5`) is no field. Decimals are metrics, and so are labelled numbers.
    Of the whole numbers the one that is labelled as the epoch is it; else, metrics and steps by their labels
    apart, the one that counts.

    Returns:
        A reading of each name, and where the epoch could be one of two fields, that.
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    stems = [_SUFFIX.sub("", name) for name in names]
    for position, stem in enumerate(stems):
        groups.setdefault(tuple(_NUMBER.split(stem)), []).append(position)
    readings = [NameReading()] * len(names)
    ambiguity = None
    for literals, positions in groups.items():
        columns = list(zip(*(_NUMBER.findall(stems[position]) for position in positions), strict=True))
        fields = _fields(literals, columns)
        epochs, step, doubt = _roles(fields, [names[position] for position in positions])
        ambiguity = ambiguity or doubt
        others = [one for one in fields if one not in (epochs, step) and not _NO_EPOCH.search(one.label)]
        metrics = _named([one for one in others if one.label or not one.is_whole])
        for row, position in enumerate(positions):
            readings[position] = NameReading(
                None if epochs is None else epochs.numbers[row],
                None if step is None else step.numbers[row],
                {name: float(one.texts[row]) for name, one in metrics.items()},
            )
    return readings, ambiguity


def _fields(literals: Sequence[str], columns: Sequence[tuple[str, ...]]) -> list[_Field]:
    """Return the places that differ from name to name; of a single name, all."""
    fields = []
    label = literals[0]
    for texts, literal in zip(columns, literals[1:], strict=True):
        if len(texts) > 1 and len(set(texts)) == 1:
            label += texts[0] + literal
            continue
        label = label.strip(_SEPARATORS)
        if not label and (unit := _UNIT.match(literal)):  # `60acc_3epochs`
            label, literal = unit[0], literal[unit.end() :]  # noqa: PLW2901
        fields.append(_Field(label.lower(), texts))
        label = literal
    return fields


def _named(fields: Sequence[_Field]) -> dict[str, _Field]:
    """Return the fields by what to call the metrics that they hold."""
    labels = []
    for one in fields:
        known = _OWN_NAME.search(one.label)
        labels.append(re.sub("[- ]+", "_", known[1]) if known else one.label or "number")
    numbers = [f"{labels[: place + 1].count(label)}" for place, label in enumerate(labels)]
    return {
        label + number if labels.count(label) > 1 else label: one
        for label, number, one in zip(labels, numbers, fields, strict=True)
    }


def _roles(
    fields: Sequence[_Field], names: Sequence[str]
) -> tuple[_Field | None, _Field | None, Ambiguity | None]:
    """Return the field of the epoch, that of the step, and what else the epoch could be."""
    whole = [one for one in fields if one.is_whole]
    step = next((one for one in whole if _STEP.search(one.label)), None)
    candidates = [one for one in whole if one is not step and not _NO_EPOCH.search(one.label)]
    for is_likely in (_is_labelled, _is_no_metric):
        candidates = list(filter(is_likely, candidates)) or candidates
    if len(names) == 1 or not candidates:
        return (candidates[-1] if candidates else step), step, None
    for coarse, fine in permutations([one for one in whole if one in candidates or one is step], 2):
        if _is_finer(fine, coarse):
            return coarse, fine, None
    for coarse, fine in combinations(candidates, 2):
        if _begins_again(fine, coarse):
            either = coarse.numbers[0], fine.numbers[0]
            return coarse, fine, Ambiguity(names[0], either, order_differs=True) if _counts(fine) else None
    candidates = list(filter(_differs, candidates)) or candidates
    first, last = candidates[0], candidates[-1]
    if first is last:
        return first, step, None
    orders = [sorted(range(len(names)), key=one.numbers.__getitem__) for one in (first, last)]
    counting = list(filter(_counts, candidates))
    if orders[0] != orders[1] and len(counting) == 1 and len(names) > 2:
        return counting[0], step, None
    return first, step, Ambiguity(names[0], (first.numbers[0], last.numbers[0]), orders[0] != orders[1])


def _is_labelled(one: _Field) -> bool:
    return _EPOCH.search(one.label) is not None


def _is_no_metric(one: _Field) -> bool:
    return _METRIC.search(one.label) is None


def _differs(one: _Field) -> bool:
    """Tell whether no two names have the same number."""
    return len(set(one.numbers)) == len(one.numbers)


def _counts(one: _Field) -> bool:
    """Tell whether the numbers, put in order, are equally far apart."""
    ordered = sorted(one.numbers)
    return len({after - before for before, after in pairwise(ordered)}) == 1


def _is_finer(steps: _Field, epochs: _Field) -> bool:
    """Tell whether one field counts within the other, as steps do in `ckpt_0003_00001500`."""
    rows = sorted(range(len(steps.numbers)), key=steps.numbers.__getitem__)
    ordered = [epochs.numbers[row] for row in rows]
    within = not _differs(epochs) or len(steps.texts[0]) >= max(_WIDE, 2 * len(epochs.texts[0]))
    return len(rows) > 1 and _differs(steps) and ordered == sorted(ordered) and within


def _begins_again(steps: _Field, epochs: _Field) -> bool:
    """Tell whether one field may count anew within each value of the other, as batches do in `m-02-0004`."""
    values = sorted(set(epochs.numbers))
    return (
        1 < len(values) < len(epochs.numbers)
        and values == list(range(values[0], values[-1] + 1))
        and len(set(zip(epochs.numbers, steps.numbers, strict=True))) == len(epochs.numbers)
    )
