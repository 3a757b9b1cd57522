"""Run the command line in processes of their own, which may crash, hang or be killed.

A server that has imported everything forks one process a run: hundreds of runs a second, each with its
own limits, and no crash reaches the tests.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

TIME_LIMIT = 10
"""Seconds of a processor: what others do on the machine is not the run's fault."""
_WAIT_LIMIT = 60  # seconds in which a run has to end even if it does nothing at all
MEMORY_LIMIT = 500 * 2**20
MARKER = "/swa-avg-begins-here"
"""A name that a traced run looks for, in vain, right before it begins."""
_IMPORTED = (  # what a run would import otherwise, and Python cannot where reading fails
    "click.testing",
    "difflib",
    "encodings.cp437",
    "h5py",
    "resource",
    "swa_avg.cli.program",
    "swa_avg.formats.hdf5.libhdf5",
    "swa_avg.formats.hdf5.rebuild",
    "swa_avg.averaging",
)
_ADDRESS_SPACE = 4 * 2**30  # a run that passes MEMORY_LIMIT is to be measured, not to take the machine down


@dataclass(frozen=True)
class Ended:
    """How one run ended."""

    code: int
    """Exit code; of a signal, its negative number."""
    err: str
    out: str
    seconds: float
    """Of a processor."""
    peak: int
    """Bytes of resident memory."""
    timed_out: bool = False


class Isolated:
    """A server of isolated runs; a context manager."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )

    def run(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        limits: Mapping[str, int] | None = None,
        closed: Sequence[int] = (),
        strace: Sequence[str] = (),
        signals: Iterable[tuple[float, int]] = (),
    ) -> Ended:
        """Run `swa-avg` in `folder`, with some of the RLIMITs set and some file descriptors closed.

        With options for it, strace is attached; `signals` are sent after so many seconds.
        """
        self.submit(arguments, folder, limits=limits, closed=closed, strace=strace, signals=signals)
        return self.result()

    def submit(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        limits: Mapping[str, int] | None = None,
        closed: Sequence[int] = (),
        strace: Sequence[str] = (),
        signals: Iterable[tuple[float, int]] = (),
    ) -> None:
        """Begin a run; its result has to be taken before the next one."""
        assert self._server.stdin is not None
        request = {
            "arguments": list(map(str, arguments)),
            "folder": str(folder),
            "limits": {"AS": _ADDRESS_SPACE, "CPU": TIME_LIMIT, **(limits or {})},
            "closed": list(closed),
            "strace": list(strace),
            "signals": sorted(signals),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()

    def fileno(self) -> int:
        """Return what becomes readable once the run has ended, for select."""
        assert self._server.stdout is not None
        return self._server.stdout.fileno()

    def result(self) -> Ended:
        """Return how the run ended.

        Raises:
            RuntimeError: strace could not be attached.
        """
        assert self._server.stdout is not None
        answer = json.loads(self._server.stdout.readline())
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return Ended(**answer)

    def __enter__(self) -> Isolated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.kill()
        self._server.communicate()


def _serve() -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    for number in (signal.SIGINT, signal.SIGTERM):  # of a run, until it has handlers of its own
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        out, err, ready, go = os.pipe(), os.pipe(), os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.write(ready[1], b".")
            select.select(
                [go[0]], [], []
            )  # not a read: whether strace sees that one is chance, and it counts
            _run(request, out[1], err[1])
        os.read(ready[0], 1)
        tracer, said = _attach(child, request["strace"]) if request["strace"] else (None, "")
        os.write(go[1], b".")
        for end in (out[1], err[1], *ready, *go):
            os.close(end)
        texts = _texts(child, out[0], err[0], request["signals"])
        if texts is None:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        for end in (out[0], err[0]):
            os.close(end)
        said += tracer.communicate()[1] if tracer is not None else ""
        ended = {
            "code": os.waitstatus_to_exitcode(status),
            "seconds": usage.ru_utime + usage.ru_stime,
            "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "timed_out": texts is None or os.waitstatus_to_exitcode(status) == -signal.SIGXCPU,
            "out": "" if texts is None else texts[0],
            "err": "" if texts is None else texts[1],
        }
        print(json.dumps(said if tracer is not None and tracer.returncode else ended), flush=True)


def _attach(child: int, options: Sequence[str]) -> tuple[subprocess.Popen[str], str]:
    """Start strace on a run that waits; return it and its first line once it is attached, or cannot be."""
    command = ["strace", "-f", "-p", str(child), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    return tracer, tracer.stderr.readline()


def _texts(child: int, out: int, err: int, signals: Sequence[tuple[float, int]]) -> tuple[str, str] | None:
    """Return what a run prints until it has ended, None if it takes too long; send it `signals`."""
    texts = {out: b"", err: b""}
    start = time.monotonic()
    end = start + _WAIT_LIMIT
    waiting = [out, err]
    due = [(start + after, number) for after, number in signals]
    while waiting:
        while due and due[0][0] <= time.monotonic():
            os.kill(child, due.pop(0)[1])  # until it is waited for, the number is the run's
        ready = select.select(waiting, [], [], max(0, (due[0][0] if due else end) - time.monotonic()))[0]
        if not ready and not due:
            return None
        for descriptor in ready:
            data = os.read(descriptor, 2**16)
            texts[descriptor] += data
            if not data:
                waiting.remove(descriptor)
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], max(0, end - time.monotonic()))[0]:
            return None
    finally:
        os.close(ended)
    return texts[out].decode("utf-8", "backslashreplace"), texts[err].decode("utf-8", "backslashreplace")


def _run(request: dict[str, object], out: int, err: int) -> None:
    """Be the run: never returns."""
    code = 1
    try:
        os.chdir(str(request["folder"]))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.closerange(3, 256)
        for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
            setattr(sys, name, open(number, mode))  # noqa: SIM115
        for descriptor in request["closed"]:  # type: ignore[attr-defined]
            name = ("stdin", "stdout", "stderr")[descriptor]
            getattr(sys, name).close()
            setattr(sys, name, None)
        limits = dict(request["limits"])  # type: ignore[call-overload]
        if "AS_MORE" in limits:  # than start-up takes
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limits["AS"] = limits.pop("AS_MORE") + taken
        for name, value in limits.items():
            hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
            resource.setrlimit(
                getattr(resource, f"RLIMIT_{name}"), (value, value if name == "NOFILE" else hard)
            )
        from swa_avg import cli

        sys.argv = ["swa-avg", *request["arguments"]]  # type: ignore[misc]
        if request["strace"]:
            Path(MARKER).exists()
        cli.main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
