"""What the commands have in common in what they print."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import click

from swa_avg.errors import escape
from swa_avg.text import first_few

__all__ = ["batchnorm_warning", "progress_bar", "say"]


def say(lines: Iterable[str]) -> None:
    """Print lines on standard error; what comes from files is escaped.

    Where it is full or closed, they are lost: what was done is done, and the exit code tells.
    """
    with contextlib.suppress(OSError):
        for line in lines:
            click.echo(escape(line), err=True)


def batchnorm_warning(layers: Sequence[str]) -> str:
    """Return the warning that an average whose BatchNorm was not refreshed gets."""
    return (
        f"warning: BatchNorm statistics are averaged, not re-estimated ({first_few(layers)}); the model may "
        "be far worse than its weights: refresh them on training data with --bn-refresh DATA"
    )


@contextlib.contextmanager
def progress_bar(
    quiet: bool, title: str, *, in_bytes: bool = False, unit: str = "rows"
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
        else (MofNCompleteColumn(), TextColumn("{task.speed:.0f} " + f"{unit}/s"))
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
