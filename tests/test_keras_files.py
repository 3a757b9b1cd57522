"""Averages of what real Keras writes, loaded back by the Keras that wrote it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import makers
import oracle
from swa_avg import average

pytestmark = pytest.mark.keras

PROCESS = Path(__file__).with_name("keras_process.py")
SUFFIXES = {
    "keras": ".keras",
    "weights": ".weights.h5",
    "legacy": ".h5",
    "legacy-weights": "_w.h5",
    "sharded": ".weights.json",
}
WRITERS = {
    "tensorflow": {"KERAS_BACKEND": "tensorflow"},
    "jax": {"KERAS_BACKEND": "jax"},
    "tf_keras": {"SWA_AVG_TEST_KERAS": "tf_keras"},
}


def _keras(writer: str, *arguments: object) -> None:
    environment = {**os.environ, **WRITERS[writer], "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(PROCESS), *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.fixture(scope="module", params=list(WRITERS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    needed = {"tensorflow": "tensorflow", "jax": "jax", "tf_keras": "tf_keras"}[request.param]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    folder = tmp_path_factory.mktemp(request.param)
    _keras(request.param, "write", folder)
    return Run(request.param, folder)


class Run:
    """Every model, its checkpoints, and its averages as Keras loads them."""

    def __init__(self, writer: str, folder: Path) -> None:
        self.writer = writer
        self.folder = folder
        self.cases: dict[tuple[str, str, str], Path] = {}
        for model in sorted(path.name for path in folder.iterdir()):
            for kind, suffix in SUFFIXES.items():
                inputs = self.inputs(model, kind)
                if not all(path.exists() for path in inputs) or (model, kind) == ("lora", "legacy"):
                    continue
                untagged = "bfloat16" if self._has_untagged(inputs[0], kind) else None
                for optimizer in ("keep", "drop"):
                    output = folder / model / f"swa_{optimizer}{suffix}"
                    average(inputs, output, optimizer=optimizer, dtype=untagged)
                    self.cases[model, kind, optimizer] = output
        request = folder / "request.json"
        loads = {(model, kind, str(path)) for (model, kind, _), path in self.cases.items()}
        loads |= {(model, kind, str(self.inputs(model, kind)[-1])) for model, kind, _ in self.cases}
        request.write_text(json.dumps(sorted(loads)))
        _keras(writer, "load", request)

    def inputs(self, model: str, kind: str) -> list[Path]:
        return [self.folder / model / f"ckpt_{number}{SUFFIXES[kind]}" for number in (1, 2, 10)]

    def _has_untagged(self, path: Path, kind: str) -> bool:
        arrays = oracle.read_arrays(path).values()
        return kind in ("weights", "legacy-weights") and any(a.dtype == np.dtype("V2") for a in arrays)

    def truths(self, model: str) -> list[list[np.ndarray]]:
        files = [makers.arrays_in(self.folder / model / f"truth_{number}.npz") for number in (1, 2, 10)]
        return [[file[f"arr_{i}"] for i in range(len(file) - 1)] for file in files]

    def dtypes(self, model: str) -> list[str]:
        names = makers.arrays_in(self.folder / model / "truth_1.npz")["dtypes"]
        return [str(name) for name in names if str(name) not in ("object", "<U1")]


def _role(name: str) -> str:
    return "copied" if name.startswith(("optimizer/", "optimizer_weights/", "metrics/")) else "weight"


def test_every_dataset_is_the_float64_mean_or_the_newest(run: Run) -> None:
    assert len(run.cases) > 60
    for (model, kind, optimizer), output in run.cases.items():
        inputs = [oracle.read_arrays(path) for path in run.inputs(model, kind)]
        written = oracle.read_arrays(output)
        kept = {name for name in inputs[-1] if optimizer == "keep" or not name.startswith("optimizer")}
        assert set(written) == kept, (model, kind)
        for name, value in written.items():
            is_float = value.dtype.kind == "f" or value.dtype == np.dtype("V2")
            spectral_state = model == "spectral" and (name.endswith("vector_u") or value.shape == (1, 5))
            if is_float and _role(name) == "weight" and not spectral_state:
                expected = oracle.mean([arrays[name] for arrays in inputs])
            else:
                expected = inputs[-1][name]
            assert value.dtype == expected.dtype, (model, kind, name)
            assert value.tobytes() == expected.tobytes(), (model, kind, name)


def test_keras_loads_every_average_whose_inputs_it_loads(run: Run) -> None:
    # tf_keras fails on its own error message where a loss-scaled optimizer has no state to load.
    known = {("mixed_float16", "weights", "drop")} if run.writer == "tf_keras" else set()
    for (model, kind, optimizer), output in run.cases.items():
        newest = run.inputs(model, kind)[-1]
        expected = Path(f"{newest}.loaded.npz").exists() and (model, kind, optimizer) not in known
        assert Path(f"{output}.loaded.npz").exists() == expected, (model, kind, optimizer)
    assert sum(Path(f"{output}.loaded.npz").exists() for output in run.cases.values()) > 60


def test_keras_loads_the_mean_of_the_weights_it_had(run: Run) -> None:
    for (model, kind, _), output in run.cases.items():
        if not Path(f"{output}.loaded.npz").exists():
            continue
        with np.load(f"{output}.loaded.npz") as file:
            loaded = [file[name] for name in file.files]
        truths = run.truths(model)
        assert len(loaded) == len(truths[0]), (model, kind)
        for index, value in enumerate(loaded):
            stored = run.dtypes(model)[index]
            values = [truth[index] for truth in truths]
            total = (values[0] + values[1]) + values[2]
            if stored == "bfloat16":
                expected = oracle.nearest_bfloat16(total / 3)
                found = (value.reshape(-1).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            elif stored.startswith("float"):
                expected, found = (total / 3).astype(stored), value.astype(stored)
            else:
                expected, found = values[-1], value
            power_iteration = model == "spectral" and value.shape == (1, 5)
            if not power_iteration and model != "lora":
                message = f"{model} {kind} {index}"
                np.testing.assert_array_equal(found.reshape(-1), expected.reshape(-1), err_msg=message)


def test_lora_averages_the_merged_kernels(run: Run) -> None:
    for (model, _, _), output in run.cases.items():
        if model == "lora":
            kernels = []
            for truth in run.truths("lora"):
                (kernel,), (a,), (b,) = (
                    [w for w in truth if w.shape == shape] for shape in ((6, 5), (6, 2), (2, 5))
                )
                kernels.append(kernel + a @ b)
            with np.load(f"{output}.loaded.npz") as file:
                (found,) = (file[name] for name in file.files if file[name].shape == (6, 5))
            np.testing.assert_allclose(found, sum(kernels) / 3, rtol=1e-6)


def test_keras_says_of_an_average_what_it_says_of_its_inputs(run: Run) -> None:
    for (model, kind, optimizer), output in run.cases.items():
        if optimizer == "keep":
            before = json.loads(Path(f"{run.inputs(model, kind)[-1]}.said.json").read_text())
            after = json.loads(Path(f"{output}.said.json").read_text())
            assert _without_numbers(after) == _without_numbers(before), (model, kind)


def _without_numbers(messages: list[str]) -> list[str]:
    """Strip the numbers that Keras appends to names as one process loads model after model."""
    return [re.sub(r"_\d+'", "'", message) for message in messages]


def test_assets_and_config_are_those_of_the_newest(run: Run) -> None:
    for (model, kind, _), output in run.cases.items():
        if kind == "keras":
            with zipfile.ZipFile(output) as written, zipfile.ZipFile(run.inputs(model, kind)[-1]) as newest:
                assert written.namelist() == newest.namelist()
                for name in written.namelist():
                    if name not in ("metadata.json", "model.weights.h5"):
                        assert written.read(name) == newest.read(name), (model, name)
                metadata = json.loads(written.read("metadata.json"))
                del metadata["swa_avg"]
                assert metadata == json.loads(newest.read("metadata.json"))


def test_weights_of_an_archive_can_be_written_alone(run: Run, tmp_path: Path) -> None:
    inputs = run.inputs("cnn_bn", "keras")
    output = tmp_path / "swa.weights.h5"
    average(inputs, output)
    loads = tmp_path / "request.json"
    loads.write_text(json.dumps([("cnn_bn", "weights", str(output))]))
    _keras(run.writer, "load", loads)
    truths = run.truths("cnn_bn")
    with np.load(f"{output}.loaded.npz") as file:
        for index, name in enumerate(file.files):
            expected = (((truths[0][index] + truths[1][index]) + truths[2][index]) / 3).astype(np.float32)
            np.testing.assert_array_equal(file[name].astype(np.float32), expected)
