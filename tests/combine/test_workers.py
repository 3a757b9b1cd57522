"""Independent calls: in order, a bounded number under way, and none left behind."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from swa_avg.combine.order import in_order


class Calls:
    """Calls that end when they are asked for; what was started and what was cancelled is kept."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []

    def submit(self, number: int) -> Future[int]:
        calls = self
        self.started.append(number)

        class Call(Future[int]):
            def result(self, timeout: float | None = None) -> int:
                if number == 13:
                    raise ValueError(number)
                return number * number

            def cancel(self) -> bool:
                calls.cancelled.append(number)
                return True

        return Call()


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_results_come_in_order_with_so_many_under_way_at_most(most: int) -> None:
    calls = Calls()
    taken = 0
    for number, square in in_order(calls.submit, range(12), most):
        assert (number, square) == (taken, taken**2)
        taken += 1
        assert len(calls.started) == min(12, taken + most - 1)
    assert taken == 12
    assert calls.cancelled == []


def test_an_item_is_taken_only_when_there_is_room_for_it() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(6):
            made.append(number)
            yield number

    for number, _ in in_order(Calls().submit, items(), 2):
        assert len(made) <= number + 2


def test_a_call_that_fails_cancels_those_after_it() -> None:
    calls = Calls()
    with pytest.raises(ValueError, match="13"):
        list(in_order(calls.submit, range(12, 30), 4))
    assert (calls.started, calls.cancelled) == ([12, 13, 14, 15, 16], [14, 15, 16])


def test_a_caller_that_stops_cancels_what_is_under_way() -> None:
    calls = Calls()
    results = in_order(calls.submit, range(10), 3)
    next(results)
    results.close()
    assert calls.cancelled == [1, 2]
