"""`swa-avg average`, the default command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.commands.options import Size, method_options, selection_options
from swa_avg.commands.terminal import progress_bar, say, size_text

if TYPE_CHECKING:
    from swa_avg.batchnorm.checkpoint import Refresh
    from swa_avg.run import Report

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
@click.option("--dtype", type=click.Choice(["bfloat16"]), help="What untagged 2-byte tensors hold.")
@click.option("--bn-refresh", metavar="DATA", help="Re-estimate BatchNorm statistics on these training data.")
@click.option(
    "--bn-input", multiple=True, metavar="KEY[=INPUT]", help="Which array of DATA, for which input."
)
@click.option("--bn-batch-size", type=click.IntRange(1), metavar="N", help="Rows a batch.  [default: 128]")
@click.option("--bn-samples", type=click.IntRange(1), metavar="N", help="Use N rows.  [default: all]")
@click.option(
    "--bn-estimator",
    type=click.Choice(["pooled", "batch-mean"]),
    default="pooled",
    show_default=True,
    help="All rows as one population, or the mean of the batches.",
)
@click.option("--bn-seed", type=int, default=0, metavar="N", help="Of the order of rows.  [default: 0]")
@click.option("--bn-preprocess", metavar="MODULE:FUNCTION", help="Applied to each batch.")
@click.option("--model", metavar="PATH", help="For weights alone: .keras, JSON config or MODULE:FUNCTION.")
@click.option(
    "--import", "imports", multiple=True, metavar="MODULE", help="Registers the model's own classes."
)
@click.option("--unsafe", is_flag=True, help="Load Lambda layers: run code that the checkpoint holds.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option(
    "--no-verify", is_flag=True, help="Do not check the inputs' checksums; reads only what is averaged."
)
@click.option(
    "--expect-sha256", type=click.Path(), metavar="FILE", help="Hold the inputs against a list by sha256sum."
)
@click.option("--max-memory", type=Size(), help="Stay under this much memory, such as 150M.")
@click.option(
    "--threads", type=click.IntRange(1, 64), metavar="N", help="Worker threads.  [default: cores, up to 4]"
)
@click.option("--cluster", metavar="ADDRESS", help="Let the workers of this Dask scheduler read and average.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="List every tensor.")
def average(
    checkpoints: Sequence[str],
    no_verify: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Average Keras checkpoints into one model, exactly, in bounded memory, without TensorFlow.

    CHECKPOINTS are .keras, .weights.h5, .h5 or .weights.json files of one training run, named or as quoted
    patterns. They are taken in natural order, ckpt_2 before ckpt_10. Without any, the checkpoints.json that
    CheckpointSaver left in the current folder says which.

    \b
    swa-avg ckpt_*.keras -o swa.keras
    swa-avg ckpt_*.keras -o swa.keras --last 10 --bn-refresh train.npz
    """
    from swa_avg.run import average as run

    refresh = _refresh(options)
    with (
        progress_bar(quiet, "averaging", in_bytes=True) as progress,
        progress_bar(quiet, "refreshing") as rows,
    ):
        report = run(
            checkpoints,
            verify=not no_verify,
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


def _refresh(options: dict[str, Any]) -> Refresh | None:
    """Take the options of a refresh out of `options`."""
    from swa_avg.batchnorm.checkpoint import Refresh

    taken = {
        field: options.pop(option)
        for option, field in (
            ("bn_refresh", "data"),
            ("bn_input", "inputs"),
            ("bn_batch_size", "batch_size"),
            ("bn_samples", "samples"),
            ("bn_estimator", "estimator"),
            ("bn_seed", "seed"),
            ("bn_preprocess", "preprocess"),
            ("model", "model"),
            ("imports", "imports"),
            ("unsafe", "unsafe"),
        )
    }
    return Refresh(**taken) if taken["data"] is not None else None


def _describe(report: Report, *, dry_run: bool, verbose: bool) -> None:
    """Tell on standard error what was done, or would be."""
    plan = report.plan
    lines = []
    if dry_run or verbose:
        lines.append(f"{'coefficient':>12}  checkpoint ({plan.inputs[-1].kind}, {report.method})")
        for checkpoint, coefficient in zip(plan.inputs, plan.coefficients, strict=True):
            lines.append(f"{coefficient:12.6g}  {checkpoint.path}")
        for title, tensors in _treatments(report).items():
            lines.append(f"{title}: {len(tensors)} tensors, {size_text(sum(t.nbytes for t in tensors))}")
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
        shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
        lines.append(
            f"warning: BatchNorm statistics are averaged, not re-estimated ({shown}); the model may be far "
            "worse than its weights: refresh them on training data with --bn-refresh DATA"
        )
    verb = "would write" if dry_run else "wrote"
    lines.append(f"{verb} {report.output}: the {report.method} average of {len(plan.inputs)} checkpoints")
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
