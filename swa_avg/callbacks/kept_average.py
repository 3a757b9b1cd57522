"""Optimizers that keep an average of the weights: what a checkpoint does not hold is said before training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import keras

from swa_avg.callbacks.last import calling_list
from swa_avg.planning.policy import other_weights

__all__ = ["kept_average_warnings"]


def kept_average_warnings(saver: keras.callbacks.Callback) -> list[str]:
    """From within `on_train_begin`, return what to say of the model's optimizer, if anything.

    What is saved stays what Keras saves: a checkpoint from which training goes on holds the weights that are
    trained. Where a `SwapEMAWeights(swap_on_epoch=True)` comes first, it holds the averages as well.
    """
    container = calling_list(saver.model, "on_train_begin")
    before = takewhile(lambda callback: callback is not saver, container.callbacks if container else ())
    if any(getattr(callback, "swap_on_epoch", False) for callback in before):
        return []
    warning = other_weights(list(_described(getattr(saver.model, "optimizer", None))))
    return [] if warning is None else [warning]


def _described(optimizer: Any) -> Iterator[dict[str, Any]]:
    """Yield class and setting of an optimizer, and of those that it wraps."""
    if optimizer is not None:
        yield {"class_name": type(optimizer).__name__, "use_ema": getattr(optimizer, "use_ema", False)}
        for inner in (getattr(optimizer, "inner_optimizer", None), *getattr(optimizer, "optimizers", ())):
            yield from _described(inner)
