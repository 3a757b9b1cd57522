"""Ctrl-C: what the command line makes of it, and moments in which it has to wait."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "interrupts", "interrupts_held"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that everything is cleaned up."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Interrupts:
    """A handler of signals that raises the first one, and none that comes too late.

    A second one must not interrupt the cleaning up, and none may make a run whose output has its name say
    that nothing was written.
    """

    over = False
    came: int | None = None

    def begin(self) -> None:
        """Raise what comes from now on."""
        self.over, self.came = False, None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.over:
            self.over, self.came = True, number
            # What was being made is left half made, and some of it (an archive) complains when it goes.
            sys.unraisablehook = lambda complaint: None
            raise Interrupted(number)

    def check(self) -> None:
        """Raise again what came, and was lost: TensorFlow drops what is raised while it traces."""
        if self.came is not None:
            raise Interrupted(self.came)

    def ignore(self) -> None:
        """Raise none from now on: the output has its name."""
        self.over = True


interrupts = _Interrupts()
"""The command line's handler."""


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Hold back SIGINT and SIGTERM; whatever came is delivered on leaving, or earlier by the function
    yielded.

    For steps of milliseconds that must not be left halfway. Only the main thread receives signals;
    elsewhere, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Any] = {}

    def deliver() -> None:
        while came:
            number, frame = came.pop(0)
            handler = before[number]
            if callable(handler):
                handler(number, frame)
            elif handler == signal.SIG_DFL:
                signal.signal(number, handler)
                signal.raise_signal(number)

    try:
        for number in _SIGNALS:
            before[number] = signal.getsignal(number)
            if before[number] is not None:  # None: set by other than Python, and left alone
                signal.signal(number, lambda number, frame: came.append((number, frame)))
        yield deliver
    finally:
        for kind, handler in before.items():
            if handler is not None:
                signal.signal(kind, handler)
        deliver()
