"""The record that an output carries of how it was made: written, and read back strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.files.names import is_plain_name
from swa_avg.formats import Checkpoint
from swa_avg.planning.methods import Method
from swa_avg.planning.plan import Plan
from swa_avg.text import __version__

__all__ = ["Record", "RecordedInput", "RecordedRefresh", "describe", "read_record"]

_CRC32 = re.compile(r"[0-9a-f]{8}")
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_SOME = re.compile(r"(last|best):[1-9][0-9]{0,8}")
_WITHOUT_VALUE = ("ema", "power-ema", "weights", "single", "greedy")
"""Besides the grammar of methods: what version 0.1.0 wrote, and what sweeps call their winners."""
_ROUNDING = 1e-12
_ESTIMATORS = ("pooled", "batch-mean")


@dataclass(frozen=True)
class RecordedInput:
    """One input, as the record names it."""

    name: str
    size: int
    """Bytes of its shards."""
    crc32: tuple[str | None, ...]
    """One for each shard, hexadecimal; None where it was not computed."""
    coefficient: float


@dataclass(frozen=True)
class RecordedRefresh:
    """What it takes to do a refresh of BatchNorm again, but for its data and what was applied to them."""

    estimator: str
    samples: int
    batch_size: int | None
    seed: int
    digest: str
    """BLAKE2b-256 of the rows, hexadecimal."""
    values: Mapping[str, str]
    """Each tensor that the refresh changed -> CRC-32 of its new bytes, hexadecimal."""


@dataclass(frozen=True)
class Record:
    """What it takes to derive an output again."""

    method: str
    """In the grammar of methods; of a sweep, its name for the winner; of old outputs, without a value."""
    optimizer: str
    dtype: str | None
    inputs: tuple[RecordedInput, ...]
    """Their coefficients sum to 1."""
    refresh: RecordedRefresh | None

    @property
    def used(self) -> tuple[int, ...]:
        """Numbers of the inputs that count."""
        return tuple(number for number, entry in enumerate(self.inputs) if entry.coefficient)

    @property
    def values(self) -> Mapping[str, str]:
        """Each tensor that a refresh changed -> CRC-32 of its new bytes, hexadecimal."""
        return {} if self.refresh is None else self.refresh.values


def describe(
    plan: Plan,
    method: str,
    checksums: Sequence[Sequence[int | None]],
    related: bool | None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Return the record of an output: enough to derive it again, and no clock time.

    Each input has one CRC-32 (hexadecimal) for each shard, which in an archive is `model.weights.h5`; null
    where it was not computed. `related` says whether the inputs were found to be; None, and no line of the
    record, where that could not be told.
    """
    return {
        "version": __version__,
        "method": method,
        "optimizer": "drop" if plan.dropped else "keep",
        **({} if dtype is None else {"dtype": dtype}),
        "template": plan.inputs[-1].path.name,
        "inputs": [
            {
                "name": checkpoint.path.name,
                "size": checkpoint.size,
                "crc32": [None if checksum is None else f"{checksum:08x}" for checksum in sums],
                "coefficient": coefficient,
            }
            for checkpoint, sums, coefficient in zip(plan.inputs, checksums, plan.coefficients, strict=True)
        ],
        "averaged": len(plan.averaged),
        "copied": len(plan.copied) + len(plan.compared),
        **({} if related is None else {"related": related}),
    }


def read_record(checkpoint: Checkpoint) -> Record:
    """Return what a checkpoint says of how it was made: claims, from a file that may say anything.

    Raises:
        UnreadableError: there is no record, so swa-avg did not write it, or not one that swa-avg writes.
    """
    if checkpoint.record is None:
        problem = "does not say how it was made: it is not an output of swa-avg"
        raise UnreadableError(checkpoint.path, problem)
    try:
        return _record(checkpoint.record)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"its record of how it was made is damaged ({error})"
        raise UnreadableError(checkpoint.path, problem) from error


def _record(value: Mapping[str, Any]) -> Record:
    inputs = tuple(map(_input, _expect(list, value["inputs"])))
    if not inputs:
        raise ValueError("it names no inputs")
    coefficients = [entry.coefficient for entry in inputs]
    total = math.fsum(coefficients)
    if not abs(total - 1.0) <= _ROUNDING * max(1.0, sum(map(abs, coefficients))):
        raise ValueError(f"its coefficients sum to {total:g}, not to 1")
    if value.get("template", inputs[-1].name) != inputs[-1].name:
        raise ValueError("its template is not its last input")
    batchnorm = value.get("batchnorm")
    refresh = None if batchnorm is None else _refresh(_expect(dict, batchnorm))
    method, optimizer, dtype = value["method"], value["optimizer"], value.get("dtype")
    if not _is_method(_expect(str, method)):
        raise ValueError("its method is unknown")
    if dtype not in (None, "bfloat16") or optimizer not in ("keep", "drop"):
        raise ValueError("an option has an unknown value")
    return Record(method, optimizer, dtype, inputs, refresh)


def _refresh(value: Mapping[str, Any]) -> RecordedRefresh:
    values = _expect(dict, value.get("values", {}))
    if not all(_CRC32.fullmatch(_expect(str, text)) for text in values.values()):
        raise ValueError("a CRC-32 is malformed")
    estimator, batch_size, digest = value["estimator"], value["batch_size"], value["digest"]
    if estimator not in _ESTIMATORS or not _DIGEST.fullmatch(_expect(str, digest)):
        raise ValueError("what it says of a refresh is malformed")
    return RecordedRefresh(
        estimator,
        _count(value["samples"]),
        None if batch_size is None else _count(batch_size, 1),
        _count(value["seed"]),
        digest,
        values,
    )


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or value < least:
        raise ValueError("a number is malformed")
    return value


def _is_method(text: str) -> bool:
    """Tell whether some version wrote this for a method."""
    if text in _WITHOUT_VALUE or _SOME.fullmatch(text):
        return True
    try:
        Method.parse(text)
    except UsageError:
        return False
    return True


def _input(value: Any) -> RecordedInput:
    name, size, sums = _expect(str, value["name"]), value["size"], _expect(list, value["crc32"])
    if not is_plain_name(name):
        raise ValueError("an input's name is not a file name")
    if (
        type(size) is not int
        or size < 0
        or not all(s is None or _CRC32.fullmatch(_expect(str, s)) for s in sums)
    ):
        raise ValueError("an input's size or CRC-32 is malformed")
    coefficient = value["coefficient"]
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
        raise TypeError("a coefficient is not a number")
    if not math.isfinite(coefficient):
        raise ValueError("a coefficient is not finite")
    return RecordedInput(name, size, tuple(sums), float(coefficient))


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, found a {type(value).__name__}")
    return value
