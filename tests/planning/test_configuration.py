"""What of two configurations keeps checkpoints apart: what changes a weight's meaning, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from swa_avg.planning.configuration import config_differences

Config = dict[str, Any]


def layer(kind: str, name: str, **settings: Any) -> Config:
    return {"module": "keras.layers", "class_name": kind, "config": {"name": name, **settings}}


def op(name: str, kind: str, of: str) -> Config:
    """A call of `keras.ops`, which Keras stores as a layer."""
    tensor = {"class_name": "__keras_tensor__", "config": {"shape": [None, 4], "keras_history": [of, 0, 0]}}
    return {
        "module": "keras.src.ops.nn",
        "class_name": kind,
        "config": {"name": name},
        "inbound_nodes": [{"args": [tensor], "kwargs": {}}],
    }


def model(*layers: Config, name: str = "functional", **settings: Any) -> Config:
    own = {"name": name, "layers": list(layers), **settings}
    return {"module": "keras.src.models.functional", "class_name": "Functional", "config": own}


def both(one: Config, other: Config) -> list[str]:
    found = list(config_differences(one, other))
    assert len(found) == len(list(config_differences(other, one)))
    return [path for path, _, _ in found]


POLICY = {
    "module": "keras",
    "class_name": "DTypePolicy",
    "config": {"name": "float32"},
    "registered_name": None,
}
GELU = {"module": "builtins", "class_name": "function", "config": "gelu", "registered_name": "function"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (layer("RandomCrop", "a", seed=17), layer("RandomCrop", "a", seed=4211)),
        (
            layer("Dropout", "a", seed_generator={"seed": 1}),
            layer("Dropout", "a", seed_generator={"seed": 2}),
        ),
        (layer("Dense", "a", trainable=True), layer("Dense", "a", trainable=False)),
        (layer("Dropout", "a", rate=0.5), layer("Dropout", "a", rate=0.1)),
        (layer("SpatialDropout2D", "a", rate=0.5), layer("SpatialDropout2D", "a", rate=0.1)),
        (layer("LSTM", "a", recurrent_dropout=0.5), layer("LSTM", "a", recurrent_dropout=0.0)),
        (layer("TransformerEncoder", "a", dropout=0.1), layer("TransformerEncoder", "a", dropout=0.2)),
        (layer("GaussianNoise", "a", stddev=0.5), layer("GaussianNoise", "a", stddev=0.1)),
        (layer("Dense", "a", kernel_regularizer=None), layer("Dense", "a", kernel_regularizer={"l2": 0.01})),
        (
            layer("Dense", "a", bias_initializer="zeros"),
            layer("Dense", "a", bias_initializer={"config": {"seed": 3}}),
        ),
        (layer("Dense", "a"), layer("Dense", "a", quantization_config=None, gated=False, tags=[])),
        (
            layer("BatchNormalization", "a"),
            layer("BatchNormalization", "a", renorm=False, renorm_momentum=0.99),
        ),
        (layer("ZeroPadding1D", "a"), layer("ZeroPadding1D", "a", data_format="channels_last")),
        (layer("MultiHeadAttention", "a"), layer("MultiHeadAttention", "a", query_mask={"class_name": "x"})),
        (layer("Dense", "a", dtype="float32"), layer("Dense", "a", dtype=POLICY)),
        (layer("Dense", "a", activation="gelu"), layer("Dense", "a", activation=GELU)),
        (layer("Resizing", "a", height=6), layer("Resizing", "a", height=6.0)),
        (
            layer("Dense", "a"),
            {"module": "keras.src.layers.core.dense", "class_name": "Dense", "config": {"name": "a"}},
        ),
    ],
)
def test_what_changes_no_meaning_keeps_nothing_apart(one: Config, other: Config) -> None:
    assert both(model(one), model(other)) == []


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        (layer("Dense", "a", units=4), layer("Dense", "a", units=5), "units"),
        (layer("Dense", "a", activation="relu"), layer("Dense", "a", activation="gelu"), "activation"),
        (layer("Dense", "a", activation="gelu_1"), layer("Dense", "b", activation="gelu"), "name"),
        (
            layer("BatchNormalization", "a", epsilon=1e-3),
            layer("BatchNormalization", "a", epsilon=1e-5),
            "epsilon",
        ),
        (layer("BatchNormalization", "a"), layer("BatchNormalization", "a", renorm=True), "renorm"),
        (layer("Conv2D", "a", dilation_rate=1), layer("Conv2D", "a", dilation_rate=2), "dilation_rate"),
        (layer("Exponential", "a", rate=1), layer("Exponential", "a", rate=2), "rate"),
        (
            layer("ZeroPadding1D", "a"),
            layer("ZeroPadding1D", "a", data_format="channels_first"),
            "data_format",
        ),
        (layer("Dense", "a", use_bias=True), layer("Dense", "a"), "use_bias"),
        (layer("Hashing", "a", salt=1), layer("Hashing", "a", salt=2), "salt"),
        (layer("Dense", "a", dtype="float32"), layer("Dense", "a", dtype="mixed_bfloat16"), "dtype"),
    ],
)
def test_what_changes_meaning_is_found(one: Config, other: Config, where: str) -> None:
    assert f"config.config.layers[0].config.{where}" in both(model(one), model(other))


def test_an_operation_built_anew_beside_an_activation_of_its_name_is_the_same() -> None:
    def built(number: str, activation: str = "relu") -> Config:
        dense = layer("Dense", "dense" + number, activation=activation)
        return model(dense, op("relu" + number, "Relu", "dense" + number), op("add", "Add", "relu" + number))

    assert both(built(""), built("_1")) == []
    assert both(built("_1"), built("_2")) == []
    assert "config.config.layers[0].config.activation" in both(built(""), built("_1", activation="gelu"))


def test_layers_that_are_wired_otherwise_are_found() -> None:
    one = model(layer("Dense", "a"), layer("Dense", "a_1"), op("relu", "Relu", "a"))
    other = copy.deepcopy(one)
    other["config"]["layers"][2]["inbound_nodes"][0]["args"][0]["config"]["keras_history"][0] = "a_1"
    assert both(one, other) == ["config.config.layers[2].inbound_nodes[0].args[0].config.keras_history[0]"]


def test_the_models_own_name_is_free_and_a_single_input_may_stand_in_a_list() -> None:
    one = model(layer("Dense", "a"), name="run_a", input_layers=[["x", 0, 0]])
    other = model(layer("Dense", "a"), name="final", input_layers=["x", 0, 0])
    assert both(one, other) == []
    assert both(one, model(layer("Dense", "a"), input_layers=["y", 0, 0])) == [
        "config.config.input_layers[0]"
    ]
