"""What a checkpoint is seen to hold: BatchNorm, spectral normalization, optimizers, wherever they hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest

import makers
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.planning.plan import make_plan
from swa_avg.planning.policy import batchnorm_layers

Arrays = dict[str, np.ndarray]
Open = Callable[[Path], Checkpoint]


@pytest.fixture
def opened() -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(open_checkpoint(path)))


def vectors(group: str, count: int, size: int = 4) -> Arrays:
    return {f"{group}/vars/{number}": np.ones(size, "f4") for number in range(count)}


def write(path: Path, arrays: Arrays, names: dict[str, str]) -> Path:
    """Write weights with the `name` attributes that Keras 3.10 and later give the groups of layers."""
    import h5py

    makers.write_weights(path, arrays)
    with h5py.File(path, "r+") as file:
        for group, name in names.items():
            file[f"{group}/vars"].attrs["name"] = name
    return path


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    ("group", "name", "shown"),
    [
        ("layers/res_block/norm1", "batch_normalization_7", "batch_normalization_7"),
        ("layers/res_block/norm1", "block3_bn", "block3_bn"),
        ("layers/res_block/bn2", None, "bn2"),
        ("layers/sync_batch_normalization", None, "sync_batch_normalization"),
        ("encoder/stem_BatchNorm", None, "stem_BatchNorm"),
    ],
)
def test_batchnorm_is_seen_wherever_a_name_says_it(
    count: int, group: str, name: str | None, shown: str, tmp_path: Path, opened: Open
) -> None:
    arrays = {**vectors(group, count), "layers/dense/vars/0": np.ones((4, 4), "f4")}
    path = write(tmp_path / "a.weights.h5", arrays, {group: name} if name else {})
    assert batchnorm_layers(opened(path)) == [shown]


@pytest.mark.parametrize(
    ("group", "count", "name"),
    [("layers/norm", 2, "layer_normalization"), ("layers/subnet", 1, None), ("layers/dense", 3, "submodule")],
)
def test_other_vectors_are_no_batchnorm(
    group: str, count: int, name: str | None, tmp_path: Path, opened: Open
) -> None:
    path = write(tmp_path / "a.weights.h5", vectors(group, count), {group: name} if name else {})
    assert batchnorm_layers(opened(path)) == []


def test_what_the_configuration_does_not_list_is_added_to_what_it_lists(tmp_path: Path, opened: Open) -> None:
    arrays = {**vectors("layers/batch_normalization", 4), **vectors("layers/res_block/norm1", 3)}
    path = write(
        tmp_path / "a.weights.h5",
        arrays,
        {"layers/batch_normalization": "bn", "layers/res_block/norm1": "bn_1"},
    )
    archive = makers.write_archive(tmp_path / "a.keras", {}, **{"model.weights.h5": path.read_bytes()})
    assert batchnorm_layers(opened(archive)) == ["bn", "bn_1"]


@pytest.mark.parametrize(
    ("group", "name"), [("layers/block/sn", "spectral_normalization_2"), ("layers/block/sn1", None)]
)
def test_the_power_iteration_vector_is_copied_wherever_it_hangs(
    group: str, name: str | None, tmp_path: Path, opened: Open
) -> None:
    arrays = {f"{group}/vars/0": np.ones((3, 4), "f4"), f"{group}/vars/1": np.ones((1, 4), "f4")}
    path = write(tmp_path / "a.weights.h5", arrays, {group: name} if name else {})
    checkpoint = opened(path)
    plan = make_plan([checkpoint], checkpoint, [1.0])
    assert [tensor.name for tensor in plan.copied] == [f"{group}/vars/1"]


def optimizer(group: str, *, rate: bool = True) -> Arrays:
    slots = [np.ones((3, 4), "f4"), np.ones(4, "f4")] * 2
    values = [np.int64(7), *([np.float32(0.1)] if rate else []), *slots]
    return {f"{group}/vars/{number}": value for number, value in enumerate(values)}


@pytest.mark.parametrize("rate", [True, False])
@pytest.mark.parametrize(
    "group", ["gen_opt", "opts/disc", "optimizers/0", "d_adam", "critic/opt_2", "sgd", "my_optimizer_1"]
)
def test_state_of_optimizers_is_never_averaged(group: str, rate: bool, tmp_path: Path, opened: Open) -> None:
    weights = {"g/vars/0": np.ones((3, 4), "f4"), "g/vars/1": np.ones(4, "f4")}
    checkpoint = opened(
        makers.write_weights(tmp_path / "a.weights.h5", weights | optimizer(group, rate=rate))
    )
    plan = make_plan([checkpoint], checkpoint, [1.0])
    assert [tensor.name for tensor in plan.averaged] == sorted(weights)
    assert {tensor.name for tensor in plan.copied} == set(optimizer(group, rate=rate))


@pytest.mark.parametrize("group", ["adaptive", "optical_flow", "lionhead"])
def test_layers_that_count_are_no_optimizers(group: str, tmp_path: Path, opened: Open) -> None:
    arrays = optimizer(group)
    checkpoint = opened(makers.write_weights(tmp_path / "a.weights.h5", arrays))
    plan = make_plan([checkpoint], checkpoint, [1.0])
    assert len(plan.averaged) == len(arrays) - 1
