"""`swa-avg inspect`: what it says, what it measures, how it ends."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import makers
import oracle
from conftest import CORPUS, Ended
from swa_avg import inspect_checkpoints
from swa_avg.inspection.wording import warnings

Cli = Callable[..., Ended]
PLOT = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def _near(seed: int, start: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Return a checkpoint close to that of `start`."""
    one, other = makers.weights(start, dtype), makers.weights(seed + 1, dtype)
    return {
        name: value if name.startswith("optimizer") else (value + 0.05 * other[name]).astype(dtype)
        for name, value in one.items()
    }


def _row(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return all averaged values as one float64 vector."""
    return np.concatenate(
        [oracle.widen(v).ravel() for n, v in sorted(arrays.items()) if "optimizer" not in n]
    )


def _distances(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([[np.linalg.norm(one - other) for other in rows] for one in rows])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with ckpt_1 to ckpt_5, all .keras, of one run."""
    monkeypatch.chdir(tmp_path)
    for number in range(1, 6):
        makers.write_archive(Path(f"ckpt_{number}.keras"), _near(number))
    return tmp_path


def test_it_says_what_is_inside_and_how_far_apart(
    swa_avg: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, value in ((1, 1.0), (2, 2.0), (4, 6.0)):
        arrays = {
            "layers/dense/vars/0": np.full((2, 2), value, "f4"),
            "optimizer/vars/0": np.zeros(100, "f4"),
        }
        makers.write_archive(Path(f"ckpt_{number}.keras"), arrays)
    size = zipfile.ZipFile("ckpt_1.keras").getinfo("model.weights.h5").file_size
    ended = swa_avg("inspect", "ckpt_*.keras")
    assert ended.err == (
        "tensors  parameters    types  weights    optimizer  BatchNorm layers          format        writer  checkpoints\n"
        f"      1           4  float32     16 B  400 B ({round(40000 / size)} %)                 1  .keras archive  Keras 3.15.1  3: ckpt_1.keras to ckpt_4.keras\n"
        "\n"
        "epoch  coefficient     size  norm  step  turn  to average  similarity  checkpoint\n"
        f"    1       0.3333  {size / 1024:.1f} KiB     2                       4       1.000  ckpt_1.keras\n"
        f"    2       0.3333  {size / 1024:.1f} KiB     4     2    0°           2       1.000  ckpt_2.keras\n"
        f"    4       0.3333  {size / 1024:.1f} KiB    12     8                 6       1.000  ckpt_4.keras\n"
        "\n"
        "they fit together; tensors averaged: 1, copied: 1\n"
        "distances: 2 (ckpt_1.keras, ckpt_2.keras) to 10 (ckpt_1.keras, ckpt_4.keras)\n"
        "the uniform average has norm 6, lies 6 from ckpt_4.keras, and is worth 3 equally weighted checkpoints\n"
        "all are related, as those of one run are (similarity to the nearest 1.000 or more)\n"
    )
    assert ended.code == 0
    assert ended.out == ""


def test_checkpoints_of_two_folders_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for run in ("a", "b"):
        Path(run).mkdir()
        basin = rng.standard_normal((20, 20))
        for epoch in (1, 2):
            kernel = (basin + 0.01 * rng.standard_normal((20, 20))).astype("f4")
            makers.write_archive(Path(f"{run}/ckpt_{epoch}.keras"), {"layers/dense/vars/0": kernel})
    ended = swa_avg("inspect", "a/*.keras", "b/*.keras")
    assert "2 groups that are unrelated" in ended.err
    assert "as if of 2 runs: a/ckpt_1.keras, a/ckpt_2.keras; b/ckpt_1.keras, b/ckpt_2.keras;" in ended.err
    assert "4: a/ckpt_1.keras to b/ckpt_2.keras\n" in ended.err
    assert re.search(r"distances: [0-9.]+ \((\w)/ckpt_1.keras, \1/ckpt_2.keras\) to ", ended.err)


def test_constants_that_are_not_finite_have_no_part_in_distances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, value in ((1, 1.0), (2, 2.0), (4, 6.0)):
        arrays = {
            "layers/dense/vars/0": np.full((2, 2), value, "f4"),
            "layers/mask/vars/0": np.array([[0.0, -np.inf, np.nan]], "f4"),
        }
        makers.write_archive(Path(f"ckpt_{number}.keras"), arrays)
    ended = swa_avg("inspect", "ckpt_*.keras")
    assert ended.code == 0
    assert "they fit together; tensors averaged: 1, copied: 1\n" in ended.err
    assert "distances: 2 (ckpt_1.keras, ckpt_2.keras) to 10 (ckpt_1.keras, ckpt_4.keras)\n" in ended.err
    told = "warning: NaN or infinity, the same in all checkpoints, is copied (layers/mask/vars/0)\n"
    assert told in ended.err
    assert told in swa_avg("ckpt_*.keras").err


@pytest.mark.parametrize(
    ("dataset", "suffix", "dtype"),
    [
        ("keras-3.3.3-tf/cnn_bn", ".keras", None),
        ("keras-3.3.3-tf/cnn_bn", ".weights.h5", None),
        ("tf-2.12.1/cnn_bn", ".h5", None),
        ("tf-2.12.1/cnn_bn", "_weights.h5", None),
        ("tf_keras-2.21.0/policy_bfloat16", ".keras", None),
        ("tf_keras-2.21.0/policy_bfloat16", "_weights.h5", "bfloat16"),
    ],
)
def test_distances_of_real_files_equal_numpy(dataset: str, suffix: str, dtype: str | None) -> None:
    paths = [CORPUS / dataset / f"ck{n}{suffix}" for n in (1, 2, 3)]
    inspection = inspect_checkpoints(paths, dtype=dtype)
    rows = []
    for path in paths:
        arrays = oracle.read_arrays(path)
        rows.append(
            np.concatenate([oracle.widen(arrays[n]).ravel() for n in inspection.treatments["averaged"]])
        )
    assert len(rows[0]) == sum(inspection.checkpoints[0].dtypes.values())
    geometry = inspection.geometry
    assert geometry is not None
    mean = sum(rows) / 3
    np.testing.assert_allclose(geometry.distances, _distances(rows), rtol=1e-9)
    np.testing.assert_allclose(geometry.to_mean, [np.linalg.norm(row - mean) for row in rows], rtol=1e-9)
    np.testing.assert_allclose(geometry.norms, [np.linalg.norm(row) for row in rows], rtol=1e-12)
    assert inspection.outliers == ()


@pytest.mark.parametrize(
    ("file", "writer"),
    [
        ("tf-2.12.1/cnn_bn/ck1.h5", "Keras 2.12.0 with tensorflow"),
        ("tf-2.12.1/cnn_bn/ck1_weights.h5", "Keras 2.12.0 with tensorflow"),
        ("keras-3.3.3-tf/cnn_bn/ck1.h5", "Keras 3.3.3 with tensorflow"),
        ("keras-3.3.3-tf/cnn_bn/ck1.keras", "Keras 3.3.3"),
        ("keras-3.3.3-tf/cnn_bn/ck1.weights.h5", None),
    ],
)
def test_the_writer_is_what_the_file_says(file: str, writer: str | None) -> None:
    assert inspect_checkpoints(CORPUS / file).checkpoints[0].writer == writer


def test_verbose_lists_tensors_and_distances(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2, 5):
        arrays = {"layers/dense/vars/0": np.full((2, 2), number, "f4"), "optimizer/vars/0": np.float32(0)}
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    lines = swa_avg("inspect", tmp_path / "*.weights.h5", "-v").err.splitlines()
    start = lines.index("distances, by epoch")
    assert lines[start + 1 : -5] == [
        "1  2  5",
        "0  2  8  1",
        "2  0  6  2",
        "8  6  0  5",
        "",
        "averaged: 1 tensor",
        "  layers/dense/vars/0",
        "",
        "compared: 0 tensors",
        "",
        "copied: 1 tensor",
        "  optimizer/vars/0",
        "",
        "BatchNorm layers: none",
    ]


@pytest.mark.parametrize("write", [makers.write_weights, makers.write_sharded])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_distances_do_not_depend_on_format_type_or_layout(
    write: Callable[[Path, makers.Arrays], Path], dtype: str, tmp_path: Path
) -> None:
    inputs = [_near(n, dtype=dtype) for n in range(4)]
    inputs[1] = {"layers/another/vars/0": np.zeros(3, dtype)} | inputs[1]
    for arrays in (inputs[0], *inputs[2:]):  # of another order, so that offsets differ
        arrays["layers/another/vars/0"] = np.ones(3, dtype)
    suffix = ".weights.json" if write is makers.write_sharded else ".weights.h5"
    paths = [write(tmp_path / f"ckpt_{n}{suffix}", arrays) for n, arrays in enumerate(inputs)]
    geometry = inspect_checkpoints(paths).geometry
    assert geometry is not None
    np.testing.assert_allclose(geometry.distances, _distances([_row(arrays) for arrays in inputs]), rtol=1e-9)


def test_many_blocks_give_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [
        {"layers/dense/vars/0": np.random.default_rng(n).standard_normal((300, 50)).astype("f4")}
        for n in range(3)
    ]
    paths = [makers.write_weights(tmp_path / f"{n}.weights.h5", arrays) for n, arrays in enumerate(inputs)]
    monkeypatch.setattr("swa_avg.inspection.survey._MEMORY", 0)
    geometry = inspect_checkpoints(paths).geometry
    assert geometry is not None
    np.testing.assert_allclose(geometry.distances, _distances([_row(arrays) for arrays in inputs]), rtol=1e-9)


def test_a_method_is_told_with_its_average(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("inspect", "ckpt_*.keras", "--last", "3", "--method", "ema:.5", "--json")
    result = json.loads(ended.out)
    coefficients = [0.25, 0.25, 0.5]
    assert [entry["coefficient"] for entry in result["checkpoints"]] == coefficients
    rows = np.array([_row(_near(n)) for n in (3, 4, 5)])
    expected = np.linalg.norm(rows - np.array(coefficients) @ rows, axis=1)
    np.testing.assert_allclose(result["geometry"]["to_mean"], expected, rtol=1e-9)
    assert result["geometry"]["effective_count"] == pytest.approx(1 / (0.0625 + 0.0625 + 0.25))
    assert "the ema:0.5 average has norm" in ended.err


def test_json_holds_all_of_it(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("inspect", "ckpt_*.keras", "--json", "-q")
    assert ended.err == ""
    result = json.loads(ended.out)
    assert result["fit"] is True
    assert result["findings"] == []
    first = result["checkpoints"][0]
    assert first == {
        "path": "ckpt_1.keras",
        "kind": ".keras archive",
        "writer": "Keras 3.15.1",
        "size": first["size"],
        "tensors": 6,
        "parameters": 60,
        "dtypes": {"float32": 60},
        "weight_bytes": 240,
        "optimizer_bytes": 8 + 4 + 140,
        "optimizer_share": 152 / first["size"],
        "batchnorm_layers": ["bn"],
        "is_average": False,
        "epoch": 1,
        "learning_rate": None,
        "metrics": {},
        "coefficient": 0.2,
    }
    assert len(result["tensors"]["averaged"]) == 6
    geometry = result["geometry"]
    rows = [_row(_near(n)) for n in range(1, 6)]
    np.testing.assert_allclose(geometry["distances"], _distances(rows), rtol=1e-9)
    assert geometry["checkpoints"] == [0, 1, 2, 3, 4]
    assert geometry["outliers"] == []
    assert np.shape(geometry["plane"]["points"]) == (5, 2)


def test_a_planted_checkpoint_is_named(folder: Path, swa_avg: Cli) -> None:
    makers.write_archive(Path("ckpt_3.keras"), makers.weights(99))
    ended = swa_avg("inspect", "ckpt_*.keras")
    assert ended.code == 0
    (line,) = (line for line in ended.err.splitlines() if line.startswith("warning"))
    assert line.startswith("warning: outlier: ckpt_3.keras lies in another basin than the other checkpoints ")
    assert json.loads(swa_avg("inspect", "ckpt_*.keras", "--json").out)["geometry"]["outliers"] == [
        "ckpt_3.keras"
    ]


def test_two_runs_that_are_mixed_are_said_to_be_two(folder: Path, swa_avg: Cli) -> None:
    for number in (4, 5):
        makers.write_archive(Path(f"ckpt_{number}.keras"), _near(number, start=50))
    assert swa_avg("inspect", "ckpt_*.keras").err.splitlines()[-1] == (
        "warning: 2 groups that are unrelated to each other, as if of 2 runs: ckpt_1.keras, ckpt_2.keras, ckpt_3.keras; "
        "ckpt_4.keras, ckpt_5.keras; average each by itself"
    )


def test_strangers_and_averages_are_warned_of(folder: Path, swa_avg: Cli) -> None:
    makers.write_archive(Path("other.keras"), makers.weights(77))
    assert swa_avg("inspect", "ckpt_1.keras", "other.keras").err.splitlines()[-1] == (
        "warning: no two of the 2 checkpoints are related (similarity below 0.51): each lies in a basin of its own, "
        "and an average is meaningless"
    )
    swa_avg("ckpt_*.keras", "-o", "swa.keras")
    assert (
        "warning: swa.keras is itself an average that swa-avg wrote\n" in swa_avg("inspect", "swa.keras").err
    )


def test_one_checkpoint_is_told_without_distances(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("inspect", "ckpt_3.keras")
    assert ended.code == 0
    assert ended.err.count("\n") == 5
    assert json.loads(swa_avg("inspect", "ckpt_3.keras", "--json").out)["geometry"] is None


def test_every_mismatch_is_named_after_what_is_inside(folder: Path, swa_avg: Cli) -> None:
    arrays = _near(2)
    arrays["layers/dense/vars/0"] = np.zeros((7, 6), "f4")
    del arrays["layers/dense/vars/1"]
    makers.write_archive(Path("ckpt_2.keras"), arrays)
    makers.write_weights(Path("ckpt_3.keras"), _near(3))
    ended = swa_avg("inspect", "ckpt_*.keras", "--json")
    assert ended.code == 4
    errors = [
        "ckpt_2.keras: layers/dense/vars/0: expected float32[7, 5] as in ckpt_5.keras, found float32[7, 6]",
        "ckpt_2.keras: layers/dense/vars/1: missing; ckpt_5.keras has it as float32[5]",
        "ckpt_3.keras: format: is a Keras weights; ckpt_5.keras is a .keras archive",
    ]
    assert ended.err.splitlines()[-4:] == [
        "cannot be averaged: 3 findings",
        *(f"swa-avg: error: {e}" for e in errors),
    ]
    result = json.loads(ended.out)
    assert not result["fit"]
    assert [f"{f['path']}: {f['subject']}: {f['problem']}" for f in result["findings"]] == errors
    assert [entry["parameters"] for entry in result["checkpoints"]] == [60, 62, 60, 60, 60]


def test_values_that_are_not_finite_are_named_and_the_rest_is_shown(folder: Path, swa_avg: Cli) -> None:
    arrays = _near(2)
    arrays["layers/dense/vars/1"][3] = np.nan
    makers.write_archive(Path("ckpt_2.keras"), arrays)
    ended = swa_avg("inspect", "ckpt_*.keras", "--json")
    assert ended.code == 4
    assert ended.err.splitlines()[-1] == (
        "swa-avg: error: ckpt_2.keras: layers/dense/vars/1: holds NaN or infinity; leave this checkpoint out"
    )
    geometry = json.loads(ended.out)["geometry"]
    assert geometry["checkpoints"] == [0, 2, 3, 4]
    rows = [_row(_near(n)) for n in (1, 3, 4, 5)]
    np.testing.assert_allclose(geometry["distances"], _distances(rows), rtol=1e-9)
    np.testing.assert_allclose(
        geometry["to_mean"], [np.linalg.norm(r - sum(rows) / 4) for r in rows], rtol=1e-9
    )


def test_integers_that_differ_are_named(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2):
        arrays = {**_near(number), "layers/lookup/vars/0": np.arange(6) + number // 2}
        makers.write_weights(tmp_path / f"{number}.weights.h5", arrays)
    ended = swa_avg("inspect", tmp_path / "*.weights.h5")
    assert ended.code == 4
    assert ended.err.splitlines()[-1] == (
        f"swa-avg: error: {tmp_path}/2.weights.h5: layers/lookup/vars/0: holds integers that differ from 1.weights.h5, "
        "and is not a counter"
    )


def test_the_same_bytes_twice_do_not_fit(folder: Path, swa_avg: Cli) -> None:
    Path("ckpt_9.keras").write_bytes(Path("ckpt_1.keras").read_bytes())
    ended = swa_avg("inspect", "ckpt_*.keras")
    assert ended.code == 4
    assert ended.err.endswith(
        "swa-avg: error: ckpt_9.keras: weights: the same bytes as ckpt_1.keras; name one of the two\n"
    )


def test_the_same_weights_under_two_names_are_warned_of(tmp_path: Path, swa_avg: Cli) -> None:
    for number, seed in ((1, 1), (2, 2), (3, 2)):
        makers.write_weights(tmp_path / f"{number}.weights.h5", _near(seed))
    ended = swa_avg("inspect", tmp_path / "*.weights.h5")
    assert ended.code == 0
    assert ended.err.splitlines()[-1] == (
        "warning: the same weights under two names: 2.weights.h5 and 3.weights.h5"
    )


def test_squares_that_overflow_leave_out_the_distances(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2):
        makers.write_weights(
            tmp_path / f"{number}.weights.h5", {"layers/dense/vars/0": np.full((2, 2), number * 1e200)}
        )
    ended = swa_avg("inspect", tmp_path / "*.weights.h5")
    assert ended.code == 0
    assert ended.err.splitlines()[-1] == "warning: no distances: their squares do not fit into float64"


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["none.keras"], 3, "none.keras: no such file"),
        (["damaged.keras"], 3, "damaged.keras: damaged .keras archive (File is not a zip file)"),
        (["ckpt_*.keras", "--last", "9"], 2, "last is 9, but found only 5 checkpoints"),
        (
            ["ckpt_*.keras", "--method", "weights:1,2"],
            2,
            "method 'weights:1,2': expected 5 numbers, one per checkpoint, found 2",
        ),
        (
            ["ckpt_*.keras", "--plot", "a.jpg"],
            2,
            "plot a.jpg: expected a name that ends with .png or .svg or .pdf",
        ),
        (["ckpt_*.keras", "--report", "a.pdf"], 2, "report a.pdf: expected a name that ends with .html"),
        (["ckpt_*.keras", "--report", "no/a.html"], 2, "the folder of the output does not exist: no"),
        (
            ["ckpt_*.keras", "--report", "old.html"],
            2,
            "the output old.html exists; name another one, or overwrite it",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], code: int, line: str, folder: Path, swa_avg: Cli
) -> None:
    Path("damaged.keras").write_bytes(b"PK\3\4" + bytes(100))
    Path("old.html").write_text("mine")
    ended = swa_avg("inspect", *arguments)
    assert (ended.code, ended.err, ended.out) == (code, f"swa-avg: error: {line}\n", "")
    assert Path("old.html").read_text() == "mine"


def test_without_matplotlib_pictures_are_refused_before_anything_is_read(folder: Path) -> None:
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom swa_avg.cli.program import main\n"
        "sys.argv = ['swa-avg', 'inspect', 'ckpt_*.keras', *sys.argv[1:]]\nmain()"
    )
    for option, output in (("--plot", "out.png"), ("--report", "out.html")):
        command = [sys.executable, "-c", code, option, output]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (
            ended.stderr
            == f"swa-avg: error: {option[2:]} {output}: needs matplotlib; pip install 'swa-avg[plot]'\n"
        )
        assert ended.returncode == 2
        assert not Path(output).exists()
    command = [sys.executable, "-c", code, "--quiet"]
    assert subprocess.run(command, check=False).returncode == 0


@PLOT
def test_outputs_replace_others_only_when_told_to(folder: Path, swa_avg: Cli) -> None:
    options = ("inspect", "ckpt_*.keras", "--plot", "out.png", "--report", "out.html")
    ended = swa_avg(*options)
    assert ended.err.endswith("\nwrote out.png\nwrote out.html\n")
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert Path("out.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert swa_avg(*options).code == 2
    Path("out.png").write_bytes(b"")
    assert swa_avg(*options, "--overwrite").code == 0
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in folder.iterdir()) == [".html", *[".keras"] * 5, ".png"]


def test_loading_nothing_heavy(
    folder: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = (
        "import sys\nfrom swa_avg.cli.program import main\nsys.argv[1:1] = ['inspect']\ntry:\n    main()\n"
        "except SystemExit:\n    print(sorted({'keras', 'tensorflow', 'matplotlib'} & set(sys.modules)))"
    )
    assert run_python(code, "ckpt_*.keras").stdout == "[]\n"


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize("schedule", ["constant", "cyclic", "decaying"])
def test_ordinary_runs_raise_no_alarm_and_another_start_does(schedule: str, tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    datasets = pytest.importorskip("sklearn.datasets")
    from swa_avg.callbacks import CheckpointSaver

    digits = datasets.load_digits()
    images, labels = (digits.images / 16.0).astype("f4")[..., None], digits.target
    rates = {
        "constant": lambda epoch: 0.1,
        "cyclic": lambda epoch: (0.3, 0.1, 0.003)[epoch % 3],
        "decaying": lambda epoch: 0.3 * 0.5**epoch,
    }

    def fit(folder: Path, seed: int, epochs: int) -> None:
        keras.utils.set_random_seed(seed)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(8, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Conv2D(16, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.GlobalAveragePooling2D(),
                layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        callbacks = [keras.callbacks.LearningRateScheduler(rates[schedule]), CheckpointSaver(folder)]
        model.fit(images, labels, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)

    fit(tmp_path / "run", 1, 10)
    fit(tmp_path / "other", 2, 2)
    run = sorted((tmp_path / "run").glob("*.keras"))
    inspection = inspect_checkpoints(run)
    assert len(inspection.checkpoints) == 10
    assert warnings(inspection) == []
    assert warnings(inspect_checkpoints([run[0], run[-2], run[-1]])) == []  # an early one, and two late ones
    for number in (1, 2):
        stranger = tmp_path / "other" / f"ckpt_{number:04}.keras"
        assert [c.path for c in inspect_checkpoints([*run, stranger]).outliers] == [stranger]
    mixed = inspect_checkpoints([*run, *sorted((tmp_path / "other").glob("*.keras"))])
    assert [len(group) for group in mixed.groups] == [10, 2]
