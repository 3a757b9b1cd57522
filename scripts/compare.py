"""Does averaging help? Test accuracy on scikit-learn's digits, over ten seeds and two learning rates.

    python scripts/compare.py [--seeds 10]

prints a Markdown table. Half of the digits are trained on; a quarter is for validation (which single
checkpoint is best, and the greedy soup); nothing looks at the last quarter but the final score.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from demo import build_model
from keras.callbacks import LearningRateScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import swa_avg
from swa_avg.batchnorm import Refresh
from swa_avg.callbacks import CheckpointSaver
from swa_avg.schedules import constant, cyclic

EPOCHS, START, CYCLE = 36, 20, 2
RATE, LOW_RATE = 0.1, 0.005
SCHEDULES = {
    "constant": (constant(RATE), None),
    "cyclic": (cyclic(RATE, LOW_RATE, cycle_length=CYCLE, start=START), CYCLE),
}


def split(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images, float32 of shape (n, 8, 8, 1), and labels for training, validation and test."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., None]
    train_x, rest_x, train_y, rest_y = train_test_split(
        images, digits.target, test_size=0.5, random_state=seed, stratify=digits.target
    )
    val_x, test_x, val_y, test_y = train_test_split(
        rest_x, rest_y, test_size=0.5, random_state=seed, stratify=rest_y
    )
    return {"train": (train_x, train_y), "val": (val_x, val_y), "test": (test_x, test_y)}


def train(folder: Path, schedule: str, data: dict[str, tuple[np.ndarray, np.ndarray]], seed: int) -> None:
    """Train one model, and keep its checkpoints in `folder`."""
    rate, cycle = SCHEDULES[schedule]
    keras.utils.set_random_seed(seed)
    model = build_model()
    model.compile(
        keras.optimizers.SGD(RATE, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    callbacks = [LearningRateScheduler(rate), CheckpointSaver(folder, start_epoch=START, cycle_length=cycle)]
    model.fit(*data["train"], batch_size=64, epochs=EPOCHS, verbose=0, callbacks=callbacks)


def accuracy(path: Path, data: tuple[np.ndarray, np.ndarray]) -> float:
    """Return a checkpoint's accuracy in percent."""
    model = keras.models.load_model(path)
    return 100.0 * float(model.evaluate(*data, batch_size=256, verbose=0)[1])


def contenders(folder: Path, data: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Path]:
    """Make every average with the tool itself, and return what is compared."""
    files = sorted(folder.glob("ckpt_*.keras"))
    refresh = Refresh(data["train"][0])
    made = {name: folder / f"{name}.keras" for name in ("plain", "fresh", "ema", "last", "soup", "sweep")}
    swa_avg.average(files, made["plain"])
    swa_avg.average(files, made["fresh"], refresh=refresh)
    swa_avg.average(files, made["ema"], method="ema:0.8", refresh=refresh)
    swa_avg.average(files[-1:], made["last"], refresh=refresh)
    validation = swa_avg.Validation(data["val"])
    plain = swa_avg.sweep(files, folder / "single.keras", validation=validation, tried=["uniform"])
    chosen = swa_avg.sweep(files, made["sweep"], validation=validation, refresh=refresh)
    greedy = next(scored.candidate for scored in chosen.averages if scored.candidate.name == "greedy")
    swa_avg.average([files[number] for number in greedy.used], made["soup"], refresh=refresh)
    return {
        "last checkpoint": files[-1],
        "last checkpoint, refreshed": made["last"],
        "best single checkpoint on validation": folder / plain.best_single.candidate.name,
        "uniform SWA, not refreshed": made["plain"],
        "uniform SWA, refreshed": made["fresh"],
        "EMA (decay 0.8), refreshed": made["ema"],
        "greedy soup, refreshed": made["soup"],
        "what `sweep` chose, refreshed": made["sweep"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    scores: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        data = split(seed)
        for schedule in SCHEDULES:
            folder = Path(tempfile.mkdtemp())
            try:
                train(folder, schedule, data, seed)
                for name, path in contenders(folder, data).items():
                    scores.setdefault(name, {}).setdefault(schedule, []).append(accuracy(path, data["test"]))
            finally:
                shutil.rmtree(folder)
            print(f"seed {seed}, {schedule}: done", file=sys.stderr)
    print(
        f"| test accuracy, %, {len(seeds)} seeds | " + " | ".join(f"{name} rate" for name in SCHEDULES) + " |"
    )
    print("|---|" + "---:|" * len(SCHEDULES))
    for name, by_schedule in scores.items():
        cells = [
            f"{np.mean(values):.2f} ± {np.std(values, ddof=min(1, len(values) - 1)):.2f}"
            for values in by_schedule.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
