"""What is saved from the second time on, without h5py, is what Keras would have saved."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile

import numpy as np
import pytest

keras = pytest.importorskip("keras")

from swa_avg.callbacks import CheckpointSaver, writer  # noqa: E402
from swa_avg.errors import SystemRefusalError  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    # Keras's own, with NumPy 2.4
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # torch's own, when it compiles
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

L = keras.layers
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 4)).astype("f"), RNG.normal(size=(8, 1)).astype("f")
opt = keras.optimizers


def compiled(model, optimizer=None, **options):
    model.compile(optimizer or opt.Adam(0.01), "mse", metrics=["mae"], run_eagerly=True, **options)
    return model


def small(*extra, optimizer=None, dtype=None):
    layers = [L.Dense(3, dtype=dtype), *extra, L.Dense(1, dtype=dtype)]
    return compiled(keras.Sequential([keras.Input((4,)), *layers]), optimizer)


@keras.saving.register_keras_serializable("writer")
class Subclassed(keras.Model):
    """Layers in nested containers, a variable and a seed of its own, and a metric as an attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = {"first": [L.Dense(3), L.Dropout(0.5)], "second": (L.Dense(2), [L.Dense(1)])}
        self.calls = self.add_weight(shape=(), dtype="int32", trainable=False, name="calls")
        self.seeds = keras.random.SeedGenerator(3)
        self.seen = keras.metrics.Mean(name="seen")

    def build(self, shape):
        self.blocks["first"][0].build((None, 4))
        self.blocks["second"][0].build((None, 3))
        self.blocks["second"][1][0].build((None, 2))
        super().build(shape)

    def call(self, inputs, training=False):
        for layer in (*self.blocks["first"], self.blocks["second"][0], *self.blocks["second"][1]):
            inputs = layer(inputs)
        self.calls.assign(self.calls + 1)
        return inputs


@keras.saving.register_keras_serializable("writer")
class TwoOptimizers(keras.Model):
    """An optimizer for each half, as a GAN has."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two = L.Dense(3), L.Dense(1)
        self.first_optimizer, self.second_optimizer = opt.Adam(0.01), opt.RMSprop(0.01, momentum=0.5)

    def build(self, shape):
        self.one.build((None, 4))
        self.two.build((None, 3))
        self.first_optimizer.build(self.one.trainable_variables)
        self.second_optimizer.build(self.two.trainable_variables)
        super().build(shape)

    def call(self, inputs):
        return self.two(self.one(inputs))


@keras.saving.register_keras_serializable("writer")
class OwnValues(L.Layer):
    """Saves something that it computes from its variable, in an order and under names of its own."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[1:], initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale

    def save_own_variables(self, store):
        store["scale"] = self.scale
        store["doubled"] = self.scale.numpy() * 2
        store["count"] = 3

    def load_own_variables(self, store):
        self.scale.assign(store["scale"])


def shared():
    inputs = keras.Input((4,))
    layer, inner = L.Dense(4), keras.Sequential([L.Dense(4), L.BatchNormalization()])
    return keras.Model(inputs, L.Dense(1)(inner(layer(layer(inner(inputs))))))


def with_lora():
    model = small()
    model.layers[0].enable_lora(2)
    return compiled(model)


def normalized():
    layer = L.Normalization()
    layer.adapt(X)
    return keras.Sequential([keras.Input((4,)), layer, L.Dense(1)])


SETUPS = {
    "BatchNorm, dropout": lambda: small(L.BatchNormalization(), L.Dropout(0.5)),
    "bfloat16": lambda: small(dtype="bfloat16", optimizer=opt.SGD(0.05)),
    "float16": lambda: small(dtype="float16", optimizer=opt.SGD(0.05)),
    "mixed_float16": lambda: small(L.BatchNormalization(), dtype="mixed_float16"),
    "mixed_bfloat16": lambda: small(L.BatchNormalization(), dtype="mixed_bfloat16"),
    "moving averages": lambda: small(optimizer=opt.AdamW(0.01, use_ema=True)),
    "accumulated gradients": lambda: small(optimizer=opt.Adam(0.01, gradient_accumulation_steps=2)),
    "loss scale": lambda: small(optimizer=opt.LossScaleOptimizer(opt.Adam(0.01), dynamic_growth_steps=2)),
    "schedule": lambda: small(optimizer=opt.SGD(opt.schedules.ExponentialDecay(0.1, 2, 0.5), momentum=0.9)),
    "subclassed": lambda: compiled(Subclassed()),
    "two optimizers": lambda: compiled(TwoOptimizers()),
    "shared layers": lambda: compiled(shared()),
    "recurrent": lambda: compiled(
        keras.Sequential([keras.Input((4,)), L.Reshape((4, 1)), L.Bidirectional(L.LSTM(2)), L.Dense(1)])
    ),
    "convolution, spectral norm": lambda: compiled(
        keras.Sequential(
            [keras.Input((4,)), L.Reshape((2, 2, 1)), L.Conv2D(2, 2), L.Flatten(), L.SpectralNormalization(L.Dense(1))]
        )
    ),
    "normalization": lambda: compiled(normalized()),
    "own values": lambda: small(OwnValues()),
    "LoRA": with_lora,
    "no weights of the optimizer": lambda: small(optimizer=opt.SGD(0.05)),
}  # fmt: skip


def train(model):
    for variable in model.trainable_variables:  # whatever the dtype, every one changes
        variable.assign(variable + 0.25)
    model.train_on_batch(X, Y)


@pytest.fixture
def by_keras(monkeypatch):
    """Count what is written through Keras."""
    written = []
    for name in ("save", "save_weights"):
        through = getattr(keras.Model, name)

        def counted(self, path, *arguments, through=through, **options):
            written.append(path)
            return through(self, path, *arguments, **options)

        monkeypatch.setattr(keras.Model, name, counted)
    return written


def described(path):
    """Return everything in an archive but dates, and the checksum of the member that holds one."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
        metadata = json.loads(contents.pop("metadata.json"))
        assert metadata.pop("date_saved")
        fields = [name for name in zipfile.ZipInfo.__slots__ if name not in ("date_time", "_raw_time", "CRC")]
        members = [[getattr(info, name, None) for name in fields] for info in archive.infolist()]
        return path.stat().st_size, archive.start_dir, members, metadata, contents


def assert_same(path, reference):
    if path.suffix == ".keras":
        assert described(path) == described(reference)
    else:
        assert path.read_bytes() == reference.read_bytes()


class Memory(io.BytesIO):
    """Where weights are saved: libhdf5 gives a file that it opens itself a longer end."""

    def __str__(self):
        return "memory.weights.h5"


def written_to(folder, by_keras):
    return [path for path in by_keras if folder in getattr(path, "parents", ())]


def save_beside(saver, model, tmp_path, epoch, *, train_on=True):
    """Save a model, and let Keras save it; compare the two."""
    name = saver._names.name(epoch + 1, None, {})
    reference = tmp_path / name
    if name.endswith(".keras"):
        model.save(reference)
    else:
        weights = Memory()
        model.save_weights(weights)
        reference.write_bytes(weights.getvalue())
    saver.save(model, epoch)
    if train_on:
        train(model)  # while the file is being written
    saver.wait()
    assert_same(tmp_path / "run" / name, reference)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("weights_only", [False, True])
def test_later_files_are_what_keras_would_have_written(tmp_path, by_keras, setup, weights_only):
    model = SETUPS[setup]()
    saver = CheckpointSaver(tmp_path / "run", weights_only=weights_only)
    train(model)
    for epoch in range(3):
        save_beside(saver, model, tmp_path, epoch)
        model.optimizer.weight_decay = 0.25 * epoch  # which config.json says
        train(model)
    # Weights alone go to memory, where those of `save_beside` are, too.
    assert len(written_to(tmp_path / "run", by_keras) or by_keras[3:]) == 1


@pytest.mark.parametrize("background", [True, False])
def test_without_a_thread_the_files_are_the_same(tmp_path, by_keras, background):
    model = small(L.BatchNormalization())
    saver = CheckpointSaver(tmp_path / "run", background=background)
    train(model)
    for epoch in range(3):
        save_beside(saver, model, tmp_path, epoch)
    assert len(written_to(tmp_path / "run", by_keras)) == 1


CHANGES = {
    "a layer more": (small, lambda model: model.add(L.Dense(1)), 2),
    "another optimizer": (small, lambda model: compiled(model, opt.SGD(0.01, momentum=0.9)), 2),
    "other layers to train": (small, lambda model: setattr(model.layers[0], "trainable", False), 1),
    "LoRA": (small, lambda model: model.layers[0].enable_lora(2), 1),
    "quantized": (small, lambda model: model.quantize("int8"), 2),
    "another name": (Subclassed, lambda model: setattr(model.blocks["first"][0], "name", "other"), 2),
}


@pytest.mark.filterwarnings("ignore:.* does not have a `quantize` method")
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_saves_is_saved_and_learnt_anew(tmp_path, by_keras, change):
    make, do, expected = CHANGES[change]
    model = compiled(make())
    saver = CheckpointSaver(tmp_path / "run")
    train(model)
    for epoch in range(2):
        save_beside(saver, model, tmp_path, epoch)
    do(model)
    for epoch in range(2, 5):
        save_beside(saver, model, tmp_path, epoch, train_on=False)
        model.layers[-1].bias.assign(model.layers[-1].bias + 1)
    assert len(written_to(tmp_path / "run", by_keras)) == expected


def test_a_model_with_assets_is_saved_by_keras_every_time(tmp_path, by_keras):
    pytest.importorskip("tensorflow")
    inputs = keras.Input((), dtype="string")
    numbers = L.TextVectorization(vocabulary=["a", "b"], output_sequence_length=3)(inputs)
    model = compiled(keras.Model(inputs, L.Dense(1)(L.Flatten()(L.Embedding(8, 2)(numbers)))))
    saver = CheckpointSaver(tmp_path / "run")
    for epoch in range(3):
        save_beside(saver, model, tmp_path, epoch, train_on=False)
    assert len(written_to(tmp_path / "run", by_keras)) == 3


@keras.saving.register_keras_serializable("writer")
class Counting(L.Layer):
    """Saves another value every time that it is asked."""

    asked = 0

    def save_own_variables(self, store):
        self.asked += 1
        store["asked"] = np.float32(self.asked)

    def load_own_variables(self, store):
        self.loaded = store["asked"]

    def call(self, inputs):
        return inputs


def test_where_the_first_file_does_not_come_out_again_keras_writes_every_file(tmp_path, by_keras):
    model = small(Counting())
    with CheckpointSaver(tmp_path / "run") as saver:
        for epoch in range(3):
            saver.save(model, epoch)
    assert len(by_keras) == 3


@keras.saving.register_keras_serializable("writer")
class SavesItself(Subclassed):
    """Writes something beside every file."""

    def save(self, path, *arguments, **options):
        super().save(path, *arguments, **options)
        path.with_suffix(".txt").write_text("beside")


def test_a_class_that_saves_in_a_way_of_its_own_is_asked_every_time(tmp_path):
    model = compiled(SavesItself())
    train(model)
    saver = CheckpointSaver(tmp_path / "run")
    for epoch in range(3):
        save_beside(saver, model, tmp_path, epoch)
    assert len(list((tmp_path / "run").glob(".tmp-*.txt"))) == 3


def test_another_keras_without_these_internals_writes_every_file(tmp_path, by_keras, monkeypatch):
    monkeypatch.setattr(writer, "saving_lib", object())
    model = small()
    train(model)
    saver = CheckpointSaver(tmp_path / "run")
    for epoch in range(2):
        save_beside(saver, model, tmp_path, epoch)
    assert len(written_to(tmp_path / "run", by_keras)) == 2


@pytest.mark.parametrize("fault", ["gone", "truncated", "overwritten", "another model's"])
@pytest.mark.parametrize("weights_only", [False, True])
def test_what_happens_to_the_first_file_does_not_reach_the_next(tmp_path, fault, weights_only):
    model = small(L.BatchNormalization())
    saver = CheckpointSaver(tmp_path / "run", weights_only=weights_only)
    train(model)
    save_beside(saver, model, tmp_path, 0)
    (path,) = (tmp_path / "run").glob("ckpt*")
    if fault == "gone":
        path.unlink()
    elif fault == "truncated":
        os.truncate(path, 1000)
    elif fault == "overwritten":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        small(L.Dense(9)).save(tmp_path / "other.keras")
        (tmp_path / "other.keras").replace(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*ckpt_0001\.\S+ is gone; it leaves the index")
        save_beside(saver, model, tmp_path, 1)


def test_a_variable_of_another_size_is_found_before_the_file_has_its_name(tmp_path, monkeypatch):
    model = small()
    train(model)
    saver = CheckpointSaver(tmp_path / "run", background=False)
    saver.save(model, 0)
    monkeypatch.setattr(writer, "value_of", lambda variable: variable.numpy()[..., :1])
    with pytest.raises(ValueError, match=r"the bytes before .* of a shard end at"):
        saver.save(model, 1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints.json",
        "ckpt_0001.keras",
    ]


def test_what_does_not_read_back_is_found_before_the_file_has_its_name(tmp_path, monkeypatch):
    model = small()
    train(model)
    saver = CheckpointSaver(tmp_path / "run")
    save_beside(saver, model, tmp_path, 0)
    through = writer._Store.value

    damaged = []

    def damaging(self, tensor):
        (temporary,) = (tmp_path / "run").glob(".tmp-*")
        if not damaged and temporary.stat().st_size > 1000:
            with temporary.open("rb+") as file:  # the disk does not keep what was written
                byte = file.seek(999) and file.read(1)
                file.seek(999)
                damaged.append(file.write(bytes([byte[0] ^ 1])))
        return through(self, tensor)

    monkeypatch.setattr(writer._Store, "value", damaging)
    with pytest.raises(SystemRefusalError, match="what was written does not read back the same"):
        save_beside(saver, model, tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints.json",
        "ckpt_0001.keras",
    ]
