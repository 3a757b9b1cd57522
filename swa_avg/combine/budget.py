"""How the work is cut so that memory stays below a limit: block sizes, threads, and tasks of a cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from swa_avg.errors import UsageError
from swa_avg.files.remote import CONNECTIONS
from swa_avg.text import size_text

__all__ = ["CLUSTER", "LOCAL", "PENDING", "REMOTE", "REMOTE_CLUSTER", "Budget", "ClusterBudget", "byte_count"]

PENDING = 2
"""Blocks a thread: one that it works on, one that waits to be written."""

_MIB = 2**20
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_BLOCK_BYTES = _MIB  # larger ones leave a core's cache with their sums, smaller ones cost more calls
_SMALLEST_BLOCK_OF_ROWS = 2**12
_MOST_FOR_ROWS = 64 * _MIB  # without a limit
_FSSPEC_MEMORY = 112 * _MIB  # with a service's client, and what is copied or uploaded at a time
_CLUSTER_ROOM = 1024 * _MIB  # for what workers return, without a limit
_TASK_BYTES = 16 * _MIB  # of averages


@dataclass(frozen=True)
class Budget:
    """How many threads average, in blocks of which size, and the memory that this takes."""

    process: int
    """Bytes of resident memory that the process takes before anything is averaged, without Keras."""
    threads: int
    smallest_block: int
    block_bytes: int = _BLOCK_BYTES

    def memory(self, rows: int = 1) -> int:
        """Return the bytes of resident memory that the process takes at most for `rows` averages at a time.

        A thread holds one block of input and as much again of float64 sums as converting takes; for each row,
        the float64 sums (up to four times the bytes, of two-byte values) and the pending results.
        """
        return self.process + self.block_bytes * self.threads * (1 + 4 + rows * (4 + PENDING))

    def fit(self, limit: int | None, rows: int = 1) -> Budget:
        """Return a budget whose memory stays below `limit`: with smaller blocks, then with fewer threads.

        Several rows of coefficients take smaller blocks even without a limit, so that memory does not grow
        with their number.

        Raises:
            UsageError: the limit is too low.
        """
        if limit is None and rows == 1:
            return self
        most = self.process + _MOST_FOR_ROWS if limit is None else limit
        least = _SMALLEST_BLOCK_OF_ROWS if rows > 1 else self.smallest_block
        budget = self
        while budget.memory(rows) > most:
            if budget.block_bytes > least:
                budget = replace(budget, block_bytes=budget.block_bytes // 2)
            elif budget.threads > 1:
                budget = replace(budget, threads=budget.threads - 1)
            else:
                raise _too_little(limit, budget.memory(rows))
        return budget


@dataclass(frozen=True)
class ClusterBudget(Budget):
    """How many blocks make a task of a cluster, and how many tasks' averages this process takes back.

    `threads` are those of the workers. Blocks are those of one machine, and stay in a core's cache; a task is
    many of them, next to each other, since each task costs the scheduler and this process milliseconds.
    """

    blocks_per_task: int = 1
    most_returning: int = 1
    """Tasks under way at most, since the averages of all of them may arrive at once."""

    def memory(self, rows: int = 1) -> int:
        """Return the bytes of resident memory that this process takes at most."""
        return self.process + self.most_returning * self.blocks_per_task * self.block_bytes * rows

    def fit(self, limit: int | None, rows: int = 1) -> ClusterBudget:
        """Return a budget whose memory stays below `limit`: with smaller tasks, then with fewer of them.

        Raises:
            UsageError: the limit is too low.
        """
        block = self.block_bytes * rows
        room = max(_CLUSTER_ROOM, block) if limit is None else limit - self.process
        if room < block:
            raise _too_little(limit, self.process + block)
        # Each thread works on one task, while another waits for it: tasks are small enough for that, however
        # many threads there are. As many again are done, and wait for one before them.
        blocks_per_task = max(1, min(_TASK_BYTES, room // (2 * self.threads)) // block)
        most_returning = min(room // (blocks_per_task * block), 4 * self.threads)
        return replace(self, blocks_per_task=blocks_per_task, most_returning=most_returning)


LOCAL = Budget(64 * _MIB, threads=min(4, os.cpu_count() or 1), smallest_block=2**16)
"""NumPy and h5py, and inputs on this machine."""
REMOTE = Budget(LOCAL.process + _FSSPEC_MEMORY, threads=CONNECTIONS, smallest_block=2**18)
"""Inputs are read from a service, which takes as long to start an answer as to send a block."""
CLUSTER = ClusterBudget(96 * _MIB, threads=1, smallest_block=_BLOCK_BYTES)
"""The client of a Dask cluster."""
REMOTE_CLUSTER = replace(CLUSTER, process=CLUSTER.process + _FSSPEC_MEMORY)
"""The client of a Dask cluster whose workers read from a service."""


def byte_count(size: int | str | None) -> int | None:
    """Return a number of bytes, or of text such as `200M`, `1.5G` or `200MB`, the number that it stands for.

    Raises:
        UsageError: the text stands for none.
    """
    if not isinstance(size, str):
        return size
    text = size.upper().removesuffix("B").removesuffix("I")
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, OverflowError):
        raise UsageError(f"{size!r} is not a size; expected such as 200M or 1G") from None


def _too_little(limit: int | None, needed: int) -> UsageError:
    problem = "too many candidates" if limit is None else f"max_memory {size_text(limit)} is too little"
    return UsageError(f"{problem}; at least {-(-needed // _MIB)} MiB are needed")
