"""What the command line gave for a list of cases, so that code can be rewritten without changing an output byte.

`golden/results.json` holds, of each case, digests of the output and of what was printed. `test_golden.py` runs
the cases anew and compares. The same results are due on every machine, with every version of HDF5, NumPy and
Keras that is supported, so:

- inputs are files whose bytes are fixed: `golden/inputs.zip`, once written by `makers.py`, and the corpus;
- coefficients are such that no rounding of `pow` shows: ema:0.5, and a power-ema whose exponent is 4;
- what libhdf5 wrote (the record in an HDF5 file; all of a file without its optimizer) is compared by what it
  holds, not byte by byte; bytes are compared, too, where HDF5 and swa-avg are those that they were recorded with;
- BatchNorm statistics that Keras computed, and what inspection measures, are compared as numbers;
- left out of what is printed is `peak_memory`, which depends on the machine. Paths are relative as they are.

Results stay when the code changes: that is what they are for. `python tests/golden_cases.py` records the cases that
`results.json` does not have yet, and touches no other; an entry is removed by hand, on purpose, where outputs are
meant to change.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
RESULTS = GOLDEN / "results.json"

Cli = Callable[..., Any]
"""Runs the command line; what it returns has `code`, `out` and `err`."""

# --- The spelling of methods: the one place that a change of the grammar changes -----------------------------------

_VALUES = {"ema": "--decay", "power-ema": "--sigma-rel", "weights": "--weights"}


def spelling(method: str) -> tuple[tuple[str, ...], str]:
    """Return the options that ask for a method, written NAME or NAME:VALUE, and how results and records name it.

    That name is taken out of both before they are compared.
    """
    name, _, value = method.partition(":")
    return ("--method", name, *((_VALUES[name], value) if value else ())), name


# --- The cases ------------------------------------------------------------------------------------------------------

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


CASES = _cases()

# --- Running one ----------------------------------------------------------------------------------------------------


def lay_out(folder: Path) -> None:
    """Put the inputs into a folder, which is to be the current one."""
    shutil.unpack_archive(GOLDEN / "inputs.zip", folder)
    shutil.copytree(HERE / "corpus", folder / "corpus")
    for path in sorted((folder / "keras").glob("*.keras")):
        with zipfile.ZipFile(path) as archive:
            path.with_suffix(".weights.h5").write_bytes(archive.read("model.weights.h5"))


def run(case: Case, cli: Cli, version: str) -> dict[str, Any]:
    """Run a case in a current folder that holds the inputs; return what is recorded of it."""
    options, named = spelling(case.method)
    if not case.output:
        return _printed(cli(*case.arguments, *options, "--json", "-q"), named)
    output = Path("out", f"swa{case.output}")
    output.parent.mkdir()
    try:
        ended = cli(*case.arguments, *options, "-o", output, "--json", "-q")
        result = _printed(ended, named)
        result |= contents(output, named, version, rebuilt="drop" in case.arguments)
        checked = _printed(cli("verify", output, "--inputs", case.folder, "--json", "-q"), named)
        return result | {"verify": checked}
    finally:
        shutil.rmtree(output.parent)


def _printed(ended: Any, method: str) -> dict[str, Any]:
    """Return the exit code, a digest of what was printed, and apart from it what was measured."""
    assert ended.code == 0, ended.err
    printed = json.loads(ended.out)
    assert printed.pop("method") == method
    printed.pop("peak_memory", None)
    result = {}
    if "geometry" in printed:  # linear algebra, in whichever order the processor likes best
        result["geometry"] = printed.pop("geometry")
        result["coefficients"] = [checkpoint.pop("coefficient") for checkpoint in printed["checkpoints"]]
    return {"printed": _digest(_canonical(printed)), **result}


def contents(output: Path, method: str, version: str, *, rebuilt: bool = False) -> dict[str, Any]:
    """Return what is recorded of an output: its record, and digests of all else.

    `rebuilt`: libhdf5 wrote its HDF5 images, which are not compared by their bytes.
    """
    files = [output, *sorted(path for path in output.parent.iterdir() if path != output)]
    whole = b"".join(file.read_bytes() for file in files)
    made_by = f"HDF5 {h5py.version.hdf5_version}, swa-avg {version}, {method}"
    image = (lambda data: _hdf5(data, places=False)[0]) if rebuilt else _digest
    if zipfile.is_zipfile(output):
        record, found = _archive(output, image)
    elif output.suffix == ".json":
        text = output.read_bytes()
        value = json.loads(text)
        assert json.dumps(value, indent=4).encode() == text
        record = value.pop("swa_avg")
        found = {"map": _digest(_canonical(value))}
        found |= {file.name: image(file.read_bytes()) for file in files[1:]}
    else:
        found, record = _hdf5(whole, places=not rebuilt)
    assert record.pop("method") == method
    assert record.pop("version") == version
    return {"record": json.dumps(record), "contents": found, "bytes": {made_by: _digest(whole)}}


def _archive(path: Path, image: Callable[[bytes], Any]) -> tuple[Any, dict[str, Any]]:
    """Return an archive's record, and of each member how it is marked, and its contents."""
    found: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename == "metadata.json":
                metadata = json.loads(data)
                assert json.dumps(metadata).encode() == data
                record = metadata.pop("swa_avg")
                content = _digest(json.dumps(metadata).encode())
            else:
                content = image(data) if info.filename == "model.weights.h5" else _digest(data)
            marks = (
                info.date_time,
                info.compress_type,
                info.create_system,
                info.create_version,
                info.flag_bits,
            )
            found[info.filename] = [*marks[0], *marks[1:], info.external_attr, info.extra.hex(), content]
    return record, found


def _hdf5(data: bytes, *, places: bool) -> tuple[dict[str, str], Any]:
    """Return digests of what an HDF5 file holds, and the record in it, if there is one.

    `places`: where the tensors lie counts.
    """
    values, shapes, attributes, offsets = [], [], [], []
    record: dict[str, str] = {}

    def visit(name: str, item: Any) -> None:
        for key in sorted(item.attrs):
            value = item.attrs[key]
            if not name and key.startswith("swa_avg"):
                record[key] = bytes(value).decode()
                continue
            array = np.asarray(value)
            plain = array.tolist()
            kind = "text" if array.dtype.kind in "OU" else array.dtype.str
            attributes.append([name, key, kind, array.shape, repr(plain)])
        if isinstance(item, h5py.Dataset):
            assert item.chunks is None
            values.append([name, _digest(np.asarray(item[()]).tobytes())])
            shapes.append([name, item.dtype.str, item.shape])
            offsets.append([name, item.id.get_offset()])
        else:
            shapes.append([name, "group", sorted(item)])

    with h5py.File(io.BytesIO(data), "r") as file:
        visit("", file)
        file.visititems(visit)
    found = {
        "values": values,
        "shapes": shapes,
        "attributes": attributes,
        **({"places": offsets} if places else {}),
    }
    text = "".join(record[key] for key in sorted(record, key=lambda key: (len(key), key)))
    parsed = json.loads(text) if text else None
    assert not text or json.dumps(parsed, separators=(",", ":")) == text
    return {title: _digest(_canonical(sorted(rows))) for title, rows in found.items()}, parsed


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


# --- Comparing and recording ----------------------------------------------------------------------------------------


def differences(expected: Any, found: Any, where: str = "", *, tolerance: float = 0.0) -> list[str]:
    """Return where two results differ; what was measured or computed by Keras may do so a little."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if where.endswith(".bytes"):  # recorded with these versions, and named so
            expected, found = (
                {key: side[key] for key in expected.keys() & found.keys()} for side in (expected, found)
            )
        near = {"geometry": 1e-6, "coefficients": 1e-12}
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
        for name, case in CASES.items():
            if name not in known and not case.same_as:
                print(name)
                known[name] = run(case, _command, version)
        os.chdir(HERE)
    write_results({name: known[name] for name in CASES if name in known})


def _command(*arguments: object) -> Any:
    command = [sys.executable, "-c", "from swa_avg.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


if __name__ == "__main__":
    _record_missing()
