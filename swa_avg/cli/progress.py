"""How far a command is: bars on a terminal, and elsewhere a line every half minute."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swa_avg.cli.terminal import say
from swa_avg.text import Progress, size_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Stage", "progress_of"]

_INTERVAL = 30  # seconds
_PATIENCE = 1.0  # seconds, for a line that is on its way


@dataclass
class Stage:
    """A part of a command that takes time."""

    title: str
    unit: str = "rows"
    """What is counted; `bytes` are shown in their units."""
    done: int = 0
    total: int | None = None
    """None as long as it is not known."""

    def advance(self, total: int | None, count: int) -> None:
        """Take note of `count` more that are done."""
        self.total = total
        self.done += count

    @property
    def complete(self) -> bool:
        return self.total is not None and self.done >= self.total

    def __str__(self) -> str:
        done, total = (
            "" if count is None else size_text(count) if self.unit == "bytes" else str(count)
            for count in (self.done, self.total)
        )
        unit = "" if self.unit == "bytes" else f" {self.unit}"
        return f"{self.title}: {done} of {total}{unit}" if total else f"{self.title}: {done}{unit} so far"


@contextmanager
def progress_of(quiet: bool, *stages: Stage) -> Iterator[tuple[Progress | None, ...]]:
    """Show how far the stages of a command are, which follow each other, and give what each is to call.

    On a terminal each has a bar from the first time that there is progress. Elsewhere a line says every half
    minute how far it is, whether there was progress or not: it may be data that do not come, or do not end.
    """
    with ExitStack() as stack:
        if quiet:
            yield (None,) * len(stages)
            return
        console = _console()
        if console is not None:
            yield tuple([stack.enter_context(_bar(console, stage)) for stage in stages])
            return
        ended = threading.Event()
        # A daemon: nothing waits for a line that nobody takes.
        thread = threading.Thread(target=_lines, args=(stages, ended), name="progress", daemon=True)
        thread.start()
        try:
            yield tuple(stage.advance for stage in stages)
        finally:
            ended.set()
            thread.join(_PATIENCE)


def _lines(stages: Sequence[Stage], ended: threading.Event) -> None:
    """Say again and again how far the first stage is that is not complete."""
    seconds = 0
    while not ended.wait(_INTERVAL):
        seconds += _INTERVAL
        minutes = f"{seconds // 60} min" if seconds >= 60 else ""
        time = " ".join(part for part in (minutes, f"{seconds % 60} s" if seconds % 60 else "") if part)
        stage = next((stage for stage in stages if not stage.complete), stages[-1])
        say([f"{stage}, after {time}"])


def _console() -> Console | None:
    """Return the terminal, if it is one on which a bar can be drawn again: not a dumb one."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return console if console.is_interactive else None


@contextmanager
def _bar(console: Any, stage: Stage) -> Iterator[Progress]:
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
        if stage.unit == "bytes"
        else (MofNCompleteColumn(), TextColumn("{task.speed:.0f} " + f"{stage.unit}/s"))
    )
    columns = (TextColumn(stage.title), BarColumn(), *amounts, TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(stage.title, total=None)

    def advance(total: int | None, count: int) -> None:
        bar.start()
        bar.update(task, total=total, advance=count)

    try:
        yield advance
    finally:
        bar.stop()
