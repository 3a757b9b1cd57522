"""Peak memory does not grow with the number or size of checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import makers

MEGABYTE = 2**20
# Start-up: everything that averaging imports, and nothing averaged.
START = "import swa_avg.averaging"
INSPECT = "import swa_avg, sys; assert swa_avg.inspect_checkpoints(sys.argv[2:]).geometry is not None"
AVERAGE = "import swa_avg, sys; swa_avg.average(sys.argv[2:], sys.argv[1], threads=2)"


def _peak(code: str, *arguments: object) -> int:
    """Return the peak resident bytes of a fresh process that runs `code`.

    Not by getrusage, whose peak includes that of the process before exec: this one, with its large arrays.
    """
    report = f"{code}\nprint(open('/proc/self/status').read())"
    command = [sys.executable, "-c", report, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    (peak,) = (line.split()[1] for line in ended.stdout.splitlines() if line.startswith("VmHWM:"))
    return int(peak) * 1024


def _write(path: Path, values: int, number: int) -> Path:
    return makers.write_weights(path, {"layers/dense/vars/0": np.full(values, number, np.float32)})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_in_size_and_number(tmp_path: Path) -> None:
    start = _peak(START)
    big = [_write(tmp_path / f"big_{n}.weights.h5", 64 * MEGABYTE // 4, n) for n in (1, 2, 3)]
    many = [_write(tmp_path / f"many_{n}.weights.h5", 2 * MEGABYTE // 4, n) for n in range(60)]
    huge = [_write(tmp_path / f"huge_{n}.weights.h5", 320 * MEGABYTE // 4, n) for n in (1, 2)]
    for name, inputs in (("big", big), ("many", many), ("huge", huge)):
        added = _peak(AVERAGE, tmp_path / f"{name}.weights.h5", *inputs) - start
        assert added < 50 * MEGABYTE, name
        added = _peak(INSPECT, "", *inputs) - start
        assert added < 60 * MEGABYTE, name


SPILL = """
import sys
from contextlib import ExitStack
from pathlib import Path
from swa_avg.combine import Combiner, Spill, open_workers
from swa_avg.planning.plan import make_plan
from swa_avg.inputs.opening import opened

count, spilled, *paths = sys.argv[1:]
rows = [[(row + 1) / 1000, 1 - (row + 1) / 1000] for row in range(int(count))]
with ExitStack() as stack:
    inputs = stack.enter_context(opened([Path(path) for path in paths]))
    workers = stack.enter_context(open_workers(None, 2, None, len(rows)))
    plan = make_plan(inputs, inputs[-1], rows[0])
    spill = Spill(Combiner(plan, rows, workers), stack.enter_context(open(spilled, "wb+")))
    for row in (0, len(rows) - 1):
        assert sum(map(len, spill.stream(row, 0))) == inputs[-1].size
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_averages(tmp_path: Path) -> None:
    start = _peak(START)
    inputs = [_write(tmp_path / f"ckpt_{n}.weights.h5", 8 * MEGABYTE // 4, n) for n in (1, 2)]
    for count in (2, 12, 60):
        added = _peak(SPILL, count, tmp_path / "spilled", *inputs) - start
        assert added < 70 * MEGABYTE, count
        assert (tmp_path / "spilled").stat().st_size == count * 8 * MEGABYTE
