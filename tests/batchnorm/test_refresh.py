"""Refreshing real Keras models, against float64 two-pass moments of what their layers see."""

from __future__ import annotations

import functools
import inspect
import os
import random
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from swa_avg.errors import MismatchError, UnreadableError, UsageError

keras = pytest.importorskip("keras")
sklearn_datasets = pytest.importorskip("sklearn.datasets")

from swa_avg.batchnorm import refresh_batchnorm  # noqa: E402

pytestmark = [
    pytest.mark.keras,
    # Keras's own, with NumPy 2.4
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

L = keras.layers
BACKEND = keras.backend.backend()
HAS_RENORM = "renorm" in inspect.signature(L.BatchNormalization).parameters  # from Keras 3.14 on
TOLERANCE = 1e-5


@functools.cache
def digits() -> np.ndarray:
    return (sklearn_datasets.load_digits().images[..., None] / 16).astype("float32")


def batches_of(values, size=300, rows=1200):
    return [values[start : start + size] for start in range(0, rows, size)]


# --- models of every kind: name -> (model, batches) ---------------------------------------------------------------


def sequential(**options):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            L.Conv2D(6, 3, activation="relu"),
            L.BatchNormalization(**options),
            L.Conv2D(4, 3),
            L.BatchNormalization(**options),
            L.Flatten(),
            L.Dense(10),
        ]
    )


def spatial():
    return sequential(), batches_of(digits())


def smaller_last_batch():
    return sequential(), [digits()[:300], digits()[300:600], digits()[600:617]]


def batches_of_one_row():
    return sequential(), batches_of(digits(), 1, 24)


def dense():
    layers = [
        keras.Input((64,)),
        L.Dense(20),
        L.BatchNormalization(),
        L.ReLU(),
        L.Dense(5),
        L.BatchNormalization(),
    ]
    return keras.Sequential(layers), batches_of(digits().reshape(-1, 64))


def nested():
    inner = keras.Sequential([keras.Input((6, 6, 6)), L.BatchNormalization(), L.Conv2D(3, 3)], name="inner")
    inputs = keras.Input((8, 8, 1))
    outputs = L.BatchNormalization()(inner(L.Conv2D(6, 3)(inputs)))
    return keras.Model(inputs, outputs), batches_of(digits())


def twice():
    shared = L.BatchNormalization()
    inputs = keras.Input((8, 8, 1))
    hidden = L.Conv2D(4, 3, padding="same")(inputs)
    outputs = L.Conv2D(4, 3, strides=2)(shared(hidden)) * 3.0 + 1.0
    return keras.Model(inputs, L.Flatten()(shared(outputs))), batches_of(digits())


def channels_first():
    inputs = keras.Input((8, 8, 1))
    hidden = L.Permute((3, 1, 2))(L.Conv2D(5, 3)(inputs))
    return keras.Model(inputs, L.BatchNormalization(axis=1)(hidden)), batches_of(digits())


def middle_axis():
    inputs = keras.Input((8, 8))
    hidden = L.BatchNormalization(axis=1)(inputs)
    return keras.Model(inputs, L.BatchNormalization(axis=-2)(L.Dense(3)(hidden))), batches_of(
        digits()[..., 0]
    )


def sequence():
    layers = [
        keras.Input((None, 8)),
        L.Conv1D(6, 3),
        L.BatchNormalization(),
        L.GRU(4),
        L.BatchNormalization(),
    ]
    return keras.Sequential(layers), [digits()[:400, ..., 0], digits()[400:600, :5, :, 0]]


def tokens():
    values = np.round(digits()[:600, 0:4, :, 0].reshape(600, -1) * 16).astype("int32")
    return batches_of(values, 200, 600)  # zeros are padding


def masked():
    layers = [
        keras.Input((32,), dtype="int32"),
        L.Embedding(17, 6, mask_zero=True),
        L.BatchNormalization(),
        L.LSTM(4),
    ]
    return keras.Sequential([*layers, L.BatchNormalization()]), tokens()


def masked_one_channel():
    layers = [keras.Input((32,), dtype="int32"), L.Embedding(17, 1, mask_zero=True), L.BatchNormalization()]
    return keras.Sequential(layers), tokens()


def time_distributed():
    inner = keras.Sequential([keras.Input((8,)), L.Dense(4), L.BatchNormalization()])
    layers = [keras.Input((8, 8)), L.TimeDistributed(inner), L.TimeDistributed(L.BatchNormalization())]
    return keras.Sequential(layers), batches_of(digits()[..., 0], 300, 600)


def synchronized():
    return sequential(synchronized=True), batches_of(digits())


def renorm():
    return sequential(renorm=True), batches_of(digits())


def half_precision(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return sequential(), batches_of(digits())
    finally:
        keras.config.set_dtype_policy(before)


class Renamed(L.BatchNormalization):
    """Nothing but another class."""


class Shifted(L.BatchNormalization):
    """Hands another input on to what it inherits."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs * 2.0 + 1.0, training=training, mask=mask)


def subclass():
    layers = [
        keras.Input((8, 8, 1)),
        L.Conv2D(4, 3),
        Renamed(),
        L.Conv2D(4, 3),
        Shifted(),
        L.Flatten(),
        L.Dense(3),
    ]
    return keras.Sequential(layers), batches_of(digits())


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [L.Conv2D(4, 3), L.BatchNormalization()]
        self.by_name = {"head": L.BatchNormalization()}

    def call(self, inputs, training=False):
        for layer in self.blocks:
            inputs = layer(inputs)
        return self.by_name["head"](inputs, training=training)


def subclassed_model():
    model = Subclassed()
    model(digits()[:2])
    return model, batches_of(digits())


def dropout_between():
    layers = [
        keras.Input((8, 8, 1)),
        L.Conv2D(4, 3),
        L.Dropout(0.4),
        L.BatchNormalization(),
        L.GaussianNoise(0.2),
    ]
    return keras.Sequential([*layers, L.BatchNormalization()]), batches_of(digits())


def several_inputs():
    image, row = keras.Input((8, 8, 1), name="image"), keras.Input((8,), name="row")
    first = L.Flatten()(L.BatchNormalization()(L.Conv2D(3, 3)(image)))
    second = L.BatchNormalization()(L.Dense(4)(row))
    model = keras.Model([image, row], L.BatchNormalization()(L.Concatenate()([first, second])))
    return model, [[part, part[:, 0, :, 0]] for part in batches_of(digits())]


def far_from_zero():
    layers = [keras.Input((8, 8, 1)), L.BatchNormalization(), L.Conv2D(3, 3), L.BatchNormalization()]
    return keras.Sequential(layers), batches_of(digits() + 1000.0)


@keras.saving.register_keras_serializable("tests")
class CellWithBatchNorm(keras.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.state_size, self.output_size = 4, 4
        self.dense, self.norm = L.Dense(4), L.BatchNormalization()

    def build(self, shape):
        self.dense.build((shape[0], shape[-1] + 4))
        self.norm.build((shape[0], 4))

    def call(self, inputs, states, training=False):
        joined = keras.ops.concatenate([inputs, states[0]], axis=-1)
        output = keras.ops.tanh(self.norm(self.dense(joined), training=training))
        return output, [output]


def unrolled_cell():
    layers = [keras.Input((8, 8)), L.Bidirectional(L.RNN(CellWithBatchNorm(), unroll=True))]
    return keras.Sequential(layers), batches_of(digits()[..., 0], 200, 400)


def looping_cell():
    layers = [keras.Input((8, 8)), L.RNN(CellWithBatchNorm())]
    return keras.Sequential(layers), batches_of(digits()[..., 0], 200, 400)


KINDS = {
    kind.__name__: kind
    for kind in (
        spatial,
        smaller_last_batch,
        batches_of_one_row,
        dense,
        nested,
        twice,
        channels_first,
        middle_axis,
        sequence,
        masked,
        masked_one_channel,
        time_distributed,
        subclass,
        subclassed_model,
        dropout_between,
        several_inputs,
        far_from_zero,
        unrolled_cell,
    )
}
KINDS["mixed_float16"] = functools.partial(half_precision, "mixed_float16")
KINDS["mixed_bfloat16"] = functools.partial(half_precision, "mixed_bfloat16")
KINDS["float64"] = functools.partial(half_precision, "float64")
if HAS_RENORM:
    KINDS["renorm"] = renorm
if BACKEND == "tensorflow":
    KINDS["synchronized"] = synchronized
    KINDS["looping_cell"] = looping_cell
if BACKEND == "jax":
    del KINDS["float64"]  # off by default there


LOOSER = {"mixed_float16": 1e-4, "mixed_bfloat16": 1e-3, "far_from_zero": 1e-3}
"""Beyond the first layer, where the forward pass rounds to 11 or 8 bits, or cancels four of seven digits."""


# --- the oracle ---------------------------------------------------------------------------------------------------


def numpy_of(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def state_of(model):
    return [numpy_of(variable).copy() for variable in model.variables]


def restore(model, state):
    for variable, value in zip(model.variables, state, strict=True):
        variable.assign(value)


def batchnorms(model):
    found = [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]
    return list(dict.fromkeys(found))


def seed_generators(model, batch, seed=0):
    """The documented state: for each batch, the k-th generator from SeedSequence([seed, k, batch]); torch's last."""
    states = [variable for variable in model.variables if variable.name == "seed_generator_state"]
    words = [
        int(np.random.SeedSequence([seed, k, batch]).generate_state(1)[0]) & 0x7FFFFFFF
        for k in range(len(states) + 1)
    ]
    for variable, word in zip(states, words, strict=False):
        variable.assign([word, 0])
    if BACKEND == "torch":
        import torch

        torch.manual_seed(words[-1])


def seen(model, batches):
    """Return id of layer -> for each batch, for each call, its float64 (values, channels), masked ones left out.

    The forward pass is Keras's, eager, but for the batches' moments, which are NumPy's in float64: TensorFlow's own are
    off by up to 3e-5, and what follows with them.
    """
    records: dict[int, list] = {}
    before = state_of(model)
    original = L.BatchNormalization._moments
    flags = {layer: getattr(layer, "renorm", False) for layer in batchnorms(model)}

    def moments(self, inputs, mask):
        values = np.moveaxis(numpy_of(inputs).astype(np.float64), self.axis, -1)
        assert mask is None or self.axis in (-1, inputs.ndim - 1)
        values = values[np.ones(values.shape[:-1], bool) if mask is None else numpy_of(mask).astype(bool)]
        records.setdefault(id(self), [[] for _ in batches])[number].append(values)
        return [keras.ops.cast(value, inputs.dtype) for value in two_pass(values)]

    try:
        L.BatchNormalization._moments = moments
        for layer in flags:
            layer.renorm = False
        for number, batch in enumerate(batches):
            seed_generators(model, number)
            model(batch, training=True)
    finally:
        L.BatchNormalization._moments = original
        for layer, flag in flags.items():
            layer.renorm = flag
        restore(model, before)
    return records


def two_pass(values):
    mean = values.mean(axis=0)
    return mean, np.square(values - mean).mean(axis=0)


def pooled(calls_by_batch):
    return two_pass(np.concatenate([np.concatenate(calls) for calls in calls_by_batch]))


def assert_close(layer, mean, variance, tolerance=TOLERANCE):
    """Means relative to the larger of mean and standard deviation: they may be next to zero."""
    scale = np.maximum(np.abs(mean), np.sqrt(variance))
    found = numpy_of(layer.moving_mean).astype(np.float64)
    assert np.all(np.abs(found - mean) <= tolerance * scale + 1e-30), layer.name
    found = numpy_of(layer.moving_variance).astype(np.float64)
    assert np.all(np.abs(found - variance) <= tolerance * variance + 1e-30), layer.name


def randomized(model):
    """Give the statistics, gammas and betas values that a trained model could have."""
    rng = np.random.default_rng(7)
    for layer in batchnorms(model):
        for variable in layer.variables:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


# --- statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_all_the_data_at_once(kind):
    model, batches = KINDS[kind]()
    randomized(model)
    expected = seen(model, batches)
    before = state_of(model)
    report = refresh_batchnorm(model, batches)
    for index, layer in enumerate(batchnorms(model)):
        assert_close(layer, *pooled(expected[id(layer)]), LOOSER.get(kind, TOLERANCE) if index else TOLERANCE)
    statistics = {id(variable) for layer in batchnorms(model) for variable in layer.non_trainable_variables}
    for variable, old in zip(model.variables, before, strict=True):
        if id(variable) not in statistics:
            np.testing.assert_array_equal(numpy_of(variable), old, variable.path)
    assert {layer.status for layer in report.layers} == {"refreshed"}
    assert report.samples == sum(len(b[0]) if isinstance(b, list) else len(b) for b in batches)
    for entry in report.layers:
        layer = next(layer for layer in batchnorms(model) if layer.name == entry.name)
        calls = expected[id(layer)]
        assert entry.calls == max(map(len, calls))
        assert entry.count == sum(len(values) for batch in calls for values in batch)


def test_statistics_that_are_stored_as_bfloat16_are_rounded_to_it():
    model, batches = half_precision("bfloat16")
    expected = seen(model, batches)
    refresh_batchnorm(model, batches)
    layer = batchnorms(model)[0]
    assert_close(layer, *pooled(expected[id(layer)]), 2**-8)


if BACKEND == "torch":

    def test_torch_starts_from_the_seed_and_not_from_where_its_own_generator_is():
        import torch

        model, _ = dropout_between()
        outcomes = []
        for state in (1, 2):
            torch.manual_seed(state)
            before = torch.get_rng_state()
            refresh_batchnorm(model, digits()[:500])
            assert torch.equal(torch.get_rng_state(), before)
            outcomes.append(np.concatenate([v.ravel() for v in state_of(model)]))
        np.testing.assert_array_equal(outcomes[0], outcomes[1])


def one_layer():
    layers = [keras.Input((8, 8, 1)), L.Conv2D(4, 3), L.BatchNormalization(), L.Flatten(), L.Dense(3)]
    return randomized(keras.Sequential(layers))


@pytest.mark.parametrize("size", [7, 64, 1797])
def test_batch_size_and_order_do_not_matter_to_what_the_forward_pass_does_not_mix(size):
    model = one_layer()
    expected = seen(model, [digits()])
    layer = batchnorms(model)[0]
    for seed in (0, 1):
        refresh_batchnorm(model, digits(), batch_size=size, seed=seed)
        assert_close(layer, *pooled(expected[id(layer)]))


def test_two_halves_of_the_batches_give_what_all_of_them_give():
    model = one_layer()
    layer = batchnorms(model)[0]
    found = []
    for batches in (batches_of(digits()), batches_of(digits())[::-1], [digits()[:1200]]):
        refresh_batchnorm(model, batches)
        found.append([numpy_of(layer.moving_mean), numpy_of(layer.moving_variance)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=TOLERANCE)


def test_the_same_seed_gives_the_same_bits():
    model, _ = dropout_between()
    state = state_of(model)
    outcomes = []
    for seed in (3, 3, 4):
        restore(model, state)
        refresh_batchnorm(model, digits(), batch_size=100, samples=500, seed=seed)
        outcomes.append(np.concatenate([v.ravel() for v in state_of(model)]))
    np.testing.assert_array_equal(outcomes[0], outcomes[1])
    assert (outcomes[0] != outcomes[2]).any()


def test_batch_mean_is_what_the_published_rules_give():
    """timgaripov/swa weights batches by size, torch.optim.swa_utils.update_bn counts them equally.

    Both are moving averages with momentum b/(n+b) and 1/(i+1) of each batch's statistics; torch's variance divides by
    n-1 where Keras's divides by n. With batches of one size, all of them say the same.
    """
    sizes = [400, 400, 400]
    model = one_layer()
    layer = batchnorms(model)[0]
    batches = [digits()[400 * k : 400 * (k + 1)] for k in range(len(sizes))]
    mean, variance = np.zeros(4), np.ones(4)
    for number, calls in enumerate(seen(model, batches)[id(layer)]):
        values = calls[0]
        momentum = 1.0 / (number + 1)  # torch: momentum=None, a cumulative average
        mean = (1 - momentum) * mean + momentum * values.mean(axis=0)
        variance = (1 - momentum) * variance + momentum * values.var(axis=0, ddof=1)
    count = 400 * 6 * 6
    refresh_batchnorm(model, batches, estimator="batch-mean")
    assert_close(layer, mean, variance * (count - 1) / count)


def test_batch_mean_weights_batches_by_their_size():
    model = one_layer()
    layer = batchnorms(model)[0]
    batches = [digits()[:500], digits()[500:1000], digits()[1000:1002]]
    total, mean, variance = 0, 0.0, 0.0
    for calls in seen(model, batches)[id(layer)]:  # timgaripov/swa, utils.bn_update
        values = calls[0]
        momentum = len(values) / (total + len(values))
        mean = (1 - momentum) * mean + momentum * values.mean(axis=0)
        variance = (1 - momentum) * variance + momentum * values.var(axis=0)
        total += len(values)
    refresh_batchnorm(model, batches, estimator="batch-mean")
    assert_close(layer, mean, variance)


if HAS_RENORM:

    def test_renorm_layers_get_all_their_statistics():
        model, batches = renorm()
        randomized(model)
        expected = seen(model, batches)
        refresh_batchnorm(model, batches)
        for layer in batchnorms(model):
            mean, variance = pooled(expected[id(layer)])
            deviation = np.sqrt(variance + layer.epsilon)
            np.testing.assert_allclose(numpy_of(layer.renorm_mean), numpy_of(layer.moving_mean))
            np.testing.assert_allclose(numpy_of(layer.renorm_stddev), deviation, rtol=TOLERANCE)
            np.testing.assert_allclose(numpy_of(layer.moving_stddev), deviation, rtol=TOLERANCE)
            assert_close(layer, mean, variance)
            assert layer.renorm is True


class OwnStatistics(L.BatchNormalization):
    """Computes and stores statistics without asking for `_moments`."""

    def call(self, inputs, training=None, mask=None):
        if training:
            mean = keras.ops.mean(inputs, axis=(0, 1, 2))
            self.moving_mean.assign(0.9 * self.moving_mean + 0.1 * mean)
        return inputs * 2.0


def test_a_subclass_that_computes_its_statistics_elsewhere_is_refreshed_from_its_inputs():
    model = keras.Sequential([keras.Input((8, 8, 1)), L.Conv2D(4, 3), OwnStatistics()])
    refresh_batchnorm(model, batches_of(digits()))
    values = numpy_of(model.layers[0](digits()[:1200])).astype(np.float64)
    assert_close(model.layers[1], *two_pass(values.reshape(-1, 4)))


# --- what is left alone -------------------------------------------------------------------------------------------


def test_frozen_layers_are_kept_and_unreached_ones_untouched():
    frozen, idle = L.BatchNormalization(name="frozen"), L.BatchNormalization(name="idle")
    idle.build((None, 4))

    class Partial(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [L.Dense(4), frozen, L.BatchNormalization(name="live"), idle]

        def call(self, inputs, training=False):
            return self.parts[2](self.parts[1](self.parts[0](inputs)), training=training)

    model = Partial()
    model(digits().reshape(-1, 64)[:2])
    frozen.trainable = False
    randomized(model)
    before = [state_of(layer) for layer in (frozen, idle)]
    report = refresh_batchnorm(model, batches_of(digits().reshape(-1, 64)))
    assert [layer.name for layer in report.refreshed] == ["live"]
    assert [layer.name for layer in report.kept] == ["frozen"]
    assert [layer.name for layer in report.untouched] == ["idle"]
    for old, layer in zip(before, (frozen, idle), strict=True):
        np.testing.assert_array_equal(old, state_of(layer))
    text = "\n".join(report.lines())
    assert "kept (trainable=False): frozen" in text
    assert "untouched (never reached in training mode): idle" in text


class Counter(keras.Layer):
    """State of its own that a training pass moves on."""

    def build(self, shape):
        self.passes = self.add_weight(shape=(), initializer="zeros", trainable=False, name="passes")

    def call(self, inputs, training=False):
        if training:
            self.passes.assign_add(1.0)
        return inputs + self.passes


def stateful():
    layers = [keras.Input((8, 8, 1)), L.SpectralNormalization(L.Conv2D(4, 3)), Counter(), L.Dropout(0.3)]
    model = randomized(keras.Sequential([*layers, L.BatchNormalization(), L.Flatten(), L.Dense(10)]))
    model(digits()[:2])
    return model


def attributes_of(model):
    """Flags and settings that a careless refresh could leave changed."""
    return [
        {key: value for key, value in vars(layer).items() if isinstance(value, bool | int | float | str)}
        | {"own": sorted(key for key in vars(layer) if key in ("call", "_moments"))}
        for layer in model._flatten_layers()
    ]


def test_other_state_takes_part_and_is_as_before():
    model = stateful()
    batches = batches_of(digits())
    expected = seen(model, batches)
    before, attributes = state_of(model), attributes_of(model)
    generators = random.getstate(), np.random.get_state()[1].tolist()
    refresh_batchnorm(model, batches)
    layer = batchnorms(model)[0]
    assert_close(
        layer, *pooled(expected[id(layer)]), 1e-4
    )  # the kernel is normalized in float32, each batch anew
    for variable, old in zip(model.variables, before, strict=True):
        if variable is not layer.moving_mean and variable is not layer.moving_variance:
            np.testing.assert_array_equal(numpy_of(variable), old, variable.path)
    assert attributes_of(model) == attributes
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow variable")
def test_bare_tensorflow_variables_are_as_before():
    import tensorflow as tf

    class Bare(keras.Layer):
        def __init__(self):
            super().__init__()
            self.seen = tf.Variable(0.0)

        def call(self, inputs, training=False):
            self.seen.assign_add(1.0)
            return inputs

    bare = Bare()
    model = keras.Sequential([keras.Input((8, 8, 1)), bare, L.BatchNormalization()])
    before = float(bare.seen.numpy())
    refresh_batchnorm(model, batches_of(digits()))
    assert float(bare.seen.numpy()) == before


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopHereError])
@pytest.mark.parametrize("moment", ["trace", "batch", "preprocess", "progress", "assign"])
def test_an_interruption_at_any_point_leaves_everything_as_it_was(error, moment, monkeypatch):
    model = stateful()
    before, attributes = state_of(model), attributes_of(model)
    calls = 0

    def interrupt(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == (1 if moment in ("trace", "assign") else 3):
            raise error
        return arguments[0] if arguments else None

    def interrupted_batches():
        for batch in batches_of(digits()):
            interrupt()
            yield batch

    data = interrupted_batches() if moment == "batch" else batches_of(digits())
    if moment == "trace":
        monkeypatch.setattr(type(model.layers[1]), "call", interrupt)
    if moment == "assign":
        last = batchnorms(model)[0].moving_variance
        assign = type(last)._direct_assign

        def after_assigning(self, value):
            assign(self, value)
            if self is last:
                interrupt()

        monkeypatch.setattr(type(last), "_direct_assign", after_assigning)
    with pytest.raises(error):
        refresh_batchnorm(
            model,
            data,
            preprocess=interrupt if moment == "preprocess" else None,
            progress=interrupt if moment == "progress" else None,
        )
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(numpy_of(variable), old, variable.path)
    assert attributes_of(model) == attributes


def test_training_goes_on_after_a_refresh_with_the_functions_compiled_before():
    model = one_layer()
    labels = np.zeros(200)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(digits()[:200], labels, verbose=0)
    compiled = model.train_function
    refresh_batchnorm(model, digits())
    assert model.train_function is compiled
    layer = batchnorms(model)[0]
    refreshed = numpy_of(layer.moving_mean)
    np.testing.assert_allclose(
        model.predict(digits()[:50], verbose=0), numpy_of(model(digits()[:50])), rtol=1e-4, atol=1e-5
    )
    model.fit(digits()[:200], labels, verbose=0)
    assert (numpy_of(layer.moving_mean) != refreshed).any()


def test_a_model_that_runs_eagerly_gives_the_same():
    model = one_layer()
    refresh_batchnorm(model, digits())
    compiled = state_of(model)
    model.compile("sgd", "mse", run_eagerly=True)
    refresh_batchnorm(model, digits())
    for old, new in zip(compiled, state_of(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


# --- errors and the report ----------------------------------------------------------------------------------------


def test_a_model_that_is_not_built_is_refused():
    with pytest.raises(UsageError, match="not built"):
        refresh_batchnorm(Subclassed(), digits())


def test_an_unknown_estimator_is_refused():
    with pytest.raises(UsageError, match="pooled or batch-mean, not median"):
        refresh_batchnorm(one_layer(), digits(), estimator="median")


def test_statistics_that_are_not_finite_are_refused_and_nothing_is_changed():
    model = one_layer()
    kernel = model.layers[0].kernel
    kernel.assign(np.full(kernel.shape, 3e38))
    before = state_of(model)
    with pytest.raises(MismatchError, match=r"the layer's input is not finite in batch 1"):
        refresh_batchnorm(model, digits())
    for old, new in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(new, old)


def test_nan_in_the_data_changes_nothing():
    model = one_layer()
    values = digits().copy()
    values[1234, 1, 2] = np.nan
    before = state_of(model)
    with pytest.raises(
        UnreadableError, match=r"data: array: expected finite numbers; found NaN .* in row 1234"
    ):
        refresh_batchnorm(model, values)
    for old, new in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(new, old)


def test_data_that_a_subclassed_model_does_not_take_is_unreadable():
    model, _ = subclassed_model()
    with pytest.raises(UnreadableError, match="the model does not take this data"):
        refresh_batchnorm(model, digits().reshape(-1, 64))


def test_a_model_without_batchnorm_is_left_alone_with_a_warning():
    model = keras.Sequential([keras.Input((64,)), L.Dense(2)])
    report = refresh_batchnorm(model, digits().reshape(-1, 64))
    assert report.warnings == ("the model has no BatchNorm layer; nothing was changed",)
    assert report.samples == 0


def test_the_report_tells_drift_against_numbers_worked_out_by_hand():
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization(epsilon=0.0, name="only")])
    layer = model.layers[0]
    layer.moving_mean.assign([0.0, 1.0])
    layer.moving_variance.assign([1.0, 4.0])
    values = np.array([[2.0, 1.0], [4.0, 5.0]] * 50, "float32")  # means 3, 3; variances 1, 4
    report = refresh_batchnorm(model, values, batch_size=10)
    drift = report.layers[0].drift
    assert drift.mean_shift_worst == pytest.approx(3.0)
    assert drift.mean_shift == pytest.approx(np.sqrt((9 + 1) / 2))
    assert (drift.variance_ratio, drift.variance_ratio_least, drift.variance_ratio_most) == pytest.approx(
        (1, 1, 1)
    )
    assert report.layers[0].count == 100
    assert (report.samples, report.batches) == (100, 10)


def test_a_constant_channel_is_reported_though_epsilon_is_zero():
    model = keras.Sequential([keras.Input((2,)), L.BatchNormalization(epsilon=0.0)])
    report = refresh_batchnorm(model, np.array([[1.0, 1.0], [1.0, 3.0]] * 50, "float32"), batch_size=10)
    assert report.lines()
    again = refresh_batchnorm(model, np.array([[1.0, 1.0], [1.0, 3.0]] * 50, "float32"), batch_size=10)
    assert again.layers[0].drift.score == pytest.approx(0, abs=1e-6)


def test_a_second_refresh_reports_no_drift_and_that_it_settled():
    model = one_layer()
    refresh_batchnorm(model, digits(), batch_size=100)
    report = refresh_batchnorm(model, digits(), batch_size=100)
    assert report.settled is True
    assert report.layers[0].drift.mean_shift < 1e-6
    assert report.lines()[-1].startswith("refreshed 1 BatchNorm layer on 1797 samples in 18 batches (pooled)")


def test_too_few_samples_are_reported_with_a_number_that_does():
    model, _ = dense()
    pixels = digits().reshape(-1, 64)
    few = refresh_batchnorm(model, pixels, batch_size=4, samples=24)
    assert few.settled is False
    assert few.suggested_samples > 24
    assert any("have not settled" in warning for warning in few.warnings)
    # The number is an estimate from halves of 24 samples, and so is what it is judged by.
    enough = refresh_batchnorm(model, pixels, batch_size=100, samples=few.suggested_samples * 4)
    assert enough.settled is True


def test_a_single_batch_cannot_tell_whether_it_settled():
    assert refresh_batchnorm(one_layer(), [digits()]).settled is None


def test_data_scaled_otherwise_than_in_training_are_pointed_out():
    model = one_layer()
    refresh_batchnorm(model, digits())
    assert not refresh_batchnorm(model, digits()).warnings
    report = refresh_batchnorm(model, digits() * 255)
    assert any("preprocessed differently from training" in warning for warning in report.warnings)


def test_the_worst_layers_come_first():
    model, batches = spatial()
    report = refresh_batchnorm(model, batches)
    scores = [layer.drift.score for layer in report.worst]
    assert scores == sorted(scores, reverse=True)
    assert report.lines()[1].endswith("BatchNorm layer")


@pytest.mark.parametrize("backend", [b for b in ("jax", "torch") if b != BACKEND and find_spec(b)])
def test_everything_here_holds_on_other_backends_too(backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    kinds = "spatial smaller_last_batch twice channels_first masked time_distributed renorm dropout_between"
    tests = ["float16", "other_state", "own_generator", "progress-KeyboardInterrupt"]
    chosen = " or ".join([*kinds.split(), *tests])
    command = [sys.executable, "-m", "pytest", str(Path(__file__)), "-k", chosen, "-p", "no:cacheprovider"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:]


def test_ctrl_c_while_statistics_are_assigned_waits_and_then_takes_them_all_back(monkeypatch):
    model = stateful()
    before = state_of(model)
    layer = batchnorms(model)[0]
    assign = type(layer.moving_mean)._direct_assign

    def signalled(self, value):
        assign(self, value)
        signal.raise_signal(signal.SIGINT)  # again and again, also while the old values are being put back

    monkeypatch.setattr(type(layer.moving_mean), "_direct_assign", signalled)
    with pytest.raises(KeyboardInterrupt):
        refresh_batchnorm(model, batches_of(digits()))
    for old, new in zip(before, state_of(model), strict=True):
        np.testing.assert_array_equal(new, old)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
