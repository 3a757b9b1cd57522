"""The names of the checkpoints that a training run saves."""

from __future__ import annotations

import math
import string
from collections import defaultdict
from collections.abc import Mapping

from swa_avg.errors import UsageError
from swa_avg.files.names import is_plain_name

__all__ = ["FileNames"]


class FileNames:
    """A format of `epoch`, `step` and metrics, filled in for each checkpoint.

    Raises:
        UsageError: the format is not one, or could give two checkpoints one name.
    """

    def __init__(self, template: str | None, *, by_step: bool, weights_only: bool) -> None:
        suffix = ".weights.h5" if weights_only else ".keras"
        default = "ckpt_{epoch:04d}" + ("_{step:08d}" if by_step else "") + suffix
        self._template = template or default
        self._check(suffix, by_step=by_step, weights_only=weights_only)

    def _check(self, suffix: str, *, by_step: bool, weights_only: bool) -> None:
        named = f"filename {self._template!r}"
        if not self._template.endswith(suffix):
            raise UsageError(f"{named} must end with {suffix} for weights_only={weights_only}")
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(self._template) if name is not None]
        except ValueError as error:
            raise UsageError(f"{named} is no format: {error}") from None
        needed = "step" if by_step else "epoch"
        if needed not in fields:
            raise UsageError(f"{named} needs {{{needed}}}: each checkpoint takes a name of its own")
        if not all(name.isidentifier() for name in fields):
            raise UsageError(f"{named}: its fields are epoch, step and names of metrics")
        self.metrics = frozenset(fields) - {"epoch", "step"}
        """Those that the format names."""

    def name(self, epoch: int, step: int | None, metrics: Mapping[str, float]) -> str:
        """Return the name of the checkpoint of an epoch, counted from 1; a metric that is missing is `nan`.

        Raises:
            UsageError: the format cannot be filled in, or the name is not a plain one.
        """
        fields = defaultdict(lambda: math.nan, metrics)
        fields.update(epoch=epoch, **({} if step is None else {"step": step}))
        try:
            name = self._template.format_map(fields)
        except (ValueError, TypeError) as error:
            raise UsageError(f"filename {self._template!r} cannot be filled in: {error}") from None
        if not is_plain_name(name):
            raise UsageError(f"the file name {name!r} holds characters that a name may not hold")
        return name
