"""Who averages: threads of this process, or the workers of a cluster."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar

from swa_avg.combine.blocks import Block
from swa_avg.combine.budget import CLUSTER, LOCAL, PENDING, REMOTE, REMOTE_CLUSTER, Budget, byte_count
from swa_avg.combine.kernel import Averaged, Kernel
from swa_avg.combine.order import in_order
from swa_avg.errors import SystemRefusalError, UsageError
from swa_avg.files.publication import Publication

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from swa_avg.combine.cluster import Cluster

__all__ = ["Threads", "Workers", "open_workers"]

Workers: TypeAlias = "Threads | Cluster"

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """Threads of this process."""

    processes: Cluster | None = None
    """Other processes than this one, each of which can load a model."""

    def __init__(self, executor: Executor, budget: Budget) -> None:
        self.budget: Budget = budget
        self._executor = executor
        self._most = PENDING * budget.threads

    def average(self, kernel: Kernel, blocks: Iterable[Block]) -> Iterator[tuple[Block, Averaged]]:
        """Yield each block and its averages, in order; these are good until the next are asked for."""

        def submit(pair: tuple[Block, NDArray[np.uint8]]) -> Future[Averaged]:
            return self._submit(kernel.average, *pair)

        buffers = cycle([kernel.buffer() for _ in range(self._most)])  # free again when their turn comes
        for (block, _), averaged in in_order(submit, zip(blocks, buffers, strict=False), self._most):
            yield block, averaged

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item and what `function` returns for it, in order."""
        return in_order(partial(self._submit, function), items, self._most)

    @contextmanager
    def scratch(self, publication: Publication) -> Iterator[Callable[[], IO[bytes]]]:
        """Return what opens temporary files."""
        yield publication.scratch

    def _submit(self, function: Callable[..., Result], *args: Any) -> Future[Result]:
        try:
            return self._executor.submit(function, *args)
        except RuntimeError as error:  # the interpreter's word for a thread that the system refused
            raise SystemRefusalError(errno.EAGAIN, f"{error}; use fewer threads") from error


@contextmanager
def open_workers(
    cluster: str | None,
    threads: int | None,
    max_memory: int | str | None,
    rows: int = 1,
    *,
    remote: bool = False,
) -> Iterator[Workers]:
    """Start threads, or connect to the cluster at an address, to make `rows` averages at a time.

    `remote` says that an input is read from a service.

    Raises:
        UsageError: the memory does not suffice, threads are named for a cluster, or Dask is not installed.
        SystemRefusalError: there is no cluster, or it is not usable.
    """
    limit = byte_count(max_memory)
    if cluster is not None:
        if threads is not None:
            problem = "threads is for this machine alone; a cluster's workers say how many they have"
            raise UsageError(problem)
        from swa_avg.combine.cluster import Cluster, connected

        with connected(cluster) as connection:
            of_cluster = replace(REMOTE_CLUSTER if remote else CLUSTER, threads=connection.threads)
            yield Cluster(connection, of_cluster.fit(limit, rows))
        return
    budget = REMOTE if remote else LOCAL
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads is {threads}; expected 1 or more")
        budget = replace(budget, threads=threads)
    budget = budget.fit(limit, rows)
    with ThreadPoolExecutor(budget.threads) as executor:
        yield Threads(executor, budget)
