"""Moments in which Ctrl-C has to wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["interrupts_held"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
