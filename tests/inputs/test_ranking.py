"""The best checkpoints, by the metrics of an index, of a log, or of names, against a plain sort."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.inputs.listing import Listing, list_checkpoints
from swa_avg.inputs.ranking import with_log
from swa_avg.inputs.selection import Selection, select

VALUES = [0.5, 0.25, 0.75, 0.25, 0.125, 0.75, 0.5]
"""By epoch, from 1; with ties."""


def _touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def _log(folder: Path, columns: dict[str, list[object]], name: str = "log.csv", first: int = 0) -> Path:
    rows = [["epoch", *columns], *([first + n, *row] for n, row in enumerate(zip(*columns.values())))]  # noqa: B905
    path = folder / name
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def _best(folder: Path, best: int, pattern: str = "*.keras", **wanted: object) -> Listing:
    return select(list_checkpoints(folder / pattern), Selection(best=best, **wanted))  # type: ignore[arg-type]


def _sorted(values: list[float], best: int, mode: str) -> list[int]:
    """Return the epochs of the best, of equals the later; NaN is never one."""
    sign = 1 if mode == "min" else -1
    numbered = [(sign * value, -epoch) for epoch, value in enumerate(values, 1) if not math.isnan(value)]
    return sorted(-epoch for _, epoch in sorted(numbered)[:best])


def _in_log(folder: Path, metric: str, values: list[float]) -> None:
    _touch(folder, *(f"ckpt_{epoch}.keras" for epoch in range(1, len(values) + 1)))
    _log(folder, {"noise": list(range(len(values))), metric: values})


def _in_names(folder: Path, metric: str, values: list[float]) -> None:
    _touch(folder, *(f"{epoch:02d}-{metric}={value}.keras" for epoch, value in enumerate(values, 1)))


def _in_index(folder: Path, metric: str, values: list[float]) -> None:
    entries = [
        {"file": f"c{n}.keras", "epoch": n, "metrics": {metric: str(v) if math.isnan(v) else v}}
        for n, v in enumerate(values, 1)
    ]
    _touch(folder, *(str(entry["file"]) for entry in entries))
    (folder / "checkpoints.json").write_text(json.dumps({"version": 1, "checkpoints": entries}))


@pytest.mark.parametrize("write", [_in_log, _in_names, _in_index])
@pytest.mark.parametrize(("metric", "mode"), [("val_loss", "min"), ("val_accuracy", "max"), ("zeal", "max")])
def test_the_best_of_each_source_are_those_of_a_plain_sort(
    write: object, metric: str, mode: str, tmp_path: Path
) -> None:
    shuffled = [*VALUES, math.nan, 0.0625, 3.0]
    random.Random(metric).shuffle(shuffled)
    write(tmp_path, metric, shuffled)  # type: ignore[operator]
    for best in range(1, len(shuffled)):
        listing = _best(tmp_path, best, monitor=metric, mode=mode if metric == "zeal" else None)
        assert [listed.epoch for listed in listing.files] == _sorted(shuffled, best, mode)
        assert listing.ranking is not None
        assert (listing.ranking.monitor, listing.ranking.mode) == (metric, mode)
    with pytest.raises(UsageError, match=r"found only 9 checkpoints with the metric .* have none, or NaN"):
        _best(tmp_path, 10, monitor=metric, mode=mode)


def test_the_index_goes_before_a_log_that_was_found_and_that_before_names(tmp_path: Path) -> None:
    _in_index(tmp_path, "val_loss", [3.0, 1.0, 2.0])
    _touch(tmp_path, "04-val_loss=0.1.keras", "05-val_loss=0.2.keras")
    _log(tmp_path, {"val_loss": [7, 8, 9, 5, "NA"], "mae": [1, 2, 3, 4, 5]})
    by_index = {"c1.keras": 3.0, "c2.keras": 1.0, "c3.keras": 2.0}
    expected = {
        **{name: (value, "checkpoints.json") for name, value in by_index.items()},
        "04-val_loss=0.1.keras": (5.0, "log.csv"),
        "05-val_loss=0.2.keras": (0.2, "the file name"),
    }
    listing = _best(tmp_path, 5, monitor="val_loss")
    assert _told(listing, "val_loss") == expected
    # What the index does not say, the log does; and one that is named goes before everything.
    assert _told(_best(tmp_path, 5, monitor="mae"), "mae")["c1.keras"] == (1.0, "log.csv")
    other = _log(tmp_path, {"val_loss": [1, 2]}, "other.txt")
    told = _told(_best(tmp_path, 5, monitor="val_loss", metrics=other), "val_loss")
    assert told["c1.keras"] == (1.0, "other.txt")
    assert told["c3.keras"] == (2.0, "checkpoints.json")


def _told(listing: Listing, metric: str) -> dict[str, tuple[float, str]]:
    return {
        listed.path.name: (listed.metrics[metric], listed.sources[metric])
        for listed in listing.files
        if metric in listed.metrics
    }


def test_a_log_is_found_where_it_is_the_only_one(tmp_path: Path) -> None:
    _touch(tmp_path, "ckpt_1.keras", "ckpt_2.keras")
    (tmp_path / "labels.csv").write_text("name,label\na,1\n")
    (tmp_path / "broken.csv").write_text("epoch,loss\nx,1\n")
    _log(tmp_path, {"val_loss": [1, 2]})
    assert _best(tmp_path, 1).paths == [tmp_path / "ckpt_1.keras"]
    _log(tmp_path, {"val_loss": [2, 1]}, "second.csv")
    with pytest.raises(UsageError) as caught:
        _best(tmp_path, 1)
    assert str(caught.value) == (
        "best needs a metric in checkpoints.json, in a log as CSVLogger writes it, or in the names; or name "
        f"one of the logs with metrics: {tmp_path}/log.csv, {tmp_path}/second.csv"
    )
    assert _best(tmp_path, 1, metrics=tmp_path / "second.csv").paths == [tmp_path / "ckpt_2.keras"]
    with pytest.raises(UnreadableError, match="line 2 has no whole number as its epoch"):
        _best(tmp_path, 1, metrics=tmp_path / "broken.csv")


def test_logs_count_from_0_and_so_do_names_that_begin_with_0(tmp_path: Path) -> None:
    _log(tmp_path, {"val_loss": [3, 2, 1, 4]})
    _touch(tmp_path, "ckpt_0.keras", "ckpt_1.keras", "ckpt_2.keras", "ckpt_3.keras")
    assert _best(tmp_path, 1, epochs="1:").paths == [tmp_path / "ckpt_2.keras"]
    (tmp_path / "ckpt_0.keras").unlink()
    assert _best(tmp_path, 1, epochs="1:").paths == [tmp_path / "ckpt_3.keras"]
    _log(tmp_path, {"val_loss": [3, 2, 1]}, first=1)
    with pytest.raises(
        UnreadableError, match=r"begins with epoch 1, and such a log counts from 0; number its epochs from 0$"
    ):
        _best(tmp_path, 1, metrics=tmp_path / "log.csv")


def test_an_epoch_of_several_checkpoints_has_no_value_in_a_log(tmp_path: Path) -> None:
    _touch(tmp_path, "ckpt_0001_00000500.keras", "ckpt_0001_00001000.keras", "ckpt_0002_00001500.keras")
    _log(tmp_path, {"val_loss": [1, 2]})
    listing = _best(tmp_path, 1)
    assert listing.paths == [tmp_path / "ckpt_0002_00001500.keras"]
    assert listing.notes == (
        "the best 1 of 1 checkpoint with the metric 'val_loss'; 2 of 3 have none, or NaN, such as "
        "ckpt_0001_00000500.keras",
    )


def test_each_folder_has_the_epochs_of_its_own_log(tmp_path: Path) -> None:
    for name, values, epochs in (("one", [3, 1, 4], (1, 2, 3)), ("other", [6, 5, 2], (0, 1, 2))):
        (tmp_path / name).mkdir()
        _touch(tmp_path / name, *(f"ckpt_{epoch}.keras" for epoch in epochs))
        _log(tmp_path / name, {"val_loss": values})
    paths = [tmp_path / "one" / "ckpt_2.keras", tmp_path / "other" / "ckpt_2.keras"]
    assert sorted(_best(tmp_path, 2, "*/*.keras").paths) == paths


def test_the_only_unnamed_decimal_counts_once_its_direction_is_said(tmp_path: Path) -> None:
    _touch(tmp_path, "01-0.42.keras", "02-0.91.keras", "03-0.13.keras")
    with pytest.raises(UsageError) as caught:
        _best(tmp_path, 1)
    assert str(caught.value) == (
        "monitor number: say which values are better, with mode min or max; 01-0.42.keras has 0.42"
    )
    assert _best(tmp_path, 1, mode="max").paths == [tmp_path / "02-0.91.keras"]
    assert _best(tmp_path, 1, mode="min").paths == [tmp_path / "03-0.13.keras"]


@pytest.mark.parametrize(
    ("names", "shown", "monitor"),
    [
        (["01-0.42-0.9.keras", "02-0.41-0.8.keras"], "number1 (0.42), number2 (0.9)", "number1"),
        (["01-loss0.4-acc0.9.keras", "02-loss0.3-acc0.8.keras"], "loss (0.4), acc (0.9)", "loss"),
    ],
)
def test_of_two_decimals_in_the_names_one_must_be_named(
    names: list[str], shown: str, monitor: str, tmp_path: Path
) -> None:
    _touch(tmp_path, *names)
    with pytest.raises(UsageError) as caught:
        _best(tmp_path, 1)
    assert str(caught.value) == f"best needs monitor, a metric of {names[0]}: {shown}"
    assert _best(tmp_path, 1, monitor=monitor, mode="min").paths == [tmp_path / names[1]]


@pytest.mark.parametrize(
    ("label", "best"), [("valacc_", 2), ("val_loss=", 3), ("f1=", 2), ("model-val-auc", 2), ("val_mIoU", 2)]
)
def test_a_label_of_the_field_says_which_way_it_goes(label: str, best: int, tmp_path: Path) -> None:
    names = [f"{label}{value}_ep{epoch}.keras" for epoch, value in ((1, 0.5), (2, 0.75), (3, 0.25))]
    _touch(tmp_path, *names)
    assert _best(tmp_path, 1).paths == [tmp_path / names[best - 1]]


def test_names_of_two_readings_are_asked_about_where_a_log_is_named(tmp_path: Path) -> None:
    _touch(tmp_path, "1_63.keras", "2_61.keras", "5_60.keras")
    log = _log(tmp_path, {"val_loss": [1, 2, 3]})
    with pytest.raises(UsageError, match=r"^metrics: the names can be read in two ways"):
        _best(tmp_path, 1, metrics=log)
    with pytest.raises(UsageError, match=r"^best needs a metric in checkpoints\.json"):
        _best(tmp_path, 1)


def test_the_learning_rate_of_a_log_is_that_of_its_epoch(tmp_path: Path) -> None:
    _touch(tmp_path, "ckpt_1.keras", "ckpt_2.keras")
    _log(tmp_path, {"val_loss": [1, 2], "learning_rate": [0.1, 0.01]})
    listing = with_log(list_checkpoints(tmp_path / "*.keras"))
    assert [listed.learning_rate for listed in listing.files] == [0.1, 0.01]
    assert [dict(listed.metrics) for listed in listing.files] == [{"val_loss": 1.0}, {"val_loss": 2.0}]
