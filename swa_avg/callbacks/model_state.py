"""What a model in training says of itself, on any backend."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

__all__ = ["is_chief", "learning_rate", "scalars", "steps", "sync"]


def sync(model: Any) -> None:
    """On JAX, bring the state that `fit` carries along back into the variables; elsewhere it never leaves."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def is_chief(model: Any) -> bool:
    """Tell whether this process is the one of a distributed run that writes; alone, it is."""
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is not None:
        return bool(strategy.extended.should_checkpoint)
    backend = keras.backend.backend()
    if backend == "jax":
        return bool(sys.modules["jax"].process_index() == 0)
    if backend == "torch":
        distributed = sys.modules["torch"].distributed
        return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
    return True


def steps(model: Any) -> int | None:
    """Return how many batches the optimizer has seen, or None without an optimizer."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return None
    accumulated = getattr(optimizer, "gradient_accumulation_steps", None) or 1
    return int(_number(optimizer.iterations)) * int(accumulated)


def learning_rate(model: Any) -> float | None:
    """Return the learning rate as the shortest decimal number that has its float32 value."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        return None
    return float(str(np.float32(_number(optimizer.learning_rate))))


def _number(value: Any) -> float:
    """Return a scalar variable or tensor as a number, mirrored ones too."""
    return float(value.numpy() if isinstance(value, keras.Variable) else keras.ops.convert_to_numpy(value))


def scalars(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    arrays = {name: keras.ops.convert_to_numpy(value) for name, value in (metrics or {}).items()}
    return {name: float(array) for name, array in arrays.items() if np.ndim(array) == 0}
