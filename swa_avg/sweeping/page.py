"""The page of a sweep, and its picture: metrics on the line from the last checkpoint to the average."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from swa_avg.pages import html, pictures
from swa_avg.text import __version__, counted, number_text

if TYPE_CHECKING:
    from swa_avg.pages.pictures import Axes
    from swa_avg.sweeping.report import SweepReport

__all__ = ["page", "plot"]

_SCORES = (
    "Each row is one model, scored on the validation data: single checkpoints first, in training order, then "
    "averages of them. The marked one was written. It was chosen by this score, which therefore flatters it."
)
_LINE = (
    "From the last checkpoint, at 0 %, to the best average, at 100 %: where the curve is flat or better on "
    "the way, they lie in one basin; where it has a barrier, averaging them means little."
)


def page(report: SweepReport) -> bytes:
    """Return what a sweep found as one HTML page, which begins with a verdict."""
    sections = [
        html.Section("Verdict", _verdict(report)),
        html.Section("Scores", _scores(report) + html.paragraph(_SCORES)),
    ]
    if report.path:
        drawn = [
            pictures.picture(f"{name.capitalize()}. {_LINE}", _along(report, name))
            for name in _path_metrics(report)
        ]
        sections.append(html.Section("Between the last checkpoint and the average", html.figure(drawn)))
    first, last = report.checkpoints[0], report.checkpoints[-1]
    lead = f"{first} to {last.name} · swa-avg {__version__}"
    return html.page(
        f"{counted(len(report.checkpoints), 'checkpoint')} and their averages scored", lead, sections
    ).encode()


def _verdict(report: SweepReport) -> str:
    """Return what was scored, whether an average helps, why, and what to type next."""
    better = "higher" if report.mode == "max" else "lower"
    what = (
        f"{counted(len(report.singles), 'checkpoint')} and {counted(len(report.averages), 'average')} of "
        f"them, by {report.monitor} ({better} is better) on {counted(report.rows, 'row')} of "
        f"{report.validation}."
    )
    helps = "An average helps here" if report.improved else "No average beats the best single checkpoint here"
    sentences = [what, f"{helps}: {report}."]
    if report.movement is not None:
        sentences.append(f"Their {report.movement}.")
    folders = dict.fromkeys(path.parent for path in report.checkpoints if path.parent != report.output.parent)
    inputs = [word for folder in folders for word in ("--inputs", shlex.quote(str(folder)))]
    alerts = [html.paragraph(warning, alert=True) for warning in report.warnings_naming("--bn-refresh DATA")]
    typed = [
        html.paragraph("What to type next, to see that the output is what its record says:"),
        html.command(" ".join(["swa-avg verify", shlex.quote(str(report.output)), *inputs])),
    ]
    return "\n".join([*map(html.paragraph, sentences), *alerts, *typed])


def _scores(report: SweepReport) -> str:
    scored = (*report.singles, *report.averages)
    names = list(dict.fromkeys([report.monitor, *report.winner.metrics]))
    rows = [
        [
            one.candidate.name,
            *(number_text(one.metrics.get(name), 6) for name in names),
            str(len(one.candidate.used)),
        ]
        for one in scored
    ]
    marked = [row for row, one in enumerate(scored) if one.candidate == report.winner.candidate]
    return html.table(["candidate", *names, "checkpoints"], rows, text_columns=[0], marked=marked)


def plot(report: SweepReport, suffix: str) -> bytes:
    """Draw the loss and the deciding metric along a report's line; `suffix` is .png, .svg or .pdf.

    As Izmailov et al. 2018 (arXiv:1803.05407), section 3.4, look at the loss between two solutions.
    """
    return pictures.save([_along(report, name) for name in _path_metrics(report)], suffix)


def _path_metrics(report: SweepReport) -> list[str]:
    return list(dict.fromkeys(name for name in ("loss", report.monitor) if name in report.path[0]))


def _along(report: SweepReport, name: str) -> pictures.Draw:
    positions = [100.0 * point["at"] for point in report.path]
    curve = pictures.lines(name, "", name, positions, {name: [point[name] for point in report.path]})

    def draw(axes: Axes, theme: pictures.Theme) -> None:
        curve(axes, theme)
        axes.set_xlabel("from the last checkpoint (0 %) to the average (100 %)")
        axes.set_xticks(range(0, 101, 20))

    return draw
