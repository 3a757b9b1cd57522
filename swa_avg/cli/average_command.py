"""`swa-avg average`, the default command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.options import (
    cluster_option,
    method_options,
    refresh_options,
    resource_options,
    selection_options,
    take_refresh,
    verify_option,
)
from swa_avg.cli.terminal import batchnorm_warning, progress_bar, say

if TYPE_CHECKING:
    from swa_avg.averaging import Report

__all__ = ["average"]


@click.command()
@click.argument("checkpoints", nargs=-1, type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), help="Where the average goes.  [default: swa + the inputs' suffix]"
)
@selection_options
@method_options
@click.option(
    "--optimizer",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Copy the newest checkpoint's optimizer state, or leave it out.",
)
@click.option("--dtype", type=click.Choice(["bfloat16"]), help="Take untagged 2-byte values as this.")
@refresh_options
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@verify_option
@click.option(
    "--expect-sha256", type=click.Path(), metavar="FILE", help="Hold the inputs against a list by sha256sum."
)
@resource_options
@cluster_option
@click.option("--dry-run", is_flag=True, help="Show what would be done, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
def average(
    checkpoints: Sequence[str],
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Average Keras checkpoints into one model, exactly, in bounded memory, without TensorFlow.

    CHECKPOINTS are .keras, .weights.h5, .h5 or .weights.json files of one training run, named or as quoted
    patterns; URLs such as s3://bucket/ckpt_*.keras will do. They are taken in natural order, ckpt_2 before
    ckpt_10. Of a folder, by default the current one, the checkpoints.json that CheckpointSaver left in it
    says which.

    \b
    swa-avg run -o swa.keras
    swa-avg ckpt_*.keras -o swa.keras --last 10 --bn-refresh train.npz
    """
    from swa_avg.averaging import average as run

    refresh, _ = take_refresh(options, loads=False)
    with (
        progress_bar(quiet, "averaging", in_bytes=True) as progress,
        progress_bar(quiet, "refreshing") as rows,
    ):
        report = run(
            checkpoints,
            refresh=refresh,
            progress=progress,
            refresh_progress=rows,
            **options,
        )
    if not quiet:
        _describe(report, dry_run=options["dry_run"], verbose=verbose)
    if as_json:
        import json

        click.echo(json.dumps(_as_json(report, options["dry_run"])))


def _describe(report: Report, *, dry_run: bool, verbose: bool) -> None:
    """Tell on standard error what was done, or would be."""
    from swa_avg.files.location import any_remote
    from swa_avg.text import counted, size_text

    plan = report.plan
    lines = []
    if dry_run or verbose:
        lines.append(f"{'coefficient':>12}  checkpoint ({plan.inputs[-1].kind}, {report.method})")
        for checkpoint, coefficient in zip(plan.inputs, plan.coefficients, strict=True):
            lines.append(f"{coefficient:12.6g}  {checkpoint.path}")
        for title, tensors in _treatments(report).items():
            lines.append(
                f"{title}: {counted(len(tensors), 'tensor')}, {size_text(sum(t.nbytes for t in tensors))}"
            )
            if verbose:
                lines.extend(f"  {tensor.name}  {tensor}" for tensor in tensors)
        memory = size_text(report.peak_memory)
        lines.append(f"bytes to read: {size_text(report.bytes_to_read)}; peak memory: about {memory}")
    for checkpoint in plan.inputs:
        if checkpoint.is_average:
            lines.append(f"warning: {checkpoint.path} is itself an average that swa-avg wrote")
    layers = report.batchnorm_layers
    if report.refresh is not None:
        lines.extend(report.refresh.lines(verbose=verbose))
    elif layers:
        lines.append(batchnorm_warning(layers))
    if not report.verify and any_remote(checkpoint.path for checkpoint in plan.inputs):
        lines.append("of URLs only what is averaged is read, and no checksum checked; --verify does both")
    verb = "would write" if dry_run else "wrote"
    lines.append(
        f"{verb} {report.output}: the {report.method} average of {counted(len(plan.inputs), 'checkpoint')}"
    )
    say(lines)


def _treatments(report: Report) -> dict[str, Sequence[Any]]:
    plan = report.plan
    return {
        "averaged": plan.averaged,
        "equal in all, copied": plan.compared,
        "copied from the newest": plan.copied,
        "left out": plan.dropped,
    }


def _as_json(report: Report, dry_run: bool) -> dict[str, Any]:
    plan = report.plan
    return {
        "output": str(report.output),
        "written": not dry_run,
        "method": report.method,
        "format": plan.inputs[-1].kind,
        "verify": report.verify,
        "inputs": [
            {"path": str(c.path), "coefficient": coefficient}
            for c, coefficient in zip(plan.inputs, plan.coefficients, strict=True)
        ],
        "tensors": {
            title: [tensor.name for tensor in tensors] for title, tensors in _treatments(report).items()
        },
        "batchnorm_layers": report.batchnorm_layers,
        "refresh": None if report.refresh is None else report.refresh.as_json(),
        "bytes_to_read": report.bytes_to_read,
        "peak_memory": report.peak_memory,
    }
