"""At the end of `fit`, act after every other callback has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras

__all__ = ["after_all_callbacks"]


class _Last(keras.callbacks.Callback):  # type: ignore[misc]
    """Stands at the end of a list of callbacks, as training ends, and leaves it again."""

    def __init__(self, container: Any, action: Callable[[], None]) -> None:
        super().__init__()
        self._container = container
        self._action = action

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        self._container.callbacks.remove(self)
        self._action()


def after_all_callbacks(model: Any, action: Callable[[], None]) -> None:
    """From within a callback's `on_train_end`, have `action` called once those of all others have run.

    A second call in the same `fit` takes the place of the first. Outside of `fit`, there are no others and
    nothing is called.

    Keras gives a callback no reference to the list that it is in, wherever it was put, perhaps by another
    callback that wraps it. But the list is calling: it is found among the callers. Keras goes through it by
    position, and so reaches what is appended meanwhile.
    """
    container = None
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "on_train_end" else None
        if isinstance(caller, keras.callbacks.CallbackList) and caller.model is model:
            container = caller
        frame = frame.f_back
    if container is not None:
        for callback in [callback for callback in container.callbacks if isinstance(callback, _Last)]:
            container.callbacks.remove(callback)
        container.callbacks.append(_Last(container, action))
