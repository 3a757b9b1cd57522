"""What an inspection comes to, in words: the top of its page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from swa_avg.formats import suffix_of
from swa_avg.text import counted, ranges_text

if TYPE_CHECKING:
    from swa_avg.inspection.report import Contents, Inspection

__all__ = ["verdict"]

_NAMED = 5


def verdict(inspection: Inspection) -> tuple[list[str], list[str]]:
    """Return what these checkpoints are, whether they belong together, whether an average will help, a
    sentence each; and what to type next, if there is something."""
    checkpoints = inspection.checkpoints
    sentences = [_what(checkpoints)]
    if inspection.findings:
        return [*sentences, "They cannot be averaged: what does not fit is listed below."], []
    if len(checkpoints) == 1:
        return [*sentences, "Of one checkpoint there is nothing to average: name several of its run."], []
    if inspection.geometry is None:
        return [*sentences, "They fit together; how far apart they lie cannot be measured."], []
    groups = inspection.groups
    if len(groups) > 1:
        sentences.append(
            f"They do not belong together: they are of {len(groups)} groups that are unrelated, as if of "
            f"{len(groups)} runs. An average of all is meaningless; average a group by itself."
        )
        largest = groups[0]
        return sentences, [_average(largest, inspection)] if len(largest) > 1 else []
    sentences.append("They belong together: their weights are related, as those of one run are.")
    if inspection.movement is not None:
        sentences.append(f"Will an average help? Their {inspection.movement}.")
    else:
        sentences.append("Will an average help? From so few, their steps do not tell: score it.")
    if checkpoints[-1].batchnorm_layers:
        sentences.append("The model has BatchNorm: refresh its statistics on training data, or it may fail.")
    sentences.append("Whether it does help, validation data tell: the second command scores it.")
    sweep = f"swa-avg sweep {_named(checkpoints)} --val VALIDATION -o best{suffix_of(checkpoints[-1].path)}"
    refresh = " --bn-refresh DATA" if checkpoints[-1].batchnorm_layers else ""
    return sentences, [_average(checkpoints, inspection), f"{sweep}{refresh}"]


def _what(checkpoints: Sequence[Contents]) -> str:
    newest = checkpoints[-1]
    epochs = [contents.epoch for contents in checkpoints if contents.epoch is not None]
    known = len(epochs) == len(checkpoints) and sorted(set(epochs)) == epochs
    of = f", of epoch{'s' if len(epochs) > 1 else ''} {ranges_text(epochs)}" if known else ""
    by = f" by {newest.writer}" if newest.writer else ""
    count = counted(len(checkpoints), "checkpoint")
    return f"{count}{of}: {newest.kind}{by}, {newest.parameters:,} parameters."


def _average(checkpoints: Sequence[Contents], inspection: Inspection) -> str:
    method = "" if inspection.method == "uniform" else f" --method {inspection.method}"
    refresh = " --bn-refresh DATA" if checkpoints[-1].batchnorm_layers else ""
    suffix = suffix_of(checkpoints[-1].path)
    return f"swa-avg {_named(checkpoints)}{method} -o swa{suffix}{refresh}"


def _named(checkpoints: Sequence[Contents]) -> str:
    """Return how to name the checkpoints again: each, if they are few."""
    if len(checkpoints) > _NAMED:
        return "CHECKPOINTS"
    return " ".join(shlex.quote(str(contents.path)) for contents in checkpoints)
