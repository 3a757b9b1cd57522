from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.inputs.selection import epoch_number, expand, natural_key, parse_epochs, select


def test_order_is_natural() -> None:
    names = ["ckpt_10.keras", "ckpt_2.keras", "ckpt_1.keras", "b/x.h5", "a/x.h5", "ckpt_02b.keras"]
    assert [str(p) for p in sorted(map(Path, names), key=natural_key)] == [
        "a/x.h5", "b/x.h5", "ckpt_1.keras", "ckpt_2.keras", "ckpt_02b.keras", "ckpt_10.keras",
    ]  # fmt: skip


def test_the_order_is_the_same_however_the_names_are_given(tmp_path: Path) -> None:
    paths = [tmp_path / "ckpt_01.keras", tmp_path / "ckpt_1.keras"]
    for path in paths:
        path.touch()
    assert expand(paths) == expand(paths[::-1]) == paths


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("ckpt_0010.keras", 10),
        ("weights.05-0.32.hdf5", 5),
        ("w.07-0.32.weights.h5", 7),
        ("resnet50_ckpt_140.weights.json", 140),
        ("epoch12.h5", 12),
        ("best.keras", None),
        ("model-0.91.keras", None),
    ],
)
def test_the_epoch_is_the_last_whole_number(name: str, number: int | None) -> None:
    assert epoch_number(Path(name)) == number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("3:5", [3, 4, 5]), ("1:9:4", [1, 5, 9]), (":2", [0, 1, 2]), ("7", [7]), ("5:4", [])],
)
def test_epoch_ranges_include_both_ends(text: str, numbers: list[int]) -> None:
    assert list(parse_epochs(text)) == numbers


@pytest.mark.parametrize("text", ["", "a", "1:2:0", "1-2", "1:2:3:4", "-1:3"])
def test_other_epoch_ranges_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        list(parse_epochs(text)) if text else parse_epochs("x")


def test_open_ended_epochs_reach_the_newest(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt_{number}.keras" for number in range(1, 6)]
    for path in paths:
        path.touch()
    assert select(paths, epochs="4:") == paths[3:]


def test_epochs_that_there_are_not_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt_{number}.keras" for number in range(0, 60, 10)]
    for path in paths:
        path.touch()
    with pytest.raises(UsageError, match=r"^--epochs 5: none of the checkpoints; their epochs are 0 to 50$"):
        select(paths, epochs="5")


def test_filters_apply_in_order_epochs_last_every(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt_{number}.keras" for number in range(1, 21)]
    for path in paths:
        path.touch()
    chosen = select(paths, epochs="5:18", last=7, every=3)
    assert [epoch_number(path) for path in chosen] == [12, 15, 18]


def test_names_with_pattern_characters_are_taken_literally_if_they_exist(tmp_path: Path) -> None:
    path = tmp_path / "run[1].keras"
    path.touch()
    assert expand([path]) == [path]


def test_undecodable_names_are_files_too(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ck\xff_1.keras"))
    path.touch()
    assert expand([tmp_path / "*.keras"]) == [path]


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("a_1.keras", "*.keras"),
        ("a_1.weights.h5", "*.weights.h5"),
        ("a.01-0.5.hdf5", "*.hdf5"),
        ("model_00000.weights.h5", "*.weights.json"),
        ("notes.txt", "*.keras"),
    ],
)
def test_of_a_folder_without_an_index_a_pattern_is_proposed(file: str, pattern: str, tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    (folder / file).touch()
    if pattern.endswith("json"):
        (folder / "model.weights.json").touch()
    with pytest.raises(UnreadableError) as caught:
        expand([folder])
    assert str(caught.value) == (
        f"{folder}: a folder without checkpoints.json; name its checkpoints, "
        f"such as '{tmp_path}/run[[]1]/{pattern}'"
    )


def test_a_folder_stands_for_what_its_index_names_in_training_order(tmp_path: Path) -> None:
    names = ["0.9_first.keras", "0.1_second.keras", "left_out.keras"]
    for name in names:
        (tmp_path / name).touch()
    entries = [{"file": name, "epoch": epoch} for epoch, name in enumerate(names[:2], 1)]
    (tmp_path / "checkpoints.json").write_text(json.dumps({"version": 1, "checkpoints": entries}))
    assert expand(str(tmp_path)) == [tmp_path / name for name in names[:2]]
    assert expand([tmp_path / "left_out.keras", tmp_path]) == sorted(tmp_path / name for name in names)


def _touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return paths


def test_a_run_that_went_on_in_another_folder_is_ordered_by_epoch(tmp_path: Path) -> None:
    paths = _touch(tmp_path, "run/ckpt_2.keras", "run/ckpt_10.keras", "continued/ckpt_11.keras")
    assert expand([paths[2], paths[0], paths[1]]) == paths
    entries = [{"file": "ckpt_11.keras", "epoch": 1}]
    (tmp_path / "continued/checkpoints.json").write_text(json.dumps({"version": 1, "checkpoints": entries}))
    assert expand(paths) == [paths[2], paths[0], paths[1]]


@pytest.mark.parametrize(
    "names",
    [
        ["a/ckpt_1.keras", "a/ckpt_3.keras", "b/ckpt_1.keras", "b/ckpt_2.keras"],
        ["a/ckpt_3.keras", "a/last.keras", "b/ckpt_2.keras"],
        ["epoch_2/model.keras", "epoch_10/model.keras"],
    ],
)
def test_folders_whose_epochs_are_shared_or_unknown_are_ordered_by_name(
    names: list[str], tmp_path: Path
) -> None:
    paths = _touch(tmp_path, *names)
    assert expand(paths[::-1]) == paths
