"""Write checkpoints with real Keras, and load averages back, in a process of its own.

    python keras_process.py write FOLDER     write every model in every format, with its weights beside it
    python keras_process.py load REQUEST     load what the JSON file REQUEST lists, and report

The backend comes from KERAS_BACKEND; SWA_AVG_TEST_KERAS=tf_keras takes Keras 2.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np

LEGACY = os.environ.get("SWA_AVG_TEST_KERAS") == "tf_keras"
if LEGACY:
    import tf_keras as keras
else:
    import keras

L = keras.layers
FORMATS = {"keras": ".keras", "weights": ".weights.h5", "legacy": ".h5"}
if LEGACY:
    FORMATS["legacy-weights"] = "_w.h5"
else:
    FORMATS["sharded"] = ".weights.json"


@keras.utils.register_keras_serializable("tests")
class Odd(L.Layer):
    """A scalar, an empty, an integer and a plain weight."""

    def build(self, shape):
        self.scalar = self.add_weight(name="scalar", shape=(), initializer="ones")
        self.empty = self.add_weight(name="empty", shape=(0, 3), initializer="ones")
        self.count = self.add_weight(
            name="count", shape=(), dtype="int32", initializer="zeros", trainable=False
        )
        self.kernel = self.add_weight(name="kernel", shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.scalar * self.kernel


@keras.utils.register_keras_serializable("tests")
class OwnNames(L.Layer):
    """Chooses what its variables are called in a checkpoint, and one name that is a path."""

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(shape[-1],), initializer="ones")
        self.shift = self.add_weight(name="shift", shape=(shape[-1],), initializer="zeros")

    def call(self, x):
        return x * self.scale + self.shift

    def save_own_variables(self, store):
        store["table"] = self.scale.numpy() if LEGACY else keras.ops.convert_to_numpy(self.scale)
        store["by/7"] = self.shift.numpy() if LEGACY else keras.ops.convert_to_numpy(self.shift)

    def load_own_variables(self, store):
        self.scale.assign(store["table"])
        self.shift.assign(store["by/7"])


@keras.utils.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """Layers as attributes and in a list, with BatchNorm."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [L.Dense(5), L.Dense(5)]
        self.norm = L.BatchNormalization()
        self.head = L.Dense(2)

    def call(self, x, training=False):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x, training=training))

    def get_config(self):
        return {}


def cnn_bn():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            L.Conv2D(4, 3, name="stem"),
            L.BatchNormalization(name="stem_bn"),
            L.ReLU(),
            L.SeparableConv2D(6, 3),
            L.BatchNormalization(),
            L.GlobalAveragePooling2D(),
            L.Dense(3),
        ]
    )


def nested():
    inner = keras.Sequential(
        [keras.Input((6,)), L.Dense(5), L.BatchNormalization(), L.Dense(6)], name="inner"
    )
    inputs = keras.Input((6,))
    shared = L.Dense(6, name="shared")
    return keras.Model(inputs, L.Dense(2)(shared(inner(shared(inputs)))))


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 4), "float32"))
    return model


def attention():
    inputs = keras.Input((5, 8))
    x = L.LayerNormalization()(L.MultiHeadAttention(2, 4)(inputs, inputs) + inputs)
    return keras.Model(inputs, L.Dense(2)(x))


def recurrent():
    inputs = keras.Input((5, 4))
    x = L.Bidirectional(L.LSTM(3, return_sequences=True))(inputs)
    return keras.Model(inputs, L.Dense(2)(L.GRU(3)(x)))


def normalization():
    layer = L.Normalization()
    layer.adapt(np.arange(12, dtype="float32").reshape(4, 3))
    return keras.Sequential([keras.Input((3,)), layer, L.Dense(2)])


def odd():
    inputs = keras.Input((3,))
    return keras.Model(inputs, L.Dense(2)(Odd()(inputs)))


def own_names():
    inputs = keras.Input((3,))
    return keras.Model(inputs, L.Dense(2)(OwnNames()(inputs)))


def averaging_optimizer():
    model = normalization()
    accumulate = {} if LEGACY else {"gradient_accumulation_steps": 2}
    _compile(model, keras.optimizers.SGD(momentum=0.9, use_ema=True, **accumulate))
    return model


def several_optimizers():
    model = odd()
    if hasattr(keras.optimizers, "MultiOptimizer"):
        choose = {"dense/.*": keras.optimizers.Adam(), "odd/.*": keras.optimizers.Lion()}
        choose = keras.optimizers.OptimizerMap(keras.optimizers.SGD(momentum=0.9), choose)
        _compile(model, keras.optimizers.MultiOptimizer(choose))
    return model


def textvec():
    layer = L.TextVectorization(max_tokens=20, output_mode="int", output_sequence_length=4)
    layer.adapt(["the cat sat", "on the mat"])
    inputs = keras.Input((1,), dtype="string")
    return keras.Model(inputs, L.Dense(2)(L.Flatten()(L.Embedding(20, 3)(layer(inputs)))))


def lora():
    inputs = keras.Input((6,))
    dense = L.Dense(5)
    model = keras.Model(inputs, L.Dense(2)(dense(inputs)))
    dense.enable_lora(2)
    return model


def spectral():
    inputs = keras.Input((6,))
    return keras.Model(inputs, L.Dense(2)(L.SpectralNormalization(L.Dense(5))(inputs)))


def dense_with_policy(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        inputs = keras.Input((6,))
        model = keras.Model(inputs, L.Dense(3, name="out")(L.Dense(5)(inputs)))
        _compile(model)
        return model
    finally:
        keras.mixed_precision.set_global_policy("float32")


MODELS = {
    "cnn_bn": cnn_bn,
    "nested": nested,
    "subclassed": subclassed,
    "attention": attention,
    "recurrent": recurrent,
    "normalization": normalization,
    "odd": odd,
    "own_names": own_names,
    "averaging_optimizer": averaging_optimizer,
    **{
        policy: lambda policy=policy: dense_with_policy(policy)
        for policy in ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")
    },
}
if not LEGACY:
    MODELS |= {"lora": lora, "spectral": spectral, "several_optimizers": several_optimizers}
    if keras.backend.backend() == "tensorflow":
        MODELS["textvec"] = textvec

# Keras itself cannot save these: strings in HDF5, a nested legacy model of subclasses.
UNSAVABLE = {("textvec", "legacy"), ("subclassed", "legacy"), ("textvec", "legacy-weights")}


def _compile(model, optimizer=None):
    model.compile(optimizer or keras.optimizers.Adam(), "mse")
    model.optimizer.build(model.trainable_variables)


def _fill(model, rng):
    """Give every floating-point variable new values, integers a count: what an epoch of training does."""
    for variable in model.variables:
        value = np.asarray(variable.numpy() if LEGACY else keras.ops.convert_to_numpy(variable))
        if np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16":
            variable.assign(rng.uniform(0.1, 2.0, value.shape).astype("float32"))
        elif value.dtype.name == "int32" and value.shape == ():
            variable.assign(value + 1)


def _weights(model):
    """Return every weight as float64, which holds each stored type exactly."""
    return [
        np.asarray(w).astype(np.float64) for w in model.get_weights() if np.asarray(w).dtype.kind not in "OUS"
    ]


def write(folder):
    rng = np.random.default_rng(7)
    for name, build in MODELS.items():
        keras.backend.clear_session()
        model = build()
        if not model.compiled if not LEGACY else not model.optimizer:
            _compile(model)
        where = folder / name
        where.mkdir(parents=True)
        for number in (1, 2, 10):
            _fill(model, rng)
            for kind, suffix in FORMATS.items():
                if (name, kind) not in UNSAVABLE:
                    _save(model, kind, where / f"ckpt_{number}{suffix}")
            weights = _weights(model)
            np.savez(
                where / f"truth_{number}.npz",
                *weights,
                dtypes=[str(np.asarray(w).dtype) for w in model.get_weights()],
            )


def _save(model, kind, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls its own .h5 format legacy
        if kind in ("weights", "legacy-weights"):
            model.save_weights(path)
        elif kind == "sharded":
            model.save_weights(path, max_shard_size=3e-6)
        elif LEGACY and kind == "legacy":
            model.save(path, save_format="h5")
        else:
            model.save(path)


def load(request):
    """For each (model, kind, path): load it, say what warned or failed, and store the weights beside it.

    Keras cannot load all that it writes, such as bfloat16 in a legacy file; an average must do as its inputs do.
    """
    for name, kind, path in request:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model = _load(name, kind, path)
            except (ValueError, TypeError, AttributeError) as error:
                Path(f"{path}.said.json").write_text(json.dumps(["failed", repr(error)]))
                continue
        np.savez(f"{path}.loaded.npz", *_weights(model))
        said = [
            str(w.message)
            for w in caught
            if not issubclass(w.category, (DeprecationWarning, ResourceWarning))
        ]
        Path(f"{path}.said.json").write_text(json.dumps(said))


def _load(name, kind, path):
    if kind in ("keras", "legacy"):
        return keras.models.load_model(path)
    model = MODELS[name]()
    model.load_weights(path)
    return model


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        load(json.loads(Path(sys.argv[2]).read_text()))
