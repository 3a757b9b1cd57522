"""Whole-process times and peak memory of averaging, beside yardsticks run in turn with it.

    python scripts/benchmark.py                          ten ResNet-50 checkpoints with Adam (needs Keras)
    python scripts/benchmark.py --count 20 --only fast   this tool and cat alone
    python scripts/benchmark.py --variables 5000 --kilobytes 1 --count 100
    python scripts/benchmark.py --sweep                  twice the checkpoints, twice their size
    python scripts/benchmark.py --startup                --help beside an import of click

Every contender runs in a fresh process, all of them in turn, `--runs` times; medians are printed. Cold runs
drop the page cache first, where that is permitted. Writes benchmark.md and, with matplotlib, benchmark.png
into `--folder`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from swa_avg.formats import open_checkpoint

SWA_AVG = str(Path(sys.executable).with_name("swa-avg"))

RESNET = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np
model = keras.applications.ResNet50(weights=None)
model.compile("adam", "sparse_categorical_crossentropy")
model.optimizer.build(model.trainable_variables)
rng = np.random.default_rng(0)
for path in sys.argv[1:]:
    for variable in model.variables:
        if variable.dtype == "float32":
            variable.assign(2 + rng.standard_normal(variable.shape, dtype=np.float32))
    model.save(path)
"""

PLAIN = """
import io, json, sys, zipfile, zlib
import h5py, numpy as np
variables, size = int(sys.argv[1]), int(sys.argv[2])
for path in sys.argv[3:]:
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_group("vars")
        for number in range(variables):
            file[f"layers/dense_{number}/vars/0"] = 2 + rng.standard_normal((size // 4, 1), dtype=np.float32)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), "{}")
        config = json.dumps({"class_name": "Functional", "config": {}})
        archive.writestr(zipfile.ZipInfo("config.json"), config)
        with archive.open(zipfile.ZipInfo("model.weights.h5"), "w", force_zip64=True) as member:
            member.write(buffer.getbuffer())
"""

FLOOR = """
import json, os, sys, threading
import numpy
plan = json.loads(open(sys.argv[1]).read())
output = os.open(plan["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
work = iter(plan["pieces"])
lock = threading.Lock()
inputs = [os.open(path, os.O_RDONLY) for path in plan["inputs"]]
def run():
    buffer = memoryview(bytearray(2**20))
    while True:
        with lock:
            piece = next(work, None)
        if piece is None:
            return
        start, size, every = piece
        for file in inputs if every else inputs[-1:]:
            os.preadv(file, [buffer[:size]], start)
        os.pwrite(output, buffer[:size], start)
threads = [threading.Thread(target=run) for _ in range(min(4, os.cpu_count()))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os.fsync(output)
"""

KERAS_LOOP = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras
total = None
for path in sys.argv[2:]:
    model = keras.models.load_model(path)
    weights = model.get_weights()
    total = weights if total is None else [a + b for a, b in zip(total, weights)]
model.set_weights([a / len(sys.argv[2:]) for a in total])
model.save(sys.argv[1])
"""

H5PY_LOOP = """
import io, sys, zipfile
import h5py, numpy as np
paths, total = sys.argv[2:], {}
for path in paths:
    data = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    with h5py.File(data, "r") as file:
        def add(name, item):
            if isinstance(item, h5py.Dataset) and not name.startswith("optimizer") and item.dtype.kind == "f":
                value = item[()].astype(np.float64)
                total[name] = total[name] + value if name in total else value
        file.visititems(add)
with zipfile.ZipFile(paths[-1]) as source, zipfile.ZipFile(sys.argv[1], "w") as target:
    buffer = io.BytesIO(source.read("model.weights.h5"))
    with h5py.File(buffer, "r+") as file:
        for name, value in total.items():
            file[name][...] = value / len(paths)
    for member in source.infolist():
        data = buffer.getvalue() if member.filename == "model.weights.h5" else source.read(member)
        target.writestr(member, data)
"""

WALK = """
import sys, time, zipfile, io
import h5py
data = io.BytesIO(zipfile.ZipFile(sys.argv[1]).read("model.weights.h5"))
times = []
for _ in range(5):
    start = time.perf_counter()
    with h5py.File(data, "r") as file:
        found = []  # what the callback returns must be None: anything else ends the walk
        file.visititems(lambda name, item: found.append((name, getattr(item, "shape", None))))
    times.append(time.perf_counter() - start)
print(sorted(times)[2])
"""


def contenders(inputs: Sequence[Path], output: Path, only: str) -> dict[str, list[str]]:
    names = [str(path) for path in inputs]
    python = [sys.executable, "-c"]
    average = [SWA_AVG, *names, "-o", str(output), "-q"]
    commands = {
        "swa-avg --no-verify": [*average, "--no-verify"],
        "floor of --no-verify": [*python, FLOOR, str(floor_plan(inputs, output, verify=False))],
        "swa-avg": average,
        "floor": [*python, FLOOR, str(floor_plan(inputs, output, verify=True))],
        "cat to /dev/null": ["sh", "-c", 'cat "$@" >/dev/null', "sh", *names],
    }
    if only == "fast":
        return commands
    commands["dd, one file after the other"] = [
        "sh", "-c", 'for f; do dd if="$f" of=/dev/null bs=1M 2>/dev/null; done', "sh", *names,
    ]  # fmt: skip
    commands["h5py and numpy loop"] = [*python, H5PY_LOOP, str(output), *names]
    if only == "all":
        commands["Keras load_model loop"] = [*python, KERAS_LOOP, str(output), *names]
    return commands


def floor_plan(inputs: Sequence[Path], output: Path, *, verify: bool) -> Path:
    """Write down what no averaging can do without, and return the file.

    That is to start Python with NumPy, to read the averaged bytes of every input, or with `verify` all bytes,
    on as many threads, and to write and sync an output. There is no arithmetic, no CRC-32 and no check.
    """
    size = inputs[-1].stat().st_size
    with closing(open_checkpoint(inputs[-1])) as newest:
        start = newest.shards[0].offset
        extents = [(start + t.offset, start + t.stop) for t in newest.tensors.values() if t.role == "weight"]
    if verify:
        extents = [(0, size)]
    position, runs = 0, []
    for first, last in sorted(extents):
        runs += [(position, first, False), (first, last, True)]
        position = last
    pieces = [
        (at, min(2**20, last - at), every)
        for first, last, every in [*runs, (position, size, False)]
        for at in range(first, last, 2**20)
    ]
    path = output.with_name(f"floor-{'verify' if verify else 'no-verify'}.json")
    plan = {"inputs": list(map(str, inputs)), "output": str(output), "pieces": pieces}
    path.write_text(json.dumps(plan))
    return path


def run_once(command: Sequence[str], *, cold: bool) -> tuple[float, float]:
    """Return wall seconds and peak resident MB of one fresh process."""
    if cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    elapsed = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command[:3]} ended with {process.returncode}: {errors.decode()[-2000:]}")
    return elapsed, usage.ru_maxrss / 1024


def measure(
    commands: Mapping[str, Sequence[str]], output: Path, runs: int, *, cold: bool
) -> dict[str, tuple[float, float]]:
    """Return name -> (median seconds, largest peak MB); the contenders take turns, after a warm-up each."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(runs + (not cold)):
        for name, command in commands.items():
            output.unlink(missing_ok=True)  # to replace a file takes the time to free the old one's pages
            result = run_once(command, cold=cold)
            if turn or cold:
                results[name].append(result)
    return {
        name: (statistics.median(t for t, _ in values), max(m for _, m in values))
        for name, values in results.items()
    }


def make_inputs(folder: Path, count: int, variables: int | None, kilobytes: float) -> list[Path]:
    kind = "resnet50" if variables is None else f"{variables}x{kilobytes:g}k"
    paths = [folder / kind / f"ckpt_{number:04}.keras" for number in range(1, count + 1)]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        plain = [sys.executable, "-c", PLAIN, str(variables), str(int(kilobytes * 1024)), *missing]
        subprocess.run(
            [sys.executable, "-c", RESNET, *missing] if variables is None else plain,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    return paths


def table(results: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
    states = list(results)
    heads = [f"{state}, s | times `cat`" for state in states]
    lines = [f"| | {' | '.join(heads)} | peak MB |", "|---|" + "---:|" * (2 * len(states) + 1)]
    for name in results[states[0]]:
        cells = []
        for state in states:
            seconds = results[state][name][0]
            cells.append(f"{seconds:.2f} | {seconds / results[state]['cat to /dev/null'][0]:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {results[states[0]][name][1]:.0f} |")
    return lines


def machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    date = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{os.cpu_count()} cores ({cpu}), {platform.system()}, Python {platform.python_version()}, {date}"


def draw(results: Mapping[str, Mapping[str, tuple[float, float]]], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    warm = results["warm"]
    figure = Figure(figsize=(8, 0.5 * len(warm) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    names = list(warm)[::-1]
    seconds = [warm[name][0] for name in names]
    bars = axes.barh(
        names, seconds, color=["#2563eb" if name.startswith("swa-avg") else "#9ca3af" for name in names]
    )
    axes.bar_label(bars, [f"{warm[name][0]:.2f} s, {warm[name][1]:.0f} MB" for name in names], padding=4)
    axes.set_xscale("log")
    axes.set_xlim(min(seconds) / 2, max(seconds) * 6)
    axes.set_xlabel("seconds (logarithmic), whole process, warm page cache")
    axes.set_title(title.replace("; ", "\n", 1), loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def sweep(folder: Path, runs: int) -> list[str]:
    """Show that time is linear in bytes and memory constant."""
    lines = ["| checkpoints | MB each | s | against the first | peak MB |", "|---:|---:|---:|---:|---:|"]
    cases = [(5, 100), (10, 100), (20, 100), (5, 200), (5, 400)]
    commands = {}
    for count, megabytes in cases:
        inputs = make_inputs(folder, count, 50, megabytes * 1024 / 50)
        commands[f"{count} | {megabytes}"] = contenders(inputs, folder / "out.keras", "fast")["swa-avg"]
    results = measure(commands, folder / "out.keras", runs, cold=False)
    first = next(iter(results.values()))[0]
    for name, (seconds, peak) in results.items():
        lines.append(f"| {name} | {seconds:.2f} | {seconds / first:.2f} | {peak:.0f} |")
    return lines


def each_further(folder: Path, runs: int, inputs: Sequence[Path]) -> str:
    """Compare what one more checkpoint costs with one h5py walk of it."""
    few = max(2, len(inputs) // 10)
    commands = {
        "few": contenders(inputs[:few], folder / "out.keras", "fast")["swa-avg"],
        "all": contenders(inputs, folder / "out.keras", "fast")["swa-avg"],
    }
    results = measure(commands, folder / "out.keras", runs, cold=False)
    each = (results["all"][0] - results["few"][0]) / (len(inputs) - few)
    walk = float(
        subprocess.run([sys.executable, "-c", WALK, str(inputs[0])], check=True, capture_output=True).stdout
    )
    return (
        f"each further checkpoint: {each * 1000:.1f} ms; one h5py walk of it: {walk * 1000:.0f} ms; "
        f"ratio {each / walk:.3f}"
    )


def startup(runs: int) -> list[str]:
    """Compare `swa-avg --help` with an import of click alone."""
    commands = {
        "swa-avg --help": [SWA_AVG, "--help"],
        'python -c "import click"': [sys.executable, "-c", "import click"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(run_once(command, cold=False)[0])
    ours, theirs = (statistics.median(values) for values in times.values())
    lines = ["| | ms | ratio |", "|---|---:|---:|"]
    for name, seconds in zip(commands, (ours, theirs), strict=True):
        lines.append(f"| {name} | {seconds * 1000:.0f} | {seconds / theirs:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10, help="checkpoints")
    parser.add_argument("--variables", type=int, help="synthetic checkpoints of this many variables")
    parser.add_argument("--kilobytes", type=float, default=1.0, help="size of each of these")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=["fast", "no-keras", "all"], default="all")
    parser.add_argument("--cold", action="store_true", help="also with the page cache dropped (needs root)")
    parser.add_argument("--sweep", action="store_true", help="vary number and size")
    parser.add_argument("--startup", action="store_true", help="what --help takes")
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        lines = sweep(options.folder, options.runs)
        title = "time against number and size"
    elif options.startup:
        options.runs = max(options.runs, 30)  # each takes some milliseconds
        lines = startup(options.runs)
        title = "start-up"
    else:
        inputs = make_inputs(options.folder, options.count, options.variables, options.kilobytes)
        megabytes = inputs[0].stat().st_size / 1e6
        title = f"{options.count} checkpoints of {megabytes:.0f} MB"
        commands = contenders(inputs, options.folder / "out.keras", options.only)
        output = options.folder / "out.keras"
        results = {"warm": measure(commands, output, options.runs, cold=False)}
        if options.cold:
            results["cold"] = measure(commands, output, options.runs, cold=True)
        lines = table(results)
        if options.variables:
            lines += ["", each_further(options.folder, options.runs, inputs)]
        draw(results, options.folder / "benchmark.png", f"{title}; {machine()}")
    text = "\n".join([f"{title}; medians of {options.runs} runs; {machine()}", "", *lines, ""])
    (options.folder / "benchmark.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
