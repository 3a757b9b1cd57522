from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import makers
from swa_avg.callbacks.run_folder import RunFolder, published, write_index
from swa_avg.errors import SystemRefusalError, UnreadableError
from swa_avg.inputs.index import Entry, Index, is_plain_name, read_index

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
    write_index(path, index)
    assert read_index(path) == index
    assert [p.name for p in path.parent.iterdir()] == ["checkpoints.json"]


def test_nan_survives_as_valid_json(tmp_path):
    path = tmp_path / "checkpoints.json"
    write_index(path, Index((entry(1, math.nan),)))
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(read_index(path).entries[0].metrics["loss"])


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
        ('{"version": 1, "version": 1, "checkpoints": []}', "a key stands twice"),
        ("[" * 100_000, "nested"),
        (changed(file="../a.keras"), "`file` is not the name"),
        (changed(file="/etc/passwd"), "`file` is not the name"),
        (changed(file="a\\b"), "`file` is not the name"),
        (changed(file="a\nb"), "`file` is not the name"),
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
        (json.dumps({**GOOD, "checkpoints": GOOD["checkpoints"] * 2}), "a file stands twice"),  # type: ignore[operator]
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
    assert not any(is_plain_name(name) for name in ("", ".", "..", "a/b", "a\\b", "c:a", "a\0", "a\x1b"))


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


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.keras"
    path.write_text("good")

    def write() -> None:
        with published(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(SystemRefusalError, match="cannot write: No space left on device"):
        write()
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["a.keras"]


def test_a_full_disk_behind_another_error_is_named(tmp_path):
    def write() -> None:
        with published(tmp_path / "a.keras"):
            try:
                raise OSError(28, "No space left on device")
            finally:
                raise ValueError("cannot close")

    with pytest.raises(SystemRefusalError, match="No space left"):
        write()


def test_temporaries_keep_the_suffix_and_hide(tmp_path):
    with published(tmp_path / "a.weights.h5") as temporary:
        assert temporary.name.startswith(".")
        assert temporary.name.endswith("-a.weights.h5")
        temporary.touch()


@pytest.mark.skipif(os.name != "posix", reason="asks for a process by its number")
def test_only_the_temporaries_of_dead_runs_are_removed(tmp_path):
    code = (
        "from pathlib import Path; from swa_avg.callbacks.run_folder import published; import os\n"
        "with published(Path('a.keras')) as t: t.touch(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    (dead,) = tmp_path.iterdir()
    (tmp_path / ".tmp-elsewhere-1-00-b.keras").touch()
    with published(tmp_path / "alive.keras") as alive:
        alive.touch()
        RunFolder(tmp_path, None, None, by_step=False).open()
        assert alive.exists()
    assert not dead.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-elsewhere-1-00-b.keras", "alive.keras"]


def save(folder: RunFolder, item: Entry) -> list[str]:
    makers.write_weights(folder.path / item.file, makers.weights(item.epoch))
    return folder.record(item, None, None)


def test_two_runs_in_one_folder_are_reported_and_lose_nothing(tmp_path):
    ours, theirs = (RunFolder(tmp_path, None, None, by_step=False) for _ in range(2))
    assert ours.open() == theirs.open() == []
    assert save(ours, entry(1)) == []
    (warning,) = save(theirs, Entry("other.keras", 2))
    assert "another run" in warning
    assert [e.file for e in read_index(tmp_path / "checkpoints.json").entries] == [
        "ckpt_1.keras",
        "other.keras",
    ]


def test_an_entry_whose_file_is_gone_is_dropped_with_a_warning(tmp_path):
    folder = RunFolder(tmp_path, None, None, by_step=False)
    folder.open()
    save(folder, entry(1))
    save(folder, entry(2))
    (tmp_path / "ckpt_1.keras").unlink()
    (warning,) = RunFolder(tmp_path, None, None, by_step=False).open()
    assert warning.endswith("ckpt_1.keras is gone; it leaves the index")
    (warning,) = save(folder, entry(3))
    assert [e.epoch for e in read_index(tmp_path / "checkpoints.json").entries] == [2, 3]


def test_checkpoints_of_epochs_trained_again_leave_the_index(tmp_path):
    first = RunFolder(tmp_path, None, None, by_step=False)
    first.open()
    for epoch in range(1, 5):
        save(first, entry(epoch))
    second = RunFolder(tmp_path, None, None, by_step=False)
    second.open()
    second.first_epoch = 1
    (warning,) = save(second, Entry("again_3.keras", 3, 30))
    assert "ckpt_2.keras" in warning
    assert [e.file for e in read_index(tmp_path / "checkpoints.json").entries] == [
        "ckpt_1.keras",
        "again_3.keras",
        "ckpt_4.keras",
    ]
    assert not (tmp_path / "ckpt_3.keras").exists()
    assert (tmp_path / "ckpt_2.keras").exists()


def test_deleting_waits_for_the_index(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, 1, None, by_step=False)
    folder.open()
    save(folder, entry(1))
    monkeypatch.setattr(
        "swa_avg.callbacks.run_folder.write_index", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        save(folder, entry(2))
    assert (tmp_path / "ckpt_1.keras").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "run"
    path.touch()
    with pytest.raises(SystemRefusalError, match="cannot write into this folder"):
        RunFolder(Path(path), None, None, by_step=False).open()
