"""A refresh on other machines: each process loads the model once and takes batches by their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from swa_avg.batchnorm.loading import load_model
from swa_avg.batchnorm.observe import active_layers
from swa_avg.batchnorm.processes import Origin, PerProcess, absolute
from swa_avg.batchnorm.request import Refresh
from swa_avg.batchnorm.runner import Measured, Runner, running
from swa_avg.batchnorm.signature import spec_of
from swa_avg.data.batches import ArrayData
from swa_avg.data.sources import open_data
from swa_avg.errors import UnreadableError
from swa_avg.files.location import local_copy
from swa_avg.formats import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from swa_avg.combine.cluster import Cluster

__all__ = ["BatchWorker", "Distributed"]

_State = tuple[int, int]
"""Size and time of modification of a file."""


@dataclass(frozen=True)
class Distributed:
    """The processes that run batches."""

    processes: Cluster
    worker: BatchWorker

    @property
    def at_once(self) -> int:
        """Calls that are under way at a time."""
        return self.processes.at_once

    def measure(self, runs: Iterable[range]) -> Iterator[Measured]:
        """Yield what is measured of each batch, in order; the batches of a run travel together."""
        for _, measured in self.processes.run(self.worker.measure, runs):
            yield from measured


@dataclass(frozen=True)
class BatchWorker:
    """Runs the model of one checkpoint over batches of one source of data, in any process."""

    draft: Path
    refresh: Refresh
    origin: Origin
    states: Sequence[_State]
    """Of the checkpoint's files, and of the data's."""
    _loaded: PerProcess[tuple[ArrayData, Runner]] = field(default_factory=PerProcess, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, refresh: Refresh) -> BatchWorker | None:
        """Return a worker, or None where data or model are not named, but are in this process's memory."""
        if not isinstance(refresh.data, str | Path) or not isinstance(refresh.model, str | None):
            return None
        named = replace(refresh, data=absolute(refresh.data), model=absolute(refresh.model))
        draft = local_copy(checkpoint.path).absolute()
        return cls(draft, named, Origin.here(), _states(checkpoint, named.data))

    @property
    def subject(self) -> str:
        """The file that it is about, for messages."""
        return str(self.refresh.data)

    def measure(self, batches: range) -> list[Measured]:
        """Return what the layers saw of some batches.

        Raises:
            UnreadableError: the checkpoint or the data are not there, or are others than the client's.
            SystemRefusalError: another Keras is installed here.
        """
        with self._loaded.use(self._load) as (data, runner):
            return [runner.measure(number, data) for number in batches]

    def _load(self) -> tuple[ArrayData, Runner]:
        """Return the open data, and what runs the model: for the lifetime of the process."""
        self.origin.adopt()
        with closing(open_checkpoint(self.draft)) as checkpoint:
            model = load_model(checkpoint, self.refresh)
            for expected, found in zip(self.states, _states(checkpoint, self.refresh.data), strict=False):
                if expected != found:
                    problem = f"another file here: expected {expected[0]} bytes, found {found[0]}"
                    raise UnreadableError(
                        self.subject, problem, hint="mount one file system everywhere, and change nothing"
                    )
        data = open_data(self.refresh.data, spec_of(model, self.refresh))
        if not isinstance(data, ArrayData):
            raise UnreadableError(data.source, "expected rows that can be drawn, found a stream of batches")
        stack = ExitStack()  # left open: the model runs until the process ends
        return data, stack.enter_context(running(model, active_layers(model), data))


def _states(checkpoint: Checkpoint, data: str) -> list[_State]:
    places = [local_copy(shard.path) for shard in checkpoint.shards]
    if Path(data).is_file():
        places.append(Path(data))
    return [(found.st_size, found.st_mtime_ns) for found in (place.stat() for place in places)]
