"""Results in words and tables of text: what the terminal and the page say alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from swa_avg.planning.policy import constants_warning
from swa_avg.text import first_few, listed_text, number_text, short_names, size_text

if TYPE_CHECKING:
    from swa_avg.inspection.report import Contents, Inspection

__all__ = [
    "checkpoint_table",
    "contents_table",
    "epoch_labels",
    "observations",
    "warnings",
]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headers and rows; the last column holds text, the others numbers."""

_FEW = 5


def contents_table(inspection: Inspection) -> Table:
    """Return what is inside; neighbours that hold the same share a row."""
    headers = (
        "tensors",
        "parameters",
        "types",
        "weights",
        "optimizer",
        "BatchNorm layers",
        "format",
        "writer",
        "checkpoints",
    )
    rows = []
    for _, group in groupby(zip(inspection.checkpoints, _names(inspection), strict=True), key=_sameness):
        (one, names), *others = group
        if others:
            names = f"{1 + len(others)}: {names} to {others[-1][1]}"
        average = ", an average" if one.is_average else ""
        rows.append(
            (
                f"{one.tensors:,}",
                f"{one.parameters:,}",
                ", ".join(one.dtypes) or "none",
                size_text(one.weight_bytes),
                f"{size_text(one.optimizer_bytes)} ({100 * one.optimizer_share:.0f} %)",
                str(len(one.batchnorm_layers)),
                one.kind,
                (one.writer or "not stated") + average,
                names,
            )
        )
    return headers, rows


def _names(inspection: Inspection) -> list[str]:
    """Return what to call each checkpoint: its file's name, with folders where names are the same."""
    return short_names([contents.path for contents in inspection.checkpoints])


def _sameness(named: tuple[Contents, str]) -> tuple[object, ...]:
    contents, _ = named
    return (
        contents.kind,
        contents.writer,
        contents.tensors,
        tuple(contents.dtypes.items()),
        contents.weight_bytes,
        contents.optimizer_bytes,
        len(contents.batchnorm_layers),
        contents.is_average,
    )


def checkpoint_table(inspection: Inspection) -> Table:
    """Return a row a checkpoint: its part in the average, and where it lies."""
    headers = ["epoch", "coefficient", "size", "checkpoint"]
    rows = [
        [
            "" if contents.epoch is None else str(contents.epoch),
            number_text(coefficient),
            size_text(contents.size),
            str(contents.path),
        ]
        for contents, coefficient in zip(inspection.checkpoints, inspection.coefficients, strict=True)
    ]
    ranking = inspection.listing.ranking
    if ranking is not None:
        headers.insert(1, ranking.monitor)
        for cells, contents in zip(rows, inspection.checkpoints, strict=True):
            cells.insert(1, number_text(contents.metrics[ranking.monitor], 6))
    geometry = inspection.geometry
    if geometry is None:
        return headers, rows
    headers[-1:-1] = ["norm", "step", "turn", "to average", "similarity"]
    measured = {row: number for number, row in enumerate(inspection.measured)}
    for row, cells in enumerate(rows):
        number = measured.get(row)
        values: list[str] = [""] * 5
        if number is not None:
            turn = geometry.turns[number - 1] if 0 < number <= len(geometry.turns) else math.nan
            values = [
                number_text(geometry.norms[number]),
                number_text(geometry.steps[number - 1]) if number else "",
                "" if math.isnan(turn) else f"{turn:.0f}°",
                number_text(geometry.to_mean[number]),
                f"{_nearest(inspection, number):.3f}",
            ]
        cells[-1:-1] = values
    return headers, rows


def epoch_labels(inspection: Inspection) -> tuple[list[str], str]:
    """Return what to call the measured checkpoints in a picture, and what these names are."""
    checkpoints = [inspection.checkpoints[row] for row in inspection.measured]
    epochs = [contents.epoch for contents in checkpoints]
    if None in epochs or len(set(epochs)) < len(epochs):
        return [str(row + 1) for row in inspection.measured], "checkpoint, in training order"
    return list(map(str, epochs)), "epoch"


def observations(inspection: Inspection) -> list[str]:
    """Return what can be said of all of them together, a sentence each."""
    sentences = [*inspection.listing.notes]
    if inspection.findings or len(inspection.checkpoints) > 1:
        sentences.append(str(inspection))
    geometry = inspection.geometry
    if geometry is None:
        return sentences
    names = _measured_names(inspection)
    pairs = _pairs(inspection)
    least, most = min(pairs), max(pairs)
    sentences.append(
        f"distances: {number_text(least[0])} ({least[1]}, {least[2]}) to {number_text(most[0])} "
        f"({most[1]}, {most[2]})"
    )
    sentences.append(
        f"the {inspection.method} average has norm {number_text(geometry.mean_norm)}, lies "
        f"{number_text(geometry.to_mean[-1])} from {names[-1]}, and is worth "
        f"{number_text(geometry.effective_count)} equally weighted checkpoints"
    )
    if len(geometry.groups) == 1:
        nearest = min(_nearest(inspection, number) for number in range(len(names)))
        sentences.append(
            f"all are related, as those of one run are (similarity to the nearest {nearest:.3f} or more)"
        )
    if inspection.movement is not None:
        sentences.append(str(inspection.movement))
    return sentences


def warnings(inspection: Inspection) -> list[str]:
    """Return what speaks against averaging them, a sentence each."""
    geometry = inspection.geometry
    names = _names(inspection)
    sentences = [
        f"{name} is itself an average that swa-avg wrote"
        for name, contents in zip(names, inspection.checkpoints, strict=True)
        if contents.is_average
    ]
    if inspection.other_weights is not None:
        sentences.append(inspection.other_weights)
    if inspection.constants:
        sentences.append(constants_warning(inspection.constants))
    if geometry is None:
        if len(inspection.measured) > 1:
            sentences.append("no distances: their squares do not fit into float64")
        return sentences
    equal = [f"{one} and {other}" for distance, one, other in _pairs(inspection) if distance == 0.0]
    if equal:
        sentences.append(f"the same weights under two names: {first_few(equal, _FEW, '; ')}")
    measured = _measured_names(inspection)
    groups = [[measured[row] for row in group] for group in geometry.groups if len(group) > 1]
    if not groups:
        sentences.append(
            f"no two of the {len(inspection.measured)} checkpoints are related (similarity below "
            f"{geometry.threshold:.2f}): each lies in a basin of its own, and an average is meaningless"
        )
    for row in geometry.outliers:
        sentences.append(
            f"outlier: {measured[row]} lies in another basin than the other checkpoints (similarity "
            f"{_nearest(inspection, row):.3f}, unrelated below {geometry.threshold:.2f}); an average with it "
            "is meaningless"
        )
    if len(groups) > 1:
        each = "; ".join(listed_text(group) for group in groups)
        sentences.append(
            f"{len(groups)} groups that are unrelated to each other, as if of {len(groups)} runs: {each}; "
            "average each by itself"
        )
    return sentences


def _pairs(inspection: Inspection) -> list[tuple[float, str, str]]:
    """Return the distance of each pair of measured checkpoints, with their names in training order."""
    assert inspection.geometry is not None
    names = _measured_names(inspection)
    distances = inspection.geometry.distances.tolist()
    return [(distances[i][j], names[i], names[j]) for j in range(len(names)) for i in range(j)]


def _measured_names(inspection: Inspection) -> list[str]:
    names = _names(inspection)
    return [names[row] for row in inspection.measured]


def _nearest(inspection: Inspection, number: int) -> float:
    """Return the largest similarity of a measured checkpoint to another one."""
    assert inspection.geometry is not None
    row: list[float] = inspection.geometry.similarities[number].tolist()
    return max(value for other, value in enumerate(row) if other != number)
