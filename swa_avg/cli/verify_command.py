"""`swa-avg verify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli.options import resource_options
from swa_avg.cli.terminal import say
from swa_avg.errors import MismatchError
from swa_avg.text import first_few

if TYPE_CHECKING:
    from swa_avg.verification import Verification

__all__ = ["verify"]


@click.command()
@click.argument("output", type=click.Path())
@click.option(
    "--inputs",
    type=click.Path(),
    multiple=True,
    metavar="FOLDER",
    help="Where the inputs are, several times if need be.  [default: beside OUTPUT]",
)
@resource_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def verify(
    output: str,
    inputs: Sequence[str],
    max_memory: int | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Derive OUTPUT again from the inputs that it names, and compare every tensor.

    Inputs that have changed since are named. What a refresh of BatchNorm replaced cannot be derived without
    its data; it is held against the digest in OUTPUT's own record. Ends with 0 if all is equal, with 4 and
    the names of the tensors if not.
    """
    from swa_avg.verification import verify as run

    result = run(output, inputs, max_memory=max_memory, threads=threads)
    if as_json:
        import json

        click.echo(json.dumps(_as_json(result)))
    if not result.equal:
        raise MismatchError(result.findings)
    if not quiet:
        _describe(result)


def _describe(result: Verification) -> None:
    from swa_avg.text import counted

    lines = []
    if result.digests:
        shown = first_few(result.digests)
        lines.append(f"held against their digest only, since a refresh replaced them: {shown}")
    elif result.record.refreshed:
        lines.append("the refresh of BatchNorm changed nothing")
    count = len(result.inputs)
    average = f"the {result.record.method} average of {count} checkpoints"
    lines.append(
        f"equal: {result.output} is {average if count > 1 else result.inputs[0].name} "
        f"({counted(result.averaged, 'tensor')} averaged again, "
        f"{result.copied} compared with the newest input's)"
    )
    say(lines)


def _as_json(result: Verification) -> dict[str, Any]:
    return {
        "output": str(result.output),
        "equal": result.equal,
        "method": result.record.method,
        "inputs": [str(path) for path in result.inputs],
        "averaged": result.averaged,
        "copied": result.copied,
        "by_digest": list(result.digests),
        "findings": [
            {"path": str(f.path), "subject": f.subject, "problem": f.problem} for f in result.findings
        ],
    }
