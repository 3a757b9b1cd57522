"""A refresh on other machines: each process loads the model once and takes batches by their numbers."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_avg.batchnorm.checkpoint import Refresh, load_model, without_greeting
from swa_avg.data.user_functions import import_function, names_function
from swa_avg.errors import SystemRefusalError, UnreadableError
from swa_avg.formats import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from swa_avg.batchnorm.refresh import Measured
    from swa_avg.combine.cluster import Cluster

__all__ = [
    "BatchWorker",
    "Elsewhere",
    "absolute",
    "check_keras",
    "keras_versions",
    "make_importable",
]

_State = tuple[int, int]
"""Size and time of modification of a file."""


@dataclass(frozen=True)
class Elsewhere:
    """Where batches are run."""

    processes: Cluster
    worker: BatchWorker

    def measure(self, runs: Iterable[range]) -> Iterator[Measured]:
        """Yield what is measured of each batch, in order; the batches of a run travel together."""
        for _, measured in self.processes.run(self.worker.measure, runs):
            yield from measured


@dataclass(frozen=True)
class BatchWorker:
    """Runs the model of one checkpoint over batches of one source of data, in any process."""

    draft: Path
    refresh: Refresh
    folder: Path
    """Whose modules can be imported."""
    states: Sequence[_State]
    """Of the checkpoint's files, and of the data's."""
    keras: tuple[str, str, str]
    """Version of Keras, its backend and the version of that."""
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, refresh: Refresh) -> BatchWorker | None:
        """Return a worker, or None where data or model are not named, but are in this process's memory."""
        if not isinstance(refresh.data, str | Path) or not isinstance(refresh.model, str | None):
            return None
        named = replace(refresh, data=absolute(refresh.data), model=absolute(refresh.model))
        draft = checkpoint.path.absolute()
        return cls(draft, named, Path.cwd(), _states(checkpoint, named.data), keras_versions())

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchWorker, (self.draft, self.refresh, self.folder, self.states, self.keras)

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
        with self._lock:  # the model's layers are watched while it runs
            data, runner = self._loaded
            return [runner.measure(number, data) for number in batches]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The open data, and what runs the model: once a process, for its lifetime."""
        make_importable(self.folder)
        check_keras(self.keras)
        with closing(open_checkpoint(self.draft)) as checkpoint:
            model = load_model(checkpoint, self.refresh)
            for expected, found in zip(self.states, _states(checkpoint, self.refresh.data), strict=False):
                if expected != found:
                    problem = f"another file here: expected {expected[0]} bytes, found {found[0]}"
                    raise UnreadableError(
                        self.subject, problem, hint="mount one file system everywhere, and change nothing"
                    )
        from swa_avg.batchnorm.refresh import active_layers, running, spec_of
        from swa_avg.data.batches import ArrayData
        from swa_avg.data.sources import open_data

        refresh = self.refresh
        spec = spec_of(
            model,
            inputs=refresh.inputs,
            batch_size=refresh.batch_size,
            samples=refresh.samples,
            seed=refresh.seed,
            preprocess=import_function(refresh.preprocess) if refresh.preprocess else None,
        )
        data = open_data(refresh.data, spec)
        if not isinstance(data, ArrayData):
            raise UnreadableError(data.source, "expected rows that can be drawn, found a stream of batches")
        stack = ExitStack()  # left open: the model runs until the process ends
        return data, stack.enter_context(running(model, active_layers(model), data))


def make_importable(folder: Path) -> None:
    """Let modules in the client's current folder be imported here, as they are there."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def check_keras(expected: tuple[str, str, str]) -> None:
    """Raise SystemRefusalError unless the same Keras is installed here."""
    found = keras_versions()
    if found != expected:
        problem = f"expected Keras {' '.join(expected)}, found {' '.join(found)}"
        raise SystemRefusalError(errno.ENOEXEC, problem)


def absolute(source: Any) -> Any:
    """Return a path that means the same in another folder; other than paths stay."""
    if not isinstance(source, str | Path) or (not Path(source).exists() and names_function(str(source))):
        return source
    return str(Path(source).absolute())


def _states(checkpoint: Checkpoint, data: str) -> list[_State]:
    places = [shard.path for shard in checkpoint.shards]
    if Path(data).is_file():
        places.append(Path(data))
    return [(found.st_size, found.st_mtime_ns) for found in (place.stat() for place in places)]


def keras_versions() -> tuple[str, str, str]:
    """Return the version of Keras, its backend, and the version of that."""
    with without_greeting():
        import keras

    backend = keras.backend.backend()
    return keras.__version__, backend, version(backend)
