"""What a process on another machine needs to do the work of this one, and what it does once only."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

from swa_avg.batchnorm.loading import quiet_import
from swa_avg.data.user_functions import names_function
from swa_avg.errors import SystemRefusalError

__all__ = ["Origin", "PerProcess", "absolute"]

T = TypeVar("T")


class PerProcess(Generic[T]):
    """What each process makes on first use and one thread at a time uses; pickling leaves it behind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: list[T] = []

    @contextmanager
    def use(self, make: Callable[[], T]) -> Iterator[T]:
        """Give what `make` returned the first time, for this thread alone."""
        with self._lock:
            if not self._made:
                self._made.append(make())
            yield self._made[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return PerProcess, ()


@dataclass(frozen=True)
class Origin:
    """The process that work comes from."""

    folder: Path
    """Whose modules can be imported."""
    keras: tuple[str, str, str]
    """Version of Keras, its backend and the version of that."""

    @classmethod
    def here(cls) -> Origin:
        """Return this process's."""
        return cls(Path.cwd(), _keras_versions())

    def adopt(self) -> None:
        """Let modules in the origin's folder be imported here, as they are there.

        Raises:
            SystemRefusalError: another Keras is installed here.
        """
        if str(self.folder) not in sys.path:
            sys.path.append(str(self.folder))  # as there, after what is installed
        found = _keras_versions()
        if found != self.keras:
            problem = f"expected Keras {' '.join(self.keras)}, found {' '.join(found)}"
            raise SystemRefusalError(errno.ENOEXEC, problem)


def absolute(source: Any) -> Any:
    """Return a path that means the same in another folder; other than paths stay."""
    if not isinstance(source, str | Path) or (not Path(source).exists() and names_function(str(source))):
        return source
    return str(Path(source).absolute())


def _keras_versions() -> tuple[str, str, str]:
    with quiet_import():
        import keras

    backend = keras.backend.backend()
    return keras.__version__, backend, version(backend)
