"""The Keras side of demo.sh: train on scikit-learn's digits, and compare checkpoints on held-out digits."""

import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from swa_avg.callbacks import CheckpointSaver

EPOCHS, START = 30, 20
VALIDATION = 450
"""Of the held-out digits, those that the sweep chooses by; the others are for the comparison."""


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return images to train on and held-out ones, float32 of shape (n, 8, 8, 1), and labels."""
    digits = load_digits()
    images = (digits.images / 16.0).astype("float32")[..., None]
    return train_test_split(images, digits.target, test_size=0.5, random_state=0, stratify=digits.target)


def build_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def train(folder: Path) -> None:
    keras.utils.set_random_seed(1)
    train_x, held_out_x, train_y, held_out_y = load_data()
    np.savez(folder / "train.npz", x_train=train_x, y_train=train_y)
    np.savez(folder / "val.npz", x_val=held_out_x[:VALIDATION], y_val=held_out_y[:VALIDATION])
    model = build_model()
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    save = CheckpointSaver(folder, start_epoch=START)
    history = model.fit(train_x, train_y, batch_size=64, epochs=EPOCHS, verbose=0, callbacks=[save])
    print(
        f"trained {EPOCHS} epochs, training accuracy {history.history['accuracy'][-1]:.4f}, "
        f"kept {len(list(folder.glob('ckpt_*.keras')))} checkpoints"
    )


def compare(folder: Path) -> None:
    _, held_out_x, _, held_out_y = load_data()
    test_x, test_y = held_out_x[VALIDATION:], held_out_y[VALIDATION:]
    warnings.simplefilter("error")
    for title, path in (
        ("last checkpoint", sorted(folder.glob("ckpt_*.keras"))[-1]),
        ("average, not refreshed", folder / "plain.keras"),
        ("average, refreshed", folder / "swa.keras"),
        ("what sweep chose", folder / "best.keras"),
    ):
        model = keras.models.load_model(path)
        loss, accuracy = model.evaluate(test_x, test_y, batch_size=256, verbose=0)
        print(f"{title:>30}: test accuracy {accuracy:.4f}, loss {loss:.4f}")


if __name__ == "__main__":
    {"train": train, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
