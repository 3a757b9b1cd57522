from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.errors import UnreadableError
from swa_avg.files.names import is_plain_name
from swa_avg.inputs.index import Entry, Index, index_as_json, read_index

GOOD = {
    "version": 1,
    "monitor": "val_loss",
    "mode": "min",
    "checkpoints": [
        {
            "file": "a.keras",
            "epoch": 1,
            "step": 10,
            "learning_rate": 0.1,
            "metrics": {"val_loss": 2},
            "time": "",
        }
    ],
}


def entry(epoch: int, loss: float = 0.0) -> Entry:
    return Entry(f"ckpt_{epoch}.keras", epoch, epoch * 10, 0.1, {"loss": loss})


def changed(**first: object) -> str:
    return json.dumps({**GOOD, "checkpoints": [{**GOOD["checkpoints"][0], **first}]})  # type: ignore[dict-item]


def test_importing_the_index_and_the_schedules_loads_nothing_heavy(run_python):
    code = "import sys, swa_avg.inputs.index, swa_avg.schedules; print({'keras', 'h5py', 'click'} & set(sys.modules))"
    assert run_python(code).stdout == "set()\n"


names = st.text(st.characters(codec="utf-8", categories=["L", "N"]), min_size=1, max_size=8)
numbers = st.floats(allow_nan=False)
entries = st.builds(
    Entry,
    names,
    st.integers(1, 2**53),
    st.none() | st.integers(0, 2**53),
    st.none() | numbers,
    st.dictionaries(names, numbers, max_size=3),
    st.just("2026-01-01T00:00:00+00:00"),
)


@given(st.lists(entries, unique_by=lambda e: e.file, max_size=5), st.sampled_from(["min", "max"]))
def test_what_is_written_is_read_back(tmp_path_factory, items, mode):
    path = tmp_path_factory.mktemp("index") / "checkpoints.json"
    ordered = tuple(sorted(items, key=lambda e: (e.epoch, -1 if e.step is None else e.step)))
    index = Index(ordered, "val_loss", mode)
    path.write_text(index_as_json(index), "utf-8")
    assert read_index(path) == index


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "version None"),
        ('{"version": 2, "checkpoints": []}', "version 2"),
        ('{"version": true, "checkpoints": []}', "version True"),
        ('{"version": 1}', "not a list"),
        ('{"version": 1, "checkpoints": [1]}', "checkpoint 1 is not an object"),
        ('{"version": 1, "version": 1, "checkpoints": []}', "a key appears twice"),
        ("[" * 100_000, "nested"),
        (changed(file="../a.keras"), "`file` is not the name"),
        (changed(file="/etc/passwd"), "`file` is not the name"),
        (changed(file="a\0b"), "`file` is not the name"),
        (changed(file="a\nb/c"), "`file` is not the name"),
        (changed(file=".."), "`file` is not the name"),
        (changed(file=3), "`file` is not the name"),
        (changed(epoch=0), "`epoch` is not a whole number"),
        (changed(epoch=True), "`epoch` is not a whole number"),
        (changed(epoch=1.5), "`epoch` is not a whole number"),
        (changed(epoch=10**30), "`epoch` is not a whole number"),
        (changed(step=-1), "`step` is not a whole number"),
        (changed(learning_rate="high"), "`learning_rate` is not a number"),
        (changed(metrics=[]), "`metrics` is not an object"),
        (changed(metrics={"loss": None}), "`metrics`: loss is not a number"),
        (changed(metrics={"loss": 10**390}), "`metrics`: loss is out of range"),
        (changed(time=5), "`time` is not a text"),
        (json.dumps({**GOOD, "mode": "up"}), "`mode` of min or max"),
        (json.dumps({**GOOD, "checkpoints": GOOD["checkpoints"] * 2}), "a file appears twice"),  # type: ignore[operator]
        ('{"version": 1, "checkpoints": [], "x": "' + "a" * (16 << 20) + '"}', "larger than 16 MiB"),
    ],
)
def test_a_malformed_index_is_refused_in_one_line(tmp_path, text, problem):
    path = tmp_path / "checkpoints.json"
    path.write_text(text)
    with pytest.raises(UnreadableError, match=r"checkpoints\.json") as caught:
        read_index(path)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_index_is_unreadable(tmp_path):
    with pytest.raises(UnreadableError, match="no such file"):
        read_index(tmp_path / "checkpoints.json")


def test_a_pipe_in_the_place_of_an_index_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "checkpoints.json")
    with pytest.raises(UnreadableError, match="not a regular file"):
        read_index(tmp_path / "checkpoints.json")


def test_names_that_lead_elsewhere_are_not_plain():
    assert is_plain_name("ckpt_0001.keras")
    assert not any(is_plain_name(name) for name in ("", ".", "..", "a/b", "/a", "a\0", "a\ud800"))


@pytest.mark.skipif(os.name == "nt", reason="these are names on other systems")
@pytest.mark.parametrize(
    "name", ["a:b", "a\\b", "C:a", "a\x1b", "a\n", "a\u200b", "\u202ea", "...", "a\udcff", " "]
)
def test_what_can_be_the_name_of_a_file_is_a_plain_name(name, tmp_path):
    (tmp_path / name).touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert is_plain_name(name)


@pytest.mark.parametrize(("mode", "expected"), [("min", [1, 3]), ("max", [2, 5])])
def test_best_ranks_in_the_direction_of_the_metric(mode, expected):
    losses = [0.1, 0.9, 0.2, math.nan, 0.9, 0.5]
    index = Index(tuple(entry(n, loss) for n, loss in enumerate(losses, 1)), "loss", mode)
    assert [e.epoch for e in index.best(2)] == expected


def test_the_newer_of_equals_is_best_and_a_missing_metric_is_worst():
    index = Index((entry(1, 0.5), entry(2, 0.5), Entry("c", 3), entry(4, math.nan)), "loss", "min")
    assert [e.epoch for e in index.best(1)] == [2]
    assert [e.epoch for e in index.best(2)] == [1, 2]


def test_a_file_stays_if_either_rule_keeps_it():
    index = Index(tuple(entry(n, loss) for n, loss in enumerate([0.1, 0.9, 0.8, 0.7], 1)), "loss", "min")
    assert [e.epoch for e in index.pruned(2, 1).entries] == [1, 3, 4]
    assert [e.epoch for e in index.pruned(2, None).entries] == [3, 4]
    assert [e.epoch for e in index.pruned(None, 2).entries] == [1, 4]
    assert index.pruned(None, None) is index
