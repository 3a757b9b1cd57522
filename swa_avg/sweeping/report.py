"""What a sweep found: every candidate with what it achieved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from swa_avg.batchnorm import RefreshReport
from swa_avg.errors import escape
from swa_avg.files.location import Location
from swa_avg.inputs.related import Relation
from swa_avg.inspection.movement import Movement
from swa_avg.planning.policy import batchnorm_warning
from swa_avg.sweeping.candidates import Candidate
from swa_avg.text import counted, finite_or_none

__all__ = ["Scored", "SweepReport", "rank"]


@dataclass(frozen=True)
class Scored:
    """A candidate and what it achieved."""

    candidate: Candidate
    """Its name, and the coefficient of each checkpoint."""
    metrics: Mapping[str, float]
    """Name -> value on the validation data."""
    refresh: RefreshReport | None
    """What the refresh of its BatchNorm statistics did."""
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


@dataclass(frozen=True, repr=False)
class SweepReport:
    """What `sweep` found; its text is one line."""

    output: Location
    """Where the winner is."""
    checkpoints: tuple[Location, ...]
    """In training order."""
    monitor: str
    """The metric that decides."""
    mode: str
    """`min` or `max`: which of its values are better."""
    singles: tuple[Scored, ...]
    """The checkpoints alone, in training order."""
    averages: tuple[Scored, ...]
    """The other candidates, in the order in which they were tried."""
    winner: Scored
    """What was written: of equals, the average of the most checkpoints."""
    validation: str
    """The validation data."""
    rows: int
    """Of the validation data."""
    digest: str
    """BLAKE2b-256 of these rows."""
    relation: Relation
    """Whether the checkpoints are related."""
    movement: Movement | None = None
    """How the checkpoints follow each other, by the sample that tells whether they are related."""
    other_weights: str | None = None
    """What to know of an optimizer that keeps an average of its own."""
    batchnorm_layers: tuple[str, ...] = ()
    """BatchNorm layers whose statistics are averages of statistics, for want of a refresh."""
    path: tuple[Mapping[str, float], ...] = ()
    """Metrics at points of equal distance from the last checkpoint to the best average."""
    written: bool = False
    """Whether the winner was written."""
    epochs: tuple[int, ...] = ()
    """Of the checkpoints, where a candidate goes by them."""
    notes: tuple[str, ...] = ()
    """What the user may not expect of the order of the checkpoints."""

    @property
    def best_single(self) -> Scored:
        """Of equals, the newest."""
        return min(reversed(self.singles), key=lambda scored: scored.badness)

    @property
    def best_average(self) -> Scored | None:
        """Of equals, the one of the most checkpoints."""
        averages = [scored for scored in reversed(self.averages) if scored.candidate.is_average]
        return min(averages, key=rank, default=None)

    @property
    def improved(self) -> bool:
        """Whether an average is better than every single checkpoint."""
        average = self.best_average
        return average is not None and average.badness < self.best_single.badness

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should look at; `sweep` warns of each."""
        return tuple(self.warnings_naming("refresh=DATA"))

    def warnings_naming(self, refresh: str) -> Iterator[str]:
        """Yield the warnings; `refresh` is how a refresh is asked for."""
        if self.relation.problem is not None:
            yield self.relation.problem
        if self.other_weights is not None:
            yield self.other_weights
        if self.winner.refresh is not None:
            yield from self.winner.refresh.warnings
        elif self.batchnorm_layers and self.winner.candidate.is_average:
            yield batchnorm_warning(self.batchnorm_layers, refresh)
        elif self.batchnorm_layers:
            yield f"BatchNorm was not refreshed: averages may score far better with {refresh}"

    def __str__(self) -> str:
        winner, best = self.winner, self.best_single
        score, alone = (f"{scored.metrics[self.monitor]:.6g}" for scored in (winner, best))
        verb = "wrote" if self.written else "did not write"
        rows = counted(self.rows, "row")
        what = f"{verb} {self.output}: {winner.candidate.name}, {self.monitor} {score} on {rows}"
        if not winner.candidate.is_average:
            return f"{what}; no average is as good"
        relation = "beats" if self.improved else "equals"
        return f"{what}; it {relation} the best single checkpoint, {best.candidate.name} with {alone}"

    def __repr__(self) -> str:
        return f"<SweepReport: {escape(self)}>"

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
            "relation": self.relation.as_json(),
            "movement": None if self.movement is None else self.movement.as_json(),
            "other_weights": self.other_weights,
            "batchnorm_layers": list(self.batchnorm_layers),
            "path": [_finite(point) for point in self.path],
        }
