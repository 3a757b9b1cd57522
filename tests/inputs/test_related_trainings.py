"""Related or not, of real trainings: what comes from one start is averaged, what does not is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ended

keras = pytest.importorskip("keras")

from swa_avg.callbacks import CheckpointSaver  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own
]

Cli = Callable[..., Ended]
L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 8, 8, 1)).astype("f")
Y = (X.reshape(256, 64) @ RNG.normal(size=(64, 5))).argmax(axis=1)


def _dense() -> Any:
    return keras.Sequential([L.Input((8, 8, 1)), L.Flatten(), L.Dense(40, "relu"), L.Dense(5)])


def _conv() -> Any:
    layers = [L.Conv2D(12, 3, use_bias=False), L.BatchNormalization(), L.ReLU(), L.Conv2D(12, 3), L.Flatten()]
    return keras.Sequential([L.Input((8, 8, 1)), *layers, L.Dense(5)])


def _recurrent() -> Any:
    return keras.Sequential([L.Input((8, 8, 1)), L.Reshape((8, 8)), L.LSTM(24), L.Dense(5)])


def _attention() -> Any:
    inputs = L.Input((8, 8, 1))
    hidden = L.Dense(24)(L.Reshape((8, 8))(inputs))
    hidden = hidden + L.MultiHeadAttention(2, 8)(hidden, hidden)
    return keras.Model(inputs, L.Dense(5)(L.GlobalAveragePooling1D()(L.LayerNormalization()(hidden))))


BUILDERS = {"dense": _dense, "conv": _conv, "recurrent": _recurrent, "attention": _attention}


def _train(
    model: Any, folder: Path, *, rate: Any = 0.01, epochs: int = 4, rows: slice = slice(None), **fit: Any
) -> Any:
    """Train, with a checkpoint an epoch and an index in the folder."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(X[rows], Y[rows], epochs=epochs, verbose=0, callbacks=[CheckpointSaver(folder)], **fit)
    return model


@pytest.fixture(scope="module", params=list(BUILDERS))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three seeds, of which the first was fine-tuned on either half of the data."""
    root = tmp_path_factory.mktemp(request.param)
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        _train(BUILDERS[request.param](), root / f"seed_{seed}")
    for half, rows in (("a", slice(128)), ("b", slice(128, None))):
        model = keras.models.load_model(root / "seed_0" / "ckpt_0004.keras")
        _train(model, root / f"tuned_{half}", rows=rows, rate=0.02)
    return root


def _ended(swa_avg: Cli, tmp_path: Path, *inputs: Path) -> Ended:
    return swa_avg(*inputs, "-o", tmp_path / "swa.keras", "--json", "-q")


def test_the_epochs_of_a_run_are_related(runs: Path, tmp_path: Path, swa_avg: Cli) -> None:
    ended = _ended(swa_avg, tmp_path, runs / "seed_1")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["relation"]["related"] is True


def test_the_last_epochs_of_three_seeds_are_refused(runs: Path, tmp_path: Path, swa_avg: Cli) -> None:
    ended = _ended(swa_avg, tmp_path, *(runs / f"seed_{seed}" / "ckpt_0004.keras" for seed in range(3)))
    assert ended.code == 4
    names = "; ".join(f"seed_{seed}/ckpt_0004.keras" for seed in range(3))
    assert (
        f"3 groups of checkpoints that are unrelated to each other, as if of 3 runs; their mean is meaningless: {names};"
        in ended.err
    )


def test_two_runs_mixed_are_told_apart(runs: Path, tmp_path: Path, swa_avg: Cli) -> None:
    ended = _ended(swa_avg, tmp_path, runs / "seed_0", runs / "seed_2")
    assert ended.code == 4
    groups = "; ".join(
        ", ".join(f"seed_{seed}/ckpt_{epoch:04}.keras" for epoch in range(1, 5)) for seed in (0, 2)
    )
    assert (
        f"2 groups of checkpoints that are unrelated to each other, as if of 2 runs; their mean is meaningless: {groups};"
        in ended.err
    )


def test_fine_tunings_of_one_model_are_related(runs: Path, tmp_path: Path, swa_avg: Cli) -> None:
    last = [runs / name / "ckpt_0004.keras" for name in ("seed_0", "tuned_a", "tuned_b")]
    assert _ended(swa_avg, tmp_path, *last[1:]).code == 0
    (tmp_path / "swa.keras").unlink()
    assert _ended(swa_avg, tmp_path, *last).code == 0


def test_folds_trained_from_one_start_are_related(tmp_path: Path, swa_avg: Cli) -> None:
    keras.utils.set_random_seed(0)
    model = _dense()
    start = model.get_weights()
    for half, rows in (("a", slice(128)), ("b", slice(128, None))):
        model.set_weights(start)
        _train(model, tmp_path / half, rows=rows)
    ended = _ended(swa_avg, tmp_path, *(tmp_path / half / "ckpt_0004.keras" for half in "ab"))
    assert ended.code == 0, ended.err


def test_a_cyclic_run_at_a_high_rate_is_related(tmp_path: Path, swa_avg: Cli) -> None:
    keras.utils.set_random_seed(0)
    rate = keras.optimizers.schedules.CosineDecayRestarts(0.1, 16, t_mul=1.0)
    _train(_dense(), tmp_path / "run", rate=rate, epochs=12)
    ended = _ended(swa_avg, tmp_path, tmp_path / "run")
    assert ended.code == 0, ended.err


def test_a_run_that_was_continued_without_loading_its_model_is_two(tmp_path: Path, swa_avg: Cli) -> None:
    """The index lists both as one run, in order of time: the content alone tells."""
    for first in (0, 2):
        keras.utils.set_random_seed(first)
        _train(_dense(), tmp_path / "run", epochs=first + 2, initial_epoch=first)
    ended = _ended(swa_avg, tmp_path, tmp_path / "run")
    assert ended.code == 4
    assert "ckpt_0001.keras, ckpt_0002.keras; ckpt_0003.keras, ckpt_0004.keras; average each" in ended.err
    assert _ended(swa_avg, tmp_path, tmp_path / "run", *("--epochs", "3:4")).code == 0


def test_a_sweep_refuses_likewise(runs: Path, tmp_path: Path, swa_avg: Cli) -> None:
    for number, folder in enumerate(("seed_0", "seed_1")):
        shutil.copy(runs / folder / "ckpt_0004.keras", tmp_path / f"ckpt_{number}.keras")
    np.savez(tmp_path / "val.npz", x=X[:32], y=Y[:32])
    command = ("sweep", tmp_path / "ckpt_*.keras", "--val", tmp_path / "val.npz", "--candidates", "uniform")
    command += ("--monitor", "loss", "-o", tmp_path / "best.keras")
    ended = swa_avg(*command)
    assert ended.code == 4
    assert "2 groups of checkpoints that are unrelated to each other" in ended.err
    assert not (tmp_path / "best.keras").exists()
    allowed = swa_avg(*command, "--allow-unrelated", "--json")
    assert allowed.code == 0, allowed.err
    assert "warning: 2 groups of checkpoints that are unrelated to each other" in allowed.err
    assert json.loads(allowed.out)["relation"]["related"] is False


def test_a_sweep_says_whether_the_run_still_moves(runs: Path, tmp_path: Path, swa_avg: Cli) -> None:
    np.savez(tmp_path / "val.npz", x=X[:32], y=Y[:32])
    command = ("sweep", runs / "seed_0", "--val", tmp_path / "val.npz", "--candidates", "uniform")
    page = tmp_path / "best.html"
    ended = swa_avg(*command, "--monitor", "loss", "-o", tmp_path / "best.keras", "--report", page, "--json")
    assert ended.code == 0, ended.err
    assert f"swa-avg verify {tmp_path / 'best.keras'} --inputs {runs / 'seed_0'}<" in page.read_text("utf-8")
    assert swa_avg("verify", tmp_path / "best.keras", "--inputs", runs / "seed_0").code == 0
    report = json.loads(ended.out)
    assert report["relation"]["related"] is True
    assert f"\n{report['movement']['text']}\n" in ended.err
    inspected = json.loads(swa_avg("inspect", runs / "seed_0", "--json", "-q").out)["movement"]
    # By all that is averaged there, by kernels here.
    assert report["movement"]["turn"] == pytest.approx(inspected["turn"], abs=15)
    assert report["movement"]["share"] == pytest.approx(inspected["share"], abs=0.1)
    assert report["movement"]["rates"] == inspected["rates"] == pytest.approx([0.01, 0.01])
