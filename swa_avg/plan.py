"""Checkpoints and coefficients -> a frozen `Plan`, or every mismatch at once. Nothing is read here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_avg.errors import Finding, MismatchError
from swa_avg.formats.base import Checkpoint, Tensor
from swa_avg.policy import is_model_optimizer, refusals, treatment

__all__ = ["Plan", "config_differences", "make_plan"]

_MAX_FINDINGS = 100
_AUTO_NUMBERED = re.compile(r"(.+?)(_\d+)?$", re.DOTALL)
_NOT_COMPARED = ("build_config", "shared_object_id")
_WRAPPERS = ("module", "registered_name")
_NOT_NAMES = ("class_name", "registered_name", "module", "dtype")


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
    """Tensors of the template, by image and offset; of one that has several names, the first."""
    compared: tuple[Tensor, ...]
    """Integers that must be equal in all inputs, likewise."""
    copied: tuple[Tensor, ...]
    dropped: tuple[Tensor, ...]
    """The optimizer state that is left out."""


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
    findings.extend(_damaged_state(newest, inputs[:-1], dropped))
    if findings:
        raise MismatchError(_limited(findings))
    by_treatment: dict[str, list[Tensor]] = {"average": [], "compare": [], "copy": []}
    seen = set()
    for tensor in sorted(template.tensors.values(), key=lambda t: (t.image, t.offset, t.name)):
        if tensor.name in dropped:
            continue
        extent = (tensor.image, tensor.offset, tensor.nbytes)
        if not tensor.nbytes or extent not in seen:
            by_treatment[treatment(tensor)].append(tensor)
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


def _limited(findings: Sequence[Finding]) -> Sequence[Finding]:
    if len(findings) <= _MAX_FINDINGS:
        return findings
    rest = Finding(findings[-1].path, "...", f"and {len(findings) - _MAX_FINDINGS} more findings like these")
    return [*findings[:_MAX_FINDINGS], rest]


def _differences(checkpoint: Checkpoint, newest: Checkpoint) -> Iterator[Finding]:
    """Yield what keeps `checkpoint` from being averaged with `newest`."""
    path = checkpoint.path
    if checkpoint.kind != newest.kind:
        yield Finding(path, "format", f"is a {checkpoint.kind}; {newest.path.name} is a {newest.kind}")
        return
    for where, expected, found in config_differences(newest.config, checkpoint.config):
        yield Finding(path, where, f"expected {expected} as in {newest.path.name}, found {found}")
    for group, expected, found in _renamed(checkpoint, newest):
        yield Finding(path, group, f"expected layer {expected!r} as in {newest.path.name}, found {found!r}")
    if checkpoint.tensors is newest.tensors:
        return
    for names in sorted(map(sorted, _tied(newest) ^ _tied(checkpoint))):
        problem = f"one tensor under several names here or in {newest.path.name}, and not in the other"
        yield Finding(path, ", ".join(names[:5]), problem)
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
    """Yield (group, expected, found) of layers: a run may go on with another optimizer or model's name."""
    state = {name.rpartition("/vars/")[0] for name, t in newest.tensors.items() if t.role != "weight"}
    for group, name in newest.layer_names.items():
        theirs = checkpoint.layer_names.get(group, name)
        if group and group not in state and _stem(theirs) != _stem(name):
            yield group, name, theirs


def _damaged_state(
    newest: Checkpoint, older: Sequence[Checkpoint], dropped: Collection[str]
) -> Iterator[Finding]:
    """Yield what is not as Keras writes it in the state that an output takes from the newest checkpoint.

    HDF5 keeps no checksum of names and types, and state is not compared with that of other checkpoints: a run
    may go on with another optimizer, or have built it only later.
    """
    others = [checkpoint for checkpoint in older if checkpoint.kind == newest.kind]
    if any(checkpoint.tensors is newest.tensors for checkpoint in others):
        return
    state = [t for name, t in newest.tensors.items() if t.role != "weight" and name not in dropped]
    state.sort(key=lambda tensor: tensor.name)
    findings = list(_unlike_twins(newest, others, state))
    yield from findings or _misnumbered(newest, others, state)


def _unlike_twins(
    newest: Checkpoint, others: Sequence[Checkpoint], state: Sequence[Tensor]
) -> Iterator[Finding]:
    """Yield state with another name, shape or type than what lies in its place in files of one layout.

    Where all tensors of two files lie in the same places, they are of one model and one optimizer. Then the
    groups of layers without weights have the same names, too. Legacy files list the names of their tensors,
    which hold the optimizer's own.
    """
    places = _by_place(newest)
    twins = [(other, found) for other in others if (found := _by_place(other)).keys() == places.keys()]
    if not twins:
        return
    legacy = newest.kind.startswith("legacy")
    for tensor in state:
        there = [(other, t) for other, found in twins for t in found.get(_place(tensor), ())]
        if there and not any(
            (t.shape, t.dtype) == (tensor.shape, tensor.dtype) and (legacy or t.name == tensor.name)
            for _, t in there
        ):
            other, t = there[-1]
            problem = f"expected {t.name}, {t}, which lies there in {other.path.name}, found {tensor}"
            yield Finding(newest.path, tensor.name, f"{problem}: one of the two is damaged{_way_out(tensor)}")
    other = twins[-1][0]
    if all(twin.empty_groups != newest.empty_groups for twin, _ in twins):
        ours, theirs = newest.empty_groups, other.empty_groups
        for group, expected in zip(sorted(ours - theirs), sorted(theirs - ours), strict=False):
            problem = f"expected {expected} as in {other.path.name}: one of the two is damaged"
            yield Finding(newest.path, group, f"{problem}; leave it out")
    if all(twin.layer_names.keys() != newest.layer_names.keys() for twin, _ in twins):
        for group in sorted(other.layer_names.keys() - newest.layer_names.keys()):
            problem = f"expected the name {other.layer_names[group]!r} as in {other.path.name}, found none"
            problem += ": one of the two is damaged; leave it out"
            yield Finding(newest.path, f"{group}/vars".lstrip("/"), problem)


def _misnumbered(
    newest: Checkpoint, others: Sequence[Checkpoint], state: Sequence[Tensor]
) -> Iterator[Finding]:
    """Yield the first variable that is missing from the numbered state of an optimizer or a metric.

    Keras numbers them from 0. One that numbers its own in another way does so in every checkpoint.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for tensor in state:
        group, _, own = tensor.name.rpartition("/")
        groups.setdefault(group, {})[own] = tensor
    for group, members in groups.items():
        missing = next(number for number in itertools.count() if str(number) not in members)
        if not group.endswith("/vars") or missing == sum(map(str.isdecimal, members)):
            continue
        if not any(_members(other, group) == members.keys() for other in others):
            found = ", ".join(sorted(members))
            problem = f"is missing, and {found[:80]} are there: a name is damaged"
            way_out = _way_out(next(iter(members.values())))
            yield Finding(newest.path, f"{group}/{missing}", problem + way_out)


def _way_out(tensor: Tensor) -> str:
    drop = ", or use --optimizer drop" if is_model_optimizer(tensor) else ""
    return f"; leave this file out{drop}"


def _members(checkpoint: Checkpoint, group: str) -> set[str]:
    return {n.removeprefix(f"{group}/") for n in checkpoint.tensors if n.rpartition("/")[0] == group}


def _place(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.image, tensor.offset, tensor.nbytes


def _by_place(checkpoint: Checkpoint) -> dict[tuple[int, int, int], list[Tensor]]:
    """Return the tensors by where they lie; those without bytes lie nowhere."""
    found: dict[tuple[int, int, int], list[Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.nbytes:
            found.setdefault(_place(tensor), []).append(tensor)
    return found


def _tied(checkpoint: Checkpoint) -> set[frozenset[str]]:
    """Return the sets of names under which one stored weight is found."""
    weights = ([t.name for t in same if t.role == "weight"] for same in _by_place(checkpoint).values())
    return {frozenset(names) for names in weights if len(names) > 1}


def _stems(name: str) -> tuple[str, ...]:
    return tuple(map(_stem, name.split("/")))


def _stem(name: str) -> str:
    match = _AUTO_NUMBERED.match(name)
    return match.group(1) if match else name


def config_differences(expected: Any, found: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (path, expected, found) for each difference between two model configurations.

    Left out are compile settings, which the caller has removed; `build_config`, since shapes are compared
    tensor by tensor; `shared_object_id`, an address in the memory of the process that saved; where a class
    comes from, if only one of the two says it (Keras 2 stops saying so of nested layers once it has saved an
    .h5 in the same process); and the numbers that Keras appends to names by itself, where they are exchanged
    consistently: the same code run twice in one process gives `conv2d` and then `conv2d_1`.
    """
    if expected is found:
        return
    renamed: dict[str, str] = {}
    original: dict[str, str] = {}
    pending = [("config", expected, found)]
    while pending:
        path, one, other = pending.pop()
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            for key in sorted(one.keys() | other.keys(), reverse=True):
                if key not in _NOT_COMPARED and (key not in _WRAPPERS or (key in one and key in other)):
                    pending.append((f"{path}.{key}", one.get(key, _ABSENT), other.get(key, _ABSENT)))
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            pending.extend(
                (f"{path}[{index}]", a, b)
                for index, (a, b) in reversed(list(enumerate(zip(one, other, strict=True))))
            )
        elif isinstance(one, str) and isinstance(other, str) and not path.endswith(_NOT_NAMES):
            same = renamed.setdefault(one, other) == other and original.setdefault(other, one) == one
            if _stem(one) != _stem(other) or not same:
                yield path, _short(one), _short(other)
        elif type(one) is not type(other) or one != other:
            yield path, _short(one), _short(other)


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = f"{len(value)} entries" if isinstance(value, list | Mapping) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
