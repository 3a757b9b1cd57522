"""What a sweep tries: rows of coefficients, and the greedy soup. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swa_avg.errors import UsageError
from swa_avg.planning import methods

__all__ = ["GREEDY", "Candidate", "default_candidates", "greedy", "parse", "soup_of"]

GREEDY = "greedy"
_SIGMAS = (0.05, 0.1, 0.2)
_EXPECTED = "expected last:K, uniform, ema:DECAY, power-ema:SIGMA or greedy"


@dataclass(frozen=True)
class Candidate:
    """One average, or one checkpoint, that is scored."""

    name: str
    coefficients: tuple[float, ...]
    """One a checkpoint, in training order; sum 1."""

    @property
    def used(self) -> tuple[int, ...]:
        """The checkpoints that count."""
        return tuple(number for number, coefficient in enumerate(self.coefficients) if coefficient)

    @property
    def is_average(self) -> bool:
        return len(self.used) > 1


def default_candidates(count: int, times: Sequence[float] | None) -> list[str]:
    """Return the averages of `count` checkpoints that are tried when nothing is said.

    The last 2, 4, 8, ... and all; where `times`, the checkpoints' positions in training, are known, power-EMA
    of three widths; and the greedy soup.
    """
    lengths = [2**power for power in range(1, count.bit_length()) if 2**power < count]
    widths = [f"power-ema:{sigma}" for sigma in _SIGMAS] if times is not None else []
    return [*(f"last:{length}" for length in lengths), "uniform", *widths, GREEDY]


def parse(text: str, count: int, times: Sequence[float] | None) -> Candidate | None:
    """Return the candidate that a text names, over `count` checkpoints; None for the greedy soup.

    Args:
        text: `last:K`, the mean of the last K; `uniform`, of all; `ema:DECAY`; `power-ema:SIGMA`; `greedy`.
        count: Number of checkpoints.
        times: As for `methods.power_ema`, where they are known.

    Raises:
        UsageError: it is none of these, or cannot be had of these checkpoints.
    """
    if text == GREEDY:
        return None
    if text == "uniform":
        return Candidate(text, tuple(methods.uniform(count)))
    kind, _, value = text.partition(":")
    try:
        if kind == "last":
            return _last(text, int(value), count)
        if kind == "ema":
            return Candidate(text, tuple(methods.ema(count, float(value))))
        if kind == "power-ema":
            if times is None:
                raise UsageError(
                    f"--candidates {text} needs each checkpoint's epoch, in its name or the index"
                )
            return Candidate(text, tuple(methods.power_ema(times, float(value))))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
    raise UsageError(f"--candidates {text!r}; {_EXPECTED}")


def _last(text: str, length: int, count: int) -> Candidate:
    if not 1 <= length <= count:
        raise UsageError(f"--candidates {text}: there are {count} checkpoints")
    return Candidate(text, (*(0.0,) * (count - length), *methods.uniform(length)))


def soup_of(accepted: Sequence[int], count: int) -> Candidate:
    """Return the mean of some of `count` checkpoints as a candidate."""
    share = 1.0 / len(accepted)
    return Candidate(GREEDY, tuple(share if number in accepted else 0.0 for number in range(count)))


def greedy(alone: Sequence[float], badness_of: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Return the checkpoints of the greedy soup, in training order.

    Start from the best checkpoint, try the others from good to bad, and keep each that does not make the mean
    of all that are kept worse.

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
