"""Time what a save adds to training: python scripts/save_pause.py [--saves N] [--model resnet50|mobilenet]

ResNet-50 with Adam. Each of N rounds makes, in turn: a training step; `model.save`, for which an ordinary
checkpoint callback makes training wait; a background save of CheckpointSaver, and a training step while it is
being written. Printed are the pause, which is the time in the callback, and how much longer that step took.
Memory is measured in fresh processes, one save with one step, since a process keeps freed memory.

Targets: the median pause is at most a quarter of `model.save`'s median, and background saving takes at most
one more copy of the saved arrays than `model.save`. The exit code is 1 if one is missed.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from swa_avg.callbacks import CheckpointSaver

MIB = 2**20


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


def timed(function: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory(kind: str, way: str) -> None:
    """Print how far resident memory rises, in bytes, in one save with a training step after it."""
    model, x, y = make_model(kind)
    done = threading.Event()
    start = highest = resident()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    with tempfile.TemporaryDirectory() as folder:
        watcher.start()
        if way == "plain":
            model.save(f"{folder}/a.keras")
            model.train_on_batch(x, y)
        elif way == "background":
            with CheckpointSaver(folder) as saver:
                saver.save(model, 0)
                model.train_on_batch(x, y)
        else:
            model.train_on_batch(x, y)
        done.set()
        watcher.join()
    print(highest - start)


def measured_memory(kind: str, way: str) -> int:
    command = [sys.executable, __file__, "--model", kind, "--memory", way]
    rises = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return int(statistics.median(int(rise.split()[-1]) for rise in rises))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--model", choices=["resnet50", "mobilenet"], default="resnet50")
    parser.add_argument("--memory", choices=["plain", "background", "step"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory is not None:
        peak_memory(options.model, options.memory)
        return 0
    model, x, y = make_model(options.model)
    size = sum(v.numpy().nbytes for v in (*model.variables, *model.optimizer.variables))
    backend = f"Keras {keras.__version__} on {keras.backend.backend()}"
    print(f"{options.model}, {backend}: {size / MIB:.0f} MiB saved")
    steps, plain, pauses, after = [], [], [], []
    with tempfile.TemporaryDirectory() as folder, CheckpointSaver(f"{folder}/run", keep_last=1) as saver:
        for number in range(-1, options.saves):
            steps.append(timed(model.train_on_batch, x, y))
            plain.append(timed(model.save, f"{folder}/plain.keras"))
            pauses.append(timed(saver.save, model, number + 1))
            after.append(timed(model.train_on_batch, x, y))
            saver.wait()
            print(f"  {number + 1:2}: model.save {plain[-1]:.2f} s, pause {pauses[-1]:.3f} s", flush=True)
    # The first round warms up.
    step, save, pause, later = (statistics.median(values[1:]) for values in (steps, plain, pauses, after))
    print(f"medians of {options.saves}: model.save {save:.3f} s, pause {pause:.3f} s")
    print(f"ratio {pause / save:.3f} (<= 0.25)")
    print(f"a step takes {step:.3f} s, and {later:.3f} s while a save is written")
    rises = {way: measured_memory(options.model, way) for way in ("step", "plain", "background")}
    copies = (rises["background"] - rises["plain"]) / size
    print(
        "peak memory above the start, in MiB: "
        + ", ".join(f"{way} {rise / MIB:.0f}" for way, rise in rises.items())
        + f"; background - plain = {copies:.2f} copies of what is saved (<= 1)"
    )
    return 0 if pause <= save / 4 and copies <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
