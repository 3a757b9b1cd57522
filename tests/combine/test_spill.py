"""Averages on disk are the averages, and memory does not grow with their number."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import makers
import oracle
from swa_avg.combine import Combiner, Spill
from swa_avg.combine.budget import LOCAL
from swa_avg.combine.drafts import write_draft
from swa_avg.combine.workers import Threads
from swa_avg.formats import open_checkpoint
from swa_avg.planning.plan import make_plan

WRITERS = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".weights.json": makers.write_sharded,
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("block_bytes", [64, 1000, 2**16])
def test_every_row_becomes_a_draft_of_its_own(suffix: str, block_bytes: int, tmp_path: Path) -> None:
    arrays = [makers.weights(number) for number in (1, 2, 3)]
    paths = [WRITERS[suffix](tmp_path / f"ckpt_{n}{suffix}", a) for n, a in enumerate(arrays)]
    rows = [[1 / 3] * 3, [0.0, 1.0, 0.0], [0.5, -0.25, 0.75]]
    with ExitStack() as stack:
        inputs = [stack.enter_context(closing(open_checkpoint(path))) for path in paths]
        executor = stack.enter_context(ThreadPoolExecutor(2))
        plan = make_plan(inputs, inputs[-1], rows[0])
        file = io.BytesIO()
        spill = Spill(
            Combiner(plan, rows, Threads(executor, replace(LOCAL, block_bytes=block_bytes, threads=2))), file
        )
        assert len(file.getvalue()) == 3 * spill.row_bytes
        for number, row in enumerate(rows):
            draft = tmp_path / f"draft{number}{suffix}"
            write_draft(draft, plan.template, lambda index, number=number: spill.stream(number, index))
            written = oracle.read_arrays(draft)
            assert written.keys() == arrays[0].keys()
            for name, value in written.items():
                if name.startswith("optimizer"):
                    expected = np.asarray(arrays[-1][name])
                else:
                    wide = sum(c * a[name].astype(np.float64) for c, a in zip(row, arrays, strict=True))
                    expected = (oracle.mean([a[name] for a in arrays]) if number == 0 else wide).astype(
                        value.dtype
                    )
                assert value.tobytes() == expected.tobytes(), name


def test_only_what_is_averaged_takes_room(tmp_path: Path) -> None:
    for number in (1, 2):
        with h5py.File(tmp_path / f"ckpt_{number}.weights.h5", "w") as file:
            file["layers/dense/vars/0"] = np.ones(100, np.float32)
            file["optimizer/vars/1"] = np.ones(100_000, np.float32)
    with ExitStack() as stack:
        inputs = [
            stack.enter_context(closing(open_checkpoint(tmp_path / f"ckpt_{number}.weights.h5")))
            for number in (1, 2)
        ]
        executor = stack.enter_context(ThreadPoolExecutor(1))
        plan = make_plan(inputs, inputs[-1], [0.5, 0.5])
        file = io.BytesIO()
        Spill(Combiner(plan, [[0.5, 0.5], [1.0, 0.0]], Threads(executor, replace(LOCAL, threads=1))), file)
        assert len(file.getvalue()) == 2 * 400


def test_blocks_shrink_with_the_number_of_rows() -> None:
    previous = replace(LOCAL, threads=2)
    for rows in (2, 12, 40, 150, 500):
        budget = replace(LOCAL, threads=2).fit(None, rows)
        assert budget.block_bytes * budget.threads * rows * 6 <= 2**26
        assert budget.block_bytes <= previous.block_bytes
        previous = budget
