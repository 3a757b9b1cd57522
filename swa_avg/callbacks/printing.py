"""`PrintLearningRate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from swa_avg.batchnorm.loading import check_model
from swa_avg.callbacks.model_state import learning_rate

__all__ = ["PrintLearningRate"]


class PrintLearningRate(keras.callbacks.Callback):  # type: ignore[misc]
    """Print the learning rate that each epoch ended with."""

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        check_model(self.model)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        rate = learning_rate(self.model)
        if rate is not None:
            print(f"\nEpoch {epoch + 1}: learning rate {rate:g}")
