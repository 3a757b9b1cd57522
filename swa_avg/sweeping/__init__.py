"""Score single checkpoints and averages of them on validation data, and write the best."""

from swa_avg.sweeping.report import SweepReport
from swa_avg.sweeping.scoring import Validation
from swa_avg.sweeping.search import sweep

__all__ = ["SweepReport", "Validation", "sweep"]
