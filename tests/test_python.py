"""The calls from Python: what they take, what they warn of, what their results look like."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import makers
from conftest import Ended
from swa_avg import Refresh, SwaAvgWarning, Validation, average, inspect_checkpoints, verify
from swa_avg.errors import UsageError

Cli = Callable[..., Ended]
AVERAGED = (
    "BatchNorm statistics are averaged, not re-estimated (bn); the model may be far worse than its weights: "
    "refresh them on training data with refresh=DATA"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with ckpt_1, ckpt_2 and ckpt_10, all .keras."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 10):
        makers.write_archive(tmp_path / f"ckpt_{number}.keras", makers.weights(number))
    return tmp_path


def _warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert all(one.category is SwaAvgWarning and one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_average_warns_of_batchnorm_where_python_users_look(folder: Path) -> None:
    assert _warned(lambda: average("ckpt_*.keras", "swa.keras")) == [AVERAGED]
    assert _warned(lambda: average("ckpt_*.keras", "other.keras", dry_run=True)) == [AVERAGED]


def test_a_copy_of_one_checkpoint_needs_no_warning(folder: Path) -> None:
    assert _warned(lambda: average("ckpt_*.keras", "swa.keras", last=1)) == []


def test_average_warns_of_inputs_that_are_averages(folder: Path) -> None:
    average(["ckpt_1.keras", "ckpt_10.keras"], "swa_3.keras")
    assert _warned(lambda: average(["ckpt_2.keras", "swa_3.keras"], "swa.keras")) == [
        "swa_3.keras is itself an average that swa-avg wrote",
        AVERAGED,
    ]


def test_average_warns_where_epochs_and_names_are_in_different_orders(folder: Path) -> None:
    for epoch, loss in ((1, 0.9), (2, 0.5), (3, 0.7)):
        makers.write_archive(folder / f"loss{loss}-ep{epoch}.keras", makers.weights(epoch))
    told = "in the order of their epochs, 1 to 3, not of their names"
    assert _warned(lambda: average("loss*.keras", "swa.keras")) == [told, AVERAGED]


def test_the_command_line_prints_warnings_once_and_gives_none(folder: Path, swa_avg: Cli) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = swa_avg("ckpt_*.keras", "-o", "swa.keras")
    assert ended.code == 0
    assert ended.err.count("BatchNorm statistics are averaged") == 1
    assert "with --bn-refresh DATA" in ended.err


def test_results_are_one_short_line(folder: Path) -> None:
    report = average("ckpt_*.keras", "swa.keras")
    assert repr(report) == "<Report: wrote swa.keras: the uniform average of 3 checkpoints>"
    assert str(report) == "wrote swa.keras: the uniform average of 3 checkpoints"
    planned = average("ckpt_*.keras", "other.keras", dry_run=True)
    assert repr(planned) == "<Report: would write other.keras: the uniform average of 3 checkpoints>"
    assert repr(verify("swa.keras")).startswith(
        "<Verification: equal: swa.keras is the uniform average of 3 checkpoints ("
    )
    inspection = inspect_checkpoints("ckpt_*.keras")
    assert repr(inspection).startswith("<Inspection of 3 checkpoints: they fit together; tensors averaged: ")
    makers.write_archive(
        folder / "ckpt_11.keras", {**makers.weights(11), "layers/extra/vars/0": np.ones(3, "f4")}
    )
    assert repr(inspect_checkpoints("ckpt_*.keras")).startswith(
        "<Inspection of 4 checkpoints: cannot be averaged: "
    )


def test_a_name_with_a_newline_does_not_break_the_line(folder: Path) -> None:
    assert "\n" not in repr(average("ckpt_*.keras", "swa\n.keras"))


@pytest.mark.parametrize(
    "epochs",
    ["2:10", range(2, 11), "2:10:1", range(2, 11, 8)],
    ids=["text", "range", "steps", "range of steps"],
)
def test_epochs_are_text_or_a_range(folder: Path, epochs: str | range) -> None:
    report = average("ckpt_*.keras", "swa.keras", epochs=epochs, dry_run=True)
    assert [path.name for path in report.listing.paths] == ["ckpt_2.keras", "ckpt_10.keras"]


def test_a_single_epoch_is_a_number(folder: Path) -> None:
    report = average("ckpt_*.keras", "swa.keras", epochs=2, dry_run=True)
    assert [path.name for path in report.listing.paths] == ["ckpt_2.keras"]


def test_memory_is_a_number_or_text(folder: Path) -> None:
    one = average("ckpt_*.keras", "swa.keras", max_memory="80M", dry_run=True)
    other = average("ckpt_*.keras", "swa.keras", max_memory=80 * 2**20, dry_run=True)
    assert one.peak_memory == other.peak_memory <= 80 * 2**20
    with pytest.raises(UsageError, match=r"^'much' is not a size; expected such as 200M or 1G$"):
        average("ckpt_*.keras", "swa.keras", max_memory="much", dry_run=True)


def test_a_refresh_and_a_validation_are_made_of_data_alone() -> None:
    array = np.zeros((4, 2))
    for data in ("train.npz", Path("train.npz"), array, (array, array), [array, array], {"x": array}):
        refresh = Refresh.of(data)
        assert refresh is not None
        assert refresh.data is data
        assert Validation.of(data).data is data
    given = Refresh("train.npz", samples=3)
    assert Refresh.of(given) is given
    assert Refresh.of(None) is None
    validation = Validation("val.npz", monitor="loss")
    assert Validation.of(validation) is validation
