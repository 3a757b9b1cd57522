"""How the checkpoints of a run follow each other, and what that says of an average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.inspection.advice import advice, pace_of
from swa_avg.inspection.geometry import plane_of, turns_of
from swa_avg.text import number_text

__all__ = ["Movement", "movement_of"]

_FEWEST = 2  # turns


@dataclass(frozen=True)
class Movement:
    """How the checkpoints of one run follow each other."""

    turn: float
    """Mean angle between a step and the next one, degrees: 0 straight on, 90 in a random walk in many
    dimensions, 120 where the checkpoints are scattered about one point, each for itself."""
    share: float
    """Of their scatter about their mean, what is along the main direction."""
    pace: float
    """Mean length of the later half of the steps, relative to the earlier half: what the advice goes by."""
    rates: tuple[float, float] | None
    """Learning rates at the first and at the last checkpoint, where they are known."""

    def __str__(self) -> str:
        return (
            f"steps turn by {self.turn:.0f}° on average, and {100 * self.share:.0f} % of the scatter lies in "
            f"one direction{self._rates()}: {advice(self.pace)}"
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

    None of fewer than four checkpoints, or where none of them moved. The angle tells three cases apart: 0°
    straight on, 90° a random walk, and for independent points about a mean, where (x_1 - x_0)·(x_2 - x_1) is
    -σ², half of the steps' squares, 120°. It does not tell whether an average helps (README); the pace does.

    Args:
        squared: As `Measurement` or `Relation` has them.
        rates: The learning rate at each checkpoint, None where it is not known.
    """
    squared = squared.astype(np.float64)
    turns = turns_of(squared)
    turns = turns[np.isfinite(turns)]
    if len(turns) < _FEWEST:
        return None
    pace = pace_of(np.sqrt(np.diagonal(squared, 1)))
    if not np.isfinite(pace):
        return None
    uniform = np.full(len(squared), 1.0 / len(squared))
    first, last = rates[0], rates[-1]
    known = None if first is None or last is None else (first, last)
    return Movement(float(turns.mean()), plane_of(squared, uniform).explained[0], pace, known)
