"""Options that several commands take, and the types of their values. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from swa_avg.batchnorm import Loading, Refresh

__all__ = [
    "Numbers",
    "Size",
    "cluster_option",
    "method_options",
    "place_options",
    "refresh_options",
    "resource_options",
    "selection_options",
    "take_refresh",
    "verify_option",
]

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}

Command = Callable[..., Any]


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of bytes: 200M, 1.5G, 200MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).upper().removesuffix("B").removesuffix("I")
        number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
        try:
            return int(float(number) * _UNITS[unit])
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a size; expected such as 200M or 1G", param, ctx)


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers separated by commas."""

    name = "w,w,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[float]:
        if isinstance(value, list):
            return value
        try:
            return [float(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; expected such as 0.2,0.3,0.5", param, ctx)


_EPOCHS = click.option("--epochs", metavar="A:B[:STEP]", help="Only these epochs, both ends included.")
_BY_METRIC = (
    click.option(
        "--best", type=int, metavar="N", help="Of these, the best N by a metric in checkpoints.json."
    ),
    click.option("--monitor", metavar="NAME", help="The metric of --best.  [default: the monitored one]"),
    click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of it is better."),
)
_BY_PLACE = (
    click.option("--last", type=int, metavar="N", help="Of these, the last N."),
    click.option(
        "--every", type=int, metavar="K", help="Of these, every K-th, counted back from the newest."
    ),
)
_REFRESH = (
    click.option(
        "--bn-refresh", metavar="DATA", help="Re-estimate BatchNorm statistics on these training data."
    ),
    click.option(
        "--bn-input", multiple=True, metavar="KEY[=INPUT]", help="Which array of DATA, for which input."
    ),
    click.option(
        "--bn-batch-size", type=click.IntRange(1), metavar="N", help="Rows a batch.  [default: 128]"
    ),
    click.option("--bn-samples", type=click.IntRange(1), metavar="N", help="Use N rows.  [default: all]"),
    click.option(
        "--bn-estimator",
        type=click.Choice(["pooled", "batch-mean"]),
        default="pooled",
        show_default=True,
        help="All rows as one population, or the mean of the batches.",
    ),
    click.option(
        "--bn-seed",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Of the order of rows, and of dropout.  [default: 0]",
    ),
    click.option("--bn-preprocess", metavar="MODULE:FUNCTION", help="Applied to each batch."),
    click.option(
        "--model", metavar="PATH", help="For weights alone: .keras, JSON config or MODULE:FUNCTION."
    ),
    click.option(
        "--import", "imports", multiple=True, metavar="MODULE", help="Registers the model's own classes."
    ),
    click.option("--unsafe", is_flag=True, help="Load Lambda layers: run code that the checkpoint holds."),
)
_LOADING = ("model", "imports", "unsafe")
_RESOURCES = (
    click.option("--max-memory", type=Size(), help="Stay under this much memory, such as 150M."),
    click.option(
        "--threads",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Worker threads.  [default: cores, up to 4; 10 for URLs]",
    ),
)
_METHOD = (
    click.option(
        "--method",
        type=click.Choice(["uniform", "ema", "power-ema", "weights"]),
        default="uniform",
        show_default=True,
        help="How much each checkpoint counts.",
    ),
    click.option("--decay", type=float, metavar="F", help="For ema: what each step keeps, such as 0.9."),
    click.option("--sigma-rel", type=float, metavar="F", help="For power-ema: relative width, such as 0.1."),
    click.option(
        "--weights", type=Numbers(), help="For weights: one number a checkpoint, in training order, sum 1."
    ),
)


def selection_options(command: Command) -> Command:
    """Add the options that choose among the checkpoints, named as `selection.select` takes them."""
    return _with(command, (_EPOCHS, *_BY_METRIC, *_BY_PLACE))


def place_options(command: Command) -> Command:
    """Add those that go by the checkpoints' places in training alone."""
    return _with(command, (_EPOCHS, *_BY_PLACE))


def refresh_options(command: Command) -> Command:
    """Add the options of a refresh and of loading the model; `take_refresh` reads them."""
    return _with(command, _REFRESH)


def resource_options(command: Command) -> Command:
    """Add the options that bound what the machine gives."""
    return _with(command, _RESOURCES)


def verify_option(command: Command) -> Command:
    """Add the option that says whether checksums are checked."""
    option = click.option(
        "--verify/--no-verify",
        default=None,
        help="Read every byte and check checksums, or only what is averaged.  "
        "[default: verify, but for URLs]",
    )
    return option(command)


def cluster_option(command: Command) -> Command:
    """Add the option that names a cluster."""
    option = click.option("--cluster", metavar="ADDRESS", help="Work on the workers of this Dask scheduler.")
    return option(command)


def take_refresh(options: dict[str, Any], *, loads: bool) -> tuple[Refresh | None, Loading]:
    """Take the options of a refresh out of `options`; the second value says how the model is loaded.

    `loads` says that the command loads the model without a refresh, too.
    """
    from swa_avg.batchnorm import Loading, Refresh

    if options["bn_refresh"] is None:
        context = click.get_current_context()
        for option in context.command.params:
            name = str(option.name)
            idle = name.startswith("bn_") or (name in _LOADING and not loads)
            if idle and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{option.opts[0]} goes with --bn-refresh")
    loading = {name: options.pop(name) for name in _LOADING}
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
        )
    }
    return Refresh(**taken, **loading) if taken["data"] is not None else None, Loading(**loading)


def method_options(command: Command) -> Command:
    """Add the options that say how much each checkpoint counts, named as `run.average` takes them."""
    return _with(command, _METHOD)


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):  # decorators apply from the last to the first
        command = option(command)
    return command
