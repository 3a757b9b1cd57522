"""Refresh the BatchNorm statistics in a checkpoint file, and nothing else in it."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_avg.batchnorm.statistics import RefreshedStatistics
from swa_avg.data.spec import ARGUMENTS, TRAINING
from swa_avg.data.user_functions import import_function, import_module, names_function
from swa_avg.errors import Finding, MismatchError, SwaAvgError, UsageError, first_line
from swa_avg.files.untrusted_json import parse_json
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.formats.bare import LEGACY_MODEL, LEGACY_WEIGHTS, Hdf5Checkpoint
from swa_avg.planning.policy import has_lambda

if TYPE_CHECKING:
    from swa_avg.batchnorm.elsewhere import Elsewhere
    from swa_avg.combine.cluster import Cluster
    from swa_avg.text import Progress

__all__ = [
    "Loading",
    "Refresh",
    "check_request",
    "load_model",
    "load_weights",
    "refresh_loaded",
    "refreshed_statistics",
    "without_greeting",
]

_TRUST = "{} holds a Lambda layer, which is code: add --unsafe if you trust who wrote it"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a checkpoint becomes a live model."""

    model: Any = None
    """For weights alone: a `.keras` file, a JSON configuration, or `MODULE:FUNCTION` that returns the model;
    or, for a refresh alone, a live Keras model, which gets the averaged weights and their statistics."""
    imports: Sequence[str] = ()
    """Modules that register the model's own classes with Keras."""
    unsafe: bool = False
    """Load Lambda layers: run code that the checkpoint holds."""


@dataclass(frozen=True)
class Refresh(Loading):
    """What a refresh of a checkpoint is asked to do; see `refresh_batchnorm` for the first six."""

    data: Any
    """What `refresh_batchnorm` takes."""
    inputs: Sequence[str] = ()
    batch_size: int | None = None
    samples: int | None = None
    estimator: str = "pooled"
    seed: int = 0
    preprocess: str | None = None
    """`MODULE:FUNCTION`, applied to each batch."""


def check_request(
    loading: Loading, newest: Checkpoint, purpose: str = "--bn-refresh", *, compiled: bool = False
) -> None:
    """Find out, before anything is read, what would keep the model from being loaded for a purpose.

    `compiled` as for `load_model`.

    Raises:
        UsageError: Keras is not installed, weights alone come without a model, or the model holds code.
    """
    if importlib.util.find_spec("keras") is None:
        raise UsageError(f"{purpose} needs Keras: pip install 'swa-avg[tensorflow]'")
    if newest.config is None and loading.model is None:
        raise UsageError(
            f"{newest.path.name} holds weights alone: {purpose} needs --model, a .keras file, a JSON "
            "configuration or MODULE:FUNCTION"
        )
    if loading.model is None and not loading.unsafe and _holds_code(newest, compiled=compiled):
        raise UsageError(_TRUST.format(newest.path.name))


def refreshed_statistics(
    draft: Checkpoint, refresh: Refresh, progress: Progress | None, processes: Cluster | None
) -> RefreshedStatistics:
    """Return the re-estimated BatchNorm statistics of the average `draft`.

    Batches run in `processes`, such as the workers of a cluster, where there are any.

    Raises:
        UsageError: the model cannot be loaded as it was asked for.
        UnreadableError: the data cannot be used.
        MismatchError: Keras does not give back the weights that it loaded.
    """
    model = load_model(draft, refresh)
    if processes is None:
        return refresh_loaded(model, draft, refresh, progress)
    from swa_avg.batchnorm.elsewhere import BatchWorker, Elsewhere

    worker = BatchWorker.of(draft, refresh)
    if worker is not None:
        elsewhere = Elsewhere(processes, worker)
        return refresh_loaded(model, draft, refresh, progress, elsewhere)
    statistics = refresh_loaded(model, draft, refresh, progress)
    note = "refreshed on this machine alone, since its memory holds the data or the model"
    report = replace(statistics.report, notes=(*statistics.report.notes, note))
    return replace(statistics, report=report)


def refresh_loaded(
    model: Any,
    checkpoint: Checkpoint,
    refresh: Refresh,
    progress: Progress | None,
    elsewhere: Elsewhere | None = None,
) -> RefreshedStatistics:
    """Refresh a model that has the weights of `checkpoint`; errors as for `refreshed_statistics`.

    Keras saves the model's weights before and after the refresh, beside the checkpoint; what differs between
    the two are the statistics, and where the first does not say what the checkpoint says, nothing is trusted.
    """
    from swa_avg.batchnorm.refresh import refresh_batchnorm

    scratch = checkpoint.path.parent
    with closing(_saved(model, checkpoint, scratch / "before")) as before:
        report = refresh_batchnorm(
            model,
            refresh.data,
            estimator=refresh.estimator,
            batch_size=refresh.batch_size,
            samples=refresh.samples,
            seed=refresh.seed,
            inputs=refresh.inputs,
            preprocess=import_function(refresh.preprocess) if refresh.preprocess else None,
            progress=progress,
            elsewhere=elsewhere,
            purpose=TRAINING if isinstance(refresh.model, str | Path | None) else ARGUMENTS,
        )
        with closing(_saved(model, checkpoint, scratch / "after")) as after:
            return RefreshedStatistics(_changed(checkpoint, before, after), report)


@contextmanager
def without_greeting() -> Iterator[None]:
    """Keep what TensorFlow's libraries print while Keras is imported off standard error."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        import keras  # noqa: F401

        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def load_model(checkpoint: Checkpoint, loading: Loading, *, compiled: bool = False) -> Any:
    """Return a checkpoint of ours as a live model, by Keras with its safe mode on.

    With `compiled`, as it was compiled when it was saved, if it was.

    Raises:
        UsageError: it cannot be loaded as it was asked for.
    """
    with without_greeting():
        import keras
    for module in loading.imports:
        import_module(module)
    with _complaints_named():
        if checkpoint.config is not None and loading.model is None:
            return keras.models.load_model(checkpoint.path, compile=compiled, safe_mode=not loading.unsafe)
        model = loading.model
        if isinstance(model, str | Path):
            model = _build(str(model), loading, keras, compiled=compiled)
        model.load_weights(checkpoint.path)
    return model


def load_weights(model: Any, checkpoint: Checkpoint) -> None:
    """Give a live model the weights of a checkpoint of ours.

    Raises:
        UsageError: they are not this model's.
    """
    with _complaints_named():
        model.load_weights(checkpoint.path)


@contextmanager
def _complaints_named() -> Iterator[None]:
    """Turn Keras's complaints about what it loads into ours."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, ImportError, KeyError, OSError) as error:
        if isinstance(error, SwaAvgError):
            raise
        raise UsageError(
            f"Keras cannot load the model ({first_line(error)}); its own classes come with --import MODULE"
        ) from error


def _build(source: str, loading: Loading, keras: Any, *, compiled: bool) -> Any:
    path = Path(source)
    if not path.exists() and names_function(source):
        return import_function(source)()
    if path.suffix == ".json":
        text = path.read_text("utf-8")
        if "Lambda" in text and not loading.unsafe:
            raise UsageError(
                f"{path} may hold a Lambda layer, which is code: add --unsafe if you trust who wrote it"
            )
        return keras.models.model_from_json(text)
    if not zipfile.is_zipfile(path):
        with closing(open_checkpoint(path)) as checkpoint:
            if not loading.unsafe and _holds_code(checkpoint, compiled=compiled):
                raise UsageError(_TRUST.format(path))
    return keras.models.load_model(path, compile=compiled, safe_mode=not loading.unsafe)


def _holds_code(checkpoint: Checkpoint, *, compiled: bool) -> bool:
    """Tell whether loading a model would run code of the file's, its compile settings included if asked.

    In a legacy file those, like its layers, are no concern of Keras's safe mode (CVE-2025-9905); in an
    archive they are.
    """
    settings = checkpoint.training_config if compiled and isinstance(checkpoint, Hdf5Checkpoint) else b""
    parsed = parse_json(settings, checkpoint.path, "training_config") if settings else None
    return has_lambda([checkpoint.config, parsed])


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
