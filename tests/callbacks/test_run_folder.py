"""The folder of a training run, which `swa_avg.callbacks` keeps: importing that imports Keras."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("keras")

import makers
from swa_avg.callbacks.run_folder import RunFolder, published, write_index
from swa_avg.errors import SystemRefusalError
from swa_avg.inputs.index import Entry, Index, read_index

pytestmark = pytest.mark.keras


def entry(epoch: int, loss: float = 0.0) -> Entry:
    return Entry(f"ckpt_{epoch}.keras", epoch, epoch * 10, 0.1, {"loss": loss})


def test_nan_survives_as_valid_json(tmp_path):
    path = tmp_path / "checkpoints.json"
    write_index(path, Index((entry(1, math.nan),)))
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert math.isnan(read_index(path).entries[0].metrics["loss"])


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
