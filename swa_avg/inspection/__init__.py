"""What is inside checkpoints, whether they fit, and how they lie to each other."""

from swa_avg.inspection.report import Inspection
from swa_avg.inspection.survey import inspect_checkpoints

__all__ = ["Inspection", "inspect_checkpoints"]
