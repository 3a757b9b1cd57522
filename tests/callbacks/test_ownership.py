"""What CheckpointSaver and SWA may delete and replace, whatever the index of their folder says."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import makers

pytest.importorskip("keras")

from swa_avg.callbacks import ownership
from swa_avg.callbacks.ownership import fingerprint, why_not_ours
from swa_avg.callbacks.run_folder import RunFolder, published
from swa_avg.errors import UnreadableError
from swa_avg.inputs.index import INDEX_NAME, Entry, read_index

pytestmark = pytest.mark.keras


def write(path: Path, seed: int) -> Path:
    make = makers.write_archive if path.suffix == ".keras" else makers.write_weights
    return make(path, makers.weights(seed))


def opened(path: Path, keep_last: int | None = None, keep_best: int | None = None) -> RunFolder:
    folder = RunFolder(path, keep_last, keep_best, by_step=False)
    folder.open()
    return folder


def save(folder: RunFolder, epoch: int, suffix: str = ".keras", **metrics: float) -> list[str]:
    """Save as CheckpointSaver does; return the warnings."""
    folder.first_epoch = folder.first_epoch or epoch - 1
    path, warnings = folder.place(f"ckpt_{epoch:04d}{suffix}")
    write(path, epoch)
    return warnings + folder.record(Entry(path.name, epoch, epoch, 0.1, metrics), "loss", "min")


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name != INDEX_NAME)


def epochs(path: Path) -> list[int]:
    return [entry.epoch for entry in read_index(path / INDEX_NAME).entries]


def forge(folder: Path, *entries: dict[str, object]) -> None:
    """Add lines to the index, as anyone can who can write to it."""
    value = json.loads((folder / INDEX_NAME).read_text())
    value["checkpoints"] = [
        *({"epoch": 1, "metrics": {}, **entry} for entry in entries),
        *value["checkpoints"],
    ]
    (folder / INDEX_NAME).write_text(json.dumps(value))


def forget_fingerprints(folder: Path) -> None:
    """Make the index one of a release that recorded none."""
    value = json.loads((folder / INDEX_NAME).read_text())
    del value["averages"]
    for entry in value["checkpoints"]:
        del entry["fingerprint"]
    (folder / INDEX_NAME).write_text(json.dumps(value))


FOREIGN = {
    "train.py": lambda path: path.write_text("model.fit()"),
    "notes.txt": lambda path: path.write_text("lr 0.1"),
    "data.npz": lambda path: np.savez(path, x=np.ones(3)),
    "notes.keras": lambda path: path.write_text("a text"),
    "empty.weights.h5": lambda path: path.touch(),
    "zip.keras": lambda path: shutil.make_archive(str(path), "zip", path.parent, INDEX_NAME),
    "mine.keras": lambda path: write(path, 77),
    "mine.weights.h5": lambda path: write(path, 78),
    "legacy.h5": lambda path: makers.write_legacy(path, {"d/d/kernel": np.ones(3, "f")}),
    "map.weights.json": lambda path: makers.write_sharded(path, makers.weights(79)),
}


class TestDeleting:
    @pytest.mark.parametrize("recorded", ["nothing", "another file's", "its own"])
    def test_what_the_index_names_is_deleted_only_as_a_checkpoint_of_known_content(self, tmp_path, recorded):
        save(opened(tmp_path), 5)
        for name, make in FOREIGN.items():
            make(tmp_path / name)
        if (tmp_path / "zip.keras.zip").exists():
            (tmp_path / "zip.keras.zip").rename(tmp_path / "zip.keras")
        there = set(names(tmp_path))
        told = {
            "nothing": lambda name: {},
            "another file's": lambda name: {"fingerprint": fingerprint(tmp_path / "ckpt_0005.keras")},
            "its own": lambda name: {"fingerprint": fingerprint(tmp_path / name)},
        }[recorded]
        forge(tmp_path, *({"file": name, "step": n, **told(name)} for n, name in enumerate(FOREIGN)))
        warnings = save(opened(tmp_path, keep_last=1), 6)
        # A forger who has read a checkpoint of someone else's can have that one deleted, and nothing else.
        gone = {"mine.keras", "mine.weights.h5"} if recorded == "its own" else set()
        assert set(names(tmp_path)) == there - gone - {"ckpt_0005.keras"} | {"ckpt_0006.keras"}
        assert epochs(tmp_path) == [6]
        assert all("left the index, but stayed on disk" in warning for warning in warnings)
        assert len(warnings) == {"nothing": 1, "another file's": 2, "its own": 2}[recorded]

    @pytest.mark.parametrize("key", ["checkpoints", "averages"])
    @pytest.mark.parametrize(
        "name", ["../mine.keras", "sub/mine.keras", "{folder}/mine.keras", "..", ".", ""]
    )
    def test_no_name_in_the_index_leads_out_of_the_folder(self, tmp_path, name, key):
        run = tmp_path / "run"
        save(opened(run), 5)
        (run / "sub").mkdir()
        outside = [write(folder / "mine.keras", 77) for folder in (tmp_path, run / "sub")]
        value = json.loads((run / INDEX_NAME).read_text())
        name, digest = name.format(folder=tmp_path), fingerprint(outside[0])
        if key == "averages":
            value[key] = {name: digest}
        else:
            value[key].insert(0, {"file": name, "epoch": 1, "metrics": {}, "fingerprint": digest})
        (run / INDEX_NAME).write_text(json.dumps(value))
        with pytest.raises(UnreadableError, match=r"checkpoints\.json"):
            opened(run, keep_last=1)
        assert all(path.exists() for path in outside)

    def test_links_cost_nothing_outside_of_the_folder(self, tmp_path):
        run = tmp_path / "run"
        save(opened(run), 5)
        mine = write(tmp_path / "mine.keras", 77)
        kept = mine.read_bytes()
        (run / "symbolic.keras").symlink_to(mine)
        (run / "hard.keras").hardlink_to(mine)
        (run / "folder.keras").symlink_to(tmp_path, target_is_directory=True)
        links = ("symbolic.keras", "hard.keras", "folder.keras", "CKPT_0005.KERAS")
        forge(run, *({"file": n, "step": k, "fingerprint": fingerprint(mine)} for k, n in enumerate(links)))
        warnings = save(opened(run, keep_last=1), 6)
        # The hard link is a file of the folder; the name outside keeps its content.
        assert names(run) == ["ckpt_0006.keras", "folder.keras", "symbolic.keras"]
        assert mine.read_bytes() == kept
        gone = (
            "CKPT_0005.KERAS is gone",
            "folder.keras is gone",
            "symbolic.keras left the index, but stayed",
        )
        assert len(warnings) == 3
        assert all(text in warning for text, warning in zip(gone, warnings, strict=True))

    @pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
    def test_a_file_that_changed_since_it_was_saved_stays(self, tmp_path, suffix):
        def edit(path: Path) -> None:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)

        def append(path: Path) -> None:
            with path.open("ab") as file:
                file.write(b"\0")

        def link(path: Path) -> None:
            path.rename(path.with_name("elsewhere"))
            path.symlink_to("elsewhere")

        changes = [edit, append, link, lambda path: write(path, 99), lambda path: path.write_text("{}")]
        folder = opened(tmp_path)
        for epoch in range(1, len(changes) + 2):
            save(folder, epoch, suffix)
        for epoch, change in enumerate(changes, 1):
            change(tmp_path / f"ckpt_{epoch:04d}{suffix}")
        expected = {name for name in names(tmp_path) if "0006" not in name}
        warnings = save(opened(tmp_path, keep_last=1), 7, suffix)
        assert set(names(tmp_path)) == expected | {f"ckpt_0007{suffix}"}
        assert (tmp_path / f"ckpt_0003{suffix}").is_symlink()
        assert len(warnings) == 2
        assert f"ckpt_0001{suffix}, ckpt_0002{suffix}, ckpt_0004{suffix} and " in warnings[0]
        assert "changed since it was saved" in warnings[0]

    def test_own_files_go_in_a_later_run_and_after_a_copy_of_the_folder(self, tmp_path):
        folder = opened(tmp_path / "a", keep_last=2)
        for epoch in (1, 2, 3):
            assert save(folder, epoch) == []
        assert names(tmp_path / "a") == ["ckpt_0002.keras", "ckpt_0003.keras"]
        assert save(opened(tmp_path / "a", keep_last=2), 4) == []
        shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
        folder = opened(tmp_path / "b", keep_last=1)
        assert save(folder, 5) == []
        assert names(tmp_path / "b") == ["ckpt_0005.keras"]

    def test_files_of_an_index_without_fingerprints_stay_and_that_is_said_once(self, tmp_path):
        folder = opened(tmp_path)
        for epoch in (1, 2, 3):
            save(folder, epoch)
        forget_fingerprints(tmp_path)
        assert epochs(tmp_path) == [1, 2, 3]
        folder = opened(tmp_path, keep_last=1)
        (warning,) = save(folder, 4)
        assert (
            "ckpt_0001.keras, ckpt_0002.keras, ckpt_0003.keras left the index, but stayed on disk" in warning
        )
        assert "has no fingerprint" in warning
        assert save(folder, 5) == []
        assert names(tmp_path) == [f"ckpt_000{n}.keras" for n in (1, 2, 3, 5)]
        assert epochs(tmp_path) == [5]

    def test_forgetting_spares_what_is_not_ours(self, tmp_path):
        folder = opened(tmp_path)
        save(folder, 1)
        save(folder, 2)
        write(tmp_path / "ckpt_0001.keras", 50)
        (warning,) = folder.forget(folder.entries())
        assert "ckpt_0001.keras left the index, but stayed on disk" in warning
        assert names(tmp_path) == ["ckpt_0001.keras"]
        assert epochs(tmp_path) == []

    def test_an_index_that_names_later_epochs_does_not_cost_a_new_checkpoint(self, tmp_path):
        longer = opened(tmp_path)
        for epoch in (8, 9):
            save(longer, epoch)
        (tmp_path / "train.py").touch()
        forge(tmp_path, {"file": "train.py", "epoch": 1000})
        folder = opened(tmp_path, keep_last=2)
        for epoch in (1, 2, 3):
            assert save(folder, epoch) == []
        assert epochs(tmp_path) == [2, 3, 8, 9, 1000]
        assert names(tmp_path) == [*(f"ckpt_000{n}.keras" for n in (2, 3, 8, 9)), "train.py"]


class TestReplacing:
    def test_a_name_that_is_taken_by_another_file_is_left_to_it(self, tmp_path):
        for name in ("ckpt_0001.keras", "ckpt_0002.keras", "ckpt_0002-again.keras"):
            (tmp_path / name).write_text(name)
        (tmp_path / "ckpt_0003.keras").symlink_to("nowhere")
        (tmp_path / "ckpt_0004.keras").mkdir()
        folder = opened(tmp_path)
        (warning,) = save(folder, 1)
        assert "ckpt_0001.keras is not replaced" in warning
        assert warning.endswith("saved as ckpt_0001-again.keras")
        assert [save(folder, epoch) for epoch in (2, 3, 4, 5)] == [[]] * 4  # said once
        assert [entry.file for entry in read_index(tmp_path / INDEX_NAME).entries] == [
            "ckpt_0001-again.keras",
            "ckpt_0002-again2.keras",
            "ckpt_0003-again.keras",
            "ckpt_0004-again.keras",
            "ckpt_0005.keras",
        ]
        assert (tmp_path / "ckpt_0002.keras").read_text() == "ckpt_0002.keras"
        assert (tmp_path / "ckpt_0003.keras").is_symlink()

    def test_trained_again_the_other_name_is_ours_to_replace(self, tmp_path):
        (tmp_path / "ckpt_0001.weights.h5").write_text("mine")
        save(opened(tmp_path), 1, ".weights.h5")
        save(opened(tmp_path), 1, ".weights.h5")
        assert names(tmp_path) == ["ckpt_0001-again.weights.h5", "ckpt_0001.weights.h5"]
        assert (tmp_path / "ckpt_0001.weights.h5").read_text() == "mine"

    def test_own_files_are_replaced_without_a_word(self, tmp_path):
        save(opened(tmp_path), 1)
        assert save(opened(tmp_path), 1) == []
        assert names(tmp_path) == ["ckpt_0001.keras"]

    def test_a_checkpoint_of_someone_elses_in_a_place_of_ours_is_not_replaced(self, tmp_path):
        save(opened(tmp_path), 1)
        write(tmp_path / "ckpt_0001.keras", 50)
        kept = (tmp_path / "ckpt_0001.keras").read_bytes()
        (warning,) = save(opened(tmp_path), 1)
        assert "has changed since it was saved" in warning
        assert (tmp_path / "ckpt_0001.keras").read_bytes() == kept
        assert [entry.file for entry in read_index(tmp_path / INDEX_NAME).entries] == [
            "ckpt_0001-again.keras"
        ]

    def test_what_is_replaced_under_a_hard_link_keeps_its_content_elsewhere(self, tmp_path):
        run = tmp_path / "run"
        save(opened(run), 1)
        (tmp_path / "kept.keras").hardlink_to(run / "ckpt_0001.keras")
        kept = (tmp_path / "kept.keras").read_bytes()
        folder = opened(run)
        path, _ = folder.place("ckpt_0001.keras")
        with published(path) as temporary:
            write(temporary, 9)
        assert (tmp_path / "kept.keras").read_bytes() == kept != path.read_bytes()

    def test_an_average_is_ours_once_it_is_recorded(self, tmp_path):
        folder = opened(tmp_path)
        write(tmp_path / "swa.keras", 1)
        assert "no fingerprint" in folder.why_taken("swa.keras")
        folder.record_average(tmp_path / "swa.keras")
        save(folder, 1)
        assert opened(tmp_path).why_taken("swa.keras") is None
        write(tmp_path / "swa.keras", 2)
        assert "changed" in opened(tmp_path).why_taken("swa.keras")


class TestFingerprints:
    @pytest.mark.parametrize("size", [0, 1, 2**16, 2**22, 2**22 + 1, 2**23 + 12345])
    def test_size_and_either_end_count(self, tmp_path, size):
        data = np.random.default_rng(size).bytes(size)
        path = tmp_path / "a"
        path.write_bytes(data)
        found = fingerprint(path)
        others = [data + b"\0", data[:-1]] if data else [b"\0"]
        others += [bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 1])] if data else []
        for other in others:
            path.write_bytes(other)
            assert fingerprint(path) != found
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        assert fingerprint(path) == found

    def test_of_a_large_file_every_mebibyte_counts_and_four_are_read(self, tmp_path, monkeypatch):
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(2**30)
        found, read = fingerprint(path), 0
        for place in range(0, 2**30, 2**24):  # as a checkpoint of another training differs: all over
            with path.open("r+b") as file:
                file.seek(place)
                file.write(b"\1" * 2**16)
        assert fingerprint(path) != found
        whole = ownership.Region.read

        def counting(self, position, size):
            nonlocal read
            read += size
            return whole(self, position, size)

        monkeypatch.setattr(ownership.Region, "read", counting)
        fingerprint(path)
        assert read == 2**22

    def test_links_and_pipes_are_refused_at_once(self, tmp_path):
        write(tmp_path / "a.keras", 1)
        (tmp_path / "b.keras").symlink_to("a.keras")
        os.mkfifo(tmp_path / "c.keras")
        for name in ("b.keras", "c.keras", "gone.keras"):
            with pytest.raises(UnreadableError, match=name):
                fingerprint(tmp_path / name)
            assert why_not_ours(tmp_path / name, "0" * 32) == "it is not a readable checkpoint"
