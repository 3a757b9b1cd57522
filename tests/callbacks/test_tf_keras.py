"""Models of tf_keras, which is Keras 2: refused in one line, before training."""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.keras

# In another process: tf_keras and Keras want TensorFlow set up in different ways.
CODE = """
import sys
import numpy as np, tf_keras
from swa_avg.callbacks import SWA, CheckpointSaver, PrintLearningRate
from swa_avg.errors import UsageError
from swa_avg.schedules import cyclic

class Plain(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = tf_keras.layers.Dense(1)
    def call(self, x):
        return self.dense(x)

trained = []
class Counts(tf_keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        trained.append(batch)

def sequential():
    return tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(1)])

def functional():
    x = tf_keras.Input((4,))
    return tf_keras.Model(x, tf_keras.layers.Dense(1)(x))

def told(action):
    try:
        action()
    except UsageError as error:
        print(str(error))

X, Y = np.ones((8, 4), "f"), np.ones((8, 1), "f")
for make in (sequential, functional, Plain):
    for callback in (CheckpointSaver(sys.argv[1]), SWA(sys.argv[1], 0), PrintLearningRate()):
        model = make()
        model.compile("sgd", "mse")
        told(lambda: model.fit(X, Y, verbose=0, callbacks=[Counts(), callback]))
told(lambda: CheckpointSaver(sys.argv[1]).save(sequential(), 0))
told(lambda: tf_keras.optimizers.SGD(cyclic(0.1, 0.01, 2).by_step(1)))
told(lambda: CheckpointSaver(sys.argv[1]).save("model.keras", 0))
print(len(trained))
"""


def test_models_of_tf_keras_are_refused_with_what_to_do(tmp_path, run_python):
    pytest.importorskip("tf_keras")
    pytest.importorskip("tensorflow")
    run = tmp_path / "run"
    ended = run_python(CODE, run)
    assert ended.returncode == 0, ended.stderr
    *refused, schedule, other, trained = ended.stdout.splitlines()
    assert len(refused) == 10
    for line in refused:
        assert re.fullmatch(
            r"expected a model of Keras [0-9.]+, found (tf_keras\.\w+|__main__\.Plain); import keras, not tf_keras, "
            r"unset TF_USE_LEGACY_KERAS, and load what tf_keras saved by load_weights; files that it saved can be "
            r"averaged",
            line,
        )
    assert schedule == "by_step is for optimizers of Keras 3: import keras, not tf_keras"
    assert re.fullmatch(r"expected a model of Keras [0-9.]+, found builtins\.str", other)
    assert trained == "0"
    assert not run.exists()
