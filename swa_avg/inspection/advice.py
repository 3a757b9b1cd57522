"""Whether an average is likely to help, by the steps between checkpoints: a rule from recorded runs. Pure."""

from __future__ import annotations

import math

from swa_avg.inspection.geometry import Array

__all__ = ["HELPED", "LEVEL", "advice", "pace_of"]

LEVEL = 0.8
HELPED = (78, 34)
"""% of the series, from this pace on and below, whose mean had a lower loss on test data than their last
checkpoint: from scripts/evidence.jsonl, by scripts/evidence_tables.py."""


def pace_of(steps: Array) -> float:
    """Return the mean length of the later half of the steps, relative to the earlier half; NaN at rest.

    About 1 while the learning rate is kept up: checkpoints go round a place or move on evenly, and their
    mean takes out the noise of the steps. Less where the rate decays, or the run comes to rest: the last
    checkpoint has left the noise behind, and the mean goes back to it.

    Args:
        steps: float64[2 or more], distances between neighbours, in training order; the middle one of an odd
            number belongs to neither half.
    """
    half = len(steps) // 2
    earlier = float(steps[:half].mean())
    return float(steps[-half:].mean()) / earlier if earlier > 0.0 else math.nan


def advice(value: float) -> str:
    """Return what steps of this pace do, and whether the mean is likely to beat the last checkpoint."""
    lengths = f"the later half is {value:.2f} times as long as the earlier"
    if value >= LEVEL:
        return f"they do not shrink ({lengths}), and the mean beat the last in {HELPED[0]} % of such series"
    return (
        f"they shrink ({lengths}), and the mean beat the last in only {HELPED[1]} % of such series; average "
        "fewer, or none"
    )
