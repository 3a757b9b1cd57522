"""What is inside checkpoints, whether they fit, and how they lie to each other."""

from swa_avg.inspection.survey import Inspection, inspect_checkpoints

__all__ = ["Inspection", "inspect_checkpoints"]
