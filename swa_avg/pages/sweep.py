"""The picture of a sweep: metrics on the line from the last checkpoint to the average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swa_avg.pages import pictures

if TYPE_CHECKING:
    from swa_avg.sweep import SweepReport

__all__ = ["plot"]

_AXIS = "% of the way to the average"


def plot(report: SweepReport, suffix: str) -> bytes:
    """Draw the deciding metric and the loss at the points of a report's line, as Izmailov et al. 2018
    (arXiv:1803.05407), figure 3; `suffix` is .png, .svg or .pdf."""
    positions = [100.0 * point["at"] for point in report.path]
    names = [name for name in ("loss", report.monitor) if name in report.path[0]]
    draws = [
        pictures.lines(
            f"{name}, from the last", _AXIS, name, positions, {name: [point[name] for point in report.path]}
        )
        for name in dict.fromkeys(names)
    ]
    return pictures.save(draws, suffix)
