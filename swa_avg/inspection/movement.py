"""How the checkpoints of a run follow each other, and whether their mean is likely to beat the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.inspection.geometry import plane_of, turns_of
from swa_avg.text import number_text

__all__ = ["HELPED", "LEVEL", "Movement", "movement_of", "pace"]

LEVEL = 0.8
HELPED = (78, 34)
"""% of the recorded series, from this pace on and below, whose mean had a lower loss on test data than their
last checkpoint: from scripts/evidence.jsonl, by scripts/evidence_tables.py."""
_FEWEST = 2  # turns, in the shortest series that the rule was drawn from


@dataclass(frozen=True)
class Movement:
    """How the checkpoints of one run follow each other."""

    turn: float
    """Mean angle between a step and the next one, degrees: 0 straight on, 90 in a random walk in many
    dimensions, 120 where the checkpoints are scattered about one point, each for itself. (For independent
    points about a mean, (x_1 - x_0)·(x_2 - x_1) is -σ², half of the steps' squares.)"""
    share: float
    """Of their scatter about their mean, what is along the main direction."""
    pace: float
    """Mean length of the later half of the steps, relative to the earlier half; see `pace`."""
    rates: tuple[float, float] | None
    """Learning rates at the first and at the last checkpoint, where they are known."""

    def __str__(self) -> str:
        return (
            f"steps turn by {self.turn:.0f}° on average, {100 * self.share:.0f} % of the scatter lies in one "
            f"direction, and the later steps are {self.pace:.2f} times as long as the earlier"
            f"{self._rates()}: {self._consequence()}"
        )

    def _consequence(self) -> str:
        if self.pace >= LEVEL:
            return f"the mean beat the last in {HELPED[0]} % of the recorded series whose steps do not shrink"
        return (
            f"the mean beat the last in only {HELPED[1]} % of the recorded series whose steps shrink; "
            "average fewer, or start with a higher constant rate"
        )

    def _rates(self) -> str:
        if self.rates is None:
            return ""
        first, last = map(number_text, self.rates)
        return f", at a learning rate of {first}" + (f" to {last}" if last != first else "")

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        return {
            "turn": self.turn,
            "share": self.share,
            "pace": self.pace,
            "rates": self.rates,
            "text": str(self),
        }


def movement_of(squared: NDArray[Any], rates: Sequence[float | None]) -> Movement | None:
    """Return what squared distances, float[checkpoints, checkpoints] in training order, say of a run.

    None of fewer than four checkpoints, or where none of them moved.

    Args:
        squared: As `Measurement` or `Relation` has them.
        rates: The learning rate at each checkpoint, None where it is not known.
    """
    squared = squared.astype(np.float64)
    turns = turns_of(squared)
    turns = turns[np.isfinite(turns)]
    measured = pace(np.sqrt(np.diagonal(squared, 1)))
    if len(turns) < _FEWEST or not np.isfinite(measured):
        return None
    uniform = np.full(len(squared), 1.0 / len(squared))
    first, last = rates[0], rates[-1]
    known = None if first is None or last is None else (first, last)
    return Movement(float(turns.mean()), plane_of(squared, uniform).explained[0], measured, known)


def pace(steps: NDArray[np.float64]) -> float:
    """Return the mean length of the later half of the steps, relative to the earlier half; NaN at rest.

    About 1 while the learning rate is kept up: checkpoints go round a place or move on evenly, and their
    mean takes out the noise of the steps. Less where the rate decays, or the run comes to rest: the last
    checkpoint has left the noise behind, and the mean goes back to it.

    Args:
        steps: float64[2 or more], distances between neighbours, in training order; the middle one of an odd
            number belongs to neither half.
    """
    half = len(steps) // 2
    earlier = float(steps[:half].mean()) if half else 0.0
    return float(steps[-half:].mean()) / earlier if earlier > 0.0 else float("nan")
