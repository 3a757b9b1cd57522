"""`swa-avg sweep`."""

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
    METHOD_ROWS,
    METRICS,
    MODE,
    OPTIMIZER,
    POSITION,
    REFRESH,
    RESOURCES,
    UNRELATED,
    VERIFY,
    loading_of,
    output,
    overwrite,
    printing,
    refresh_of,
    values_of,
)
from swa_avg.cli.progress import Stage, progress_of
from swa_avg.cli.terminal import REFRESH_BY, say
from swa_avg.errors import NoImprovementError

if TYPE_CHECKING:
    from swa_avg.sweeping.report import SweepReport

__all__ = ["sweep"]

_VALIDATION = (
    click.Option(["--val"], metavar="DATA", required=True, help="Validation data: inputs and targets."),
    click.Option(
        ["--val-input"],
        multiple=True,
        metavar="KEY[=INPUT]",
        help="Which array of DATA goes to which input of the model.",
    ),
    click.Option(
        ["--val-target"],
        multiple=True,
        metavar="KEY[=OUTPUT]",
        help="Which array of DATA holds the targets.  [default: y, y_val or y_test]",
    ),
    click.Option(
        ["--val-batch-size"], type=click.IntRange(1), metavar="N", help="Rows per batch.  [default: 128]"
    ),
    click.Option(
        ["--val-samples"], type=click.IntRange(1), metavar="N", help="Use the first N rows.  [default: all]"
    ),
    click.Option(
        ["--val-preprocess"],
        metavar="MODULE:FUNCTION",
        help="A function to apply to the inputs of each batch.",
    ),
    click.Option(
        ["--metric"],
        metavar="MODULE:FUNCTION",
        help="A function of targets and predictions.  [default: the model's own metrics]",
    ),
    click.Option(
        ["--monitor"],
        metavar="NAME",
        help="Which of the model's metrics decides.  [default: accuracy or loss]",
    ),
    MODE,
)
_CANDIDATES = click.Option(
    ["--candidates"],
    multiple=True,
    metavar="NAME[:VALUE]",
    help="An average to try, as listed below; may be given several times.  [default: last:2, last:4, ..., "
    "uniform, power-ema of 0.05, 0.1 and 0.2, greedy]",
)
_IMPROVEMENT = click.Option(
    ["--require-improvement"],
    is_flag=True,
    help="Write only an average that beats every single checkpoint.",
)
_PATH = click.Option(
    ["--path"],
    type=click.Path(),
    metavar="OUT.png",
    help="Draw the metrics on the line from the last checkpoint to the best average.",
)
_REPORT = click.Option(
    ["--report"], type=click.Path(), metavar="OUT.html", help="Write a page with a verdict and the scores."
)


@click.command(
    cls=Command,
    short_help="Score averages on validation data, and write the best.",
    params=[CHECKPOINTS],
    sections={
        "Which checkpoints": POSITION,
        "Validation": _VALIDATION,
        "How": (_CANDIDATES, METRICS, _IMPROVEMENT, OPTIMIZER, DTYPE, UNRELATED),
        "BatchNorm": REFRESH,
        "Model": LOADING,
        "Output": (
            output("the best"),
            overwrite(),
            _PATH,
            _REPORT,
            *printing("List every single checkpoint, too."),
        ),
        "Checks": (VERIFY,),
        "Resources": (*RESOURCES, CLUSTER),
    },
    values={
        "Candidates": [
            ("last:K", "The mean of the last K checkpoints."),
            ("best:K", "The mean of the best K, by the metrics of the training, as --best K chooses them."),
            ("greedy", "The greedy soup: the best checkpoint, and each other one that does not hurt."),
            *METHOD_ROWS,
        ]
    },
    examples=(
        "swa-avg sweep run --val val.npz -o best.keras",
        "swa-avg sweep ckpt_*.keras --val val.npz --bn-refresh train.npz -o best.keras",
    ),
)
def sweep(checkpoints: Sequence[str], as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
    """Score single checkpoints and averages of them on validation data, and write the best.

    All candidates are treated alike: with --bn-refresh, the BatchNorm statistics of each one are
    re-estimated, those of single checkpoints included, so that the scores show what averaging does. What
    decides is --metric, or one of the model's own metrics; of equal scores, the average of the most
    checkpoints wins. The winner was chosen by its score, which therefore flatters it: report a score on data
    that played no part.
    """
    from swa_avg.sweeping.scoring import Validation
    from swa_avg.sweeping.search import sweep as run

    refresh = refresh_of(options, loads=True)
    validation = Validation(
        options["val"],
        inputs=options["val_input"],
        targets=options["val_target"],
        batch_size=options["val_batch_size"],
        samples=options["val_samples"],
        preprocess=options["val_preprocess"],
        metric=options["metric"],
        monitor=options["monitor"],
        mode=options["mode"],
    )
    stages = Stage("averaging", "bytes"), Stage("scoring", "candidates")
    try:
        with progress_of(quiet, *stages) as (progress, scores):
            report = run(
                checkpoints,
                options["output"],
                validation=validation,
                refresh=refresh,
                loading=loading_of(options),
                tried=options["candidates"],
                metrics=options["metrics"],
                **values_of(POSITION, options),
                optimizer=options["optimizer"],
                dtype=options["dtype"],
                allow_unrelated=options["allow_unrelated"],
                overwrite=options["overwrite"],
                verify=options["verify"],
                **values_of((*RESOURCES, CLUSTER), options),
                require_improvement=options["require_improvement"],
                path=options["path"],
                report=options["report"],
                progress=progress,
                score_progress=scores,
            )
    except NoImprovementError as error:
        _show(error.report, quiet=quiet, verbose=verbose, as_json=as_json)
        raise
    _show(report, quiet=quiet, verbose=verbose, as_json=as_json)


def _show(report: SweepReport, *, quiet: bool, verbose: bool, as_json: bool) -> None:
    if not quiet:
        say(_lines(report, verbose=verbose))
    if as_json:
        import json

        click.echo(json.dumps(report.as_json()))


def _lines(report: SweepReport, *, verbose: bool) -> list[str]:
    """Return the scores as text, single checkpoints first, then what was written."""
    from swa_avg.text import ranges_text

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
    lines.extend(report.notes)
    if report.movement is not None:
        lines.append(str(report.movement))
    if report.epochs:
        lines.append(f"power-ema and half-life count by the epochs {ranges_text(report.epochs)}")
    lines.extend(f"warning: {warning}" for warning in report.warnings_naming(REFRESH_BY))
    if report.path:
        lines.append("on the line from the last checkpoint to the best average:")
        lines.extend(
            f"{100 * point['at']:9.0f} %  " + "  ".join(f"{name} {point[name]:.6g}" for name in metrics)
            for point in report.path
        )
    if report.written:
        lines.append(str(report))
    return lines
