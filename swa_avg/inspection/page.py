"""The pictures and the page of an inspection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from swa_avg.inspection import drawings, wording
from swa_avg.inspection.verdict import verdict
from swa_avg.pages import html, pictures
from swa_avg.text import __version__, number_text, size_text

if TYPE_CHECKING:
    from swa_avg.inspection.report import Inspection
    from swa_avg.pages.pictures import Axes

__all__ = ["page", "plot"]

_DISTANCES = (
    "Distances between all pairs of checkpoints, 0 on the diagonal. Those of one run grow away from it; dark "
    "blocks beside each other are runs apart."
)
_NEXT = (
    "What to type next (CHECKPOINTS: named and chosen as for this page; DATA: the inputs that the model was "
    "trained on; VALIDATION: other data, with their targets):"
)
_MOST_GROUPS = 3
_MOST_SERIES = 4


def plot(suffix: str) -> Callable[[Inspection], bytes]:
    """Return what draws an inspection's pictures into one file of this suffix."""

    def render(inspection: Inspection) -> bytes:
        draws = [draw for _, draw in _draws(inspection)]
        return pictures.save(draws or [_nothing], suffix)

    return render


def page(inspection: Inspection) -> bytes:
    """Return an inspection as one HTML page."""
    count = len(inspection.checkpoints)
    sections = [
        html.Section("Verdict", _verdict(inspection)),
        html.Section("At a glance", _glance(inspection)),
        html.Section("Inside", _inside(inspection)),
        html.Section("Checkpoints", _checkpoints(inspection)),
    ]
    drawn = [pictures.picture(caption, draw) for caption, draw in _draws(inspection)]
    if drawn:
        sections.insert(2, html.Section("Pictures", html.figure(drawn)))
    if inspection.findings:
        found = html.items(str(finding) for finding in inspection.findings)
        sections.insert(1, html.Section("What does not fit", found))
    title = f"{count} checkpoint{'s' if count > 1 else ''} inspected"
    first, last = inspection.checkpoints[0].path, inspection.checkpoints[-1].path
    lead = f"{first} to {last.name}" if count > 1 else str(first)
    return html.page(title, f"{lead} · swa-avg {__version__}", sections).encode()


def _verdict(inspection: Inspection) -> str:
    """Return what these are, whether they belong together, whether an average will help, and what to type."""
    sentences, commands = verdict(inspection)
    alerts = [html.paragraph(sentence, alert=True) for sentence in wording.warnings(inspection)]
    typed = [html.paragraph(_NEXT), *map(html.command, commands)] if commands else []
    return "\n".join([*map(html.paragraph, sentences), *alerts, *typed])


def _glance(inspection: Inspection) -> str:
    newest = inspection.checkpoints[-1]
    share = f"{100 * newest.optimizer_share:.0f} %"
    facts = [
        ("checkpoints", str(len(inspection.checkpoints)), "in training order"),
        ("parameters", f"{newest.parameters:,}", "values of the model's weights"),
        ("size of the newest", size_text(newest.size), "with the optimizer's state"),
        ("optimizer's share", share, "of that size; it is never averaged"),
        ("BatchNorm layers", str(len(newest.batchnorm_layers)), "whose statistics an average has to refresh"),
    ]
    if inspection.geometry is not None:
        effective = number_text(inspection.geometry.effective_count)
        facts.append(
            ("effective number", effective, "of equally weighted checkpoints that the average is worth")
        )
    return "\n".join([html.facts(facts), html.items(wording.observations(inspection))])


def _checkpoints(inspection: Inspection) -> str:
    headers, rows = wording.checkpoint_table(inspection)
    marked = [row for row, c in enumerate(inspection.checkpoints) if c in inspection.outliers]
    explained = html.paragraph(
        "Step: distance from the checkpoint before. Turn: angle between the step to a checkpoint and the "
        "next one, 90° in a random walk, 180° back and forth. Similarity: of the kernels to those of the "
        "most similar other checkpoint, 1 for equal ones, about 0 for unrelated ones. Distances, norms and "
        "angles are over all averaged values, BatchNorm's moving statistics among them."
    )
    return _table(headers, rows, marked=marked) + (explained if inspection.geometry is not None else "")


def _inside(inspection: Inspection) -> str:
    newest = inspection.checkpoints[-1]
    lists = [(f"Tensors that are {title}", names) for title, names in inspection.treatments.items()]
    lists.append(("BatchNorm layers", newest.batchnorm_layers))
    folded = [html.folded(f"{title}: {len(names)}", html.items(names)) for title, names in lists if names]
    return "\n".join([_table(*wording.contents_table(inspection)), *folded])


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[int] = ()) -> str:
    """Return a table with its last column, the names, first: a phone shows what the numbers are of."""
    headers, rows = [headers[-1], *headers[:-1]], [[row[-1], *row[:-1]] for row in rows]
    names = ("types", "format", "writer", "checkpoint", "checkpoints")
    text = [column for column, name in enumerate(headers) if name in names]
    return html.table(headers, rows, text_columns=text, marked=marked)


def _draws(inspection: Inspection) -> list[tuple[str, pictures.Draw]]:
    """Return a caption and a drawing for each picture that there is something to show in."""
    draws: list[tuple[str, pictures.Draw]] = []
    geometry = inspection.geometry
    if geometry is not None:
        labels, axis = wording.epoch_labels(inspection)
        caption = (
            f"The checkpoints, by {axis}, in the plane of their two main directions, to scale; colours grow "
            f"stronger as training goes on, and the star is the {inspection.method} average. A line is a run "
            "that still moves; a cloud with the star in its middle is one that circles."
        )
        draws.append((caption, drawings.trajectory(geometry, labels, f"{inspection.method} average")))
        draws.append((_DISTANCES, drawings.distance_matrix(geometry, labels, axis)))
    return draws + _training(inspection)


def _training(inspection: Inspection) -> list[tuple[str, pictures.Draw]]:
    """Return the pictures of the training: metrics, those of one kind together, and learning rates."""
    known = [contents for contents in inspection.checkpoints if contents.epoch is not None]
    epochs = [float(contents.epoch or 0) for contents in known]
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for contents in known for name in contents.metrics):
        if name in ("learning_rate", "lr"):  # Keras logs it too; it has a picture of its own
            continue
        groups.setdefault(name.removeprefix("val_"), []).append(name)
    draws = []
    for title, names in list(groups.items())[:_MOST_GROUPS]:
        values = {name: [c.metrics.get(name, np.nan) for c in known] for name in names[:_MOST_SERIES]}
        large = pictures.undrawn(value for series in values.values() for value in series)
        found = (listed.sources.get(name) for name in values for listed in inspection.listing.files)
        sources = " and ".join(dict.fromkeys(filter(None, found)))
        caption = f"{' and '.join(values)} by epoch, from {sources}.{large}"
        draws.append((caption, pictures.lines(title, "epoch", title, epochs, values)))
    rates = [np.nan if c.learning_rate is None else c.learning_rate for c in known]
    if np.isfinite(rates).any():
        caption = "The learning rate in effect when each checkpoint was saved." + pictures.undrawn(rates)
        drawing = pictures.lines("Learning rate", "epoch", "learning rate", epochs, {"learning rate": rates})
        draws.append((caption, drawing))
    return draws


def _nothing(axes: Axes, theme: pictures.Theme) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing to draw: no distances, and no index", ha="center", color=theme.ink)
