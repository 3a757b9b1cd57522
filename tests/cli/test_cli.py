"""The command line: what it says, how it ends, what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import h5py
import numpy as np
import pytest

import makers
import oracle
from conftest import Ended
from swa_avg import average
from swa_avg.data.spec import Spec
from swa_avg.errors import SystemRefusalError, UsageError
from swa_avg.planning.methods import METHODS

Cli = Callable[..., Ended]
LN2 = np.log(2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with ckpt_1, ckpt_2 and ckpt_10, all .keras."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 10):
        makers.write_archive(tmp_path / f"ckpt_{number}.keras", makers.weights(number))
    return tmp_path


def _refused(ended: Ended, code: int, *lines: str) -> None:
    assert ended.err == "".join(f"swa-avg: error: {line}\n" for line in lines)
    assert ended.code == code
    assert ended.out == ""


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_readme_command_averages_every_checkpoint(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("ckpt_1.keras", "ckpt_10.keras", "ckpt_2.keras", "-o", "swa.keras")
    assert ended.code == 0
    assert ended.err == (
        "warning: BatchNorm statistics are averaged, not re-estimated (bn); the model may be far worse than its "
        "weights: refresh them on training data with --bn-refresh DATA\n"
        "wrote swa.keras: the uniform average of 3 checkpoints\n"
    )
    written = oracle.read_arrays(Path("swa.keras"))
    inputs = [makers.weights(number) for number in (1, 2, 10)]
    for name, value in written.items():
        expected = (
            inputs[-1][name] if name.startswith("optimizer") else oracle.mean([a[name] for a in inputs])
        )
        assert value.tobytes() == np.asarray(expected).tobytes()


def test_a_url_without_the_extra_is_one_line(
    folder: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    line = "s3://bucket/ckpt_1.keras is a URL, which needs: pip install 'swa-avg[remote]'"
    _refused(swa_avg("s3://bucket/ckpt_1.keras"), 2, line)
    _refused(swa_avg("ckpt_1.keras", "ckpt_2.keras", "-o", "s3://bucket/ckpt_1.keras"), 2, line)


def test_quoted_patterns_and_the_default_output(folder: Path, swa_avg: Cli) -> None:
    assert swa_avg("ckpt_*.keras").code == 0
    assert Path("swa.keras").exists()


@pytest.mark.parametrize("options", [(), ("-q",), ("-o", "swa.keras"), ("average",)], ids=str)
def test_after_two_dashes_everything_is_a_name(options: tuple[str, ...], folder: Path, swa_avg: Cli) -> None:
    for number, name in enumerate(("-1.keras", "inspect", "--"), 3):
        makers.write_archive(folder / name, makers.weights(number))
    ended = swa_avg(*options, "--json", "--", "-1.keras", "inspect", "--", "./ckpt_2.keras")
    assert ended.code == 0, ended.err
    assert [entry["path"] for entry in json.loads(ended.out)["inputs"]] == [
        "-1.keras", "--", "ckpt_2.keras", "inspect"
    ]  # fmt: skip


def test_the_order_of_names_and_a_second_run_change_no_byte(folder: Path, swa_avg: Cli) -> None:
    swa_avg("ckpt_1.keras", "ckpt_2.keras", "ckpt_10.keras", "-o", "a.keras")
    swa_avg("ckpt_10.keras", "ckpt_1.keras", "ckpt_2.keras", "-o", "b.keras", "--threads", "3")
    swa_avg("ckpt_*.keras", "-o", "c.keras", "--max-memory", "80M", "--no-verify")
    assert Path("a.keras").read_bytes() == Path("b.keras").read_bytes() == Path("c.keras").read_bytes()


@pytest.mark.parametrize("suffix", [".weights.h5", ".h5", ".weights.json"])
def test_two_runs_of_every_format_write_the_same_bytes(suffix: str, tmp_path: Path, swa_avg: Cli) -> None:
    write = {
        ".weights.h5": makers.write_weights,
        ".h5": makers.write_legacy,
        ".weights.json": makers.write_sharded,
    }[suffix]
    for number in (1, 2):
        names = makers.weights(number)
        arrays = (
            {f"dense/{n.rpartition('/')[2]}": v for n, v in names.items() if "dense" in n}
            if suffix == ".h5"
            else names
        )
        write(tmp_path / f"ckpt_{number}{suffix}", arrays)
    for optimizer in ("keep", "drop"):
        results = []
        for turn in ("a", "b"):
            target = tmp_path / turn / optimizer
            target.mkdir(parents=True)
            assert (
                swa_avg(
                    tmp_path / f"ckpt_*{suffix}", "-o", target / f"swa{suffix}", "--optimizer", optimizer
                ).code
                == 0
            )
            results.append({path.name: path.read_bytes() for path in target.iterdir()})
        assert results[0] == results[1]
        assert len(results[0]) == (3 if suffix == ".weights.json" else 1)


def test_selection_is_by_natural_order_and_inclusive_epochs(folder: Path, swa_avg: Cli) -> None:
    def chosen(*options: str) -> list[str]:
        ended = swa_avg("ckpt_*.keras", "--dry-run", "--json", *options)
        return [Path(entry["path"]).name for entry in json.loads(ended.out)["inputs"]]

    assert chosen() == ["ckpt_1.keras", "ckpt_2.keras", "ckpt_10.keras"]
    assert chosen("--last", "2") == ["ckpt_2.keras", "ckpt_10.keras"]
    assert chosen("--every", "2") == ["ckpt_1.keras", "ckpt_10.keras"]
    assert chosen("--epochs", "2:10") == ["ckpt_2.keras", "ckpt_10.keras"]
    assert chosen("--epochs", "1:2") == ["ckpt_1.keras", "ckpt_2.keras"]
    assert chosen("--epochs", "1:10:9") == ["ckpt_1.keras", "ckpt_10.keras"]
    assert chosen("--epochs", "2") == ["ckpt_2.keras"]


def _index(folder: Path, **settings: object) -> None:
    entries = [
        {
            "file": f"ckpt_{n}.keras",
            "epoch": n + 100,
            "metrics": {"val_loss": loss, "val_accuracy": 1 - loss, "R": 1},
        }
        for n, loss in ((1, 0.3), (2, 0.1), (10, 0.2))
    ]
    index = {"version": 1, "monitor": "val_loss", "mode": "min", "checkpoints": entries} | settings
    (folder / "checkpoints.json").write_text(json.dumps(index))


def test_the_index_of_the_current_folder_says_which(folder: Path, swa_avg: Cli) -> None:
    makers.write_archive(folder / "ckpt_11.keras", makers.weights(11))
    _index(folder)
    ended = swa_avg("--json", "-q")
    assert [entry["path"] for entry in json.loads(ended.out)["inputs"]] == [
        "ckpt_1.keras",
        "ckpt_2.keras",
        "ckpt_10.keras",
    ]
    assert Path("swa.keras").exists()


def test_the_index_of_a_named_folder_says_which(folder: Path, swa_avg: Cli) -> None:
    makers.write_archive(folder / "ckpt_11.keras", makers.weights(11))
    _index(folder)
    (folder / "elsewhere").mkdir()
    os.chdir("elsewhere")
    expected = ["../ckpt_1.keras", "../ckpt_2.keras", "../ckpt_10.keras"]
    ended = swa_avg("..", "--json", "-q")
    assert [entry["path"] for entry in json.loads(ended.out)["inputs"]] == expected
    assert _names(Path()) == ["swa.keras"]
    ended = swa_avg("inspect", "../", "--json", "-q", "--best", "2")
    assert [entry["path"] for entry in json.loads(ended.out)["checkpoints"]] == expected[1:]
    (only,) = average("..", "b.keras", last=1).plan.inputs
    assert str(only.path) == expected[2]


def test_an_index_of_two_runs_is_refused(folder: Path, swa_avg: Cli) -> None:
    _index(folder)
    index = json.loads((folder / "checkpoints.json").read_text())
    for entry, time in zip(
        index["checkpoints"], ("12:00:00+01:00", "11:30:00+00:00", "11:59:00+01:00"), strict=True
    ):
        entry["time"] = f"2026-11-24T{time}"
    (folder / "checkpoints.json").write_text(json.dumps(index))
    ended = swa_avg("-q")
    line = "checkpoints.json names ckpt_10.keras, which was saved before ckpt_2.keras: it is of an earlier run; name the checkpoints of one run"
    assert (ended.code, ended.err) == (2, f"swa-avg: error: {line}\n")
    assert swa_avg("ckpt_1.keras", "ckpt_2.keras", "-q").code == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"method": "emma"},
            "method 'emma': expected uniform, ema:DECAY, power-ema:SIGMA_REL, half-life:FRACTION, "
            "decay:linear|cosine|1-sqrt, weights:W,W,...",
        ),
        ({"method": [1, 2]}, "method 'weights:1,2': expected 3 numbers, one per checkpoint, found 2"),
        ({"method": [1, 2, np.nan]}, "method 'weights:1,2,nan': expected weights:W,W,..., one finite number"),
        ({"optimizer": "dropp"}, "optimizer is keep or drop, not 'dropp'"),
        ({"best": 1, "mode": "maxx"}, "mode is min or max, not 'maxx'"),
        ({"dtype": "float16"}, "dtype is bfloat16, not 'float16'"),
        ({"threads": 0}, "threads is 0; expected 1 or more"),
        ({"threads": -1}, "threads is -1; expected 1 or more"),
        ({"last": "3"}, "last is '3'; expected 1 or more"),
        ({"every": 1.5}, "every is 1.5; expected 1 or more"),
    ],
)
def test_values_that_there_are_not_are_refused_in_python_too(
    options: dict[str, object], problem: str, folder: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)):
        average(["ckpt_*.keras"], "swa.keras", **options)  # type: ignore[arg-type]
    assert not (folder / "swa.keras").exists()


def test_names_that_no_output_can_have_are_refused(folder: Path, swa_avg: Cli) -> None:
    with pytest.raises(UsageError, match=r"^the output a\\x00b\.keras: .*null"):
        average(["ckpt_*.keras"], "a\0b.keras")
    name = "x" * 300 + ".keras"
    with pytest.raises(SystemRefusalError, match="File name too long"):
        average(["ckpt_*.keras"], name)
    _refused(swa_avg("ckpt_*.keras", "-o", name), 5, f"{name}: File name too long")


def test_a_checkpoint_that_does_not_count_must_be_finite_too(folder: Path, swa_avg: Cli) -> None:
    makers.write_archive(
        folder / "ckpt_1.keras", makers.weights(1) | {"layers/dense/vars/1": np.full(5, np.nan, "f4")}
    )
    ended = swa_avg("ckpt_*.keras", "-q", "--method", "weights:0,1,1")
    line = "ckpt_1.keras: layers/dense/vars/1: holds NaN or infinity; leave this checkpoint out"
    assert (ended.code, ended.err) == (4, f"swa-avg: error: {line}\n")


def test_tensors_that_are_one_in_one_checkpoint_only_do_not_fit(folder: Path, swa_avg: Cli) -> None:
    arrays = {"vars/0": np.ones(3, "f4"), "vars/1": np.full(3, 7, "f4")}
    makers.write_weights(folder / "a_1.weights.h5", arrays)
    makers.write_weights(folder / "a_2.weights.h5", {"vars/0": np.ones(3, "f4")})
    with h5py.File(folder / "a_2.weights.h5", "r+") as file:
        file["vars/1"] = file["vars/0"]
    ended = swa_avg("a_1.weights.h5", "a_2.weights.h5", "-q", "-o", "swa.weights.h5")
    line = (
        "a_1.weights.h5: vars/0, vars/1: one tensor under several names here or in a_2.weights.h5, "
        "and not in the other"
    )
    assert (ended.code, ended.err) == (4, f"swa-avg: error: {line}\n")


@pytest.mark.parametrize(
    "option",
    [
        ("--bn-input", "x"),
        ("--bn-batch-size", "5"),
        ("--bn-samples", "5"),
        ("--bn-estimator", "pooled"),
        ("--bn-seed", "0"),
        ("--bn-preprocess", "math:sqrt"),
        ("--model", "ckpt_1.keras"),
        ("--import", "math"),
        ("--unsafe",),
    ],
    ids=str,
)
def test_options_of_a_refresh_need_one(option: tuple[str, ...], folder: Path, swa_avg: Cli) -> None:
    line = f"{option[0]} goes with --bn-refresh (see swa-avg --help)"
    _refused(swa_avg("ckpt_1.keras", "ckpt_2.keras", *option), 2, line)
    if option[0].startswith("--bn"):
        _refused(swa_avg("sweep", "ckpt_1.keras", "ckpt_2.keras", "--val", "x.npz", *option), 2, line)


def test_a_negative_seed_is_refused(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("ckpt_*.keras", "--bn-refresh", "x.npz", "--bn-seed", "-1")
    line = "Invalid value for '--bn-seed': -1 is not in the range x>=0. (see swa-avg --help)"
    _refused(ended, 2, line)
    with pytest.raises(UsageError, match=r"^the seed must be at least 0, not -1$"):
        Spec(seed=-1)


def test_the_index_ranks_and_numbers(folder: Path, swa_avg: Cli) -> None:
    _index(folder)

    def chosen(*options: str) -> list[str]:
        ended = swa_avg("--dry-run", "--json", *options)
        return [entry["path"] for entry in json.loads(ended.out)["inputs"]]

    assert chosen("--best", "2") == ["ckpt_2.keras", "ckpt_10.keras"]
    assert chosen("--best", "1", "--monitor", "val_accuracy", "--mode", "min") == ["ckpt_1.keras"]
    assert chosen("--best", "1", "--monitor", "val_accuracy") == ["ckpt_2.keras"]
    assert chosen("ckpt_1.keras", "ckpt_2.keras", "--best", "1") == ["ckpt_2.keras"]
    assert chosen("--epochs", "101:102") == ["ckpt_1.keras", "ckpt_2.keras"]


def test_an_index_that_does_not_fit_is_reported(folder: Path, swa_avg: Cli) -> None:
    _index(folder)
    _index(folder, monitor=None, mode=None)
    _refused(
        swa_avg("--best", "1"),
        2,
        "best needs monitor, a metric of ckpt_1.keras: val_loss (0.3), val_accuracy (0.7), R (1)",
    )
    _refused(
        swa_avg("--best", "1", "--monitor", "R"),
        2,
        "monitor R: say which values are better, with mode min or max; ckpt_1.keras has 1",
    )
    _refused(
        swa_avg("--best", "1", "--monitor", "auc"),
        2,
        "ckpt_1.keras has no metric 'auc', but val_loss, val_accuracy, R",
    )
    _refused(swa_avg("--best", "4"), 2, "best is 4, but found only 3 checkpoints")
    for option in (("--mode", "max"), ("--monitor", "R"), ("--metrics", "log.csv")):
        _refused(swa_avg(*option), 2, "monitor, mode and metrics go with best")
    Path("ckpt_2.keras").unlink()
    _refused(
        swa_avg(),
        3,
        "checkpoints.json: names ckpt_2.keras, which is not there; name the checkpoints themselves, or restore it",
    )
    _index(folder, version=9)
    assert swa_avg().err.startswith("swa-avg: error: checkpoints.json: ")
    assert swa_avg("ckpt_*.keras").code == 0


def test_dry_run_shows_by_which_value_the_best_were_chosen_and_where_it_is(
    folder: Path, swa_avg: Cli
) -> None:
    (folder / "log.csv").write_text("epoch,val_accuracy\n0,0.5\n1,0.75\n9,nan\n")
    ended = swa_avg("ckpt_*.keras", "--best", "2", "--dry-run", "--json")
    assert ended.err.splitlines()[:3] == [
        "epoch   coefficient    val_accuracy  checkpoint (.keras archive, uniform)",
        "    1           0.5   0.5 (log.csv)  ckpt_1.keras",
        "    2           0.5  0.75 (log.csv)  ckpt_2.keras",
    ]
    note = "the best 2 of 2 checkpoints with the metric 'val_accuracy'; 1 of 3 have none, or NaN, such as ckpt_10.keras"
    assert note in ended.err.splitlines()
    best = {
        "monitor": "val_accuracy",
        "mode": "max",
        "values": [{"value": 0.5, "source": "log.csv"}, {"value": 0.75, "source": "log.csv"}],
    }
    assert json.loads(ended.out)["best"] == best
    ended = swa_avg("inspect", "ckpt_*.keras", "--best", "2", "--json")
    assert json.loads(ended.out)["best"] == best
    rows = [line.split() for line in ended.err.splitlines() if line.endswith("ckpt_2.keras")]
    assert rows[-1][:3] == ["2", "0.75", "0.5"]
    (folder / "log.csv").rename(folder / "log.txt")
    shown = json.loads(swa_avg("inspect", "ckpt_*.keras", "--metrics", "log.txt", "--json", "-q").out)
    assert [c["metrics"] for c in shown["checkpoints"]] == [
        {"val_accuracy": 0.5},
        {"val_accuracy": 0.75},
        {"val_accuracy": None},
    ]


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path, swa_avg: Cli) -> None:
    before = _names(folder)
    ended = swa_avg("ckpt_*.keras", "--dry-run", "--optimizer", "drop")
    assert ended.code == 0
    assert _names(folder) == before
    size = sum(len(makers.store_bytes(makers.weights(number))) for number in (1, 2, 10)) / 1024
    assert ended.err.splitlines()[:8] == [
        "epoch   coefficient  checkpoint (.keras archive, uniform)",
        "    1      0.333333  ckpt_1.keras",
        "    2      0.333333  ckpt_2.keras",
        "   10      0.333333  ckpt_10.keras",
        "averaged: 6 tensors, 240 B",
        "equal in all, copied: 0 tensors, 0 B",
        "copied from the newest: 0 tensors, 0 B",
        "left out: 3 tensors, 152 B",
    ]
    assert ended.err.splitlines()[8].startswith(f"bytes to read: {size:.1f} KiB; peak memory: about ")
    assert ended.err.endswith("would write swa.keras: the uniform average of 3 checkpoints\n")


def test_json_and_quiet(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("ckpt_*.keras", "-q", "--json")
    assert ended.err == ""
    result = json.loads(ended.out)
    assert result["output"] == "swa.keras"
    assert result["written"] is True
    assert result["format"] == ".keras archive"
    assert set(result["tensors"]["averaged"]) == {
        name for name in makers.weights() if not name.startswith("optimizer")
    }
    assert set(result["tensors"]["copied from the newest"]) == {f"optimizer/vars/{i}" for i in range(3)}
    assert result["batchnorm_layers"] == ["bn"]


def test_an_output_that_exists_stays_without_overwrite(folder: Path, swa_avg: Cli) -> None:
    Path("swa.keras").write_bytes(b"precious")
    _refused(swa_avg("ckpt_*.keras"), 2, "the output swa.keras exists; name another one, or overwrite it")
    assert Path("swa.keras").read_bytes() == b"precious"
    assert swa_avg("ckpt_*.keras", "--overwrite").code == 0
    assert Path("swa.keras").read_bytes() != b"precious"


def test_an_output_among_the_inputs_is_never_skipped_silently(folder: Path, swa_avg: Cli) -> None:
    shutil.copy("ckpt_1.keras", "swa.keras")
    _refused(
        swa_avg("*.keras", "--last", "1", "--overwrite"),
        2,
        "the output swa.keras is also an input (swa.keras); name another output, or narrower inputs",
    )
    os.link("ckpt_2.keras", "hard.keras")
    _refused(
        swa_avg("ckpt_*.keras", "-o", "hard.keras", "--overwrite"),
        2,
        "the output hard.keras is also an input (ckpt_2.keras); name another output, or narrower inputs",
    )
    Path("soft.keras").symlink_to("ckpt_2.keras")
    assert swa_avg("ckpt_*.keras", "-o", "soft.keras", "--overwrite").code == 2


def test_outputs_that_are_not_plain_files_are_refused(folder: Path, swa_avg: Cli) -> None:
    Path("dir.keras").mkdir()
    os.mkfifo("fifo.keras")
    Path("link.keras").symlink_to("nowhere.keras")
    for name, problem in (
        ("dir.keras", "the output dir.keras exists and is not a regular file"),
        ("fifo.keras", "the output fifo.keras exists and is not a regular file"),
        ("link.keras", "the output link.keras is a symbolic link; name the file itself"),
        ("no/such/swa.keras", "the folder of the output does not exist: no/such"),
        (
            "swa.txt",
            "the output swa.txt must end with .keras or .weights.h5, since the inputs are .keras archive",
        ),
        (
            "swa.h5",
            "the output swa.h5 must end with .keras or .weights.h5, since the inputs are .keras archive",
        ),
    ):
        _refused(swa_avg("ckpt_*.keras", "-o", name, "--overwrite"), 2, problem)
    assert Path("link.keras").is_symlink()


def test_the_same_file_twice_is_refused(folder: Path, swa_avg: Cli) -> None:
    _refused(
        swa_avg("ckpt_1.keras", "ckpt_1.keras"),
        4,
        "ckpt_1.keras: file: the same file as ckpt_1.keras; name it once",
    )
    Path("link_1.keras").symlink_to("ckpt_1.keras")
    _refused(
        swa_avg("ckpt_1.keras", "link_1.keras"),
        4,
        "link_1.keras: file: the same file as ckpt_1.keras; name it once",
    )
    shutil.copy("ckpt_1.keras", "copy_1.keras")
    _refused(
        swa_avg("ckpt_1.keras", "copy_1.keras"),
        4,
        "copy_1.keras: weights: the same bytes as ckpt_1.keras; name one of the two",
    )
    makers.write_weights(Path("a.weights.h5"), makers.weights())
    shutil.copy("a.weights.h5", "b.weights.h5")
    _refused(
        swa_avg("a.weights.h5", "b.weights.h5"),
        4,
        "b.weights.h5: weights: the same bytes as a.weights.h5; name one of the two",
    )
    assert not Path("swa.keras").exists()
    assert not Path("swa.weights.h5").exists()


def test_every_mismatch_is_named_at_once(folder: Path, swa_avg: Cli) -> None:
    arrays = makers.weights(3)
    arrays["layers/dense/vars/0"] = np.zeros((7, 6), np.float32)
    arrays["layers/dense/vars/1"] = arrays["layers/dense/vars/1"].astype(np.float64)
    arrays["layers/extra/vars/0"] = np.zeros(2, np.float32)
    del arrays["layers/batch_normalization/vars/3"]
    makers.write_archive(folder / "ckpt_3.keras", arrays, makers.config(units=6))
    before = _names(folder)
    _refused(
        swa_avg("ckpt_*.keras"),
        4,
        "ckpt_3.keras: config.config.layers[0].config.units: expected 5 as in ckpt_10.keras, found 6",
        "ckpt_3.keras: layers/batch_normalization/vars/3: missing; ckpt_10.keras has it as float32[5]",
        "ckpt_3.keras: layers/dense/vars/0: expected float32[7, 5] as in ckpt_10.keras, found float32[7, 6]",
        "ckpt_3.keras: layers/dense/vars/1: expected float32[5] as in ckpt_10.keras, found float64[5]",
        "ckpt_3.keras: layers/extra/vars/0: extra float32[2]; ckpt_10.keras does not have it",
    )
    assert _names(folder) == before


def test_compile_settings_may_differ(folder: Path, swa_avg: Cli) -> None:
    settings = makers.config() | {"compile_config": {"optimizer": {"learning_rate": 0.5}}}
    makers.write_archive(folder / "ckpt_3.keras", makers.weights(3), settings)
    assert swa_avg("ckpt_*.keras").code == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_file_and_tensor(value: float, folder: Path, swa_avg: Cli) -> None:
    for number in (3, 4):
        arrays = makers.weights(number)
        arrays["layers/dense/vars/1"][number] = value
        makers.write_archive(folder / f"ckpt_{number}.keras", arrays)
    before = _names(folder)
    problem = "layers/dense/vars/1: holds NaN or infinity; leave this checkpoint out"
    _refused(swa_avg("ckpt_*.keras"), 4, f"ckpt_3.keras: {problem}", f"ckpt_4.keras: {problem}")
    assert _names(folder) == before


def test_infinities_that_cancel_are_found_too(folder: Path, swa_avg: Cli) -> None:
    for number, value in ((3, np.inf), (4, -np.inf)):
        arrays = makers.weights(number)
        arrays["layers/dense/vars/1"][0] = value
        makers.write_archive(folder / f"ckpt_{number}.keras", arrays)
    problem = "layers/dense/vars/1: holds NaN or infinity; leave this checkpoint out"
    _refused(swa_avg("ckpt_*.keras"), 4, f"ckpt_3.keras: {problem}", f"ckpt_4.keras: {problem}")


def test_a_sum_beyond_float64_is_refused(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2):
        arrays = {"a/vars/0": np.full(3, 1.7e308), "a/vars/1": np.float64(number)}
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    second = tmp_path / "ckpt_2.weights.h5"
    ended = swa_avg(tmp_path / "ckpt_?.weights.h5", "-o", tmp_path / "swa.weights.h5")
    _refused(ended, 4, f"{second}: sum: does not fit into float64")


def test_integers_that_are_no_counters_must_be_equal(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2):
        arrays = {
            "a/vars/0": np.arange(9, dtype=np.int64) + (number == 1),
            "a/vars/1": np.int64(number),
            "a/vars/2": np.array([number, 7], np.uint32),
            "a/vars/3": np.array([True, False, True]),
        }
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    first, second = (tmp_path / f"ckpt_{number}.weights.h5" for number in (1, 2))
    problem = f"a/vars/0: holds integers that differ from {first.name}, and is not a counter"
    _refused(swa_avg(first, second, "-o", tmp_path / "swa.weights.h5"), 4, f"{second}: {problem}")


def test_quantized_and_lora_checkpoints_are_refused(tmp_path: Path, swa_avg: Cli) -> None:
    settings = makers.config()
    settings["config"]["layers"][0]["config"]["dtype"] = {
        "class_name": "QuantizedFloat8DTypePolicy",
        "config": {"mode": "float8", "source_name": "float32"},
    }
    path = makers.write_archive(tmp_path / "ckpt_1.keras", makers.weights(), settings)
    _refused(
        swa_avg(path, "-o", tmp_path / "swa.keras"),
        4,
        f"{path}: dense: is quantized (float8); codes and scales cannot be averaged: average before you quantize",
    )
    path = makers.write_weights(tmp_path / "q.weights.h5", {"layers/dense/vars/0": np.zeros((4, 4), np.int8)})
    _refused(
        swa_avg(path, "-o", tmp_path / "swa.weights.h5"),
        4,
        f"{path}: layers/dense/vars/0: holds int8 codes, which cannot be averaged: average before you quantize",
    )
    lora = {
        "dense/dense/kernel": np.zeros((4, 4), np.float32),
        "dense/dense/lora_kernel_a": np.zeros((4, 2), np.float32),
    }
    path = makers.write_legacy(tmp_path / "lora.h5", lora)
    _refused(
        swa_avg(path, "-o", tmp_path / "swa.h5"),
        4,
        f"{path}: model_weights/dense/dense/lora_kernel_a: {FACTOR}",
    )


FACTOR = (
    "is a LoRA factor, and factors do not average (the mean of products is not the product of means): save the "
    "model as .keras or .weights.h5, which merge them"
)


@pytest.mark.parametrize("group", ["lora/0", "lora/0/vars"], ids=["without vars", "with vars"])
def test_the_factors_that_keras_hub_saves_are_refused_as_such(
    group: str, tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `save_lora_weights` writes them, with and without the groups that later versions of Keras add."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        with h5py.File(f"ckpt_{number}.lora.h5", "w") as file:
            file[group.replace("/0", "") + "/rank"] = np.int64(2)
            for name, shape in (("a", (4, 2)), ("b", (2, 4))):
                file[f"{group}/lora_kernel_{name}"] = np.zeros(shape, np.float32)
    lines = "\n".join(
        f"swa-avg: error: ckpt_2.lora.h5: {group}/lora_kernel_{name}: {FACTOR}" for name in ("a", "b")
    )
    ended = swa_avg("ckpt_*.lora.h5", "-o", "swa.h5")
    assert ended == Ended(4, "", f"{lines}\n")


def test_factors_in_a_layer_of_ones_own_are_refused_too(tmp_path: Path, swa_avg: Cli) -> None:
    arrays = makers.weights() | {"layers/mine/vars/lora_kernel_a": np.zeros((4, 2), np.float32)}
    path = makers.write_weights(tmp_path / "ckpt_1.weights.h5", arrays)
    ended = swa_avg(path, "-o", tmp_path / "swa.weights.h5")
    _refused(ended, 4, f"{path}: layers/mine/vars/lora_kernel_a: {FACTOR}")


@pytest.mark.parametrize("output", ["swa.keras", "swa.weights.h5", "swa.h5"])
def test_formats_do_not_mix(output: str, folder: Path, swa_avg: Cli) -> None:
    makers.write_weights(folder / "ckpt_3.weights.h5", makers.weights(3))
    _refused(
        swa_avg("ckpt_3.weights.h5", "ckpt_10.keras", "-o", output),
        4,
        "ckpt_3.weights.h5: format: is a Keras weights; ckpt_10.keras is a .keras archive",
    )


def test_inputs_that_are_no_checkpoints(folder: Path, swa_avg: Cli) -> None:
    Path("empty.keras").touch()
    Path("text.keras").write_text("not a model")
    for part in ("index", "data-00000-of-00001"):
        Path(f"cp.ckpt.{part}").write_bytes(b"\x00\x00\x01\x08")
    Path("dir.keras").mkdir()
    os.mkfifo("fifo.keras")
    for name, problem in (
        ("empty.keras", "empty.keras: the file is empty"),
        (
            "text.keras",
            "text.keras: not a Keras checkpoint: neither a .keras archive, nor a .weights.json, nor HDF5",
        ),
        (
            "dir.keras",
            "dir.keras: a folder without checkpoints.json; name its checkpoints, such as 'dir.keras/*.keras'",
        ),
        ("fifo.keras", "fifo.keras: not a regular file; name a checkpoint file"),
        ("missing.keras", "missing.keras: no such file"),
        *(
            (
                name,
                f"{name}: of a TensorFlow checkpoint, which is not read; in TensorFlow, load it with "
                "model.load_weights, then model.save_weights to a .weights.h5",
            )
            for name in ("cp.ckpt.index", "cp.ckpt.data-00000-of-00001")
        ),
        ("/dev/zero", "/dev/zero: not a regular file; name a checkpoint file"),
    ):
        _refused(swa_avg(name, "-o", "swa.keras"), 3, problem)


def test_a_damaged_archive_is_named_with_its_checksums(folder: Path, swa_avg: Cli) -> None:
    data = bytearray(Path("ckpt_2.keras").read_bytes())
    payload = makers.weights(2)["layers/dense/vars/0"].tobytes()
    data[data.index(payload) + 5] ^= 1
    Path("ckpt_2.keras").write_bytes(data)
    ended = swa_avg("ckpt_*.keras")
    assert ended.code == 3
    assert ended.err.startswith("swa-avg: error: ckpt_2.keras: damaged: its CRC-32 is ")
    assert ended.err.endswith("; leave this file out, or restore it\n")
    assert not Path("swa.keras").exists()
    assert swa_avg("ckpt_*.keras", "--no-verify").code == 0


def test_names_from_files_are_printed_escaped(tmp_path: Path, swa_avg: Cli) -> None:
    name = "layers/de\nn\x1b[31mse/vars/0"
    for number, shape in ((1, 3), (2, 4)):
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", {name: np.zeros(shape, np.float32)})
    first = tmp_path / "ckpt_1.weights.h5"
    _refused(
        swa_avg(tmp_path / "ckpt_*.weights.h5", "-o", tmp_path / "swa.weights.h5"),
        4,
        f"{first}: layers/de\\nn\\x1b[31mse/vars/0: expected float32[4] as in ckpt_2.weights.h5, found float32[3]",
    )


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            (),
            "no checkpoints named, and no checkpoints.json here; such as: swa-avg 'ckpt_*.keras' -o swa.keras",
        ),
        (("nothing_*.keras",), "no file matches 'nothing_*.keras'"),
        (("ckpt_*.keras", "--last", "4"), "last is 4, but found only 3 checkpoints"),
        (("ckpt_1.keras", "--last", "2"), "last is 2, but found only 1 checkpoint"),
        (("ckpt_*.keras", "--last", "0"), "last is 0; expected 1 or more"),
        (("ckpt_*.keras", "--every", "-1"), "every is -1; expected 1 or more"),
        (
            ("ckpt_*.keras", "--epochs", "50:60"),
            "epochs 50:60: none of the checkpoints; their epochs are 1, 2, 10",
        ),
        (
            ("ckpt_*.keras", "--epochs", "a:b"),
            "epochs 'a:b'; expected A:B or A:B:STEP, such as 140:150 or 100:200:10",
        ),
        (
            ("ckpt_*.keras", "--method", "ema"),
            "method 'ema': expected ema:DECAY, from 0 up to but not including 1, such as ema:0.9",
        ),
        (
            ("ckpt_*.keras", "--method", "weights:1,1"),
            "method 'weights:1,1': expected 3 numbers, one per checkpoint, found 2",
        ),
        (
            ("ckpt_1.keras", "--method", "weights:1,0"),
            "method 'weights:1,0': expected 1 number, one per checkpoint, found 2",
        ),
        (
            ("ckpt_*.keras", "--decay", "0.9"),
            "no such option: --decay; use --method ema:DECAY (see swa-avg --help)",
        ),
        (
            ("ckpt_*.keras", "--method", "power-ema", "--sigma-rel=0.1"),
            "no such option: --sigma-rel; use --method power-ema:SIGMA_REL (see swa-avg --help)",
        ),
        (
            ("inspect", "ckpt_*.keras", "--method", "weights", "--weights", "1,1"),
            "no such option: --weights; use --method weights:W,W,... (see swa-avg --help)",
        ),
        (
            ("verify", "swa.keras", "--decay", "1"),
            f"{click.NoSuchOption('--decay').format_message()} (see swa-avg --help)",  # Click's versions differ
        ),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: tuple[str, ...], problem: str, folder: Path, swa_avg: Cli
) -> None:
    before = _names(folder)
    _refused(swa_avg(*arguments), 2, problem)
    assert _names(folder) == before


def test_the_memory_limit_that_is_named_is_enough(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("ckpt_*.keras", "--max-memory", "1M")
    assert ended.code == 2
    line = r"swa-avg: error: max_memory 1\.0 MiB is too little; at least (\d+) MiB are needed\n"
    match = re.fullmatch(line, ended.err)
    assert match is not None
    least = int(match[1])
    assert swa_avg("ckpt_*.keras", "--max-memory", f"{least - 1}M").code == 2
    assert swa_avg("ckpt_*.keras", "--max-memory", f"{least}MiB").code == 0


def test_unknown_options_end_with_one_line(swa_avg: Cli) -> None:
    ended = swa_avg("--frobnicate")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "--frobnicate" in ended.err


def test_one_input_is_copied_bit_for_bit(folder: Path, swa_avg: Cli) -> None:
    ended = swa_avg("ckpt_1.keras", "-o", "swa.keras")
    assert (ended.code, ended.err) == (0, "wrote swa.keras: the uniform average of 1 checkpoint\n")
    for name, value in oracle.read_arrays(Path("swa.keras")).items():
        assert value.tobytes() == np.asarray(makers.weights(1)[name]).tobytes()


def test_the_output_says_how_it_was_made(folder: Path, swa_avg: Cli) -> None:
    import zipfile
    import zlib

    swa_avg("ckpt_*.keras")
    with zipfile.ZipFile("swa.keras") as archive:
        record = json.loads(archive.read("metadata.json"))["swa_avg"]
    expected = [
        {
            "name": f"ckpt_{number}.keras",
            "size": len(makers.store_bytes(makers.weights(number))),
            "crc32": [f"{zlib.crc32(makers.store_bytes(makers.weights(number))):08x}"],
            "coefficient": 1 / 3,
        }
        for number in (1, 2, 10)
    ]
    assert record["inputs"] == expected
    assert (record["method"], record["optimizer"], record["template"]) == ("uniform", "keep", "ckpt_10.keras")


@pytest.mark.parametrize(
    ("method", "python", "text", "coefficients"),
    [
        ("ema:.50", "ema:0.5", "ema:0.5", [0.25, 0.25, 0.5]),
        ("weights:1,2,1.0", [1, 2, 1], "weights:1,2,1", [0.25, 0.5, 0.25]),
        ("weights:1,1,1", (1, 1, 1), "weights:1,1,1", [1 / 3, 1 / 3, 1 / 3]),
        ("half-life:1", "half-life:1.0", "half-life:1", np.diff([0, 0.1**LN2, 0.2**LN2, 1]).tolist()),
        ("decay:cosine", "decay:cosine", "decay:cosine", [0.25, 0.5, 0.25]),
    ],
)
def test_the_record_holds_the_method_as_text_and_what_was_used(
    method: str, python: object, text: str, coefficients: list[float], folder: Path, swa_avg: Cli
) -> None:
    import zipfile

    ended = swa_avg("ckpt_*.keras", "--method", method, "--json")
    result = json.loads(ended.out)
    assert ended.err.endswith(f"wrote swa.keras: the {text} average of 3 checkpoints\n")
    assert ("counted by their epochs, 1, 2, 10\n" in ended.err) == method.startswith("half-life")
    average("ckpt_*.keras", "python.keras", method=python)  # type: ignore[arg-type]
    assert Path("python.keras").read_bytes() == Path("swa.keras").read_bytes()
    with zipfile.ZipFile("swa.keras") as archive:
        record = json.loads(archive.read("metadata.json"))["swa_avg"]
    for made in (result, record):
        assert made["method"] == text
        assert [entry["coefficient"] for entry in made["inputs"]] == pytest.approx(coefficients)
    ended = swa_avg("verify", "swa.keras")
    assert (ended.code, f"is the {text} average of 3 checkpoints" in ended.err) == (0, True)


def test_an_average_among_the_inputs_is_pointed_out(folder: Path, swa_avg: Cli) -> None:
    swa_avg("ckpt_1.keras", "ckpt_2.keras", "-o", "swa_3.keras")
    ended = swa_avg("ckpt_10.keras", "swa_3.keras", "-o", "again.keras")
    assert "warning: swa_3.keras is itself an average that swa-avg wrote\n" in ended.err


def test_a_run_interrupted_half_way_leaves_nothing(folder: Path) -> None:
    big = {"layers/dense/vars/0": np.zeros(40_000_000, np.float32)}
    for number in (1, 2):
        makers.write_weights(folder / f"big_{number}.weights.h5", big | {"vars/0": np.float32(number)})
    code = (
        "import os, signal, sys; from swa_avg import cli; from swa_avg.files import publication as publish\n"
        + (
            "create = publish.Publication.create\n"
            "def interrupted(self, *arguments):\n"
            "    file = create(self, *arguments)\n"
            "    os.kill(os.getpid(), getattr(signal, os.environ['SIGNAL']))\n"
            "    return file\n"
            "publish.Publication.create = interrupted\n"
            "sys.argv = ['swa-avg', 'big_*.weights.h5', '-o', 'swa.weights.h5']\n"
            "cli.main()\n"
        )
    )
    before = _names(folder)
    for name, exit_code in (("SIGINT", 130), ("SIGTERM", 143)):
        environment = {**os.environ, "SIGNAL": name}
        ended = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        word = "interrupted" if name == "SIGINT" else "terminated"
        assert (ended.returncode, ended.stderr) == (exit_code, f"swa-avg: {word}; nothing was written\n")
        assert _names(folder) == before


def test_help_shows_the_options_of_the_default_command(swa_avg: Cli) -> None:
    ended = swa_avg("--help")
    assert ended.code == 0
    assert ended.out.startswith("Usage: swa-avg [OPTIONS] [CHECKPOINTS]...\n")
    for heading in ("Which checkpoints", "How", "BatchNorm", "Output", "Checks", "Resources", "Other"):
        assert f"\n{heading}:\n  -" in ended.out
    assert "\nCommands, of which average is the default:\n  average  " in ended.out
    assert "  --version  " in ended.out


@pytest.mark.parametrize("command", [(), ("average",), ("inspect",), ("sweep",), ("verify",)], ids=str)
def test_help_lists_every_option_once_and_every_method(command: tuple[str, ...], swa_avg: Cli) -> None:
    from swa_avg.cli.program import main_group

    help_text = swa_avg(*command, "--help").out.partition("\nWhich checkpoints:\n")[2]
    for parameter in main_group.commands[(*command, "average")[0]].params:
        if isinstance(parameter, click.Option):
            pattern = rf"^  (-\w, )?{parameter.opts[-1]}\b(?!-)"
            assert len(re.findall(pattern, help_text, re.MULTILINE)) == 1, parameter.opts
    for entry in METHODS.values():
        assert (f"\n  {entry.spelling} " in help_text) == ("verify" not in command)
    assert not re.search(r" $", help_text, re.MULTILINE)


def test_completion_offers_options_commands_and_files() -> None:
    from click.shell_completion import ShellComplete

    from swa_avg.cli.program import main_group

    complete = ShellComplete(main_group, {}, "swa-avg", "_SWA_AVG_COMPLETE")
    assert "--last" in [item.value for item in complete.get_completions([], "--la")]
    assert "--last" in [item.value for item in complete.get_completions(["a.keras"], "--la")]
    methods = [item.value for item in complete.get_completions(["--method"], "")]
    assert methods == list(METHODS)
    assert "file" in [item.type for item in complete.get_completions([], "ck")]
    assert "average" in [item.value for item in complete.get_completions([], "av")]
    assert isinstance(main_group, click.Group)


def test_inputs_are_held_against_a_list_of_digests(folder: Path, swa_avg: Cli) -> None:
    inputs = sorted(folder.glob("ckpt_*.keras"))
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in inputs]
    Path("SHA256SUMS").write_text("".join(lines))
    assert swa_avg("ckpt_*.keras", "--expect-sha256", "SHA256SUMS").code == 0
    Path("SHA256SUMS").write_text("0" * 64 + lines[0][64:] + "".join(lines[1:]))
    ended = swa_avg("ckpt_*.keras", "--expect-sha256", "SHA256SUMS", "--overwrite")
    found = lines[0][:64]
    problem = f"damaged: its SHA-256 is {found}, SHA256SUMS says {'0' * 64}"
    _refused(ended, 3, f"{inputs[0].name}: {problem}; leave this file out, or restore it")
