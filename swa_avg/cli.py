"""Options in, messages and exit codes out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem
from click_default_group import DefaultGroup

from swa_avg import __version__
from swa_avg.errors import MismatchError, SwaAvgError, SystemRefusalError, escape

if TYPE_CHECKING:
    from collections.abc import Callable

    from swa_avg.batchnorm.checkpoint import Refresh
    from swa_avg.run import Report

__all__ = ["main"]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class _Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of bytes: 200M, 1.5G, 200MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).upper().removesuffix("B").removesuffix("I")
        number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
        try:
            return int(float(number) * _UNITS[unit])
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a size; expected such as 200M or 1G", param, ctx)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas."""

    name = "w,w,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; expected such as 0.2,0.3,0.5", param, ctx)


class _Group(DefaultGroup):  # type: ignore[misc]
    """The commands; help and completion treat the default command's options as the program's own."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = self.commands[self.default_cmd_name]
        inner = click.Context(command, info_name=ctx.info_name)
        command.format_usage(inner, formatter)
        command.format_help_text(inner, formatter)
        command.format_options(inner, formatter)
        self.format_commands(ctx, formatter)
        self.format_epilog(ctx, formatter)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and not args:  # completing the first word: it may be a command
            return click.Group.parse_args(self, ctx, args)
        return list(super().parse_args(ctx, args))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        command = self.commands[self.default_cmd_name]
        inner = click.Context(command, info_name=ctx.info_name)
        if incomplete.startswith("-"):
            return list(command.shell_complete(inner, incomplete))
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="file")]


@click.group(cls=_Group, default="average", default_if_no_args=True)
@click.version_option(__version__)
def main_group() -> None:
    """Average Keras checkpoints."""


@click.command()
@click.argument("checkpoints", nargs=-1, type=click.Path())
@click.option(
    "-o", "--output", type=click.Path(), help="Where the average goes.  [default: swa + the inputs' suffix]"
)
@click.option("--epochs", metavar="A:B[:STEP]", help="Only these epochs, both ends included.")
@click.option("--best", type=int, metavar="N", help="Of these, the best N by a metric in checkpoints.json.")
@click.option("--monitor", metavar="NAME", help="That metric.  [default: the monitored one]")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of it is better.")
@click.option("--last", type=int, metavar="N", help="Of these, the last N.")
@click.option("--every", type=int, metavar="K", help="Of these, every K-th, counted back from the newest.")
@click.option(
    "--method",
    type=click.Choice(["uniform", "ema", "power-ema", "weights"]),
    default="uniform",
    show_default=True,
    help="How much each checkpoint counts.",
)
@click.option("--decay", type=float, metavar="F", help="For ema: what each step keeps, such as 0.9.")
@click.option("--sigma-rel", type=float, metavar="F", help="For power-ema: relative width, such as 0.1.")
@click.option(
    "--weights", type=_Numbers(), help="For weights: one number a checkpoint, in training order, sum 1."
)
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
@click.option("--max-memory", type=_Size(), help="Stay under this much memory, such as 150M.")
@click.option(
    "--threads", type=click.IntRange(1, 64), metavar="N", help="Worker threads.  [default: cores, up to 4]"
)
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
    with _progress(quiet, "averaging", in_bytes=True) as progress, _progress(quiet, "refreshing") as rows:
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
        click.echo(json.dumps(_as_json(report, options["dry_run"])))


main_group.add_command(average)


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


@contextlib.contextmanager
def _progress(
    quiet: bool, title: str, *, in_bytes: bool = False
) -> Iterator[Callable[[int | None, int], None] | None]:
    """Show a bar on a terminal, from the first time that there is progress."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = (
        (DownloadColumn(binary_units=True), TransferSpeedColumn())
        if in_bytes
        else (MofNCompleteColumn(), TextColumn("{task.speed:.0f} rows/s"))
    )
    columns = (TextColumn(title), BarColumn(), *amounts, TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)

    def advance(total: int | None, count: int) -> None:
        bar.start()
        bar.update(task, total=total, advance=count)

    try:
        yield advance
    finally:
        bar.stop()


def _describe(report: Report, *, dry_run: bool, verbose: bool) -> None:
    """Tell on standard error what was done, or would be."""
    plan = report.plan
    lines = []
    if dry_run or verbose:
        lines.append(f"{'coefficient':>12}  checkpoint ({plan.inputs[-1].kind}, {report.method})")
        for checkpoint, coefficient in zip(plan.inputs, plan.coefficients, strict=True):
            lines.append(f"{coefficient:12.6g}  {checkpoint.path}")
        for title, tensors in _treatments(report).items():
            lines.append(f"{title}: {len(tensors)} tensors, {_size(sum(t.nbytes for t in tensors))}")
            if verbose:
                lines.extend(f"  {tensor.name}  {tensor}" for tensor in tensors)
        lines.append(
            f"bytes to read: {_size(report.bytes_to_read)}; peak memory: about {_size(report.peak_memory)}"
        )
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
    for line in lines:
        click.echo(escape(line), err=True)


def _treatments(report: Report) -> dict[str, Sequence[Any]]:
    plan = report.plan
    return {
        "averaged": plan.averaged,
        "equal in all, copied": plan.compared,
        "copied from the newest": plan.copied,
        "left out": plan.dropped,
    }


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


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


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 usage, 3 to 5 by the error's class, 130 or 143 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_signal)
    try:
        main_group.main(prog_name="swa-avg", standalone_mode=False)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
        code = 0
    except SwaAvgError as error:
        lines = (
            [str(finding) for finding in error.findings]
            if isinstance(error, MismatchError)
            else [_message(error)]
        )
        for line in lines:
            click.echo(f"swa-avg: error: {escape(line)}", err=True)
        code = error.exit_code
    except click.UsageError as error:
        click.echo(f"swa-avg: error: {escape(error.format_message())} (see swa-avg --help)", err=True)
        code = 2
    except _SignalError as received:
        word = "interrupted" if received.number == signal.SIGINT else "terminated"
        click.echo(f"swa-avg: {word}; nothing was written", err=True)
        code = 128 + received.number
    except MemoryError:
        click.echo("swa-avg: error: out of memory; use fewer --threads, or --max-memory", err=True)
        code = 5
    except OSError as error:
        if error.filename is not None:
            raise
        # Standard output is full or closed; the average itself is written by now.
        click.echo(f"swa-avg: error: {error.strerror or error}", err=True)
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 5
    sys.exit(code)


class _SignalError(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that everything is cleaned up."""

    def __init__(self, number: int) -> None:
        self.number = number


def _raise_signal(number: int, frame: Any) -> NoReturn:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
    raise _SignalError(number)


def _message(error: SwaAvgError) -> str:
    if isinstance(error, SystemRefusalError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)
