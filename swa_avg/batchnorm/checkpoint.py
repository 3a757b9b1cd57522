"""Refresh the BatchNorm statistics in a checkpoint file, and nothing else in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_avg.batchnorm.distributed import BatchWorker, Distributed
from swa_avg.batchnorm.loading import load_model
from swa_avg.batchnorm.measure import Workers
from swa_avg.batchnorm.places import Places, find_places
from swa_avg.batchnorm.refresh import refresh_model
from swa_avg.batchnorm.request import Refresh
from swa_avg.batchnorm.statistics import RefreshedStatistics
from swa_avg.data.spec import ARGUMENTS, TRAINING
from swa_avg.formats import Checkpoint
from swa_avg.text import Progress

if TYPE_CHECKING:
    from swa_avg.combine.cluster import Cluster

__all__ = ["refresh_loaded", "refreshed_statistics"]


def refreshed_statistics(
    draft: Checkpoint, refresh: Refresh, progress: Progress | None, processes: Cluster | None
) -> RefreshedStatistics:
    """Return the re-estimated BatchNorm statistics of the average `draft`.

    Batches run in `processes`, such as the workers of a cluster, where there are any.

    Raises:
        UsageError: the model cannot be loaded as it was asked for.
        UnreadableError: the data cannot be used.
        MismatchError: the model holds other values than the draft, or a statistic has no place in it.
    """
    model = load_model(draft, refresh)
    places = find_places(model, draft)
    if processes is None:
        return refresh_loaded(model, draft, refresh, places, progress)
    worker = BatchWorker.of(draft, refresh)
    if worker is not None:
        return refresh_loaded(model, draft, refresh, places, progress, Distributed(processes, worker))
    statistics = refresh_loaded(model, draft, refresh, places, progress)
    note = "refreshed on this machine alone, since its memory holds the data or the model"
    report = replace(statistics.report, notes=(*statistics.report.notes, note))
    return replace(statistics, report=report)


def refresh_loaded(
    model: Any,
    checkpoint: Checkpoint,
    refresh: Refresh,
    places: Places,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> RefreshedStatistics:
    """Refresh a model that has the weights of `checkpoint`; errors as for `refreshed_statistics`.

    `places` are those of the model's statistics in checkpoints of this layout.
    """
    purpose = TRAINING if isinstance(refresh.model, str | Path | None) else ARGUMENTS
    before = places.values(checkpoint)
    report = refresh_model(model, refresh, purpose=purpose, progress=progress, workers=workers)
    after = places.values(checkpoint)
    return RefreshedStatistics({name: after[name] for name in after if after[name] != before[name]}, report)
