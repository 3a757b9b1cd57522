"""Work on the workers of a Dask cluster."""

from __future__ import annotations

import asyncio
import errno
import logging
import pickle
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from typing import IO, TYPE_CHECKING, Any, TypeVar

from swa_avg.combine.blocks import Block
from swa_avg.combine.budget import ClusterBudget
from swa_avg.combine.kernel import Averaged, Kernel
from swa_avg.combine.order import in_order
from swa_avg.combine.sums import InvalidValuesError
from swa_avg.errors import MismatchError, SwaAvgError, SystemRefusalError, UsageError, first_line
from swa_avg.files.publication import Publication
from swa_avg.files.temporary import temporary_folder
from swa_avg.text import __version__

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Cluster", "Connection", "connected"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_CONNECT = 10.0
"""Seconds in which a scheduler answers."""
_PATIENCE = 60.0
"""Seconds to wait for a worker where there is none."""
_LOOK = 2.0
"""Seconds of waiting between two looks at the cluster."""
_RETRIES = 2
_SAME = ("numpy", "dask", "distributed")


class Cluster:
    """The workers of a Dask cluster; they see the same files under the same names as this machine."""

    def __init__(self, connection: Connection, budget: ClusterBudget) -> None:
        self.budget: ClusterBudget = budget
        self._connection = connection
        # That a call is done is noticed some time later: meanwhile, another one waits at the worker.
        self.at_once = 2 * budget.threads

    @property
    def processes(self) -> Cluster:
        return self

    def average(self, kernel: Kernel, blocks: Iterable[Block]) -> Iterator[tuple[Block, Averaged]]:
        """Yield each block and its averages, in order."""

        def submit(task: tuple[Block, ...]) -> Future[list[Averaged]]:
            return self._connection.submit(kernel.averages, task)

        remaining = iter(blocks)
        tasks = iter(lambda: tuple(islice(remaining, self.budget.blocks_per_task)), ())
        for task, averaged in in_order(submit, tasks, self.budget.most_returning):
            yield from zip(task, averaged, strict=True)

    def run(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
        """Yield each item and what `function`, a method of an object, returns for it, in order.

        The object, items and results are pickled. An item is taken once there is room for it: `at_once` are
        under way at most.
        """
        return in_order(lambda item: self._connection.submit(function, item), items, self.at_once)

    @contextmanager
    def scratch(self, publication: Publication) -> Iterator[Callable[[], IO[bytes]]]:
        """Return what opens temporary files with names, by which workers see them."""
        numbers = count()
        with temporary_folder(publication.output) as folder, ExitStack() as stack:
            yield lambda: stack.enter_context((folder / f"scratch_{next(numbers)}").open("w+b"))


@contextmanager
def connected(address: str) -> Iterator[Connection]:
    """Connect to the cluster whose scheduler listens at `address`; what still runs is cancelled at the end.

    Raises:
        UsageError: Dask is not installed.
        SystemRefusalError: no scheduler answers there, it has no workers, or they run other versions.
    """
    try:
        from dask import config
        from distributed import Client
    except ImportError:
        raise UsageError("cluster needs Dask: pip install 'swa-avg[dask]'") from None
    # A worker that was lost with results of its own is asked for them for as long as it takes to connect.
    with _silence(), config.set({"distributed.comm.timeouts.connect": f"{_CONNECT} s"}):
        _identity(address)  # a client that cannot connect says so at length
        client = Client(address, timeout=_CONNECT, direct_to_workers=True, set_as_default=False)
        try:
            connection = Connection(client, address)
            connection.check_workers()
            yield connection
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                client.close(timeout=_CONNECT)


class Connection:
    """Calls of methods on a cluster: an object travels once, and each call takes only its arguments.

    Dask recomputes what a lost worker held, and tries a call that failed again, on whichever worker is free.
    Dask's own executor (`Client.get_executor`) is not used: where a worker is lost just after its result was
    fetched, it takes the result for an exception.
    """

    def __init__(self, client: Client, address: str) -> None:
        self._client = client
        self._address = address
        self._sent: dict[int, tuple[object, Any]] = {}
        """Object and its copy on the cluster, by the object's id."""
        self._versions = _versions()
        self._last_worker = ""
        self._deserted: float | None = None
        """When the cluster was first seen without workers."""

    @property
    def threads(self) -> int:
        """Calls that run at a time, with the workers that there are now."""
        return max(1, sum(map(int, self._client.nthreads().values())))

    def check_workers(self) -> None:
        """Wait for a worker, and compare all workers' versions with ours.

        Raises:
            SystemRefusalError: there is none, or one runs another version of what matters.
        """
        try:
            self._client.wait_for_workers(1, timeout=_PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):  # two classes, in Python 3.10
            raise self.refusal("the cluster has no worker", _START_WORKERS) from None
        for worker, theirs in self._client.run(_versions, on_error="return").items():
            self._last_worker = worker
            if not isinstance(theirs, dict):
                raise self.refusal(f"worker {worker} cannot run swa-avg ({first_line(theirs)})", _INSTALL)
            _check_versions(self._versions, theirs, worker, self._address)

    def submit(self, function: Callable[..., Result], argument: Any) -> Future[Result]:
        """Call a method of an object on the cluster.

        The object, argument and result are pickled. `result()` raises the errors of the call, with the
        worker's name, and SystemRefusalError where the cluster lost it.
        """
        thing: object = getattr(function, "__self__", None)
        name = function.__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dask finds the map of 100,000 tensors large
            copy = self._copy_of(thing)
            task = self._client.submit(
                _run, copy, name, argument, self._versions, self._address, pure=False, retries=_RETRIES
            )
        outcome = asyncio.run_coroutine_threadsafe(_outcome(task), self._client.loop.asyncio_loop)
        return _Call(self, outcome, str(getattr(thing, "subject", "the data")))

    def _copy_of(self, thing: object) -> Any:
        """Return an object's copy on the cluster, and send it there if it is new."""
        if id(thing) not in self._sent:
            # The result of a task, since Dask makes it anew where the worker that held it is lost.
            copy = self._client.submit(pickle.loads, _pickled(thing), pure=False, retries=_RETRIES)
            self._sent[id(thing)] = thing, copy
            with suppress(Exception):  # else the calls start where the copy is, and spread out slowly
                self._client.replicate([copy], callback_timeout=_PATIENCE)
        return self._sent[id(thing)][1]

    def look(self, file: str) -> None:
        """Raise SystemRefusalError if the scheduler is gone, or there has been no worker for a while."""
        workers = _identity(self._address, f"the scheduler was lost while {file} was being read")["workers"]
        if workers:
            self._last_worker = next(iter(workers))
            self._deserted = None
            return
        now = time.monotonic()
        self._deserted = self._deserted or now
        if now - self._deserted > _PATIENCE:
            problem = f"worker {self._last_worker} was lost while {file} was being read, and no other came"
            raise self.refusal(problem, f"look at its log; {_START_WORKERS}")

    def refusal(self, problem: str, hint: str) -> SystemRefusalError:
        return _refusal(self._address, problem, hint)


class _Call(Future[Any]):
    """A call on the cluster. Waiting for its result looks after the cluster, too."""

    def __init__(self, connection: Connection, outcome: Future[Any], file: str) -> None:
        super().__init__()
        self._connection = connection
        self._outcome = outcome
        self._file = file

    def cancel(self) -> bool:
        return self._outcome.cancel()

    def result(self, timeout: float | None = None) -> Any:
        while not wait([self._outcome], _LOOK).done:
            self._connection.look(self._file)
        try:
            result = self._outcome.result()
        except CancelledError:
            self._connection.look(self._file)
            problem = f"Dask cancelled the work on {self._file}"
            raise self._connection.refusal(problem, "look at its log") from None
        except Exception as error:
            raise _lost(error, self._file, self._connection) from error
        if isinstance(result, _Found):
            raise result.error
        return result


class _Found:
    """An error that every worker would find: it comes back as a result, lest Dask try again."""

    def __init__(self, error: Exception) -> None:
        self.error = error


async def _outcome(task: Any) -> Any:
    """Wait for a task's result; to cancel the waiting cancels the task."""
    try:
        return await task
    finally:
        task.release()


def _pickled(thing: object) -> bytes:
    import cloudpickle  # Dask's own; it takes functions that are not in a module, too

    try:
        return bytes(cloudpickle.dumps(thing))
    except Exception as error:  # of whichever class the thing has for it
        problem = f"what was passed cannot be sent to a cluster ({first_line(error)})"
        raise UsageError(f"{problem}; name a file or MODULE:FUNCTION") from error


def _run(thing: object, name: str, argument: Any, versions: Mapping[str, str], address: str) -> Any:
    """Call a method of an object, on a worker."""
    from distributed import get_worker

    worker = str(get_worker().address)
    _check_versions(versions, _versions(), worker, address)
    try:
        return getattr(thing, name)(argument)
    except (MismatchError, InvalidValuesError) as error:
        return _Found(error)
    except SystemRefusalError as error:
        problem = f"{error.strerror} on worker {worker}"
        raise SystemRefusalError(error.errno, problem, error.filename) from None
    except SwaAvgError as error:
        error.args = (f"worker {worker}: {error}",)
        raise


def _lost(error: BaseException, file: str, connection: Connection) -> BaseException:
    """Return what an error of a task means."""
    from distributed.scheduler import KilledWorker, NoValidWorkerError

    if isinstance(error, KilledWorker):
        problem = f"worker {error.last_worker.address} was lost while {file} was being read, as others before"
        return connection.refusal(problem, "look at its log: it may have been out of memory")
    if isinstance(error, NoValidWorkerError):
        return connection.refusal(f"no worker was left to read {file}", _START_WORKERS)
    return error


_INSTALL = "install the same versions on the client and on all workers"
_START_WORKERS = "start workers: dask worker ADDRESS"


def _versions() -> dict[str, str]:
    """Return what must be the same everywhere, such that all are one program."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2]), "swa-avg": __version__}
    for package in _SAME:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _check_versions(ours: Mapping[str, str], theirs: Mapping[str, str], worker: str, address: str) -> None:
    for package, expected in ours.items():
        found = theirs.get(package, "none")
        if found != expected:
            problem = f"worker {worker} has {package} {found}, the client has {expected}"
            raise _refusal(address, problem, _INSTALL)


def _identity(address: str, problem: str | None = None) -> dict[str, Any]:
    """Ask the scheduler who it is, in bounded time.

    Raises:
        SystemRefusalError: nothing answers there, or something else does.
    """
    started = "start one with: dask scheduler"
    with ThreadPoolExecutor(1) as executor:  # the caller may be inside an event loop of its own
        try:
            asking = asyncio.wait_for(_ask(address), _CONNECT + 1)
            found = executor.submit(asyncio.run, asking).result()
        except (OSError, TimeoutError, asyncio.TimeoutError) as error:
            silent = problem or f"no Dask scheduler answers there, within {_CONNECT:.0f} s"
            raise _refusal(address, silent, started) from error
        except (ValueError, TypeError) as error:
            silent = f"not the address of a Dask scheduler ({first_line(error)})"
            raise _refusal(address, silent, "expected such as tcp://node1:8786") from error
    if found.get("type") != "Scheduler":
        kind = str(found.get("type", "something")).lower()
        raise _refusal(address, f"a Dask {kind} answers, not a scheduler", "name the scheduler's address")
    return found


async def _ask(address: str) -> dict[str, Any]:
    from distributed.comm import connect
    from distributed.security import Security

    comm = await connect(address, timeout=_CONNECT, **Security().get_connection_args("client"))
    try:
        await comm.write({"op": "identity", "reply": True, "close": True})
        return dict(await comm.read())
    finally:
        comm.abort()


def _refusal(address: str, problem: str, hint: str) -> SystemRefusalError:
    return SystemRefusalError(errno.ECONNREFUSED, f"{problem}; {hint.replace('ADDRESS', address)}", address)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep Dask's log of what it recovers from, or of what we say in one line, off standard error."""
    loggers = [
        logger
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.split(".")[0] in ("distributed", "asyncio", "tornado")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            # Raised in a thread of Dask's; versions are compared by `check_workers`, in one line.
            warnings.filterwarnings("ignore", module=r"distributed\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
