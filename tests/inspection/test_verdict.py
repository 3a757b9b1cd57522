"""What the page says first: what these are, whether they belong together, and what to type next."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import makers
from swa_avg import inspect_checkpoints
from swa_avg.inspection.verdict import verdict


def _run(seed: int, count: int, *, batchnorm: bool = False) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    start, step = rng.standard_normal((2, 40, 40))
    more = {f"layers/batch_normalization/vars/{n}": np.ones(4, "f4") for n in range(4 if batchnorm else 0)}
    return [{"layers/dense/vars/0": (start + 0.1 * n * step).astype("f4")} | more for n in range(count)]


def _write(runs: list[dict[str, np.ndarray]]) -> None:
    for number, arrays in enumerate(runs, 1):
        makers.write_weights(Path(f"ckpt_{number:02}.weights.h5"), arrays)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_belongs_together_and_is_averaged_and_scored_next() -> None:
    _write(_run(1, 6, batchnorm=True))
    sentences, commands = verdict(inspect_checkpoints("*.h5", method="ema:0.5"))
    assert sentences == [
        "6 checkpoints, of epochs 1 to 6: Keras weights, 1,616 parameters.",
        "They belong together: their weights are related, as those of one run are.",
        "Will an average help? Their steps turn by 0° on average, 100 % of the scatter lies in one direction, and "
        "the later steps are 1.00 times as long as the earlier: the mean beat the last in 78 % of the recorded "
        "series whose steps do not shrink.",
        "The model has BatchNorm: refresh its statistics on training data, or it may fail.",
        "Whether it does help, validation data tell: the second command scores it.",
    ]
    assert commands == [
        "swa-avg CHECKPOINTS --method ema:0.5 -o swa.weights.h5 --bn-refresh DATA",
        "swa-avg sweep CHECKPOINTS --val VALIDATION -o best.weights.h5 --bn-refresh DATA",
    ]


def test_few_are_named() -> None:
    _write(_run(1, 2))
    sentences, commands = verdict(inspect_checkpoints("*.h5"))
    assert sentences[2] == "Will an average help? From so few, their steps do not tell: score it."
    names = "ckpt_01.weights.h5 ckpt_02.weights.h5"
    assert commands == [
        f"swa-avg {names} -o swa.weights.h5",
        f"swa-avg sweep {names} --val VALIDATION -o best.weights.h5",
    ]


def test_runs_apart_are_averaged_one_by_one() -> None:
    _write([*_run(1, 2), *_run(2, 3)])
    sentences, commands = verdict(inspect_checkpoints("*.h5"))
    assert sentences[1:] == [
        "They do not belong together: they are of 2 groups that are unrelated, as if of 2 runs. An average of all is "
        "meaningless; average a group by itself."
    ]
    names = " ".join(f"ckpt_{number:02}.weights.h5" for number in (3, 4, 5))
    assert commands == [f"swa-avg {names} -o swa.weights.h5"]


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            [{"a/vars/0": np.ones((2, 2), "f4")}],
            "Of one checkpoint there is nothing to average: name several of its run.",
        ),
        (
            [{"a/vars/0": np.ones((2, 2), "f4")}, {"a/vars/0": np.ones((3, 2), "f4")}],
            "They cannot be averaged: what does not fit is listed below.",
        ),
        (
            [{"a/vars/0": np.full((2, 2), 1e200)}, {"a/vars/0": np.full((2, 2), -1e200)}],
            "They fit together; how far apart they lie cannot be measured.",
        ),
    ],
    ids=["one", "unfit", "overflow"],
)
def test_where_there_is_nothing_to_type_it_says_why(
    arrays: list[dict[str, np.ndarray]], sentence: str
) -> None:
    _write(arrays)
    sentences, commands = verdict(inspect_checkpoints("*.h5"))
    assert (sentences[1:], commands) == ([sentence], [])


def test_the_page_begins_with_it() -> None:
    pytest.importorskip("matplotlib")
    _write(_run(1, 2))
    inspect_checkpoints("*.h5", report="run.html")
    page = Path("run.html").read_text()
    first = page.index("<h2>Verdict</h2>")
    assert (
        first
        < page.index("They belong together")
        < page.index("<pre><code>swa-avg ")
        < page.index("<h2>At a glance</h2>")
    )
