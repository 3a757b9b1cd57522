"""What a sweep tries: rows of coefficients, and the greedy soup. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swa_avg.errors import UsageError
from swa_avg.planning import methods
from swa_avg.planning.methods import Method

__all__ = [
    "BEST",
    "GREEDY",
    "LAST",
    "Candidate",
    "default_candidates",
    "greedy",
    "mean_of",
    "needs_ranking",
    "needs_times",
    "parse",
]

GREEDY = "greedy"
LAST = "last:K"
BEST = "best:K"
_SIGMAS = (0.05, 0.1, 0.2)
_MANY_DIGITS = 10  # Python reads no integers of thousands of digits


@dataclass(frozen=True)
class Candidate:
    """One average, or one checkpoint, that is scored."""

    name: str
    coefficients: tuple[float, ...]
    """One per checkpoint, in training order; sum 1."""

    @property
    def used(self) -> tuple[int, ...]:
        """The numbers of the checkpoints that count."""
        return tuple(number for number, coefficient in enumerate(self.coefficients) if coefficient)

    @property
    def is_average(self) -> bool:
        return len(self.used) > 1


def default_candidates(count: int, times: Sequence[float] | None) -> list[str]:
    """Return the averages of `count` checkpoints that are tried by default.

    They are the mean of the last 2, 4, 8, ... and of all; power-EMA of three widths, if `times` are what it
    needs; and the greedy soup.
    """
    lengths = [2**power for power in range(1, count.bit_length()) if 2**power < count]
    widths = [f"power-ema:{sigma}" for sigma in _SIGMAS] if methods.ascending(times) else []
    return [*(f"last:{length}" for length in lengths), "uniform", *widths, GREEDY]


def needs_times(text: str) -> bool:
    """Tell whether the candidate depends on the checkpoints' positions in training."""
    name = text.partition(":")[0]
    return name in methods.METHODS and methods.METHODS[name].needs_times


def needs_ranking(text: str) -> bool:
    """Tell whether the candidate depends on which checkpoints are the best by their metrics."""
    return text.partition(":")[0] == "best"


def parse(
    text: str, count: int, times: Sequence[float] | None, ranked: Sequence[int] = ()
) -> Candidate | None:
    """Return the candidate that a text names, over `count` checkpoints; None for the greedy soup.

    Args:
        text: A method, `NAME[:VALUE]`; `last:K` or `best:K`, the mean of the last or best K; or `greedy`.
        count: Number of checkpoints.
        times: As for `Method.coefficients`.
        ranked: Numbers of checkpoints, the best first, as their metrics rank them.

    Raises:
        UsageError: it is none of these, or not possible for these checkpoints.
    """
    name, _, value = text.partition(":")
    if name in methods.METHODS:
        method = Method.parse(text)
        return Candidate(str(method), tuple(method.coefficients(count, times)))
    if name in ("last", "best"):
        order = ranked if name == "best" else range(count)[::-1]
        length = int(value) if value.isdecimal() and len(value) < _MANY_DIGITS else 0
        if not 1 <= length <= len(order):
            raise UsageError(f"candidate {text!r}: expected {name}:K, from {name}:1 to {name}:{len(order)}")
        return mean_of(order[:length], count, f"{name}:{length}")
    if text == GREEDY:
        return None
    raise UsageError(f"candidate {text!r}: expected {LAST}, {BEST}, {methods.spellings()} or {GREEDY}")


def mean_of(chosen: Sequence[int], count: int, name: str = GREEDY) -> Candidate:
    """Return the mean of some of `count` checkpoints as a candidate."""
    share = 1.0 / len(chosen)
    return Candidate(name, tuple(share if number in chosen else 0.0 for number in range(count)))


def greedy(alone: Sequence[float], badness_of: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Return the checkpoints of the greedy soup, in training order.

    Start from the best checkpoint, try the others from the best to the worst, and keep each one that does not
    make the mean of those kept so far worse.

    Source: Wortsman et al. 2022, "Model soups" (arXiv:2203.05482), recipe 1.

    Args:
        alone: The badness of each checkpoint; of equals, the newer is tried first.
        badness_of: Returns the badness of the mean of the checkpoints with these numbers, in training order.
    """
    order = sorted(range(len(alone)), key=lambda number: (alone[number], -number))
    accepted: tuple[int, ...] = (order[0],)
    best = alone[order[0]]
    for number in order[1:]:
        trial = tuple(sorted((*accepted, number)))
        bad = badness_of(trial)
        if bad <= best and bad < math.inf:
            accepted, best = trial, bad
    return accepted
