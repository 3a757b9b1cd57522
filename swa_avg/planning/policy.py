"""What is averaged and what is not: the one table, as code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from swa_avg.errors import Finding
from swa_avg.files.untrusted_json import objects
from swa_avg.formats.base import Checkpoint, Tensor

__all__ = [
    "FLOATS",
    "Treatment",
    "batchnorm_layers",
    "has_lambda",
    "is_model_optimizer",
    "refusals",
    "treatment",
]

Treatment = Literal["average", "compare", "copy"]

FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Types that are averaged -> bytes a value."""

_BATCHNORM_CLASSES = re.compile(r"BatchNormalization(V[12])?$")
_BATCHNORM_GROUP = re.compile(r"(^|/)(sync_)?batch_normalization(_\d+)?$")
_MOVING = re.compile(r"(^|/)moving_(mean|variance)(:0)?$")
_POWER_ITERATION = re.compile(r"(^|/)(sn_u|vector_u)(:0)?$|(^|/)spectral_normalization(_\d+)?/vars/1$")
_LORA = re.compile(r"(^|/)lora_[a-z_]*[ab](:0)?$")
_COUNTER_SHAPES = ((), (1,), (2,))  # a count, or the two words of a random seed's state


def treatment(tensor: Tensor) -> Treatment:
    """Return what becomes of a tensor whose type has been resolved.

    Floating-point weights, BatchNorm's moving statistics among them, are averaged. Counters, seed states and
    the power-iteration vector of spectral normalization (state, not a weight) are copied from the newest
    checkpoint; other integers must be equal in all. Optimizer state and metrics are never averaged.
    """
    if tensor.role != "weight" or _is_spectral_state(tensor):
        return "copy"
    if tensor.dtype in FLOATS:
        return "average"
    return "copy" if tensor.shape in _COUNTER_SHAPES else "compare"


def _is_spectral_state(tensor: Tensor) -> bool:
    return (
        tensor.shape[:1] == (1,)
        and len(tensor.shape) == 2
        and _POWER_ITERATION.search(tensor.name) is not None
    )


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
                "holds 2-byte values of a type the file does not name; if bfloat16, add --dtype bfloat16"
            )
            yield Finding(checkpoint.path, tensor.name, problem)
        elif tensor.dtype == "int8":
            problem = "holds int8 codes, which cannot be averaged: average before you quantize"
            yield Finding(checkpoint.path, tensor.name, problem)
        elif checkpoint.is_legacy and _LORA.search(tensor.name):
            problem = (
                "is a LoRA factor, and factors do not average: save .keras or .weights.h5, which merge them"
            )
            yield Finding(checkpoint.path, tensor.name, problem)


def batchnorm_layers(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the BatchNorm layers, as well as the checkpoint tells them.

    From the configuration where it lists layers; of subclassed models and weights-only files, from the names
    and shapes of the tensors.
    """
    configured = [
        str(layer["config"].get("name", "?"))
        for layer in objects(checkpoint.config)
        if _BATCHNORM_CLASSES.search(str(layer.get("class_name")))
        and isinstance(layer.get("config"), Mapping)
    ]
    if configured:
        return list(dict.fromkeys(configured))
    groups: dict[str, list[Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.role == "weight":
            groups.setdefault(tensor.name.rpartition("/")[0], []).append(tensor)
    return sorted(
        _layer_name(checkpoint, group) for group, members in groups.items() if _is_batchnorm(group, members)
    )


def has_lambda(config: Any) -> bool:
    """Tell whether a model's configuration holds a Lambda layer: code, which loading the model would run."""
    return any(layer.get("class_name") in ("Lambda", "__lambda__") for layer in objects(config))


def _is_batchnorm(group: str, members: list[Tensor]) -> bool:
    if any(_MOVING.search(tensor.name) for tensor in members):
        return True
    if not group.endswith("/vars"):
        return False
    if _BATCHNORM_GROUP.search(group.removesuffix("/vars")):
        return bool(members)
    # gamma, beta, moving mean and variance: no other Keras layer holds four vectors of one length
    shapes = {tensor.shape for tensor in members if tensor.dtype in FLOATS}
    return len(members) == 4 and len(shapes) == 1 and len(shapes.pop()) == 1


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
