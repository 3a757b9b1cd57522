"""The Keras side of demo.sh: train on scikit-learn's digits, shifted anew each epoch, and compare on others.

    python scripts/demo.py seeds 10

does it for ten seeds, each with its own split and initialization, and prints how often averaging helped.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from evidence import Batches, Data, convolutions, split
from sklearn.datasets import load_digits

import swa_avg
from swa_avg.callbacks import CheckpointSaver

EPOCHS, START, BATCH = 30, 20, 25
SEED = 0


def load_data(seed: int) -> Data:
    """Return half of the images to train on, a quarter for validation and a quarter to test."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., None]
    return split(images, digits.target, (898, 450), seed, shift=1)


def train(folder: Path, seed: int = SEED) -> None:
    data = load_data(seed)
    np.savez(folder / "train.npz", x_train=data.refresh)
    np.savez(folder / "val.npz", x_val=data.validation[0], y_val=data.validation[1])
    keras.utils.set_random_seed(seed)
    model = convolutions(8, (16, 32), strides=1)
    optimizer = keras.optimizers.SGD(0.3, momentum=0.9, weight_decay=5e-3)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    save = CheckpointSaver(folder, start_epoch=START)
    history = model.fit(Batches(data.epoch, BATCH, seed), epochs=EPOCHS, verbose=0, callbacks=[save])
    print(
        f"trained {EPOCHS} epochs, training accuracy {history.history['accuracy'][-1]:.4f}, "
        f"kept {len(list(folder.glob('ckpt_*.keras')))} checkpoints"
    )


def compare(folder: Path, seed: int = SEED) -> dict[str, tuple[float, float]]:
    """Print test accuracy and loss of what is in the folder, and return them."""
    last = max(folder.glob("ckpt_*.keras"))
    swa_avg.average(last, folder / "last.keras", refresh=folder / "train.npz")
    test, found = load_data(seed).test, {}
    for title, path in (
        ("last checkpoint", last),
        ("last checkpoint, refreshed", folder / "last.keras"),
        ("average, not refreshed", folder / "plain.keras"),
        ("average, refreshed", folder / "swa.keras"),
        ("what sweep chose", folder / "best.keras"),
    ):
        if path.exists():
            loss, accuracy = keras.models.load_model(path).evaluate(*test, batch_size=256, verbose=0)
            found[title] = (accuracy, loss)
            print(f"{title:>30}: test accuracy {accuracy:.4f}, loss {loss:.4f}")
    return found


def seeds(count: int) -> None:
    """Train, average and compare for `count` seeds, and print how often averaging helped."""
    warnings.simplefilter("ignore", swa_avg.SwaAvgWarning)
    runs = []
    for seed in range(count):
        print(f"seed {seed}")
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            train(folder, seed)
            files = sorted(folder.glob("ckpt_*.keras"))
            swa_avg.average(files, folder / "plain.keras")
            swa_avg.average(files, folder / "swa.keras", refresh=folder / "train.npz")
            runs.append(compare(folder, seed))
    for better, worse in (
        ("average, not refreshed", "last checkpoint"),
        ("average, refreshed", "last checkpoint, refreshed"),
    ):
        gains = np.array([np.subtract(run[better], run[worse]) for run in runs]) * (100, -1)
        for gain, what in zip(gains.T, ("points of accuracy", "lower loss"), strict=True):
            print(
                f"{better}, against {worse}: {what} {gain.min():+.3f} to {gain.max():+.3f}, "
                f"better in {(gain > 0).sum()} of {count}"
            )


if __name__ == "__main__":
    command, argument = sys.argv[1:]
    if command == "seeds":
        seeds(int(argument))
    else:
        {"train": train, "compare": compare}[command](Path(argument))
