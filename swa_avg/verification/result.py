"""What `verify` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from swa_avg.errors import Finding, escape
from swa_avg.files.location import Location
from swa_avg.planning.record import Record
from swa_avg.text import counted, first_few

__all__ = ["Verification"]


@dataclass(frozen=True, repr=False)
class Verification:
    """What `verify` found; its text is one line."""

    output: Location
    """What was compared."""
    inputs: tuple[Location, ...]
    """What it was derived from, in training order."""
    record: Record
    method: str | None
    """The method that gives the coefficients for these inputs; None where the record alone says them."""
    unchecked: tuple[str, ...]
    """Inputs without a digest in the record: whether they have changed since cannot be known."""
    averages: tuple[str, ...]
    """Inputs that are outputs of swa-avg themselves: only their bytes are known, not how they came about."""
    averaged: int
    """Tensors that were averaged again and compared."""
    copied: int
    """Tensors that were compared with the newest input's."""
    copies: tuple[int, ...]
    """Numbers of the inputs that count and hold the weights of the output themselves."""
    refreshed: tuple[str, ...]
    """BatchNorm statistics that are not the inputs' average, since a refresh replaced them."""
    findings: tuple[Finding, ...]
    """What differs."""
    data: str | None = None
    """The data that `refreshed` was derived from again. Without, it cannot be, and only its CRC-32 is
    compared with the record's."""
    off: float = 0.0
    """By how many standard deviations `refreshed` is off what was derived, at the worst channel."""

    @property
    def equal(self) -> bool:
        """Whether the output is what the inputs give."""
        return not self.findings

    def __str__(self) -> str:
        if not self.equal:
            return (
                f"different: {self.output} is not {self._average()}: {counted(len(self.findings), 'finding')}"
            )
        again = f"{counted(self.averaged, 'tensor')} averaged again"
        compared = f"{again}, {self.copied} compared with the newest input's"
        return f"equal{self._statistics()}: {self.output} is {self._average()} ({compared})"

    def _statistics(self) -> str:
        if not self.refreshed:
            return ""
        count = counted(len(self.refreshed), "statistic")
        if self.data is None:
            return f", but for {count} that a refresh replaced and that cannot be derived without its data"
        rounding = f", to {self.off:.1g} standard deviations" if self.off else ""
        return f", with {count} derived again from {self.data}{rounding}"

    def _average(self) -> str:
        count = len(self.inputs)
        used = self.record.used
        if len(used) == 1:
            return f"a copy of {self.inputs[used[0]].name}, no average"
        if self.copies == used:
            return f"a copy of each of {len(used)} checkpoints, whose weights are the same"
        if self.method is not None:
            return f"the {self.method} average of {count} checkpoints"
        coefficients = first_few([f"{entry.coefficient:.6g}" for entry in self.record.inputs])
        return f"the average of {count} checkpoints with the coefficients in its record ({coefficients})"

    def __repr__(self) -> str:
        return f"<Verification: {escape(self)}>"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        again = {}
        if self.data is not None:
            again = {"derived_again": list(self.refreshed), "standard_deviations_off": self.off}
        return {
            "output": str(self.output),
            "equal": self.equal,
            "method": "weights" if self.method is None else self.record.method,
            "inputs": [str(path) for path in self.inputs],
            "averaged": self.averaged,
            "copied": self.copied,
            "by_digest": list(self.refreshed) if self.data is None else [],
            **again,
            "findings": [
                {"path": str(f.path), "subject": f.subject, "problem": f.problem} for f in self.findings
            ],
        }
