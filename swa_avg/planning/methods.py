"""Positions in training -> coefficients of an average.

Each method returns one float64 coefficient a checkpoint, in training order, with sum 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from swa_avg.errors import UsageError
from swa_avg.files.location import Location
from swa_avg.inputs.selection import epochs_of
from swa_avg.text import counted

__all__ = ["METHODS", "coefficients_of", "ema", "given", "power_ema", "uniform"]

_SUM_TOLERANCE = 1e-9


def uniform(count: int) -> list[float]:
    """Return the coefficients of the plain mean (Izmailov et al. 2018, arXiv:1803.05407, algorithm 1).

    Over the last k checkpoints it is LAWA (Kaddour 2022, arXiv:2209.14981).
    """
    return [1.0 / count] * count


def ema(count: int, decay: float) -> list[float]:
    """Return the coefficients of an exponential moving average that starts at the first checkpoint.

    avg_0 = x_0; avg_i = decay * avg_(i-1) + (1 - decay) * x_i.

    Raises:
        UsageError: `decay` is not in [0, 1).
    """
    if not 0.0 <= decay < 1.0:
        raise UsageError(f"--decay is {decay}; expected a number from 0 up to, not including, 1")
    return [decay ** (count - 1), *((1.0 - decay) * decay ** (count - 1 - i) for i in range(1, count))]


def power_ema(times: Sequence[float], sigma_rel: float) -> list[float]:
    """Return the coefficients of a power-function average of plain checkpoints.

    (t_i^(γ+1) - t_(i-1)^(γ+1)) / t_N^(γ+1) with t_0 = 0: the averaging profile t^γ of Karras et al. 2024
    (arXiv:2312.02696, section 3.1), integrated over the time that each checkpoint stands for.

    Args:
        times: position in training of each checkpoint, in any unit, ascending, above 0.
        sigma_rel: width of the profile relative to the length of training.

    Raises:
        UsageError: `sigma_rel` has no exponent, or the times do not ascend from above 0.
    """
    exponent = _exponent(sigma_rel) + 1.0
    if not times or times[0] <= 0 or any(a >= b for a, b in pairwise(times)):
        raise UsageError(
            "power-ema needs the position of each checkpoint in training: ascending numbers above 0"
        )
    shares = [(time / times[-1]) ** exponent for time in times]
    return [shares[0], *(b - a for a, b in pairwise(shares))]


def _exponent(sigma_rel: float) -> float:
    """Solve σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) for γ ≥ 0 by bisection (Karras et al. 2024, section 3.1).

    The right side falls from 1/12 at γ = 0 towards 0.
    """
    limit = math.sqrt(1.0 / 12.0)
    if not 0.0 < sigma_rel < limit:
        raise UsageError(
            f"--sigma-rel is {sigma_rel}; expected a number between 0 and {limit:.4f}, such as 0.1"
        )
    low, high = 0.0, 1.0 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2.0
        if (middle + 1.0) / ((middle + 2.0) ** 2 * (middle + 3.0)) > sigma_rel**2:
            low = middle
        else:
            high = middle
    return low


def given(count: int, weights: Sequence[float]) -> list[float]:
    """Return the user's own coefficients.

    Raises:
        UsageError: they are not one a checkpoint, not finite, or do not sum to 1.
    """
    if len(weights) != count:
        raise UsageError(
            f"--weights has {counted(len(weights), 'number')} for {counted(count, 'checkpoint')}"
        )
    total = sum(weights)  # not finite if one of them is not
    if not abs(total - 1.0) <= _SUM_TOLERANCE:
        raise UsageError(f"--weights sum to {total}; expected finite numbers with sum 1")
    return list(weights)


METHODS = {"uniform": uniform, "ema": ema, "power-ema": power_ema, "weights": given}


def coefficients_of(
    method: str,
    paths: Sequence[Location],
    *,
    decay: float | None,
    sigma_rel: float | None,
    weights: Sequence[float] | None,
) -> list[float]:
    """Return the method's coefficients; each method takes its own option, and no other's."""
    if method not in METHODS:
        raise UsageError(f"the method is {' or '.join(METHODS)}, not {method!r}")
    for option, value, owner in (
        ("--decay", decay, "ema"),
        ("--sigma-rel", sigma_rel, "power-ema"),
        ("--weights", weights, "weights"),
    ):
        if (value is not None) != (method == owner):
            raise UsageError(f"{option} and --method {owner} go together; the method is {method}")
    if decay is not None:
        return ema(len(paths), decay)
    if sigma_rel is not None:
        return power_ema([float(epoch) for epoch in epochs_of(paths, "--method power-ema")], sigma_rel)
    if weights is not None:
        return given(len(paths), weights)
    return uniform(len(paths))
