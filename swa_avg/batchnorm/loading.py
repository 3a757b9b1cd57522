"""Checkpoints as live Keras models."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swa_avg.batchnorm.complaints import keras_reason, unknown_class
from swa_avg.data.user_functions import import_function, import_module, names_function
from swa_avg.errors import SwaAvgError, UsageError, escape
from swa_avg.files.location import local_copy
from swa_avg.files.untrusted_json import parse_json
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.planning.policy import has_lambda

__all__ = ["Loading", "check_model", "check_request", "load_model", "load_weights", "quiet_import"]

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
    if newest.weights_path is None:
        raise UsageError(
            f"{newest.path.name} is a preset of a task, which {purpose} cannot load: average without it, "
            "load the average with KerasHub, and call swa_avg.refresh_batchnorm"
        )
    if newest.config is None and loading.model is None:
        raise UsageError(
            f"{newest.path.name} holds weights alone: {purpose} needs --model, a .keras file, a JSON "
            "configuration or MODULE:FUNCTION"
        )
    if loading.model is None and not loading.unsafe and _holds_code(newest, compiled=compiled):
        raise UsageError(_TRUST.format(newest.path.name))


@contextmanager
def quiet_import() -> Iterator[None]:
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
    with quiet_import():
        import keras
    for module in loading.imports:
        import_module(module)
    if isinstance(loading.model, str | Path):
        with _complaints_named(Path(loading.model).name, _hints(loading, _writer(loading.model), compiled)):
            model = _build(str(loading.model), loading, keras, compiled=compiled)
    else:
        model = loading.model
    with _complaints_named(checkpoint.path.name, _hints(loading, checkpoint.writer, compiled)):
        if checkpoint.config is not None and model is None:
            path = _path_for_keras(checkpoint)
            return keras.models.load_model(path, compile=compiled, safe_mode=not loading.unsafe)
        check_model(model)
        model.load_weights(_path_for_keras(checkpoint, weights=True))
    return model


def load_weights(model: Any, checkpoint: Checkpoint) -> None:
    """Give a live model the weights of a checkpoint of ours.

    Raises:
        UsageError: they are not this model's.
    """
    with _complaints_named(checkpoint.path.name, _hints(Loading(), None, False)):
        model.load_weights(_path_for_keras(checkpoint, weights=True))


def check_model(model: Any) -> None:
    """Raise UsageError unless `model` is one of Keras 3."""
    import keras

    if isinstance(model, keras.Model):
        return
    found = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
    hint = ""
    if any(kind.__module__.startswith(("tf_keras.", "keras.src.legacy.")) for kind in type(model).__mro__):
        hint = (
            "; import keras, not tf_keras, unset TF_USE_LEGACY_KERAS, and load what tf_keras saved by "
            "load_weights; files that it saved can be averaged"
        )
    raise UsageError(f"expected a model of Keras {keras.__version__}, found {found}{hint}")


def _path_for_keras(checkpoint: Checkpoint, *, weights: bool = False) -> Path:
    """Return a name from which Keras sees which format it is: it takes any `.keras` for an archive."""
    path = local_copy((weights and checkpoint.weights_path) or checkpoint.path)
    if not checkpoint.is_legacy or path.suffix in (".h5", ".hdf5"):
        return path
    link = path.with_name(f"{path.name}.h5")
    if not link.exists():
        link.symlink_to(path.name)
    return link


@contextmanager
def _complaints_named(source: str, hint: Callable[[str], str]) -> Iterator[None]:
    """Turn Keras's complaints about what it loads into ours; `hint` says what to do about a reason."""
    try:
        yield
    except SwaAvgError:
        raise
    except Exception as error:  # which may be anything: IndexError, say, for models of Keras 2 in each other
        reason = keras_reason(error)
        raise UsageError(escape(f"Keras cannot load {source} ({reason}); {hint(reason)}")) from error


def _hints(loading: Loading, writer: str | None, compiled: bool) -> Callable[[str], str]:
    """Return what says what to do about a reason for which Keras cannot load something."""

    def hint(reason: str) -> str:
        if writer is not None and re.match(r"(tf_)?keras 2\.", writer, re.IGNORECASE):
            return f"{writer} wrote it: build the model with Keras 3 in a function, --model MODULE:FUNCTION"
        unknown = unknown_class(reason)
        if unknown is None:
            return "name a function that builds a model with these layers, --model MODULE:FUNCTION"
        first = f"name the module that registers {unknown}, --import MODULE"
        if loading.imports:
            first = f"register {unknown} in it by @keras.saving.register_keras_serializable()"
        last = "or a function that builds the model, --model MODULE:FUNCTION"
        metric = "; for a loss or a metric, --metric MODULE:FUNCTION" if compiled else ""
        return f"{first}, {last}{metric}"

    return hint


def _writer(source: str | Path) -> str | None:
    """Return what wrote a JSON configuration."""
    path = Path(source)
    if path.suffix != ".json" or not path.is_file():
        return None
    version = parse_json(path.read_bytes(), path, "the configuration").get("keras_version")
    return f"Keras {version}" if isinstance(version, str) else None


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
    return has_lambda([checkpoint.config, checkpoint.training_config if compiled else None])
