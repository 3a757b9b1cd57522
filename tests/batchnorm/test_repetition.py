"""`verify --bn-refresh`: statistics are derived again from their data, by real Keras, and compared."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import makers
import swa_avg as package
from conftest import Ended

keras = pytest.importorskip("keras")
pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

Cli = Callable[..., Ended]
FUNCTIONS = """
import numpy as np
DATA = np.load({path!r})["x_train"]
def batches():
    return iter([DATA[:40], DATA[40:70], DATA[70:]])
def doubled(batch):
    return 2 * batch
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a model with dropout before its second BatchNorm, in three formats, and data."""
    folder = tmp_path_factory.mktemp("repetition")
    layers = keras.layers
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5),
            layers.BatchNormalization(name="first"),
            layers.Dropout(0.3),
            layers.Dense(4),
            layers.BatchNormalization(name="second"),
            layers.BatchNormalization(name="frozen", trainable=False),
            layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse")
    images = np.random.default_rng(0).normal(1, 2, (100, 6)).astype("f4")
    for number in (1, 2):
        model.fit(images, images[:, 0], epochs=1, verbose=0)
        model.save(folder / f"ckpt_{number}.keras")
        model.save_weights(folder / f"ckpt_{number}.weights.h5")
    for number in (1, 2):
        model.load_weights(folder / f"ckpt_{number}.weights.h5")
        model.save(folder / f"ckpt_{number}.h5")
    np.savez(folder / "train.npz", x_train=images)
    np.savez(folder / "other.npz", x_train=50 + images**2)
    (folder / "feeds_of_repetition.py").write_text(FUNCTIONS.format(path=str(folder / "train.npz")))
    return folder


@pytest.mark.parametrize(
    ("suffix", "output", "making", "verifying"),
    [
        (".keras", ".keras", (), ()),
        (".keras", ".keras", ("--optimizer", "drop", "--method", "ema:0.3", "--bn-seed", "3"), ()),
        (
            ".keras",
            ".keras",
            ("--bn-batch-size", "7", "--bn-samples", "50", "--bn-estimator", "batch-mean"),
            (),
        ),
        (".keras", ".weights.h5", (), ()),
        (".weights.h5", ".weights.h5", ("--model", "ckpt_1.keras"), ("--model", "ckpt_1.keras")),
        (".h5", ".h5", (), ()),
        (
            ".keras",
            ".keras",
            ("--bn-preprocess", "feeds_of_repetition:doubled"),
            ("--bn-preprocess", "feeds_of_repetition:doubled"),
        ),
    ],
    ids=str,
)
def test_the_right_data_give_the_same_bits(
    suffix: str,
    output: str,
    making: tuple[str, ...],
    verifying: tuple[str, ...],
    run: Path,
    swa_avg: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run)
    target = tmp_path / f"swa{output}"
    ended = swa_avg(f"ckpt_?{suffix}", "-o", target, "--bn-refresh", "train.npz", *making)
    assert ended.code == 0, ended.err
    ended = swa_avg("verify", target, "--inputs", run)
    assert ended.code == 0, ended.err
    without = (
        "equal, but for 4 statistics that a refresh replaced and that cannot be derived without its data: "
    )
    assert ended.err.splitlines()[-1].startswith(without)
    ended = swa_avg("verify", target, "--inputs", run, "--bn-refresh", "train.npz", *verifying)
    assert ended.code == 0, ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith(f"equal, with 4 statistics derived again from train.npz: {target} is the ")


def test_batches_of_a_function_are_derived_again(
    run: Path, swa_avg: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    target, data = tmp_path / "swa.keras", "feeds_of_repetition:batches"
    assert swa_avg("ckpt_?.keras", "-o", target, "--bn-refresh", data, "--bn-samples", "65").code == 0
    ended = swa_avg("verify", target, "--inputs", run, "--bn-refresh", data, "--json", "-q")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    assert result["derived_again"] == [
        f"layers/batch_normalization{n}/vars/{k}" for n in ("", "_1") for k in (2, 3)
    ]
    assert (result["by_digest"], result["standard_deviations_off"]) == ([], 0.0)


def _refreshed(run: Path, swa_avg: Cli, folder: Path) -> Path:
    target = folder / "swa.weights.h5"
    ended = swa_avg(
        run / "ckpt_?.weights.h5",
        "-o",
        target,
        "--bn-refresh",
        run / "train.npz",
        "--model",
        run / "ckpt_1.keras",
    )
    assert ended.code == 0, ended.err
    return target


def _verified(target: Path, run: Path, swa_avg: Cli, data: str = "train.npz") -> Ended:
    return swa_avg(
        "verify", target, "--inputs", run, "--bn-refresh", run / data, "--model", run / "ckpt_1.keras"
    )


def test_other_data_are_not_equal_and_one_line_names_the_worst_layer(
    run: Path, swa_avg: Cli, tmp_path: Path
) -> None:
    ended = _verified(target := _refreshed(run, swa_avg, tmp_path), run, swa_avg, "other.npz")
    assert ended.code == 4
    (line,) = ended.err.splitlines()
    assert line.startswith(f"swa-avg: error: {target}: first: its statistics are ")
    assert line.endswith("the most of 2 BatchNorm layers; the rows are not those that the record names")
    without_preprocessing = swa_avg(
        "verify", target, "--inputs", run, "--bn-refresh", run / "train.npz", "--bn-preprocess", "numpy:negative",
        "--model", run / "ckpt_1.keras",
    )  # fmt: skip
    assert without_preprocessing.code == 4
    assert without_preprocessing.err.endswith("the rows are those that the record names\n")


def _forge(target: Path, name: str, values: np.ndarray, *, excused: bool = True) -> None:
    """Change a tensor, and let the record say that the refresh left it so."""
    with h5py.File(target, "r+") as file:
        file[name][...] = values
        record = json.loads(bytes(file.attrs["swa_avg"]))
        if excused:
            record["batchnorm"]["values"][name] = f"{zlib.crc32(file[name][...].tobytes()):08x}"
        file.attrs["swa_avg"] = np.bytes_(json.dumps(record).encode())


@pytest.mark.parametrize(
    "values", [np.full(4, 9.0), np.full(4, -9.0), np.full(4, np.nan), np.full(4, np.inf)]
)
def test_forged_statistics_with_a_digest_that_fits_are_not_equal(
    values: np.ndarray, run: Path, swa_avg: Cli, tmp_path: Path
) -> None:
    target = _refreshed(run, swa_avg, tmp_path)
    _forge(target, "layers/batch_normalization_1/vars/3", values)
    assert swa_avg("verify", target, "--inputs", run).code == 0  # nothing says otherwise
    ended = _verified(target, run, swa_avg)
    assert ended.code == 4
    (line,) = ended.err.splitlines()
    assert line.startswith(f"swa-avg: error: {target}: second: its statistics are ")
    assert line.endswith("the most of 1 BatchNorm layer; the rows are those that the record names")


def test_statistics_that_no_refresh_replaces_are_not_excused(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    target = _refreshed(run, swa_avg, tmp_path)
    _forge(target, "layers/batch_normalization_2/vars/2", np.full(4, 9.0))
    assert swa_avg("verify", target, "--inputs", run).code == 0  # as far as a file can tell
    ended = _verified(target, run, swa_avg)
    assert ended.code == 4
    assert (
        "layers/batch_normalization_2/vars/2: no statistic that a refresh of this model replaces" in ended.err
    )


def test_rounding_is_taken_for_what_it_is_and_said(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    target = _refreshed(run, swa_avg, tmp_path)
    with h5py.File(target) as file:
        mean, variance = (file[f"layers/batch_normalization/vars/{number}"][...] for number in (2, 3))
    step = np.zeros(5, np.float32)
    step[3] = 1e-4 * np.sqrt(variance[3] + 1e-3)
    _forge(target, "layers/batch_normalization/vars/2", mean + step)
    ended = _verified(target, run, swa_avg)
    assert ended.code == 0, ended.err
    assert "4 statistics derived again from" in ended.err
    assert "train.npz, to 0.0001 standard deviations: " in ended.err
    _forge(target, "layers/batch_normalization/vars/2", mean + 11 * step)
    assert _verified(target, run, swa_avg).code == 4


def test_an_output_without_a_refresh_takes_no_data(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    target = tmp_path / "swa.keras"
    assert swa_avg(run / "ckpt_?.keras", "-o", target).code == 0
    ended = swa_avg("verify", target, "--inputs", run, "--bn-refresh", run / "train.npz")
    assert (ended.code, ended.err) == (
        2,
        f"swa-avg: error: {target} does not say that BatchNorm was refreshed; verify it without data\n",
    )


def test_a_refresh_that_found_no_batchnorm_cannot_be_repeated(
    run: Path, swa_avg: Cli, tmp_path: Path
) -> None:
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    for number in (1, 2):
        model.set_weights([weights + number for weights in model.get_weights()])
        model.save(tmp_path / f"ckpt_{number}.keras")
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_?.keras", "-o", target, "--bn-refresh", run / "train.npz").code == 0
    assert swa_avg("verify", target).code == 0
    ended = swa_avg("verify", target, "--bn-refresh", run / "train.npz")
    assert ended.code == 2
    assert "does not say that BatchNorm was refreshed" in ended.err


def test_weights_alone_need_the_model(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    target = _refreshed(run, swa_avg, tmp_path)
    ended = swa_avg("verify", target, "--inputs", run, "--bn-refresh", run / "train.npz")
    assert ended.code == 2
    assert "holds weights alone: --bn-refresh needs --model" in ended.err


def test_python_takes_arrays_and_live_models(run: Path, tmp_path: Path, swa_avg: Cli) -> None:
    target = _refreshed(run, swa_avg, tmp_path)
    images = makers.arrays_in(run / "train.npz")["x_train"]
    model = keras.models.load_model(run / "ckpt_1.keras")
    rows = []
    found = package.verify(
        target,
        run,
        refresh=package.Refresh(images, model=model, batch_size=3, seed=9),  # the record's are taken
        refresh_progress=lambda total, count: rows.append((total, count)),
    )
    assert found.equal
    assert (found.data, found.off, len(found.refreshed)) == ("data", 0.0, 4)
    assert rows == [(100, 100)]
    found = package.verify(target, run, refresh=package.Refresh(images[::-1] + 1, model=model))
    assert [finding.subject for finding in found.findings] == ["first"]


def test_an_swa_callbacks_average_is_derived_again(tmp_path: Path) -> None:
    from swa_avg.callbacks import SWA

    x = np.random.default_rng(1).normal(3, 2, (64, 4)).astype("f4")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dropout(0.2),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("adam", "mse")
    swa = SWA(tmp_path, 1, bn_data=x, bn_batch_size=16)
    with pytest.warns(UserWarning, match="not settled"):
        model.fit(x, x[:, :1], epochs=4, verbose=0, callbacks=[swa])
    found = package.verify(tmp_path / "swa.keras", refresh=x)
    assert str(found).startswith("equal, with 2 statistics derived again from data: ")


def test_where_no_temporary_folder_can_be_made_that_is_one_line(
    run: Path, swa_avg: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = _refreshed(run, swa_avg, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
        ended = _verified(target, run, swa_avg)
    assert ended.code == 5
    (line,) = ended.err.splitlines()
    assert str(tmp_path / "gone") in line
