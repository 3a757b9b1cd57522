"""Models and data as people have them: structures, endless data, compiled functions, other writers' files."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Ended
from swa_avg.errors import SwaAvgWarning, UnreadableError, UsageError

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from swa_avg import Refresh, average, refresh_batchnorm  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's own things"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file"),
]

Cli = Callable[..., Ended]
L = keras.layers
RNG = np.random.default_rng(0)
A = RNG.normal(3, 2, (192, 4)).astype("float32")
B = RNG.normal(-1, 1, (192, 2)).astype("float32")
Y = RNG.normal(size=(192, 3)).astype("float32")
BOTH = np.concatenate([A, B], axis=1)
TOLERANCE = 2e-5


def assert_moments(layer: Any, values: np.ndarray) -> None:
    """Compare a layer's statistics with float64 moments, in standard deviations."""
    values = values.astype(np.float64).reshape(-1, values.shape[-1])
    deviation = values.std(axis=0)
    assert (np.abs(np.array(layer.moving_mean) - values.mean(axis=0)) / deviation).max() < TOLERANCE
    assert np.abs(np.array(layer.moving_variance) / values.var(axis=0) - 1).max() < 2 * TOLERANCE


# --- structures of inputs -----------------------------------------------------------------------------------------


class Towers(keras.Model):
    """Takes a tuple, or a list."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = L.BatchNormalization(name="bn")
        self.head = L.Dense(3)

    def call(self, inputs: Any, training: Any = None) -> Any:
        a, b = inputs
        return self.head(self.bn(keras.ops.concatenate([a, b], -1), training=training))


class Keyed(Towers):
    def call(self, inputs: Any, training: Any = None) -> Any:
        return super().call((inputs["a"], inputs["b"]), training)


class Deep(Towers):
    def call(self, inputs: Any, training: Any = None) -> Any:
        return super().call((inputs[0], inputs[1]["b"][0]), training)


def fitted(model: Any, x: Any) -> Any:
    model.compile("sgd", "mse")
    model.fit(x, Y, verbose=0, batch_size=64)
    return model


def functional(structure: Callable[[Any, Any], Any]) -> Any:
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    joined = L.Concatenate()([a, b])
    return keras.Model(structure(a, b), L.Dense(3)(L.BatchNormalization(name="bn")(joined)))


MODELS = {
    "tuple": (lambda: fitted(Towers(), (A, B)), lambda a, b: (a, b)),
    "list": (lambda: fitted(Towers(), [A, B]), lambda a, b: [a, b]),
    "dict": (lambda: fitted(Keyed(), {"a": A, "b": B}), lambda a, b: {"a": a, "b": b}),
    "deep": (lambda: fitted(Deep(), [A, {"b": [B]}]), lambda a, b: [a, {"b": [b]}]),
    "functional list": (lambda: functional(lambda a, b: [a, b]), lambda a, b: [a, b]),
    "functional dict": (lambda: functional(lambda a, b: {"a": a, "b": b}), lambda a, b: {"b": b, "a": a}),
    "functional nested": (lambda: functional(lambda a, b: [a, {"m": b}]), lambda a, b: [a, {"m": b}]),
    "functional tuples": (
        lambda: functional(lambda a, b: ((a,), {"m": (b,)})),
        lambda a, b: ((a,), {"m": (b,)}),
    ),
}


def tuples(tree: Any) -> Any:
    """Return a structure with tuples for lists, which tf.data would take for arrays."""
    if isinstance(tree, dict):
        return {key: tuples(part) for key, part in tree.items()}
    return tuple(map(tuples, tree)) if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("kind", MODELS)
def test_data_come_in_the_structure_that_fit_takes(kind: str) -> None:
    make, structure = MODELS[kind]
    model = make()
    slices = [slice(start, start + 48) for start in range(0, 192, 48)]
    x = structure(A, B)
    dataset = tf.data.Dataset.from_tensor_slices((tuples(x), Y)).batch(50)
    sources: list[Any] = [
        (x, Y),
        (x, Y, np.ones(192)),
        [(structure(A[part], B[part]), Y[part]) for part in slices],
        ((structure(A[part], B[part]), Y[part], np.ones(48)) for part in slices),
        dataset,
        dataset.map(lambda x, y: (x,)),
        x,
    ]
    for source in sources:
        model.get_layer("bn").moving_mean.assign(np.zeros(6))
        report = refresh_batchnorm(model, source)
        assert report.samples == 192
        assert_moments(model.get_layer("bn"), BOTH)


def test_a_subclassed_model_that_was_loaded_takes_its_structure_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Cli
) -> None:
    (tmp_path / "towers.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable('everyday')\n"
        "class Saved(keras.Model):\n"
        "    def __init__(self, **kw):\n"
        "        super().__init__(**kw)\n"
        "        self.bn, self.head = keras.layers.BatchNormalization(), keras.layers.Dense(3)\n"
        "    def call(self, inputs, training=None):\n"
        "        a, b = inputs\n"
        "        return self.head(self.bn(keras.ops.concatenate([a, b], -1), training=training))\n"
        "def pack(batch):\n"
        "    return batch['left'], batch['right']\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import towers  # type: ignore[import-not-found]

    model = fitted(towers.Saved(), (A, B))
    save_two(model, tmp_path, ".keras")
    np.savez("train.npz", left=A, right=B)
    command = (
        "ckpt_1.keras",
        "ckpt_2.keras",
        "--import",
        "towers",
        "-o",
        "o.keras",
        "--overwrite",
        "--bn-refresh",
    )
    for options in (
        ("--bn-input", "left", "--bn-input", "right"),
        ("--bn-input", "right=1", "--bn-input", "left=0"),
        ("--bn-input", "left=left", "--bn-input", "right=right", "--bn-preprocess", "towers:pack"),
    ):
        ended = swa_avg(*command, "train.npz", *options)
        assert ended.code == 0, ended.err
        assert_moments(keras.models.load_model("o.keras").bn, BOTH)
    ended = swa_avg(*command, "train.npz")
    assert (ended.code, ended.err.count("\n")) == (3, 1)
    assert "expected 0 and 1; found left float32[192, 4], right float32[192, 2]" in ended.err


def test_an_optional_input_may_be_left_out() -> None:
    class Default(L.Layer):
        def call(self, a: Any, b: Any = None) -> Any:
            return a if b is None else a + keras.ops.sum(b, -1, keepdims=True)

    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b", optional=True)
    for structure, sources in (
        ([a, b], [[A, None], {"a": A}, [[A[:96], None], [A[96:], None]]]),
        ({"a": a, "b": b}, [{"a": A}, {"a": A, "b": None}]),
    ):
        model = keras.Model(structure, L.BatchNormalization(name="bn")(Default()(a, b)))
        for source in sources:
            refresh_batchnorm(model, source)
            assert_moments(model.get_layer("bn"), A)
        with pytest.raises(UnreadableError, match="expected a"):
            refresh_batchnorm(model, {"b": B})


def test_what_has_another_structure_is_refused_with_the_right_one() -> None:
    model = functional(lambda a, b: {"a": a, "b": b})
    for source, found in (([[A, B]], "1"), ([((A, B, B), Y)], "3"), (((A, B), Y), "another structure")):
        with pytest.raises(UnreadableError) as caught:
            refresh_batchnorm(model, source)
        expected = f"data: expected batches of 2 inputs; found {found}; give them as {{'a': 'a', 'b': 'b'}}"
        assert str(caught.value) == expected
    one = keras.Sequential([keras.Input((4,)), L.BatchNormalization()])
    with pytest.raises(UnreadableError, match="expected batches of 1 input; found 2"):
        refresh_batchnorm(one, ((A, Y), (A[:9], Y[:9])))  # as load_data returns training and test data
    with pytest.raises(UnreadableError, match="these are single rows: put them together"):
        refresh_batchnorm(one, tf.data.Dataset.from_tensor_slices(A))


def test_values_that_a_layer_does_not_take_are_one_line() -> None:
    model = keras.Sequential([keras.Input((3,)), L.Embedding(4, 2), L.BatchNormalization()])
    with pytest.raises(UnreadableError, match=r"^data: the model does not take this data \(.*9.*\)$"):
        refresh_batchnorm(model, [np.ones((8, 3)), np.full((8, 3), 9)])


# --- text ---------------------------------------------------------------------------------------------------------


WORDS = np.array(["the cat sat", "a dog", "the dog sat on a cat", "cat"] * 16)


def text_model() -> tuple[Any, np.ndarray]:
    vectorize = L.TextVectorization(30, output_sequence_length=5)
    vectorize.adapt(WORDS)
    embed = L.Embedding(30, 4)
    model = keras.Sequential(
        [
            keras.Input((), dtype="string", name="text"),
            vectorize,
            embed,
            L.BatchNormalization(name="bn"),
            L.Flatten(),
        ]
    )
    ids = np.array(vectorize(tf.constant(WORDS)))
    return model, np.array(embed.embeddings)[ids]


def test_strings_are_data_where_the_model_takes_strings(tmp_path: Path) -> None:
    model, seen = text_model()
    np.savez(tmp_path / "text.npz", text=WORDS, label=np.arange(64))
    np.save(tmp_path / "text.npy", WORDS.astype("S20"))
    tf.data.Dataset.from_tensor_slices(WORDS).save(str(tmp_path / "rows"))
    for source in (
        WORDS,
        WORDS.astype(object),
        tf.constant(WORDS),
        [WORDS[:20], tf.constant(WORDS[20:])],
        tf.data.Dataset.from_tensor_slices((WORDS, np.zeros(64))).batch(20),
        tmp_path / "text.npz",
        tmp_path / "text.npy",
        tmp_path / "rows",
    ):
        report = refresh_batchnorm(model, source)
        assert report.samples == 64
        assert_moments(model.get_layer("bn"), seen)
    assert refresh_batchnorm(model, WORDS).digest != refresh_batchnorm(model, WORDS[::-1]).digest


def test_strings_may_be_what_a_function_makes_numbers_of() -> None:
    model = keras.Sequential([keras.Input((1,)), L.BatchNormalization(name="bn")])
    lengths = np.array([[len(text)] for text in WORDS], np.float32)
    refresh_batchnorm(
        model, WORDS, preprocess=lambda batch: np.array([[len(text)] for text in batch], np.float32)
    )
    assert_moments(model.get_layer("bn"), lengths)
    for source in (WORDS, [WORDS]):
        with pytest.raises(UnreadableError, match="expected numbers; found <U20"):
            refresh_batchnorm(model, source)


# --- ragged batches -----------------------------------------------------------------------------------------------


IDS = [RNG.integers(1, 20, 2 + number % 5).tolist() for number in range(64)]


def ragged_model(pool: Any) -> tuple[Any, Any]:
    embed = L.Embedding(20, 4)
    inputs = keras.Input((None,), dtype="int64", name="ids")
    return keras.Model(inputs, L.BatchNormalization(name="bn")(pool(embed(inputs)))), embed


@pytest.mark.parametrize("pool", [L.GlobalAveragePooling1D, lambda: L.Lambda(lambda x: tf.reduce_sum(x, 1))])
def test_ragged_batches_are_used_as_they_are(pool: Any, tmp_path: Path) -> None:
    model, embed = ragged_model(pool())
    total = np.stack([np.array(embed.embeddings, np.float64)[row].sum(0) for row in IDS])
    lengths = np.array([len(row) for row in IDS])[:, None]
    seen = total / lengths if pool is L.GlobalAveragePooling1D else total
    ragged = tf.ragged.constant(IDS, dtype="int64")
    dataset = tf.data.Dataset.from_tensor_slices((ragged, np.zeros(64)))
    dataset.save(str(tmp_path / "rows"))
    for source in (
        dataset.batch(20),
        [ragged[:30], ragged[30:]],
        [(ragged, np.zeros(64))],
        [tf.concat([ragged, ragged], 0)],
        tmp_path / "rows",
    ):
        refresh_batchnorm(model, source)
        assert_moments(model.get_layer("bn"), seen)
    assert refresh_batchnorm(model, dataset.batch(20), samples=33).samples == 33
    numbers = keras.Sequential([keras.Input((None, 1)), pool(), L.BatchNormalization()])
    spoiled = tf.ragged.constant([[[1.0]], [[2.0], [np.nan]]], ragged_rank=1)
    with pytest.raises(UnreadableError, match="found NaN or infinity in row 65"):
        refresh_batchnorm(numbers, [tf.ones((64, 1, 1)), spoiled])


# --- data that do not end -----------------------------------------------------------------------------------------


def plain() -> Any:
    return keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="bn")])


def endless() -> Any:
    while True:
        yield A[:96]
        yield A[96:]


def ending() -> Any:
    for number in itertools.count():
        if number == 4:
            return
        yield A[48 * number : 48 * number + 48]


class Flow:
    """As Keras's ImageDataGenerator.flow: a length, batches by number, and an iterator that never ends."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Any:
        return A[48 * number : 48 * number + 48], Y[:48]

    def __iter__(self) -> Any:
        return itertools.cycle([self[0]])


class Unsized(keras.utils.PyDataset):
    def __getitem__(self, number: int) -> Any:
        return A[:48], Y[:48]


class Endless:
    """As torch's IterableDataset: no length, and a generator."""

    def __iter__(self) -> Any:
        rng = np.random.default_rng(0)
        while True:
            yield rng.permutation(A)[:50]


class Ending:
    def __iter__(self) -> Any:
        yield from ending()


class Loader:
    """As torch's DataLoader of an IterableDataset: no length, and an iterator in a class of its own."""

    def __init__(self, batches: Callable[[], Any]) -> None:
        self._make = batches

    def __iter__(self) -> Any:
        return type("_Iterator", (), {"__iter__": lambda it: it, "__next__": self._make().__next__})()


def made_by(generator: Callable[[], Any]) -> Any:
    return tf.data.Dataset.from_generator(generator, output_signature=tf.TensorSpec((None, 4)))


def records(folder: Path) -> Any:
    """Return the rows of A from files of records, whose number TensorFlow does not know."""
    with tf.io.TFRecordWriter(str(folder / "a.rec")) as writer:
        for row in A:
            writer.write(row.tobytes())
    files = tf.data.Dataset.list_files(str(folder / "*.rec"))
    rows = files.interleave(tf.data.TFRecordDataset).map(lambda row: tf.io.decode_raw(row, tf.float32))
    return rows.map(lambda row: tf.ensure_shape(row, (4,))).batch(48).prefetch(1)


def test_what_ends_is_read_once_through(tmp_path: Path) -> None:
    sources = [
        Flow(),
        ending(),
        Ending(),
        iter([A]),
        map(np.asarray, ending()),
        records(tmp_path),
        made_by(ending).map(lambda batch: batch).prefetch(1),
        made_by(lambda: (batch for batch in ending())).batch(1).unbatch(),
        made_by(ending).take(4),
        made_by(ending).apply(tf.data.experimental.assert_cardinality(4)),
        made_by(endless).take(2).map(lambda batch: batch),
    ]
    for source in sources:
        model = plain()
        assert refresh_batchnorm(model, source).samples == 192
        assert_moments(model.get_layer("bn"), A)
    assert refresh_batchnorm(plain(), Flow(), samples=100).samples == 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: made_by(partial(Loader, endless)).shuffle(4).prefetch(2),
        lambda: made_by(partial(Loader, ending)),
        lambda: tf.data.Dataset.range(2).interleave(lambda _: made_by(endless)),
        lambda: Loader(endless),
        lambda: Loader(ending),
        lambda: made_by(endless).as_numpy_iterator(),
    ],
)
def test_what_may_not_end_needs_a_number_of_samples(make: Callable[[], Any], tmp_path: Path) -> None:
    from swa_avg.callbacks import SWA

    with pytest.raises(
        UsageError, match="data has no length, and may never end; say how many samples to use"
    ):
        refresh_batchnorm(plain(), make())
    assert refresh_batchnorm(plain(), make(), samples=150).samples == 150
    model = plain()
    model.compile("sgd", "mse")
    with pytest.raises(UsageError, match="data has no length, and may never end"):
        model.fit(A, Y, verbose=0, callbacks=[SWA(tmp_path, 0, bn_data=make())])
    assert not list(tmp_path.glob("*.keras"))


@pytest.mark.parametrize(
    "make",
    [
        endless,
        Unsized,
        lambda: itertools.cycle([A]),
        lambda: tf.data.Dataset.from_tensors(A).repeat(),
        lambda: tf.data.Dataset.from_tensors(A).repeat().filter(lambda batch: True),
        lambda: tf.data.Dataset.from_tensors(A).interleave(lambda batch: made_by(ending).repeat()).repeat(),
        lambda: made_by(endless).shuffle(4).prefetch(2),
        Endless,
        lambda: (batch for batch in endless()),
        lambda: itertools.chain(endless()),
    ],
)
def test_what_does_not_end_needs_a_number_of_samples(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match="never ends; say how many samples to use"):
        refresh_batchnorm(plain(), make())
    assert refresh_batchnorm(plain(), make(), samples=150).samples == 150


@pytest.mark.filterwarnings("ignore:the statistics have not settled")
def test_data_that_do_not_end_are_refused_before_training(tmp_path: Path) -> None:
    from swa_avg.callbacks import SWA

    model = keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="bn"), L.Dense(3)])
    model.compile("sgd", "mse")
    trained: list[int] = []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: trained.append(epoch))
    with pytest.raises(UsageError, match="data never ends; say how many samples to use"):
        model.fit(A, Y, verbose=0, callbacks=[count, SWA(tmp_path, 0, bn_data=endless())])
    assert not trained
    model.fit(A, Y, epochs=2, verbose=0, callbacks=[SWA(tmp_path, 0, bn_data=endless(), bn_samples=192)])
    assert_moments(model.get_layer("bn"), A)


# --- functions that compile themselves ----------------------------------------------------------------------------


class Whole(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.bn = L.BatchNormalization(name="bn")
        self.head = L.Dense(3)

    @tf.function
    def call(self, x: Any, training: Any = False) -> Any:
        return self.head(self.bn(x, training=training))


class InMethod(Whole):
    def call(self, x: Any, training: Any = False) -> Any:
        return self.head(self.normalized(x, training))

    @tf.function(reduce_retracing=True)
    def normalized(self, x: Any, training: Any) -> Any:
        return self.bn(x, training=training)


class Deciding(Whole):
    @tf.function
    def call(self, x: Any, training: Any = False) -> Any:
        while tf.reduce_sum(x) < 0:  # AutoGraph makes a loop of it
            x = x + 1.0
        return self.head(self.bn(x, training=training))


@pytest.mark.parametrize("kind", [Whole, InMethod])
def test_layers_inside_functions_that_compile_themselves_are_seen(kind: Any) -> None:
    fresh, trained = kind(), kind()
    fresh(A[:2])
    trained(A[:2])
    trained.compile("sgd", "mse")
    trained.fit(A, Y, verbose=0)
    trained(A[:64], training=True)  # traced before
    for model in (fresh, trained):
        refresh_batchnorm(model, A, batch_size=64)
        assert_moments(model.bn, A)
        assert not tf.config.functions_run_eagerly()


def test_a_model_that_decides_by_values_runs_eagerly_and_says_so() -> None:
    model = Deciding()
    model(A[:2])
    report = refresh_batchnorm(model, A, batch_size=64)
    assert_moments(model.bn, A)
    assert any("uncompiled" in note for note in report.notes)
    assert not tf.config.functions_run_eagerly()


# --- where a file stores statistics -------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("everyday")
class Block(L.Layer):
    """A layer that holds layers, two of a kind."""

    def __init__(self, scale: bool = False, center: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.first, self.second = L.Dense(4), L.Dense(4)
        self.norm = L.BatchNormalization(scale=scale, center=center)

    def build(self, shape: Any) -> None:
        self.first.build(shape)
        self.second.build(shape)
        self.norm.build((*shape[:-1], 4))
        self.built = True

    def call(self, x: Any, training: Any = None) -> Any:
        return self.norm(self.first(x) + self.second(x), training=training)


def block_model() -> Any:
    return keras.Sequential([keras.Input((4,)), Block(name="block"), L.Dense(2)])


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (True, False), (False, True), (False, False)])
def test_statistics_in_a_custom_layer_are_not_averaged_without_a_word(
    scale: bool, center: bool, suffix: str, tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((4,)), Block(scale, center), L.Dense(2)])
    for number in (1, 2):
        model.set_weights([weights + number for weights in model.get_weights()])
        (model.save_weights if suffix == ".weights.h5" else model.save)(tmp_path / f"a_{number}{suffix}")
    with pytest.warns(
        SwaAvgWarning, match=rf"^BatchNorm statistics are averaged.*\({model.layers[0].norm.name}\)"
    ):
        average(tmp_path / f"a_*{suffix}", tmp_path / f"swa{suffix}")


def reordered_model() -> Any:
    """Layers that were made in another order than they are called, and whose statistics are equal at first."""
    last, first = L.Dense(4, name="a"), L.Dense(4, name="b")
    norm = L.BatchNormalization(name="c")
    return keras.Sequential([keras.Input((4,)), first, L.BatchNormalization(name="d"), last, norm])


def nested_model() -> Any:
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4), L.BatchNormalization(), L.Dense(4)])
    inputs = keras.Input((4,))
    return keras.Model(inputs, L.BatchNormalization(center=False)(inner(inputs)))


def inputs_of_norms(model: Any) -> list[tuple[Any, np.ndarray]]:
    """Return each BatchNorm layer with what it sees, in training mode, in float64."""
    seen: list[tuple[Any, np.ndarray]] = []

    def through(layer: Any, x: np.ndarray) -> np.ndarray:
        if isinstance(layer, keras.Model):
            for part in layer.layers:
                x = through(part, x)
        elif isinstance(layer, Block):
            total = through(layer.first, x) + through(layer.second, x)
            x = through(layer.norm, total)
        elif isinstance(layer, L.Dense):
            kernel, bias = (np.array(weights, np.float64) for weights in layer.get_weights())
            x = x @ kernel + bias
        elif isinstance(layer, L.BatchNormalization):
            seen.append((layer, x))
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + layer.epsilon)
            x = x if layer.gamma is None else x * np.array(layer.gamma, np.float64)
            x = x if layer.beta is None else x + np.array(layer.beta, np.float64)
        return x

    through(model, A.astype(np.float64))
    return seen


def save_two(model: Any, folder: Path, suffix: str) -> None:
    for number in (1, 2):
        model.set_weights([weights + 0.1 * number for weights in model.get_weights()])
        save = model.save_weights if suffix.startswith(".weights") else model.save
        save(folder / f"ckpt_{number}{suffix}")


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize("make", [block_model, reordered_model, nested_model])
def test_statistics_are_found_wherever_a_file_stores_them(make: Any, suffix: str, tmp_path: Path) -> None:
    model = make()
    save_two(model, tmp_path, suffix)
    model.save(tmp_path / "model.keras")
    refresh = Refresh(
        A, batch_size=192, model=str(tmp_path / "model.keras") if suffix == ".weights.h5" else None
    )
    output = tmp_path / f"swa{suffix}"
    average([tmp_path / f"ckpt_{number}{suffix}" for number in (1, 2)], output, refresh=refresh)
    model.load_weights(output)
    norms = inputs_of_norms(model)
    assert len(norms) >= 1
    for layer, values in norms:
        assert_moments(layer, values)


def test_files_of_keras_2_are_refreshed(tmp_path: Path) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    layers = tf_keras.layers
    save_two(
        tf_keras.Sequential([layers.InputLayer((4,)), layers.Dense(4), layers.BatchNormalization()]),
        tmp_path,
        ".h5",
    )
    average([tmp_path / "ckpt_1.h5", tmp_path / "ckpt_2.h5"], tmp_path / "swa.h5", refresh=Refresh(A))
    model = tf_keras.models.load_model(tmp_path / "swa.h5")
    kernel, bias = (np.array(weights, np.float64) for weights in model.layers[0].get_weights())
    assert_moments(model.layers[1], A.astype(np.float64) @ kernel + bias)


def test_an_hdf5_file_named_keras_is_refreshed(tmp_path: Path) -> None:
    save_two(block_model(), tmp_path, ".h5")
    for path in tmp_path.glob("*.h5"):
        path.rename(path.with_suffix(".keras"))
    average(
        [tmp_path / f"ckpt_{number}.keras" for number in (1, 2)], tmp_path / "swa.keras", refresh=Refresh(A)
    )
    (tmp_path / "swa.keras").rename(tmp_path / "swa.h5")
    model = keras.models.load_model(tmp_path / "swa.h5")
    ((layer, values),) = inputs_of_norms(model)
    assert_moments(layer, values)


def test_a_statistic_that_keras_does_not_load_is_named(tmp_path: Path) -> None:
    class Stubborn(L.BatchNormalization):
        def load_own_variables(self, store: Any) -> None:
            mean = np.array(self.moving_mean)
            super().load_own_variables(store)
            self.moving_mean.assign(mean)

    model = keras.Sequential([keras.Input((4,)), L.Dense(4), Stubborn(name="odd")])
    model.save_weights(tmp_path / "ckpt.weights.h5")
    with pytest.raises(
        ValueError, match=r"^swa\.weights\.h5: sequential(_[0-9]+)?/odd/moving_mean: Keras does not load this"
    ) as caught:
        average(tmp_path / "ckpt.weights.h5", tmp_path / "swa.weights.h5", refresh=Refresh(A, model=model))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.weights.h5"]


# --- what cannot be loaded ----------------------------------------------------------------------------------------


def test_what_keras_cannot_load_is_one_line_with_the_reason_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Cli
) -> None:
    (tmp_path / "plain.py").write_text(
        "import keras\n"
        "class Plain(keras.layers.Layer):\n"
        "    def build(self, shape): self.k = self.add_weight(shape=shape[-1:])\n"
        "    def call(self, x): return x * self.k\n"
        "def make():\n"
        "    L = keras.layers\n"
        "    return keras.Sequential([keras.Input((4,)), Plain(), L.BatchNormalization(name='bn'), L.Dense(3)])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import plain as module  # type: ignore[import-not-found]

    np.savez("x.npz", x=A)
    for suffix in (".keras", ".h5"):
        save_two(module.make(), tmp_path, suffix)
        command = (f"ckpt_1{suffix}", f"ckpt_2{suffix}", "-o", f"swa{suffix}", "--bn-refresh", "x.npz")
        without, imported = swa_avg(*command), swa_avg(*command, "--import", "plain")
        assert (without.code, imported.code) == (2, 2)
        assert f"Keras cannot load swa{suffix} (" in without.err
        assert "'Plain')" in without.err
        assert "name the module that registers Plain, --import MODULE, or" in without.err
        assert "register Plain in it by @keras.saving.register_keras_serializable(), or" in imported.err
        for ended in (without, imported):
            assert ended.err.count("\n") == 1
            assert len(ended.err) < 400
            assert ".swa-avg-" not in ended.err
        assert swa_avg(*command, "--model", "plain:make").code == 0
    assert "plain" in sys.modules


def test_models_of_tf_keras_are_refused_in_one_line(tmp_path: Path) -> None:
    tf_keras = pytest.importorskip("tf_keras")
    from swa_avg.callbacks import SWA, CheckpointSaver, PrintLearningRate

    model = tf_keras.Sequential([tf_keras.layers.InputLayer((4,)), tf_keras.layers.BatchNormalization()])
    model.compile("sgd", "mse")
    problem = r"^expected a model of Keras 3\..+, found tf_keras.Sequential; import keras, not tf_keras, .+$"
    with pytest.raises(UsageError, match=problem):
        refresh_batchnorm(model, A)
    for callback in (CheckpointSaver(tmp_path / "a"), SWA(tmp_path / "b", 0), PrintLearningRate()):
        with pytest.raises(UsageError, match=problem):
            model.fit(A, A, verbose=0, callbacks=[callback])
    with pytest.raises(UsageError, match=problem):
        CheckpointSaver(tmp_path / "c").save(model, 0)
