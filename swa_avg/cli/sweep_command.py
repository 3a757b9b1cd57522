"""`swa-avg sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.options import (
    cluster_option,
    place_options,
    refresh_options,
    resource_options,
    take_refresh,
    verify_option,
)
from swa_avg.cli.terminal import batchnorm_warning, progress_bar, say
from swa_avg.errors import NoImprovementError
from swa_avg.interrupts import interrupts
from swa_avg.text import finite_or_none

if TYPE_CHECKING:
    from swa_avg.sweeping.search import SweepReport
    from swa_avg.sweeping.trials import Scored

__all__ = ["sweep"]


@click.command()
@click.argument("checkpoints", nargs=-1, type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), help="Where the best goes.  [default: swa + the inputs' suffix]"
)
@click.option("--val", metavar="DATA", required=True, help="Validation data: inputs and targets.")
@click.option("--val-input", multiple=True, metavar="KEY[=INPUT]", help="Which array of it, for which input.")
@click.option(
    "--val-target",
    multiple=True,
    metavar="KEY[=OUTPUT]",
    help="Which array holds the targets.  [default: y, y_val, y_test]",
)
@click.option("--val-batch-size", type=click.IntRange(1), metavar="N", help="Rows a batch.  [default: 128]")
@click.option(
    "--val-samples", type=click.IntRange(1), metavar="N", help="Use the first N rows.  [default: all]"
)
@click.option("--val-preprocess", metavar="MODULE:FUNCTION", help="Applied to the inputs of each batch.")
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="Of targets and predictions.  [default: the metrics that the model was compiled with]",
)
@click.option(
    "--monitor", metavar="NAME", help="Which compiled metric decides.  [default: accuracy, else loss]"
)
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of it is better.")
@click.option(
    "--candidates",
    multiple=True,
    metavar="NAME",
    help="An average to try, several times: last:K, uniform, ema:DECAY, power-ema:SIGMA, greedy.  "
    "[default: last:2, last:4, ..., uniform, power-ema of 0.05, 0.1 and 0.2, greedy]",
)
@click.option(
    "--require-improvement", is_flag=True, help="Write only an average that beats every single checkpoint."
)
@click.option(
    "--path",
    type=click.Path(),
    metavar="OUT.png",
    help="Draw the metrics on the line from the last checkpoint to the best average.",
)
@place_options
@click.option(
    "--optimizer",
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Copy the newest averaged checkpoint's optimizer state, or leave it out.",
)
@click.option("--dtype", type=click.Choice(["bfloat16"]), help="Take untagged 2-byte values as this.")
@refresh_options
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@verify_option
@resource_options
@cluster_option
@click.option("--json", "as_json", is_flag=True, help="Print every score as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="List every single checkpoint, too.")
def sweep(checkpoints: Sequence[str], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Score single checkpoints and averages of them on validation data, and write the best.

    Every candidate is treated alike: with --bn-refresh, each has its BatchNorm statistics re-estimated,
    single checkpoints too, so that the scores tell what averaging does. The model's own metrics decide, or
    --metric; of equal scores, the average of the most checkpoints wins. The winner's score is what it was
    chosen by: report one on data that played no part.

    \b
    swa-avg sweep ckpt_*.keras --val val.npz --bn-refresh train.npz -o swa.keras
    """
    from swa_avg.sweeping.scoring import Validation
    from swa_avg.sweeping.search import sweep as run

    refresh, loading = take_refresh(options, loads=True)
    validation = Validation(
        options.pop("val"),
        inputs=options.pop("val_input"),
        targets=options.pop("val_target"),
        batch_size=options.pop("val_batch_size"),
        samples=options.pop("val_samples"),
        preprocess=options.pop("val_preprocess"),
        metric=options.pop("metric"),
        monitor=options.pop("monitor"),
        mode=options.pop("mode"),
    )
    try:
        with (
            progress_bar(quiet, "averaging", in_bytes=True) as progress,
            progress_bar(quiet, "scoring", unit="candidates") as scores,
        ):
            report = run(
                checkpoints,
                validation=validation,
                refresh=refresh,
                loading=loading,
                tried=options.pop("candidates"),
                progress=progress,
                score_progress=scores,
                published=interrupts.ignore,
                **options,
            )
    except NoImprovementError as error:
        _show(error.report, written=False, quiet=quiet, verbose=verbose, as_json=as_json)
        raise
    _show(report, written=True, quiet=quiet, verbose=verbose, as_json=as_json)


def _show(report: SweepReport, *, written: bool, quiet: bool, verbose: bool, as_json: bool) -> None:
    if not quiet:
        say(_table(report, written=written, verbose=verbose))
    if as_json:
        import json

        click.echo(json.dumps(_as_json(report, written=written)))


def _table(report: SweepReport, *, written: bool, verbose: bool) -> list[str]:
    """Return the scores as text, single checkpoints first, then what was written."""
    metrics = list(dict.fromkeys([report.monitor, *(["loss"] if "loss" in report.winner.metrics else [])]))
    best = report.best_single
    lines = ["".join(f"{name[:12]:>12} " for name in metrics) + "checkpoints  candidate"]
    for scored in (*report.singles, *report.averages):
        notes = []
        if scored is report.singles[-1]:
            notes.append("last")
        if scored is best:
            notes.append("best single")
        if notes or verbose or scored not in report.singles:
            numbers = "".join(f"{scored.metrics[name]:12.6g} " for name in metrics)
            marks = f" ({', '.join(notes)})" if notes else ""
            winner = " <-" if scored.candidate == report.winner.candidate else ""
            lines.append(f"{numbers}{len(scored.candidate.used):11}  {scored.candidate.name}{marks}{winner}")
    if len(report.singles) > 2 and not verbose:
        lines.append(f"{len(report.singles)} single checkpoints were scored; --verbose lists them")
    if report.winner.refresh is not None:
        lines.extend(f"warning: {warning}" for warning in report.winner.refresh.warnings)
    elif report.batchnorm_layers and report.winner.candidate.is_average:
        lines.append(batchnorm_warning(report.batchnorm_layers))
    elif report.batchnorm_layers:
        lines.append("BatchNorm was not refreshed: averages may score far better with --bn-refresh DATA")
    if report.path:
        lines.append("on the line from the last checkpoint to the best average:")
        lines.extend(
            f"{100 * point['at']:9.0f} %  " + "  ".join(f"{name} {point[name]:.6g}" for name in metrics)
            for point in report.path
        )
    if written:
        lines.append(_outcome(report))
    return lines


def _outcome(report: SweepReport) -> str:
    from swa_avg.text import counted

    winner, best = report.winner, report.best_single
    score, alone = (f"{scored.metrics[report.monitor]:.6g}" for scored in (winner, best))
    rows = counted(report.rows, "row")
    what = f"wrote {report.output}: {winner.candidate.name}, {report.monitor} {score} on {rows}"
    if not winner.candidate.is_average:
        return f"{what}; no average is as good"
    verb = "beats" if report.improved else "equals"
    return f"{what}; it {verb} the best single checkpoint, {best.candidate.name} with {alone}"


def _as_json(report: SweepReport, *, written: bool) -> dict[str, Any]:
    return {
        "output": str(report.output),
        "written": written,
        "monitor": report.monitor,
        "mode": report.mode,
        "rows": report.rows,
        "checkpoints": [str(path) for path in report.checkpoints],
        "singles": [_scored_as_json(scored) for scored in report.singles],
        "averages": [_scored_as_json(scored) for scored in report.averages],
        "winner": report.winner.candidate.name,
        "best_single": report.best_single.candidate.name,
        "improved": report.improved,
        "batchnorm_layers": list(report.batchnorm_layers),
        "path": [_finite(point) for point in report.path],
    }


def _scored_as_json(scored: Scored) -> dict[str, Any]:
    return {
        "name": scored.candidate.name,
        "coefficients": list(scored.candidate.coefficients),
        "metrics": _finite(scored.metrics),
        "refresh": None if scored.refresh is None else scored.refresh.as_json(),
    }


def _finite(metrics: Any) -> dict[str, float | None]:
    """Return metrics as JSON has them: it knows no NaN."""
    return {name: finite_or_none(value) for name, value in metrics.items()}
