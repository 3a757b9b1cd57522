"""What a sweep found: every candidate with what it achieved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swa_avg.batchnorm import RefreshReport
from swa_avg.files.location import Location
from swa_avg.sweeping.candidates import Candidate
from swa_avg.text import finite_or_none

__all__ = ["Scored", "SweepReport", "rank"]


@dataclass(frozen=True)
class Scored:
    """A candidate and what it achieved."""

    candidate: Candidate
    metrics: Mapping[str, float]
    refresh: RefreshReport | None
    badness: float
    """The deciding metric such that less is better, infinite for NaN."""

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        return {
            "name": self.candidate.name,
            "coefficients": list(self.candidate.coefficients),
            "metrics": _finite(self.metrics),
            "refresh": None if self.refresh is None else self.refresh.as_json(),
        }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON can hold them: what is not finite becomes None."""
    return {name: finite_or_none(value) for name, value in metrics.items()}


def rank(scored: Scored) -> tuple[float, int]:
    """Return a sort key: the better first, and of equals the average of the most checkpoints."""
    return scored.badness, -len(scored.candidate.used)


@dataclass(frozen=True)
class SweepReport:
    """What `sweep` found."""

    output: Location
    checkpoints: tuple[Location, ...]
    """In training order."""
    monitor: str
    """The metric that decides."""
    mode: str
    singles: tuple[Scored, ...]
    """The checkpoints alone, in training order."""
    averages: tuple[Scored, ...]
    winner: Scored
    """What was written: of equals, the average of the most checkpoints."""
    validation: str
    """The validation data."""
    rows: int
    """Of the validation data."""
    digest: str
    """BLAKE2b-256 of these rows."""
    batchnorm_layers: tuple[str, ...] = ()
    """BatchNorm layers whose statistics are averages of statistics, for want of a refresh."""
    path: tuple[Mapping[str, float], ...] = ()
    """Metrics at points of equal distance from the last checkpoint to the best average."""
    written: bool = False
    """Whether the winner was written."""

    @property
    def best_single(self) -> Scored:
        """Of equals, the newest."""
        return min(reversed(self.singles), key=lambda scored: scored.badness)

    @property
    def best_average(self) -> Scored | None:
        averages = [scored for scored in reversed(self.averages) if scored.candidate.is_average]
        return min(averages, key=rank, default=None)

    @property
    def improved(self) -> bool:
        """Whether an average is better than every single checkpoint."""
        average = self.best_average
        return average is not None and average.badness < self.best_single.badness

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types; numbers that are not finite become null."""
        return {
            "output": str(self.output),
            "written": self.written,
            "monitor": self.monitor,
            "mode": self.mode,
            "rows": self.rows,
            "checkpoints": [str(path) for path in self.checkpoints],
            "singles": [scored.as_json() for scored in self.singles],
            "averages": [scored.as_json() for scored in self.averages],
            "winner": self.winner.candidate.name,
            "best_single": self.best_single.candidate.name,
            "improved": self.improved,
            "batchnorm_layers": list(self.batchnorm_layers),
            "path": [_finite(point) for point in self.path],
        }
