"""How much each checkpoint counts: `NAME[:VALUE]` -> coefficients. Pure.

METHODS, below, is the grammar. There is one coefficient per checkpoint, float64, in training order; their sum
is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from swa_avg.errors import UsageError
from swa_avg.text import counted

__all__ = [
    "METHODS",
    "Method",
    "ascending",
    "decay",
    "ema",
    "half_life",
    "power_ema",
    "spellings",
    "uniform",
    "weighted",
]

_MAX_SIGMA = math.sqrt(1.0 / 12.0)
_CANCELLED = 1e-9  # of the weights' magnitude: a smaller sum is what rounding left of 0


@dataclass(frozen=True)
class Method:
    """One way of averaging, such as `ema:0.9`.

    Raises:
        UsageError: there is no such method, or it does not take this value.
    """

    name: str
    """A key of METHODS."""
    value: Any = None
    """A float, the name of a shape, or a tuple of weights; its text does as well. None for `uniform`."""

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise UsageError(f"method {str(self)!r}: expected {spellings()}")
        entry = METHODS[self.name]
        try:
            object.__setattr__(self, "value", entry.read(self.value))
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"method {str(self)!r}: expected {entry.expected}") from None

    @classmethod
    def parse(cls, method: str | Sequence[float]) -> Method:
        """Return the method that `NAME[:VALUE]` names, or a sequence of weights.

        Raises:
            UsageError: it is neither.
        """
        if isinstance(method, str):
            name, colon, value = method.partition(":")
            return cls(name, value if colon else None)
        return cls("weights", method)

    def __str__(self) -> str:
        """Return the text that `parse` reads, the same for equal methods."""
        return self.name if self.value is None else f"{self.name}:{_text(self.value)}"

    @property
    def needs_times(self) -> bool:
        """Whether the coefficients depend on the checkpoints' positions in training."""
        return METHODS[self.name].needs_times

    def coefficients(self, count: int, times: Sequence[float] | None = None) -> list[float]:
        """Return the coefficients of `count` checkpoints.

        Args:
            count: Number of checkpoints, at least 1.
            times: Their positions in training, in any unit, where `needs_times`.

        Raises:
            UsageError: the positions do not ascend from above 0, or the weights are not one per checkpoint.
        """
        entry = METHODS[self.name]
        if entry.needs_times and not ascending(times):
            raise UsageError(
                f"method {str(self)!r}: expected each checkpoint at an epoch of its own, from 1 on"
            )
        if self.name == "weights" and len(self.value) != count:
            expected = f"{counted(count, 'number')}, one per checkpoint"
            raise UsageError(f"method {str(self)!r}: expected {expected}, found {len(self.value)}")
        return entry.coefficients(times if entry.needs_times else count, self.value)


def ascending(times: Sequence[float] | None) -> bool:
    """Tell whether positions in training are known, above 0, and those of successive checkpoints."""
    return times is not None and all(before < time for before, time in pairwise([0.0, *times]))


def spellings() -> str:
    """Return how the methods are written, as text for help and errors."""
    return ", ".join(entry.spelling for entry in METHODS.values())


# --- coefficients


def uniform(count: int) -> list[float]:
    """Return the coefficients of the plain mean (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1).

    Over the last k checkpoints it is LAWA (Kaddour 2022, arXiv:2209.14981).
    """
    return [1.0 / count] * count


def ema(count: int, decay: float) -> list[float]:
    """Return the coefficients of an exponential moving average that starts at the first checkpoint.

    avg_0 = x_0; avg_i = decay * avg_(i-1) + (1 - decay) * x_i, with `decay` in [0, 1).
    """
    return [decay ** (count - 1), *((1.0 - decay) * decay ** (count - 1 - i) for i in range(1, count))]


def power_ema(times: Sequence[float], sigma_rel: float) -> list[float]:
    """Return the coefficients of a power-function average of plain checkpoints.

    The averaging profile is t^γ (Karras et al. 2024, arXiv:2312.02696, section 3.1), with the γ ≥ 0 whose
    profile has the standard deviation `sigma_rel`, in (0, 1/√12), relative to the length of training.
    """
    return _power_profile(times, _exponent(sigma_rel) + 1.0)


def half_life(times: Sequence[float], fraction: float) -> list[float]:
    """Return the coefficients of the power-function average whose half-life is a fraction of training so far.

    An exponential moving average with half-life h forgets at the rate ln 2 / h. Where h grows with training,
    h = fraction * t, the weight of a checkpoint falls as

        dw/dt = -w ln 2 / (fraction * t),    w(t) ∝ t^(-ln 2 / fraction),

    which is the averaging profile t^γ with γ = ln 2 / fraction - 1. At any end of training T, half of the
    weight lies on what came after T * exp(-fraction), since exp(-fraction)^(γ+1) = 1/2: on about the last
    `fraction` of training where that is small (1 - exp(-0.1) = 0.095). Source: the half-life that is ramped
    up with training in Karras et al. 2024 (arXiv:2312.02696, code of EDM2, `ema_rampup_ratio`).

    Args:
        times: As for `power_ema`.
        fraction: In (0, 1]; ln 2 = 0.69 weights all of training alike, and more weights its beginning.
    """
    return _power_profile(times, math.log(2.0) / fraction)


def _power_profile(times: Sequence[float], exponent: float) -> list[float]:
    """Integrate the profile t^(exponent-1) over the time that each checkpoint stands for.

    (t_i^(γ+1) - t_(i-1)^(γ+1)) / t_N^(γ+1) with t_0 = 0 and γ + 1 = exponent.

    Args:
        times: Position in training of each checkpoint, in any unit, ascending, above 0.
        exponent: Above 0.
    """
    shares = [(time / times[-1]) ** exponent for time in times]
    return [shares[0], *(b - a for a, b in pairwise(shares))]


def _exponent(sigma_rel: float) -> float:
    """Solve σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) for γ ≥ 0 by bisection (Karras et al. 2024, section 3.1).

    The right side falls from 1/12 at γ = 0 towards 0.
    """
    low, high = 0.0, 1.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2.0
        if (middle + 1.0) / ((middle + 2.0) ** 2 * (middle + 3.0)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return low


_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
}
"""Decays of the learning rate: share of training that the decay takes -> rate, from D(0) = 1 to D(1) = 0."""


def decay(count: int, shape: str) -> list[float]:
    """Return the coefficients that stand for a decay of the learning rate: c_j = D(j/n) - D((j+1)/n), j < n.

    The n checkpoints x_0 ... x_(n-1) are those of a run at a constant rate, equally far apart. With u_i for
    the sum of the updates from x_(i-1) to x_i, x_j = x_0 + u_1 + ... + u_j, so that

        Σ_j c_j x_j = x_0 Σ_j c_j + Σ_(i≥1) (Σ_(j≥i) c_j) u_i = x_0 + Σ_(i≥1) D(i/n) u_i,

    as Σ_(j≥i) c_j = D(i/n) - D(1) = D(i/n) and D(0) = 1. This is where a run ends whose rate falls from x_0
    on, in the i-th of these intervals to D(i/n) of the constant rate, and which sees the same gradients:
    an identity for gradients that do not depend on the weights, and of first order in the rate for others.
    The rate would be 0 in the n-th interval, which has no update. Linear decay is the uniform mean.
    Source: Tian et al. 2025, "WSM" (arXiv:2507.17634).

    Args:
        count: The number n of checkpoints.
        shape: A key of `_SHAPES`.
    """
    rates = [_SHAPES[shape](j / count) for j in range(count + 1)]
    return [before - after for before, after in pairwise(rates)]


def weighted(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum; as they are where the sum is 1.

    Args:
        weights: Finite, of any sign, with a sum that is not 0.
    """
    total = math.fsum(weights)
    return list(weights) if total == 1.0 else [weight / total for weight in weights]


# --- the grammar


class _Entry(NamedTuple):
    """What the grammar knows of one method."""

    spelling: str
    meaning: str
    """A sentence, for help."""
    expected: str
    """What is expected where something else was found."""
    read: Callable[[Any], Any]
    """Turns a value, or its text, into the value. Raises TypeError or ValueError if it is none."""
    coefficients: Callable[[Any, Any], list[float]]
    """Of the number of checkpoints, or where `needs_times` their positions in training, and the value."""
    needs_times: bool = False


def _nothing(value: Any) -> None:
    if value is not None:
        raise ValueError


def _number(fits: Callable[[float], bool]) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        number = float(value)
        if not fits(number):
            raise ValueError
        return number

    return read


def _shape(value: Any) -> str:
    if value not in _SHAPES:
        raise ValueError
    return str(value)


def _weights(value: Any) -> tuple[float, ...]:
    weights = tuple(map(float, value.split(",") if isinstance(value, str) else value))
    magnitude = sum(map(abs, weights))  # not finite if one of them is not
    if not (math.isfinite(magnitude) and abs(math.fsum(weights)) > _CANCELLED * magnitude):
        raise ValueError
    return weights


def _text(value: Any) -> str:
    """Return the text of a value; of numbers the shortest that reads back as the same number."""
    if isinstance(value, str):
        return value
    try:
        return ",".join(map(_text, value))
    except TypeError:  # a number, or what was passed for one
        return str(value).removesuffix(".0")


METHODS = {
    "uniform": _Entry(
        "uniform",
        "The plain mean.",
        "uniform, without a value",
        _nothing,
        lambda count, _: uniform(count),
    ),
    "ema": _Entry(
        "ema:DECAY",
        "Exponential moving average, begun with the oldest: each step keeps DECAY of it.",
        "ema:DECAY, from 0 up to but not including 1, such as ema:0.9",
        _number(lambda number: 0.0 <= number < 1.0),
        ema,
    ),
    "power-ema": _Entry(
        "power-ema:SIGMA_REL",
        "Power-function average of this width, relative to the length of training: newer ones count more.",
        f"power-ema:SIGMA_REL, between 0 and {_MAX_SIGMA:.4f}, such as power-ema:0.1",
        _number(lambda number: 0.0 < number < _MAX_SIGMA),
        power_ema,
        needs_times=True,
    ),
    "half-life": _Entry(
        "half-life:FRACTION",
        "Power-function average with half of its weight on about the last FRACTION of training.",
        "half-life:FRACTION, above 0 and up to 1, such as half-life:0.1",
        _number(lambda number: 0.0 < number <= 1.0),
        half_life,
        needs_times=True,
    ),
    "decay": _Entry(
        "decay:" + "|".join(_SHAPES),
        "What this decay of the learning rate, over the checkpoints, would have given.",
        "decay:" + " or decay:".join(_SHAPES),
        _shape,
        decay,
    ),
    "weights": _Entry(
        "weights:W,W,...",
        "These weights, one per checkpoint, divided by their sum.",
        "weights:W,W,..., one finite number per checkpoint, whose sum is not 0, such as weights:1,2,2",
        _weights,
        lambda _, weights: weighted(weights),
    ),
}
"""Name of a method -> what the grammar knows of it, in the order in which help and errors list them."""
