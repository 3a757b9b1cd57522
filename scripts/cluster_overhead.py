"""What a Dask cluster on one machine costs over threads: the same average by both, in turn.

    python scripts/cluster_overhead.py                    ten synthetic checkpoints of 100 MB
    python scripts/cluster_overhead.py --megabytes 400

Both read from the page cache and write to the same folder. The cluster is started before; connecting to it
and comparing versions are part of each run. Prints medians and ratios as rows of a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmark import machine, make_inputs
from distributed import LocalCluster

from swa_avg import average

VARIABLES = 50


def seconds(inputs: list[Path], output: Path, **where: object) -> float:
    output.unlink(missing_ok=True)  # to replace a file takes the time to free the old one's pages
    start = time.perf_counter()
    average(inputs, output, **where)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10, help="checkpoints")
    parser.add_argument("--megabytes", type=float, default=100, help="size of each")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/benchmark"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    inputs = make_inputs(options.folder, options.count, VARIABLES, options.megabytes * 1e6 / 1024 / VARIABLES)
    outputs = {name: options.folder / f"{name}.keras" for name in ("threads", "cluster")}
    print(
        f"{options.count} checkpoints of {options.megabytes:g} MB; medians of {options.runs}; {machine()}\n"
    )
    print("| workers | threads, s | cluster, s | ratio |\n|---:|---:|---:|---:|")
    for workers in options.workers:
        with LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as cluster:
            address = cluster.scheduler_address
            times: dict[str, list[float]] = {"threads": [], "cluster": []}
            for turn in range(options.runs + 1):
                both = {
                    "threads": seconds(inputs, outputs["threads"], threads=workers),
                    "cluster": seconds(inputs, outputs["cluster"], cluster=address),
                }
                if turn:  # the first warms up
                    for name, value in both.items():
                        times[name].append(value)
        if outputs["threads"].read_bytes() != outputs["cluster"].read_bytes():
            raise SystemExit("the outputs differ")
        here, there = (statistics.median(times[name]) for name in ("threads", "cluster"))
        print(f"| {workers} | {here:.2f} | {there:.2f} | {there / here:.2f} |", flush=True)


if __name__ == "__main__":
    main()
