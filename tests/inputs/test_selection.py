from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.inputs.listing import Listing, list_checkpoints
from swa_avg.inputs.selection import Selection, parse_epochs, select


def expand(patterns: object) -> list[Path]:
    return list_checkpoints(patterns).paths  # type: ignore[arg-type]


def chosen(paths: list[Path], **wanted: object) -> list[Path]:
    return select(list_checkpoints(paths), Selection(**wanted)).paths  # type: ignore[arg-type]


def test_order_is_natural(tmp_path: Path) -> None:
    names = [
        "b/x.h5",
        "a/x.h5",
        "ckpt_2.keras",
        "ckpt_10.keras",
        "ckpt_02b.keras",
        "last.keras",
        "ckpt_1.keras",
    ]
    _touch(tmp_path, *names)
    ordered = [
        "a/x.h5",
        "b/x.h5",
        "ckpt_1.keras",
        "ckpt_2.keras",
        "ckpt_02b.keras",
        "ckpt_10.keras",
        "last.keras",
    ]
    assert expand([tmp_path / name for name in names]) == [tmp_path / name for name in ordered]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "run").mkdir(parents=True)
    _touch(home / "run", "ckpt_1.keras", "ckpt_2.keras")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    paths = [home / "run" / "ckpt_1.keras", home / "run" / "ckpt_2.keras"]
    assert expand("~/run/ckpt_*.keras") == paths
    assert expand(["~/run/ckpt_2.keras", "~/run/ckpt_1.keras"]) == paths
    assert expand("~/*/ckpt_[12].keras") == paths
    with pytest.raises(UsageError, match=r"^no file matches '~nobody-at-all/\*'$"):
        expand("~nobody-at-all/*")
    _touch(tmp_path, "~")
    assert expand("~") == [Path("~")]


def test_brackets_in_names_that_exist_are_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run[1]", "run1"):
        Path(folder).mkdir()
        _touch(tmp_path / folder, "ckpt_1.keras", "ckpt_2.keras", "best[3].keras")
    assert expand("run[1]/ckpt_*.keras") == [Path("run[1]/ckpt_1.keras"), Path("run[1]/ckpt_2.keras")]
    assert expand("run[1]/best[3].keras") == [Path("run[1]/best[3].keras")]
    assert expand(Path("run[1]") / "ckpt_[2].keras") == [Path("run[1]/ckpt_2.keras")]
    assert expand("run[!2]/ckpt_2.keras") == [Path("run1/ckpt_2.keras")]
    assert expand(str(tmp_path / "run[1]" / "*_1.keras")) == [tmp_path / "run[1]" / "ckpt_1.keras"]


_SAVE = "in TensorFlow, load it with model.load_weights, then model.save_weights to a .weights.h5"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("cp-0001.ckpt", f"cp-0001.ckpt: a TensorFlow checkpoint, which is not read; {_SAVE}"),
        (
            "cp-*.ckpt",
            f"no file matches 'cp-*.ckpt'; TensorFlow checkpoints do, which are not read: {_SAVE}",
        ),
        ("weights", f"weights: holds TensorFlow checkpoints, which are not read; {_SAVE}"),
        ("weight*", f"weights: holds TensorFlow checkpoints, which are not read; {_SAVE}"),
        ("weights/cp", f"weights/cp: a TensorFlow checkpoint, which is not read; {_SAVE}"),
        *(
            (
                name,
                "saved_1: a SavedModel, which is not read; load it in TensorFlow, and save its weights with "
                "model.save_weights to a .weights.h5",
            )
            for name in ("saved_1", "saved_*", ["saved_1", "saved_2"])
        ),
        ("missing.ckpt", "missing.ckpt: no such file"),
    ],
)
def test_what_tensorflow_saved_is_named(
    named: str | list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _touch(tmp_path, "checkpoint", "cp-0001.ckpt.index", "cp-0001.ckpt.data-00000-of-00001")
    for folder in ("weights", "saved_1/variables", "saved_2/variables"):
        Path(folder).mkdir(parents=True)
    _touch(tmp_path / "weights", "checkpoint", "cp.index", "cp.data-00000-of-00002", "cp.data-00001-of-00002")
    for folder in ("saved_1", "saved_2"):
        _touch(tmp_path / folder, "saved_model.pb", "variables/variables.index")
    with pytest.raises((UnreadableError, UsageError)) as raised:
        expand(named)
    assert str(raised.value) == said


def test_the_order_is_the_same_however_the_names_are_given(tmp_path: Path) -> None:
    paths = [tmp_path / "ckpt_01.keras", tmp_path / "ckpt_1.keras"]
    for path in paths:
        path.touch()
    assert expand(paths) == expand(paths[::-1]) == paths


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
    assert chosen(paths, epochs="4:") == paths[3:]


def test_epochs_that_there_are_not_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt_{number}.keras" for number in range(0, 60, 10)]
    for path in paths:
        path.touch()
    with pytest.raises(UsageError, match=r"^epochs 5: none of the checkpoints; their epochs are 0 to 50$"):
        chosen(paths, epochs="5")


def test_filters_apply_in_order_epochs_last_every(tmp_path: Path) -> None:
    paths = [tmp_path / f"ckpt_{number}.keras" for number in range(1, 21)]
    for path in paths:
        path.touch()
    assert chosen(paths, epochs="5:18", last=7, every=3) == [paths[number - 1] for number in (12, 15, 18)]


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


def test_epochs_order_files_whose_names_begin_with_a_metric(tmp_path: Path) -> None:
    names = [f"vl{abs(epoch - 4) / 40 + 0.2:.3f}-ep{epoch:02d}.keras" for epoch in range(1, 9)]
    paths = _touch(tmp_path, *names)
    listing = list_checkpoints([tmp_path / "*.keras"])
    assert listing.paths == paths
    assert listing.notes == ("in the order of their epochs, 1 to 8, not of their names",)
    assert chosen(paths, last=2) == paths[-2:]
    assert list_checkpoints(_touch(tmp_path, "ckpt_2.keras", "ckpt_10.keras")).notes == ()


def test_names_that_can_be_read_in_two_ways_are_asked_about_where_it_matters(tmp_path: Path) -> None:
    paths = _touch(tmp_path, "1_63.keras", "2_61.keras", "5_60.keras")
    assert chosen(paths) == paths
    for wanted in ({"last": 2}, {"epochs": "1:2"}, {"every": 2}):
        with pytest.raises(UsageError) as caught:
            chosen(paths, **wanted)
        assert str(caught.value).endswith(
            ": the names can be read in two ways, by one of which 1_63.keras is of epoch 1, by the other of epoch "
            "63; mark the epoch in the names, as in ep01"
        )


def test_one_training_of_two_in_a_folder_can_be_selected(tmp_path: Path) -> None:
    paths = _touch(tmp_path, *(f"ckpt_{epoch}.keras" for epoch in range(1, 7)))
    entries = [
        {"file": path.name, "epoch": epoch, "time": f"2026-01-0{2 if epoch < 4 else 1}T00:00:00+00:00"}
        for epoch, path in enumerate(paths, 1)
    ]
    (tmp_path / "checkpoints.json").write_text(json.dumps({"version": 1, "checkpoints": entries}))
    listing: Listing = list_checkpoints(tmp_path)
    with pytest.raises(UsageError, match=r"was saved before ckpt_3\.keras"):
        select(listing, Selection())
    assert select(listing, Selection(epochs="4:6")).paths == paths[3:]
    assert select(listing, Selection(epochs="1:3")).paths == paths[:3]


def _run(folder: Path, losses: list[float | str | None], monitor: str | None = "val_loss") -> Path:
    """Write the index of a run in which some epochs, those of None, were not validated."""
    folder.mkdir()
    checkpoints = []
    for epoch, loss in enumerate(losses, 1):
        (folder / f"ckpt_{epoch:02d}.keras").touch()
        metrics = {"loss": 9 - epoch} | ({} if loss is None else {"val_loss": loss})
        checkpoints.append({"file": f"ckpt_{epoch:02d}.keras", "epoch": epoch, "metrics": metrics})
    mode = "min" if monitor else None
    index = {"version": 1, "monitor": monitor, "mode": mode, "checkpoints": checkpoints}
    (folder / "checkpoints.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("losses", "best", "epochs", "note"),
    [
        ([None, 3, None, 1, None, 2], 2, [4, 6], "the best 2 of 3 checkpoints with the metric 'val_loss'; 3 of 6 have none, or NaN, such as ckpt_01.keras"),
        ([5, 3, 1, None], 1, [3], "the best 1 of 3 checkpoints with the metric 'val_loss'; 1 of 4 have none, or NaN, such as ckpt_04.keras"),
        ([1, "nan", "inf", 3], 3, [1, 3, 4], "the best 3 of 3 checkpoints with the metric 'val_loss'; 1 of 4 have none, or NaN, such as ckpt_02.keras"),
        ([None, 2, 2, None], 1, [3], "the best 1 of 2 checkpoints with the metric 'val_loss'; 2 of 4 have none, or NaN, such as ckpt_01.keras"),
        ([5, 3, 1, 4], 2, [2, 3], None),
    ],
)  # fmt: skip
def test_the_best_are_of_those_that_have_the_metric_and_that_is_said(
    tmp_path: Path, losses: list[float | str | None], best: int, epochs: list[int], note: str | None
) -> None:
    listing = select(list_checkpoints(_run(tmp_path / "run", losses)), Selection(best=best))
    assert [listed.epoch for listed in listing.files] == epochs
    assert listing.notes == (() if note is None else (note,))


def test_more_than_have_the_metric_or_one_that_none_has_are_refused(tmp_path: Path) -> None:
    listing = list_checkpoints(_run(tmp_path / "run", [None, 3, None, 1]))
    for wanted, problem in (
        (Selection(best=3), "best is 3, but found only 2 checkpoints with the metric 'val_loss'; 2 of 4 have none, or NaN, such as ckpt_01.keras"),
        (Selection(best=1, monitor="val_los"), "ckpt_01.keras has no metric 'val_los', but loss, val_loss"),
        (Selection(epochs="1:3", best=2), "best is 2, but found only 1 checkpoint with the metric 'val_loss'; 2 of 3 have none, or NaN, such as ckpt_01.keras"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            select(listing, wanted)
        assert str(caught.value) == problem


def test_of_two_folders_each_is_ranked_by_its_own_metrics(tmp_path: Path) -> None:
    one, two = _run(tmp_path / "one", [None, 1]), _run(tmp_path / "two", [3, None], monitor=None)
    listing = select(list_checkpoints([one, two]), Selection(best=2, monitor="val_loss"))
    assert listing.paths == [one / "ckpt_02.keras", two / "ckpt_01.keras"]
    assert len(listing.notes) == 1
