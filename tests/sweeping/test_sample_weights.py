"""Sample weights in validation data count as they do in `model.evaluate`, which is the oracle here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swa_avg import Validation, sweep
from swa_avg.errors import UnreadableError

keras = pytest.importorskip("keras")
pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::swa_avg.errors.SwaAvgWarning"),
]

L = keras.layers
RNG = np.random.default_rng(0)
# Keras adds the losses of several outputs up as means over batches: the batches here are of one size.
X = RNG.normal(size=(70, 4)).astype("f4")
SIZE = RNG.normal(size=(70, 1)).astype("f4")
KIND = RNG.integers(3, size=70)
WEIGHTS = RNG.uniform(0, 3, 70).astype("f4") * (RNG.random(70) > 0.3)
OTHERS = RNG.uniform(0, 2, 70).astype("f4")


def _one_output(folder: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, activation="softmax")])
    model.compile(
        "sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], weighted_metrics=["accuracy"]
    )
    for number in (1, 2):
        model.fit(X, KIND, verbose=0)
        model.save(folder / f"ckpt_{number}.keras")


def _two_outputs(folder: Path, *, by_name: bool) -> None:
    keras.utils.set_random_seed(0)
    entry = keras.Input((4,))
    size, kind = L.Dense(1, name="size")(entry), L.Dense(3, activation="softmax", name="kind")(entry)
    model = keras.Model(entry, {"size": size, "kind": kind} if by_name else [size, kind])
    losses = {"size": "mse", "kind": "sparse_categorical_crossentropy"}
    model.compile(
        "sgd",
        losses if by_name else list(losses.values()),
        weighted_metrics={"size": ["mae"], "kind": ["accuracy"]} if by_name else [["mae"], ["accuracy"]],
    )
    targets = {"size": SIZE, "kind": KIND} if by_name else [SIZE, KIND]
    for number in (1, 2):
        model.fit(X, targets, verbose=0)
        model.save(folder / f"ckpt_{number}.keras")


def _scores(folder: Path, validation: Any) -> dict[str, float]:
    """Return the metrics of the first checkpoint in a sweep."""
    report = sweep(folder / "ckpt_*.keras", folder / "swa.keras", validation=validation, tried="uniform")
    return dict(report.singles[0].metrics)


def _expected(folder: Path, targets: Any, weights: Any) -> dict[str, float]:
    model = keras.models.load_model(folder / "ckpt_1.keras")
    if isinstance(
        weights, list
    ):  # Keras 3.11 does not take None for one of them; weights of 1 change nothing
        weights = [np.ones(len(X), "f") if weight is None else weight for weight in weights]
    values: dict[str, float] = model.evaluate(
        X, targets, sample_weight=weights, batch_size=14, verbose=0, return_dict=True
    )
    return values


def _batches() -> Iterator[Any]:
    for start in range(0, 70, 14):
        rows = slice(start, start + 14)
        yield X[rows], KIND[rows], WEIGHTS[rows]


class _Dataset(keras.utils.PyDataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> Any:
        return list(_batches())[number]


@pytest.mark.parametrize("form", ["arrays", "batches", "dataset", "PyDataset"])
def test_the_weights_of_one_output_count_as_in_evaluate(form: str, tmp_path: Path) -> None:
    _one_output(tmp_path)
    tf = pytest.importorskip("tensorflow") if form == "dataset" else None
    data = {
        "arrays": lambda: (X, KIND, WEIGHTS),
        "batches": lambda: list(_batches()),
        "dataset": lambda: tf.data.Dataset.from_tensor_slices((X, KIND, WEIGHTS)).batch(14),
        "PyDataset": _Dataset,
    }[form]()
    scores = _scores(tmp_path, Validation(data, batch_size=14 if form == "arrays" else None))
    assert scores == pytest.approx(_expected(tmp_path, KIND, WEIGHTS), rel=1e-5)
    plain = _expected(tmp_path, KIND, None)
    assert scores["loss"] != pytest.approx(plain["loss"], rel=0.05)
    assert scores["accuracy"] == pytest.approx(
        plain["accuracy"], rel=1e-5
    )  # weighted_metrics alone take them


@pytest.mark.parametrize(
    ("by_name", "weights"),
    [
        (False, [WEIGHTS, OTHERS]),
        (False, [WEIGHTS, None]),
        (False, WEIGHTS),
        (True, {"size": WEIGHTS, "kind": OTHERS}),
        (True, WEIGHTS),
    ],
    ids=["each", "one of two", "for all", "each by name", "for all by name"],
)
def test_the_weights_of_several_outputs_count_as_in_evaluate(
    by_name: bool, weights: Any, tmp_path: Path
) -> None:
    _two_outputs(tmp_path, by_name=by_name)
    targets: Any = {"size": SIZE, "kind": KIND} if by_name else [SIZE, KIND]
    scores = _scores(tmp_path, Validation((X, targets, weights), batch_size=14))
    assert scores == pytest.approx(_expected(tmp_path, targets, weights), rel=1e-5)


def test_weights_that_fit_no_output_are_one_line(tmp_path: Path) -> None:
    _two_outputs(tmp_path, by_name=True)
    targets = {"size": SIZE, "kind": KIND}
    with pytest.raises(UnreadableError, match=r"data: expected sample weights of size, kind; found colour$"):
        _scores(tmp_path, (X, targets, {"colour": WEIGHTS}))
    with pytest.raises(UnreadableError, match=r"data: expected sample weights of 2 outputs; found 3$"):
        _scores(tmp_path, (X, targets, [WEIGHTS] * 3))
    with pytest.raises(UnreadableError, match="the model cannot be evaluated on these data"):
        _scores(tmp_path, (X, targets, {"size": WEIGHTS}))  # nor does `evaluate` take weights of some alone
    with pytest.raises(UnreadableError, match="expected arrays of one length"):
        _scores(tmp_path, (X, targets, WEIGHTS[:60]))
