"""Measure the BatchNorm refresh: its speed against a bare forward pass, and its memory on a large file.

    python scripts/bench_refresh.py speed  [--backend jax] [--batches 80] [--batch-size 128] [--rounds 3]
    python scripts/bench_refresh.py memory [--backend jax] [--gigabytes 2] [--folder /tmp]

`speed` runs a ResNet-20 on random 32x32 images in three ways, one after the other in each round, each from
nothing, so that tracing and compiling count, too: the refresh; a bare compiled training-mode forward pass
over the same batches; an eager loop. `memory` refreshes from a file in processes of their own, once from all
of a large .npz and once from one of two batches; the difference of their peaks is what the size of the data
costs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def resnet20() -> Any:
    """Return the ResNet-20 for 32x32 images of He et al. 2015 (arXiv:1512.03385), with projections."""
    import keras
    from keras import layers

    def normalized(x: Any, filters: int, size: int, stride: int = 1) -> Any:
        x = layers.Conv2D(filters, size, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(normalized(inputs, 16, 3))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(normalized(x, filters, 3, stride))
            y = normalized(y, filters, 3)
            x = normalized(x, filters, 1, stride) if stride == 2 else x
            x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def device() -> str:
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return f"JAX {jax.__version__} on {jax.devices()[0].device_kind}"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = [
            tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")
        ]
        return f"TensorFlow {tf.__version__} on {gpus[0].get('device_name', 'GPU') if gpus else 'cpu'}"
    return f"{keras.backend.backend()}"


def bare(model: Any, batches: list[Any]) -> None:
    """Run a compiled training-mode forward pass that updates the moving statistics, as in `fit`."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        forward = tf.function(lambda x: model(x, training=True), autograph=False)
        for batch in batches:
            forward(tf.convert_to_tensor(batch))
        return
    import jax

    step = jax.jit(lambda trainable, rest, x: model.stateless_call(trainable, rest, x, training=True))
    trainable = [variable.value for variable in model.trainable_variables]
    rest = [variable.value for variable in model.non_trainable_variables]
    for batch in batches:
        outputs, rest = step(trainable, rest, batch)
    jax.block_until_ready((outputs, rest))


def eager(model: Any, batches: list[Any]) -> None:
    for batch in batches:
        outputs = model(batch, training=True)
    np.asarray(outputs)


def speed(options: argparse.Namespace) -> None:
    from swa_avg.batchnorm import refresh_batchnorm

    rng = np.random.default_rng(0)
    shape = (options.batch_size, 32, 32, 3)
    batches = [rng.normal(size=shape).astype("float32") for _ in range(options.batches)]
    images = options.batches * options.batch_size
    model = resnet20()
    ways: dict[str, Callable[[], Any]] = {
        "refresh": lambda: refresh_batchnorm(model, batches),
        "bare compiled forward": lambda: bare(model, batches),
        "eager loop": lambda: eager(model, batches),
    }
    bare(model, batches[:1])  # libraries load and threads start before anything is measured
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(f"ResNet-20, {images} images of 32x32 in batches of {options.batch_size}; {device()}")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        shown = " ".join(f"{one:.2f}" for one in seconds)
        print(f"{name:>22}: {middle:7.2f} s (median of {shown}), {images / middle:8.0f} images/s")
    for name, limit in (("bare compiled forward", "at most 1.10"), ("eager loop", "at most 0.50")):
        ratio = statistics.median(a / b for a, b in zip(times["refresh"], times[name], strict=True))
        print(f"refresh / {name}: {ratio:.2f} (median of the rounds' ratios; wanted: {limit})")


def write_npz(path: Path, rows: int) -> None:
    """Write a stored .npz of random uint8 images, 12,288 bytes a row, without holding it."""
    import zipfile

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive, archive.open("x.npy", "w", force_zip64=True) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (rows, 64, 64, 3)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        for start in range(0, rows, 1024):
            count = min(1024, rows - start)
            file.write(rng.integers(0, 256, (count, 64, 64, 3), np.uint8).data)


def memory(options: argparse.Namespace) -> None:
    peaks = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, rows in (("two batches", 256), ("all", int(options.gigabytes * 1e9 / 12_288))):
            path = Path(folder) / "data.npz"
            write_npz(path, rows)
            command = [sys.executable, __file__, "one", str(path), "--backend", options.backend]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            kilobytes, samples, seconds = ended.stdout.split()
            peaks[name] = int(kilobytes) / 1024
            print(
                f"{path.stat().st_size / 1e6:10.1f} MB of data: {samples} images in {float(seconds):.0f} s, "
                f"peak {peaks[name]:.0f} MiB resident"
            )
    print(f"more for the large file: {peaks['all'] - peaks['two batches']:.0f} MiB (wanted: at most 300 MB)")


def one(options: argparse.Namespace) -> None:
    """Refresh a small model from a file and print the peak of resident memory in KiB."""
    import keras
    from keras import layers

    from swa_avg.batchnorm import refresh_batchnorm

    start = time.perf_counter()
    parts = [keras.Input((64, 64, 3)), layers.Rescaling(1 / 255), layers.Conv2D(8, 3, strides=4)]
    model = keras.Sequential([*parts, layers.BatchNormalization(), layers.Flatten(), layers.Dense(10)])
    report = refresh_batchnorm(model, options.path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak, report.samples, time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, run in (("speed", speed), ("memory", memory), ("one", one)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--backend", default="tensorflow", choices=["tensorflow", "jax"])
        if name == "speed":
            command.add_argument("--batches", type=int, default=80)
            command.add_argument("--batch-size", type=int, default=128)
            command.add_argument("--rounds", type=int, default=3)
        if name == "memory":
            command.add_argument("--gigabytes", type=float, default=2.0)
            command.add_argument("--folder", default=tempfile.gettempdir())
        if name == "one":
            command.add_argument("path", type=Path)
    options = parser.parse_args()
    os.environ["KERAS_BACKEND"] = options.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore")
    options.run(options)


if __name__ == "__main__":
    main()
