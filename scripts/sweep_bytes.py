"""What the averaging pass of a sweep reads and takes: twelve checkpoints of 300 MB, every default candidate.

    python scripts/sweep_bytes.py [--folder DIR]      needs strace and 8 GB of disk, no Keras

prints, for each input, the bytes that the pass read of it as strace counts them, and the peak of resident
memory, both of a process that imports no Keras. Each checkpoint has 100 MB of weights, and twice that of
optimizer state.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

COUNT, LAYERS, MEGABYTE = 12, 100, 2**20

PASS = """
import sys
from contextlib import ExitStack
from pathlib import Path
from swa_avg.files.publication import Publication
from swa_avg.combine import Spill, open_workers
from swa_avg.inputs.opening import opened
from swa_avg.inputs.listing import list_checkpoints
from swa_avg.sweeping.search import candidate_rows
from swa_avg.sweeping.trials import Trials

output, *paths = map(Path, sys.argv[1:])
rows, _ = candidate_rows(list_checkpoints(paths), [])
with ExitStack() as stack:
    checkpoints = stack.enter_context(opened(paths))
    publication = stack.enter_context(Publication(output, overwrite=False))
    workers = stack.enter_context(open_workers(None, 2, None, len(rows)))
    trials = Trials(checkpoints, publication, workers, output.parent, None, None)
    spill = Spill(trials.combiner(rows, verify=True), publication.scratch())
    assert "keras" not in sys.modules
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    print(len(rows), workers.budget.block_bytes, spill.row_bytes * len(rows), int(peak) * 1024)
"""
CALL = re.compile(r"^(\d+) +(?:pread64|preadv2?|read)\(\d+<([^>]*)>.*?(?:= (-?\d+)|<unfinished \.\.\.>)")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (?:pread64|preadv2?|read) resumed>.*= (-?\d+)")


def write_checkpoint(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bare = path.with_suffix(".h5")
    with h5py.File(bare, "w") as file:
        file.create_group("vars")
        for number in range(LAYERS):
            for name in (
                f"layers/dense_{number}/vars/0",
                *(f"optimizer/vars/{2 * number + k}" for k in (2, 3)),
            ):
                file[name] = rng.standard_normal(MEGABYTE // 4, dtype=np.float32)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", '{"class_name": "Functional", "config": {}}')
        archive.write(bare, "model.weights.h5")
    bare.unlink()


def bytes_by_file(trace: Path) -> Counter[str]:
    """Return the bytes that a trace says were read, by the file's name."""
    read: Counter[str] = Counter()
    pending: dict[str, str] = {}
    with trace.open() as lines:
        for text in lines:
            if match := CALL.match(text):
                thread, name, count = match.groups()
                if count is None:
                    pending[thread] = name
                else:
                    read[name] += max(0, int(count))
            elif match := RESUMED.match(text):
                read[pending.pop(match[1])] += max(0, int(match[2]))
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go, and stay")
    with tempfile.TemporaryDirectory() as temporary:
        folder = parser.parse_args().folder or Path(temporary)
        paths = [folder / f"ckpt_{number:02}.keras" for number in range(1, COUNT + 1)]
        for seed, path in enumerate(paths):
            if not path.exists():
                write_checkpoint(path, seed)
        command = [sys.executable, "-c", PASS, str(folder / "swa.keras"), *map(str, paths)]
        measured = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, block_bytes, spilled, peak = map(int, measured.stdout.split())
        print(f"{len(paths)} checkpoints, {rows} candidates, blocks of {block_bytes >> 10} KiB")
        print(f"peak resident memory {peak / MEGABYTE:.0f} MiB, spilled {spilled / MEGABYTE:.0f} MiB")
        trace = folder / "trace"
        strace = [
            "strace",
            "-f",
            "-y",
            "-s",
            "0",
            "-e",
            "trace=pread64,preadv,preadv2,read",
            "-o",
            str(trace),
        ]
        subprocess.run([*strace, *command], capture_output=True, check=True)
        read = bytes_by_file(trace)
        for path in paths:
            size = path.stat().st_size
            print(
                f"{path.name}: {read[str(path)]:,} bytes read of {size:,}, {read[str(path)] / size:.3f} times"
            )
        trace.unlink()


if __name__ == "__main__":
    main()
