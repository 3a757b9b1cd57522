"""How checkpoints follow each other: against trajectories whose angles and steps are known beforehand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import makers
from conftest import Ended
from swa_avg.inspection.movement import LEVEL, movement_of, pace

Cli = Callable[..., Ended]

BY_HEART = [0.1817, 0.1696, 0.1586, 0.1491, 0.14, 0.1325, 0.1258, 0.1196, 0.1144]
"""Steps of a run that had learnt its data by heart and crept on, at turns of 15 degrees."""
ROUND = [4.44, 3.41, 3.3, 3.85, 4.27, 3.66, 3.92, 3.5, 3.8]
"""Steps of a run that goes round a place, at turns of 100 degrees."""
LEVEL_TEXT = "the mean beat the last in 78 % of the recorded series whose steps do not shrink"
SHRINKING_TEXT = (
    "the mean beat the last in only 34 % of the recorded series whose steps shrink; average fewer, or start with a "
    "higher constant rate"
)


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
def test_turns_and_share_are_those_of_the_trajectory(kind: str, turn: float, share: float) -> None:
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
    assert str(movement) == (
        f"steps turn by {movement.turn:.0f}° on average, {100 * movement.share:.0f} % of the scatter lies in one "
        f"direction, and the later steps are {movement.pace:.2f} times as long as the earlier: {LEVEL_TEXT}"
    )


def test_the_pace_is_that_of_the_later_half_of_the_steps_relative_to_the_earlier() -> None:
    assert pace(np.array([3.0, 5.0, 1.0, 3.0])) == 0.5
    assert pace(np.array([3.0, 5.0, 100.0, 1.0, 3.0])) == 0.5


@pytest.mark.parametrize(
    ("steps", "turn", "text"),
    [
        (ROUND, 100, f" are 0.99 times as long as the earlier: {LEVEL_TEXT}"),
        (BY_HEART, 15, f" are 0.75 times as long as the earlier: {SHRINKING_TEXT}"),
        ([1.0, 1.0, LEVEL], 90, f" are 0.80 times as long as the earlier: {LEVEL_TEXT}"),
    ],
)
def test_a_run_that_goes_round_is_told_from_one_that_comes_to_rest(
    steps: list[float], turn: float, text: str
) -> None:
    headings = np.radians(turn * np.arange(len(steps)))
    moves = np.array(steps)[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    movement = movement_of(
        _squared(np.vstack([np.zeros(2), moves.cumsum(axis=0)])), [None] * (len(steps) + 1)
    )
    assert movement is not None
    assert movement.turn == pytest.approx(turn)
    assert str(movement).endswith(text)


@pytest.mark.parametrize(
    ("rates", "text"),
    [
        ((0.1, 0.1), " as long as the earlier, at a learning rate of 0.1: "),
        ((0.1, 0.001), " as long as the earlier, at a learning rate of 0.1 to 0.001: "),
        ((None, 0.1), " as long as the earlier: "),
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
    assert f" times as long as the earlier: {LEVEL_TEXT}\n" in ended.err
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
