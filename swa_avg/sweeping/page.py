"""The picture of a sweep: metrics on the line from the last checkpoint to the average."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swa_avg.pages import pictures

if TYPE_CHECKING:
    from swa_avg.pages.pictures import Axes
    from swa_avg.sweeping.report import SweepReport

__all__ = ["plot"]


def plot(report: SweepReport, suffix: str) -> bytes:
    """Draw the loss and the deciding metric along a report's line; `suffix` is .png, .svg or .pdf.

    As Izmailov et al. 2018 (arXiv:1803.05407), section 3.4, look at the loss between two solutions.
    """
    names = [name for name in ("loss", report.monitor) if name in report.path[0]]
    return pictures.save([_along(report, name) for name in dict.fromkeys(names)], suffix)


def _along(report: SweepReport, name: str) -> pictures.Draw:
    positions = [100.0 * point["at"] for point in report.path]
    curve = pictures.lines(name, "", name, positions, {name: [point[name] for point in report.path]})

    def draw(axes: Axes, theme: pictures.Theme) -> None:
        curve(axes, theme)
        axes.set_xlabel("from the last checkpoint (0 %) to the average (100 %)")
        axes.set_xticks(range(0, 101, 20))

    return draw
