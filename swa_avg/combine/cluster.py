"""Work on a Dask cluster, by way of an executor: the same calls as to threads, on other machines."""

from __future__ import annotations

import asyncio
import errno
import logging
import pickle
import platform
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from swa_avg.combine.sums import UnfitError
from swa_avg.errors import MismatchError, SwaAvgError, SystemRefusalError, UsageError, first_line
from swa_avg.text import __version__

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ClusterExecutor", "connected"]

_CONNECT = 10.0
"""Seconds in which a scheduler answers."""
_PATIENCE = 60.0
"""Seconds to wait for a worker where there is none."""
_SLOW = 600.0
"""Seconds that a task may take before it is given to another worker; then, again, before the run ends. One of
an object that `may_take_long` may take any time, as long as there is its worker."""
_LOOK = 2.0
"""Seconds of waiting between two looks at the cluster."""
_RETRIES = 2
_SAME = ("numpy", "dask", "distributed")


@contextmanager
def connected(address: str) -> Iterator[ClusterExecutor]:
    """Connect to the cluster whose scheduler listens at `address`; what still runs is cancelled at the end.

    Raises:
        UsageError: Dask is not installed.
        SystemRefusalError: no scheduler answers there, it has no workers, or they run other versions.
    """
    try:
        from dask import config
        from distributed import Client
    except ImportError:
        raise UsageError("--cluster needs Dask: pip install 'swa-avg[dask]'") from None
    # A worker that was lost with results of its own is asked for them for as long as it takes to connect.
    with _silence(), config.set({"distributed.comm.timeouts.connect": f"{_CONNECT} s"}):
        _identity(address)  # a client that cannot connect says so at length
        client = Client(address, timeout=_CONNECT, direct_to_workers=True, set_as_default=False)
        try:
            executor = ClusterExecutor(client, address)
            try:
                executor.check_workers()
                yield executor
            finally:
                executor.shutdown(wait=False)
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                client.close(timeout=_CONNECT)


class ClusterExecutor(Executor):
    """An executor for methods of objects: an object travels once, and each call takes only its arguments.

    Dask recomputes what a lost worker held, and tries a call that failed again, on whichever worker is free.
    Dask's own executor (`Client.get_executor`) is not used: where a worker is lost just after its result was
    fetched, that takes the result for an exception.
    """

    def __init__(self, client: Client, address: str) -> None:
        self._client = client
        self._address = address
        self._sent: dict[int, tuple[object, Any]] = {}
        """Object and its copy on the cluster, by the object's id."""
        self._versions = _versions()
        self.slow: set[str] = set()
        """Workers that kept a task for too long, and get no other."""
        self._last_worker = ""
        self._deserted: float | None = None
        """When the cluster was first seen without workers."""

    @property
    def threads(self) -> int:
        """Calls that run at a time, with the workers that there are now."""
        return max(1, sum(map(int, self._client.nthreads().values())))

    def check_workers(self) -> None:
        """Wait for a worker, and hold all workers' versions against ours.

        Raises:
            SystemRefusalError: there is none, or one runs another version of what matters.
        """
        try:
            self._client.wait_for_workers(1, timeout=_PATIENCE)
        except (TimeoutError, asyncio.TimeoutError):  # two classes, in Python 3.10
            raise self.refusal("the cluster has no worker", "start some: dask worker ADDRESS") from None
        for worker, theirs in self._client.run(_versions, on_error="return").items():
            self._last_worker = worker
            if not isinstance(theirs, dict):
                raise self.refusal(f"worker {worker} cannot run swa-avg ({first_line(theirs)})", _INSTALL)
            _check_versions(self._versions, theirs, worker, self._address)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a method, or an object that can be called, on the cluster, with positional arguments only.

        Its result and arguments are pickled. `result()` raises the errors of the call, with the worker's
        name, and SystemRefusalError where the cluster lost it.
        """
        assert not kwargs
        thing = getattr(function, "__self__", function)
        name = getattr(function, "__name__", "__call__")
        hurried = not getattr(thing, "may_take_long", False)
        return _Call(self, lambda: self._start(thing, name, args), _file_of(thing), hurried)

    def _start(self, thing: object, name: str, args: tuple[Any, ...]) -> tuple[str, Future[Any]]:
        """Return the key of a new task, and its future."""
        key = f"swa-avg-{uuid.uuid4().hex}"
        workers = self.quick_workers() if self.slow else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dask finds the map of 100,000 tensors large
            if id(thing) not in self._sent:
                # The result of a task, since Dask makes it anew where the worker that held it is lost.
                copy = self._client.submit(pickle.loads, _pickled(thing), pure=False, retries=_RETRIES)
                self._sent[id(thing)] = thing, copy
                with suppress(Exception):  # else the calls start where the copy is, and spread out slowly
                    self._client.replicate([copy], callback_timeout=_PATIENCE)
            copy = self._sent[id(thing)][1]
            task = self._client.submit(
                _run,
                copy,
                name,
                args,
                self._versions,
                self._address,
                key=key,
                workers=workers,
                pure=False,
                retries=_RETRIES,
            )
        return key, asyncio.run_coroutine_threadsafe(_outcome(task), self._client.loop.asyncio_loop)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Release what was sent."""
        self._sent.clear()

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
            raise self.refusal(problem, "look at its log; start workers: dask worker ADDRESS")

    def worker_of(self, key: str) -> str | None:
        """Return the worker that runs a task, or has its result and does not send it."""
        running = (worker for worker, keys in self._client.processing().items() if key in keys)
        return next(running, None) or next(iter(self._client.who_has().get(key, ())), None)

    def quick_workers(self) -> list[str]:
        return [worker for worker in self._client.nthreads() if worker not in self.slow]

    def refusal(self, problem: str, hint: str) -> SystemRefusalError:
        return _refusal(self._address, problem, hint)


class _Call(Future[Any]):
    """A call on the cluster. Whoever waits for its result also looks after it."""

    def __init__(
        self,
        executor: ClusterExecutor,
        start: Callable[[], tuple[str, Future[Any]]],
        file: str,
        hurried: bool,
    ) -> None:
        super().__init__()
        self._executor = executor
        self._start = start
        self._file = file
        self._hurried = hurried
        self._key, self._task = start()
        self._moved = False

    def cancel(self) -> bool:
        return self._task.cancel()

    def result(self, timeout: float | None = None) -> Any:
        started = time.monotonic()
        while not wait([self._task], _LOOK).done:
            self._executor.look(self._file)
            late = self._hurried and time.monotonic() - started > _SLOW
            if (late or self._executor.slow) and self._is_moved(late):
                started = time.monotonic()
        error = self._task.exception()
        if isinstance(error, CancelledError):
            self._executor.look(self._file)
            raise self._executor.refusal(f"Dask cancelled the work on {self._file}", "look at its log")
        if error is not None:
            raise _lost(error, self._file, self._executor) from error
        result = self._task.result()
        if isinstance(result, _Found):
            raise result.error
        return result

    def _is_moved(self, late: bool) -> bool:
        """Give the task to another worker, where one has had it for too long; tell whether one had."""
        worker = self._executor.worker_of(self._key)
        if worker is None or not (late or worker in self._executor.slow):  # it waits for its turn
            return False
        self._executor.slow.add(worker)
        if (late and self._moved) or not self._executor.quick_workers():
            problem = f"worker {worker} has not answered for {_SLOW:.0f} s about {self._file}"
            raise self._executor.refusal(problem, "see whether it can read that file")
        self._moved = True
        self._task.cancel()
        self._key, self._task = self._start()
        return True


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


def _run(thing: object, name: str, args: tuple[Any, ...], versions: Mapping[str, str], address: str) -> Any:
    """Call a method of an object, on a worker."""
    from distributed import get_worker

    worker = str(get_worker().address)
    _check_versions(versions, _versions(), worker, address)
    try:
        return getattr(thing, name)(*args)
    except (MismatchError, UnfitError) as error:
        return _Found(error)
    except SystemRefusalError as error:
        problem = f"{error.strerror} on worker {worker}"
        raise SystemRefusalError(error.errno, problem, error.filename) from None
    except SwaAvgError as error:
        error.args = (f"worker {worker}: {error}",)
        raise


def _lost(error: BaseException, file: str, executor: ClusterExecutor) -> BaseException:
    """Return what an error of a task means."""
    from distributed.scheduler import KilledWorker, NoValidWorkerError

    if isinstance(error, KilledWorker):
        problem = f"worker {error.last_worker.address} was lost while {file} was being read, as others before"
        return executor.refusal(problem, "look at its log: it may have been out of memory")
    if isinstance(error, NoValidWorkerError):
        return executor.refusal(f"no worker was left to read {file}", "start some: dask worker ADDRESS")
    return error


def _file_of(thing: object) -> str:
    """Return the file that a call is about, for messages."""
    return str(getattr(thing, "subject", "the data"))


_INSTALL = "install the same versions on the client and on all workers"


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
            # Raised from a thread of Dask's; versions are compared below, in one line.
            warnings.filterwarnings("ignore", module=r"distributed\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
