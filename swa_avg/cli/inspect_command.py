"""`swa-avg inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.command import Command
from swa_avg.cli.options import (
    CHECKPOINTS,
    DTYPE,
    METHOD,
    METHOD_ROWS,
    SELECTION,
    overwrite,
    printing,
    values_of,
)
from swa_avg.cli.progress import Stage, progress_of
from swa_avg.cli.terminal import say
from swa_avg.errors import MismatchError
from swa_avg.text import counted, number_text

if TYPE_CHECKING:
    from swa_avg.inspection.report import Inspection

__all__ = ["inspect"]

_PICTURES = (
    click.Option(
        ["--plot"],
        type=click.Path(),
        metavar="OUT.png",
        help="Draw the pictures into this .png, .svg or .pdf.",
    ),
    click.Option(
        ["--report"],
        type=click.Path(),
        metavar="OUT.html",
        help="Write a page with pictures and tables.",
    ),
    overwrite("picture or page"),
)


@click.command(
    cls=Command,
    short_help="Show what is in checkpoints, whether they fit, and how far apart they are.",
    params=[CHECKPOINTS],
    sections={
        "Which checkpoints": SELECTION,
        "How": (METHOD, DTYPE),
        "Output": (*_PICTURES, *printing("List every tensor, and all distances.")),
    },
    values={"Methods": METHOD_ROWS},
    examples=(
        "swa-avg inspect run",
        "swa-avg inspect ckpt_*.keras --last 10 --report run.html",
    ),
)
def inspect(checkpoints: Sequence[str], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Show what is in checkpoints, whether they fit together, and how far apart they are.

    CHECKPOINTS are named and chosen as for averaging. The average that --method stands for is described, too:
    its coefficients, and how far each checkpoint is from it. An outlier is a checkpoint that lies in another
    basin than the others; whether to leave it out is up to you.
    """
    from swa_avg.inspection.survey import inspect_checkpoints

    with progress_of(quiet, Stage("inspecting", "bytes")) as (progress,):
        inspection = inspect_checkpoints(
            checkpoints,
            **values_of(SELECTION, options),
            method=options["method"],
            dtype=options["dtype"],
            **values_of(_PICTURES, options),
            progress=progress,
        )
    if not quiet:
        say(_lines(inspection, verbose=verbose))
        say(f"wrote {options[kind]}" for kind in ("plot", "report") if options[kind] is not None)
    if as_json:
        import json

        click.echo(json.dumps(inspection.as_json()))
    if inspection.findings:
        raise MismatchError(inspection.findings)


def _lines(inspection: Inspection, *, verbose: bool) -> list[str]:
    from swa_avg.inspection import wording

    lines = [
        *_aligned(*wording.contents_table(inspection)),
        "",
        *_aligned(*wording.checkpoint_table(inspection)),
    ]
    geometry = inspection.geometry
    if geometry is not None and verbose:
        labels, axis = wording.epoch_labels(inspection)
        cells = [[number_text(value) for value in row] for row in geometry.distances.tolist()]
        rows = [[*row, label] for row, label in zip(cells, labels, strict=True)]
        lines += ["", f"distances, by {axis}", *_aligned([*labels, ""], rows)]
    if verbose:
        for title, names in inspection.treatments.items():
            lines += [
                "",
                f"{title}: {counted(len(names), 'tensor')}",
                *(f"  {name}" for name in names),
            ]
        layers = inspection.checkpoints[-1].batchnorm_layers
        lines += ["", f"BatchNorm layers: {', '.join(layers) or 'none'}"]
    sentences = wording.observations(inspection)
    sentences += [f"warning: {sentence}" for sentence in wording.warnings(inspection)]
    return [*lines, "", *sentences] if sentences else lines


def _aligned(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines: numbers to the right, the last column, names, to the left."""
    table = [headers, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headers) - 1)]
    return [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in table
    ]
