"""Independent calls, a bounded number of them under way, with their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["in_order"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    submit: Callable[[Item], Future[Result]], items: Iterable[Item], most: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item and the result of the call that `submit` starts with it, in the order of the items.

    At most `most` calls are under way, or done with results that have not been asked for; the next item is
    taken once the caller is done with a result. What is still under way when the caller stops is cancelled.
    """
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            under_way.append((item, submit(item)))
            if len(under_way) == most:
                yield _first(under_way)
        while under_way:
            yield _first(under_way)
    finally:
        for _, work in under_way:
            work.cancel()


def _first(under_way: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, work = under_way.popleft()
    return item, work.result()
