"""`swa-avg verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.command import Command
from swa_avg.cli.options import LOADING, REPEATED, RESOURCES, printing, refresh_of, values_of
from swa_avg.cli.progress import Stage, progress_of
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
        "BatchNorm": (*REPEATED, *LOADING),
        "Output": printing(),
        "Resources": RESOURCES,
    },
    examples=(
        "swa-avg verify swa.keras",
        "swa-avg verify swa.keras --inputs run --bn-refresh train.npz",
    ),
)
def verify(output: str, inputs: Sequence[str], as_json: bool, quiet: bool, **options: Any) -> None:
    """Derive OUTPUT again from the inputs that it names, and compare every tensor.

    What OUTPUT's own record says is not believed: coefficients are derived again from the method and the
    inputs, and inputs that have changed since are named. Statistics that a refresh of BatchNorm replaced
    cannot be derived without its data, --bn-refresh; they are counted apart. The exit code is 0 if everything
    else is equal; if not it is 4, and the tensors are named.
    """
    from swa_avg.verification import verify as run

    refresh = refresh_of(options)
    stages = [Stage("comparing", "bytes"), *([] if refresh is None else [Stage("refreshing")])]
    with progress_of(quiet, *stages) as (progress, *rows):
        result = run(
            output,
            inputs,
            refresh=refresh,
            **values_of(RESOURCES, options),
            progress=progress,
            refresh_progress=rows[0] if rows else None,
        )
    if as_json:
        import json

        click.echo(json.dumps(result.as_json()))
    if not result.equal:
        raise MismatchError(result.findings)
    if not quiet:
        say(_lines(result))


def _lines(result: Verification) -> list[str]:
    """Return what was proven, as text."""
    lines = []
    if result.unchecked:
        shown = first_few(result.unchecked)
        lines.append(
            f"unchecked: whether these have changed since, as the record has no digest of them: {shown}"
        )
    if result.averages:
        lines.append(
            f"unchecked: how these inputs were made, which swa-avg wrote: {first_few(result.averages)}"
        )
    if 0 < len(result.copies) < len(result.record.used):
        names = first_few([result.inputs[number].name for number in result.copies])
        lines.append(f"holds the weights of the output, as the average of the other inputs does: {names}")
    if result.refreshed and result.data is None:
        lines.append(f"compared with the digests in the record alone: {first_few(result.refreshed)}")
    return [*lines, str(result)]
