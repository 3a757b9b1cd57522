"""Kill a saving run at random moments: python scripts/kill_saves.py [--kills 200] [--seed 0]

A child process saves one checkpoint after another, with keep_last, and is killed by SIGKILL after a random
time; the next one goes on in the same folder. After each kill, every file that the index names must load and
hold one state (each weight equals the epoch's number), and no file under a final name may be half-written.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "jax")

_WEIGHTS = 200_000


def save_forever(folder: Path, ready: int) -> None:
    """Save models whose weights all equal the epoch's number, starting after the last one in the index."""
    import keras

    from swa_avg.callbacks import CheckpointSaver
    from swa_avg.inputs.index import read_index

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(_WEIGHTS)])
    model.compile("sgd", "mse")
    path = folder / "checkpoints.json"
    entries = read_index(path).entries if path.exists() else ()
    saver = CheckpointSaver(folder, keep_last=3)
    epoch = entries[-1].epoch if entries else 0
    for count in itertools.count():
        if count == 1:
            saver.wait()
            os.write(ready, b"x")
        for variable in model.weights:
            variable.assign(variable * 0 + (epoch + 1))
        saver.save(model, epoch)
        epoch += 1


def check(folder: Path) -> tuple[int, str | None]:
    """Return how many files the index names, and what is wrong, if anything."""
    import h5py

    from swa_avg.inputs.index import read_index

    path = folder / "checkpoints.json"
    if not path.exists():
        return 0, None
    entries = read_index(path).entries
    named = {entry.file: entry.epoch for entry in entries}
    for file in sorted({*named, *(p.name for p in folder.glob("ckpt_*"))}):
        epoch = named.get(file, int(file[5:9]))
        try:
            with zipfile.ZipFile(folder / file) as archive:
                if archive.testzip() is not None:
                    return len(named), f"{file}: damaged"
                weights = archive.read("model.weights.h5")
            with h5py.File(io.BytesIO(weights), "r") as data:
                group = data["layers/dense/vars"]
                values = [group[key][...] for key in group]
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            return len(named), f"{file}: {error}"
        if not all((value == epoch).all() for value in values) or not values:
            return len(named), f"{file}: holds another epoch's values, or two epochs'"
    return len(named), None


def load_with_keras(folder: Path) -> None:
    import keras

    from swa_avg.inputs.index import read_index

    for entry in read_index(folder / "checkpoints.json").entries:
        model = keras.models.load_model(folder / entry.file)
        assert all((v.numpy() == entry.epoch).all() for v in model.weights)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    folder = options.folder or Path(tempfile.mkdtemp())
    importlib.import_module("keras")  # once, for all children: nothing runs yet that a fork would lose
    named = stale = unnamed = 0
    last = 0
    for kill in range(1, options.kills + 1):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                save_forever(folder, write)
            finally:
                os._exit(3)
        os.close(write)
        if not os.read(read, 1):
            os.waitpid(child, 0)
            print("the child ended by itself")
            return 1
        os.close(read)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        temporaries = [p for p in folder.iterdir() if p.name.startswith(".tmp-")]
        stale += bool(temporaries)
        named, problem = check(folder)
        present = {p.name for p in folder.glob("ckpt_*")}
        unnamed += len(present) > named
        if problem is not None:
            print(f"kill {kill}: {problem} (in {folder})")
            return 1
        epochs = sorted(int(name[5:9]) for name in present)
        last = epochs[-1] if epochs else last
        if kill % 20 == 0:
            print(f"{kill} kills, epoch {last}: all good", flush=True)
    load_with_keras(folder)
    print(
        f"{options.kills} kills over {last} epochs: every file that the index names loads, with the epoch's"
    )
    print(
        f"values, and none under a final name is half-written. {stale} kills left a temporary, which the next"
    )
    print(f"run removed; {unnamed} left a whole file that the index does not name.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
