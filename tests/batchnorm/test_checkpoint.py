"""`--bn-refresh`: only the statistics in the file change, or nothing is written."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import makers
import oracle
from conftest import Ended

keras = pytest.importorskip("keras")
pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

Cli = Callable[..., Ended]
STATISTICS = {f"layers/batch_normalization{n}/vars/{i}" for n in ("", "_1") for i in (2, 3)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a trained model in every format, and its training data."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("refresh")
    digits = load_digits()
    images, labels = (digits.images / 16.0).astype("float32")[..., None], digits.target
    layers = keras.layers
    keras.utils.clear_session()  # layers are numbered over the whole process, and tests name them
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for number in (1, 2, 3):
        model.fit(images[:640], labels[:640], epochs=1, verbose=0)
        model.save(folder / f"ckpt_{number}.keras")
        model.save(folder / f"ckpt_{number}", zipped=False)
        model.save_weights(folder / f"ckpt_{number}.weights.h5")
        model.save_weights(folder / f"ckpt_{number}.weights.json", max_shard_size=0.00002)
    (folder / "model.json").write_text(model.to_json())
    for number in (1, 2, 3):  # last: once Keras has saved an .h5, it saves another optimizer in .keras
        model.load_weights(folder / f"ckpt_{number}.weights.h5")
        model.save(folder / f"ckpt_{number}.h5")
    np.savez(folder / "train.npz", x_train=images, y_train=labels)
    return folder


def _moments(path: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and biased variance of the first BatchNorm's input: of the first convolution's output."""
    kernel, bias = (oracle.read_arrays(path)[f"layers/conv2d/vars/{i}"].astype(np.float64) for i in (0, 1))
    patches = np.lib.stride_tricks.sliding_window_view(images[..., 0].astype(np.float64), (3, 3), axis=(1, 2))
    values = np.einsum("nhwij,ijc->nhwc", patches, kernel[:, :, 0]) + bias
    return values.mean((0, 1, 2)), values.var((0, 1, 2))


@pytest.mark.parametrize("options", [(), ("--model", "ckpt_3.keras"), ("--model", "model.json")], ids=str)
def test_only_the_statistics_differ_from_the_plain_average(
    options: tuple[str, ...], run: Path, swa_avg: Cli, tmp_path: Path
) -> None:
    suffixes = (".keras", "") if not options else (".weights.h5", ".weights.json")
    options = tuple(str(run / option) if "." in option else option for option in options)
    for suffix in suffixes:
        inputs = sorted(run.glob(f"ckpt_?{suffix}"))
        plain, fresh = tmp_path / f"plain{suffix}", tmp_path / f"fresh{suffix}"
        assert swa_avg(*inputs, "-o", plain, "-q").code == 0
        ended = swa_avg(*inputs, "-o", fresh, "--bn-refresh", run / "train.npz", *options)
        assert ended.code == 0, ended.err
        before, after = oracle.read_arrays(plain), oracle.read_arrays(fresh)
        assert before.keys() == after.keys()
        assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == STATISTICS
        mean, variance = _moments(plain, makers.arrays_in(run / "train.npz")["x_train"])
        np.testing.assert_allclose(after["layers/batch_normalization/vars/2"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(after["layers/batch_normalization/vars/3"], variance, rtol=1e-5)


def test_every_other_byte_of_the_archive_stays(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    inputs = sorted(run.glob("ckpt_?.keras"))
    for name, options in (("plain", ()), ("fresh", ("--bn-refresh", run / "train.npz"))):
        assert swa_avg(*inputs, "-o", tmp_path / f"{name}.keras", *options).code == 0
    with (
        zipfile.ZipFile(tmp_path / "plain.keras") as plain,
        zipfile.ZipFile(tmp_path / "fresh.keras") as fresh,
    ):
        assert plain.namelist() == fresh.namelist()
        assert fresh.testzip() is None
        assert plain.read("config.json") == fresh.read("config.json")
        before, after = (np.frombuffer(a.read("model.weights.h5"), np.uint8) for a in (plain, fresh))
        changed = 4 * 4 * 6  # bytes of two means and two variances
        assert before.shape == after.shape
        assert 0 < np.count_nonzero(before != after) <= changed
        record = json.loads(fresh.read("metadata.json"))["swa_avg"]
    assert record["batchnorm"]["samples"] == 1797
    assert record["batchnorm"]["refreshed"] == ["batch_normalization", "batch_normalization_1"]
    model = keras.models.load_model(tmp_path / "fresh.keras")
    assert model.optimizer.iterations > 0


@pytest.mark.parametrize("output", ["swa", "swa.weights.h5"])
def test_folders_at_urls_are_refreshed_as_those_on_disk_are(
    output: str, run: Path, swa_avg: Cli, tmp_path: Path
) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.store.clear()
    for path in run.glob("ckpt_?/*.*"):
        memory.pipe_file(f"/run/{path.parent.name}/{path.name}", path.read_bytes())
    options = ("--bn-refresh", run / "train.npz", "--no-verify")
    for inputs, where in (
        (run / "ckpt_?", tmp_path / output),
        ("memory://run/ckpt_?", f"memory://out/{output}"),
    ):
        ended = swa_avg(inputs, "-o", where, *options)
        assert ended.code == 0, ended.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {name: memory.cat_file(name) for name in memory.find("/out")} == {
        f"/out/{path.relative_to(tmp_path).as_posix()}": path.read_bytes() for path in files
    }
    memory.store.clear()


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_urls_are_refreshed_as_files_are(suffix: str, run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for path in run.glob("ckpt_?.keras"):
        memory.pipe_file(f"/run/{path.name}", path.read_bytes())
    options = ("--bn-refresh", run / "train.npz", "--no-verify")
    local, url = tmp_path / f"swa{suffix}", f"memory://out/swa{suffix}"
    for inputs, output in ((run / "ckpt_?.keras", local), ("memory://run/ckpt_?.keras", url)):
        ended = swa_avg(inputs, "-o", output, *options)
        assert ended.code == 0, ended.err
    assert memory.cat_file(f"/out/swa{suffix}") == local.read_bytes()
    memory.store.clear()


def test_archives_become_weights_with_fresh_statistics(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    inputs = sorted(run.glob("ckpt_?.keras"))
    for name, options in (("plain", ()), ("fresh", ("--bn-refresh", run / "train.npz"))):
        assert swa_avg(*inputs, "-o", tmp_path / f"{name}.weights.h5", *options).code == 0
    before, after = (oracle.read_arrays(tmp_path / f"{name}.weights.h5") for name in ("plain", "fresh"))
    assert {name for name in before if before[name].tobytes() != after[name].tobytes()} == STATISTICS


def test_a_full_legacy_model_is_refreshed(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    inputs = sorted(run.glob("ckpt_?.h5"))
    for name, options in (("plain", ()), ("fresh", ("--bn-refresh", run / "train.npz"))):
        ended = swa_avg(*inputs, "-o", tmp_path / f"{name}.h5", *options)
        assert ended.code == 0, ended.err
    before, after = (oracle.read_arrays(tmp_path / f"{name}.h5") for name in ("plain", "fresh"))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert len(changed) == 4
    assert all("moving_" in name for name in changed)


def test_one_checkpoint_alone_is_refreshed_and_reported(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    ended = swa_avg(run / "ckpt_3.keras", "-o", tmp_path / "one.keras", "--bn-refresh", run / "train.npz")
    assert ended.code == 0
    lines = ended.err.splitlines()
    assert (
        lines[0]
        == "BatchNorm: used x_train float32[1797, 8, 8, 1] for "
        + keras.models.load_model(run / "ckpt_3.keras").inputs[0].name
    )
    assert lines[1] == "BatchNorm: ignored y_train int64[1797]"
    assert "BatchNorm statistics are averaged" not in ended.err
    assert lines[-1].startswith("wrote ")
    again = swa_avg(
        run / "ckpt_3.keras", "-o", tmp_path / "two.keras", "--bn-refresh", run / "train.npz", "--json"
    )
    assert json.loads(again.out)["refresh"]["samples"] == 1797
    assert (tmp_path / "one.keras").read_bytes() == (tmp_path / "two.keras").read_bytes()


def test_nothing_is_written_when_the_refresh_fails(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    images = makers.arrays_in(run / "train.npz")["x_train"].copy()
    images[7, 0, 0, 0] = np.nan
    np.savez(bad, x_train=images)
    text = tmp_path / "text.npz"
    text.write_text("no archive")
    out = tmp_path / "out"
    out.mkdir()
    existing = out / "swa.keras"
    existing.write_bytes(b"old")
    for data, code, problem in (
        (bad, 3, "NaN"),
        (text, 3, "text.npz"),
        (tmp_path / "none.npz", 3, "none.npz"),
        ("nope:f", 2, "nope"),
    ):
        ended = swa_avg(
            *sorted(run.glob("ckpt_?.keras")), "-o", existing, "--overwrite", "--bn-refresh", data
        )
        assert ended.code == code, ended.err
        assert ended.err.count("\n") == 1
        assert problem in ended.err
        assert [path.name for path in out.iterdir()] == ["swa.keras"]
        assert existing.read_bytes() == b"old"


def test_weights_alone_need_the_model(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    ended = swa_avg(
        run / "ckpt_3.weights.h5", "-o", tmp_path / "swa.weights.h5", "--bn-refresh", run / "train.npz"
    )
    assert ended.code == 2
    assert ended.err == (
        "swa-avg: error: ckpt_3.weights.h5 holds weights alone: --bn-refresh needs --model, a .keras file, a JSON "
        "configuration or MODULE:FUNCTION\n"
    )


def test_code_in_a_checkpoint_does_not_run(run: Path, swa_avg: Cli, tmp_path: Path) -> None:
    inputs = keras.Input((2,))
    outputs = keras.layers.BatchNormalization()(keras.layers.Lambda(lambda x: x * 2)(inputs))
    for suffix in (".keras", ".h5"):
        keras.Model(inputs, outputs).save(tmp_path / f"lambda{suffix}")
        np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((8, 2)).astype("float32"))
        arguments = (
            tmp_path / f"lambda{suffix}",
            "-o",
            tmp_path / f"swa{suffix}",
            "--bn-refresh",
            tmp_path / "data.npz",
        )
        ended = swa_avg(*arguments)
        assert (ended.code, ended.err) == (
            2,
            f"swa-avg: error: lambda{suffix} holds a Lambda layer, which is code: add --unsafe if you trust who wrote it\n",
        )
        assert swa_avg(*arguments, "--unsafe").code == 0
