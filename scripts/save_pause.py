"""Time what saves add to a run: python scripts/save_pause.py [--rounds N] [--model resnet50|mobilenet]

ResNet-50 with Adam. Each round makes runs of `fit` in turn: one without saves, and one each that saves every
few steps with Keras's ModelCheckpoint, with `model.save`, and with CheckpointSaver. Printed are medians of
the rounds, for each save: how much longer the run took than the one without saves, in seconds and in
processor time, on which other programs have less influence; the pause, which is the time in the callback; and
the longest step while a file is being written, beside the median step of the run without saves. The first
save of CheckpointSaver, which goes through Keras, comes once a run, and is printed apart; the first round
warms up. Memory is measured in fresh processes, two saves with a step after each, since a process keeps freed
memory.

Targets: CheckpointSaver adds at most 0.35 times what `model.save` adds, the longest step is at most 1.3 times
a step, and it takes at most one more copy of what is saved than `model.save`. The exit code is 1 if one is
missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from swa_avg.callbacks import CheckpointSaver

MIB = 2**20
WAYS = ("none", "ModelCheckpoint", "model.save", "CheckpointSaver")


def make_model(kind: str) -> tuple[Any, Any, Any]:
    """Return a compiled model that has made two steps, and a batch for it."""
    if kind == "resnet50":
        model, side = keras.applications.ResNet50(weights=None), 224
    else:
        model, side = keras.applications.MobileNetV2((64, 64, 3), weights=None), 64
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    x, y = np.zeros((2, side, side, 3), np.float32), np.zeros(2, np.int32)
    for _ in range(2):
        model.train_on_batch(x, y)
    return model, x, y


class Timed(keras.callbacks.Callback):  # type: ignore[misc]
    """Hands on to a callback at the ends of steps, and times it and the steps."""

    def __init__(self, inner: Any, writing: Callable[[], bool]) -> None:
        super().__init__()
        self._inner = inner
        self._writing = writing
        self.steps: list[float] = []
        self.meanwhile: list[float] = []
        """Steps that began while a file was being written."""
        self.pauses = 0.0

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        self._inner.set_model(model)

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        self._inner.set_params(params)

    def on_train_begin(self, logs: Any = None) -> None:
        self._inner.on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._inner.on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._busy = self._writing()
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        end = time.perf_counter()
        (self.meanwhile if self._busy else self.steps).append(end - self._start)
        self._inner.on_train_batch_end(batch, logs)
        self.pauses += time.perf_counter() - end

    def on_train_end(self, logs: Any = None) -> None:
        start = time.perf_counter()
        self._inner.on_train_end(logs)
        self.pauses += time.perf_counter() - start


@dataclass
class Run:
    seconds: float
    cpu: float
    pauses: float
    steps: list[float]
    meanwhile: list[float]


def run(model: Any, batch: tuple[Any, Any], steps: int, inner: Any, writing: Callable[[], bool]) -> Run:
    """Train for some steps, each on the same batch."""
    timed = Timed(inner, writing)
    x, y = (np.concatenate([part] * steps) for part in batch)
    start, cpu = time.perf_counter(), time.process_time()
    model.fit(x, y, batch_size=len(batch[0]), shuffle=False, verbose=0, callbacks=[timed])
    return Run(
        time.perf_counter() - start, time.process_time() - cpu, timed.pauses, timed.steps, timed.meanwhile
    )


class Plain(keras.callbacks.Callback):  # type: ignore[misc]
    """Saves with `model.save` every few steps."""

    def __init__(self, folder: str, every: int) -> None:
        super().__init__()
        self._folder = folder
        self._every = every

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if (batch + 1) % self._every == 0:
            self.model.save(f"{self._folder}/plain{batch}.keras")


def measured_runs(
    model: Any, batch: tuple[Any, Any], rounds: int, saves: int, every: int
) -> tuple[dict[str, list[Run]], float]:
    """Return the runs of each way, in turn, and how long the first save of CheckpointSaver took."""
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(f"{folder}/run", every=f"{every} steps", filename="{step}.keras", keep_last=3)
        start = time.perf_counter()
        with saver:
            saver.save(model, 0, step=0)
        first = time.perf_counter() - start
        checkpoint = keras.callbacks.ModelCheckpoint(f"{folder}/{{batch}}.keras", save_freq=every)
        inner = {
            "none": keras.callbacks.Callback(),
            "ModelCheckpoint": checkpoint,
            "model.save": Plain(folder, every),
            "CheckpointSaver": saver,
        }
        for number in range(rounds + 1):
            for way in WAYS:
                result = run(model, batch, saves * every, inner[way], is_saving)
                print(f"  {number} {way}: {result.seconds:.2f} s, CPU {result.cpu:.2f} s", flush=True)
                if number:
                    runs[way].append(result)
    return runs, first


def is_saving() -> bool:
    return any(thread.name.startswith("saving ") for thread in threading.enumerate())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(kind: str, way: str) -> None:
    """Print how far resident memory rises, in bytes, in two saves with a training step after each."""
    model, x, y = make_model(kind)
    done = threading.Event()
    start = highest = resident()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(folder)
        watcher.start()
        for number in range(2):
            if way == "model.save":
                model.save(f"{folder}/a.keras")
            elif way == "CheckpointSaver":
                saver.save(model, number)
            model.train_on_batch(x, y)
        saver.wait()
        done.set()
        watcher.join()
    print(highest - start)


def measured_memory(kind: str, way: str) -> int:
    command = [sys.executable, __file__, "--model", kind, "--memory", way]
    rises = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return int(statistics.median(int(rise.split()[-1]) for rise in rises))


def medians(runs: Sequence[Run], without: Sequence[Run], saves: int) -> tuple[float, float, float]:
    """Return what a save adds in seconds and in processor seconds, and its pause: medians of the rounds."""
    pairs = list(zip(runs, without, strict=True))
    return (
        statistics.median((run.seconds - none.seconds) / saves for run, none in pairs),
        statistics.median((run.cpu - none.cpu) / saves for run, none in pairs),
        statistics.median(run.pauses / saves for run in runs),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=3, help="in each run")
    parser.add_argument("--every", type=int, default=6, help="steps")
    parser.add_argument("--model", choices=["resnet50", "mobilenet"], default="resnet50")
    parser.add_argument("--memory", choices=["model.save", "CheckpointSaver", "none"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory is not None:
        peak_memory(options.model, options.memory)
        return 0
    model, x, y = make_model(options.model)
    size = sum(v.numpy().nbytes for v in (*model.variables, *model.optimizer.variables))
    backend = f"Keras {keras.__version__} on {keras.backend.backend()}"
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{options.model}, {backend}: {size / MIB:.0f} MiB saved; {os.cpu_count()} cores, load {load}")
    runs, first = measured_runs(model, (x, y), options.rounds, options.saves, options.every)
    step = statistics.median(step for run in runs["none"] for step in run.steps)
    longest = statistics.median(max(run.meanwhile, default=step) for run in runs["CheckpointSaver"])
    added = {way: medians(runs[way], runs["none"], options.saves) for way in WAYS[1:]}
    for way, (seconds, cpu, pause) in added.items():
        print(
            f"{way:16} a save adds {seconds:.2f} s to the run (CPU {cpu:.2f} s); the pause is {pause:.3f} s"
        )
    ratio, cpu_ratio = (added["CheckpointSaver"][n] / added["model.save"][n] for n in (0, 1))
    print(f"ratio of CheckpointSaver to model.save: {ratio:.2f} (<= 0.35); CPU {cpu_ratio:.2f}")
    print(f"the first save of a run, through Keras: {first:.2f} s")
    print(f"a step takes {step:.3f} s, the longest while a file is written {longest:.3f} s")
    print(f"ratio {longest / step:.2f} (<= 1.3)")
    rises = {way: measured_memory(options.model, way) for way in ("none", "model.save", "CheckpointSaver")}
    copies = (rises["CheckpointSaver"] - rises["model.save"]) / size
    shown = ", ".join(f"{way} {rise / MIB:.0f}" for way, rise in rises.items())
    print(f"peak memory above the start, in MiB: {shown}; {copies:.2f} more copies of what is saved (<= 1)")
    return 0 if ratio <= 0.35 and longest <= 1.3 * step and copies <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
