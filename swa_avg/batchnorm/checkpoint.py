"""Refresh the BatchNorm statistics in a checkpoint file, and nothing else in it."""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_avg.batchnorm.distributed import BatchWorker, Distributed
from swa_avg.batchnorm.loading import load_model
from swa_avg.batchnorm.measure import Workers
from swa_avg.batchnorm.refresh import refresh_model
from swa_avg.batchnorm.request import Refresh
from swa_avg.batchnorm.statistics import RefreshedStatistics
from swa_avg.data.spec import ARGUMENTS, TRAINING
from swa_avg.errors import Finding, MismatchError
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.formats.bare import LEGACY_MODEL, LEGACY_WEIGHTS
from swa_avg.text import Progress

if TYPE_CHECKING:
    from swa_avg.combine.workers import Crew

__all__ = ["refresh_loaded", "refreshed_statistics"]


def refreshed_statistics(
    draft: Checkpoint, refresh: Refresh, progress: Progress | None, crew: Crew
) -> RefreshedStatistics:
    """Return the re-estimated BatchNorm statistics of the average `draft`.

    Batches run on the workers of a cluster, where there is one.

    Raises:
        UsageError: the model cannot be loaded as it was asked for.
        UnreadableError: the data cannot be used.
        MismatchError: Keras does not give back the weights that it loaded.
    """
    model = load_model(draft, refresh)
    if not crew.together:
        return refresh_loaded(model, draft, refresh, progress)
    worker = BatchWorker.of(draft, refresh)
    if worker is not None:
        workers = Distributed(crew.executor, worker, crew.threads)
        return refresh_loaded(model, draft, refresh, progress, workers)
    statistics = refresh_loaded(model, draft, refresh, progress)
    note = "refreshed on this machine alone, since its memory holds the data or the model"
    report = replace(statistics.report, notes=(*statistics.report.notes, note))
    return replace(statistics, report=report)


def refresh_loaded(
    model: Any,
    checkpoint: Checkpoint,
    refresh: Refresh,
    progress: Progress | None,
    workers: Workers | None = None,
) -> RefreshedStatistics:
    """Refresh a model that has the weights of `checkpoint`; errors as for `refreshed_statistics`.

    Keras saves the model's weights before and after the refresh, beside the checkpoint; what differs between
    the two are the statistics, and where the first does not say what the checkpoint says, nothing is trusted.
    """
    scratch = checkpoint.path.parent
    purpose = TRAINING if isinstance(refresh.model, str | Path | None) else ARGUMENTS
    with closing(_saved(model, checkpoint, scratch / "before")) as before:
        report = refresh_model(model, refresh, purpose=purpose, progress=progress, workers=workers)
        with closing(_saved(model, checkpoint, scratch / "after")) as after:
            return RefreshedStatistics(_changed(checkpoint, before, after), report)


def _saved(model: Any, checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """Save the model's weights so that the tensors are named as in `checkpoint`, and open them."""
    if checkpoint.kind in (LEGACY_MODEL, LEGACY_WEIGHTS):
        path = path.with_suffix(".h5")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras calls its own format legacy
            model.save(path, include_optimizer=False)
    else:
        path = path.with_suffix(".weights.h5")
        model.save_weights(path)
    return open_checkpoint(path)


def _changed(checkpoint: Checkpoint, before: Checkpoint, after: Checkpoint) -> dict[str, bytes]:
    values = {}
    findings = []
    stored = {_common_name(name): name for name in before.tensors}
    for name, tensor in checkpoint.tensors.items():
        if tensor.role != "weight":
            continue
        twin = stored.get(_common_name(name))
        if twin is None or _bytes(before, twin) != _bytes(checkpoint, name):
            problem = "this Keras stores it in another way than the one that wrote the checkpoint"
            findings.append(Finding(checkpoint.path, name, problem))
        elif (new := _bytes(after, twin)) != _bytes(before, twin):
            values[name] = new
    if findings:
        raise MismatchError(findings[:10])
    return values


def _common_name(name: str) -> str:
    """Return a tensor's name without what versions and layouts add: Keras 2's `:0`, a full model's group."""
    return name.removeprefix("model_weights/").removesuffix(":0")


def _bytes(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    return checkpoint.shards[tensor.shard].read(tensor.offset, tensor.nbytes)
