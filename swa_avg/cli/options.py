"""The options of the commands, in groups, and the values that they make. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click import Option
from click.core import ParameterSource

from swa_avg.errors import UsageError
from swa_avg.planning.methods import METHODS

if TYPE_CHECKING:
    from swa_avg.batchnorm import Loading, Refresh

__all__ = [
    "CHECKPOINTS",
    "CLUSTER",
    "DTYPE",
    "LOADING",
    "METHOD",
    "METHOD_ROWS",
    "METRICS",
    "MODE",
    "OPTIMIZER",
    "POSITION",
    "REFRESH",
    "REPEATED",
    "RESOURCES",
    "SELECTION",
    "UNRELATED",
    "VERIFY",
    "loading_of",
    "output",
    "overwrite",
    "printing",
    "refresh_of",
    "values_of",
]


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.3 on
    """A number of bytes: 200M, 1.5G, 200MB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        from swa_avg.combine.budget import byte_count

        try:
            return byte_count(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


CHECKPOINTS = click.Argument(["checkpoints"], nargs=-1, type=click.Path())

# --- which checkpoints, named as `selection.select` takes them

MODE = Option(
    ["--mode"], type=click.Choice(["min", "max"]), help="Whether lower or higher values of it are better."
)
_EPOCHS = Option(["--epochs"], metavar="A:B[:STEP]", help="Only epochs A to B, both included.")
METRICS = Option(
    ["--metrics"],
    metavar="FILE.csv",
    help="Take the metrics from this log, as CSVLogger writes it.  [default: the one beside the checkpoints]",
)
_METRIC = (
    Option(
        ["--best"],
        type=int,
        metavar="N",
        help="The best N of these, by a metric in checkpoints.json, a CSVLogger's file or the names.",
    ),
    Option(["--monitor"], metavar="NAME", help="The metric for --best.  [default: the monitored one]"),
    MODE,
    METRICS,
)
_PLACE = (
    Option(["--last"], type=int, metavar="N", help="The last N of these."),
    Option(["--every"], type=int, metavar="K", help="Every K-th of these, counted back from the newest."),
)
POSITION = (_EPOCHS, *_PLACE)
"""What goes by the checkpoints' positions in training alone."""
SELECTION = (_EPOCHS, *_METRIC, *_PLACE)

# --- how

METHOD = Option(
    ["--method"],
    default="uniform",
    metavar="NAME[:VALUE]",
    help="How much each checkpoint counts; the methods are listed below.  [default: uniform]",
    shell_complete=lambda ctx, param, start: [name for name in METHODS if name.startswith(start)],
)
METHOD_ROWS = [(entry.spelling, entry.meaning) for entry in METHODS.values()]
"""How each method is written -> what it is."""
OPTIMIZER = Option(
    ["--optimizer"],
    type=click.Choice(["keep", "drop"]),
    default="keep",
    show_default=True,
    help="Copy the optimizer state of the newest averaged checkpoint, or leave it out.",
)
DTYPE = Option(["--dtype"], type=click.Choice(["bfloat16"]), help="The type of untagged 2-byte values.")

UNRELATED = Option(
    ["--allow-unrelated"], is_flag=True, help="Average unrelated runs, such as folds or seeds, all the same."
)

# --- BatchNorm and the model

_REFRESH_INPUT = Option(
    ["--bn-input"],
    multiple=True,
    metavar="KEY[=INPUT]",
    help="Which array of DATA goes to which input of the model.",
)
_REFRESH_PREPROCESS = Option(
    ["--bn-preprocess"], metavar="MODULE:FUNCTION", help="A function to apply to each batch."
)
REFRESH = (
    Option(["--bn-refresh"], metavar="DATA", help="Re-estimate BatchNorm statistics on this training data."),
    _REFRESH_INPUT,
    Option(["--bn-batch-size"], type=click.IntRange(1), metavar="N", help="Rows per batch.  [default: 128]"),
    Option(["--bn-samples"], type=click.IntRange(1), metavar="N", help="Use N rows.  [default: all]"),
    Option(
        ["--bn-estimator"],
        type=click.Choice(["pooled", "batch-mean"]),
        default="pooled",
        show_default=True,
        help="Take all rows as one population, or the mean over the batches.",
    ),
    Option(
        ["--bn-seed"],
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Seed of the order of rows and of dropout.  [default: 0]",
    ),
    _REFRESH_PREPROCESS,
)
REPEATED = (
    Option(
        ["--bn-refresh"],
        metavar="DATA",
        help="Derive the statistics of a refresh again from this data, with the settings in OUTPUT's record.",
    ),
    _REFRESH_INPUT,
    _REFRESH_PREPROCESS,
)
"""Of a refresh that is done again: the rest is recorded."""
LOADING = (
    Option(
        ["--model"],
        metavar="PATH",
        help="The model, if the checkpoints hold weights alone: a .keras, a JSON config or MODULE:FUNCTION.",
    ),
    Option(
        ["--import", "imports"],
        multiple=True,
        metavar="MODULE",
        help="Import this first; it registers the model's own classes.",
    ),
    Option(["--unsafe"], is_flag=True, help="Load Lambda layers, and so run code from the checkpoint."),
)

# --- checks and resources

VERIFY = Option(
    ["--verify/--no-verify"],
    default=None,
    help="Read every byte and check checksums, or read only what is averaged.  "
    "[default: --verify, except for URLs]",
)
RESOURCES = (
    Option(
        ["--threads"],
        type=click.IntRange(1, 64),
        metavar="N",
        help="Worker threads.  [default: one per core, up to 4; 10 for URLs]",
    ),
    Option(["--max-memory"], type=Size(), help="Use at most this much memory, such as 150M."),
)
CLUSTER = Option(["--cluster"], metavar="ADDRESS", help="Use the workers of this Dask scheduler.")


def output(what: str) -> Option:
    """Return the option that says where `what` goes."""
    text = f"Where to write {what}.  [default: swa + the inputs' suffix]"
    return Option(["-o", "--output"], type=click.Path(), help=text)


def overwrite(what: str = "output") -> Option:
    """Return the option that lets `what` be replaced."""
    return Option(["--overwrite"], is_flag=True, help=f"Replace an existing {what}.")


def printing(details: str | None = None) -> tuple[Option, ...]:
    """Return the options for what is printed; `details` is what `--verbose` adds."""
    options = [
        Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON to standard output."),
        Option(["-q", "--quiet"], is_flag=True, help="Print nothing but errors."),
    ]
    if details is not None:
        options.append(Option(["-v", "--verbose"], is_flag=True, help=details))
    return tuple(options)


def values_of(group: Sequence[Option], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> value of a group's options, out of those of a command."""
    return {str(option.name): options[str(option.name)] for option in group}


def loading_of(options: Mapping[str, Any]) -> Loading:
    """Return how the model is to be loaded."""
    from swa_avg.batchnorm import Loading

    return Loading(**values_of(LOADING, options))


def refresh_of(options: Mapping[str, Any], *, loads: bool = False) -> Refresh | None:
    """Return the refresh that is asked for, if any.

    `loads` says that the command loads the model without a refresh, too.

    Raises:
        click.UsageError: options are given that have no effect without a refresh.
    """
    if options["bn_refresh"] is not None:
        from swa_avg.batchnorm import Refresh

        settings = ("batch_size", "samples", "estimator", "seed")
        return Refresh(
            options["bn_refresh"],
            inputs=options["bn_input"],
            preprocess=options["bn_preprocess"],
            **{name: options[f"bn_{name}"] for name in settings if f"bn_{name}" in options},
            **values_of(LOADING, options),
        )
    context = click.get_current_context()
    for option in REFRESH if loads else (*REFRESH, *LOADING):
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} goes with --bn-refresh")
    return None
