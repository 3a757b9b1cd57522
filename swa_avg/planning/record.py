"""What an output says of how it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_avg.errors import UnreadableError
from swa_avg.files.untrusted_json import parse_json
from swa_avg.formats.archive import ArchiveCheckpoint
from swa_avg.formats.bare import Hdf5Checkpoint
from swa_avg.formats.base import PROVENANCE, Checkpoint
from swa_avg.formats.sharded import ShardedCheckpoint
from swa_avg.planning.plan import Plan
from swa_avg.text import __version__

__all__ = ["Record", "RecordedInput", "describe", "read_record"]

_CRC32 = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class RecordedInput:
    """One input, as an output names it."""

    name: str
    size: int
    """Bytes of its shards."""
    crc32: tuple[str | None, ...]
    """One a shard, hexadecimal; None where it was not computed."""
    coefficient: float


@dataclass(frozen=True)
class Record:
    """What it takes to derive an output again."""

    method: str
    optimizer: str
    dtype: str | None
    inputs: tuple[RecordedInput, ...]
    refreshed: bool
    """Whether BatchNorm statistics were re-estimated."""
    values: Mapping[str, str]
    """Of each tensor that this changed, the CRC-32 of its new bytes, hexadecimal."""


def describe(
    plan: Plan, method: str, checksums: Sequence[Sequence[int | None]], dtype: str | None = None
) -> dict[str, Any]:
    """Return the record that the output carries: enough to derive it again, and no clock time.

    Each input has a CRC-32 (hexadecimal) per shard: of `model.weights.h5` in an archive, of each
    file else; null where it was not computed.
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
    }


def read_record(checkpoint: Checkpoint) -> Record:
    """Return what a checkpoint says of how it was made; it comes from elsewhere and may say anything.

    Raises:
        UnreadableError: it says nothing, so swa-avg did not write it, or something else than we write.
    """
    value = _stored(checkpoint)
    if value is None:
        problem = "does not say how it was made: it is not an output of swa-avg"
        raise UnreadableError(checkpoint.path, problem)
    try:
        return _record(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"its record of how it was made is damaged ({error})"
        raise UnreadableError(checkpoint.path, problem) from error


def _stored(checkpoint: Checkpoint) -> Any:
    if isinstance(checkpoint, ArchiveCheckpoint):
        return (checkpoint.metadata or {}).get(PROVENANCE)
    if isinstance(checkpoint, ShardedCheckpoint):
        return (checkpoint.map or {}).get(PROVENANCE)
    if isinstance(checkpoint, Hdf5Checkpoint) and checkpoint.is_average:
        return parse_json(checkpoint.record, checkpoint.path, "its record of how it was made")
    return None


def _record(value: Any) -> Record:
    inputs = tuple(map(_input, _a(list, value["inputs"])))
    if not inputs:
        raise ValueError("it names no inputs")
    batchnorm = value.get("batchnorm")
    values = {} if batchnorm is None else _a(dict, _a(dict, batchnorm).get("values", {}))
    if not all(isinstance(text, str) and _CRC32.fullmatch(text) for text in values.values()):
        raise ValueError("a CRC-32 is not one")
    dtype = value.get("dtype")
    if dtype not in (None, "bfloat16") or value["optimizer"] not in ("keep", "drop"):
        raise ValueError("an option has a value that there is not")
    return Record(_a(str, value["method"]), value["optimizer"], dtype, inputs, batchnorm is not None, values)


def _input(value: Any) -> RecordedInput:
    name, size, sums = _a(str, value["name"]), value["size"], _a(list, value["crc32"])
    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError("an input's name is not that of a file")
    if type(size) is not int or not all(s is None or _CRC32.fullmatch(_a(str, s)) for s in sums):
        raise ValueError("an input's size or CRC-32 is not one")
    coefficient = value["coefficient"]
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
        raise TypeError("a coefficient is not a number")
    if not math.isfinite(coefficient):
        raise ValueError("a coefficient is not finite")
    return RecordedInput(name, size, tuple(sums), float(coefficient))


def _a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected a {kind.__name__}, found a {type(value).__name__}")
    return value
