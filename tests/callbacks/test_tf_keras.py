"""Models of tf_keras, which is Keras 2: refused in one line, before training."""

from __future__ import annotations

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
    assert (
        refused
        == [
            "the model is one of tf_keras, that is Keras 2, and the callbacks take models of Keras 3: import keras, "
            "not tf_keras, and unset TF_USE_LEGACY_KERAS; or save with tf_keras.callbacks.ModelCheckpoint, and average "
            "its files with swa-avg"
        ]
        * 10
    )
    assert schedule == "by_step is for optimizers of Keras 3: import keras, not tf_keras"
    assert other == "model is a str; expected a keras.Model"
    assert trained == "0"
    assert not run.exists()
