"""Checkpoints that are well formed and do not fit together."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cases import check_bounds, check_line, snapshot
from isolated import Isolated

import makers
import oracle

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

KERNEL, BIAS = "layers/dense/vars/0", "layers/dense/vars/1"
WRITERS: dict[str, Callable[..., object]] = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".weights.json": makers.write_sharded,
}


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


def _value(name: str, position: int, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays[name].ravel().__setitem__(position, value)


def _becomes(name: str, value: np.ndarray | None) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.pop(name) if value is None else arrays.__setitem__(name, value)  # type: ignore[func-returns-value]


NOT_FINITE = f"{BIAS}: holds NaN or infinity; leave this checkpoint out"
UNFIT = {
    "NaN": (_value(BIAS, 3, np.nan), NOT_FINITE),
    "infinity": (_value(BIAS, 0, np.inf), NOT_FINITE),
    "minus infinity": (_value(BIAS, 4, -np.inf), NOT_FINITE),
    "other shape": (
        _becomes(KERNEL, np.zeros((5, 7), np.float32)),
        rf"{KERNEL}: expected float32\[7, 5\] as in z_9.*, found float32\[5, 7\]",
    ),
    "other type": (
        _becomes(KERNEL, np.zeros((7, 5), np.float64)),
        rf"{KERNEL}: expected float32\[7, 5\] as in z_9.*, found float64\[7, 5\]",
    ),
    "missing": (_becomes(BIAS, None), rf"{BIAS}: missing; z_9.* has it as float32\[5\]"),
    "extra": (
        _becomes("layers/more/vars/0", np.zeros(2, np.float32)),
        r"layers/more/vars/0: extra float32\[2\]; z_9.* does not have it",
    ),
    "scalar instead": (
        _becomes(BIAS, np.float32(1)),
        rf"{BIAS}: expected float32\[5\] as in z_9.*, found float32\[\]",
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_named(name: str, suffix: str, isolated: Isolated, tmp_path: Path) -> None:
    edit, text = UNFIT[name]
    arrays = makers.weights(1)
    edit(arrays)
    WRITERS[suffix](tmp_path / f"a_1{suffix}", arrays)
    WRITERS[suffix](tmp_path / f"z_9{suffix}", makers.weights(9))
    before = snapshot(tmp_path)
    ended = isolated.run([f"a_1{suffix}", f"z_9{suffix}", "-o", f"swa{suffix}"], tmp_path)
    check_line(ended, 4, rf"a_1{re.escape(suffix)}: {text}")
    assert snapshot(tmp_path) == before


def test_equal_shapes_under_another_configuration_do_not_fit(isolated: Isolated, tmp_path: Path) -> None:
    settings = makers.config()
    settings["config"]["layers"][0]["config"]["activation"] = "relu\n"
    makers.write_archive(tmp_path / "a_1.keras", makers.weights(1), settings)
    makers.write_archive(tmp_path / "z_9.keras", makers.weights(9))
    line = r"a_1\.keras: config\.config\.layers\[0\]\.config\.activation: expected nothing as in z_9\.keras, found 'relu\\n'"
    check_line(isolated.run(["a_1.keras", "z_9.keras", "-o", "swa.keras"], tmp_path), 4, line)


@pytest.mark.parametrize("state", [np.arange(9), np.arange(9) == 4], ids=["integers", "booleans"])
def test_integer_state_that_differs_does_not_fit_unless_it_counts(
    state: np.ndarray, isolated: Isolated, tmp_path: Path
) -> None:
    for number in (1, 2):
        arrays = makers.weights(number) | {
            "layers/table/vars/0": np.roll(state, number),
            "layers/seed/vars/0": np.array([number, 3], np.uint32),
        }
        makers.write_weights(tmp_path / f"a_{number}.weights.h5", arrays)
    line = r"a_2\.weights\.h5: layers/table/vars/0: holds integers that differ from a_1\.weights\.h5, and is not a counter"
    check_line(isolated.run(["a_1.weights.h5", "a_2.weights.h5", "-o", "swa.weights.h5"], tmp_path), 4, line)


@pytest.mark.parametrize("how", ["path", "symlink", "hard link", "equal bytes"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_checkpoint_is_not_counted_twice(how: str, suffix: str, isolated: Isolated, tmp_path: Path) -> None:
    first = tmp_path / f"a_1{suffix}"
    WRITERS[suffix](first, makers.weights(1))
    second = tmp_path / f"b_2{suffix}"
    if how == "symlink":
        second.symlink_to(first.name)
    elif how == "hard link":
        os.link(first, second)
    elif how == "equal bytes":
        shutil.copyfile(first, second)
    else:
        second = first
    before = snapshot(tmp_path)
    ended = isolated.run([first.name, second.name, "-o", f"swa{suffix}"], tmp_path)
    name = re.escape(second.name)
    check_line(
        ended,
        4,
        rf"{name}: (file: the same file as {re.escape(first.name)}; name it once|.*: the same .* as .*{re.escape(first.name)}; name one of the two)",
    )
    assert snapshot(tmp_path) == before


def test_formats_do_not_mix(isolated: Isolated, tmp_path: Path) -> None:
    for suffix, writer in WRITERS.items():
        writer(tmp_path / f"a_1{suffix}", makers.weights(1))
    before = snapshot(tmp_path)
    for suffix, kind in ((".weights.h5", "Keras weights"), (".weights.json", "sharded Keras weights")):
        ended = isolated.run([f"a_1{suffix}", "a_1.keras", "-o", f"swa{suffix}"], tmp_path)
        check_bounds(ended)
        assert ended.code == 4
        assert len(ended.err.splitlines()) == 1
        assert kind in ended.err
    assert snapshot(tmp_path) == before


FINE = {
    "float16 near its largest": [{"vars/0": np.full(4, 65504, np.float16)}] * 3,
    "float32 near its largest": [{"vars/0": np.full(4, np.finfo(np.float32).max, np.float32)}] * 3,
    "subnormal": [{"vars/0": np.full(4, 1e-45, np.float32)}] * 3,
    "scalar": [{"vars/0": np.float64(number)} for number in (1, 2, 4)],
    "zero size": [
        {"vars/0": np.zeros((0, 3), np.float32), "vars/1": np.float32(number)} for number in (1, 2, 4)
    ],
    "one input": [{"vars/0": np.arange(5, dtype=np.float32)}],
    "thirty dimensions": [{"vars/0": np.full((1,) * 30 + (2,), number, np.float32)} for number in (1, 2)],
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_and_averages_is_averaged(name: str, isolated: Isolated, tmp_path: Path) -> None:
    inputs = []
    for number, arrays in enumerate(FINE[name]):
        padding = {"vars/9": np.int64(number)}  # a counter, so that no two files are equal
        inputs.append(makers.write_weights(tmp_path / f"a_{number}.weights.h5", arrays | padding).name)
    ended = isolated.run([*inputs, "-q", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    for tensor in FINE[name][0]:
        expected = oracle.mean([np.asarray(arrays[tensor]) for arrays in FINE[name]])
        assert written[tensor].tobytes() == expected.tobytes()


def test_layers_in_another_order_are_matched_by_name(isolated: Isolated, tmp_path: Path) -> None:
    makers.write_weights(tmp_path / "a_1.weights.h5", dict(reversed(makers.weights(1).items())))
    makers.write_weights(tmp_path / "a_2.weights.h5", makers.weights(2))
    ended = isolated.run(["a_1.weights.h5", "a_2.weights.h5", "-q", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    expected = oracle.mean([makers.weights(number)[KERNEL] for number in (1, 2)])
    assert written[KERNEL].tobytes() == expected.tobytes()
