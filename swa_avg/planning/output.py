"""The form of an output: where it goes, and as which of the formats that its inputs can be written in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.files.location import Location, folder_itself, identity, location
from swa_avg.formats import SUFFIXES, Checkpoint, suffix_of
from swa_avg.planning.plan import Plan, make_plan
from swa_avg.planning.policy import is_model_optimizer

__all__ = ["as_output", "output_path", "plan_output"]


def output_path(output: str | Path | None, named: Sequence[Location]) -> Location:
    """Return where the output goes, in the current folder by default, and never over an input."""
    target = folder_itself(location(output)) if output is not None else Path("swa" + suffix_of(named[-1]))
    for path in named:
        if _same_file(target, path):
            raise UsageError(
                f"the output {target} is also an input ({path}); name another output, or narrower inputs"
            )
        if _same_file(target.parent, path):
            raise UsageError(f"the output {target} lies in an input; name one elsewhere")
    return target


def plan_output(
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    output: Path,
    scratch: Callable[[], IO[bytes]],
    *,
    optimizer: str,
    dry_run: bool = False,
) -> Plan:
    """Plan an average in the form that the output's suffix and `optimizer` ask for.

    Raises:
        UsageError: the suffix does not fit the inputs, or `optimizer` is neither `keep` nor `drop`.
        MismatchError: as for `make_plan`.
    """
    if optimizer not in ("keep", "drop"):
        raise UsageError(f"optimizer is keep or drop, not {optimizer!r}")
    template = checkpoints[-1]
    if all(checkpoint.kind == template.kind for checkpoint in checkpoints):  # else the plan names the others
        template = as_output(template, output)
        if optimizer == "drop" and not dry_run and any(map(is_model_optimizer, template.tensors.values())):
            template = template.without_optimizer(scratch)
    return make_plan(checkpoints, template, coefficients, drop_optimizer=optimizer == "drop")


def as_output(newest: Checkpoint, output: Location) -> Checkpoint:
    """Return the newest checkpoint as what the output's suffix asks for.

    Raises:
        UsageError: the inputs cannot be written as that.
    """
    weights = newest.as_weights()
    if weights is not None and output.name.endswith(weights.suffixes):
        return weights
    suffixes = dict.fromkeys([*newest.suffixes, *(weights.suffixes if weights else ())])
    if "" in suffixes and output.name.endswith(SUFFIXES):
        or_weights = f", or end with {weights.suffixes[0]}" if weights else ""
        raise UsageError(
            f"the output {output.name} must be named as a folder{or_weights}, since the inputs are "
            f"{newest.kind}s"
        )
    if not output.name.endswith((*suffixes, suffix_of(newest.path))):
        expected = " or ".join(suffixes)
        raise UsageError(
            f"the output {output.name} must end with {expected}, since the inputs are {newest.kind}"
        )
    return newest


def _same_file(output: Location, path: Location) -> bool:
    try:
        return identity(output) == identity(path)
    except UnreadableError:  # there is no output yet
        return False
