"""What is averaged and what is not: the one table, as code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from swa_avg.errors import Finding
from swa_avg.files.untrusted_json import objects
from swa_avg.formats.base import Checkpoint, Tensor
from swa_avg.text import first_few

__all__ = [
    "FLOATS",
    "Treatment",
    "batchnorm_layers",
    "batchnorm_statistics",
    "batchnorm_warning",
    "constants_warning",
    "has_lambda",
    "is_model_optimizer",
    "other_weights",
    "refusals",
    "treatment",
]

Treatment = Literal["average", "compare", "copy"]

FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Types that are averaged -> bytes a value."""

_BATCHNORM_CLASSES = re.compile(r"BatchNormalization(V[12])?$")
_BATCHNORM_GROUP = re.compile(r"(^|[/_])(sync_)?(batch_?norm\w*|bn)(_?\d+)?$", re.IGNORECASE)
_MOVING = re.compile(r"(^|/)moving_(mean|variance)(:0)?$")
_POWER_ITERATION = re.compile(r"(^|/)(sn_u|vector_u)(:0)?$|(^|[/_])(spectral_norm\w*|sn)(_?\d+)?/vars/1$")
_LORA = re.compile(r"(^|/)lora_[a-z_]*[ab](:0)?$")
_COUNTER_SHAPES = ((), (1,), (2,))  # a count, or the two words of a random seed's state


def treatment(tensor: Tensor, layer: str = "") -> Treatment:
    """Return what becomes of a tensor whose type has been resolved; `layer` is its layer's name, if known.

    Floating-point weights, BatchNorm's moving statistics among them, are averaged. Counters, seed states and
    the power-iteration vector of spectral normalization (state, not a weight) are copied from the newest
    checkpoint; other integers must be equal in all. Optimizer state and metrics are never averaged.
    """
    if tensor.role != "weight" or _is_spectral_state(tensor, layer):
        return "copy"
    if tensor.dtype in FLOATS:
        return "average"
    return "copy" if tensor.shape in _COUNTER_SHAPES else "compare"


def _is_spectral_state(tensor: Tensor, layer: str) -> bool:
    by_layer = f"{layer}/vars/{tensor.name.rpartition('/')[2]}"
    names = any(_POWER_ITERATION.search(name) for name in (tensor.name, by_layer))
    return names and len(tensor.shape) == 2 and tensor.shape[0] == 1


def is_model_optimizer(tensor: Tensor) -> bool:
    """Tell whether a tensor is state of the model's optimizer, which `--optimizer drop` leaves out."""
    return tensor.role == "optimizer" and tensor.name.startswith(("optimizer/", "optimizer_weights/"))


def refusals(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield what makes a mean of this kind of checkpoint meaningless, or its tensors unreadable."""
    for layer, mode in _quantized_layers(checkpoint.config):
        problem = f"is quantized ({mode}); codes and scales cannot be averaged: average before you quantize"
        yield Finding(checkpoint.path, layer, problem)
    for _, tensor in sorted(checkpoint.tensors.items()):
        if tensor.role != "weight":
            continue
        if tensor.dtype == "opaque16":
            problem = (
                "holds 2-byte values of a type the file does not name; if bfloat16, set dtype to bfloat16"
            )
            yield Finding(checkpoint.path, tensor.name, problem)
        elif tensor.dtype == "int8":
            problem = "holds int8 codes, which cannot be averaged: average before you quantize"
            yield Finding(checkpoint.path, tensor.name, problem)
        elif _LORA.search(tensor.name):
            problem = (
                "is a LoRA factor, and factors do not average (the mean of products is not the product of "
                "means): save the model as .keras or .weights.h5, which merge them"
            )
            yield Finding(checkpoint.path, tensor.name, problem)


def batchnorm_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the BatchNorm layers, as well as the checkpoint tells them.

    From the configuration, which does not list what custom layers and models hold, and from the names, the
    layers' names and the shapes of the tensors.
    """
    configured = list(
        dict.fromkeys(
            str(layer["config"].get("name", "?"))
            for layer in objects(checkpoint.config)
            if _BATCHNORM_CLASSES.search(str(layer.get("class_name")))
            and isinstance(layer.get("config"), Mapping)
        )
    )
    stored = [(group, _layer_name(checkpoint, group)) for group in _batchnorm_groups(checkpoint)]
    # Of older writers, names are those of classes: what lies deepest is what no configuration lists.
    unlisted = sorted(
        (item for item in stored if item[1] not in configured), key=lambda item: item[0].count("/")
    )
    more = max(0, len(stored) - len(configured))
    return [*configured, *sorted(dict.fromkeys(name for _, name in unlisted[len(unlisted) - more :]))]


def batchnorm_statistics(checkpoint: Checkpoint) -> set[str]:
    """Return the names of the tensors that are moving means and variances of BatchNorm layers.

    As well as the checkpoint tells them: by their names, or in a group that is a BatchNorm layer's the last
    two, since Keras numbers a layer's weights in the order in which it makes them.
    """
    found = set()
    for members in _batchnorm_groups(checkpoint).values():
        named = [tensor.name for tensor in members if _MOVING.search(tensor.name)]
        numbered = sorted(
            (tensor.name for tensor in members if tensor.name.rpartition("/")[2].isdecimal()),
            key=lambda name: int(name.rpartition("/")[2]),
        )
        found.update(named or numbered[-2:])
    return found


def _batchnorm_groups(checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """Return the groups that are those of BatchNorm layers, with their tensors."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.role == "weight":
            groups.setdefault(tensor.name.rpartition("/")[0], []).append(tensor)
    return {
        group: members
        for group, members in groups.items()
        if _is_batchnorm(group, _layer_name(checkpoint, group), members)
    }


def batchnorm_warning(layers: Sequence[str], refresh: str) -> str:
    """Return the warning about an average of these layers' statistics; `refresh` asks for a refresh."""
    return (
        f"BatchNorm statistics are averaged, not re-estimated ({first_few(layers)}); the model may be far "
        f"worse than its weights: refresh them on training data with {refresh}"
    )


def constants_warning(names: Sequence[str]) -> str:
    """Return the warning about tensors that hold NaN or infinity and are the same in all inputs."""
    return f"NaN or infinity, the same in all checkpoints, is copied ({first_few(names)})"


def other_weights(optimizer: Any) -> str | None:
    """Return the warning about an optimizer, by its configuration, that keeps an average of its own."""
    for settings in objects(optimizer):
        if settings.get("use_ema") is True:
            return (
                "the optimizer keeps an average of the weights (use_ema), which checkpoints saved while fit "
                "runs do not hold, unless keras.callbacks.SwapEMAWeights(swap_on_epoch=True) stands before "
                "the callback that saves"
            )
        if settings.get("class_name") == "ScheduleFreeAdamW":
            return (
                "the optimizer is schedule-free (ScheduleFreeAdamW), and checkpoints hold the weights y that "
                "it trains, not the average x that it means to be evaluated, which no call of Keras gives: "
                "x = (y - (1 - beta_1) * z) / beta_1, z being the momentum in the optimizer's state"
            )
    return None


def has_lambda(config: Any) -> bool:
    """Tell whether a model's configuration holds a Lambda layer: code, which loading the model would run."""
    return any(layer.get("class_name") in ("Lambda", "__lambda__") for layer in objects(config))


def _is_batchnorm(group: str, layer: str, members: list[Tensor]) -> bool:
    if any(_MOVING.search(tensor.name) for tensor in members):
        return True
    if not group.endswith("/vars"):
        return False
    shapes = {tensor.shape for tensor in members if tensor.dtype in FLOATS}
    vectors = len(shapes) == 1 and len(shapes.pop()) == 1
    if _BATCHNORM_GROUP.search(group.removesuffix("/vars")) or _BATCHNORM_GROUP.search(layer):
        return vectors
    # gamma, beta, moving mean and variance: no other Keras layer holds four vectors of one length
    return len(members) == 4 and vectors


def _layer_name(checkpoint: Checkpoint, group: str) -> str:
    path = group.removesuffix("/vars")
    return checkpoint.layer_names.get(path, path.rsplit("/", 1)[-1])


def _quantized_layers(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (layer name, quantization mode); only the dtype policies of quantized layers have a mode."""
    for settings in objects(config):
        if "name" in settings and isinstance(settings.get("dtype"), Mapping):
            for policy in objects(settings["dtype"]):
                if "mode" in policy:
                    yield str(settings["name"]), str(policy["mode"])
