"""What a refresh is asked to do, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from swa_avg.batchnorm.loading import Loading
from swa_avg.files.location import local_copy
from swa_avg.formats import Checkpoint

__all__ = ["Refresh"]


@dataclass(frozen=True)
class Refresh(Loading):
    """What a refresh of a checkpoint is asked to do."""

    data: Any
    """What `open_data` takes: a file, a folder, `MODULE:FUNCTION`, arrays or batches; labels are ignored."""
    inputs: Sequence[str] | Mapping[str, str] = ()
    """`KEY` or `KEY=INPUT`, where the data's names do not say which array goes where; or a mapping."""
    batch_size: int | None = None
    """Rows a batch, where the data do not come in batches; 128 by default."""
    samples: int | None = None
    """Rows to use; all by default."""
    estimator: str = "pooled"
    """`pooled`: mean and variance of all data as one population; `batch-mean`: means of the batches'
    statistics weighted by size, as the code of the SWA paper computes them."""
    seed: int = 0
    """Of the order of the rows, and of the model's random layers: the same seed gives the same statistics."""
    preprocess: str | Callable[[Any], Any] | None = None
    """Applied to each batch, as the model is to take it; a function or its `MODULE:FUNCTION`."""

    @classmethod
    def of(cls, value: Any, loading: Loading | None = None) -> Refresh | None:
        """Return the refresh that a caller asks for with a Refresh, or with data alone, whatever these are.

        `loading` says how the model is loaded, where data alone are given.
        """
        if value is None or isinstance(value, Refresh):
            return value
        loading = loading or Loading()
        return cls(value, model=loading.model, imports=loading.imports, unsafe=loading.unsafe)

    def for_output(self, output: Checkpoint, newest: Checkpoint, *, dry_run: bool = False) -> Refresh:
        """Name the newest input as the source of the model where the output holds its weights alone."""
        if self.model is None and output.kind != newest.kind:
            return replace(self, model=str(newest.path if dry_run else local_copy(newest.path)))
        return self
