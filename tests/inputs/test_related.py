"""Related or not: what is refused, what is accepted, and what is read to tell."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import makers
import oracle
import swa_avg as package
from conftest import Ended
from swa_avg.errors import MismatchError, SwaAvgWarning
from swa_avg.files.sources import LocalSource
from swa_avg.formats import open_checkpoint
from swa_avg.inputs.related import check_related, groups_of, similarities, similarity_threshold

Cli = Callable[..., Ended]
Rows = Sequence[np.ndarray]

KERNEL, BIAS = "layers/dense/vars/0", "layers/dense/vars/1"
SHAPE = (40, 40)


def _run(seed: int, count: int, step: float = 0.1) -> list[np.ndarray]:
    """Return the kernels of a random walk from a random start."""
    rng = np.random.default_rng(seed)
    return list(
        (rng.standard_normal(SHAPE) + step * rng.standard_normal((count, *SHAPE)).cumsum(axis=0)).astype("f4")
    )


def _write(folder: Path, kernels: Rows, suffix: str = ".keras", first: int = 1) -> list[Path]:
    write = {".keras": makers.write_archive, ".weights.h5": makers.write_weights}[suffix]
    return [
        write(folder / f"ckpt_{number}{suffix}", {KERNEL: kernel, BIAS: np.ones(40, "f4")})
        for number, kernel in enumerate(kernels, first)
    ]


def _relation(paths: Sequence[Path], **options: Any) -> Any:
    checkpoints = [open_checkpoint(path) for path in paths]
    try:
        tensors = sorted(checkpoints[-1].tensors.values(), key=lambda tensor: tensor.offset)
        return check_related(checkpoints, tensors, allow=options.pop("allow", True))
    finally:
        for checkpoint in checkpoints:
            checkpoint.close()


def _record(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        record: dict[str, Any] = json.loads(archive.read("metadata.json"))["swa_avg"]
    return record


TWO_RUNS = (
    "2 groups of checkpoints that are unrelated to each other, as if of 2 runs; their mean is meaningless: "
    "ckpt_1.keras, ckpt_2.keras, ckpt_3.keras; ckpt_4.keras, ckpt_5.keras"
)


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--json", "-q"), ("--no-verify",)], ids=str)
def test_two_runs_are_refused_by_name(
    options: tuple[str, ...], tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path(), [*_run(1, 3), *_run(2, 2)])
    ended = swa_avg("ckpt_*.keras", "-o", "swa.keras", *options)
    assert ended == Ended(
        4,
        "",
        f"swa-avg: error: ckpt_4.keras: kernels: {TWO_RUNS}; average each group by itself, or ensemble their "
        "predictions, as with folds and seeds; allow_unrelated averages all the same\n",
    )
    assert not Path("swa.keras").exists()


def test_allowed_they_are_averaged_with_a_warning_and_a_line_in_the_record(
    tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kernels = [*_run(1, 3), *_run(2, 2)]
    _write(Path(), kernels)
    ended = swa_avg("ckpt_*.keras", "-o", "swa.keras", "--allow-unrelated", "--json")
    assert ended.code == 0
    assert f"warning: {TWO_RUNS}\n" in ended.err
    relation = json.loads(ended.out)["relation"]
    assert relation["groups"] == [
        ["ckpt_1.keras", "ckpt_2.keras", "ckpt_3.keras"],
        ["ckpt_4.keras", "ckpt_5.keras"],
    ]
    assert (relation["related"], relation["threshold"]) == (False, 0.3)
    assert _record(Path("swa.keras"))["related"] is False
    np.testing.assert_array_equal(oracle.read_arrays(Path("swa.keras"))[KERNEL], oracle.mean(kernels))
    assert swa_avg("verify", "swa.keras").code == 0


def test_python_has_the_same_word(tmp_path: Path) -> None:
    paths = _write(tmp_path, [*_run(1, 1), *_run(2, 1)])
    with pytest.raises(MismatchError, match="2 groups of checkpoints that are unrelated"):
        package.average(paths, tmp_path / "swa.keras")
    with pytest.warns(SwaAvgWarning) as caught:
        report = package.average(paths, tmp_path / "swa.keras", allow_unrelated=True)
    assert any(str(warning.message).startswith("2 groups") for warning in caught)
    assert report.relation.related is False


def test_a_run_is_related_and_its_record_says_so(
    tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kernels = _run(1, 4)
    _write(Path(), kernels)
    ended = swa_avg("ckpt_*.keras", "-o", "swa.keras", "--json", "-v")
    relation = json.loads(ended.out)["relation"]
    flat = [kernel.ravel().astype(float) for kernel in kernels]
    cosines = np.array([[x @ y / np.sqrt((x @ x) * (y @ y)) for y in flat] for x in flat])
    least = (cosines - 2 * np.eye(4)).max(axis=1).min()
    assert relation["least_similarity"] == pytest.approx(least, abs=1e-4)
    assert relation["related"] is True
    assert f"all are related: similarity to the nearest {least:.3f} or more\n" in ended.err
    assert _record(Path("swa.keras"))["related"] is True
    assert swa_avg("verify", "swa.keras").code == 0


def test_what_does_not_count_may_be_unrelated(tmp_path: Path, swa_avg: Cli) -> None:
    _write(tmp_path, [*_run(1, 2), *_run(2, 1)])
    ended = swa_avg(tmp_path / "ckpt_*.keras", "--method", "weights:1,1,0", "-o", tmp_path / "swa.keras")
    assert ended.code == 0, ended.err
    one = swa_avg(tmp_path / "ckpt_*.keras", "--last", "1", "-o", tmp_path / "one.keras")
    assert one.code == 0, one.err
    assert "related" not in _record(tmp_path / "one.keras")


def test_an_early_checkpoint_is_related_through_those_between(tmp_path: Path) -> None:
    paths = _write(tmp_path, _run(1, 40, step=0.7))
    assert _relation([paths[0], paths[-1]]).related is False
    assert _relation(paths).related is True


@pytest.mark.parametrize(
    "kernels",
    [
        [np.zeros(SHAPE, "f4"), np.zeros(SHAPE, "f4")],
        [np.zeros(SHAPE, "f4"), *_run(1, 2)],
        [np.ones(SHAPE, "f4"), np.full(SHAPE, 3, "f4")],
        [_run(1, 1)[0], 50 * _run(1, 1)[0]],
        [np.full(SHAPE, 1e30, "f4"), np.full(SHAPE, -1e30, "f4")],
        [array[:, :20] for array in (*_run(1, 1), *_run(2, 1))],
        [array.ravel() for array in (*_run(1, 1), *_run(2, 1))],
    ],
    ids=["zeros", "zeros, then not", "constants", "scaled", "overflow", "few values", "no kernels"],
)
def test_where_nothing_tells_them_apart_nothing_is_refused(kernels: Rows, tmp_path: Path) -> None:
    assert _relation(_write(tmp_path, kernels), allow=False).related in (True, None)


def test_values_that_are_not_finite_do_not_hide_the_rest(tmp_path: Path) -> None:
    same, other = [*_run(1, 3)], [*_run(1, 2), *_run(2, 1)]
    for kernels in (same, other):
        for kernel in kernels:
            kernel[0, :5] = np.nan
        kernels[0][3, 3] = -np.inf
    assert _relation(_write(tmp_path, same)).related is True
    assert _relation(_write(tmp_path, other)).groups == ((0, 1), (2,))


def test_other_layouts_and_types_are_compared_by_name(tmp_path: Path) -> None:
    """The places are those of the values, wherever a file keeps them."""
    kernels = _run(1, 2)
    one = {KERNEL: kernels[0].astype("f8"), "layers/a/vars/0": kernels[0].astype("f2")}
    two = {
        "layers/a/vars/0": kernels[1].astype("f2"),
        "x/vars/0": np.ones(7, "f4"),
        KERNEL: kernels[1].astype("f8"),
    }
    paths = [
        makers.write_weights(tmp_path / "1.weights.h5", one),
        makers.write_weights(tmp_path / "2.weights.h5", two),
    ]
    checkpoints = [open_checkpoint(path) for path in paths]
    tensors = [checkpoints[0].tensors[name] for name in one]
    relation = check_related(checkpoints, tensors, allow=False)
    for checkpoint in checkpoints:
        checkpoint.close()
    x, y = (np.concatenate([k.astype(float).ravel(), k.astype("f2").astype(float).ravel()]) for k in kernels)
    assert relation.least == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-4)


def test_bfloat16_is_compared_by_its_values(tmp_path: Path) -> None:
    rows = [*_run(1, 2), *_run(2, 1)]
    stored = [oracle.nearest_bfloat16(row).view("V2").reshape(SHAPE) for row in rows]
    assert _relation(_write(tmp_path, stored, ".weights.h5")).groups == ((0, 1), (2,))


@pytest.mark.parametrize("count", [2, 30])
def test_a_bounded_sample_is_read_at_the_same_places_of_each(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((1200, 600)).astype("f4")
    kernels = [
        base + 0.1 * number * rng.standard_normal(base.shape).astype("f4") for number in range(count - 1)
    ]
    kernels.append(rng.standard_normal(base.shape).astype("f4"))
    paths = _write(tmp_path, kernels, ".weights.h5")
    checkpoints = [open_checkpoint(path) for path in paths]
    tensors = list(checkpoints[-1].tensors.values())
    read: dict[Any, list[tuple[int, int]]] = {}
    inner = LocalSource.read_into

    def counting(self: LocalSource, buffer: memoryview, position: int) -> None:
        read.setdefault(self.path, []).append((position, len(buffer)))
        inner(self, buffer, position)

    monkeypatch.setattr(LocalSource, "read_into", counting)
    relation = check_related(checkpoints, tensors, allow=True)
    for checkpoint in checkpoints:
        checkpoint.close()
    assert relation.groups == (tuple(range(count - 1)), (count - 1,)) if count > 2 else ((0,), (1,))
    assert set(read) == set(paths)
    assert len({tuple(sorted(places)) for places in read.values()}) == 1
    size = sum(length for _, length in read[paths[0]])
    assert 2**16 <= size <= 2**17
    assert size * count <= 2**22
    spread = np.diff(sorted(position for position, _ in read[paths[0]]))
    assert spread.max() < 1.1 * base.nbytes / 15


def test_similarity_is_the_cosine() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 30))
    rows[4] = 0.0
    expected = np.array(
        [[x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for y in rows[:4]] for x in rows[:4]]
    )
    found = similarities(rows @ rows.T)
    np.testing.assert_allclose(found[:4, :4], expected, rtol=1e-12)
    assert (found[4] == 1.0).all()


@pytest.mark.parametrize(("values", "threshold"), [(9, 0.6), (36, 0.5), (100, 0.3), (10**6, 0.3)])
def test_the_threshold_allows_for_chance_in_few_dimensions(values: int, threshold: float) -> None:
    assert similarity_threshold(values) == pytest.approx(threshold)


def test_groups_are_chains_the_largest_first() -> None:
    related = np.eye(6, dtype=bool)
    for one, other in ((0, 3), (1, 2), (2, 4)):
        related[one, other] = related[other, one] = True
    assert groups_of(related) == ((1, 2, 4), (0, 3), (5,))


# --- an average among its own inputs


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
@pytest.mark.parametrize("options", [(), ("--no-verify",), ("--dry-run",)], ids=str)
def test_an_average_among_its_own_inputs_ends_the_run(
    options: tuple[str, ...], suffix: str, tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path(), _run(1, 3), suffix)
    assert swa_avg(f"ckpt_1{suffix}", f"ckpt_2{suffix}", "-o", f"ckpt_9{suffix}").code == 0
    Path(f"ckpt_2{suffix}").rename(f"ckpt_5{suffix}")  # by what it holds, not by its name
    for command in ((), ("inspect",)):
        if command and options:
            continue
        ended = swa_avg(*command, f"ckpt_*{suffix}", *options, *(() if command else ("-o", f"swa{suffix}")))
        assert ended.code == 4
        assert ended.err.endswith(
            f"swa-avg: error: ckpt_9{suffix}: record: is an average of ckpt_1{suffix}, ckpt_5{suffix}, which "
            "would count twice; leave this average out\n"
        )
    assert not Path(f"swa{suffix}").exists()


def test_an_average_of_other_things_stays_a_warning(
    tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(Path(), _run(1, 4))
    assert swa_avg("ckpt_1.keras", "ckpt_2.keras", "-o", "ckpt_9.keras").code == 0
    ended = swa_avg("ckpt_3.keras", "ckpt_4.keras", "ckpt_9.keras", "-o", "swa.keras")
    assert ended.code == 0
    assert "warning: ckpt_9.keras is itself an average that swa-avg wrote\n" in ended.err


@pytest.mark.parametrize(
    "inputs",
    [None, 3, [], [3], [{}], [{"size": [], "crc32": [None], "coefficient": 1}], [{"crc32": 7}]],
    ids=str,
)
def test_a_record_that_says_nothing_of_inputs_is_a_warning_too(
    inputs: Any, tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, kernel in enumerate(_run(1, 2)):
        record = {"keras_version": "3.15.1", "swa_avg": {"inputs": inputs}} if number else {}
        metadata = {"metadata.json": json.dumps(record).encode()}
        makers.write_archive(Path(f"ckpt_{number}.keras"), {KERNEL: kernel}, **metadata)
    ended = swa_avg("ckpt_*.keras", "-o", "swa.keras")
    assert ended.code == 0, ended.err
    assert "warning: ckpt_1.keras is itself an average that swa-avg wrote\n" in ended.err
