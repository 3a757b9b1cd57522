"""Checkpoints and coefficients -> a frozen `Plan`, or every mismatch at once. Nothing is read here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from swa_avg.errors import Finding, MismatchError
from swa_avg.formats.base import Checkpoint, Tensor
from swa_avg.inputs.listing import Listing
from swa_avg.planning.configuration import config_differences, stem
from swa_avg.planning.methods import Method
from swa_avg.planning.policy import is_model_optimizer, refusals, treatment
from swa_avg.planning.state import by_place, damaged_state
from swa_avg.text import first_few

__all__ = ["Plan", "coefficients_of", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Every decision about one average; `--dry-run` prints it."""

    inputs: tuple[Checkpoint, ...]
    """In training order."""
    template: Checkpoint
    """Whose bytes the output takes wherever nothing is averaged: the newest input."""
    coefficients: tuple[float, ...]
    """One an input."""
    averaged: tuple[Tensor, ...]
    """Tensors of the template, by shard and offset; of one that has several names, the first."""
    compared: tuple[Tensor, ...]
    """Integers that must be equal in all inputs, and floats that were found to be constants, likewise."""
    copied: tuple[Tensor, ...]
    dropped: tuple[Tensor, ...]
    """The optimizer state that is left out."""


def coefficients_of(method: Method, listing: Listing) -> list[float]:
    """Return the coefficients of listed checkpoints; their positions in training are their epochs.

    Raises:
        UsageError: their order or epochs are not known well enough for the method, or it does not fit them.
    """
    purpose = f"method {str(method)!r}"
    if method.name != "uniform":
        listing.check_order(purpose)
    times = [float(epoch) for epoch in listing.epochs(purpose)] if method.needs_times else None
    return method.coefficients(len(listing.files), times)


def make_plan(
    inputs: Sequence[Checkpoint],
    template: Checkpoint,
    coefficients: Sequence[float],
    *,
    drop_optimizer: bool = False,
) -> Plan:
    """Check that the inputs fit together and say what becomes of each tensor.

    Raises:
        MismatchError: with every tensor that is missing, extra, of another shape or type or not fit for
            averaging, every difference of configuration, and every input of another kind.
    """
    newest = inputs[-1]
    findings = list(refusals(newest))
    for checkpoint in inputs[:-1]:
        findings.extend(_differences(checkpoint, newest))
    dropped = {
        name for name, tensor in newest.tensors.items() if drop_optimizer and is_model_optimizer(tensor)
    }
    findings.extend(damaged_state(newest, inputs[:-1], dropped))
    if findings:
        raise MismatchError(findings)
    by_treatment: dict[str, list[Tensor]] = {"average": [], "compare": [], "copy": []}
    seen = set()
    for tensor in sorted(template.tensors.values(), key=lambda t: (t.shard, t.offset, t.name)):
        if tensor.name in dropped:
            continue
        extent = (tensor.shard, tensor.offset, tensor.nbytes)
        if not tensor.nbytes or extent not in seen:
            layer = template.layer_names.get(tensor.name.rpartition("/vars/")[0], "")
            by_treatment[treatment(tensor, layer)].append(tensor)
        seen.add(extent)
    return Plan(
        inputs=tuple(inputs),
        template=template,
        coefficients=tuple(coefficients),
        averaged=tuple(by_treatment["average"]),
        compared=tuple(by_treatment["compare"]),
        copied=tuple(by_treatment["copy"]),
        dropped=tuple(newest.tensors[name] for name in sorted(dropped)),
    )


def _differences(checkpoint: Checkpoint, newest: Checkpoint) -> Iterator[Finding]:
    """Yield what keeps `checkpoint` from being averaged with `newest`."""
    path = checkpoint.path
    if checkpoint.kind != newest.kind:
        yield Finding(path, "format", f"is a {checkpoint.kind}; {newest.path.name} is a {newest.kind}")
        return
    versions = ""
    if checkpoint.writer != newest.writer:
        versions = f"; written by {checkpoint.writer}, {newest.path.name} by {newest.writer}"
    for where, expected, found in config_differences(newest.config, checkpoint.config):
        yield Finding(path, where, f"expected {expected} as in {newest.path.name}, found {found}{versions}")
    for group, name, theirs in _renamed(checkpoint, newest):
        yield Finding(path, group, f"expected layer {name!r} as in {newest.path.name}, found {theirs!r}")
    if checkpoint.tensors is not newest.tensors:
        yield from _tensor_differences(checkpoint, newest)


def _tensor_differences(checkpoint: Checkpoint, newest: Checkpoint) -> Iterator[Finding]:
    path = checkpoint.path
    for names in sorted(map(sorted, _tied(newest) ^ _tied(checkpoint))):
        problem = f"one tensor under several names here or in {newest.path.name}, and not in the other"
        yield Finding(path, first_few(names), problem)
    ours = {name: tensor for name, tensor in newest.tensors.items() if tensor.role == "weight"}
    theirs = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.role == "weight"}
    hint = ""
    if ours.keys() != theirs.keys() and set(map(_stems, ours)) == set(map(_stems, theirs)):
        hint = (
            "; only automatic numbers differ: the model was built twice in one process, give its layers names"
        )
    for name, tensor in sorted(ours.items()):
        other = theirs.get(name)
        if other is None:
            yield Finding(path, name, f"missing; {newest.path.name} has it as {tensor}{hint}")
        elif (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            yield Finding(path, name, f"expected {tensor} as in {newest.path.name}, found {other}")
    for name, tensor in sorted(theirs.items()):
        if name not in ours:
            yield Finding(path, name, f"extra {tensor}; {newest.path.name} does not have it{hint}")


def _renamed(checkpoint: Checkpoint, newest: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Yield (group, expected, found) of layers; the names of optimizers, metrics and the model may change."""
    state = {name.rpartition("/vars/")[0] for name, t in newest.tensors.items() if t.role != "weight"}
    for group, name in newest.layer_names.items():
        theirs = checkpoint.layer_names.get(group, name)
        if group and group not in state and stem(theirs) != stem(name):
            yield group, name, theirs


def _tied(checkpoint: Checkpoint) -> set[frozenset[str]]:
    """Return the sets of names under which one stored weight is found."""
    weights = ([t.name for t in same if t.role == "weight"] for same in by_place(checkpoint).values())
    return {frozenset(names) for names in weights if len(names) > 1}


def _stems(name: str) -> tuple[str, ...]:
    return tuple(map(stem, name.split("/")))
