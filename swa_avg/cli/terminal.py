"""What the commands have in common in what they print."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

import click

from swa_avg.errors import escape
from swa_avg.interrupts import Interrupted

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["REFRESH_BY", "Stream", "say", "take_streams"]


REFRESH_BY = "--bn-refresh DATA"
"""What asks for a refresh."""


class Stream(io.FileIO):
    """Standard output or standard error. Writing never fails; `failure` is why something was not written.

    All is written at once, whatever Python's own setting: nothing is left for the interpreter to write as it
    exits, where an error would be its own to report. Python unbuffered also loses the rest of a write that
    the system takes in part.
    """

    failure: OSError | None = None
    _abandoned = False

    def __init__(self, number: int, replaced: TextIO | None) -> None:
        super().__init__(number, "w", closefd=False)
        self._replaced = replaced  # it may close the descriptor when it goes

    def write(self, data: ReadableBuffer, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and not self._abandoned:
                rest = rest[os.write(self.fileno(), rest) :]
        except OSError as error:
            self.failure = error
        except Interrupted:  # while the reader is stuck: what is said of it would wait for it, too
            self._abandoned = True
            raise
        return size


def take_streams() -> Stream:
    """Replace sys.stdout and sys.stderr for the rest of this process, and return standard output.

    Results (JSON, help, the version) go to standard output: where they cannot be delivered, the run ends
    with 5, whatever else its outcome. Messages go to standard error: where they cannot be delivered, they are
    lost, and the outcome is what it is. Descriptors that are closed refuse what is written to them as before,
    but no file that is opened later gets their number, and with it what others print.

    Raises:
        OSError: a descriptor is closed, and nothing can take its place.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the lowest free number is the one that is given
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    output, errors = Stream(1, sys.stdout), Stream(2, sys.stderr)
    sys.stdout, sys.stderr = _text(output, sys.stdout), _text(errors, sys.stderr)
    return output


def _text(stream: Stream, replaced: TextIO | None) -> TextIO:
    encoding = None if replaced is None else replaced.encoding
    return io.TextIOWrapper(stream, encoding, errors="backslashreplace", write_through=True)


def say(lines: Iterable[str]) -> None:
    """Print lines on standard error; what comes from files is escaped."""
    for line in lines:
        click.echo(escape(line), err=True)
