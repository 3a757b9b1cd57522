"""Checks before a byte is averaged, on checkpoints that exist in memory only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import makers
from swa_avg.errors import MismatchError
from swa_avg.formats.base import Checkpoint, Stage, Stream, Tensor
from swa_avg.planning.plan import config_differences, make_plan
from swa_avg.planning.policy import batchnorm_layers, treatment


@dataclass(frozen=True)
class Fake(Checkpoint):
    def write(self, stream: Stream, record: Callable[[], Any], stage: Stage) -> None:
        raise NotImplementedError

    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        raise NotImplementedError


def _tensor(
    name: str, shape: tuple[int, ...] = (4,), dtype: str = "float32", offset: int = 0, **more: Any
) -> Tensor:
    return Tensor(name, shape, dtype, 0, offset, 4, **more)


def _fake(name: str, *tensors: Tensor, **more: Any) -> Fake:
    return Fake(Path(name), "fake", (".fake",), (), {tensor.name: tensor for tensor in tensors}, **more)


def test_tensors_are_sorted_by_where_they_lie_and_split_by_treatment() -> None:
    tensors = [
        _tensor("b/vars/0", offset=300),
        _tensor("a/vars/0", offset=100),
        _tensor("alias/vars/0", offset=100),
        _tensor("count", (), "int64", offset=500),
        _tensor("table", (9,), "int64", offset=600),
        _tensor("optimizer/vars/2", offset=700, role="optimizer"),
    ]
    plan = make_plan([_fake("one", *tensors), newest := _fake("two", *tensors)], newest, [0.5, 0.5])
    assert [t.name for t in plan.averaged] == ["a/vars/0", "b/vars/0"]
    assert [t.name for t in plan.compared] == ["table"]
    assert [t.name for t in plan.copied] == ["count", "optimizer/vars/2"]
    assert plan.dropped == ()


def test_dropped_optimizer_state_is_the_models_own() -> None:
    own = _tensor("optimizer/vars/0", offset=700, role="optimizer")
    inner = _tensor("g_optimizer/vars/0", offset=800, role="optimizer")
    newest = _fake("one", _tensor("a"), own, inner)
    plan = make_plan([newest], newest, [1.0], drop_optimizer=True)
    assert plan.dropped == (own,)
    assert plan.copied == (inner,)


def test_differing_optimizer_state_is_no_mismatch() -> None:
    first = _fake("one", _tensor("a"))
    second = _fake("two", _tensor("a"), _tensor("optimizer/vars/0", offset=9, role="optimizer"))
    assert make_plan([first, second], second, [0.5, 0.5]).averaged == (second.tensors["a"],)


def _state(name: str, offset: int, dtype: str = "float32") -> Tensor:
    return _tensor(name, (), dtype, offset, role="optimizer")


WEIGHT = _tensor("layers/dense/vars/0", offset=100)
COUNT, RATE = _state("optimizer/vars/0", 200, "int64"), _state("optimizer/vars/1", 300)


@pytest.mark.parametrize(
    ("found", "finding"),
    [
        (
            _state("optimizer/vars/q", 300),
            "two: optimizer/vars/q: expected optimizer/vars/1, float32[], as in the same place in one, found "
            "float32[]: one of the two is damaged; leave this file out, or use --optimizer drop",
        ),
        (
            _state("optimizer/vars/1", 300, "int32"),
            "two: optimizer/vars/1: expected optimizer/vars/1, float32[], as in the same place in one, found "
            "int32[]: one of the two is damaged; leave this file out, or use --optimizer drop",
        ),
        (
            _state("optimizer/vars/3", 400),  # elsewhere, so that the numbers alone tell
            "two: optimizer/vars/1: is missing, and 0, 3 are there: a name is damaged; leave this file out, or "
            "use --optimizer drop",
        ),
    ],
)
def test_state_is_compared_with_its_numbers_and_a_file_of_the_same_layout(
    found: Tensor, finding: str
) -> None:
    one, two = _fake("one", WEIGHT, COUNT, RATE), _fake("two", WEIGHT, COUNT, found)
    with pytest.raises(MismatchError) as caught:
        make_plan([one, two], two, [0.5, 0.5])
    assert str(caught.value) == finding
    assert make_plan([one, two], two, [0.5, 0.5], drop_optimizer=True).dropped == (COUNT, found)
    third = _fake("zero", WEIGHT, COUNT, found)
    assert make_plan([third, one, two], two, [0.3, 0.3, 0.4]).copied == (COUNT, found)


def test_another_optimizer_lies_elsewhere_and_has_another_name() -> None:
    adam = (COUNT, RATE, _state("optimizer/vars/2", 400), _state("optimizer/vars/3", 500))
    one = _fake("one", WEIGHT, *adam, layer_names={"optimizer": "adam", "layers/dense": "dense"})
    two = _fake("two", WEIGHT, COUNT, RATE, layer_names={"optimizer": "sgd", "layers/dense": "dense"})
    assert make_plan([one, two], two, [0.5, 0.5]).copied == (COUNT, RATE)
    assert make_plan([two, one], one, [0.5, 0.5]).copied == adam


def test_a_legacy_optimizers_state_has_its_own_name_in_its_names() -> None:
    weight = _tensor("model_weights/dense/dense/kernel", offset=100)
    one, two = (
        replace(_fake(path, weight, _state(f"optimizer_weights/{name}/rate", 200)), is_legacy=True)
        for path, name in (("one", "adam"), ("two", "adamw"))
    )
    assert len(make_plan([one, two], two, [0.5, 0.5]).copied) == 1


def test_groups_without_tensors_and_names_are_compared_with_a_file_of_the_same_layout() -> None:
    names = {"": "model", "layers/dense": "dense"}
    one = _fake("one", WEIGHT, empty_groups=frozenset({"layers/dropout/vars"}), layer_names=names)
    two = _fake("two", WEIGHT, empty_groups=frozenset({"layers/dsopout/vars"}))
    with pytest.raises(MismatchError) as caught:
        make_plan([one, two], two, [0.5, 0.5])
    assert str(caught.value).splitlines() == [
        "two: layers/dsopout/vars: expected layers/dropout/vars as in one: one of the two is damaged; leave it out",
        "two: vars: expected the name 'model' as in one, found none: one of the two is damaged; leave it out",
        "two: layers/dense/vars: expected the name 'dense' as in one, found none: one of the two is damaged; "
        "leave it out",
    ]
    moved = _fake("two", replace(WEIGHT, offset=108))  # written by a Keras that makes no such groups
    assert make_plan([one, moved], moved, [0.5, 0.5]).averaged == tuple(moved.tensors.values())


def test_findings_of_one_cause_are_one_line_with_their_number_and_three_examples() -> None:
    newest = _fake("two", *(_tensor(f"layer{i:03}", shape=(i,), offset=i) for i in range(151)))
    with pytest.raises(MismatchError) as caught:
        make_plan([_fake("one", _tensor("other")), newest], newest, [0.5, 0.5])
    assert len(caught.value.findings) == 152
    assert str(caught.value).splitlines() == [
        "one: 151 times: layer000: missing; two has it as float32[0] (also layer001, layer002, ...)",
        "one: other: extra float32[4]; two does not have it",
    ]


def test_automatic_numbers_of_tensor_names_are_explained() -> None:
    first, second = _fake("one", _tensor("conv2d_1/kernel")), _fake("two", _tensor("conv2d/kernel"))
    with pytest.raises(MismatchError, match="only automatic numbers differ") as caught:
        make_plan([first, second], second, [0.5, 0.5])
    assert len(caught.value.findings) == 2


def test_layer_names_of_equal_shapes_are_compared() -> None:
    tensors = (_tensor("layers/dense/vars/0"),)
    first = _fake("one", *tensors, layer_names={"layers/dense": "head"})
    second = _fake("two", *tensors, layer_names={"layers/dense": "body"})
    with pytest.raises(
        MismatchError, match="one: layers/dense: expected layer 'body' as in two, found 'head'"
    ):
        make_plan([first, second], second, [0.5, 0.5])
    renumbered = _fake("one", *tensors, layer_names={"layers/dense": "body_3"})
    assert make_plan([renumbered, second], second, [0.5, 0.5])


class TestConfigDifferences:
    def test_equal_configurations_do_not_differ(self) -> None:
        assert list(config_differences(makers.config(), copy.deepcopy(makers.config()))) == []

    @given(st.sampled_from(["units", "name", "dtype"]), st.one_of(st.integers(), st.text(), st.none()))
    def test_any_changed_setting_is_found_with_its_path(self, key: str, value: object) -> None:
        changed = makers.config()
        settings = changed["config"]["layers"][0]["config"]
        if settings[key] == value:
            return
        settings[key] = value
        if key == "name" and isinstance(value, str) and value.rstrip("0123456789") == "dense_":
            return
        assert [path for path, _, _ in config_differences(makers.config(), changed)] == [
            f"config.config.layers[0].config.{key}"
        ]

    def test_numbers_that_keras_appends_are_exchanged_consistently(self) -> None:
        one = {
            "layers": [{"name": "conv2d", "inputs": ["input"]}, {"name": "conv2d_1", "inputs": ["conv2d"]}]
        }
        other = {
            "layers": [
                {"name": "conv2d_2", "inputs": ["input_1"]},
                {"name": "conv2d_3", "inputs": ["conv2d_2"]},
            ]
        }
        crossed = {
            "layers": [
                {"name": "conv2d_2", "inputs": ["input_1"]},
                {"name": "conv2d_3", "inputs": ["conv2d_3"]},
            ]
        }
        assert list(config_differences(one, other)) == []
        assert [path for path, _, _ in config_differences(one, crossed)] == ["config.layers[1].inputs[0]"]

    def test_addresses_of_the_process_that_saved_may_differ(self) -> None:
        one = {
            "layers": [
                {"config": {"dtype": {"config": {"name": "float32"}, "shared_object_id": 140529357122832}}}
            ]
        }
        other = {"layers": [{"config": {"dtype": {"config": {"name": "float32"}}}}]}
        assert list(config_differences(one, other)) == []

    def test_a_numbered_class_is_another_class(self) -> None:
        assert len(list(config_differences({"class_name": "Block_1"}, {"class_name": "Block_2"}))) == 1

    def test_a_missing_and_an_extra_key_are_found(self) -> None:
        assert list(config_differences({"a": 1}, {"b": 2})) == [
            ("config.a", "1", "nothing"),
            ("config.b", "nothing", "2"),
        ]


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        ("layers/dense/vars/0", (3, 3), "bfloat16", "average"),
        ("layers/batch_normalization/vars/2", (3,), "float32", "average"),
        ("layers/normalization/vars/2", (), "int64", "copy"),
        ("layers/dropout/seed_generator/vars/0", (2,), "uint32", "copy"),
        ("layers/lookup/vars/0", (40,), "int64", "compare"),
        ("layers/mask/vars/0", (4, 4), "bool", "compare"),
        ("layers/spectral_normalization/vars/1", (1, 8), "float32", "copy"),
        ("layers/spectral_normalization/vars/0", (16, 8), "float32", "average"),
        ("model_weights/sn/sn/vector_u", (1, 8), "float32", "copy"),
    ],
)
def test_the_table_of_what_is_averaged(name: str, shape: tuple[int, ...], dtype: str, expected: str) -> None:
    assert treatment(_tensor(name, shape, dtype)) == expected


class TestBatchNormLayers:
    def test_from_the_configuration(self) -> None:
        assert batchnorm_layers(_fake("one", config=makers.config())) == ["bn"]

    def test_from_the_names_of_a_legacy_file(self) -> None:
        names = ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")
        tensors = [_tensor(f"stem/stem/{name}") for name in names]
        assert batchnorm_layers(_fake("one", *tensors)) == ["stem"]

    def test_from_the_group_of_a_weights_file_and_its_layer_name(self) -> None:
        tensors = [_tensor(f"layers/batch_normalization_3/vars/{i}") for i in range(2)]
        names = {"layers/batch_normalization_3": "stem_bn"}
        assert batchnorm_layers(_fake("one", *tensors, layer_names=names)) == ["stem_bn"]

    def test_from_four_vectors_of_one_length_in_a_subclassed_model(self) -> None:
        assert batchnorm_layers(_fake("one", *(_tensor(f"norm1/vars/{i}") for i in range(4)))) == ["norm1"]

    def test_no_false_alarm_for_other_layers(self) -> None:
        dense = [_tensor("layers/dense/vars/0", (4, 4)), _tensor("layers/dense/vars/1")]
        layer_norm = [
            _tensor("layers/layer_normalization/vars/0"),
            _tensor("layers/layer_normalization/vars/1"),
        ]
        assert batchnorm_layers(_fake("one", *dense, *layer_norm)) == []
