"""How much is done at a time: memory and threads."""

from __future__ import annotations

import os

from swa_avg.combine.combiner import block_memory
from swa_avg.errors import UsageError
from swa_avg.files.remote import CONNECTIONS
from swa_avg.text import size_text

__all__ = ["fit_cluster", "fit_memory", "peak_memory"]

_BLOCK_BYTES = 2**20  # larger ones leave a core's cache with their sums, smaller ones cost more calls
_SMALLEST_BLOCK, _SMALLEST_BLOCK_OF_ROWS, _SMALLEST_REMOTE_BLOCK = 2**16, 2**12, 2**18
_MOST_FOR_ROWS = 2**26
_REMOTE_BLOCK_BYTES = 2**20  # an object store takes as long to start an answer as to send this much
_REMOTE_MEMORY = 112 * 2**20  # fsspec with a client, and what is copied or uploaded at a time
_PROCESS_MEMORY = 64 * 2**20  # the interpreter with numpy and h5py, before anything is averaged
_CLUSTER_MEMORY = 96 * 2**20  # with Dask
_CLUSTER_ROOM = 2**30  # for what workers send back
_TASK_BYTES = 2**24  # of averages


def fit_memory(
    max_memory: int | None, threads: int | None, rows: int = 1, *, far: bool = False
) -> tuple[int, int]:
    """Return the block size and the number of threads that stay under a limit of resident memory.

    Several rows of coefficients take smaller blocks, so that memory does not grow with their number. `far`
    says that an input is read from a service, which takes its time for each answer.

    Raises:
        UsageError: the limit is too low, or there is no thread.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected 1 or more")
    block_bytes = _REMOTE_BLOCK_BYTES if far else _BLOCK_BYTES
    threads = threads or (CONNECTIONS if far else min(4, os.cpu_count() or 1))
    if max_memory is None and rows == 1:
        return block_bytes, threads
    limit = peak_memory(0, 0, far=far) + _MOST_FOR_ROWS if max_memory is None else max_memory
    least = _SMALLEST_BLOCK_OF_ROWS if rows > 1 else _SMALLEST_REMOTE_BLOCK if far else _SMALLEST_BLOCK
    while (needed := peak_memory(block_bytes, threads, rows, far=far)) > limit:
        if block_bytes > least:
            block_bytes //= 2
        elif threads > 1:
            threads -= 1
        else:
            raise _too_little(max_memory, needed)
    return block_bytes, threads


def fit_cluster(
    max_memory: int | None, threads: int, rows: int = 1, *, far: bool = False
) -> tuple[int, int, int, int]:
    """Return block size, blocks a task, tasks under way while averages are sent back, and memory here.

    Blocks are those of one machine, and stay in a core's cache; a task is many of them, next to each other,
    since each task costs the scheduler and this process milliseconds. Errors and `far` as for `fit_memory`.
    """
    block_bytes = _REMOTE_BLOCK_BYTES if far else _BLOCK_BYTES
    process = _CLUSTER_MEMORY + (_REMOTE_MEMORY if far else 0)
    block = block_bytes * rows
    room = max(_CLUSTER_ROOM, block) if max_memory is None else max_memory - process
    if room < block:
        raise _too_little(max_memory, process + block)
    together = max(1, min(_TASK_BYTES // block, room // block))
    sent = room // (together * block)
    return block_bytes, together, sent, process + min(sent, 4 * threads) * together * block


def _too_little(max_memory: int | None, needed: int) -> UsageError:
    what = (
        "too many candidates" if max_memory is None else f"--max-memory {size_text(max_memory)} is too little"
    )
    return UsageError(f"{what}; at least {-(-needed // 2**20)} MiB are needed")


def peak_memory(block_bytes: int, threads: int, rows: int = 1, *, far: bool = False) -> int:
    """Return the bytes of resident memory that a process takes at most, without Keras."""
    return _PROCESS_MEMORY + block_memory(block_bytes, threads, rows) + (_REMOTE_MEMORY if far else 0)
