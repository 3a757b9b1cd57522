"""Predict how long an average takes by the number of workers: the real plan on simulated machines.

    python scripts/simulate_cluster.py 'run/ckpt_*.keras' --stream 1.2 --storage 40 --latency 0.5
    python scripts/simulate_cluster.py 'run/ckpt_*.keras' --inputs 100 --repeat 4000   scaled up
    python scripts/simulate_cluster.py 'run/ckpt_*.keras' --measure                    against this machine

What the blocks are, how many make a task, and how many tasks are under way, comes from swa_avg itself. A
worker reads a task's bytes, averages them, and waits until its result is fetched; reads of all workers share
the storage. This process hands tasks out, fetches results, one at a time, writes them in order, and at last
reads the output back.

With --measure, every parameter is measured by itself on this machine: the rates of reading and of averaging
in one bare process and in two at a time, and of writing to disk, without Dask; the costs of a task and of
starting, by tasks that do nothing. The prediction for 1 and 2 workers then stands beside what a cluster of 1
and 2 processes takes.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmark import machine, make_inputs
from distributed import LocalCluster

from swa_avg import average
from swa_avg.combine import Combiner
from swa_avg.combine.blocks import Block, blocks_of
from swa_avg.combine.budget import CLUSTER, ClusterBudget
from swa_avg.combine.cluster import connected
from swa_avg.combine.workers import Threads
from swa_avg.formats import open_checkpoint
from swa_avg.inputs.listing import list_checkpoints
from swa_avg.planning.plan import make_plan

BLOCK = 2**19
COUNTS = [2**power for power in range(9)]


@dataclass(frozen=True)
class Machines:
    """Rates in bytes a second, times in seconds."""

    stream: float
    """What one worker reads at most."""
    storage: float
    """What all of them do."""
    latency: float
    """Of one request: a block of one input."""
    compute: float
    """Bytes of input that one worker checks and adds up."""
    client: float
    """What this process fetches of results, and at last reads back."""
    durable: float
    """At which what was written reaches the disk, at the end."""
    task: float
    """Of this process's time, for each task."""
    start: float
    """From the call to the first task, and from the last to the end."""


@dataclass(frozen=True)
class Task:
    """What a worker does at a time."""

    read: int
    requests: int
    returned: int


def tasks_of(paths: Sequence[Path], inputs: int, repeat: int, workers: int) -> tuple[list[Task], int]:
    """Return the tasks of a uniform average with all checksums, and how many are under way at once."""
    budget = replace(CLUSTER, threads=workers).fit(None)
    with ExitStack() as stack:
        combiner = combiner_of(paths, budget, stack)
        tasks = [
            Task(size * inputs, len(blocks) * inputs, size)
            for blocks in blocks_of_tasks(combiner, budget.blocks_per_task)
            for size in [sum(block.size for block in blocks)]
        ]
    return tasks * repeat, budget.most_returning


def blocks_of_tasks(combiner: Combiner, blocks_per_task: int) -> Iterator[tuple[Block, ...]]:
    for index in range(len(combiner.plan.template.shards)):
        blocks = blocks_of(combiner.plan, index, combiner.kernel.block_bytes)
        yield from iter(lambda: tuple(itertools.islice(blocks, blocks_per_task)), ())  # noqa: B023


def combiner_of(paths: Sequence[Path], budget: ClusterBudget, stack: ExitStack) -> Combiner:
    """Return what plans an average on a cluster, without one."""
    newest = stack.enter_context(closing(open_checkpoint(paths[-1])))
    others = [stack.enter_context(closing(open_checkpoint(path, newest))) for path in paths[:-1]]
    plan = make_plan([*others, newest], newest, [1 / len(paths)] * len(paths))
    return Combiner(plan, [plan.coefficients], Threads(Executor(), budget))


def simulate(tasks: Sequence[Task], limit: int, workers: int, machines: Machines) -> float:
    """Return the seconds that the tasks take.

    Transfers share the storage equally, and none is faster than a stream. All that are under way are
    therefore equally fast at any time, and it is enough to know how many bytes each of them has had so far,
    `moved`: a transfer ends when that has grown by its size.
    """
    now = machines.start
    moved = 0.0
    transfers: list[tuple[float, int, str]] = []  # by the value of `moved` at which they end
    timers: list[tuple[float, int, str]] = []  # by time
    handed = taken = 0  # of the tasks, in order
    free = workers
    waiting: deque[int] = deque()
    done: set[int] = set()
    client_busy = False

    def serve() -> None:
        """Let the client take the next result, or hand out another task, one at a time."""
        nonlocal client_busy
        if client_busy:
            return
        if taken in done:
            client_busy = True
            fetched = tasks[taken].returned / machines.client  # what came before is written meanwhile
            heapq.heappush(timers, (now + machines.task / 2 + fetched, taken, "taken"))
        elif handed < len(tasks) and handed - taken < limit:
            client_busy = True
            heapq.heappush(timers, (now + machines.task / 2, handed, "handed"))

    serve()
    while taken < len(tasks):
        rate = min(machines.stream, machines.storage / max(1, len(transfers)))
        by_transfer = now + (transfers[0][0] - moved) / rate if transfers else float("inf")
        by_timer = timers[0][0] if timers else float("inf")
        moved += (min(by_transfer, by_timer) - now) * rate
        now = min(by_transfer, by_timer)
        _, number, what = heapq.heappop(transfers if by_transfer <= by_timer else timers)
        task = tasks[number]
        if what == "handed":
            handed, client_busy = handed + 1, False
            waiting.append(number)
        elif what == "taken":
            taken, client_busy = taken + 1, False
        elif what == "asked":
            heapq.heappush(transfers, (moved + task.read, number, "read"))
        elif what == "read":
            heapq.heappush(timers, (now + task.read / machines.compute, number, "averaged"))
        elif what == "averaged":
            free += 1
            done.add(number)
        while free and waiting:
            free -= 1
            number = waiting.popleft()
            heapq.heappush(timers, (now + tasks[number].requests * machines.latency, number, "asked"))
        serve()
    written = sum(task.returned for task in tasks)
    return now + written / machines.client + written / machines.durable


# --- this machine ---


def read_rate(path: Path) -> float:
    """Return the bytes a second at which a process reads a file by blocks."""
    size = path.stat().st_size // BLOCK * BLOCK
    buffer = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        start = time.perf_counter()
        for position in range(0, size, BLOCK):
            os.preadv(file.fileno(), [buffer], position)
        return size / (time.perf_counter() - start)


def work_rate(path: Path) -> float:
    """Return the bytes of input a second that a process reads and averages."""
    paths = list_checkpoints([str(path.with_name("ckpt_*.keras"))]).paths
    with ExitStack() as stack:
        combiner = combiner_of(paths, CLUSTER.fit(None), stack)
        kernel = pickle.loads(pickle.dumps(combiner.kernel))
        start, done = time.perf_counter(), 0
        for blocks in blocks_of_tasks(combiner, CLUSTER.fit(None).blocks_per_task):
            kernel.averages(blocks)
            done += sum(block.size for block in blocks) * len(paths)
        return done / (time.perf_counter() - start)


def durable_rate(folder: Path, size: int) -> float:
    """Return the bytes a second at which what has just been written reaches the disk."""
    times = []
    for _ in range(3):
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(os.urandom(size))
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return size / statistics.median(times)


def at_once(measure: Callable[[Path], float], paths: Sequence[Path], processes: int) -> float:
    """Return the median over the processes of what each measures while the others do, too."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(measure, paths[:processes])  # start them
        rounds = [pool.map(measure, paths[:processes]) for _ in range(5)]
    return statistics.median(itertools.chain(*rounds))


def calibrated(paths: Sequence[Path], address: str, workers: int) -> Machines:
    """Measure each parameter by itself, with as many processes at work."""
    stream = at_once(read_rate, paths, workers)
    compute = 1 / max(1e-12, 1 / at_once(work_rate, paths, workers) - 1 / stream)
    with connected(address) as connection:
        nothing = Path("nothing").with_suffix  # any method of an object that can be pickled
        connection.submit(nothing, ".x").result()
        start = time.perf_counter()
        for work in [connection.submit(nothing, ".x") for _ in range(200)]:
            work.result()
        task = (time.perf_counter() - start) / 200
        some = bytearray(2**24).__getitem__
        connection.submit(some, slice(None)).result()
        start = time.perf_counter()
        for work in [connection.submit(some, slice(None)) for _ in range(20)]:
            work.result()
        fetched = 20 * 2**24 / (time.perf_counter() - start)
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_inputs(Path(folder), 2, 1, 1)
        for number in range(5):
            start = time.perf_counter()
            average(tiny, Path(folder) / f"swa_{number}.keras", cluster=address)
            starts.append(time.perf_counter() - start)
    # Its pages are read from memory.
    return Machines(
        stream=stream,
        storage=stream * workers,
        latency=0.0,
        compute=compute,
        client=fetched,
        durable=durable_rate(paths[0].parent, paths[0].stat().st_size),
        task=task,
        start=statistics.median(starts),
    )


def measured(paths: Sequence[Path], address: str) -> float:
    """Return the median seconds of an average on a cluster."""
    times = []
    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        for _ in range(6):
            start = time.perf_counter()
            average(paths, Path(folder) / "swa.keras", cluster=address)
            times.append(time.perf_counter() - start)
            Path(folder, "swa.keras").unlink()
    return statistics.median(times[1:])


def check(paths: Sequence[Path]) -> None:
    """Print the prediction for 1 and 2 workers on this machine beside what they take."""
    print(f"{len(paths)} checkpoints of {paths[0].stat().st_size / 1e6:.0f} MB; {machine()}\n")
    print(
        "| workers | read, GB/s | averaged, GB/s | to disk, GB/s | a task, ms | predicted, s | measured, s |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for workers in (1, 2):
        with LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster:
            found = calibrated(paths, cluster.scheduler_address, workers)
            predicted = simulate(*tasks_of(paths, len(paths), 1, workers), workers, found)
            seconds = measured(paths, cluster.scheduler_address)
        print(
            f"| {workers} | {found.stream / 1e9:.2f} | {found.compute / 1e9:.2f} | "
            f"{found.durable / 1e9:.2f} | {found.task * 1e3:.1f} | {predicted:.2f} | {seconds:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="files, or a pattern, in quotes")
    parser.add_argument("--inputs", type=int, help="as if there were this many checkpoints")
    parser.add_argument("--repeat", type=int, default=1, help="as if each were this many times as large")
    parser.add_argument("--stream", type=float, default=1.0, help="GB/s that one worker reads  [1]")
    parser.add_argument("--storage", type=float, default=40.0, help="GB/s that all of them read  [40]")
    parser.add_argument("--latency", type=float, default=0.5, help="ms of one request  [0.5]")
    parser.add_argument("--compute", type=float, default=2.5, help="GB/s that one worker averages  [2.5]")
    parser.add_argument(
        "--client", type=float, default=1.0, help="GB/s that this process fetches, and reads back  [1]"
    )
    parser.add_argument(
        "--durable", type=float, default=40.0, help="GB/s that reach the disk at the end  [40]"
    )
    parser.add_argument("--task", type=float, default=5.0, help="ms of the client's time for each task  [5]")
    parser.add_argument("--start", type=float, default=1.0, help="s to start  [1]")
    parser.add_argument(
        "--measure", action="store_true", help="check against 1 and 2 workers on this machine"
    )
    options = parser.parse_args()
    paths = list_checkpoints(options.checkpoints).paths
    if options.measure:
        check(paths)
        return
    machines = Machines(
        options.stream * 1e9,
        options.storage * 1e9,
        options.latency / 1e3,
        options.compute * 1e9,
        options.client * 1e9,
        options.durable * 1e9,
        options.task / 1e3,
        options.start,
    )
    inputs = options.inputs or len(paths)
    tasks, _ = tasks_of(paths, inputs, options.repeat, 1)
    total, output = (sum(getattr(task, name) for task in tasks) for name in ("read", "returned"))
    print(f"{len(tasks)} tasks; {total / 1e12:.3f} TB to read, {output / 1e9:.1f} GB to write\n")
    print("| workers | predicted, s | times as fast as 1 |\n|---:|---:|---:|")
    first = 0.0
    for workers in COUNTS:
        seconds = simulate(*tasks_of(paths, inputs, options.repeat, workers), workers, machines)
        first = first or seconds
        print(f"| {workers} | {seconds:.1f} | {first / seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
