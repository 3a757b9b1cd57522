"""Checkpoints of Keras versions that are hard to install, with what Keras said of their variables."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import oracle
from conftest import CORPUS, Ended
from swa_avg import average
from swa_avg.formats import open_checkpoint
from swa_avg.inputs.opening import resolve_dtypes

RUNS = [
    ("keras-3.3.3-tf/cnn_bn", ".keras"),
    ("keras-3.3.3-tf/cnn_bn", ".weights.h5"),
    ("keras-3.3.3-tf/cnn_bn", ".h5"),
    ("tf-2.12.1/cnn_bn", ".keras"),
    ("tf-2.12.1/cnn_bn", ".weights.h5"),
    ("tf-2.12.1/cnn_bn", ".h5"),
    ("tf-2.12.1/cnn_bn", ".hdf5"),
    ("tf-2.12.1/cnn_bn", "_weights.h5"),
    ("tf_keras-2.21.0/policy_bfloat16", ".keras"),
    ("tf_keras-2.21.0/policy_bfloat16", ".weights.h5"),
    ("tf_keras-2.21.0/policy_bfloat16", ".h5"),
    ("tf_keras-2.21.0/policy_bfloat16", "_weights.h5"),
]


def _untagged(folder: str, suffix: str) -> str | None:
    return "bfloat16" if "bfloat16" in folder and suffix in (".weights.h5", "_weights.h5") else None


@pytest.mark.parametrize(("folder", "suffix"), RUNS)
def test_extents_hold_the_variables_that_keras_had(folder: str, suffix: str) -> None:
    for number in (1, 2, 3):
        path = CORPUS / folder / f"ck{number}{suffix}"
        truth = json.loads((CORPUS / folder / f"ck{number}.truth.json").read_text())
        expected = Counter((t["dtype"], tuple(t["shape"]), t["sha"]) for t in truth)
        checkpoint = open_checkpoint(path)
        (checkpoint,) = resolve_dtypes([checkpoint], _untagged(folder, suffix))
        found = Counter()
        for tensor in checkpoint.tensors.values():
            if tensor.role == "weight":
                data = checkpoint.shards[0].read(tensor.offset, tensor.nbytes)
                if tensor.dtype == "bfloat16":  # hashed as float32
                    data = oracle.widen(np.frombuffer(data, "V2")).astype(np.float32).tobytes()
                found[tensor.dtype, tensor.shape, hashlib.sha256(data).hexdigest()[:16]] += 1
        checkpoint.close()
        assert found == expected


@pytest.mark.parametrize(("folder", "suffix"), RUNS)
@pytest.mark.parametrize("count", [2, 3])
def test_average_is_the_float64_mean_rounded_once(
    folder: str, suffix: str, count: int, tmp_path: Path
) -> None:
    inputs = [CORPUS / folder / f"ck{number}{suffix}" for number in range(1, count + 1)]
    output = tmp_path / f"swa{suffix}"
    average(inputs, output, dtype=_untagged(folder, suffix))
    arrays = [oracle.read_arrays(path) for path in inputs]
    written = oracle.read_arrays(output)
    assert written.keys() == arrays[-1].keys()
    for name, value in written.items():
        is_float = value.dtype.kind == "f" or value.dtype == np.dtype("V2")
        averaged = is_float and not name.startswith(("optimizer", "metrics/"))
        expected = oracle.mean([a[name] for a in arrays]) if averaged else arrays[-1][name]
        assert value.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("keras-3.0.5-tf/rnn_crashed_save/ck1.h5", "input_layer: layer listed, but not stored"),
        ("tf-2.12.1/textvec_crashed_save/ck1.h5", "text_vectorization: layer listed, but not stored"),
    ],
)
def test_a_save_that_crashed_half_way_is_refused(
    path: str, layer: str, swa_avg: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = swa_avg(CORPUS / path, "-o", tmp_path / "swa.h5")
    hint = "the save that wrote it did not finish: leave this file out"
    assert (ended.code, ended.err) == (3, f"swa-avg: error: {CORPUS / path}: {layer}; {hint}\n")
    assert list(tmp_path.iterdir()) == []


def test_untagged_two_byte_values_are_refused_without_dtype(
    swa_avg: Callable[..., Ended], tmp_path: Path
) -> None:
    inputs = sorted((CORPUS / "tf_keras-2.21.0/policy_bfloat16").glob("ck?_weights.h5"))
    ended = swa_avg(*inputs, "-o", tmp_path / "swa.h5")
    assert ended.code == 4
    assert ended.err == (
        f"swa-avg: error: {inputs[-1]}: 5 times: conv2d/conv2d/bias:0: holds 2-byte values of a type the file does "
        "not name; if bfloat16, set dtype to bfloat16 (also conv2d/conv2d/kernel:0, separable_conv2d/separable_conv2d/bias:0, ...)\n"
    )
    assert list(tmp_path.iterdir()) == []
