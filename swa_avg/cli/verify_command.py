"""`swa-avg verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.command import Command
from swa_avg.cli.options import RESOURCES, printing, values_of
from swa_avg.cli.terminal import say
from swa_avg.errors import MismatchError
from swa_avg.text import first_few

if TYPE_CHECKING:
    from swa_avg.verification import Verification

__all__ = ["verify"]

_INPUTS = click.Option(
    ["--inputs"],
    type=click.Path(),
    multiple=True,
    metavar="FOLDER",
    help="Where the inputs are; may be given several times.  [default: beside OUTPUT]",
)


@click.command(
    cls=Command,
    short_help="Derive an average again from its inputs, and compare.",
    params=[click.Argument(["output"], type=click.Path())],
    sections={
        "Which checkpoints": (_INPUTS,),
        "Output": printing(),
        "Resources": RESOURCES,
    },
    examples=(
        "swa-avg verify swa.keras",
        "swa-avg verify swa.keras --inputs run",
    ),
)
def verify(output: str, inputs: Sequence[str], as_json: bool, quiet: bool, **options: Any) -> None:
    """Derive OUTPUT again from the inputs that it names, and compare every tensor.

    What OUTPUT's own record says is not believed: coefficients are derived again from the method and the
    inputs, and inputs that have changed since are named. Statistics that a refresh of BatchNorm replaced
    cannot be derived without its data; they are counted apart. The exit code is 0 if everything else is
    equal; if not it is 4, and the tensors are named.
    """
    from swa_avg.verification import verify as run

    result = run(output, inputs, **values_of(RESOURCES, options))
    if as_json:
        import json

        click.echo(json.dumps(result.as_json()))
    if not result.equal:
        raise MismatchError(result.findings)
    if not quiet:
        say(_lines(result))


def _lines(result: Verification) -> list[str]:
    """Return what was proven, as text."""
    from swa_avg.text import counted

    lines = []
    if result.unchecked:
        shown = first_few(result.unchecked)
        lines.append(
            f"unchecked: whether these have changed since, as the record has no digest of them: {shown}"
        )
    equal = "equal"
    if result.digests:
        lines.append(f"held against the digests in the record alone: {first_few(result.digests)}")
        count = counted(len(result.digests), "statistic")
        equal = f"equal, but for {count} that a refresh replaced and that cannot be derived without its data"
    again = f"{counted(result.averaged, 'tensor')} averaged again"
    compared = f"{again}, {result.copied} compared with the newest input's"
    lines.append(f"{equal}: {result.output} is {_average(result)} ({compared})")
    return lines


def _average(result: Verification) -> str:
    count = len(result.inputs)
    if count == 1:
        return result.inputs[0].name
    if result.method is not None:
        return f"the {result.method} average of {count} checkpoints"
    coefficients = first_few([f"{entry.coefficient:.6g}" for entry in result.record.inputs])
    return f"the average of {count} checkpoints with the coefficients in its record ({coefficients})"
