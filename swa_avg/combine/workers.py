"""Who does the work: threads of this process, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import IO

from swa_avg.combine.blocks import bytes_to_read
from swa_avg.combine.budget import fit_cluster, fit_memory, peak_memory
from swa_avg.combine.combiner import Combiner
from swa_avg.errors import UsageError
from swa_avg.files.publication import Publication
from swa_avg.files.temporary import temporary_folder
from swa_avg.planning.plan import Plan
from swa_avg.text import Progress

__all__ = ["Crew", "hired"]


@dataclass(frozen=True)
class Crew:
    """Who works, threads here or a cluster, and how the work is cut for them."""

    executor: Executor
    block_bytes: int
    threads: int
    memory: int
    """Predicted peak of this process's resident memory, in bytes."""
    together: int = 0
    """Blocks a task, on a cluster."""
    sent: int = 0
    """Tasks under way at most while workers send averages back."""

    def combiner(
        self,
        plan: Plan,
        rows: Sequence[Sequence[float]],
        verify: bool,
        progress: Progress | None = None,
    ) -> Combiner:
        return Combiner(
            plan,
            rows,
            self.executor,
            self.block_bytes,
            self.threads,
            verify,
            progress and partial(progress, bytes_to_read(plan, verify)),
            self.together,
            self.sent,
        )

    def scratch(self, publication: Publication, stack: ExitStack) -> Callable[[], IO[bytes]]:
        """Return what opens temporary files; a cluster sees only those that have a name."""
        if not self.together:
            return publication.scratch
        numbers = count()
        folder = stack.enter_context(temporary_folder(publication.output))
        return lambda: stack.enter_context((folder / f"scratch_{next(numbers)}").open("w+b"))


@contextmanager
def hired(
    cluster: str | None, threads: int | None, max_memory: int | None, rows: int = 1, *, far: bool = False
) -> Iterator[Crew]:
    """Start threads, or connect to the cluster at an address; `rows` averages are made at a time.

    `far` as for `fit_memory`.

    Raises:
        UsageError: the memory does not suffice, threads are named for a cluster, or Dask is not installed.
        SystemRefusalError: there is no cluster, or it is not usable.
    """
    if cluster is None:
        block_bytes, threads = fit_memory(max_memory, threads, rows, far=far)
        with ThreadPoolExecutor(threads) as local:
            yield Crew(local, block_bytes, threads, peak_memory(block_bytes, threads, rows, far=far))
        return
    if threads is not None:
        raise UsageError("--threads is for this machine alone; a cluster's workers say how many they have")
    from swa_avg.combine.cluster import connected

    with connected(cluster) as remote:
        threads = remote.threads
        block_bytes, together, sent, memory = fit_cluster(max_memory, threads, rows, far=far)
        # That a task is done is noticed some time later: meanwhile, another one waits at the worker.
        yield Crew(remote, block_bytes, 2 * threads, memory, together, sent)
