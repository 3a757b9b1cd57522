"""The log of a training as `CSVLogger` writes it, and what has become of such files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.errors import UnreadableError
from swa_avg.inputs.training_log import read_log

EPOCHS = {0: {"loss": 0.5, "val_loss": 0.75}, 1: {"loss": 0.25, "val_loss": 0.5}}


def _read(folder: Path, content: str | bytes) -> dict[int, dict[str, float]]:
    path = folder / "log.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return {epoch: dict(metrics) for epoch, metrics in read_log(path).epochs.items()}


_PLAIN = "epoch,loss,val_loss\r\n0,0.5,0.75\r\n1,0.25,0.5\r\n"


@pytest.mark.parametrize(
    "content",
    [
        _PLAIN,
        _PLAIN.replace("\r\n", "\n").rstrip(),
        _PLAIN.replace("\r\n", "\r"),
        _PLAIN.replace(",", ";"),
        _PLAIN.replace(",", ";").replace(".", ","),
        _PLAIN.replace(",", "\t"),
        _PLAIN.encode("utf-8-sig"),
        _PLAIN.encode("utf-16"),
        b"\xfe\xff" + _PLAIN.encode("utf-16-be"),
        "\n\n" + _PLAIN.replace("\r\n", "\r\n\r\n"),
        '"epoch","loss","val_loss"\n"0","0.5"," 0.75"\n"1.0","0.25","5e-1"\n',
        "val_loss,epoch,loss\n0.75,0,0.5\n0.5,1,0.25\n",
    ],
)  # fmt: skip
def test_one_log_in_many_spellings_is_one(content: str | bytes, tmp_path: Path) -> None:
    assert _read(tmp_path, content) == EPOCHS


def test_of_an_epoch_that_was_logged_again_the_last_row_counts(tmp_path: Path) -> None:
    resumed = "epoch,loss,val_loss\n0,0.5,0.75\n1,9,9\n2,9,9\nepoch,val_loss,loss\n1,0.5,0.25\n"
    assert _read(tmp_path, resumed) == {**EPOCHS, 2: {"loss": 9.0, "val_loss": 9.0}}


def test_a_cell_that_is_no_number_says_nothing_and_nan_is_one(tmp_path: Path) -> None:
    found = _read(tmp_path, 'epoch,a,b,c,d\n0,NA,,"[1.0, 2.0]",nan\n1,-inf,1\n')
    assert math.isnan(found[0].pop("d"))
    assert found == {0: {}, 1: {"a": -math.inf, "b": 1.0}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no column `epoch` beside others in its first line"),
        ("loss,val_loss\n1,2\n", "no column `epoch` beside others in its first line"),
        ("epoch\n0\n", "no column `epoch` beside others in its first line"),
        ("epoch,loss,loss\n", "not a log as CSVLogger writes it: line 1 names a column twice"),
        (
            "epoch,loss\n0,1\n\n1,1,1\n",
            "not a log as CSVLogger writes it: line 4 has 3 cells, and its header 2",
        ),
        (
            "epoch,loss\n0,1\n-1,1\n",
            "not a log as CSVLogger writes it: line 3 has no whole number as its epoch",
        ),
        (
            "epoch,loss\n0,1\n,1\n",
            "not a log as CSVLogger writes it: line 3 has no whole number as its epoch",
        ),
        ('epoch,loss\n0,"1\n', "not a log as CSVLogger writes it: unexpected end of data"),
        (b"epoch,loss\n0,\xff\n", "a log that is not UTF-8 (byte 13)"),
        (b"\xff\xfee\0p", "no column `epoch` beside others in its first line"),
        ("epoch,loss\n" + "0,1\n" * 500_001, "a log of more than 1,000,000 cells"),
        ("epoch,loss\n" + " " * 2**24, "a log larger than 16 MiB"),
    ],
)
def test_what_is_no_log_is_refused_in_one_line(content: str | bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UnreadableError) as caught:
        _read(tmp_path, content)
    assert str(caught.value) == f"{tmp_path / 'log.csv'}: {problem}"


@given(st.binary(max_size=200) | st.text(',;"\n\r\0epoch0.1- ', max_size=200).map(str.encode))
def test_any_bytes_are_a_log_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("log") / "log.csv"
    for start in (b"", b"epoch,loss\n"):
        path.write_bytes(start + content)
        try:
            log = read_log(path)
        except UnreadableError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert all(epoch >= 0 for epoch in log.epochs)


@pytest.mark.keras
def test_what_keras_logs_is_read(tmp_path: Path) -> None:
    import keras
    import numpy as np

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = np.ones((4, 2), "f4"), np.zeros(4, "f4")
    path = tmp_path / "log.csv"
    for start in (0, 2):  # the second one resumes with what went before in the same file
        logger = keras.callbacks.CSVLogger(str(path), separator=";", append=True)
        history = model.fit(
            x, y, epochs=start + 2, initial_epoch=start, validation_data=(x, y), validation_freq=2,
            verbose=0, callbacks=[logger],
        )  # fmt: skip
    log = read_log(path)
    assert sorted(log.epochs) == [0, 1, 2, 3]
    assert log.epochs[3]["val_loss"] == history.history["val_loss"][-1]
    assert log.epochs[2]["mae"] == history.history["mae"][0]
    assert "val_loss" not in log.epochs[2]
