"""Metrics that only some epochs log, as with `validation_freq`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from swa_avg.callbacks import CheckpointSaver  # noqa: E402
from swa_avg.errors import UsageError  # noqa: E402
from swa_avg.inputs.index import Entry, Index, read_index  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own
]

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 4)).astype("f"), RNG.normal(size=(24, 1)).astype("f")


def small() -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=True)
    return model


def fit(saver: CheckpointSaver, epochs: int = 6, **options: Any) -> list[str]:
    """Train, and return what is said of metrics."""
    options = {"validation_data": (X, Y), **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small().fit(X, Y, epochs=epochs, batch_size=8, verbose=0, callbacks=[saver], **options)
    return [str(warning.message) for warning in caught if " logged " in str(warning.message)]


def epochs(folder: Path) -> list[int]:
    entries = read_index(folder / "checkpoints.json").entries
    assert {entry.file for entry in entries} == {p.name for p in folder.iterdir()} - {"checkpoints.json"}
    return [entry.epoch for entry in entries]


def said(count: int) -> list[str]:
    return ["epoch 1 logged loss, but not val_loss; checkpoints without it rank last"][:count]


@pytest.mark.parametrize(
    ("frequency", "kept"), [(1, [5, 6]), (2, [4, 6]), (3, [3, 6]), ([2, 5], [2, 5]), (4, [4, 6]), (7, None)]
)
def test_the_best_are_kept_of_the_epochs_that_were_validated(
    tmp_path: Path, frequency: int | list[int], kept: list[int] | None
) -> None:
    """Losses fall from epoch to epoch; none at all is ranked if none is validated, and all stay."""
    saver = CheckpointSaver(tmp_path, keep_best=2, monitor="val_loss")
    assert fit(saver, validation_freq=frequency) == said(frequency != 1)
    assert epochs(tmp_path) == (kept or [1, 2, 3, 4, 5, 6])
    assert read_index(tmp_path / "checkpoints.json").monitor == "val_loss"


def test_without_keep_best_all_stay_and_each_training_says_it_once(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, monitor="val_loss")
    assert fit(saver, 4, validation_freq=2) == said(1)
    assert [e.metrics.keys() for e in read_index(tmp_path / "checkpoints.json").entries] == [
        {"loss"}, {"loss", "val_loss"}, {"loss"}, {"loss", "val_loss"}
    ]  # fmt: skip
    assert fit(saver, 4, validation_freq=2) == said(1)


def test_a_misspelt_metric_costs_no_checkpoint(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, keep_best=1, monitor="val_los", mode="min")
    assert fit(saver) == ["epoch 1 logged loss, val_loss, but not val_los; checkpoints without it rank last"]
    assert epochs(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_without_validation_data_training_goes_on(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, keep_last=2, monitor="val_loss")
    assert fit(saver, validation_data=None) == said(1)
    assert epochs(tmp_path) == [5, 6]


def test_saves_between_validations_are_no_errors(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, every="2 steps", monitor="val_loss")
    assert fit(saver, 2) == said(1)
    assert [e.step for e in read_index(tmp_path / "checkpoints.json").entries] == [2, 4, 6]


def test_a_name_has_nan_where_the_metric_is_missing(tmp_path: Path) -> None:
    filename = "c_{epoch:02d}_{val_loss:.3f}_{val_loss}.keras"
    (warning,) = fit(CheckpointSaver(tmp_path, filename=filename), 3, validation_freq=2)
    assert warning == "epoch 1 logged loss, but not val_loss; checkpoints without it have nan in their names"
    entries = read_index(tmp_path / "checkpoints.json").entries
    loss = entries[1].metrics["val_loss"]
    assert [e.file for e in entries] == [
        "c_01_nan_nan.keras", f"c_02_{loss:.3f}_{loss}.keras", "c_03_nan_nan.keras"
    ]  # fmt: skip
    saver = CheckpointSaver(tmp_path / "b", filename="{epoch}_{val_mae}.keras", monitor="val_loss")
    assert fit(saver, 2, validation_freq=2) == [
        "epoch 1 logged loss, but not val_loss, val_mae; checkpoints without them rank last and have nan in "
        "their names"
    ]


@pytest.mark.parametrize("filename", ["{epoch}_{val_loss:d}.keras", "{epoch}_{loss:.{val_loss}f}.keras"])
def test_a_name_that_cannot_be_filled_in_is_one_line(tmp_path: Path, filename: str) -> None:
    with pytest.raises(UsageError, match="cannot be filled in"):
        fit(CheckpointSaver(tmp_path, filename=filename), validation_freq=2)


def entry(epoch: int, metrics: Mapping[str, float]) -> Entry:
    return Entry(f"{epoch}.keras", epoch, metrics=metrics)


@pytest.mark.parametrize(("mode", "best"), [("min", [2, 4]), ("max", [3, 4])])
def test_an_entry_without_the_metric_is_worse_than_infinity_and_nan(mode: str, best: list[int]) -> None:
    inf = float("inf")
    values = [{}, {"m": -inf}, {"m": inf}, {"m": 0.0}, {"m": float("nan")}, {"other": 1.0}]
    index = Index(tuple(entry(n, metrics) for n, metrics in enumerate(values, 1)), "m", mode)
    assert [e.epoch for e in index.pruned(None, 2).entries] == best
    assert {e.epoch for e in index.entries} - {e.epoch for e in index.best(4)} == {1, 6}
    assert [e.epoch for e in index.best(5)] == [2, 3, 4, 5, 6]
