"""Metrics: which one to go by, and which of its values are better."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from swa_avg.errors import UsageError

__all__ = ["KNOWN", "badness", "direction", "main_metric"]

_GREATER_ONES = (
    "acc|accuracy|auc|f1|f1_score|fmeasure|precision|recall|sensitivity|specificity|iou|miou|io_u|dice|bleu|rouge|"
    "psnr|ssim|r2|r2_score"
)
_LOWER_ONES = "loss|error|err|mse|mae|rmse|mape|msle|perplexity|ppl|wer|cer|fid"
KNOWN = f"{_GREATER_ONES}|{_LOWER_ONES}"
"""The well-known names of metrics, as a part of a regular expression."""
_ACCURACY = re.compile(r"(^|_)(acc|accuracy)(_|$)")
_GREATER = re.compile(rf"(^|_)({_GREATER_ONES})(_|$)")
_LOWER = re.compile(rf"(^|_)({_LOWER_ONES})$")
_VALIDATION = re.compile(r"^val_?")


def badness(value: float, mode: str) -> float:
    """Return a metric's value such that less is better, and NaN is worst: infinite.

    `mode` is `min` or `max`: which values of the metric are the better ones.
    """
    if math.isnan(value):
        return math.inf
    return -value if mode == "max" else value


def main_metric(names: Iterable[str]) -> str:
    """Return the first accuracy among the names of metrics, else `loss`."""
    return next((name for name in names if _ACCURACY.search(name)), "loss")


def direction(model: Any, monitor: str) -> str:
    """Return which values of a metric are better, `min` or `max`.

    The metric of that name that the Keras model was compiled with says so, or else the name itself.

    Raises:
        UsageError: neither does.
    """
    name = monitor.removeprefix("val_")
    for group in getattr(model, "metrics", []):
        for metric in getattr(group, "metrics", [group]):
            own = getattr(metric, "_direction", None)
            if metric.name == name and own is not None:
                return "max" if own == "up" else "min"
    name = _VALIDATION.sub("", monitor)  # in the names of files, `valacc` is one
    if _LOWER.search(name):
        return "min"
    if _GREATER.search(name):
        return "max"
    raise UsageError(f"monitor {monitor}: say which values are better, with mode min or max")
