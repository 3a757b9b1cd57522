"""The arithmetic: exact, and the same whatever the blocks, threads and order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
import oracle
from swa_avg import average
from swa_avg.combine import Combiner
from swa_avg.combine.budget import LOCAL
from swa_avg.combine.sums import round_to_bfloat16
from swa_avg.combine.workers import Threads
from swa_avg.errors import MismatchError
from swa_avg.formats import open_checkpoint
from swa_avg.planning.plan import make_plan
from swa_avg.verification import verify as derive_again

BFLOAT16_EPSILON = 2.0**-8


def _exact_bfloat16(value: float) -> int:
    """Round a float64 to bfloat16 in rational arithmetic; return the bits."""
    magnitude = Fraction(abs(value))
    sign = 0x8000 if np.signbit(value) else 0

    def widen(bits: int) -> Fraction:
        if bits == 0x7F80:
            return Fraction(2) ** 128
        return Fraction(float(np.array([bits << 16], np.uint32).view(np.float32)[0]))

    low, high = 0, 0x7F80
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if widen(middle) <= magnitude else (low, middle)
    below, above = magnitude - widen(low), widen(high) - magnitude
    even = low if low % 2 == 0 else high
    return (even if below == above else low if below < above else high) | sign


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=300)
def test_bfloat16_is_rounded_once_from_float64(value: float) -> None:
    assert int(round_to_bfloat16(np.array([value]))[0]) == _exact_bfloat16(value)


@given(st.integers(0, 0x7F7E), st.sampled_from([-1, 0, 1]), st.booleans())
@settings(max_examples=300)
def test_bfloat16_is_right_at_and_next_to_ties(bits: int, step: int, negative: bool) -> None:
    low, high = (
        np.array([b << 16], np.uint32).view(np.float32).astype(np.float64)[0] for b in (bits, bits + 1)
    )
    tie = (low + high) / 2
    value = tie if step == 0 else np.nextafter(tie, np.inf * step)
    value = -value if negative else value
    assert int(round_to_bfloat16(np.array([value]))[0]) == _exact_bfloat16(value)


def test_the_oracle_for_bfloat16_agrees_with_rational_arithmetic() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.standard_normal(300), rng.standard_normal(300) * 1e-39, rng.standard_normal(20) * 1e38]
    )
    assert oracle.nearest_bfloat16(values).tolist() == [_exact_bfloat16(value) for value in values]


def _run(folder: Path, values: list[np.ndarray]) -> list[Path]:
    paths = []
    for number, value in enumerate(values):
        arrays = {
            "layers/dense/vars/0": value,
            "layers/dense/vars/1": value.reshape(-1)[:3],
            "vars/0": np.int32(number),
        }
        paths.append(makers.write_weights(folder / f"ckpt_{number}.weights.h5", arrays))
    return paths


def _combined(paths: list[Path], block_bytes: int, threads: int, *, verify: bool) -> dict[str, bytes]:
    checkpoints = [open_checkpoint(path) for path in paths]
    plan = make_plan(checkpoints, checkpoints[-1], [1 / len(paths)] * len(paths))
    with ThreadPoolExecutor(threads) as executor:
        workers = Threads(executor, replace(LOCAL, block_bytes=block_bytes, threads=threads))
        combiner = Combiner(plan, [plan.coefficients], workers, verify)
        data = b"".join(map(bytes, combiner.stream(0)))
    tensors = checkpoints[-1].tensors
    for checkpoint in checkpoints:
        checkpoint.close()
    return {name: data[tensor.offset : tensor.stop] for name, tensor in tensors.items()}


def test_several_rows_of_coefficients_give_what_each_gives_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    values = [rng.standard_normal((41, 13)).astype(np.float32) for _ in range(4)]
    checkpoints = [open_checkpoint(path) for path in _run(tmp_path, values)]
    plan = make_plan(checkpoints, checkpoints[-1], [0.25] * 4)
    rows = [[0.25] * 4, [0, 0, 0.5, 0.5], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], [0, 1, 0, 0]]
    exact = [np.asarray(v, np.float64) for v in values]
    expected = [
        ((exact[0] + exact[1] + exact[2] + exact[3]) / 4),
        ((exact[2] + exact[3]) / 2),
        exact[3],
        (((exact[0] * 0.1 + exact[1] * 0.2) + exact[2] * 0.3) + exact[3] * 0.4),
        exact[1],
    ]
    tensor = plan.template.tensors["layers/dense/vars/0"]
    for block_bytes in (64, 1000, 2**20):
        found = np.zeros((len(rows), plan.template.size), np.uint8)
        with ThreadPoolExecutor(2) as executor:
            workers = Threads(executor, replace(LOCAL, block_bytes=block_bytes, threads=2))
            for block, averages in Combiner(plan, rows, workers).blocks(0):
                found[:, block.start : block.stop] = averages
        for row, array in zip(found, expected, strict=True):
            assert row[tensor.offset : tensor.stop].tobytes() == array.astype(np.float32).tobytes()
    for checkpoint in checkpoints:
        checkpoint.close()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_block_size_and_threads_change_no_bit(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = [rng.standard_normal((37, 91)) * 10.0 ** rng.integers(-3, 3) for _ in range(5)]
    if dtype == "bfloat16":
        stored = [oracle.nearest_bfloat16(v).view("V2").reshape(v.shape) for v in values]
    else:
        stored = [v.astype(dtype) for v in values]
    paths = _run(tmp_path, stored)
    expected = oracle.mean(stored).tobytes()
    for block_bytes in (64, 1000, 4096, 2**20):
        for threads in (1, 3):
            for verify in (True, False):
                found = _combined(paths, block_bytes, threads, verify=verify)
                assert found["layers/dense/vars/0"] == expected, (block_bytes, threads, verify)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9),
    st.integers(1, 20),
)
@settings(max_examples=25)
def test_mean_of_equal_inputs_is_the_input(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], count: int
) -> None:
    folder = tmp_path_factory.mktemp("equal")
    value = np.array(values, np.float32)
    paths = _run(folder, [value] * count)
    assert _combined(paths, 4096, 1, verify=True)["layers/dense/vars/0"] == value.tobytes()


def test_largest_float16_values_do_not_overflow(tmp_path: Path) -> None:
    paths = _run(tmp_path, [np.full(4, 65504, np.float16)] * 3)
    assert (
        _combined(paths, 4096, 1, verify=True)["layers/dense/vars/0"]
        == np.full(4, 65504, np.float16).tobytes()
    )


def test_inputs_of_different_byte_layout_are_averaged_by_name(tmp_path: Path) -> None:
    first, second = makers.weights(1), makers.weights(2)
    paths = [tmp_path / "ckpt_1.weights.h5", tmp_path / "ckpt_2.weights.h5"]
    makers.write_weights(
        paths[0], dict(reversed(first.items())) | {"optimizer/vars/9": np.zeros(1000, np.float32)}
    )
    makers.write_weights(paths[1], second)
    average(paths, tmp_path / "swa.weights.h5")
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    for name in ("layers/dense/vars/0", "layers/batch_normalization/vars/3"):
        assert written[name].tobytes() == oracle.mean([first[name], second[name]]).tobytes()


def test_weighted_average_is_the_float64_sum_of_products(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    values = [rng.standard_normal(1000).astype(np.float32) for _ in range(3)]
    paths = _run(tmp_path, values)
    average(paths, tmp_path / "swa.weights.h5", method=[0.25, -0.5, 1.25])
    total = (0.25 * values[0].astype(np.float64) + -0.5 * values[1].astype(np.float64)) + 1.25 * values[
        2
    ].astype(np.float64)
    found = oracle.read_arrays(tmp_path / "swa.weights.h5")["layers/dense/vars/0"]
    assert found.tobytes() == total.astype(np.float32).tobytes()


def test_a_tensor_with_two_names_is_averaged_once(tmp_path: Path) -> None:
    paths = []
    for number in (1, 3):
        path = makers.write_weights(
            tmp_path / f"ckpt_{number}.weights.h5", {"a/vars/0": np.full(5, number, np.float32)}
        )
        with h5py.File(path, "r+") as file:
            file["b/vars/0"] = file["a/vars/0"]
        paths.append(path)
    average(paths, tmp_path / "swa.weights.h5")
    with h5py.File(tmp_path / "swa.weights.h5", "r") as file:
        assert file["a/vars/0"][()].tolist() == file["b/vars/0"][()].tolist() == [2.0] * 5


def _constants(dtype: str) -> dict[str, np.ndarray]:
    """Return tensors with values that are not finite: a mask, a placeholder, and a table of 2 MiB or more."""
    table = np.random.default_rng(5).standard_normal(300_000).astype("float64")
    table[::70_000] = [np.nan, np.inf, -np.inf, np.nan, 1.5]
    return {
        "layers/a/vars/0": np.array([[0.0, -np.inf], [-0.0, np.inf]], dtype),
        "layers/b/vars/0": np.array(np.nan, dtype),
        "layers/c/vars/0": table.astype(dtype),
    }


@pytest.mark.parametrize("method", ["uniform", "ema:0.3", [0.5, 0.0, 0.5], [2.0, -3.0, 2.0]])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_what_is_not_finite_and_the_same_in_all_is_copied(
    dtype: str, method: str | list[float], tmp_path: Path
) -> None:
    inputs = [makers.weights(number, dtype) | _constants(dtype) for number in (1, 2, 3)]
    for number, arrays in enumerate(inputs):
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    output = tmp_path / "swa.weights.h5"
    report = average(str(tmp_path / "ckpt_?.weights.h5"), output, method=method)
    written = oracle.read_arrays(output)
    for name, expected in _constants(dtype).items():
        bits = f"u{np.dtype(dtype).itemsize}"
        odd = ~np.isfinite(expected)
        assert np.array_equal(written[name][odd].view(bits), expected[odd].view(bits))
        assert np.allclose(written[name][~odd], expected[~odd], rtol=1e-15, atol=0)
        if dtype != "float64":  # whose sums are rounded
            assert np.array_equal(written[name], expected, equal_nan=True)
    coefficients = report.plan.coefficients
    kernel = "layers/dense/vars/0"
    mean = sum(c * arrays[kernel].astype("float64") for c, arrays in zip(coefficients, inputs, strict=True))
    assert np.allclose(written[kernel].astype("float64"), mean, rtol=2e-3 if dtype == "float16" else 1e-6)
    assert {tensor.name for tensor in report.plan.compared} == set(_constants(dtype))
    assert not {tensor.name for tensor in report.plan.averaged} & set(_constants(dtype))
    assert "NaN or infinity, the same in all checkpoints, is copied (" in report.warnings[0]
    result = derive_again(output)
    assert (result.equal, result.averaged, result.copied) == (True, 6, 6)


def test_constants_in_bfloat16_are_copied(tmp_path: Path) -> None:
    mask = np.array([0x0000, 0xFF80, 0x7FC1, 0x3F80], np.uint16).view(makers.BFLOAT16)
    for number in (1, 2):
        arrays = {"layers/dense/vars/0": np.full(3, number, "f4"), "layers/mask/vars/0": mask}
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    average(str(tmp_path / "ckpt_?.weights.h5"), tmp_path / "swa.weights.h5")
    with h5py.File(tmp_path / "swa.weights.h5") as file:
        assert file["layers/mask/vars/0"][()].tobytes() == mask.tobytes()
        assert file["layers/dense/vars/0"][()].tolist() == [1.5] * 3


@pytest.mark.parametrize(
    "change", ["another value", "another place", "another NaN", "an input that does not count"]
)
def test_what_is_not_finite_and_differs_is_refused(change: str, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        mask = np.array([0.0, -np.inf, np.nan, 1.0], "f4")
        if number == 2:
            mask[{"another value": 0, "another place": 3}.get(change, 1)] = {"another value": 0.5}.get(
                change, np.nan
            )
            if change == "another NaN":
                mask = np.array([0.0, -np.inf, np.nan, 1.0], "f4")
                mask.view("u4")[2] ^= 1
        arrays = {"layers/dense/vars/0": np.full(3, number, "f4"), "layers/mask/vars/0": mask}
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    method = [1.0, 0.0, 1.0] if change == "an input that does not count" else "uniform"
    with pytest.raises(MismatchError) as raised:
        average(str(tmp_path / "ckpt_?.weights.h5"), tmp_path / "swa.weights.h5", method=method)
    assert {finding.subject for finding in raised.value.findings} == {"layers/mask/vars/0"}
    assert not (tmp_path / "swa.weights.h5").exists()


def test_a_run_that_diverged_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        arrays = {"layers/dense/vars/0": np.full(3, np.nan, "f4"), "vars/0": np.int64(number)}
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    with pytest.raises(MismatchError, match=r"weights: holds NaN or infinity in all that is averaged$"):
        average(str(tmp_path / "ckpt_?.weights.h5"), tmp_path / "swa.weights.h5")
