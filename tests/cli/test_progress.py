"""Off a terminal a line every half minute says how far a command is. The clock is a fake: nothing sleeps."""

from __future__ import annotations

import queue
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import makers
from conftest import Ended
from swa_avg.cli import progress
from swa_avg.cli.progress import Stage, progress_of

Cli = Callable[..., Ended]


class Clock:
    """Takes the place of the event that ends the lines; each tick is half a minute."""

    def __init__(self) -> None:
        self._passed: queue.Queue[bool] = queue.Queue()
        self._waiting = threading.Semaphore(0)

    def wait(self, seconds: float) -> bool:
        assert seconds == 30
        self._waiting.release()
        return self._passed.get()

    def set(self) -> None:
        self._passed.put(True)

    def tick(self, times: int = 1) -> None:
        """Let half minutes pass, and return once all that is said of them has been said."""
        for _ in range(times):
            self._waiting.acquire()
            self._passed.put(False)
        self._waiting.acquire()
        self._waiting.release()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        progress, "threading", types.SimpleNamespace(Event=lambda: clock, Thread=threading.Thread)
    )
    return clock


def test_the_first_stage_that_is_not_complete_is_told(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_of(False, Stage("averaging", "bytes"), Stage("refreshing")) as (read, rows):
        assert read is not None
        assert rows is not None
        clock.tick()
        read(4096, 1024)
        clock.tick()
        read(4096, 3072)
        clock.tick(2)
        rows(None, 128)
        clock.tick()
        rows(256, 64)
        clock.tick()
        rows(256, 64)
        clock.tick(114)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:7] == [
        "averaging: 0 B so far, after 30 s",
        "averaging: 1.0 KiB of 4.0 KiB, after 1 min",
        "refreshing: 0 rows so far, after 1 min 30 s",
        "refreshing: 0 rows so far, after 2 min",
        "refreshing: 128 rows so far, after 2 min 30 s",
        "refreshing: 192 of 256 rows, after 3 min",
        "refreshing: 256 of 256 rows, after 3 min 30 s",
    ]
    assert lines[-1] == "refreshing: 256 of 256 rows, after 60 min"
    assert len(lines) == 120


def test_quiet_says_nothing_and_no_thread_is_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_of(True, Stage("averaging", "bytes"), Stage("refreshing")) as steps:
        assert steps == (None, None)
    with pytest.raises(KeyError), progress_of(False, Stage("averaging", "bytes")):
        raise KeyError
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [(), ("inspect",), ("verify",)], ids=str)
def test_commands_that_only_read_say_how_far_they_are(
    command: tuple[str, ...], clock: Clock, tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        makers.write_archive(tmp_path / f"ckpt_{number}.keras", makers.weights(number))
    target = tmp_path / "swa.keras"
    arguments = [tmp_path / "ckpt_*.keras", *(["-o", target, "--overwrite"] if not command else [])]
    if command == ("verify",):
        assert swa_avg(*arguments, "-o", target, "-q").code == 0
        arguments = [target]
    advance = Stage.advance

    def slow(stage: Stage, total: int | None, count: int) -> None:
        advance(stage, total, count)
        clock.tick()

    monkeypatch.setattr(Stage, "advance", slow)
    ended = swa_avg(*command, *arguments)
    assert ended.code == 0
    title = {(): "averaging", ("inspect",): "inspecting", ("verify",): "comparing"}[command]
    assert re.match(rf"{title}: [0-9.]+ (Ki)?B of [0-9.]+ (Ki)?B, after 30 s\n", ended.err)
    assert "after" not in swa_avg(*command, *arguments, "-q").err


def _feed(monkeypatch: pytest.MonkeyPatch, clock: Clock, data: Callable[[], Iterator[Any]]) -> str:
    """Return the name of a function whose batches take half a minute each."""

    def slow() -> Iterator[Any]:
        for batch in data():
            clock.tick()
            yield batch

    monkeypatch.setitem(sys.modules, "slow_feed", types.SimpleNamespace(batches=slow))
    return "slow_feed:batches"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    keras = pytest.importorskip("keras")
    x = np.random.default_rng(0).normal(size=(32, 3)).astype("f4")
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    for number in (1, 2):
        model.fit(x, x[:, :1], verbose=0)
        model.save(tmp_path / f"ckpt_{number}.keras")
    return tmp_path


def _endless() -> Iterator[Any]:
    rng = np.random.default_rng(0)
    while True:
        x = rng.normal(size=(8, 3)).astype("f4")
        yield x, x[:, :1]


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_refresh_on_data_that_do_not_end_says_how_many_rows_there_were(
    run: Path, clock: Clock, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = _feed(monkeypatch, clock, _endless)
    options = ["--bn-refresh", feed, "--bn-samples", "24"]
    ended = swa_avg(run / "ckpt_*.keras", "-o", run / "swa.keras", *options)
    assert ended.code == 0, ended.err
    assert [line for line in ended.err.splitlines() if " after " in line] == [
        "refreshing: 0 rows so far, after 30 s",
        "refreshing: 0 rows so far, after 1 min",  # a batch is counted while the next one runs
        "refreshing: 8 of 24 rows, after 1 min 30 s",
    ]


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_sweep_says_how_many_candidates_are_scored(
    run: Path, clock: Clock, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = _feed(monkeypatch, clock, lambda: iter([next(_endless())]))
    ended = swa_avg(
        "sweep", run / "ckpt_*.keras", "--val", feed, "-o", run / "best.keras", "--candidates", "uniform"
    )
    assert ended.code == 0, ended.err
    told = [line for line in ended.err.splitlines() if " after " in line]
    assert told == [
        "scoring: 0 candidates so far, after 30 s",
        "scoring: 1 of 3 candidates, after 1 min",
        "scoring: 2 of 3 candidates, after 1 min 30 s",
    ]
