"""What a sweep found: every candidate with what it achieved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from swa_avg.batchnorm import RefreshReport
from swa_avg.sweeping.candidates import Candidate

__all__ = ["Scored", "SweepReport", "rank"]


@dataclass(frozen=True)
class Scored:
    """A candidate and what it achieved."""

    candidate: Candidate
    metrics: Mapping[str, float]
    refresh: RefreshReport | None
    badness: float
    """The deciding metric such that less is better, infinite for NaN."""


def rank(scored: Scored) -> tuple[float, int]:
    """Return a sort key: the better first, and of equals the average of the most checkpoints."""
    return scored.badness, -len(scored.candidate.used)


@dataclass(frozen=True)
class SweepReport:
    """What `sweep` found."""

    output: Path
    checkpoints: tuple[Path, ...]
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
