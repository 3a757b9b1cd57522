"""SWA beside other callbacks that put weights into the model as training ends."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from swa_avg.callbacks import SWA, CheckpointSaver  # noqa: E402
from swa_avg.errors import UsageError  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own
]

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 4)).astype("f"), RNG.normal(size=(24, 1)).astype("f")
PUT_BACK = "replaced the average as training ended; SWA has loaded it again from "


def small(*extra, **options):
    model = keras.Sequential([keras.Input((4,)), *extra, L.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, **options), "mse", run_eagerly=True)
    return model


def fit(model, callbacks, epochs=4, **options):
    return model.fit(X, Y, epochs=epochs, batch_size=8, verbose=0, callbacks=callbacks, **options)


class Keep(keras.callbacks.Callback):
    """Keeps the weights after every epoch."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_epoch_end(self, epoch, logs=None):
        self.kept.append(self.model.get_weights())

    def mean(self, start):
        return [
            np.mean([value.astype("d") for value in values], axis=0).astype("f")
            for values in zip(*self.kept[start:], strict=True)
        ]


class Reload(keras.callbacks.Callback):
    """Puts the weights of the beginning back in the end."""

    def on_train_begin(self, logs=None):
        self.first = self.model.get_weights()

    def on_train_end(self, logs=None):
        self.model.set_weights(self.first)


class Wrapper(keras.callbacks.Callback):
    """Hands everything on to callbacks of its own, as tuners do."""

    def __init__(self, *callbacks):
        super().__init__()
        self.callbacks = callbacks

    def set_model(self, model):
        super().set_model(model)
        self.inner = keras.callbacks.CallbackList(list(self.callbacks), model=model)

    def on_train_begin(self, logs=None):
        self.inner.on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.inner.on_epoch_begin(epoch, logs)

    def on_epoch_end(self, epoch, logs=None):
        self.inner.on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        self.inner.on_train_end(logs)


def stopping(**options):
    return keras.callbacks.EarlyStopping("loss", restore_best_weights=True, **{"patience": 99, **options})


@contextmanager
def warned(expected: int) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert sum(PUT_BACK in str(warning.message) for warning in caught) == expected


ORDERS = {
    "SWA, EarlyStopping": (lambda swa, tmp: [swa, stopping()], 1),
    "EarlyStopping, SWA": (lambda swa, tmp: [stopping(), swa], 0),
    "EarlyStopping that stops, after": (lambda swa, tmp: [swa, stopping(patience=1, min_delta=1e9)], 1),
    "EarlyStopping that stops, before": (lambda swa, tmp: [stopping(patience=1, min_delta=1e9), swa], 0),
    "Reload on both sides": (lambda swa, tmp: [Reload(), swa, Reload()], 1),
    "two that put back": (lambda swa, tmp: [swa, stopping(), Reload()], 1),
    "a History of one's own": (lambda swa, tmp: [keras.callbacks.History(), swa, Reload()], 1),
    "nested lists": (lambda swa, tmp: [[swa, [Reload()]], stopping()], 1),
    "within a wrapper": (lambda swa, tmp: [Wrapper(swa), Reload()], 1),
    "beside a wrapper": (lambda swa, tmp: [swa, Wrapper(Reload())], 1),
    "BackupAndRestore, SWA": (lambda swa, tmp: [keras.callbacks.BackupAndRestore(tmp / "backup"), swa], 0),
    "SWA, BackupAndRestore": (lambda swa, tmp: [swa, keras.callbacks.BackupAndRestore(tmp / "backup")], 0),
    "a saver on both sides": (
        lambda swa, tmp: [CheckpointSaver(tmp / "one"), swa, stopping(), CheckpointSaver(tmp / "two")],
        1,
    ),
}


if keras.backend.backend() != "tensorflow":
    del ORDERS["nested lists"]  # which Keras takes there alone


@pytest.mark.parametrize("order", ORDERS)
def test_the_model_ends_with_the_average_wherever_swa_is(tmp_path, order):
    callbacks, count = ORDERS[order]
    model, keep = small(), Keep()
    with warned(count):
        history = fit(model, [keep, *callbacks(SWA(tmp_path / "run", 0), tmp_path)])
    for found, wanted in zip(model.get_weights(), keep.mean(0), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(keep.kept[0][0], keep.kept[-1][0])
    pickle.dumps(history.history)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_beside_swapped_moving_averages_the_model_ends_with_the_mean_of_what_was_saved(
    tmp_path, swap_on_epoch, first
):
    model = small(use_ema=True, ema_momentum=0.5)
    swa, keep = SWA(tmp_path, 1), Keep()
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    with warned(0):
        fit(model, [swa, keep, swap] if first else [swap, swa, keep])
    for found, wanted in zip(model.get_weights(), keep.mean(1), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_list_that_is_used_again_holds_what_it_held(tmp_path):
    model, swa = small(), SWA(tmp_path, 1)
    callbacks = keras.callbacks.CallbackList([swa, Reload()], add_history=True, model=model)
    before = list(callbacks.callbacks)
    for _ in range(2):
        keep = Keep()
        with warned(1):
            callbacks.callbacks.insert(0, keep)
            keep.set_model(model)
            fit(model, callbacks)
            callbacks.callbacks.remove(keep)
        assert callbacks.callbacks == before
        np.testing.assert_array_equal(model.get_weights()[0], keep.mean(1)[0])


def test_of_two_swas_the_later_one_has_the_last_word(tmp_path):
    model, keep = small(), Keep()
    with warned(1):
        fit(model, [keep, SWA(tmp_path / "a", 0), SWA(tmp_path / "b", 2), stopping()])
    np.testing.assert_array_equal(model.get_weights()[0], keep.mean(2)[0])
    with warned(0):
        fit(small(), [SWA(tmp_path / "c", 0), SWA(tmp_path / "d", 2)])


def test_fresh_statistics_come_back_with_the_average_and_statistics_of_another_callback_stay(tmp_path):
    class Statistics(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.model.layers[0].moving_mean.assign(np.full(4, 7))

    model = small(L.BatchNormalization())
    with warned(1):
        fit(model, [SWA(tmp_path / "a", 1, bn_data=X, bn_batch_size=8), Statistics(), Reload()])
    np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), X.mean(0), atol=1e-6)
    with warned(0):
        fit(model, [SWA(tmp_path / "b", 1, bn_data=X, bn_batch_size=8), Statistics()])
    assert model.layers[0].moving_mean.numpy()[0] == 7


def test_a_loop_of_ones_own_may_call_the_callback_itself(tmp_path):
    model, swa = small(), SWA(tmp_path, 0)
    swa.set_model(model)
    swa.on_train_begin()
    for epoch in range(2):
        swa.on_epoch_begin(epoch)
        model.train_on_batch(X, Y)
        swa.on_epoch_end(epoch, {})
    with warned(0):
        swa.on_train_end()
    loaded = keras.models.load_model(tmp_path / "swa.keras")
    np.testing.assert_array_equal(model.get_weights()[0], loaded.get_weights()[0])


def test_a_foreign_average_is_refused_before_training_and_spared_if_it_comes_later(tmp_path):
    average = tmp_path / "swa.keras"
    average.write_text("mine")
    keep = Keep()
    with pytest.raises(UsageError, match=r"swa\.keras would be replaced, but .* no fingerprint"):
        fit(small(), [keep, SWA(tmp_path, 0)])
    assert keep.kept == []
    average.unlink()

    class Meanwhile(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            Path(average).write_text("mine")

    with pytest.warns(UserWarning, match=r"swa\.keras is not replaced, .*; saved as swa-again\.keras"):
        fit(small(), [SWA(tmp_path, 0, keep_checkpoints=False), Meanwhile()])
    assert average.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints.json", "swa-again.keras", "swa.keras"]


def test_what_the_index_names_outlives_a_run_that_keeps_few(tmp_path):
    fit(small(), [CheckpointSaver(tmp_path, keep_last=2)], epochs=2)
    index = tmp_path / "checkpoints.json"
    for name in ("train.py", "notes.txt"):
        (tmp_path / name).write_text("mine")
        index.write_text(
            index.read_text().replace(
                '"checkpoints": [', f'"checkpoints": [{{"file": "{name}", "epoch": 1, "step": {len(name)}}},'
            )
        )
    with pytest.warns(UserWarning, match=r"notes\.txt, train\.py left the index, but stayed on disk"):
        fit(small(), [CheckpointSaver(tmp_path, keep_last=2)], epochs=5, initial_epoch=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints.json", "ckpt_0004.keras", "ckpt_0005.keras", "notes.txt", "train.py"
    ]  # fmt: skip
