"""What an output says of how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swa_avg import __version__
from swa_avg.plan import Plan

__all__ = ["describe"]


def describe(plan: Plan, method: str, checksums: Sequence[Sequence[int | None]]) -> dict[str, Any]:
    """Return the record that the output carries: enough to derive it again, and no clock time.

    Each input has a CRC-32 (hexadecimal) per HDF5 image: of `model.weights.h5` in an archive, of each
    file else; null where it was not computed.
    """
    return {
        "version": __version__,
        "method": method,
        "optimizer": "drop" if plan.dropped else "keep",
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
