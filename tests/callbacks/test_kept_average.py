"""Optimizers that keep an average of the weights: what is said of it, and what is saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle
from conftest import Ended

keras = pytest.importorskip("keras")

from swa_avg import average, inspect_checkpoints  # noqa: E402
from swa_avg.callbacks import SWA, CheckpointSaver  # noqa: E402
from swa_avg.errors import SwaAvgWarning  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own
]

Cli = Callable[..., Ended]
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 4)).astype("f"), RNG.normal(size=(24, 1)).astype("f")

USE_EMA = (
    "the optimizer keeps an average of the weights (use_ema), which checkpoints saved while fit runs do not hold, "
    "unless keras.callbacks.SwapEMAWeights(swap_on_epoch=True) stands before the callback that saves"
)
SCHEDULE_FREE = (
    "the optimizer is schedule-free (ScheduleFreeAdamW), and checkpoints hold the weights y that it trains, not "
    "the average x that it means to be evaluated, which no call of Keras gives: x = (y - (1 - beta_1) * z) / "
    "beta_1, z being the momentum in the optimizer's state"
)


def _ema() -> Any:
    return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)


def _schedule_free() -> Any:
    if not hasattr(keras.optimizers, "ScheduleFreeAdamW"):
        pytest.skip("a Keras before 3.14")
    return keras.optimizers.ScheduleFreeAdamW(0.1)


OPTIMIZERS = {
    "ema": (_ema, USE_EMA),
    "wrapped": (lambda: keras.optimizers.LossScaleOptimizer(_ema()), USE_EMA),
    "schedule-free": (_schedule_free, SCHEDULE_FREE),
}


def _fit(optimizer: Any, callbacks: Sequence[Any], epochs: int = 2) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    model.fit(X, Y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def _said(messages: Sequence[Any]) -> list[str]:
    return [str(message.message) for message in messages if "the optimizer" in str(message.message)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("callback", [CheckpointSaver, lambda folder: SWA(folder, 0)])
def test_it_is_said_once_as_training_begins(
    kind: str, callback: Callable[[Path], Any], tmp_path: Path
) -> None:
    make, text = OPTIMIZERS[kind]
    optimizer = make()
    said: list[list[str]] = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            said.append(_said(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(optimizer, [callback(tmp_path / "run"), Look()])
    assert said == [[text]]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_files_say_it_too(kind: str, tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    make, text = OPTIMIZERS[kind]
    monkeypatch.chdir(tmp_path)
    model = _fit(make(), [])
    for number in range(2):
        model.layers[0].bias.assign([float(number)])
        model.save(f"ckpt_{number}.keras")
    for command in ((), ("inspect",)):
        output = () if command else ("-o", "swa.keras")
        ended = swa_avg(*command, "ckpt_*.keras", *output, "--json")
        assert ended.code == 0
        assert f"warning: {text}\n" in ended.err
        assert json.loads(ended.out)["other_weights"] == text
    with pytest.warns(SwaAvgWarning, match="the optimizer"):
        average(["ckpt_0.keras", "ckpt_1.keras"], "two.keras")


def test_legacy_files_say_it_too(tmp_path: Path) -> None:
    model = _fit(_ema(), [])
    model.save(tmp_path / "ckpt_1.h5")
    assert inspect_checkpoints(tmp_path / "ckpt_1.h5").other_weights == USE_EMA


def test_swapped_in_before_the_saver_the_average_is_saved_and_nothing_said(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        _fit(_ema(), [swap, CheckpointSaver(tmp_path / "swapped")], epochs=3)
    assert not _said(caught)
    with pytest.warns(UserWarning, match="use_ema"):
        _fit(_ema(), [CheckpointSaver(tmp_path / "plain")], epochs=3)
    # The slots of SGD without momentum are the averages alone, after the count and the rate.
    for epoch in (1, 2):
        swapped, plain = (
            oracle.read_arrays(tmp_path / folder / f"ckpt_{epoch:04}.keras")
            for folder in ("swapped", "plain")
        )
        for number in range(2):
            weights, average_of = f"layers/dense/vars/{number}", f"optimizer/vars/{number + 2}"
            np.testing.assert_allclose(swapped[weights], plain[average_of], rtol=1e-5)
            assert not np.allclose(plain[weights], plain[average_of])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_of_other_optimizers_nothing_is_said(optimizer: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _fit(optimizer, [CheckpointSaver(tmp_path)])
    assert not _said(caught)
    assert inspect_checkpoints(tmp_path).other_weights is None
