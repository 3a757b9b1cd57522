"""`swa-avg average`, the default command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.command import Command
from swa_avg.cli.options import (
    CHECKPOINTS,
    CLUSTER,
    DTYPE,
    LOADING,
    METHOD,
    METHOD_ROWS,
    OPTIMIZER,
    REFRESH,
    RESOURCES,
    SELECTION,
    UNRELATED,
    VERIFY,
    output,
    overwrite,
    printing,
    refresh_of,
    values_of,
)
from swa_avg.cli.progress import Stage, progress_of
from swa_avg.cli.terminal import REFRESH_BY, say
from swa_avg.text import __version__

if TYPE_CHECKING:
    from swa_avg.averaging import Report
    from swa_avg.inputs.listing import Listing

__all__ = ["average"]

_DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="Show what would be done, and write nothing.")
_DIGESTS = click.Option(
    ["--expect-sha256"],
    type=click.Path(),
    metavar="FILE",
    help="Check the inputs against a list written by sha256sum.",
)


@click.command(
    cls=Command,
    short_help="Average checkpoints into one model.",
    params=[CHECKPOINTS],
    sections={
        "Which checkpoints": SELECTION,
        "How": (METHOD, OPTIMIZER, DTYPE, UNRELATED),
        "BatchNorm": (*REFRESH, *LOADING),
        "Output": (output("the average"), overwrite(), _DRY_RUN, *printing("List every tensor.")),
        "Checks": (VERIFY, _DIGESTS),
        "Resources": (*RESOURCES, CLUSTER),
    },
    values={"Methods": METHOD_ROWS},
    examples=(
        "swa-avg run --last 10 -o swa.keras",
        "swa-avg ckpt_*.keras -o swa.keras --bn-refresh train.npz",
    ),
)
@click.version_option(__version__)
def average(checkpoints: Sequence[str], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Average Keras checkpoints into one model: exactly, in bounded memory, without TensorFlow.

    CHECKPOINTS are the .keras, .weights.h5, .h5 or .weights.json files or model folders of one training run:
    names, quoted patterns, or URLs such as s3://bucket/ckpt_*.keras. Their order is the natural one, ckpt_2
    before ckpt_10. Any other folder, by default the current one, stands for the files that its
    checkpoints.json lists, as CheckpointSaver writes it.
    """
    from swa_avg.averaging import average as run

    refresh = refresh_of(options)
    stages = [Stage("averaging", "bytes"), *([] if refresh is None else [Stage("refreshing")])]
    with progress_of(quiet, *stages) as (progress, *rows):
        report = run(
            checkpoints,
            options["output"],
            **values_of(SELECTION, options),
            method=options["method"],
            optimizer=options["optimizer"],
            dtype=options["dtype"],
            allow_unrelated=options["allow_unrelated"],
            overwrite=options["overwrite"],
            verify=options["verify"],
            expect_sha256=options["expect_sha256"],
            **values_of((*RESOURCES, CLUSTER), options),
            refresh=refresh,
            dry_run=options["dry_run"],
            progress=progress,
            refresh_progress=rows[0] if rows else None,
        )
    if not quiet:
        say(_lines(report, verbose=verbose))
    if as_json:
        import json

        click.echo(json.dumps(report.as_json()))


def _lines(report: Report, *, verbose: bool) -> list[str]:
    """Return what was done, or would be, as text."""
    from swa_avg.files.location import any_remote
    from swa_avg.planning.methods import Method
    from swa_avg.text import counted, ranges_text, size_text

    plan = report.plan
    lines = []
    if verbose or not report.written:
        kind = plan.inputs[-1].kind
        column = _ranking_column(report.listing)
        lines.append(f"{'epoch':>5}  {'coefficient':>12}  {column[0]}checkpoint ({kind}, {report.method})")
        rows = zip(report.listing.files, plan.coefficients, column[1:], strict=True)
        for listed, coefficient, value in rows:
            epoch = "" if listed.epoch is None else str(listed.epoch)
            lines.append(f"{epoch:>5}  {coefficient:12.6g}  {value}{listed.path}")
        for title, tensors in report.treatments.items():
            lines.append(
                f"{title}: {counted(len(tensors), 'tensor')}, {size_text(sum(t.nbytes for t in tensors))}"
            )
            if verbose:
                lines.extend(f"  {tensor.name}  {tensor}" for tensor in tensors)
        if report.relation.related:
            lines.append(f"all are related: similarity to the nearest {report.relation.least:.3f} or more")
        memory = size_text(report.peak_memory)
        lines.append(f"bytes to read: {size_text(report.bytes_to_read)}; peak memory: about {memory}")
    lines.extend(report.listing.notes)
    if Method.parse(report.method).needs_times:
        epochs = [listed.epoch for listed in report.listing.files if listed.epoch is not None]
        lines.append(f"counted by their epochs, {ranges_text(epochs)}")
    if report.refresh is not None:
        lines.extend(report.refresh.lines(verbose=verbose))
    lines.extend(f"warning: {warning}" for warning in report.warnings_naming(REFRESH_BY))
    if not report.verify and any_remote(checkpoint.path for checkpoint in plan.inputs):
        lines.append("of URLs only what is averaged is read, and no checksum checked; --verify does both")
    return [*lines, str(report)]


def _ranking_column(listing: Listing) -> list[str]:
    """Return a column of what the best were chosen by, and where it was found; empty cells without that."""
    if listing.ranking is None:
        return [""] * (1 + len(listing.files))
    name = listing.ranking.monitor
    cells = [name, *(f"{listed.metrics[name]:.6g} ({listed.sources[name]})" for listed in listing.files)]
    width = max(map(len, cells))
    return [f"{cell:>{width}}  " for cell in cells]
