"""Options that several commands take, and the types of their values. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["Numbers", "Size", "method_options", "selection_options"]

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


_SELECTION = (
    click.option("--epochs", metavar="A:B[:STEP]", help="Only these epochs, both ends included."),
    click.option(
        "--best", type=int, metavar="N", help="Of these, the best N by a metric in checkpoints.json."
    ),
    click.option("--monitor", metavar="NAME", help="That metric.  [default: the monitored one]"),
    click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of it is better."),
    click.option("--last", type=int, metavar="N", help="Of these, the last N."),
    click.option(
        "--every", type=int, metavar="K", help="Of these, every K-th, counted back from the newest."
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
    return _with(command, _SELECTION)


def method_options(command: Command) -> Command:
    """Add the options that say how much each checkpoint counts, named as `run.average` takes them."""
    return _with(command, _METHOD)


def _with(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):  # decorators apply from the last to the first
        command = option(command)
    return command
