"""Outputs whose records claim what is not so: none is called equal. They are made by h5py and zipfile."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import makers
from conftest import Ended

Cli = Callable[..., Ended]
WRITERS = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".h5": makers.write_legacy,
    ".weights.json": makers.write_sharded,
}
NUMBERS = (1, 2, 10)


def _arrays(number: int, suffix: str) -> dict[str, np.ndarray]:
    arrays = makers.weights(number)
    if suffix != ".h5":
        return arrays
    kinds = ("gamma", "beta", "moving_mean", "moving_variance")
    legacy = {
        f"dense/dense/{n}:0": arrays[f"layers/dense/vars/{k}"] for k, n in enumerate(("kernel", "bias"))
    }
    return legacy | {
        f"bn/bn/{name}:0": arrays[f"layers/batch_normalization/vars/{k}"] for k, name in enumerate(kinds)
    }


def _names(suffix: str) -> dict[str, str]:
    """Return what each kind of tensor is called in a format."""
    if suffix == ".h5":
        kinds = {"kernel": "dense/dense", "bias": "dense/dense"}
        kinds |= dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), "bn/bn")
        return {kind: f"model_weights/{group}/{kind}:0" for kind, group in kinds.items()}
    kinds = {"kernel": "dense/vars/0", "bias": "dense/vars/1", "gamma": "batch_normalization/vars/0"}
    kinds |= {"beta": "batch_normalization/vars/1", "moving_mean": "batch_normalization/vars/2"}
    kinds |= {"moving_variance": "batch_normalization/vars/3"}
    return {kind: f"layers/{name}" for kind, name in kinds.items()} | {"optimizer": "optimizer/vars/2"}


def _refresh(**digests: str) -> dict[str, Any]:
    """Return what a record says of a refresh that left these digests."""
    settings = {"estimator": "pooled", "samples": 9, "batch_size": 3, "seed": 0, "digest": "0" * 64}
    return {**settings, "values": digests}


class Forgery:
    """Three inputs, an honest output, and the means to change it."""

    def __init__(self, folder: Path, suffix: str, cli: Cli) -> None:
        self.folder, self.suffix, self.cli = folder, suffix, cli
        self.target = folder / f"swa{suffix}"
        self.names = _names(suffix)
        self.inputs = [
            WRITERS[suffix](folder / f"ckpt_{number}{suffix}", _arrays(number, suffix)) for number in NUMBERS
        ]

    def average(self, *options: str, inputs: list[Path] | None = None) -> None:
        ended = self.cli(*(inputs or self.inputs), "-o", self.target, "--overwrite", *options)
        assert ended.code == 0, ended.err

    def change_record(self, change: Callable[[dict[str, Any]], object], path: Path | None = None) -> None:
        path = path or self.target
        if self.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                metadata = json.loads(archive.read("metadata.json"))
            change(metadata["swa_avg"])
            _replace_members(path, **{"metadata.json": json.dumps(metadata).encode()})
        elif self.suffix == ".weights.json":
            value = json.loads(path.read_text())
            change(value["swa_avg"])
            path.write_text(json.dumps(value))
        else:
            with h5py.File(path, "r+") as file:
                record = json.loads(bytes(file.attrs["swa_avg"]))
                change(record)
                file.attrs["swa_avg"] = np.bytes_(json.dumps(record).encode())

    def claim(self, method: str, coefficients: list[float] | None = None) -> None:
        def change(record: dict[str, Any]) -> None:
            record["method"] = method
            for entry, coefficient in zip(
                record["inputs"], coefficients or [], strict=coefficients is not None
            ):
                entry["coefficient"] = coefficient

        self.change_record(change)

    @contextmanager
    def store(self, kind: str):
        """Give the dataset of a tensor of the output, to be changed."""
        name = self.names[kind]
        if self.suffix == ".keras":
            with zipfile.ZipFile(self.target) as archive:
                buffer = io.BytesIO(archive.read("model.weights.h5"))
            with h5py.File(buffer, "r+") as file:
                yield file[name]
            _replace_members(self.target, **{"model.weights.h5": buffer.getvalue()})
            return
        files = [self.target]
        if self.suffix == ".weights.json":
            files = sorted(self.folder.glob("swa_0*.weights.h5"))
        for path in files:
            with h5py.File(path, "r+") as file:
                if name in file:
                    yield file[name]
                    return

    def spoil(self, kind: str, *, excused: bool) -> None:
        """Change a tensor, and if `excused` say that a refresh did."""
        with self.store(kind) as dataset:
            dataset[...] = np.full(dataset.shape, 7.0, dataset.dtype)
            digest = f"{zlib.crc32(dataset[...].tobytes()):08x}"
        if excused:
            self.change_record(lambda record: record.update(batchnorm=_refresh(**{self.names[kind]: digest})))


def _replace_members(path: Path, **replaced: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | replaced).items():
            archive.writestr(zipfile.ZipInfo(name), data)


@pytest.fixture(params=WRITERS)
def forgery(request: pytest.FixtureRequest, tmp_path: Path, swa_avg: Cli) -> Forgery:
    return Forgery(tmp_path, request.param, swa_avg)


def _refused(forgery: Forgery, *problems: str) -> str:
    """Return what is said of a forgery: one line or several, and never that it is equal."""
    ended = forgery.cli("verify", forgery.target)
    assert ended.code in (3, 4), ended.err
    lines = ended.err.splitlines()
    assert all(line.startswith("swa-avg: error: ") for line in lines)
    assert "equal" not in ended.err
    assert not ended.out
    for problem in problems:
        assert any(problem in line for line in lines), ended.err
    as_json = forgery.cli("verify", forgery.target, "--json")
    assert not as_json.out or not json.loads(as_json.out)["equal"]
    return ended.err


@pytest.mark.parametrize("kind", ["kernel", "bias", "gamma", "beta", "optimizer"])
def test_a_refresh_excuses_no_tensor_but_statistics(forgery: Forgery, kind: str) -> None:
    if kind not in forgery.names:
        pytest.skip("this format holds no optimizer here")
    forgery.average()
    forgery.spoil(kind, excused=True)
    name = forgery.names[kind]
    _refused(forgery, f"{name}: no BatchNorm statistic", f"{name}: differs from what the inputs give")


def test_a_tensor_that_no_file_has_is_no_statistic(forgery: Forgery) -> None:
    forgery.average()
    forgery.change_record(lambda record: record.update(batchnorm=_refresh(**{"a/moving_mean": "0" * 8})))
    _refused(forgery, "a/moving_mean: ")


def test_statistics_are_counted_apart_and_held_against_the_digest(forgery: Forgery) -> None:
    forgery.average()
    forgery.spoil("moving_variance", excused=True)
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0
    assert ended.err.splitlines()[-1].startswith(
        "equal, but for 1 statistic that a refresh replaced and that cannot be derived without its data: "
    )
    with forgery.store("moving_variance") as dataset:
        dataset[0] = 8.0
    _refused(forgery, "the refresh of BatchNorm left")


def test_statistics_are_not_excused_unasked(forgery: Forgery) -> None:
    forgery.average()
    forgery.spoil("moving_mean", excused=False)
    _refused(forgery, "differs from what the inputs give")


def _itself(forgery: Forgery) -> Path:
    return forgery.target


def _hard_link(forgery: Forgery) -> Path:
    return _linked(forgery, os.link)


def _symbolic_link(forgery: Forgery) -> Path:
    return _linked(forgery, os.symlink)


def _linked(forgery: Forgery, link: Callable[[Path, Path], None]) -> Path:
    path = forgery.folder / f"ckpt_99{forgery.suffix}"
    if forgery.suffix == ".weights.json":  # a map of its own, which names the shards of the output
        value = json.loads(forgery.target.read_text())
        del value["swa_avg"]
        path.write_text(json.dumps(value))
    else:
        link(forgery.target, path)
    return path


def _copy(forgery: Forgery) -> Path:
    path = forgery.folder / f"ckpt_99{forgery.suffix}"
    shutil.copy(forgery.target, path)
    if forgery.suffix == ".weights.json":
        value = json.loads(path.read_text())
        for shard in sorted(forgery.folder.glob("swa_0*.weights.h5")):
            shutil.copy(shard, forgery.folder / shard.name.replace("swa", "ckpt_99"))
        text = json.dumps(value["weight_map"]).replace('"swa_', '"ckpt_99_')
        path.write_text(json.dumps(value | {"weight_map": json.loads(text)}))
    return path


@pytest.mark.parametrize("make", [_itself, _hard_link, _symbolic_link, _copy], ids=lambda make: make.__name__)
def test_an_output_is_no_input_of_itself(forgery: Forgery, make: Callable[[Forgery], Path]) -> None:
    forgery.average()
    forgery.spoil("kernel", excused=False)

    def only(record: dict[str, Any]) -> None:
        del record["inputs"][:-1]
        name = forgery.target.name if make is _itself else f"ckpt_99{forgery.suffix}"
        record["inputs"][0] |= {"coefficient": 1.0, "name": name}
        record["inputs"][0]["crc32"] = [None] * len(record["inputs"][0]["crc32"])
        record["template"] = name

    forgery.change_record(only)
    make(forgery)
    _refused(forgery, "itself as an input")


def test_a_copy_of_an_output_under_another_record_is_no_input_alone(forgery: Forgery) -> None:
    forgery.average()
    forgery.spoil("kernel", excused=False)
    copy = _copy(forgery)
    for path in forgery.folder.glob("swa*"):  # a set of shards is not replaced
        path.unlink()
    forgery.average(inputs=[copy])
    _refused(forgery, f"made from {copy.name} alone, which swa-avg wrote")


def test_inputs_that_are_averages_are_said_to_be(forgery: Forgery) -> None:
    first = forgery.folder / f"ckpt_20{forgery.suffix}"
    assert forgery.cli(*forgery.inputs[:2], "-o", first).code == 0
    forgery.average(inputs=[forgery.inputs[2], first])
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0, ended.err
    said = "unchecked: how these inputs were made, which swa-avg wrote"
    assert ended.err.startswith(f"{said}: {first.name}\nequal: ")


@pytest.mark.parametrize(
    ("made", "claimed"),
    [
        ("weights:5,-7,3", "uniform"),
        ("weights:0,0,1", "uniform"),
        ("weights:1,1,2", "uniform"),
        ("uniform", "ema:0.5"),
        ("ema:0.5", "ema:0.25"),
        ("uniform", "ema"),
        ("weights:1,2,2", "ema"),
        ("uniform", "weights:1,2,3"),
        ("uniform", "weights:1,1"),
        ("uniform", "power-ema:0.1"),
        ("power-ema:0.2", "power-ema:0.1"),
        ("uniform", "power-ema"),
        ("weights:5,-7,3", "power-ema"),
        ("uniform", "half-life:0.2"),
        ("uniform", "decay:cosine"),
        ("ema:0.5", "decay:linear"),
        ("weights:1,1,2", "greedy"),
        ("weights:1,1,2", "last:3"),
        ("uniform", "last:2"),
        ("uniform", "single"),
        ("weights:0,0,1", "single"),
    ],
)
def test_a_method_that_gives_other_coefficients_is_named(forgery: Forgery, made: str, claimed: str) -> None:
    forgery.average("--method", made)
    forgery.claim(claimed)
    _refused(forgery, "coefficients: ")


@pytest.mark.parametrize(
    "coefficients",
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [1.0, -1.0, 0.0], [1 / 3, 1 / 3, 1 / 3 + 1e-9]],
    ids=str,
)
@pytest.mark.parametrize("method", ["uniform", "weights"])
def test_coefficients_that_do_not_sum_to_one_are_refused_in_one_line(
    forgery: Forgery, method: str, coefficients: list[float]
) -> None:
    forgery.average()
    forgery.claim(method, coefficients)
    assert (
        _refused(forgery, "record of how it was made is damaged (its coefficients sum to ").count("\n") == 1
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(method="the best of all averages"),
        lambda record: record.update(method="uniform\nequal: it is"),
        lambda record: record.update(method="last:0"),
        lambda record: record.update(method=["uniform"]),
        lambda record: record.update(template="ckpt_1.keras"),
        lambda record: record["inputs"][0].update(size=-1),
        lambda record: record["inputs"][0].update(name="."),
        lambda record: record["inputs"][0].update(name="a\0b"),
        lambda record: record["inputs"][0].update(name="a\ud800"),
        lambda record: record.update(inputs=[]),
        lambda record: record.update(batchnorm=_refresh() | {"samples": -1}),
        lambda record: record.update(batchnorm=_refresh() | {"samples": True}),
        lambda record: record.update(batchnorm=_refresh() | {"batch_size": 0}),
        lambda record: record.update(batchnorm=_refresh() | {"seed": 0.5}),
        lambda record: record.update(batchnorm=_refresh() | {"estimator": "median"}),
        lambda record: record.update(batchnorm=_refresh() | {"digest": "equal: it is"}),
        lambda record: record.update(batchnorm=_refresh(a="1")),
        lambda record: record.update(batchnorm=[]),
    ],
)
def test_a_record_that_no_version_writes_is_damaged(
    forgery: Forgery, change: Callable[[dict[str, Any]], object]
) -> None:
    forgery.average()
    forgery.change_record(change)
    assert _refused(forgery, "its record of how it was made is damaged (").count("\n") == 1


def test_values_of_other_coefficients_than_recorded_are_found(forgery: Forgery) -> None:
    forgery.average("--method", "weights:5,-7,3")
    forgery.claim("uniform", [1 / 3] * 3)
    _refused(forgery, ": 6 times: ")


@pytest.mark.parametrize("method", ["uniform", "ema:0.5"])
def test_inputs_out_of_their_order_are_named(forgery: Forgery, method: str) -> None:
    away = forgery.folder / "away"
    away.mkdir()
    for number, turned in zip(NUMBERS, NUMBERS[::-1], strict=True):
        WRITERS[forgery.suffix](away / f"ckpt_{turned}{forgery.suffix}", _arrays(number, forgery.suffix))
    forgery.average(
        "--method",
        method,
        inputs=[away / path.name for path in forgery.inputs],
    )

    def rename(record: dict[str, Any]) -> None:
        for entry, path in zip(record["inputs"], forgery.inputs[::-1], strict=True):
            entry["name"] = path.name
        record["template"] = forgery.inputs[0].name

    forgery.change_record(rename)
    _refused(forgery, "inputs: not in training order, which is ckpt_1")


def test_a_checkpoint_under_two_names_is_counted_once(forgery: Forgery) -> None:
    WRITERS[forgery.suffix](forgery.folder / f"ckpt_11{forgery.suffix}", _arrays(NUMBERS[-1], forgery.suffix))
    forgery.average("--method", "weights:1,1,2")

    def twice(record: dict[str, Any]) -> None:
        record["method"] = "uniform"
        for entry in record["inputs"]:
            entry["coefficient"] = 0.25
        record["template"] = f"ckpt_11{forgery.suffix}"
        record["inputs"].append(record["inputs"][-1] | {"name": record["template"]})

    forgery.change_record(twice)
    _refused(forgery, "the same bytes as")


def test_another_input_than_the_recorded_one_is_named(forgery: Forgery) -> None:
    forgery.average()
    WRITERS[forgery.suffix](forgery.inputs[1], _arrays(77, forgery.suffix))
    _refused(forgery, "has changed since")


def test_an_input_without_a_digest_is_said_to_be_unchecked(forgery: Forgery) -> None:
    forgery.average()
    shards = 2 if forgery.suffix == ".weights.json" else 1
    forgery.change_record(lambda record: record["inputs"][1].update(crc32=[None] * shards))
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0
    name = forgery.inputs[1].name
    assert ended.err.startswith("unchecked: whether these have changed since")
    assert ended.err.splitlines()[0].endswith(f": {name}")


@pytest.mark.parametrize(
    ("made", "claimed", "said"),
    [
        ("uniform", "greedy", "the uniform average of 3 checkpoints"),
        ("uniform", "last:3", "the uniform average of 3 checkpoints"),
        ("ema:0.9", "ema", "the ema:0.9 average of 3 checkpoints"),
        (
            "weights:1,1,2",
            "weights",
            "the average of 3 checkpoints with the coefficients in its record (0.25, 0.25, 0.5)",
        ),
        ("half-life:0.3", "half-life:0.3", "the half-life:0.3 average of 3 checkpoints"),
    ],
)
def test_what_is_said_is_what_was_proven(forgery: Forgery, made: str, claimed: str, said: str) -> None:
    forgery.average("--method", made)
    forgery.claim(claimed)
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0, ended.err
    assert f"equal: {forgery.target} is {said} (" in ended.err


def test_where_epochs_are_not_known_the_method_is_not_said(forgery: Forgery) -> None:
    forgery.average("--method", "power-ema:0.2")
    names = dict(zip((path.name for path in forgery.inputs), "abc", strict=True))
    coefficients = []

    def rename(record: dict[str, Any]) -> None:
        for entry in record["inputs"]:
            entry["name"] = record["template"] = names[entry["name"]] + forgery.suffix
            coefficients.append(entry["coefficient"])

    for path in forgery.inputs:
        path.rename(path.with_name(names[path.name] + forgery.suffix))
    forgery.change_record(rename)
    shown = ", ".join(f"{coefficient:.6g}" for coefficient in coefficients)
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0, ended.err
    assert f"the average of 3 checkpoints with the coefficients in its record ({shown})" in ended.err
    assert json.loads(forgery.cli("verify", forgery.target, "--json").out)["method"] == "weights"


def test_epochs_are_read_from_names_as_they_were_among_more(tmp_path: Path, swa_avg: Cli) -> None:
    for epoch in (1, 2, 3):
        for step in (100, 200):
            number = 1000 * epoch + step
            makers.write_archive(tmp_path / f"m-e{epoch}-s{number}.keras", makers.weights(number))
    target = tmp_path / "swa.keras"
    chosen = ("--epochs", "2:3", "--every", "2", "--method", "power-ema:0.2")
    assert swa_avg(tmp_path / "m-*.keras", "-o", target, *chosen).code == 0
    ended = swa_avg("verify", target)
    assert ended.code == 0, ended.err
    assert "the power-ema:0.2 average of 2 checkpoints" in ended.err


@pytest.mark.skipif(os.name == "nt", reason="these are names on other systems")
@pytest.mark.parametrize(
    "name", ["epoch:{}", "run\\ckpt_{}", "C:{}", "ckpt_{}\u200b", "\u202eckpt_{}", "ckpt_{}\n"]
)
@pytest.mark.parametrize("suffix", WRITERS)
def test_whatever_a_file_can_be_called_is_verified(
    suffix: str, name: str, tmp_path: Path, swa_avg: Cli
) -> None:
    paths = [tmp_path / (name.format(number) + suffix) for number in NUMBERS]
    for number, path in zip(NUMBERS, paths, strict=True):
        WRITERS[suffix](path, _arrays(number, suffix))
    target = tmp_path / f"swa{suffix}"
    ended = swa_avg(*paths, "-o", target)
    assert ended.code == 0, ended.err
    ended = swa_avg("verify", target)
    assert ended.code == 0, ended.err
    assert ended.err.startswith("equal: ")


def test_a_copy_that_alone_counts_is_called_a_copy_and_no_average(forgery: Forgery) -> None:
    forgery.average("--method", "weights:0,0,1")
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0, ended.err
    said = f"equal: {forgery.target} is a copy of ckpt_10{forgery.suffix}, no average ("
    assert ended.err.splitlines()[-1].startswith(said)


def test_a_copy_that_outweighs_all_others_makes_no_average(tmp_path: Path, swa_avg: Cli) -> None:
    forgery = Forgery(tmp_path, ".keras", swa_avg)
    forgery.average("--method", "weights:1,1,1e12")
    _refused(forgery, "ckpt_10.keras: holds the weights of the output, and other inputs count for 2e-12")


def test_inputs_that_are_the_same_are_said_to_be(tmp_path: Path, swa_avg: Cli) -> None:
    forgery = Forgery(tmp_path, ".keras", swa_avg)
    arrays = _arrays(10, ".keras")
    other = arrays | {"optimizer/vars/2": arrays["optimizer/vars/2"] + 1}
    twins = [makers.write_archive(tmp_path / f"twin_{n}.keras", a) for n, a in ((1, arrays), (2, other))]
    forgery.average(inputs=twins)
    ended = forgery.cli("verify", forgery.target)
    assert ended.code == 0, ended.err
    said = f"equal: {forgery.target} is a copy of each of 2 checkpoints, whose weights are the same ("
    assert ended.err.splitlines()[-1].startswith(said)


def test_a_stripped_copy_among_others_is_named_and_they_average_to_it(tmp_path: Path, swa_avg: Cli) -> None:
    zeros = {name: np.zeros_like(values) for name, values in _arrays(1, ".keras").items()}
    for number, value in ((1, -1), (2, 1), (3, 0)):
        arrays = {n: (v + value if v.ndim else v).astype(v.dtype) for n, v in zeros.items()}
        makers.write_archive(tmp_path / f"ckpt_{number}.keras", arrays)
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_*.keras", "-o", target).code == 0
    ended = swa_avg("verify", target)
    assert ended.code == 0, ended.err
    said = "holds the weights of the output, as the average of the other inputs does: ckpt_3.keras"
    assert ended.err.splitlines()[0] == said
