"""Checkpoints in Keras's formats, written by h5py and zipfile alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Arrays = Mapping[str, np.ndarray]
BFLOAT16 = np.dtype("V2")


def arrays_in(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file, which is closed: whenever else it is, somebody is warned of it."""
    with np.load(path) as file:
        return dict(file)


def weights(seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return a small model's variables: two layers, a BatchNorm and an optimizer."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    return {
        "layers/dense/vars/0": values(7, 5),
        "layers/dense/vars/1": values(5),
        "layers/batch_normalization/vars/0": values(5),
        "layers/batch_normalization/vars/1": values(5),
        "layers/batch_normalization/vars/2": values(5),
        "layers/batch_normalization/vars/3": values(5),
        "optimizer/vars/0": np.int64(seed),
        "optimizer/vars/1": np.float32(0.1),
        "optimizer/vars/2": values(7, 5),
    }


def config(units: int = 5) -> dict[str, Any]:
    return {
        "class_name": "Functional",
        "config": {
            "name": "functional",
            "layers": [
                {"class_name": "Dense", "config": {"name": "dense", "units": units, "dtype": "float32"}},
                {"class_name": "BatchNormalization", "config": {"name": "bn", "dtype": "float32"}},
            ],
        },
        "compile_config": {"optimizer": "adam"},
    }


def write_store(target: Any, arrays: Arrays, **options: Any) -> None:
    """Write variables as Keras 3 does: one contiguous dataset each; bfloat16 (`|V2`) with its tag."""
    with h5py.File(target, "w", **options) as file:
        file.create_group("vars")
        for name, value in arrays.items():
            dataset = file.create_dataset(name, data=value)
            if np.asarray(value).dtype == BFLOAT16:
                dataset.attrs["dtype"] = "bfloat16"


def store_bytes(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    write_store(buffer, arrays)
    return buffer.getvalue()


def write_weights(path: Path, arrays: Arrays) -> Path:
    write_store(path, arrays)
    return path


def write_archive(path: Path, arrays: Arrays, settings: Any = None, **members: bytes) -> Path:
    """Write a `.keras` archive; `members` are further files by name, or replace the usual ones."""
    contents = {
        "metadata.json": json.dumps(
            {"keras_version": "3.15.1", "date_saved": "2026-01-01@00:00:00"}
        ).encode(),
        "config.json": json.dumps(config() if settings is None else settings).encode(),
        "model.weights.h5": store_bytes(arrays),
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (contents | members).items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def write_folder(path: Path, arrays: Arrays, **files: bytes) -> Path:
    """Write a model in a folder; `files` are further files by name, or replace the usual ones."""
    contents = {
        "metadata.json": json.dumps(
            {"keras_version": "3.15.1", "date_saved": "2026-01-01@00:00:00"}
        ).encode(),
        "config.json": json.dumps(config()).encode(),
        "model.weights.h5": store_bytes(arrays),
    }
    for name, data in (contents | files).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_legacy(path: Path, arrays: Arrays, *, full: bool = True, settings: Any = None) -> Path:
    """Write a legacy file; the arrays are named `layer/layer/weight`."""
    with h5py.File(path, "w") as file:
        if full:
            file.attrs["model_config"] = json.dumps(config() if settings is None else settings)
            file.attrs["training_config"] = json.dumps({"loss": "mse"})
        root = file.create_group("model_weights") if full else file
        layers: dict[str, list[str]] = {}
        for name in arrays:
            layers.setdefault(name.split("/")[0], []).append(name.split("/", 1)[1])
        root.attrs["layer_names"] = [name.encode() for name in layers]
        for layer, names in layers.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                group.create_dataset(name, data=arrays[f"{layer}/{name}"])
    return path


def write_sharded(path: Path, arrays: Arrays) -> Path:
    """Write a `.weights.json` and two shards, each with every other variable."""
    base = path.name.removesuffix(".weights.json")
    weight_map: dict[str, list[str]] = {}
    for index in range(2):
        shard = f"{base}_{index:05}.weights.h5"
        part = {name: value for position, (name, value) in enumerate(arrays.items()) if position % 2 == index}
        write_store(path.with_name(shard), part)
        for name in part:
            where = weight_map.setdefault("/" + name.rpartition("/")[0], [])
            if shard not in where:
                where.append(shard)
    path.write_text(json.dumps({"metadata": {"total_size": 1.0}, "weight_map": weight_map}))
    return path
