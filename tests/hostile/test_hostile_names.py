"""Names that no structure of a checkpoint explains, and those that one does, however odd."""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from cases import Case, check_bounds, check_line, check_refused, parameters, snapshot
from isolated import Isolated

import makers
import oracle

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

NOWHERE = r"is not in a group `vars`, where Keras puts every variable: a name is damaged, or another program added it; leave this file out"
UNLISTED = r"is not in a list of layers or weights: a name is damaged, or another program added it; leave this file out"
DAMAGED = r"(.*: )?damaged HDF5 file \(.+\)"


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


def _arrays(number: int) -> dict[str, np.ndarray]:
    """Return a model with a metric and a layer without weights, and an optimizer that holds another."""
    state = {
        "metrics/mean/vars/0": np.float32(number),
        "metrics/mean/vars/1": np.float32(1),
        "optimizer/inner_optimizer/vars/0": np.int64(number),
        "optimizer/inner_optimizer/vars/1": np.float32(0.1),
    }
    return {name: np.asarray(value) for name, value in (makers.weights(number) | state).items()}


def _write(path: Path, number: int, arrays: Mapping[str, np.ndarray] | None = None) -> None:
    makers.write_weights(path, _arrays(number) if arrays is None else arrays)
    with h5py.File(path, "r+") as file:
        for group, name in (("layers/dense", "head"), ("layers/dropout", "dropout"), ("optimizer", "adam")):
            file.require_group(f"{group}/vars").attrs["name"] = name
        file.create_group("layers/flatten/vars")


def _good(path: Path) -> None:
    _write(path, len(path.name))


def _edited(edit: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    """Return a builder: a good file, then an edit by h5py."""

    def build(path: Path) -> None:
        _good(path)
        with h5py.File(path, "r+") as file:
            edit(file)

    return build


def _patched(patch: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Return a builder: a good file, then an edit of its bytes."""

    def build(path: Path) -> None:
        _good(path)
        data = bytearray(path.read_bytes())
        patch(data)
        path.write_bytes(data)

    return build


def _moved(old: str, new: str) -> Callable[[Path], None]:
    return _edited(lambda file: file.move(old, new))


def _bfloat16(tag: object) -> Callable[[Path], None]:
    def edit(file: h5py.File) -> None:
        file.create_dataset("layers/odd/vars/0", data=np.zeros(3, "V2")).attrs["dtype"] = tag

    return _edited(edit)


def _nodes(data: bytes, group: str) -> Iterator[int]:
    """Yield where the symbol table nodes of a group lie that hold a link to its first member."""
    with h5py.File(io.BytesIO(bytes(data)), "r") as file:
        first = h5py.h5o.get_info(next(iter(file[group].values())).id).addr
    position = data.find(b"SNOD")
    while position >= 0:
        count = struct.unpack_from("<H", data, position + 6)[0]
        if first in [struct.unpack_from("<Q", data, position + 16 + 40 * i)[0] for i in range(count)]:
            yield position
        position = data.find(b"SNOD", position + 1)


def _fewer_links(data: bytearray) -> None:
    (node,) = _nodes(data, "optimizer/vars")
    data[node + 6] -= 1


def _name_one_byte_on(data: bytearray) -> None:
    """Let the link to `layers/batch_normalization` have a name that begins one byte later."""
    (node,) = _nodes(data, "layers")
    data[node + 8] += 1


CASES = [
    Case("an optimizer's group", _moved("optimizer/vars", "optimizer/vaRs"), f"optimizer/vaRs/0: {NOWHERE}"),
    Case(
        "an inner optimizer's group",
        _moved("optimizer/inner_optimizer/vars", "optimizer/inner_optimizer/wars"),
        f"optimizer/inner_optimizer/wars/0: {NOWHERE}",
    ),
    Case(
        "a layer's group", _moved("layers/dense/vars", "layers/dense/Vars"), f"layers/dense/Vars/0: {NOWHERE}"
    ),
    Case(
        "a metric's group",
        _moved("metrics/mean/vars", "metrics/mean/var3"),
        f"metrics/mean/var3/0: {NOWHERE}",
    ),
    Case(
        "an empty group",
        _moved("layers/flatten/vars", "layers/flatten/vqrs"),
        f"layers/flatten/vqrs: {NOWHERE}",
    ),
    Case("the model's own group", _moved("vars", "vard"), f"vard: {NOWHERE}"),
    Case(
        "a dataset beside the groups",
        _edited(lambda file: file.__setitem__("layers/dense/mean", np.float32(1))),
        f"layers/dense/mean: {NOWHERE}",
    ),
    Case(
        "an attribute's name",
        _patched(lambda data: data.__setitem__(slice(None), data.replace(b"name\0", b"naMe\0"))),
        r".*/vars: has no attribute `name`, but one `naMe`: its name is damaged; leave this file out",
    ),
    Case(
        "an attribute's name that ends early",
        _patched(lambda data: data.__setitem__(slice(None), data.replace(b"name\0", b"na\0e\0"))),
        DAMAGED,
    ),
    Case(
        "an attribute's name that is not UTF-8",
        _patched(lambda data: data.__setitem__(slice(None), data.replace(b"name\0", b"n\xe1me\0"))),
        r".*/vars: has no attribute `name`, but one `n\\xe1me`: its name is damaged; leave this file out",
    ),
    Case("a name that is a number", _edited(lambda file: file["vars"].attrs.__setitem__("name", 7)), DAMAGED),
    Case(
        "a type's name",
        _bfloat16("bfloat17"),
        "layers/odd/vars/0: has a type that Keras does not write for a variable",
    ),
    Case(
        "the attribute of a type",
        _edited(
            lambda file: file.create_dataset("layers/odd/vars/0", data=np.zeros(3, "V2")).attrs.__setitem__(
                "dtyPe", "bfloat16"
            )
        ),
        "layers/odd/vars/0: has no attribute `dtype`, but one `dtyPe`: its name is damaged; leave this file out",
    ),
    Case(
        "the names of true and false",
        _edited(
            lambda file: file.create_dataset(
                "layers/odd/vars/0", data=[0, 1], dtype=h5py.enum_dtype({"FALSE": 0, "TRUD": 1}, "i1")
            )
        ),
        "layers/odd/vars/0: has a type that Keras does not write for a variable",
    ),
    Case("a link less than there are", _patched(_fewer_links), DAMAGED),
    Case("a name that begins one byte on", _patched(_name_one_byte_on), DAMAGED),
]


@parameters(CASES)
def test_a_name_that_nothing_explains_is_refused(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    check_refused(isolated, tmp_path, case, _good, ".weights.h5")


DROP = "leave this file out, or use --optimizer drop"
OTHERS = {
    "a number": (
        _moved("optimizer/vars/0", "optimizer/vars/p"),
        rf"optimizer/vars/p: expected optimizer/vars/0, int64\[\], as in the same place in a_1\.weights\.h5, found int64\[\]: one of the two is damaged; {DROP}",
    ),
    "the last number": (
        _moved("optimizer/vars/2", "optimizer/vars/r"),
        rf"optimizer/vars/r: expected optimizer/vars/2, float32\[7, 5\], as in the same place in a_1\.weights\.h5, found float32\[7, 5\]: one of the two is damaged; {DROP}",
    ),
    "an inner optimizer": (
        _moved("optimizer/inner_optimizer", "optimizer/inneR_optimizer"),
        r"optimizer/inneR_optimizer/vars/0: expected optimizer/inner_optimizer/vars/0, int64.*\n.*inneR_optimizer/vars/1: .*",
    ),
    "a metric": (
        _moved("metrics/mean", "metrics/mead"),
        r"metrics/mead/vars/0: expected metrics/mean/vars/0, float32\[\], as in the same place in a_1\.weights\.h5, found float32\[\]: one of the two is damaged; leave this file out\n.*mead/vars/1: .*",
    ),
    "a layer without weights": (
        _moved("layers/flatten", "layers/flattdn"),
        r"layers/flattdn/vars: expected layers/flatten/vars as in a_1\.weights\.h5: one of the two is damaged; leave it out",
    ),
    "a layer's name": (
        _edited(lambda file: file["layers/dense/vars"].attrs.__delitem__("name")),
        r"layers/dense/vars: expected the name 'head' as in a_1\.weights\.h5, found none: one of the two is damaged; leave it out",
    ),
    "a type": (
        _patched(lambda data: _unsigned(data, "optimizer/vars/0")),
        rf"optimizer/vars/0: expected optimizer/vars/0, int64\[\], as in the same place in a_1\.weights\.h5, found uint64\[\]: one of the two is damaged; {DROP}",
    ),
}


def _unsigned(data: bytearray, name: str) -> None:
    """Clear the bit that gives the integers of a dataset a sign."""
    with h5py.File(io.BytesIO(bytes(data)), "r") as file:
        header = h5py.h5o.get_info(file[name].id).addr
    position = data.index(bytes.fromhex("10 08 00 00 08 00 00 00"), header)
    data[position + 1] = 0


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_in_a_file_of_the_same_layout_is_damaged(
    name: str, isolated: Isolated, tmp_path: Path
) -> None:
    build, line = OTHERS[name]
    _good(tmp_path / "a_1.weights.h5")
    build(tmp_path / "m_5.weights.h5")
    before = snapshot(tmp_path)
    ended = isolated.run(["a_1.weights.h5", "m_5.weights.h5", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert re.fullmatch(rf"swa-avg: error: m_5\.weights\.h5: {line}\n", ended.err), ended.err
    assert ended.code == 4
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["a number", "the last number", "an inner optimizer", "a type"])
def test_damage_to_what_is_dropped_does_no_harm(name: str, isolated: Isolated, tmp_path: Path) -> None:
    _good(tmp_path / "a_1.weights.h5")
    OTHERS[name][0](tmp_path / "m_5.weights.h5")
    command = ["a_1.weights.h5", "m_5.weights.h5", "-q", "-o", "swa.weights.h5", "--optimizer", "drop"]
    ended = isolated.run(command, tmp_path)
    assert (ended.code, ended.err) == (0, "")
    inputs = [oracle.read_arrays(tmp_path / f"{stem}.weights.h5") for stem in ("a_1", "m_5")]
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    assert written.keys() == {name for name in inputs[0] if not name.startswith("optimizer/")}
    for tensor, value in written.items():
        if tensor.startswith("layers/"):
            assert value.tobytes() == oracle.mean([arrays[tensor] for arrays in inputs]).tobytes()


@pytest.mark.parametrize("name", OTHERS)
def test_damage_to_what_only_an_older_checkpoint_has_does_no_harm(
    name: str, isolated: Isolated, tmp_path: Path
) -> None:
    """Two sound checkpoints agree, and only the newest one's state is copied."""
    _good(tmp_path / "a_1.weights.h5")
    OTHERS[name][0](tmp_path / "m_5.weights.h5")
    _good(tmp_path / "z_09.weights.h5")
    inputs = ["a_1.weights.h5", "m_5.weights.h5", "z_09.weights.h5"]
    ended = isolated.run([*inputs, "-q", "-o", "swa.weights.h5"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    newest, written = (oracle.read_arrays(tmp_path / file) for file in (inputs[-1], "swa.weights.h5"))
    assert written.keys() == newest.keys()
    for tensor, value in written.items():
        if not tensor.startswith("layers/"):
            assert value.tobytes() == newest[tensor].tobytes()


def test_a_missing_number_is_noticed_without_another_checkpoint(isolated: Isolated, tmp_path: Path) -> None:
    for old, new, tensor in (
        ("optimizer/vars/0", "optimizer/vars/p", r"optimizer/vars/0: is missing, and 1, 2, p are there"),
        ("optimizer/vars/1", "optimizer/vars/3", r"optimizer/vars/1: is missing, and 0, 2, 3 are there"),
        (
            "metrics/mean/vars/0",
            "metrics/mean/vars/8",
            r"metrics/mean/vars/0: is missing, and 1, 8 are there",
        ),
    ):
        _moved(old, new)(tmp_path / "a_1.weights.h5")
        ended = isolated.run(["a_1.weights.h5", "-o", "swa.weights.h5"], tmp_path)
        way_out = DROP if "optimizer" in old else "leave this file out"
        check_line(ended, 4, rf"a_1\.weights\.h5: {tensor}: a name is damaged; {way_out}")


def _write_shard(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a set of one shard; its map names the groups `vars`, as Keras's does."""
    shard = path.with_name(path.name.replace(".weights.json", "_00000.weights.h5"))
    makers.write_weights(shard, arrays)
    groups = {"/" + name[: name.rindex("vars/") + 4] for name in arrays}
    record = {"metadata": {}, "weight_map": dict.fromkeys(sorted(groups), shard.name)}
    path.write_text(json.dumps(record))


WRITERS = {".weights.h5": makers.write_weights, ".keras": makers.write_archive, ".weights.json": _write_shard}
EXPLAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an optimizer that names its own": ({"optimizer/vars/note": 1.0}, {"optimizer/vars/note": 2.0}),
    "an optimizer that only one has": ({}, {"optimizer/vars/note": 2.0}),
    "a metric that only one has": ({"metrics/mean/vars/0": 1.0}, {}),
    "a layer that names its own": (
        {"layers/own/vars/table": 1.0, "layers/own/vars/7": 2.0, "layers/own/vars/a/b": 3.0},
        {"layers/own/vars/table": 2.0, "layers/own/vars/7": 1.0, "layers/own/vars/a/b": 3.0},
    ),
    "a layer called vars": ({"vars/dense/vars/0": 1.0}, {"vars/dense/vars/0": 2.0}),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", EXPLAINED)
def test_what_a_class_may_name_is_carried(name: str, suffix: str, isolated: Isolated, tmp_path: Path) -> None:
    model = {n: value for n, value in makers.weights(1).items() if not n.startswith("optimizer")}
    sgd = {"optimizer/vars/0": np.int64(5), "optimizer/vars/1": np.float32(0.1)}
    for number, more in enumerate(EXPLAINED[name], 1):
        arrays = {n: np.asarray(value + number, value.dtype) for n, value in model.items()}
        own = {n: np.float32(value) for n, value in more.items()}
        WRITERS[suffix](tmp_path / f"a_{number}{suffix}", arrays | (sgd if number == 2 or own else {}) | own)
    ended = isolated.run([f"a_1{suffix}", f"a_2{suffix}", "-q", "-o", f"swa{suffix}"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    inputs = [oracle.read_arrays(tmp_path / f"a_{number}{suffix}") for number in (1, 2)]
    _check_average(oracle.read_arrays(tmp_path / f"swa{suffix}"), inputs)


def test_numbers_that_all_leave_out_are_the_optimizers_own(isolated: Isolated, tmp_path: Path) -> None:
    for number in (1, 2):
        more = {"optimizer/vars/9": np.float32(number)}
        makers.write_weights(tmp_path / f"a_{number}.weights.h5", makers.weights(number) | more)
        with h5py.File(tmp_path / f"a_{number}.weights.h5", "r+") as file:
            file.attrs["classes"] = ["cat", "dog"][:number]  # of another layout, so that names alone tell
    ended = isolated.run(["a_1.weights.h5", "a_2.weights.h5", "-q", "-o", "swa.weights.h5"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    inputs = [oracle.read_arrays(tmp_path / f"a_{number}.weights.h5") for number in (1, 2)]
    _check_average(oracle.read_arrays(tmp_path / "swa.weights.h5"), inputs)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_run_may_go_on_with_another_optimizer(suffix: str, isolated: Isolated, tmp_path: Path) -> None:
    sgd = {n: value for n, value in makers.weights(2).items() if n != "optimizer/vars/2"}
    for number, (arrays, name) in enumerate([(makers.weights(1), "adam"), (sgd, "sgd")], 1):
        path = tmp_path / f"a_{number}{suffix}"
        WRITERS[suffix](path, arrays)
        files = [path.with_name(path.name.replace(".weights.json", "_00000.weights.h5"))]
        for file in () if suffix == ".keras" else files:
            with h5py.File(file, "r+") as hdf5:
                hdf5["optimizer/vars"].attrs["name"] = name
    ended = isolated.run([f"a_1{suffix}", f"a_2{suffix}", "-q", "-o", f"swa{suffix}"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    inputs = [oracle.read_arrays(tmp_path / f"a_{number}{suffix}") for number in (1, 2)]
    _check_average(oracle.read_arrays(tmp_path / f"swa{suffix}"), inputs)


def _check_average(written: Mapping[str, np.ndarray], inputs: list[dict[str, np.ndarray]]) -> None:
    assert written.keys() == inputs[-1].keys()
    for name, value in written.items():
        copied = name.startswith(("optimizer/", "metrics/"))
        expected = inputs[-1][name] if copied else oracle.mean([arrays[name] for arrays in inputs])
        assert value.tobytes() == expected.tobytes(), name


OWN_ATTRIBUTES: dict[str, Callable[[h5py.File], object]] = {
    "at the root": lambda file: file.attrs.update({"classes": ["cat", "dog"], "name": 7, "dtype": "float32"}),
    "of a layer": lambda file: file["layers/dense"].attrs.__setitem__("seen", np.arange(3)),
    "of a tensor": lambda file: file["layers/dense/vars/0"].attrs.__setitem__("frozen", True),
}


@pytest.mark.parametrize("name", OWN_ATTRIBUTES)
def test_attributes_of_ones_own_are_carried(name: str, isolated: Isolated, tmp_path: Path) -> None:
    for file in ("a_1.weights.h5", "b_22.weights.h5"):
        _edited(OWN_ATTRIBUTES[name])(tmp_path / file)
    ended = isolated.run(["a_1.weights.h5", "b_22.weights.h5", "-q", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")
    with h5py.File(tmp_path / "b_22.weights.h5") as newest, h5py.File(tmp_path / "swa.weights.h5") as written:
        for group in ("/", "layers/dense", "layers/dense/vars/0"):
            assert set(written[group].attrs) - {"swa_avg"} == set(newest[group].attrs)


LEGACY = {
    "dense/dense/kernel:0": makers.weights()["layers/dense/vars/0"],
    "dense/dense/bias:0": makers.weights()["layers/dense/vars/1"],
    "block/conv/BN/block/conv/BN/gamma:0": np.ones(5, np.float32),
    "block/conv/block/conv/kernel:0": np.ones(5, np.float32),
}


def _write_legacy(path: Path, *, full: bool = True) -> None:
    """Write a legacy file of layers whose names hold slashes, and one without weights."""
    number = len(path.name)
    layers = {"dense": ["dense/kernel:0", "dense/bias:0"], "flatten": []}
    layers |= {"block/conv/BN": ["block/conv/BN/gamma:0"], "block/conv": ["block/conv/kernel:0"]}
    with h5py.File(path, "w") as file:
        root = file.create_group("model_weights") if full else file
        for target in (file, root):
            target.attrs["keras_version"], target.attrs["backend"] = "2.12.0", "tensorflow"
        root.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, names in layers.items():
            group = root.require_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                group.create_dataset(name, data=LEGACY[f"{layer}/{name}"] * np.float32(number))
        if full:
            file.attrs["model_config"] = json.dumps(makers.config())
            file.attrs["training_config"] = json.dumps({"loss": "mse"})
            state = {"Adam/iter:0": np.int64(number), "Adam/dense/kernel/m:0": np.ones(4, np.float32)}
            group = file.create_group("optimizer_weights")
            group.attrs["weight_names"] = [name.encode() for name in state]
            for name, value in state.items():
                group.create_dataset(name, data=value)


def _legacy(edit: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        _write_legacy(path)
        with h5py.File(path, "r+") as file:
            edit(file)

    return build


def _relisted(group: str, attribute: str, names: list[bytes]) -> Callable[[Path], None]:
    return _legacy(lambda file: file[group].attrs.__setitem__(attribute, names))


UNFINISHED = "the save that wrote it did not finish: leave this file out"
LEGACY_CASES = [
    Case(
        "an optimizer's weight",
        _legacy(lambda file: file.move("optimizer_weights/Adam/iter:0", "optimizer_weights/Adam/itep:0")),
        f"optimizer_weights/Adam/iter:0: weight listed, but not stored; {UNFINISHED}",
    ),
    Case(
        "an optimizer's list",
        _relisted("optimizer_weights", "weight_names", [b"Adam/iter:0"]),
        f"optimizer_weights/Adam/dense/kernel/m:0: {UNLISTED}",
    ),
    Case(
        "the optimizer's group",
        _legacy(lambda file: file.move("optimizer_weights", "optimizer_weighus")),
        f"optimizer_weighus/Adam/dense/kernel/m:0: {UNLISTED}",
    ),
    Case(
        "a layer's list",
        _relisted("model_weights/dense", "weight_names", [b"dense/kernel:0"]),
        f"model_weights/dense/dense/bias:0: {UNLISTED}",
    ),
    Case(
        "the list of layers",
        _relisted("model_weights", "layer_names", [b"dense", b"block/conv/BN", b"block/conv"]),
        f"model_weights/flatten: {UNLISTED}",
    ),
    Case(
        "a layer without weights",
        _legacy(lambda file: file.move("model_weights/flatten", "model_weights/flattdn")),
        f"flatten: layer listed, but not stored; {UNFINISHED}",
    ),
    Case(
        "an empty group",
        _legacy(lambda file: file.create_group("model_weights/dense/more")),
        f"model_weights/dense/more: {UNLISTED}",
    ),
    Case(
        "the version's attribute",
        _legacy(lambda file: file.attrs.__setitem__("keras_versioN", file.attrs.pop("keras_version"))),
        "has no attribute `keras_version`, but one `keras_versioN`: its name is damaged; leave this file out",
    ),
    Case(
        "compile settings",
        _legacy(lambda file: file.attrs.__setitem__("training_config", '{"loss" "mse"}')),
        r"training_config is not valid JSON \(.*\)",
    ),
]


@parameters(LEGACY_CASES)
def test_a_name_that_no_list_holds_is_refused(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    check_refused(isolated, tmp_path, case, _write_legacy, ".h5")


@pytest.mark.parametrize("full", [True, False])
def test_legacy_layers_may_have_slashes_in_their_names(
    full: bool, isolated: Isolated, tmp_path: Path
) -> None:
    for name in ("a_1.h5", "b_22.h5"):
        _write_legacy(tmp_path / name, full=full)
    ended = isolated.run(["a_1.h5", "b_22.h5", "-q", "-o", "swa.h5"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    inputs = [oracle.read_arrays(tmp_path / name) for name in ("a_1.h5", "b_22.h5")]
    written = oracle.read_arrays(tmp_path / "swa.h5")
    assert written.keys() == inputs[-1].keys()
    for name, value in written.items():
        copied = name.startswith("optimizer_weights/")
        expected = inputs[-1][name] if copied else oracle.mean([arrays[name] for arrays in inputs])
        assert value.tobytes() == expected.tobytes(), name


EVERY = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_hostile_names import check_every_bit
check_every_bit(Path(sys.argv[3]), int(sys.argv[4]))
"""


def check_every_bit(folder: Path, bit: int) -> None:
    """Flip a bit of each byte of the newest file that is not 0 and no value; runs in its own process.

    A plan is made, whose template has the names, shapes, types and places of the sound file, or an error ends it.
    """
    from swa_avg.errors import MismatchError, UnreadableError
    from swa_avg.formats import open_checkpoint
    from swa_avg.planning.plan import make_plan

    older, newest = folder / "a_1.weights.h5", folder / "b_2.weights.h5"
    for number, path in enumerate((older, newest)):
        _write(path, number, {n: v for n, v in _arrays(number).items() if "batch" not in n and "/0" in n})
    original = newest.read_bytes()
    sound = open_checkpoint(newest)
    inside = [range(tensor.offset, tensor.stop) for tensor in sound.tensors.values()]
    positions = [p for p, byte in enumerate(original) if byte and not any(p in extent for extent in inside)]
    planned = refused = 0
    for position in positions:
        data = bytearray(original)
        data[position] ^= 1 << bit
        newest.write_bytes(data)
        try:
            damaged = open_checkpoint(newest)
            plan = make_plan([open_checkpoint(older, damaged), damaged], damaged, [0.5, 0.5])
        except (UnreadableError, MismatchError):
            refused += 1
            continue
        planned += 1
        assert plan.template.tensors == sound.tensors, position
        assert plan.template.empty_groups == sound.empty_groups, position
        assert plan.template.layer_names.keys() == sound.layer_names.keys(), position
    print(planned, refused)


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_the_newest_file_keeps_its_names_or_ends_the_run(
    bit: int, tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    here = Path(__file__).parent
    ended = run_python(EVERY, here, here.parent, tmp_path, bit)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    planned, refused = map(int, ended.stdout.split())
    assert planned > 0
    assert refused > planned
