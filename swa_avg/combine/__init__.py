"""Plan -> averaged bytes: exact, in bounded memory, by threads or on a cluster."""

from swa_avg.combine.combiner import Combiner
from swa_avg.combine.spill import Spill
from swa_avg.combine.workers import Workers, open_workers

__all__ = ["Combiner", "Spill", "Workers", "open_workers"]
