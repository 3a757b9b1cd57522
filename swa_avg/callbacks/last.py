"""The other callbacks of a `fit`: found, and at its end acted after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras

__all__ = ["after_all_callbacks", "calling_list"]


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
    nothing is called. Keras goes through the list by position, and so reaches what is appended meanwhile.
    """
    container = calling_list(model, "on_train_end")
    if container is not None:
        for callback in [callback for callback in container.callbacks if isinstance(callback, _Last)]:
            container.callbacks.remove(callback)
        container.callbacks.append(_Last(container, action))


def calling_list(model: Any, hook: str) -> Any:
    """From within a callback's method `hook`, return the list of callbacks that called it; None without one.

    Keras gives a callback no reference to the list that it is in, wherever it was put, perhaps by another
    callback that wraps it. But the list is calling: it is found among the callers.
    """
    container = None
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == hook else None
        if isinstance(caller, keras.callbacks.CallbackList) and caller.model is model:
            container = caller
        frame = frame.f_back
    return container
