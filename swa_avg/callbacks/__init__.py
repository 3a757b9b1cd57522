"""Keras callbacks: save the checkpoints of a run to average them later, or average while training.

    model.fit(..., callbacks=[CheckpointSaver("run", start_epoch=140)])
    model.fit(..., callbacks=[SWA("models/", 140)])

Importing this package imports Keras, and registers the schedules of `swa_avg.schedules` with it.
"""

from swa_avg.callbacks.printing import PrintLearningRate
from swa_avg.callbacks.saver import CheckpointSaver
from swa_avg.callbacks.swa import SWA
from swa_avg.schedules import keras_schedule_class

__all__ = ["SWA", "CheckpointSaver", "PrintLearningRate"]

keras_schedule_class()
