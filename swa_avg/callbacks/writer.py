"""Write one model again and again: through Keras first, then at the cost of its bytes."""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import keras
import numpy as np
from isal.isal_zlib import crc32

from swa_avg.callbacks.snapshot import value_of
from swa_avg.combine.drafts import DraftFolder
from swa_avg.errors import SwaAvgError
from swa_avg.files.region import Region
from swa_avg.formats import Checkpoint, Tensor, open_checkpoint
from swa_avg.formats.base import Buffer, Settings

try:
    from keras.src.saving import saving_lib
    from keras.src.saving.saving_lib import DiskIOStore, H5IOStore
except ImportError:  # a Keras that keeps them elsewhere: it then writes every file itself
    DiskIOStore = H5IOStore = object

__all__ = ["ModelWriter"]

_WEIGHTS_SUFFIX = ".weights.h5"
_KERAS_OWN = ("save", "save_weights")


class ModelWriter:
    """Writes what `model.save` or `model.save_weights` would write, byte for byte, dates apart.

    To save, Keras walks through the model and hands its variables, group by group, to a store, which writes
    them with h5py. libhdf5 places them by their order, names, shapes and dtypes, and nothing that it writes
    beside them depends on their values or on the clock. Two saves in which the store is handed the same list
    thus give files that are equal outside the values. So the first file goes through Keras. From then on,
    Keras walks for a store that only notes what it is handed, and if that is the list of the file before, the
    new file is the bytes of that one, which are kept in memory, with other values in the extents. Whatever a
    layer computes as it is saved, such as merged LoRA factors, it computes anew each time. If the list is
    another one, Keras writes, and the layout is learnt again.

    Keras's internals, which may change, are not trusted in this: a layout counts as learnt only if what was
    noted gives, bit for bit, the file that Keras has just written. Where it does not, where a layer saves
    assets, where a model's class saves in a way of its own, and where a Keras has no such internals, Keras
    writes every file.
    """

    def __init__(self) -> None:
        self._layout: list[Any] = []
        self._template: Checkpoint | None = None

    def write(self, model: Any, path: Path) -> None:
        """Write a model to a new file, with the values that its variables have on this thread."""
        store = _Store()
        settings = store.note(model, whole=not path.name.endswith(_WEIGHTS_SUFFIX))
        if self._template is not None and store.handed == self._layout:
            with DraftFolder(path) as folder:
                self._template.write_again(store.value, settings, folder)
        else:
            self._template = None
            _write_with_keras(model, path)
            if store.handed:
                self._learn(store, settings, path)

    def _learn(self, store: _Store, settings: Settings | None, path: Path) -> None:
        """Keep the layout of a file that Keras has written, if it is what `store` was handed."""
        try:
            with closing(open_checkpoint(path)) as written:
                stream = written.refilled(store.value)
                same = (
                    written.tensors.keys() == store.values.keys()
                    and written.holds(settings)
                    and all(_holds(shard, stream(index)) for index, shard in enumerate(written.shards))
                )
        except (SwaAvgError, KeyError, TypeError, ValueError):
            return
        if same:
            self._layout, self._template = store.handed, written


def _holds(shard: Region, chunks: Iterable[Buffer]) -> bool:
    size = checksum = 0
    for chunk in chunks:
        size += len(chunk)
        checksum = crc32(chunk, checksum)
    return (size, checksum) == (shard.size, shard.checksum())


class _Store(H5IOStore):  # type: ignore[misc]
    """Stands for the file that Keras hands a model's variables to, and notes them."""

    def __init__(self) -> None:
        self.handed: list[Any] = []
        """The groups, each with its path and attributes, and the name, shape and dtype of each variable."""
        self._path = ""
        self.values: dict[str, Any] = {}
        """By the name of the tensor, variables and arrays."""

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: Any = None) -> _Store:
        self._path = f"{path}/vars/" if path else "vars/"
        self.handed.append((self._path, metadata))
        return self

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(value, keras.Variable):
            value = keras.ops.convert_to_numpy(value)
        name = self._path + key
        self.values[name] = value
        self.handed.append((name, tuple(value.shape), str(value.dtype)))

    def value(self, tensor: Tensor) -> memoryview:
        """Return the bytes of a variable."""
        value = self.values[tensor.name]
        if isinstance(value, keras.Variable):
            value = value_of(value)
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data

    def note(self, model: Any, *, whole: bool) -> Settings | None:
        """Take what Keras hands over of a model; with `whole`, return what else it saves.

        Nothing counts as handed over where this is not all that it saves, or where this fails.
        """
        try:
            if any(getattr(model, name).__func__ is not getattr(keras.Model, name) for name in _KERAS_OWN):
                return None
            assets = _NoAssets() if whole else None
            saving_lib._save_state(model, self, assets, "", set())
            if whole:
                return Settings(*map(str.encode, saving_lib._serialize_model_as_json(model)))
        except Exception:  # of a layer's own code, or since Keras has changed: Keras's own way tells
            self.handed = []
        return None


class _NoAssets(DiskIOStore):  # type: ignore[misc]
    """Stands for the folder that Keras has layers put assets in."""

    def __init__(self) -> None:
        pass

    def make(self, path: str) -> str:
        raise NotImplementedError("a layer saves assets")


class _Buffer(io.BytesIO):
    """Memory that Keras takes for the path of a weights file.

    HDF5 that writes to a path and meets a full disk takes the interpreter down as it exits; memory does not
    get full that way.
    """

    def __str__(self) -> str:
        return f"memory{_WEIGHTS_SUFFIX}"


def _write_with_keras(model: Any, path: Path) -> None:
    if not path.name.endswith(_WEIGHTS_SUFFIX):
        model.save(path)
    else:
        weights = _Buffer()
        model.save_weights(weights)
        path.write_bytes(weights.getbuffer())
