"""`swa-avg sweep`: scores as Keras gives them by hand, and a winner with the bytes that averaging alone writes."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import makers
import oracle
from conftest import Ended
from swa_avg import Refresh, SwaAvgWarning, Validation, average, sweep
from swa_avg.batchnorm import Loading
from swa_avg.errors import UsageError

keras = pytest.importorskip("keras")
pytestmark = [pytest.mark.keras, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

Cli = Callable[..., Ended]
NUMBERS = (1, 2, 3, 4)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype("float32")[..., None], digits.target


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four checkpoints of a model that is still learning, in every format, with training and validation data."""
    folder = tmp_path_factory.mktemp("sweep")
    images, labels = _digits()
    layers = keras.layers
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(6, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=["accuracy"])
    for number in NUMBERS:
        model.fit(images[:500], labels[:500], epochs=1, verbose=0)
        model.save(folder / f"ckpt_{number}.keras")
        model.save(folder / f"ckpt_{number}", zipped=False)
        model.save_weights(folder / f"ckpt_{number}.weights.h5")
        model.save_weights(folder / f"ckpt_{number}.weights.json", max_shard_size=0.000001)
    for number in NUMBERS:  # last: once Keras has saved an .h5, it saves another optimizer in .keras
        model.load_weights(folder / f"ckpt_{number}.weights.h5")
        model.save(folder / f"ckpt_{number}.h5")
    np.savez(folder / "train.npz", x_train=images[:500], y_train=labels[:500])
    np.savez(folder / "val.npz", x_val=images[500:800], y_val=labels[500:800])
    (folder / "elsewhere.py").write_text(
        "import numpy as np\n"
        "def error(targets, predictions):\n    return float(np.mean(predictions.argmax(1) != targets))\n"
        "def none(targets, predictions):\n    return None\n"
        "def nan(targets, predictions):\n    return float('nan')\n"
        "def batches():\n"
        "    with np.load('val.npz') as file:\n        data = dict(file)\n"
        "    return ((data['x_val'][i : i + 70], data['y_val'][i : i + 70]) for i in range(0, 300, 70))\n"
    )
    return folder


@pytest.fixture
def here(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of its own with what `run` holds."""
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).hardlink_to(path)
        elif (path / "config.json").exists():
            shutil.copytree(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


@cache
def _weights(inode: int) -> list[np.ndarray]:
    """Return the weights of the checkpoint in the current folder that is this file."""
    (path,) = (path for path in Path().glob("ckpt_*.keras") if path.stat().st_ino == inode)
    return keras.models.load_model(path).get_weights()


def _by_hand(coefficients: list[float], *, refreshed: bool) -> dict[str, float]:
    """Return what Keras says of the average that these coefficients make of the `.keras` files."""
    from swa_avg import refresh_batchnorm

    train, val = makers.arrays_in("train.npz"), makers.arrays_in("val.npz")
    weights = [_weights(Path(f"ckpt_{number}.keras").stat().st_ino) for number in NUMBERS]
    model = keras.models.load_model("ckpt_1.keras")
    model.set_weights(
        [
            sum(c * array.astype(np.float64) for c, array in zip(coefficients, arrays, strict=True)).astype(
                np.float32
            )
            for arrays in zip(*weights, strict=True)
        ]
    )
    if refreshed:
        refresh_batchnorm(model, train["x_train"])
    return model.evaluate(val["x_val"], val["y_val"], verbose=0, return_dict=True)


@pytest.mark.parametrize("refreshed", [False, True])
def test_every_score_is_what_keras_gives_by_hand(refreshed: bool, here: Path, swa_avg: Cli) -> None:
    options = ("--bn-refresh", "train.npz") if refreshed else ()
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz", "-o", "swa.keras", "--json", *options)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["monitor"], report["mode"], report["rows"]) == ("accuracy", "max", 300)
    assert [single["name"] for single in report["singles"]] == [f"ckpt_{number}.keras" for number in NUMBERS]
    assert [average["name"] for average in report["averages"]] == [
        "last:2",
        "uniform",
        "power-ema:0.05",
        "power-ema:0.1",
        "power-ema:0.2",
        "greedy",
    ]
    scored = [*report["singles"], *report["averages"]]
    for candidate in scored:
        expected = _by_hand(candidate["coefficients"], refreshed=refreshed)
        assert candidate["metrics"] == pytest.approx(expected, rel=1e-4), candidate["name"]
    assert (
        len({candidate["metrics"]["loss"] for candidate in scored}) >= 8
    )  # the pass over one is not another's
    best = max(candidate["metrics"]["accuracy"] for candidate in scored)
    winner = next(candidate for candidate in scored if candidate["name"] == report["winner"])
    assert winner["metrics"]["accuracy"] == best
    written = keras.models.load_model("swa.keras")
    val = makers.arrays_in("val.npz")
    assert written.evaluate(val["x_val"], val["y_val"], verbose=0, return_dict=True) == pytest.approx(
        winner["metrics"], rel=1e-4
    )
    assert ("warning: BatchNorm statistics are averaged, not re-estimated" in ended.err) != refreshed


def _contents(path: Path) -> dict[str, object]:
    """Return an archive's members, without the record of how it was made."""
    with zipfile.ZipFile(path) as archive:
        members: dict[str, object] = {name: archive.read(name) for name in archive.namelist()}
        metadata = json.loads(archive.read("metadata.json"))
    del metadata["swa_avg"]
    return members | {"metadata.json": metadata}


@pytest.mark.parametrize(
    "refresh", [(), ("--bn-refresh", "train.npz", "--bn-samples", "300")], ids=["plain", "refresh"]
)
@pytest.mark.parametrize(
    ("candidate", "alone"),
    [
        ("last:2", ("--last", "2")),
        ("best:3", ("--best", "3")),
        ("uniform", ()),
        ("power-ema:0.1", ("--method", "power-ema:0.1")),
        ("ema:0.5", ("--method", "ema:0.5", "--optimizer", "drop")),
    ],
)
def test_the_winner_has_the_bytes_that_averaging_alone_writes(
    candidate: str, alone: tuple[str, ...], refresh: tuple[str, ...], here: Path, swa_avg: Cli
) -> None:
    extra = ("--optimizer", "drop") if "drop" in alone else ()
    Path("log.csv").write_text("epoch,val_loss\n0,4\n1,2\n2,3\n3,1\n")
    # Scored such that an average wins: the smaller, the more checkpoints.
    (here / "more.py").write_text(
        "calls = []\ndef later(targets, predictions):\n    calls.append(1)\n    return -len(calls)\n"
    )
    ended = swa_avg(
        *("sweep", "ckpt_*.keras", "--val", "val.npz", "-o", "swept.keras", "--candidates", candidate),
        *("--metric", "more:later", "--mode", "min", *extra, *refresh),
    )
    assert ended.code == 0, ended.err
    assert swa_avg("ckpt_*.keras", "-o", "alone.keras", *alone, *refresh).code == 0
    assert _contents(Path("swept.keras")) == _contents(Path("alone.keras"))
    assert swa_avg("verify", "swept.keras").code == 0


def test_a_greedy_soup_has_the_bytes_of_averaging_its_files_alone(here: Path, swa_avg: Cli) -> None:
    ended = swa_avg(
        "sweep", "ckpt_*.keras", "--val", "val.npz", "--candidates", "greedy", "--monitor", "loss", "--json"
    )
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    (greedy,) = report["averages"]
    files = [f"ckpt_{n}.keras" for n, c in zip(NUMBERS, greedy["coefficients"], strict=True) if c]
    assert len(files) >= 2
    assert report["mode"] == "min"
    assert greedy["metrics"]["loss"] <= min(single["metrics"]["loss"] for single in report["singles"])
    assert report["winner"] == "greedy"
    assert swa_avg(*files, "-o", "alone.keras").code == 0
    assert _contents(Path("swa.keras")) == _contents(Path("alone.keras"))


def test_the_best_by_the_metrics_of_training_are_a_candidate(here: Path, swa_avg: Cli) -> None:
    Path("log.csv").write_text("epoch,val_accuracy,accuracy\n0,1,0\n1,2,0\n2,4,9\n3,1,9\n")
    swept = ("sweep", "ckpt_*.keras", "--val", "val.npz", "-o", "swept.keras")
    ended = swa_avg(*swept, "--monitor", "accuracy", "--candidates", "best:3", "--json")
    assert ended.code == 0, ended.err
    assert "best:K goes by val_accuracy (max) from log.csv" in ended.err.splitlines()
    (average,) = json.loads(ended.out)["averages"]
    assert (average["name"], average["coefficients"]) == ("best:3", [0.0, 1 / 3, 1 / 3, 1 / 3])
    named = "best needs monitor, a metric of ckpt_1.keras: val_accuracy (1), accuracy (0)"
    _line(swa_avg(*swept, "--overwrite", "--candidates", "best:3"), 2, named)
    _line(swa_avg(*swept, "--overwrite", "--metrics", "log.csv"), 2, "metrics goes with a candidate best:K")


def test_the_soup_accepts_what_recipe_1_accepts_by_hand(here: Path, swa_avg: Cli) -> None:
    ended = swa_avg(
        "sweep", "ckpt_*.keras", "--val", "val.npz", "--candidates", "greedy", "--monitor", "loss", "--json"
    )
    (greedy,) = json.loads(ended.out)["averages"]

    def loss(accepted: list[int]) -> float:
        return _by_hand([1 / len(accepted) if n in accepted else 0.0 for n in range(4)], refreshed=False)[
            "loss"
        ]

    ranked = sorted(range(4), key=lambda number: loss([number]))
    accepted = ranked[:1]
    for number in ranked[1:]:
        if loss([*accepted, number]) <= loss(accepted):
            accepted.append(number)
    assert {n for n, c in enumerate(greedy["coefficients"]) if c} == set(accepted)


def test_the_output_says_what_it_beat(here: Path, swa_avg: Cli) -> None:
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz", "--monitor", "loss", "--json")
    report = json.loads(ended.out)
    with zipfile.ZipFile("swa.keras") as archive:
        record = json.loads(archive.read("metadata.json"))["swa_avg"]
    assert record["method"] == report["winner"]
    sweep = record["sweep"]
    assert (sweep["monitor"], sweep["mode"], sweep["data"], sweep["rows"]) == ("loss", "min", "val.npz", 300)
    assert sweep["best_single"] == report["best_single"]
    scores = {c["name"]: c["metrics"]["loss"] for c in (*report["singles"], *report["averages"])}
    assert sweep["candidates"] == pytest.approx(scores, rel=1e-5)
    assert len(sweep["digest"]) == 64
    first = Path("swa.keras").read_bytes()
    swa_avg(
        "sweep",
        "ckpt_*.keras",
        "--val",
        "val.npz",
        "--monitor",
        "loss",
        "-o",
        "again.keras",
        "--threads",
        "1",
    )
    assert Path("again.keras").read_bytes() == first


def test_the_examples_of_every_help_text_run(here: Path, swa_avg: Cli) -> None:
    pytest.importorskip("matplotlib")
    from swa_avg.cli.program import main_group

    model, rng = keras.models.load_model("ckpt_4.keras"), np.random.default_rng(0)
    for number in range(5, 11):
        model.set_weights([w + 0.001 * np.abs(rng.standard_normal(w.shape)) for w in model.get_weights()])
        model.save(f"ckpt_{number}.keras")
    Path("run").mkdir()
    entries = [{"file": f"ckpt_{number}.keras", "epoch": number} for number in range(1, 11)]
    index = {"version": 1, "monitor": None, "mode": None, "checkpoints": entries}
    Path("run/checkpoints.json").write_text(json.dumps(index))
    for entry in entries:
        Path("run", entry["file"]).hardlink_to(entry["file"])
    examples = [example.split() for command in main_group.commands.values() for example in command.examples]
    assert len(examples) == 8  # two of each
    for program, *arguments in examples:
        assert program == "swa-avg"
        if "-o" in arguments:
            Path(arguments[arguments.index("-o") + 1]).unlink(missing_ok=True)
        ended = swa_avg(*arguments)
        assert ended.code == 0, (arguments, ended.err)


def test_without_an_improvement_nothing_is_written(here: Path, swa_avg: Cli) -> None:
    """By a metric that gets worse with every call, the first checkpoint is best."""
    (here / "falling.py").write_text(
        "calls = []\ndef score(targets, predictions):\n    calls.append(1)\n    return float(len(calls))\n"
    )
    before = _names(here)
    command = ("sweep", "ckpt_*.keras", "--val", "val.npz", "--metric", "falling:score", "--mode", "min")
    ended = swa_avg(*command, "--require-improvement", "--json")
    assert ended.code == 4
    assert ended.err.splitlines()[-1] == (
        "swa-avg: error: no average beats the best single checkpoint: ckpt_1.keras has falling:score 1, last:2 has "
        "5; nothing was written"
    )
    assert json.loads(ended.out)["written"] is False
    assert _names(here) == before
    ended = swa_avg(*command)
    assert ended.code == 0
    assert ended.err.endswith(
        "warning: BatchNorm was not refreshed: averages may score far better with --bn-refresh DATA\n"
        "wrote swa.keras: ckpt_1.keras, falling:score 13 on 300 rows; no average is as good\n"
    )
    assert "BatchNorm statistics are averaged" not in ended.err
    assert swa_avg("ckpt_1.keras", "-o", "alone.keras").code == 0
    assert _contents(Path("swa.keras")) == _contents(Path("alone.keras"))


def test_of_equal_scores_the_average_of_the_most_checkpoints_wins(here: Path, swa_avg: Cli) -> None:
    (here / "same.py").write_text("def score(targets, predictions):\n    return 1\n")
    command = ("sweep", "ckpt_*.keras", "--val", "val.npz", "--metric", "same:score", "--mode", "max")
    options = ("--candidates", "last:2", "--candidates", "last:4", "--candidates", "last:3")
    ended = swa_avg(*command, *options, "--json")
    report = json.loads(ended.out)
    assert (report["winner"], report["best_single"], report["improved"]) == ("last:4", "ckpt_4.keras", False)
    assert ended.err.endswith("; it equals the best single checkpoint, ckpt_4.keras with 1\n")
    assert swa_avg(*command, *options, "--overwrite", "--require-improvement").code == 4


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".weights.json", ""])
def test_every_format_is_swept(suffix: str, here: Path, swa_avg: Cli) -> None:
    model = () if suffix in (".h5", "") else ("--model", "ckpt_1.keras")
    command = (
        "sweep",
        f"ckpt_?{suffix}",
        "--val",
        "val.npz",
        "--bn-refresh",
        "train.npz",
        "--candidates",
        "last:2",
    )
    ended = swa_avg(*command, "--candidates", "greedy", "--json", *model)
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    for candidate in (*report["singles"], report["averages"][0]):
        expected = _by_hand(candidate["coefficients"], refreshed=True)
        assert candidate["metrics"] == pytest.approx(expected, rel=1e-4), candidate["name"]
    assert swa_avg("verify", f"swa{suffix}").code == 0
    assert not [name for name in _names(here) if name.startswith(".")]


def test_archives_are_swept_into_weights_alone(here: Path, swa_avg: Cli) -> None:
    command = ("sweep", "ckpt_*.keras", "--val", "val.npz", "--bn-refresh", "train.npz", "--monitor", "loss")
    assert swa_avg(*command, "-o", "swa.weights.h5").code == 0
    assert swa_avg(*command, "-o", "swa.keras").code == 0
    weights, whole = oracle.read_arrays(Path("swa.weights.h5")), oracle.read_arrays(Path("swa.keras"))
    assert {name: value.tobytes() for name, value in weights.items()} == {
        name: value.tobytes() for name, value in whole.items()
    }


def test_checkpoints_at_a_url_are_swept(here: Path, swa_avg: Cli) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    for number in NUMBERS:
        system.pipe(f"/sweep/ckpt_{number}.keras", Path(f"ckpt_{number}.keras").read_bytes())
    before = _names(here)
    command = (
        "--val",
        "val.npz",
        "--bn-refresh",
        "train.npz",
        "--candidates",
        "last:2",
        "--candidates",
        "greedy",
    )
    ended = swa_avg("sweep", "memory://sweep/ckpt_*.keras", "-o", "memory://sweep/swa.keras", *command)
    assert ended.code == 0, ended.err
    assert _names(here) == before
    assert swa_avg("sweep", "ckpt_*.keras", "-o", "local.keras", *command).code == 0
    Path("far.keras").write_bytes(system.cat("/sweep/swa.keras"))
    assert _contents(Path("far.keras")) == _contents(Path("local.keras"))
    damaged = bytearray(Path("ckpt_2.keras").read_bytes())
    damaged[damaged.index(b"PK\x01\x02") - 1] ^= 1  # before the central directory: the last of the weights
    system.pipe("/sweep/ckpt_2.keras", bytes(damaged))
    checked = ("sweep", "memory://sweep/ckpt_?.keras", "-o", "memory://sweep/new.keras", *command)
    ended = swa_avg(*checked, "--verify")
    assert ended.code == 3
    assert "ckpt_2.keras: damaged: its CRC-32 is" in ended.err
    system.store.clear()


def test_the_model_is_built_once_and_drafts_come_one_at_a_time(
    here: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    folders: list[int] = []
    load, load_weights = keras.models.load_model, keras.Model.load_weights

    def counted(*arguments: object, **options: object) -> object:
        loads.append(arguments[0])
        return load(*arguments, **options)

    def seen(self: object, path: Path, *arguments: object, **options: object) -> object:
        folders.append(len(list(Path(path).parent.parent.iterdir())))
        return load_weights(self, path, *arguments, **options)

    monkeypatch.setattr(keras.models, "load_model", counted)
    monkeypatch.setattr(keras.Model, "load_weights", seen)
    assert swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz").code == 0
    assert len(loads) == 1
    assert folders == [1] * (4 + 5 + 3)


# --- metrics and data ---------------------------------------------------------------------------------------------


def test_a_function_of_targets_and_predictions_decides(here: Path, swa_avg: Cli) -> None:
    command = ("sweep", "ckpt_*.keras", "--val", "val.npz", "--json")
    accuracy = json.loads(swa_avg(*command).out)
    error = json.loads(swa_avg(*command, "--metric", "elsewhere:error", "--overwrite").out)
    assert (error["monitor"], error["mode"]) == ("elsewhere:error", "min")
    for one, other in zip(accuracy["singles"], error["singles"], strict=True):
        assert other["metrics"]["elsewhere:error"] == pytest.approx(1 - one["metrics"]["accuracy"], abs=1e-6)


def _line(ended: Ended, code: int, text: str) -> None:
    assert ended.err == f"swa-avg: error: {text}\n"
    assert ended.code == code


def test_what_cannot_be_scored_is_one_line(here: Path, swa_avg: Cli) -> None:
    val = makers.arrays_in("val.npz")
    command = ("sweep", "ckpt_*.keras", "--val", "val.npz", "-q")
    before = _names(here)
    _line(swa_avg(*command, "--monitor", "auc"), 2, "monitor 'auc': the model has accuracy, loss")
    _line(swa_avg(*command, "--metric", "elsewhere:none"), 2, "metric returned NoneType; expected a number")
    _line(
        swa_avg(*command, "--metric", "elsewhere:nan", "--mode", "min"),
        4,
        "swa.keras: elsewhere:nan: is not finite for any candidate; nothing was written",
    )
    _line(
        swa_avg(*command, "--metric", "elsewhere:nan"),
        2,
        "monitor nan: say which values are better, with mode min or max",
    )
    _line(
        swa_avg("sweep", "ckpt_1.keras", "--val", "val.npz"),
        2,
        "a sweep compares averages of at least 2 checkpoints; found 1",
    )
    _line(
        swa_avg(*command, "--candidates", "last:9"),
        2,
        "candidate 'last:9': expected last:K, from last:1 to last:4",
    )
    for name, arrays, text in (
        (
            "x.npz",
            {"x": val["x_val"]},
            "x.npz: expected one array for the model's target; found x float32[300, 8, 8, 1]; choose with --val-target KEY",
        ),
        (
            "l.npz",
            {"x": val["x_val"], "y": val["y_val"][:9]},
            "l.npz: expected arrays of one length; found x 300, y 9",
        ),
        (
            "o.npz",
            {"x": val["x_val"], "y": val["y_val"].astype(object)},
            "o.npz: y: expected numbers; found pickled objects, which are never read; store a plain array",
        ),
        (
            "s.npz",
            {"x": val["x_val"][:, :5], "y": val["y_val"]},
            "s.npz: x: expected rows of shape [8, 8, 1]; found [5, 8, 1]; choose the array with --val-input, or reshape it with --val-preprocess",
        ),
    ):
        np.savez(name, **arrays)
        _line(swa_avg("sweep", "ckpt_*.keras", "--val", name, "-q"), 3, text)
        Path(name).unlink()
    np.savez("c.npz", x=val["x_val"], y=np.zeros((300, 7, 7), np.float32))
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "c.npz", "-q")
    assert ended.code == 3
    assert ended.err.startswith("swa-avg: error: c.npz: the model cannot be evaluated on these data (")
    assert ended.err.count("\n") == 1
    Path("c.npz").unlink()
    assert _names(here) == before


def test_what_one_candidate_would_use_up_is_refused(here: Path) -> None:
    model = keras.models.load_model("ckpt_1.keras")
    with pytest.raises(UsageError, match="not a live model"):
        sweep("ckpt_*.keras", validation=Validation("val.npz"), loading=Loading(model=model))
    assert model.optimizer is not None
    batches = iter([(np.zeros((1, 8, 8, 1), "float32"), np.zeros(1))])
    for options in (
        {"validation": Validation(batches)},
        {"validation": Validation("val.npz"), "refresh": Refresh(batches)},
    ):
        with pytest.raises(UsageError, match="reads its data anew for each candidate"):
            sweep("ckpt_*.keras", **options)


def test_a_model_that_was_not_compiled_needs_a_metric(here: Path, swa_avg: Cli) -> None:
    model = keras.models.load_model("ckpt_1.keras", compile=False)
    model.save("bare_1.keras")
    model.set_weights([weights + 1 for weights in model.get_weights()])
    model.save("bare_2.keras")
    command = ("sweep", "bare_*.keras", "--val", "val.npz", "-q")
    _line(
        swa_avg(*command),
        2,
        "the model does not say how it was compiled: give a metric, such as MODULE:FUNCTION",
    )
    assert swa_avg(*command, "--metric", "elsewhere:error").code == 0


def test_weights_alone_need_a_model(here: Path, swa_avg: Cli) -> None:
    _line(
        swa_avg("sweep", "ckpt_?.weights.h5", "--val", "val.npz"),
        2,
        "ckpt_4.weights.h5 holds weights alone: a sweep needs --model, a .keras file, a JSON configuration or "
        "MODULE:FUNCTION",
    )


def test_data_may_be_batches_that_a_function_yields(here: Path, swa_avg: Cli) -> None:
    command = ("sweep", "ckpt_*.keras", "--json", "--candidates", "uniform")
    whole = json.loads(swa_avg(*command, "--val", "val.npz", "-o", "a.keras").out)
    batches = json.loads(swa_avg(*command, "--val", "elsewhere:batches", "-o", "b.keras").out)
    assert batches["rows"] == whole["rows"] == 300
    for one, other in zip(whole["singles"], batches["singles"], strict=True):
        assert other["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


def test_several_inputs_and_outputs_go_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    layers = keras.layers
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    both = layers.Concatenate()([left, right])
    outputs = [layers.Dense(1, name="size")(both), layers.Dense(4, activation="softmax", name="kind")(both)]
    model = keras.Model([left, right], outputs)
    model.compile("sgd", ["mse", "sparse_categorical_crossentropy"], metrics=[["mae"], ["accuracy"]])
    rng = np.random.default_rng(0)
    data = {
        "left": rng.random((150, 3), np.float32),
        "r": rng.random((150, 2), np.float32),
        "size": rng.random((150, 1), np.float32),
        "k": rng.integers(4, size=150),
    }
    for number in (1, 2, 3):
        model.fit([data["left"], data["r"]], [data["size"], data["k"]], epochs=3, verbose=0)
        model.save(f"ckpt_{number}.keras")
    np.savez("val.npz", **data)
    options = ("--val-input", "r=right", "--val-target", "k=kind", "--monitor", "size_mae")
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz", *options, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    for number, single in enumerate(report["singles"], 1):
        loaded = keras.models.load_model(f"ckpt_{number}.keras")
        expected = loaded.evaluate(
            [data["left"], data["r"]], [data["size"], data["k"]], batch_size=128, verbose=0, return_dict=True
        )
        for name in ("loss", "size_mae", "kind_accuracy"):  # Keras weighs each output's loss by batch shapes
            assert single["metrics"][name] == pytest.approx(expected[name], rel=1e-4)
    _line(
        swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz", "--val-input", "r=right", "-q", "--overwrite"),
        3,
        "val.npz: expected kind; found left float32[150, 3], r float32[150, 2], size float32[150, 1], k int64[150]; "
        "choose with --val-target KEY=OUTPUT",
    )


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_nothing(
    here: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swa_avg.combine import spill

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(spill.Spill, "_add", full)
    before = _names(here)
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz")
    assert (ended.code, ended.err) == (
        5,
        "swa-avg: error: swa.keras: cannot write: No space left on device\n",
    )
    assert _names(here) == before


@pytest.mark.parametrize("call", [1, 6, 10])
def test_an_interrupt_leaves_nothing(
    call: int, here: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    from swa_avg.sweeping import scoring as evaluation

    score, calls = evaluation.Evaluator.score, []

    def interrupted(self: evaluation.Evaluator, draft: Path) -> evaluation.Score:
        calls.append(draft)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return score(self, draft)

    monkeypatch.setattr(evaluation.Evaluator, "score", interrupted)
    before = _names(here)
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz")
    assert (ended.code, ended.err) == (130, "swa-avg: interrupted; nothing was written\n")
    assert _names(here) == before


def test_a_checkpoint_that_changes_meanwhile_ends_the_sweep(
    here: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swa_avg.sweeping import scoring as evaluation

    for number in NUMBERS:  # of this test alone
        data = Path(f"ckpt_{number}.keras").read_bytes()
        Path(f"ckpt_{number}.keras").unlink()
        Path(f"ckpt_{number}.keras").write_bytes(data)
    score = evaluation.Evaluator.score

    def touched(self: evaluation.Evaluator, draft: Path) -> evaluation.Score:
        with Path("ckpt_4.keras").open("ab") as file:
            file.write(b"more")
        return score(self, draft)

    monkeypatch.setattr(evaluation.Evaluator, "score", touched)
    ended = swa_avg("sweep", "ckpt_*.keras", "--val", "val.npz", "--candidates", "uniform")
    assert ended.code == 3
    assert "ckpt_4.keras: the file changed while it was being read" in ended.err
    assert not Path("swa.keras").exists()


# --- the line from the last checkpoint to the average -------------------------------------------------------------


@pytest.mark.parametrize("refresh", [(), ("--bn-refresh", "train.npz")], ids=["plain", "refresh"])
def test_the_line_joins_the_last_checkpoint_and_the_best_average(
    refresh: tuple[str, ...], here: Path, swa_avg: Cli
) -> None:
    pytest.importorskip("matplotlib")
    command = (
        "sweep",
        "ckpt_*.keras",
        "--val",
        "val.npz",
        "--candidates",
        "last:3",
        "--candidates",
        "last:2",
    )
    ended = swa_avg(*command, "--path", "line.png", "--report", "page.html", "--json", *refresh)
    assert ended.code == 0, ended.err
    page = Path("page.html").read_text()
    titles = ("Verdict", "Scores", "Between the last checkpoint and the average")
    places = [page.index(f"<h2>{title}</h2>") for title in titles]
    assert places == sorted(places)
    said = next(line for line in ended.err.splitlines() if line.startswith("wrote swa.keras: "))
    assert f"average helps here: {said}.</p>" in page or f"single checkpoint here: {said}.</p>" in page
    what = "4 checkpoints and 2 averages of them, by accuracy (higher is better) on 300 rows of val.npz."
    assert f"<p>{what}</p>" in page
    assert "<pre><code>swa-avg verify swa.keras</code></pre>" in page
    assert page.count("<tr") == 7
    assert ('role="note">BatchNorm' in page) == (not refresh)
    report = json.loads(ended.out)
    points = report["path"]
    assert [point["at"] for point in points] == [step / 10 for step in range(11)]
    best = max(
        report["averages"], key=lambda a: (a["metrics"]["accuracy"], sum(c > 0 for c in a["coefficients"]))
    )
    for number in (0, 3, 10):
        coefficients = [points[number]["at"] * c for c in best["coefficients"]]
        coefficients[-1] += 1 - points[number]["at"]
        expected = _by_hand(coefficients, refreshed=bool(refresh))
        assert {"at": points[number]["at"], **expected} == pytest.approx(points[number], rel=1e-4)
    assert Path("line.png").read_bytes().startswith(b"\x89PNG")
    assert swa_avg(*command, "-o", "plain.keras", *refresh).code == 0  # scoring the line changes no byte
    assert Path("plain.keras").read_bytes() == Path("swa.keras").read_bytes()


def test_a_picture_that_cannot_be_drawn_is_known_beforehand(
    here: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("sweep", "ckpt_*.keras", "--val", "val.npz", "--path")
    _line(
        swa_avg(*command, "line.txt"),
        2,
        "path line.txt: expected a name that ends with .png or .svg or .pdf",
    )
    for name in [
        name
        for name in sys.modules
        if name.partition(".")[0] == "matplotlib"
        or name.startswith(("swa_avg.pages", "swa_avg.sweeping.page"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _line(swa_avg(*command, "line.png"), 2, "path line.png: needs matplotlib; pip install 'swa-avg[plot]'")


@pytest.mark.parametrize("place", ["loss", "metrics"])
def test_code_in_the_compile_settings_of_a_legacy_model_does_not_run(
    place: str, here: Path, swa_avg: Cli
) -> None:
    import h5py

    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAA=", "defaults": None, "closure": None}}
    for number in NUMBERS:
        data = Path(f"ckpt_{number}.h5").read_bytes()
        Path(f"ckpt_{number}.h5").unlink()
        Path(f"ckpt_{number}.h5").write_bytes(data)
        with h5py.File(f"ckpt_{number}.h5", "r+") as file:
            settings = json.loads(file.attrs["training_config"])
            settings[place] = code if place == "loss" else [code]
            file.attrs["training_config"] = json.dumps(settings)
    command = ("sweep", "ckpt_?.h5", "--val", "val.npz", "--candidates", "last:2")
    text = "ckpt_4.h5 holds a Lambda layer, which is code: add --unsafe if you trust who wrote it"
    _line(swa_avg(*command), 2, text)
    _line(
        swa_avg("sweep", "ckpt_?.weights.h5", *command[2:], "--model", "ckpt_1.h5"),
        2,
        text.replace("ckpt_4", "ckpt_1"),
    )


_TRAIN: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
    "path": lambda x, y: Path("train.npz"),
    "name": lambda x, y: "train.npz",
    "array": lambda x, y: x,
    "tuple": lambda x, y: (x, y),
    "mapping": lambda x, y: {"x_train": x, "y_train": y},
    "dataclass": lambda x, y: Refresh(x),
}


@pytest.mark.parametrize("form", _TRAIN)
def test_python_takes_data_in_every_form(form: str, here: Path) -> None:
    train = makers.arrays_in("train.npz")
    x, y = train["x_train"], train["y_train"]
    average("ckpt_*.keras", "reference.keras", refresh=Refresh("train.npz"))
    report = average("ckpt_*.keras", "swa.keras", refresh=_TRAIN[form](x, y))
    assert report.refresh is not None
    assert report.refresh.samples == 500
    assert report.batchnorm_layers
    assert not any("not re-estimated" in warning for warning in report.warnings)
    assert repr(report.refresh).startswith(
        "<RefreshReport: refreshed 1 BatchNorm layer on 500 samples in 4 batches (pooled); means moved by"
    )
    written, expected = (oracle.read_arrays(Path(f"{name}.keras")) for name in ("swa", "reference"))
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["path", "name", "tuple", "mapping", "batches", "dataclass"])
def test_python_takes_validation_data_in_every_form(form: str, here: Path) -> None:
    val = makers.arrays_in("val.npz")
    x, y = val["x_val"], val["y_val"]
    forms = {
        "path": Path("val.npz"),
        "name": "val.npz",
        "tuple": (x, y),
        "mapping": {"x": x, "y": y},
        "batches": [(x[:128], y[:128]), (x[128:], y[128:])],
        "dataclass": Validation((x, y)),
    }
    with pytest.warns(SwaAvgWarning) as caught:
        report = sweep("ckpt_*.keras", "swa.keras", validation=forms[form], tried="uniform")
    assert [str(warning.message) for warning in caught] == list(report.warnings)
    assert len(repr(report)) < 200
    expected = _by_hand([0.25] * 4, refreshed=False)
    (uniform,) = report.averages
    assert report.rows == 300
    assert uniform.metrics["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    assert uniform.metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_sweep_of_weights_loads_and_refreshes_by_data_alone(here: Path) -> None:
    report = sweep(
        "ckpt_?.weights.h5",
        "swa.weights.h5",
        validation="val.npz",
        refresh="train.npz",
        loading=Loading(model="ckpt_1.keras"),
        tried=["uniform"],
    )
    (uniform,) = report.averages
    assert uniform.refresh is not None
    assert uniform.metrics["loss"] == pytest.approx(_by_hand([0.25] * 4, refreshed=True)["loss"], rel=1e-4)


def test_preprocessing_of_validation_data_may_be_a_function(here: Path) -> None:
    blank = Validation("val.npz", preprocess=lambda x: x * 0.0)
    report = sweep("ckpt_*.keras", "swa.keras", validation=blank, tried="uniform")
    shares = np.bincount(makers.arrays_in("val.npz")["y_val"]) / 300  # of blank images, all are of one class
    assert any(report.winner.metrics["accuracy"] == pytest.approx(share, abs=1e-6) for share in shares)


def test_candidates_of_two_folders_are_told_apart(here: Path) -> None:
    for number in (1, 2):
        Path(f"run_{number}").mkdir()
        Path(f"run_{number}/ckpt.keras").hardlink_to(f"ckpt_{number}.keras")
    report = sweep("run_*/ckpt.keras", "swa.keras", validation="val.npz", tried="uniform")
    assert [single.candidate.name for single in report.singles] == ["run_1/ckpt.keras", "run_2/ckpt.keras"]
