"""The coefficients of an output, derived again: what its record says of them is a claim."""

from __future__ import annotations

import math
from collections.abc import Sequence

from swa_avg.errors import SwaAvgError, UsageError
from swa_avg.inputs.listing import Listing
from swa_avg.planning.methods import Method, ascending
from swa_avg.planning.record import Record
from swa_avg.text import counted

__all__ = ["ContradictionError", "derive_method"]

_ROUNDING = 1e-12
"""How far powers may differ between machines."""
_EXACT = ("uniform", "weights")
"""Methods whose coefficients are the same on every machine."""


class ContradictionError(Exception):
    """No method of the record's name gives its coefficients for these inputs."""


def derive_method(record: Record, listings: Sequence[Listing]) -> str | None:
    """Return the method that gives the record's coefficients, in the grammar of methods.

    None where that cannot be known: the epochs that it depends on are not known any more, or the record holds
    no more than the word `weights`.

    Args:
        record: Its coefficients sum to 1.
        listings: The inputs in the record's order, with each reading of their epochs.

    Raises:
        ContradictionError: the method gives other coefficients.
    """
    found = [entry.coefficient for entry in record.inputs]
    count, text = len(found), record.method
    if text == "weights":
        return None
    if text == "power-ema":
        return _by_epochs(None, found, listings)
    if text in ("single", "greedy") or text.startswith(("last:", "best:")):
        # A sweep records the checkpoints that count, and of these each counts alike.
        if text not in ("greedy", f"last:{count}", f"best:{count}", *(["single"] if count == 1 else [])):
            raise ContradictionError(f"{text} is not of {counted(count, 'checkpoint')}")
        text = "uniform"
    method = _ema_of(found) if text == "ema" else Method.parse(text)
    if method.needs_times:
        return _by_epochs(method, found, listings)
    return _checked_method(method, found, None)


def _by_epochs(method: Method | None, found: list[float], listings: Sequence[Listing]) -> str | None:
    """Return the method if it gives these coefficients by one reading of the epochs; None without any."""
    problem = None
    for listing in listings:
        try:
            times = [float(epoch) for epoch in listing.epochs("method")]
        except SwaAvgError:  # unknown, or ambiguous, or the index is damaged
            continue
        if not ascending(times):
            continue
        try:
            return _checked_method(method or _power_ema_of(found, times), found, times)
        except ContradictionError as error:
            problem = error
    if problem is not None:
        raise problem
    return None


def _checked_method(method: Method, found: Sequence[float], times: Sequence[float] | None) -> str:
    name, count = str(method), len(found)
    if method.name == "weights":
        expected = method.coefficients(len(method.value))
        if len(expected) != count:  # a sweep leaves out the checkpoints that do not count
            expected = [coefficient for coefficient in expected if coefficient]
        if len(expected) != count:
            raise ContradictionError(f"{name} is not of {counted(count, 'checkpoint')}")
    else:
        expected = method.coefficients(count, times)
    tolerance = 0.0 if method.name in _EXACT else _ROUNDING
    for number, (one, other) in enumerate(zip(expected, found, strict=True), 1):
        if not abs(one - other) <= tolerance:
            gives = f"{name} gives input {number} of {count} the coefficient {one!r}"
            raise ContradictionError(f"{gives}, its record says {other!r}")
    return name


def _ema_of(found: Sequence[float]) -> Method:
    """Return the moving average whose last coefficient this is."""
    try:
        return Method("ema", float(f"{1.0 - found[-1]:.15g}"))
    except UsageError:
        raise ContradictionError(f"no decay of ema gives the last input {found[-1]!r}") from None


def _power_ema_of(found: Sequence[float], times: Sequence[float]) -> Method:
    """Return the power-function average whose first, or where that is 0, last coefficient this is."""
    try:
        if found[0] > 0.0:
            power = math.log(found[0]) / math.log(times[0] / times[-1])
        else:
            power = math.log(1.0 - found[-1]) / math.log(times[-2] / times[-1])
        # The width of the profile t^(power-1) (Karras et al. 2024, section 3.1).
        return Method("power-ema", math.sqrt(power / ((power + 1.0) ** 2 * (power + 2.0))))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ContradictionError("no width of power-ema gives these coefficients") from None
