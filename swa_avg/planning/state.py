"""Damage to the state of optimizers and metrics that an output takes from the newest checkpoint.

HDF5 has no checksum of names and types, and state is not compared with that of other checkpoints: a run may
go on with another optimizer, or build it only later. What shows damage are checkpoints of the same layout,
and the numbers that Keras gives the variables.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

from swa_avg.errors import Finding
from swa_avg.formats.base import Checkpoint, Tensor
from swa_avg.planning.policy import is_model_optimizer

__all__ = ["by_place", "damaged_state"]

_Place = tuple[int, int, int]
"""Shard, offset and bytes."""
_Twin = tuple[Checkpoint, Mapping[_Place, Sequence[Tensor]]]
"""A checkpoint whose tensors lie where those of the newest do, and what lies in each place."""


def damaged_state(
    newest: Checkpoint, older: Sequence[Checkpoint], dropped: Collection[str]
) -> Iterator[Finding]:
    """Yield what Keras does not write so in the state of the newest checkpoint, without what is dropped."""
    others = [checkpoint for checkpoint in older if checkpoint.kind == newest.kind]
    if any(checkpoint.tensors is newest.tensors for checkpoint in others):
        return
    state = [t for name, t in newest.tensors.items() if t.role != "weight" and name not in dropped]
    state.sort(key=lambda tensor: tensor.name)
    places = by_place(newest).keys()
    twins = [(other, found) for other in others if (found := by_place(other)).keys() == places]
    findings = [*_unlike_twins(newest, twins, state), *_unlike_groups(newest, twins)]
    yield from findings or _misnumbered(newest, others, state)


def by_place(checkpoint: Checkpoint) -> dict[_Place, list[Tensor]]:
    """Return the tensors by where they lie; those without bytes lie nowhere."""
    found: dict[_Place, list[Tensor]] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.nbytes:
            found.setdefault(_place(tensor), []).append(tensor)
    return found


def _place(tensor: Tensor) -> _Place:
    return tensor.shard, tensor.offset, tensor.nbytes


def _unlike_twins(newest: Checkpoint, twins: Sequence[_Twin], state: Sequence[Tensor]) -> Iterator[Finding]:
    """Yield state whose name, shape or type differs from what lies in the same place in every twin.

    Where all tensors of two files lie in the same places, both are of one model and one optimizer. Legacy
    files list the names of their tensors, which contain the optimizer's own.
    """
    for tensor in state:
        there = [(other, t) for other, found in twins for t in found.get(_place(tensor), ())]
        if there and not any(
            (t.shape, t.dtype) == (tensor.shape, tensor.dtype) and (newest.is_legacy or t.name == tensor.name)
            for _, t in there
        ):
            other, t = there[-1]
            problem = f"expected {t.name}, {t}, as in the same place in {other.path.name}, found {tensor}"
            yield Finding(newest.path, tensor.name, f"{problem}: one of the two is damaged{_way_out(tensor)}")


def _unlike_groups(newest: Checkpoint, twins: Sequence[_Twin]) -> Iterator[Finding]:
    """Yield groups of layers without weights, and names of layers, that differ from those of every twin."""
    if not twins:
        return
    other = twins[-1][0]
    damaged = "one of the two is damaged; leave it out"
    if all(twin.empty_groups != newest.empty_groups for twin, _ in twins):
        ours, theirs = newest.empty_groups, other.empty_groups
        for group, expected in zip(sorted(ours - theirs), sorted(theirs - ours), strict=False):
            yield Finding(newest.path, group, f"expected {expected} as in {other.path.name}: {damaged}")
    if all(twin.layer_names.keys() != newest.layer_names.keys() for twin, _ in twins):
        for group in sorted(other.layer_names.keys() - newest.layer_names.keys()):
            problem = f"expected the name {other.layer_names[group]!r} as in {other.path.name}, found none"
            yield Finding(newest.path, f"{group}/vars".lstrip("/"), f"{problem}: {damaged}")


def _misnumbered(
    newest: Checkpoint, others: Sequence[Checkpoint], state: Sequence[Tensor]
) -> Iterator[Finding]:
    """Yield the first number that is missing from the state of an optimizer or a metric.

    Keras numbers variables from 0. A class that numbers its own in another way does so in every checkpoint.
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


def _members(checkpoint: Checkpoint, group: str) -> set[str]:
    return {n.removeprefix(f"{group}/") for n in checkpoint.tensors if n.rpartition("/")[0] == group}


def _way_out(tensor: Tensor) -> str:
    drop = ", or use --optimizer drop" if is_model_optimizer(tensor) else ""
    return f"; leave this file out{drop}"
