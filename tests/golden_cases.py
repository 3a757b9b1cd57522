"""What the command line gave for a list of cases, so that code can be rewritten and no output byte change.

`golden/results.json` holds, of each case, digests of the output and of what was printed. `test_golden.py`
runs the cases anew and compares. The same results are due on every machine, with every version of HDF5, NumPy
and Keras that is supported, so:

- inputs are files whose bytes are fixed: `golden/inputs.zip`, once written by `makers.py`, and the corpus;
- coefficients are such that no rounding of `pow` shows: ema:0.5, and a power-ema whose exponent is 4;
- what libhdf5 wrote (the record in an HDF5 file; all of a file without its optimizer) is compared by what it
  holds; bytes are compared, too, where HDF5 and swa-avg are of the versions that they were recorded with;
- BatchNorm statistics that Keras computed, and what inspection measures, are compared as numbers;
- left out of what is printed is `peak_memory`, which depends on the machine. Paths are relative as they are.

Results stay when the code changes: that is what they are for. `python tests/golden_cases.py` records the
cases that `results.json` does not have yet, and touches no other; an entry is removed by hand, on purpose,
where outputs are meant to change. `golden/outputs.zip` holds outputs of some cases that version 0.1.0 wrote,
by the case's name; it never changes, since what was once written is to verify for ever.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np

import oracle

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
RESULTS = GOLDEN / "results.json"
OUTPUTS = GOLDEN / "outputs.zip"

Cli = Callable[..., Any]
"""Runs the command line; what it returns has `code`, `out` and `err`."""

# --- The spelling of methods: the one place that a change of the grammar changes ----------------------------


def spelling(method: str) -> tuple[tuple[str, ...], str]:
    """Return the options that ask for a method, NAME or NAME:VALUE, and what results and records call it.

    What they call it is checked, and taken out before they are compared.
    """
    return ("--method", method), method


# --- The cases ----------------------------------------------------------------------------------------------

POWER = "power-ema:0.1632993161855452"  # exponent 4
QUARTER = {3: "weights:0.25,0.25,0.5", 4: "weights:0.125,0.25,0.125,0.5"}


@dataclass(frozen=True)
class Case:
    """A command; `output` is the suffix of the output, none for `inspect`."""

    arguments: tuple[str, ...]
    output: str = ""
    method: str = "uniform"
    same_as: str = ""
    """Another case that must give the same."""
    folder: str = ""
    """Where the inputs are."""


RUNS = {
    # name: (folder, pattern, suffix of the output, number of checkpoints)
    "archives": ("keras", "ckpt_*.keras", ".keras", 4),
    "weights": ("keras", "ckpt_*.weights.h5", ".weights.h5", 4),
    "archives to weights": ("keras", "ckpt_*.keras", ".weights.h5", 4),
    "sharded": ("sharded", "ckpt_*.weights.json", ".weights.json", 3),
    "legacy": ("legacy", "ckpt_*.h5", ".h5", 3),
    **{
        f"{folder.split('/')[0]} {pattern}": (f"corpus/{folder}", pattern, suffix, 3)
        for folder, pattern, suffix in (
            ("keras-3.3.3-tf/cnn_bn", "ck?.keras", ".keras"),
            ("keras-3.3.3-tf/cnn_bn", "ck?.weights.h5", ".weights.h5"),
            ("keras-3.3.3-tf/cnn_bn", "ck?.h5", ".h5"),
            ("tf-2.12.1/cnn_bn", "ck?.keras", ".keras"),
            ("tf-2.12.1/cnn_bn", "ck?.weights.h5", ".weights.h5"),
            ("tf-2.12.1/cnn_bn", "ck?.h5", ".h5"),
            ("tf-2.12.1/cnn_bn", "ck?.hdf5", ".hdf5"),
            ("tf-2.12.1/cnn_bn", "ck?_weights.h5", ".h5"),
            ("tf_keras-2.21.0/policy_bfloat16", "ck?.keras", ".keras"),
            ("tf_keras-2.21.0/policy_bfloat16", "ck?.weights.h5", ".weights.h5"),
            ("tf_keras-2.21.0/policy_bfloat16", "ck?.h5", ".h5"),
            ("tf_keras-2.21.0/policy_bfloat16", "ck?_weights.h5", ".h5"),
        )
    },
}
SELECTIONS = {
    "epochs 2:4": ("--epochs", "2:4"),
    "epochs 1::3": ("--epochs", "1::3"),
    "last 1": ("--last", "1"),
    "last 2": ("--last", "2"),
    "every 2": ("--every", "2"),
    "every 3": ("--every", "3"),
    "best 2": ("--best", "2"),
    "best 3": ("--best", "3"),
    "best 2, val_accuracy": ("--best", "2", "--monitor", "val_accuracy"),
    "best 2, most speed": ("--best", "2", "--monitor", "speed", "--mode", "max"),
    "best 2, least speed": ("--best", "2", "--monitor", "speed", "--mode", "min"),
    "epochs 2: last 2": ("--epochs", "2:", "--last", "2"),
    "best 3 every 2": ("--best", "3", "--every", "2"),
}


def _cases() -> dict[str, Case]:
    cases = {}
    for run, (folder, pattern, suffix, count) in RUNS.items():
        inputs = (f"{folder}/{pattern}",)
        if "bfloat16" in folder and pattern in ("ck?.weights.h5", "ck?_weights.h5"):
            inputs += ("--dtype", "bfloat16")
        for method in ("uniform", "ema:0.5", POWER, QUARTER[count]):
            # The powers of thirds are not exact.
            own = ("--epochs", "1:2") if method == POWER and "corpus" in folder else ()
            cases[f"{run}: {method}"] = Case((*inputs, *own), suffix, method, folder=folder)
        cases[f"{run}: no optimizer"] = Case((*inputs, "--optimizer", "drop"), suffix, folder=folder)
        cases[f"{run}: inspect"] = Case(("inspect", *inputs))
        if "corpus" not in folder:
            cases[f"{run}: no verify"] = Case((*inputs, "--no-verify"), suffix, folder=folder)
            for name, options in {
                "1 thread": ("--threads", "1"),
                "3 threads": ("--threads", "3"),
                "little memory": ("--max-memory", "400M"),
            }.items():
                arguments = (*inputs, *options)
                cases[f"{run}: {name}"] = Case(
                    arguments, suffix, QUARTER[count], f"{run}: {QUARTER[count]}", folder
                )
    for name, options in SELECTIONS.items():
        cases[f"selection: {name}"] = Case(("keras", *options), ".keras", folder="keras")
        cases[f"selection: {name}, inspect"] = Case(("inspect", "keras", *options))
    archives = "archives: uniform"
    digests = ("--expect-sha256", "keras/SHA256SUMS")
    backwards = tuple(f"keras/ckpt_{number}.keras" for number in (16, 4, 2, 1))
    cases["archives: given digests"] = Case(
        ("keras/ckpt_*.keras", *digests), ".keras", "uniform", archives, "keras"
    )
    cases["archives: folder"] = Case(("keras",), ".keras", "uniform", archives, "keras")
    cases["archives: named backwards"] = Case(backwards, ".keras", "uniform", archives, "keras")
    for method in ("ema:0", "weights:1.5,0,0,-0.5", "weights:0,0,1,0"):
        cases[f"archives: {method}"] = Case(("keras/ckpt_*.keras",), ".keras", method, folder="keras")
    for method in ("ema:0.9", "power-ema:0.1", QUARTER[4]):
        cases[f"archives: inspect {method}"] = Case(("inspect", "keras/ckpt_*.keras"), "", method)
    last = ("keras/ckpt_*.keras", "--last", "2")
    cases["archives: last 2, power-ema"] = Case(last, ".keras", POWER, folder="keras")
    return cases


def _keras_cases() -> dict[str, Case]:
    """Return the cases that need Keras: refreshing BatchNorm, and sweeps."""
    folder = "corpus/keras-3.3.3-tf/cnn_bn"
    archives, weights, legacy = (f"{folder}/ck?{suffix}" for suffix in (".keras", ".weights.h5", ".h5"))
    data = ("--bn-refresh", "data/train.npz")
    batches = ("--bn-batch-size", "20")
    model = ("--model", f"{folder}/ck1.keras")
    refreshes = {
        "pooled": ((archives, *data, *batches), ".keras", "uniform"),
        "batch-mean": ((archives, *data, *batches, "--bn-estimator", "batch-mean"), ".keras", "uniform"),
        "one batch": ((archives, *data), ".keras", "ema:0.5"),
        "30 rows": ((archives, *data, "--bn-samples", "30"), ".keras", "uniform"),
        "30 rows, seed 7": ((archives, *data, "--bn-samples", "30", "--bn-seed", "7"), ".keras", "uniform"),
        "preprocessed": ((archives, *data, "--bn-preprocess", "golden_data:halved"), ".keras", QUARTER[3]),
        "no optimizer": ((archives, *data, *batches, "--optimizer", "drop"), ".keras", "uniform"),
        "archives to weights": ((archives, *data, *batches), ".weights.h5", "uniform"),
        "weights": ((weights, *data, *batches, *model), ".weights.h5", "uniform"),
        "legacy": ((legacy, *data, *batches), ".h5", "uniform"),
        "last 1": ((archives, *data, *batches, "--last", "1"), ".keras", "uniform"),
    }
    validation = ("sweep", archives, "--val", "data/val.npz")
    distance = ("--metric", "golden_data:distance", "--mode", "min")
    tried = tuple(
        word
        for name in ("last:2", "uniform", "ema:0.5", "power-ema:0.1", "greedy")
        for word in ("--candidates", name)
    )
    sweeps = {
        "compiled loss": (*validation, "--monitor", "loss"),
        "compiled accuracy": (*validation, "--val-target", "labels", *data, *batches, "--epochs", "1:2"),
        "distance": (*validation, *distance, *tried),
        "refreshed": (*validation, *distance, *data, *batches, *tried),
        "no optimizer": (*validation, *distance, *data, *batches, "--optimizer", "drop", "--last", "2"),
    }
    sweeps["compiled loss"] += ("--val-target", "labels")
    for name in ("distance", "refreshed", "no optimizer"):
        sweeps[name] += ("--val-target", "predictions")
    return {
        **{f"refresh: {name}": Case(*case, folder=folder) for name, case in refreshes.items()},
        **{f"sweep: {name}": Case(case, ".keras", folder=folder) for name, case in sweeps.items()},
    }


CASES = _cases()
KERAS_CASES = _keras_cases()
ALL_CASES = CASES | KERAS_CASES
KERAS_WARNINGS = (
    "ignore::DeprecationWarning",
    "ignore:Skipping variable loading for optimizer:UserWarning",  # Keras 3.15, of files of Keras 3.3
)

# --- Running one --------------------------------------------------------------------------------------------


def lay_out(folder: Path) -> None:
    """Put the inputs into a folder, which is to be the current one."""
    shutil.unpack_archive(GOLDEN / "inputs.zip", folder)
    shutil.copytree(HERE / "corpus", folder / "corpus")
    for path in sorted((folder / "keras").glob("*.keras")):
        with zipfile.ZipFile(path) as archive:
            path.with_suffix(".weights.h5").write_bytes(archive.read("model.weights.h5"))
    random = np.random.RandomState(5)  # whose stream NumPy keeps
    train, val = (random.randint(0, 256, (rows, 16, 16, 3)) for rows in (60, 40))
    labels, predictions = random.randint(0, 4, 40), np.load(folder / "data/predictions.npy")
    np.savez(folder / "data/train.npz", x_train=(train / 256).astype(np.float32))
    np.savez(
        folder / "data/val.npz", x_val=(val / 256).astype(np.float32), labels=labels, predictions=predictions
    )


def old_outputs() -> list[str]:
    """Return the cases of which `golden/outputs.zip` holds the output."""
    with zipfile.ZipFile(OUTPUTS) as archive:
        return list(dict.fromkeys(name.split("/")[0] for name in archive.namelist()))


def unpack_output(name: str) -> Path:
    """Put the output that version 0.1.0 wrote of a case where `run` has it, and return its path."""
    folder = Path("out")
    folder.mkdir()
    with zipfile.ZipFile(OUTPUTS) as archive:
        for member in archive.namelist():
            if member.split("/")[0] == name:
                (folder / member.split("/")[1]).write_bytes(archive.read(member))
    return folder / f"swa{ALL_CASES[name].output}"


def run(case: Case, cli: Cli, version: str) -> dict[str, Any]:
    """Run a case in a current folder that holds the inputs; return what is recorded of it."""
    if case.arguments[0] == "sweep":  # its candidates are named in one way
        options, named = (), None
    else:
        options, named = spelling(case.method)
    if not case.output:
        return printed(cli(*case.arguments, *options, "--json", "-q"), named)
    output = Path("out", f"swa{case.output}")
    output.parent.mkdir()
    try:
        ended = cli(*case.arguments, *options, "-o", output, "--json", "-q")
        result = printed(ended, named)
        result |= contents(output, named, version, rebuilt="drop" in case.arguments)
        return result | {"verify": verified(output, case, cli, named)}
    finally:
        shutil.rmtree(output.parent)


def verified(output: Path, case: Case, cli: Cli, named: str | None) -> dict[str, Any]:
    return printed(cli("verify", output, "--inputs", case.folder, "--json", "-q"), named)


def printed(ended: Any, method: str | None) -> dict[str, Any]:
    """Return a digest of what was printed, and apart from it what was measured, or computed by Keras."""
    assert ended.code == 0, ended.err
    value = json.loads(ended.out)
    if method is not None:
        assert value.pop("method") == method
    value.pop("peak_memory", None)
    value.pop("best", None)  # by which values they were chosen
    result: dict[str, Any] = {}
    assert value.pop("other_weights", None) is None
    value.pop("movement", None)  # measured, too
    if "relation" in value:  # measured, and younger than most of the results
        assert value.pop("relation")["related"] in (None, True)
    if "geometry" in value:  # linear algebra, in whichever order the processor likes best
        result["geometry"] = value.pop("geometry")
        result["coefficients"] = [checkpoint.pop("coefficient") for checkpoint in value["checkpoints"]]
    if value.get("refresh"):
        result["refresh"] = _report(value.pop("refresh"))
    for key in ("singles", "averages"):
        if key in value:
            result[key] = value.pop(key)
            for scored in result[key]:
                scored["refresh"] = scored["refresh"] and scored["refresh"]["digest"]
    return {"printed": digest(value), **result}


def _report(refresh: dict[str, Any]) -> dict[str, Any]:
    """Return the report of a refresh without the rounded numbers in its sentences."""
    del refresh["suggested_samples"]
    for key in ("notes", "warnings"):
        refresh[key] = [re.split(r"[0-9]", sentence)[0] for sentence in refresh[key]]
    return refresh


def contents(output: Path, method: str | None, version: str, *, rebuilt: bool = False) -> dict[str, Any]:
    """Return what is recorded of an output: its record, and digests of all else.

    `rebuilt`: libhdf5 wrote its HDF5 images, which are not compared by their bytes.
    """
    record = _record(output)
    assert record.pop("version") == version
    if method is not None:
        assert record.pop("method") == method
    result: dict[str, Any] = {}
    checksums = record.get("batchnorm", {}).pop("values", {})
    if checksums:  # what Keras computed: compared as numbers
        arrays = oracle.read_arrays(output)
        assert checksums == {name: f"{zlib.crc32(arrays[name].tobytes()):08x}" for name in checksums}
        result["statistics"] = {name: arrays[name].astype(float).round(7).tolist() for name in checksums}
    if "sweep" in record:
        result["scores"] = record["sweep"].pop("candidates")
    if not checksums and "sweep" not in record:
        whole = b"".join(file.read_bytes() for file in _files(output))
        made_by = f"HDF5 {h5py.version.hdf5_version}, swa-avg {version}, {method}"
        result["bytes"] = {made_by: _digest(whole)}
    image: Callable[[bytes], Any] = _digest
    if rebuilt or checksums or not (zipfile.is_zipfile(output) or output.suffix == ".json"):
        image = partial(_hdf5, places=not rebuilt, without=checksums)
    return {"record": json.dumps(record), "contents": _contents(output, image), **result}


def _files(output: Path) -> list[Path]:
    return [output, *sorted(path for path in output.parent.iterdir() if path != output)]


def _record(output: Path) -> Any:
    """Return what an output says of how it was made."""
    if zipfile.is_zipfile(output):
        with zipfile.ZipFile(output) as archive:
            return json.loads(archive.read("metadata.json"))["swa_avg"]
    if output.suffix == ".json":
        return json.loads(output.read_bytes())["swa_avg"]
    with h5py.File(output, "r") as file:
        parts = sorted((key for key in file.attrs if _is_record(key)), key=lambda key: (len(key), key))
        text = b"".join(bytes(file.attrs[key]) for key in parts).decode()
    record = json.loads(text)
    assert json.dumps(record, separators=(",", ":")) == text
    return record


def _is_record(attribute: str) -> bool:
    return re.fullmatch(r"swa_avg\d*", attribute) is not None


def _contents(output: Path, image: Callable[[bytes], Any]) -> Any:
    """Return digests of all but the record; `image` gives that of an HDF5 image."""
    if zipfile.is_zipfile(output):
        return _members(output, image)
    if output.suffix != ".json":
        return image(output.read_bytes())
    text = output.read_bytes()
    value = json.loads(text)
    assert json.dumps(value, indent=4).encode() == text
    del value["swa_avg"]
    shards = {file.name: image(file.read_bytes()) for file in _files(output)[1:]}
    return {"map": _digest(json.dumps(value).encode()), **shards}


def _members(output: Path, image: Callable[[bytes], Any]) -> dict[str, Any]:
    """Return of each member of an archive how it is marked, and its contents."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(output) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            data = archive.read(info)
            content = image(data) if info.filename == "model.weights.h5" else _digest(data)
            if info.filename == "metadata.json":
                metadata = json.loads(data)
                assert json.dumps(metadata).encode() == data
                del metadata["swa_avg"]
                content = _digest(json.dumps(metadata).encode())
            marks = (info.compress_type, info.create_system, info.create_version, info.flag_bits)
            found[info.filename] = [
                *info.date_time,
                *marks,
                info.external_attr,
                info.extra.hex(),
                content,
            ]
    return found


def _hdf5(data: bytes, *, places: bool, without: Container[str] = ()) -> dict[str, str]:
    """Return digests of what an HDF5 file holds, but for the record and the values of some datasets.

    `places`: where the tensors lie counts.
    """
    values, shapes, attributes, offsets = [], [], [], []

    def visit(name: str, item: Any) -> None:
        for key in item.attrs:
            if name or not _is_record(key):
                value = np.asarray(item.attrs[key])
                kind = "text" if value.dtype.kind in "OU" else value.dtype.str
                attributes.append([name, key, kind, value.shape, repr(value.tolist())])
        if isinstance(item, h5py.Dataset):
            assert item.chunks is None
            if name not in without:
                values.append([name, _digest(np.asarray(item[()]).tobytes())])
            shapes.append([name, item.dtype.str, item.shape])
            offsets.append([name, item.id.get_offset()])
        else:
            shapes.append([name, "group", sorted(item)])

    with h5py.File(io.BytesIO(data), "r") as file:
        visit("", file)
        file.visititems(visit)
    found = {"values": values, "shapes": shapes, "attributes": attributes}
    if places:
        found["places"] = offsets
    return {title: digest(sorted(rows)) for title, rows in found.items()}


def digest(value: Any) -> str:
    """Return the digest of what JSON can hold, in whichever order its keys are."""
    return _digest(json.dumps(value, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


# --- Comparing and recording --------------------------------------------------------------------------------


def differences(expected: Any, found: Any, where: str = "", *, tolerance: float = 0.0) -> list[str]:
    """Return where two results differ; what was measured or computed by Keras may do so a little."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if where.endswith(".bytes"):  # recorded with these versions, and named so
            expected, found = (
                {key: side[key] for key in expected.keys() & found.keys()} for side in (expected, found)
            )
        near = {"geometry": 1e-6, "coefficients": 1e-12, "statistics": 1e-5}
        near |= dict.fromkeys(("refresh", "metrics", "scores"), 1e-4)
        return [
            text
            for key in sorted(expected.keys() | found.keys())
            for text in differences(
                expected.get(key, "nothing"),
                found.get(key, "nothing"),
                f"{where}.{key}",
                tolerance=near.get(key, tolerance),
            )
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [t for n, (e, f) in pairs for t in differences(e, f, f"{where}[{n}]", tolerance=tolerance)]
    if tolerance and isinstance(expected, float) and isinstance(found, float):
        equal = abs(expected - found) <= tolerance * max(1.0, abs(expected))
    else:
        equal = type(expected) is type(found) and expected == found
    return [] if equal else [f"{where}: expected {expected!r}, found {found!r}"]


def plain(value: Any) -> Any:
    """Return a result as it comes back from `results.json`."""
    return json.loads(json.dumps(value))


def write_results(results: dict[str, Any]) -> None:
    lines = (
        f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in results.items()
    )
    RESULTS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _record_missing() -> None:
    """Add the cases that `results.json` does not have; it is for the code that new cases are made with."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        lay_out(Path())
        version = _command("--version").out.split()[-1]
        for name, case in ALL_CASES.items():
            if name not in known and not case.same_as:
                print(name)
                known[name] = run(case, _command, version)
                write_results({name: known[name] for name in ALL_CASES if name in known})
        os.chdir(HERE)


def _command(*arguments: object) -> Any:
    command = [sys.executable, "-c", "from swa_avg.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


if __name__ == "__main__":
    _record_missing()
