from __future__ import annotations

import os
import signal
import sys
import threading
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import oracle

keras = pytest.importorskip("keras")

from swa_avg import refresh_batchnorm  # noqa: E402
from swa_avg.callbacks import (  # noqa: E402
    SWA,
    CheckpointSaver,
)
from swa_avg.errors import MismatchError, SystemRefusalError, UnreadableError, UsageError  # noqa: E402
from swa_avg.inputs.index import read_index  # noqa: E402
from swa_avg.schedules import LR_schedule  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    # Keras's own, with NumPy 2.4
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # torch's own, when it compiles
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 4)).astype("f"), RNG.normal(size=(24, 1)).astype("f")


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Layers in a list, a variable of its own, and a metric as an attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [L.Dense(3, dtype=self.dtype_policy), L.Dense(1, dtype=self.dtype_policy)]
        self.calls = keras.Variable(0, dtype="int32", trainable=False, name="calls")
        self.seen = keras.metrics.Mean(name="seen")

    def call(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        self.calls.assign(self.calls + 1)
        return inputs

    def build(self, shape):
        super().build(shape)


@keras.saving.register_keras_serializable("tests")
class Bag(keras.layers.Layer):
    """A layer that stores a variable which it does not list."""

    hidden: dict[str, object] = {}  # noqa: RUF012

    def build(self, shape):
        Bag.hidden[self.name] = keras.Variable(np.zeros(2, "f"), trainable=False, name="hidden")

    def call(self, inputs):
        return inputs

    def save_own_variables(self, store):
        store["hidden"] = Bag.hidden[self.name].numpy()


def small(*extra, optimizer=None, dtype=None):
    layers = [L.Dense(3, dtype=dtype), *extra, L.Dense(1, dtype=dtype)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    # Adam's second beta, 0.999, is 1 in bfloat16, and so nothing would move.
    return compiled(model, optimizer or (keras.optimizers.SGD(0.05) if dtype else None))


def compiled(model, optimizer=None, *, eager=True):
    model.compile(optimizer or keras.optimizers.Adam(0.01), "mse", metrics=["mae"], run_eagerly=eager)
    return model


def fit(model, *callbacks, epochs=4, **options):
    options = {"batch_size": 8, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


class Recorder(keras.callbacks.Callback):
    """Keeps copies of everything that a checkpoint stores, after each epoch or step; stands before the saver."""

    def __init__(self):
        super().__init__()
        self.epochs, self.steps = {}, []

    def _copy(self):
        return [v.numpy().copy() for v in (*self.model.weights, *self.model.optimizer.variables)]

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self._copy())

    def on_epoch_end(self, epoch, logs=None):
        self.epochs[epoch + 1] = self._copy()


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def index_of(folder):
    return read_index(Path(folder) / "checkpoints.json")


def assert_loads_as(path, expected):
    model = keras.models.load_model(path)
    found = [v.numpy() for v in (*model.weights, *model.optimizer.variables)]
    assert len(found) == len(expected)
    for value, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(value, wanted)


def assert_same_model_file(path, reference):
    with zipfile.ZipFile(path) as one, zipfile.ZipFile(reference) as two:
        assert one.namelist() == two.namelist()
        for name in set(one.namelist()) - {"metadata.json"}:
            assert one.read(name) == two.read(name), name


class TestWhatIsSaved:
    def test_the_last_epochs_are_saved_under_the_numbers_that_fit_prints(self, tmp_path):
        recorder = Recorder()
        fit(small(), recorder, CheckpointSaver(tmp_path, start_epoch=5), epochs=15)
        expected = [f"ckpt_{n:04d}.keras" for n in range(6, 16)]
        assert names(tmp_path) == ["checkpoints.json", *expected]
        for n in (6, 10, 15):
            assert_loads_as(tmp_path / f"ckpt_{n:04d}.keras", recorder.epochs[n])
        assert [e.epoch for e in index_of(tmp_path).entries] == list(range(6, 16))

    def test_the_index_has_epoch_step_rate_metrics_and_time(self, tmp_path):
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
        saver = CheckpointSaver(tmp_path, monitor="val_mae")
        history = fit(small(), scheduler, saver, epochs=3, validation_data=(X, Y)).history
        index = index_of(tmp_path)
        assert (index.monitor, index.mode) == ("val_mae", "min")
        for n, entry in enumerate(index.entries):
            assert (entry.epoch, entry.step) == (n + 1, 3 * (n + 1))
            assert entry.learning_rate == pytest.approx(0.1 / (n + 1), rel=1e-6)
            assert entry.metrics["val_mae"] == history["val_mae"][n]
            assert entry.time.endswith("+00:00")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"every": 2}, [2, 4, 6, 8]),
            ({"every": 3, "start_epoch": 1}, [4, 7]),
            ({"cycle_length": 4}, [4, 8]),
            ({"cycle_length": 3, "start_epoch": 2}, [5, 8]),
            ({"cycle_length": 2, "every": 2}, [4, 8]),
            ({"every": "2 epochs"}, [2, 4, 6, 8]),
            ({"keep_last": 2}, [7, 8]),
        ],
    )
    def test_epochs_are_counted_from_the_start(self, tmp_path, options, expected):
        fit(small(), CheckpointSaver(tmp_path, **options), epochs=8, batch_size=24)
        assert names(tmp_path) == ["checkpoints.json", *(f"ckpt_{n:04d}.keras" for n in expected)]

    def test_steps_are_counted_across_epochs(self, tmp_path):
        recorder = Recorder()
        fit(small(), recorder, CheckpointSaver(tmp_path, every="4 steps", start_epoch=1), epochs=4)
        expected = {"ckpt_0003_00000008.keras": 8, "ckpt_0004_00000012.keras": 12}
        assert names(tmp_path) == ["checkpoints.json", "ckpt_0002_00000004.keras", *expected]
        for name, step in expected.items():
            assert_loads_as(tmp_path / name, recorder.steps[step - 1])
        assert [(e.epoch, e.step) for e in index_of(tmp_path).entries] == [(2, 4), (3, 8), (4, 12)]

    @pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras has no such steps there")
    def test_steps_per_execution_are_counted_in_full(self, tmp_path):
        model = small()
        model.compile("sgd", "mse", steps_per_execution=2)
        fit(model, CheckpointSaver(tmp_path, every="3 steps"), epochs=2, batch_size=4)
        assert [e.step for e in index_of(tmp_path).entries] == [4, 6, 10, 12]

    def test_metrics_may_stand_in_the_name(self, tmp_path):
        saver = CheckpointSaver(tmp_path, filename="e{epoch}_{loss:.3f}.keras")
        history = fit(small(), saver, epochs=2).history
        assert names(tmp_path) == [
            "checkpoints.json",
            *(f"e{n}_{loss:.3f}.keras" for n, loss in enumerate(history["loss"], 1)),
        ]

    @pytest.mark.parametrize("background", [True, False])
    def test_weights_alone_are_what_save_weights_writes(self, tmp_path, background):
        model = small()
        fit(model, CheckpointSaver(tmp_path / "run", weights_only=True, background=background), epochs=1)
        model.save_weights(tmp_path / "reference.weights.h5")
        saved = oracle.read_arrays(tmp_path / "run" / "ckpt_0001.weights.h5")
        reference = oracle.read_arrays(tmp_path / "reference.weights.h5")
        assert saved.keys() == reference.keys()
        for name, values in reference.items():
            np.testing.assert_array_equal(saved[name], values)

    @pytest.mark.parametrize("background", [True, False])
    def test_without_the_optimizer_the_weights_are_the_same_and_it_is_absent(self, tmp_path, background):
        model = small(L.BatchNormalization())
        options = {"include_optimizer": False, "background": background}
        fit(
            model,
            CheckpointSaver(tmp_path / "a", **options),
            CheckpointSaver(tmp_path / "b", weights_only=True, **options),
            epochs=1,
        )
        assert model.optimizer is not None
        loaded = keras.models.load_model(tmp_path / "a" / "ckpt_0001.keras")
        assert not loaded.compiled
        weights = oracle.read_arrays(tmp_path / "b" / "ckpt_0001.weights.h5")
        assert not [name for name in weights if "optimizer" in name]
        for value, wanted in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(value, wanted)

    def test_verbose_prints_the_name_of_each_file(self, tmp_path, capsys):
        fit(small(), CheckpointSaver(tmp_path, verbose=1), epochs=1)
        assert f"Epoch 1: saving {tmp_path / 'ckpt_0001.keras'}" in capsys.readouterr().out


def hold_saving(monkeypatch):
    """Make every background save wait for the event that is returned."""
    event = threading.Event()
    write = CheckpointSaver._write

    def held(self, *arguments):
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(30)
        write(self, *arguments)

    monkeypatch.setattr(CheckpointSaver, "_write", held)
    return event


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
    "ema": lambda: keras.optimizers.AdamW(0.01, use_ema=True),
    "accumulating": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


def text_model():
    vectorize = L.TextVectorization(vocabulary=["a", "b"])
    lookup = L.StringLookup()
    lookup.adapt(["x", "y"])
    inputs = keras.Input((), dtype="string")
    embedded = L.Flatten()(L.Embedding(8, 2)(L.Reshape((1,))(lookup(inputs))))
    vectorized = L.GlobalAveragePooling1D()(L.Embedding(8, 2)(vectorize(inputs)))
    return keras.Model(inputs, L.Dense(1)(L.Concatenate()([embedded, vectorized])))


def normalized():
    layer = L.Normalization()
    layer.adapt(X)
    return keras.Sequential([keras.Input((4,)), layer, L.Dense(1)])


MODELS = {
    "dropout and batchnorm": lambda: small(L.BatchNormalization(), L.Dropout(0.5)),
    "bfloat16": lambda: small(dtype="bfloat16"),
    "float16": lambda: small(dtype="float16"),
    "mixed_bfloat16": lambda: small(L.BatchNormalization(), dtype="mixed_bfloat16"),
    "subclassed": lambda: compiled(Subclassed()),
    "nested": lambda: compiled(
        keras.Sequential([keras.Input((4,)), keras.Sequential([L.Dense(3), L.Dense(2)]), L.Dense(1)])
    ),
    "normalization": lambda: compiled(normalized()),
    "spectral": lambda: small(L.SpectralNormalization(L.Dense(2))),
    **{f"optimizer {name}": lambda make=make: small(optimizer=make()) for name, make in OPTIMIZERS.items()},
}


class TestBackground:
    @pytest.mark.parametrize("kind", MODELS)
    @pytest.mark.filterwarnings("ignore:overflow encountered in cast")
    def test_the_file_holds_the_moment_of_the_save_though_training_goes_on(self, tmp_path, monkeypatch, kind):
        event = hold_saving(monkeypatch)
        model = MODELS[kind]()
        fit(model, epochs=1)
        model.save(tmp_path / "reference.keras")
        before = model.get_weights()
        saver = CheckpointSaver(tmp_path / "run")
        saver.save(model, 0)
        if kind != "optimizer schedule":
            model.optimizer.learning_rate = 0.5
        fit(model, epochs=1)
        assert any(not np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))
        event.set()
        saver.wait()
        assert_same_model_file(tmp_path / "run" / "ckpt_0001.keras", tmp_path / "reference.keras")

    @pytest.mark.parametrize("jit_compile", [True, False])
    @pytest.mark.parametrize("optimizer", ["sgd", "adam"])
    def test_compiled_steps_do_not_reach_into_a_save(self, tmp_path, monkeypatch, jit_compile, optimizer):
        event = hold_saving(monkeypatch)
        model = keras.Sequential(
            [keras.Input((4,), dtype="int32"), L.Embedding(50, 8), L.Flatten(), L.Dense(1)]
        )
        model.compile(optimizer, "mse", jit_compile=jit_compile)
        x = RNG.integers(0, 50, (24, 4))
        model.fit(x, Y, batch_size=8, verbose=0)
        model.save(tmp_path / "reference.keras")
        saver = CheckpointSaver(tmp_path / "run")
        saver.save(model, 0)
        model.fit(x, Y, batch_size=8, epochs=3, verbose=0)
        event.set()
        saver.wait()
        assert_same_model_file(tmp_path / "run" / "ckpt_0001.keras", tmp_path / "reference.keras")

    def test_vocabularies_are_saved(self, tmp_path):
        pytest.importorskip("tensorflow")
        model = compiled(text_model())
        with CheckpointSaver(tmp_path / "run") as saver:
            saver.save(model, 0)
        model.save(tmp_path / "reference.keras")
        assert_same_model_file(tmp_path / "run" / "ckpt_0001.keras", tmp_path / "reference.keras")
        assert any("assets/" in n for n in zipfile.ZipFile(tmp_path / "reference.keras").namelist())

    def test_a_save_waits_for_the_one_before_and_fit_for_the_last(self, tmp_path, monkeypatch):
        events, write = [], CheckpointSaver._write

        def noted(self, *arguments):
            events.append("begin")
            write(self, *arguments)
            events.append("end")

        monkeypatch.setattr(CheckpointSaver, "_write", noted)
        fit(small(), CheckpointSaver(tmp_path), epochs=6, batch_size=24)
        assert events == ["begin", "end"] * 6
        assert len(index_of(tmp_path).entries) == 6

    def test_a_variable_that_the_model_does_not_list_is_reported_and_saved_in_the_foreground(self, tmp_path):
        model = small(Bag(name="bag"))
        saver = CheckpointSaver(tmp_path)
        with pytest.warns(UserWarning, match="hidden, which the model saves but does not list"):
            fit(model, saver, epochs=3)
        assert len(index_of(tmp_path).entries) == 3
        fit(model, CheckpointSaver(tmp_path / "b", background=False), epochs=1)

    def test_a_model_that_no_thread_can_save_is_saved_with_the_values_of_then(self, tmp_path):
        # A compiled model inside of another: saving its optimizer is what Keras allows in the foreground only.
        inner = small()
        model = compiled(keras.Sequential([keras.Input((4,)), inner, L.Dense(1)]))
        recorder = Recorder()
        inner.optimizer.build(inner.trainable_variables)

        @keras.saving.register_keras_serializable("tests")
        class Holder(keras.Model):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.inner = inner

            def call(self, inputs):
                return self.inner(inputs)

        model = compiled(Holder())
        with pytest.warns(UserWarning, match="cannot be saved in the background"):
            fit(model, recorder, CheckpointSaver(tmp_path, weights_only=True), epochs=2)
        for n in (1, 2):
            path = tmp_path / f"ckpt_{n:04d}.weights.h5"
            other = compiled(Holder())
            other(X)
            other.optimizer.build(other.trainable_variables)
            other.load_weights(path)
            for value, wanted in zip(other.get_weights(), recorder.epochs[n], strict=False):
                np.testing.assert_array_equal(value, wanted)

    def test_a_model_that_training_changes_meanwhile_is_walked_through_again(self, tmp_path, monkeypatch):
        write, failed = CheckpointSaver._write, []

        def interfering(self, model, temporary):
            if len(failed) < 2:
                temporary.write_bytes(b"half")
                failed.append(threading.current_thread())
                walked = {"a": 1}
                for name in walked:
                    walked[name * 2] = 2
            write(self, model, temporary)

        monkeypatch.setattr(CheckpointSaver, "_write", interfering)
        recorder = Recorder()
        model = small()
        fit(model, recorder, CheckpointSaver(tmp_path), epochs=2)
        assert len(failed) == 2
        assert threading.main_thread() not in failed
        for n in (1, 2):
            found = keras.models.load_model(tmp_path / f"ckpt_{n:04d}.keras").get_weights()
            for value, wanted in zip(found, recorder.epochs[n], strict=False):
                np.testing.assert_array_equal(value, wanted)

    def test_a_cleared_session_is_noticed_not_saved_wrongly(self, tmp_path, monkeypatch):
        write = CheckpointSaver._write

        def clearing(self, *arguments):
            if threading.current_thread() is not threading.main_thread():
                keras.backend.clear_session()
            write(self, *arguments)

        monkeypatch.setattr(CheckpointSaver, "_write", clearing)
        model = small()
        fit(model, epochs=1)
        saver = CheckpointSaver(tmp_path)
        saver.save(model, 0)
        wanted = model.get_weights()
        model.layers[0].kernel.assign(np.full((4, 3), 7))
        with pytest.warns(UserWarning, match="session was cleared"):
            saver.wait()
        assert model.get_weights()[0][0, 0] == 7
        loaded = keras.models.load_model(tmp_path / "ckpt_0001.keras")
        np.testing.assert_array_equal(loaded.get_weights()[0], wanted[0])

    def test_custom_loops_save_and_wait(self, tmp_path):
        model = small()
        with CheckpointSaver(tmp_path, monitor="loss") as saver:
            for epoch in range(3):
                loss = model.train_on_batch(X, Y)[0]
                saver.save(model, epoch, {"loss": loss, "confusion": np.eye(2)})
        entries = index_of(tmp_path).entries
        assert [(e.epoch, e.step, set(e.metrics)) for e in entries] == [(n, n, {"loss"}) for n in (1, 2, 3)]


class TestKeeping:
    @pytest.mark.parametrize("mode", ["min", "max", "auto"])
    def test_keep_best_keeps_the_best_in_its_direction(self, tmp_path, mode):
        values = [0.3, 0.9, 0.1, 0.7, 0.5]
        saver = CheckpointSaver(tmp_path, keep_best=2, monitor="val_accuracy", mode=mode)
        model = small()
        with saver:
            for epoch, value in enumerate(values):
                saver.save(model, epoch, {"val_accuracy": value})
        kept = [1, 3] if mode == "min" else [2, 4]
        assert names(tmp_path) == ["checkpoints.json", *(f"ckpt_{n:04d}.keras" for n in kept)]
        assert index_of(tmp_path).mode == ("min" if mode == "min" else "max")

    def test_a_file_stays_if_either_keeps_it(self, tmp_path):
        saver = CheckpointSaver(tmp_path, keep_last=2, keep_best=1, monitor="loss")
        model = small()
        with saver:
            for epoch, loss in enumerate([0.5, 0.1, 0.2, 0.3, 0.4]):
                saver.save(model, epoch, {"loss": loss})
        assert [e.epoch for e in index_of(tmp_path).entries] == [2, 4, 5]

    def test_the_direction_is_the_compiled_metrics_own(self, tmp_path):
        model = small()
        model.compile("sgd", "mse", metrics=[keras.metrics.R2Score(name="fit_quality")])
        fit(model, CheckpointSaver(tmp_path, monitor="val_fit_quality"), validation_data=(X, Y), epochs=1)
        assert index_of(tmp_path).mode == "max"

    def test_an_unclear_direction_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="with mode min or max"):
            CheckpointSaver(tmp_path, monitor="quality").save(small(), 0, {"quality": 1})


class TestResuming:
    def test_a_run_goes_on_where_it_stopped(self, tmp_path):
        model = small()
        fit(model, CheckpointSaver(tmp_path, keep_last=3), epochs=4)
        fit(model, CheckpointSaver(tmp_path, keep_last=3), epochs=6, initial_epoch=4)
        assert [(e.epoch, e.step) for e in index_of(tmp_path).entries] == [(4, 12), (5, 15), (6, 18)]
        assert names(tmp_path) == ["checkpoints.json", *(f"ckpt_000{n}.keras" for n in (4, 5, 6))]

    def test_epochs_trained_again_replace_their_checkpoints(self, tmp_path):
        def saver():
            return CheckpointSaver(tmp_path, filename="{epoch}_{mae:.9f}.keras")

        fit(small(), saver(), epochs=4)
        first = [e.file for e in index_of(tmp_path).entries]
        recorder = Recorder()
        fit(small(), recorder, saver(), epochs=4, initial_epoch=2)
        entries = index_of(tmp_path).entries
        assert [e.epoch for e in entries] == [1, 2, 3, 4]
        assert [e.file for e in entries][:2] == first[:2]
        assert sorted(e.file for e in entries) == names(tmp_path)[:4]
        assert_loads_as(tmp_path / entries[3].file, recorder.epochs[4])

    def test_keep_best_remembers_the_earlier_run(self, tmp_path):
        def saver():
            return CheckpointSaver(tmp_path, keep_best=1, monitor="loss")

        model = small()
        for epoch, loss in enumerate([0.1, 0.2]):
            with saver() as current:
                current.save(model, epoch, {"loss": loss})
        assert names(tmp_path) == ["checkpoints.json", "ckpt_0001.keras"]

    def test_backup_and_restore_resumes_an_interrupted_run(self, tmp_path):
        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 2:
                    raise KeyboardInterrupt

        def run(*extra):
            backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
            model = small()
            saver = CheckpointSaver(tmp_path / "run", every="1 steps")
            return fit(model, saver, backup, *extra, epochs=4, batch_size=12)

        with pytest.raises(KeyboardInterrupt):
            run(Stop())
        for thread in threading.enumerate():
            if thread.name.startswith("saving ckpt_0002"):
                thread.join()
        assert [e.step for e in index_of(tmp_path / "run").entries] == [1, 2, 3, 4]
        run()
        assert [(e.epoch, e.step) for e in index_of(tmp_path / "run").entries] == [
            (1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 7), (4, 8)
        ]  # fmt: skip

    def test_a_missing_file_is_reported_and_leaves_the_index(self, tmp_path):
        fit(small(), CheckpointSaver(tmp_path), epochs=2)
        (tmp_path / "ckpt_0001.keras").unlink()
        with pytest.warns(UserWarning, match=r"ckpt_0001\.keras is gone"):
            fit(small(), CheckpointSaver(tmp_path), epochs=3, initial_epoch=2)
        assert [e.epoch for e in index_of(tmp_path).entries] == [2, 3]

    def test_a_damaged_index_stops_the_run_before_it_trains(self, tmp_path):
        (tmp_path / "checkpoints.json").write_text("{")
        with pytest.raises(UnreadableError, match="not valid JSON"):
            fit(small(), CheckpointSaver(tmp_path))


class TestNothingSilent:
    def test_a_start_after_the_last_epoch_is_a_warning(self, tmp_path):
        with pytest.warns(UserWarning, match="saved nothing: expected the first checkpoint after epoch 11, but "
                                             "training ended after epoch 2 of 2"):  # fmt: skip
            fit(small(), CheckpointSaver(tmp_path, start_epoch=10), epochs=2)

    def test_early_stopping_before_the_start_is_a_warning(self, tmp_path):
        stopping = keras.callbacks.EarlyStopping("loss", patience=1, min_delta=1e9)
        with pytest.warns(UserWarning, match="training ended after epoch 2 of 9"):
            fit(small(), stopping, CheckpointSaver(tmp_path, start_epoch=5), epochs=9)
        with pytest.warns(UserWarning, match="every 500 steps"):
            fit(small(), CheckpointSaver(tmp_path, every="500 steps"), epochs=1)

    def test_a_folder_that_cannot_be_written_to_ends_the_run_before_it_trains(self, tmp_path):
        (tmp_path / "file").touch()
        recorder = Recorder()
        for callback in (
            CheckpointSaver(tmp_path / "file" / "run"),
            SWA(tmp_path / "file" / "run", 0),
        ):
            with pytest.raises(SystemRefusalError, match="cannot write into this folder"):
                fit(small(), recorder, callback)
        assert not recorder.steps

    @pytest.mark.parametrize("background", [True, False])
    def test_a_failed_save_ends_fit_and_harms_no_earlier_file(self, tmp_path, monkeypatch, background):
        write = CheckpointSaver._write

        def failing(self, model, temporary):
            write(self, model, temporary)
            if "0003" in temporary.name:
                os.truncate(temporary, 100)
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(CheckpointSaver, "_write", failing)
        recorder = Recorder()
        with pytest.raises(SystemRefusalError, match=r"No space left on device.*ckpt_0003\.keras"):
            fit(small(), recorder, CheckpointSaver(tmp_path, background=background, keep_last=2), epochs=9)
        assert max(recorder.epochs) in (3, 4)
        assert names(tmp_path) == ["checkpoints.json", "ckpt_0001.keras", "ckpt_0002.keras"]
        assert [e.epoch for e in index_of(tmp_path).entries] == [1, 2]
        assert_loads_as(tmp_path / "ckpt_0002.keras", recorder.epochs[2])

    def test_a_save_that_fails_last_fails_fit(self, tmp_path, monkeypatch):
        monkeypatch.setattr(CheckpointSaver, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(SystemRefusalError, match="full"):
            fit(small(), CheckpointSaver(tmp_path), epochs=1)

    @pytest.mark.parametrize(
        ("options", "problem"),
        [
            ({"start_epoch": -1}, "start_epoch is -1"),
            ({"start_epoch": 1.5}, "start_epoch is 1.5"),
            ({"every": 0}, "every is 0"),
            ({"every": True}, "every is True"),
            ({"every": "500"}, "every is '500'"),
            ({"every": "0 steps"}, "every is '0 steps'"),
            ({"every": "5 steps", "cycle_length": 2}, "cycle_length counts epochs"),
            ({"cycle_length": 0}, "cycle_length is 0"),
            ({"keep_last": 0}, "keep_last is 0"),
            ({"keep_best": 2}, "keep_best needs monitor"),
            ({"mode": "up"}, "mode is 'up'"),
            ({"filename": "a.keras"}, "needs {epoch}"),
            ({"filename": "a_{epoch}.h5"}, "must end with .keras"),
            ({"filename": "a_{epoch}.keras", "weights_only": True}, r"must end with \.weights\.h5"),
            ({"filename": "a_{epoch}.keras", "every": "5 steps"}, "needs {step}"),
            ({"filename": "{epoch}{loss.real}.keras"}, "its fields are"),
            ({"filename": "{epoch.keras"}, "is no format"),
            ({"directory": "gs://bucket/run"}, "not a folder of this machine"),
        ],
    )
    def test_arguments_without_meaning_are_refused_at_once(self, options, problem):
        with pytest.raises(UsageError, match=problem):
            CheckpointSaver(**{"directory": "never", **options})

    def test_a_name_that_leads_elsewhere_is_refused(self, tmp_path):
        with pytest.raises(UsageError, match="characters that a name may not hold"):
            fit(small(), CheckpointSaver(tmp_path, filename="../{epoch}.keras"))


FULL_DISK = """
import resource, sys, warnings
import numpy as np, keras
from swa_avg.callbacks import CheckpointSaver
background, weights_only = sys.argv[2] == "1", sys.argv[3] == "1"
class Full(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            saver.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(20_000), keras.layers.Dense(1)])
model.compile("sgd", "mse")
saver = CheckpointSaver(sys.argv[1], background=background, weights_only=weights_only)
model.fit(np.ones((4, 4)), np.ones((4, 1)), epochs=9, verbose=0, callbacks=[Full(), saver])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
@pytest.mark.parametrize(("background", "weights_only"), [(True, False), (False, True)])
def test_a_full_disk_ends_the_process_with_an_error_not_a_crash(
    tmp_path, run_python, background, weights_only
):
    ended = run_python(FULL_DISK, tmp_path, int(background), int(weights_only))
    assert ended.returncode == 1, ended.stderr
    assert "SystemRefusalError: [Errno 27] cannot write: File too large" in ended.stderr
    suffix = ".weights.h5" if weights_only else ".keras"
    assert names(tmp_path) == ["checkpoints.json", f"ckpt_0001{suffix}", f"ckpt_0002{suffix}"]
    assert [e.epoch for e in index_of(tmp_path).entries] == [1, 2]


INTERRUPTED = """
import os, signal, sys, threading
import numpy as np, keras
from swa_avg.callbacks import CheckpointSaver
write = CheckpointSaver._write
def interrupting(self, *arguments):
    if threading.current_thread() is not threading.main_thread() and "0003" in arguments[1].name:
        os.kill(os.getpid(), signal.SIGINT)
    write(self, *arguments)
CheckpointSaver._write = interrupting
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(20_000), keras.layers.Dense(1)])
model.compile("sgd", "mse")
model.fit(np.ones((4, 4)), np.ones((4, 1)), epochs=10**6, verbose=0, callbacks=[CheckpointSaver(sys.argv[1])])
"""


def test_after_ctrl_c_the_process_ends_and_every_file_is_whole(tmp_path, run_python):
    ended = run_python(INTERRUPTED, tmp_path)
    assert ended.returncode in (1, -signal.SIGINT, 130), ended.stderr
    assert "KeyboardInterrupt" in ended.stderr
    files = [e.file for e in index_of(tmp_path).entries]
    assert files[:3] == [f"ckpt_000{n}.keras" for n in (1, 2, 3)]
    assert names(tmp_path) == ["checkpoints.json", *files]
    for file in files:
        keras.models.load_model(tmp_path / file)


class Means(keras.callbacks.Callback):
    """Keeps every weight after every epoch from `start` on."""

    def __init__(self, start, period=1):
        super().__init__()
        self.start, self.period, self.kept = start, period, []

    def on_epoch_end(self, epoch, logs=None):
        if epoch >= self.start and (epoch + 1 - self.start) % self.period == 0:
            self.kept.append([v.numpy() for v in self.model.weights])

    def expected(self):
        def mean(values):
            if values[0].dtype.name == "bfloat16":
                average = np.mean([v.astype(np.float64) for v in values], axis=0)
                return oracle.nearest_bfloat16(average).view(values[0].dtype).reshape(values[0].shape)
            if values[0].dtype.kind == "i":
                return values[-1]
            total = values[0].astype(np.float64)
            for value in values[1:]:
                total = total + value
            return (total / len(values)).astype(values[0].dtype)

        return [mean(values) for values in zip(*self.kept, strict=True)]


def assert_weights(model, expected):
    for variable, wanted in zip(model.weights, expected, strict=True):
        np.testing.assert_array_equal(variable.numpy(), wanted, err_msg=variable.path)


class TestSWA:
    @pytest.mark.parametrize("usage", ["cyclic", "descent", "constant", "no schedule"])
    def test_the_old_usages_average_the_last_ten_epochs(self, tmp_path, monkeypatch, usage):
        monkeypatch.chdir(tmp_path)
        training_epochs = 20
        swa_start, lr_start, lr_end, c = training_epochs - 10, 0.05, 0.01, 5
        schedules = {
            "cyclic": lambda epoch: LR_schedule(
                epoch, flag=True, SWA_START=swa_start, lr_start=lr_start, lr_end=lr_end, c=c
            ),
            "descent": lambda epoch: LR_schedule(
                epoch, flag=False, SWA_START=swa_start, lr_start=lr_start, lr_end=lr_end
            ),
            "constant": lambda epoch: lr_end,
        }
        scheduler = [keras.callbacks.LearningRateScheduler(schedules[usage])] if usage in schedules else []
        swa_obj = SWA("./model_dumps/", swa_start)
        means = Means(swa_start)
        model_swa = compiled(small(), keras.optimizers.SGD(lr_start), eager=False)
        fit(model_swa, *scheduler, means, swa_obj, validation_data=(X, Y), epochs=training_epochs)
        assert len(means.kept) == 10
        assert_weights(model_swa, means.expected())
        assert_weights(keras.models.load_model("model_dumps/swa.keras"), means.expected())

    # Off by default on JAX.
    @pytest.mark.parametrize(
        "dtype",
        ["float16", "bfloat16", "float32", *(["float64"] if keras.backend.backend() != "jax" else [])],
    )
    @pytest.mark.filterwarnings("ignore:overflow encountered in cast")
    def test_every_weight_of_every_layer_is_the_rounded_float64_mean(self, tmp_path, dtype):
        means = Means(1)
        model = small(Subclassed(dtype=dtype), L.Dropout(0.1, dtype=dtype), dtype=dtype)
        fit(model, means, SWA(tmp_path, 1), epochs=8)
        assert len(means.kept) == 7
        assert_weights(model, means.expected())
        assert not np.array_equal(means.kept[0][0], means.kept[-1][0])
        assert {v.dtype for v in model.weights} == {dtype, "int32"}
        assert_weights(keras.models.load_model(tmp_path / "swa.keras"), means.expected())

    def test_cycles_are_captured_at_their_ends(self, tmp_path):
        means = Means(2, 3)
        model = small()
        fit(model, means, SWA(tmp_path, 2, cycle_length=3), epochs=9)
        assert len(means.kept) == 2
        assert_weights(model, means.expected())

    def test_a_model_with_batchnorm_gets_a_warning_or_fresh_statistics(self, tmp_path):
        with pytest.warns(UserWarning, match="the model has BatchNorm"):
            fit(small(L.BatchNormalization()), SWA(tmp_path, 2))
        model = keras.Sequential([keras.Input((4,)), L.BatchNormalization(), L.Dense(1)])
        with pytest.warns(UserWarning, match="have not settled"):
            fit(compiled(model), SWA(tmp_path, 2, bn_data=X, bn_batch_size=8))
        np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), X.mean(0), atol=1e-6)
        np.testing.assert_allclose(model.layers[0].moving_variance.numpy(), X.var(0), rtol=1e-5)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (np.ones((24, 5), "f"), "data: array: expected rows of shape [4]; found [5]"),
            (np.ones((24, 4), "c8"), "data: array: expected numbers; found complex64[24, 4]"),
            (np.array(["a"] * 24), "data: array: expected numbers; found <U1[24]"),
            (X[:0], "data: array: expected at least one row; found float32[0, 4]"),
            (np.where(np.arange(24)[:, None] == 7, np.nan, X), "data: array: expected finite numbers; found NaN or infinity in row 7"),
            ({"a": X, "b": X}, "data: expected input; found a float32[24, 4], b float32[24, 4]"),
            ([], "data: expected at least one row; found none"),
            ([X[:, :3]], "data: input: expected rows of shape [4]; found [3]"),
            (4, "data: expected arrays or an iterable of batches; found int"),
            ("gone.npz", "gone.npz: no such file or directory"),
        ],
    )  # fmt: skip
    def test_data_that_will_not_do_are_refused_before_training_and_as_a_refresh_would(
        self, tmp_path, data, problem
    ):
        recorder = Recorder()
        layers = [keras.Input((4,), name="input"), L.BatchNormalization(), L.Dense(1)]
        model = compiled(keras.Sequential(layers))
        with pytest.raises(UnreadableError) as error:
            fit(model, recorder, SWA(tmp_path / "run", 2, bn_data=data))
        assert str(error.value) == problem
        assert recorder.steps == []
        assert not (tmp_path / "run").exists()
        with pytest.raises(UnreadableError) as error:
            refresh_batchnorm(model, data)
        assert str(error.value) == problem

    def test_of_several_inputs_a_missing_one_is_named_before_training(self, tmp_path):
        a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
        model = compiled(keras.Model([a, b], L.Dense(1)(L.BatchNormalization()(L.Add()([a, b])))))
        for data, problem in (
            ({"a": X, "other": X}, "data: expected b; found a float32[24, 4], other float32[24, 4]"),
            ({"a": X, "b": X[:9]}, "data: expected arrays of one length; found a 24, b 9"),
            ([[X]], "data: expected batches of 2 inputs; found 1; give them as ['a', 'b']"),
        ):
            with pytest.raises(UnreadableError) as error:
                model.fit([X, X], Y, epochs=4, verbose=0, callbacks=[SWA(tmp_path, 2, bn_data=data)])
            assert str(error.value) == problem

    def test_data_that_never_end_are_refused_before_training_without_a_number_of_samples(self, tmp_path):
        tf = pytest.importorskip("tensorflow")
        endless = tf.data.Dataset.from_tensor_slices(X).batch(8).repeat()
        model = small(L.BatchNormalization())
        with pytest.raises(
            UsageError,
            match=r"data never ends; say how many samples to use \(samples, or bn_samples of SWA\)$",
        ):
            fit(model, SWA(tmp_path, 2, bn_data=endless))
        with pytest.warns(UserWarning, match="have not settled"):
            fit(model, SWA(tmp_path, 2, bn_data=endless, bn_samples=24))

    def test_batches_that_come_once_all_go_into_the_refresh(self, tmp_path):
        class Once:
            def __init__(self):
                self.batches = iter([X[:8], X[8:16], X[16:]])

            def __iter__(self):
                return self.batches

        for batches, samples in ((Once(), 24), (Once().batches, None), ((part for part in Once()), None)):
            model = keras.Sequential([keras.Input((4,)), L.BatchNormalization(), L.Dense(1)])
            with pytest.warns(UserWarning, match="have not settled"):
                fit(compiled(model), SWA(tmp_path, 2, bn_data=batches, bn_samples=samples))
            np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), X.mean(0), atol=1e-6)

    def test_the_look_at_the_data_leaves_global_generators_alone(self, tmp_path):
        class Noisy:
            def __len__(self):
                return 3

            def __getitem__(self, number):
                return X[8 * number : 8 * number + 8] + np.random.normal(size=(8, 4))

        class State(keras.callbacks.Callback):
            def on_train_begin(self, logs=None):
                self.found = np.random.get_state()[1].tolist(), np.random.get_state()[2]

        state = State()
        np.random.seed(3)
        expected = np.random.get_state()[1].tolist(), np.random.get_state()[2]
        with pytest.warns(UserWarning, match="have not settled"):
            fit(small(L.BatchNormalization()), SWA(tmp_path, 2, bn_data=Noisy()), state, shuffle=False)
        assert state.found == expected

    def test_what_will_come_of_batchnorm_is_said_as_training_begins(self, tmp_path):
        class StopHere(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                raise KeyboardInterrupt

        for model, data, said in (
            (small(L.BatchNormalization()), None, "statistics will not fit averaged weights: pass bn_data"),
            (small(), X, "the model has no BatchNorm to refresh: bn_data will change nothing"),
        ):
            with pytest.warns(UserWarning, match=said), pytest.raises(KeyboardInterrupt):
                fit(model, SWA(tmp_path, 2, bn_data=data), StopHere())

    def test_one_epoch_is_said_to_be_one(self, tmp_path):
        with pytest.warns(UserWarning, match="averaged one epoch only"):
            fit(small(), SWA(tmp_path, 3), epochs=4)

    def test_nothing_captured_leaves_the_weights_and_writes_nothing(self, tmp_path):
        recorder = Recorder()
        model = small()
        with pytest.warns(UserWarning, match="SWA saved nothing: expected the first"):
            fit(model, recorder, SWA(tmp_path, 10), epochs=2)
        assert_weights(model, recorder.epochs[2][: len(model.weights)])
        assert names(tmp_path) == []

    def test_a_second_fit_starts_anew(self, tmp_path):
        swa, model = SWA(tmp_path, 1), small()
        fit(model, swa, epochs=3)
        means = Means(1)
        fit(model, means, swa, epochs=3)
        assert_weights(model, means.expected())

    @pytest.mark.parametrize("name", ["swa.keras", "model.h5", "model.weights.h5"])
    def test_a_file_is_no_folder(self, tmp_path, name):
        with pytest.raises(UsageError, match="names a file; expected a folder"):
            SWA(tmp_path / name, 1)

    def test_checkpoints_stay_or_go_as_asked(self, tmp_path):
        fit(small(), SWA(tmp_path / "kept", 2))
        assert names(tmp_path / "kept") == [
            "checkpoints.json",
            "ckpt_0003.keras",
            "ckpt_0004.keras",
            "swa.keras",
        ]
        fit(small(), SWA(tmp_path / "gone", 2, keep_checkpoints=False))
        assert names(tmp_path / "gone") == ["checkpoints.json", "swa.keras"]
        assert index_of(tmp_path / "gone").entries == ()

    def test_epochs_of_an_earlier_longer_run_are_left_out(self, tmp_path):
        fit(small(), SWA(tmp_path, 1), epochs=6)
        model, means = small(), Means(1)
        fit(model, means, SWA(tmp_path, 1), epochs=3)
        assert_weights(model, means.expected())

    def test_weights_that_cannot_be_averaged_end_the_run_with_their_names(self, tmp_path):
        class Spoil(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                if epoch == 2:
                    self.model.layers[0].bias.assign(np.full(self.model.layers[0].bias.shape, np.nan))

        with pytest.raises(MismatchError, match=r"ckpt_0003.keras: layers/.*: holds NaN or infinity"):
            fit(small(), Spoil(), SWA(tmp_path, 1), epochs=3)


def test_only_the_chief_of_several_workers_writes(tmp_path, monkeypatch):
    model = small()

    class Extended:
        should_checkpoint = False

    class Strategy:
        extended = Extended()

    monkeypatch.setattr(type(model), "distribute_strategy", Strategy(), raising=False)
    saver = CheckpointSaver(tmp_path / "run")
    saver.save(model, 0)
    saver.wait()
    assert not (tmp_path / "run").exists()


MIRRORED = """
import sys
import numpy as np, tensorflow as tf, keras
from swa_avg.callbacks import SWA, CheckpointSaver
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
kept = []
class Keep(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        kept.append([v.numpy() for v in (*model.weights, *model.optimizer.variables)])
x, y = np.random.rand(16, 4).astype("f"), np.random.rand(16, 1).astype("f")
callbacks = [Keep(), CheckpointSaver(sys.argv[1] + "/run"), SWA(sys.argv[1] + "/swa", 0, bn_data=x)]
model.fit(x, y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
for n, expected in enumerate(kept, 1):
    loaded = keras.models.load_model(f"{sys.argv[1]}/run/ckpt_{n:04d}.keras")
    found = [v.numpy() for v in (*loaded.weights, *loaded.optimizer.variables)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), n
kernels = np.float32((kept[0][0].astype("d") + kept[1][0] + kept[2][0]) / 3)
assert np.array_equal(model.weights[0].numpy(), kernels)
print("same")
"""

OTHER_BACKEND = """
import sys
import numpy as np, keras
from swa_avg.callbacks import SWA, CheckpointSaver
from swa_avg.schedules import cyclic
assert keras.backend.backend() == sys.argv[2]
model = keras.Sequential(
    [keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5),
     keras.layers.Dense(1, dtype="bfloat16")]
)
model.compile(keras.optimizers.Adam(cyclic(0.1, 0.01, 2).by_step(3)), "mse", jit_compile=False)
epochs, steps = [], []
class Keep(keras.callbacks.Callback):
    def values(self):
        return [v.numpy() for v in (*self.model.weights, *self.model.optimizer.variables)]
    def on_train_batch_end(self, batch, logs=None):
        steps.append(self.values())
    def on_epoch_end(self, epoch, logs=None):
        epochs.append(self.values())
x, y = np.random.rand(24, 4).astype("f"), np.random.rand(24, 1).astype("f")
run, by_step, swa = (sys.argv[1] + name for name in ("/run", "/steps", "/swa"))
callbacks = [Keep(), CheckpointSaver(run), CheckpointSaver(by_step, every="2 steps"), SWA(swa, 1, bn_data=x)]
model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
def check(path, expected):
    loaded = keras.models.load_model(path)
    found = [v.numpy() for v in (*loaded.weights, *loaded.optimizer.variables)]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), path
for n, expected in enumerate(epochs, 1):
    check(f"{run}/ckpt_{n:04d}.keras", expected)
for n in range(2, 13, 2):
    check(f"{by_step}/ckpt_{(n + 2) // 3:04d}_{n:08d}.keras", steps[n - 1])
mean = np.float32((epochs[1][0].astype("d") + epochs[2][0] + epochs[3][0]) / 3)
assert np.array_equal(model.weights[0].numpy(), mean)
model.load_weights(swa + "/swa.keras")
assert np.array_equal(model.weights[0].numpy(), mean)
print("same")
"""


def test_a_mirrored_model_on_two_devices_is_saved_and_averaged(tmp_path, run_python, monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    ended = run_python(MIRRORED, tmp_path)
    assert ended.stdout.endswith("same\n"), ended.stderr


@pytest.mark.parametrize("backend", [b for b in ("jax", "torch") if find_spec(b)])
def test_other_backends_save_and_average_the_values_of_the_moment(tmp_path, run_python, monkeypatch, backend):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    ended = run_python(OTHER_BACKEND, tmp_path, backend)
    assert ended.stdout.endswith("same\n"), ended.stderr
