"""Whether checkpoints circle or still move: against trajectories whose angles are known beforehand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import makers
from conftest import Ended
from swa_avg.inspection.advice import HELPED
from swa_avg.inspection.movement import movement_of

Cli = Callable[..., Ended]


def _squared(rows: np.ndarray) -> np.ndarray:
    return np.square(rows[:, None] - rows).sum(axis=2)


def _rows(kind: str, count: int = 12, size: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((count, size))
    return {
        "line": np.arange(count)[:, None] * rng.standard_normal(size) + 0.1 * noise,
        "walk": noise.cumsum(axis=0),
        "scatter": noise,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "turn", "share"), [("line", 13, 0.99), ("walk", 90, 0.65), ("scatter", 120, 1 / 11)]
)
def test_turns_and_share_tell_three_cases_apart(kind: str, turn: float, share: float) -> None:
    rows = _rows(kind)
    movement = movement_of(_squared(rows), [None] * len(rows))
    assert movement is not None
    steps = np.diff(rows, axis=0)
    angles = [
        np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
        for a, b in itertools.pairwise(steps)
    ]
    assert movement.turn == pytest.approx(np.mean(angles), abs=1e-6)
    assert movement.turn == pytest.approx(turn, abs=3)
    values = np.square(np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False))
    assert movement.share == pytest.approx(values[0] / values.sum(), rel=1e-6)
    assert movement.share == pytest.approx(share, abs=0.06)
    lengths = np.linalg.norm(steps, axis=1)
    assert movement.pace == pytest.approx(lengths[6:].mean() / lengths[:5].mean(), rel=1e-6)
    percent = f"{100 * movement.share:.0f} %"
    assert str(movement) == (
        f"steps turn by {movement.turn:.0f}° on average, and {percent} of the scatter lies in one direction: "
        f"they do not shrink (the later half is {movement.pace:.2f} times as long as the earlier), and the mean beat the "
        f"last in {HELPED[0]} % of such series"
    )


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ((0.1, 0.1), " in one direction, at a learning rate of 0.1: "),
        ((0.1, 0.001), " in one direction, at a learning rate of 0.1 to 0.001: "),
        ((None, 0.1), " in one direction: "),
    ],
)
def test_learning_rates_are_told_where_they_are_known(rates: tuple[float | None, float], text: str) -> None:
    rows = _rows("walk", 5)
    movement = movement_of(_squared(rows), [rates[0], None, None, None, rates[1]])
    assert text in str(movement)


@pytest.mark.parametrize("rows", [_rows("walk", 3), np.ones((8, 5))], ids=["few", "equal"])
def test_of_too_few_and_of_equal_checkpoints_nothing_is_said(rows: np.ndarray) -> None:
    assert movement_of(_squared(rows), [None] * len(rows)) is None


def test_inspect_says_it_of_a_run_and_not_of_two(
    tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = np.random.default_rng(1).standard_normal((2, 40, 100))
    steps = _rows("line", 6).reshape(6, 40, 100)
    for number, step in enumerate(steps):
        kernel = (start[0] + 0.01 * step).astype("f4")
        makers.write_archive(Path(f"ckpt_{number}.keras"), {"layers/dense/vars/0": kernel})
    ended = swa_avg("inspect", "ckpt_*.keras", "--json")
    assert " of the scatter lies in one direction: they do not shrink (" in ended.err
    movement = json.loads(ended.out)["movement"]
    assert movement["turn"] < 15
    assert movement["share"] > 0.98
    assert movement["text"] in ended.err
    for number, step in enumerate(steps, 6):
        kernel = (start[1] + 0.01 * step).astype("f4")
        makers.write_archive(Path(f"ckpt_{number}.keras"), {"layers/dense/vars/0": kernel})
    ended = swa_avg("inspect", "ckpt_*.keras", "--json")
    assert json.loads(ended.out)["movement"] is None
    assert "steps turn by" not in ended.err
