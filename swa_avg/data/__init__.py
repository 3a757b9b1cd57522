"""Rows and batches of data for refreshing and scoring. Nothing here imports Keras."""

from swa_avg.data.batches import ArrayData, Data
from swa_avg.data.sources import open_data
from swa_avg.data.spec import Purpose, Spec

__all__ = ["ArrayData", "Data", "Purpose", "Spec", "open_data"]
