"""Break the system under runs of swa-avg: python scripts/faults.py [--kills 1000] [--faults 1000] [--seed 0]

strace makes a system call fail, or sends a signal at it: at the Nth write, fsync, link and so on, for
every N that a run has, or as many as asked for, chosen by the seed. Signals also come at random moments,
once or twice; files may not grow beyond a limit (RLIMIT_FSIZE), and a disk (a small tmpfs) has room for
nothing, or more, or all that a run needs. After each run, the inputs are what they were; the output is
complete, or absent, or the old one; what the exit code says is so; and no temporary is left, except where
unlink itself fails, and by SIGKILL, and then the next run does its work and leaves it alone.

Exits with 1 if any of this is not so, and with 77 where strace is missing or may not trace.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

_TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(_TESTS), str(_TESTS / "hostile")]

from isolated import MARKER, Ended, Isolated  # noqa: E402

import makers  # noqa: E402

SKIPPED = 77
_READING = ("preadv", "pread64", "read", "openat", "fstat", "newfstatat", "lseek")
_WRITING = (
    "write",
    "pwrite64",
    "fsync",
    "ftruncate",
    "fallocate",
    "link",
    "linkat",
    "rename",
    "unlink",
    "close",
)
_ERRORS = {
    **dict.fromkeys(("write", "pwrite64", "fallocate", "ftruncate"), ("ENOSPC", "EIO", "EINTR", "EDQUOT")),
    **dict.fromkeys(("fsync", "close"), ("EIO", "EINTR", "ENOSPC")),
    **dict.fromkeys(("link", "linkat", "rename", "unlink"), ("EIO", "ENOSPC", "EPERM", "EACCES")),
    **dict.fromkeys(("preadv", "pread64", "read", "fstat", "newfstatat", "lseek"), ("EIO", "EINTR")),
    "openat": ("EIO", "EMFILE", "EACCES", "ENOSPC", "EINTR"),
}
_SIGNALS = {"TERM": 143, "INT": 130}
_WRITERS: dict[str, Callable[..., object]] = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".weights.json": makers.write_sharded,
}


@dataclass(frozen=True)
class Setting:
    """A format, and what the output was before."""

    suffix: str
    overwrite: bool
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.suffix, *self.options, *(["--overwrite"] if self.overwrite else [])])

    @property
    def output(self) -> str:
        return f"swa{self.suffix}"

    @property
    def arguments(self) -> list[str]:
        inputs = [f"a_{number}{self.suffix}" for number in (1, 2, 3)]
        options = [*self.options, *(["--overwrite"] if self.overwrite else [])]
        return [*inputs, "-q", "--threads", "1", "-o", self.output, *options]


SETTINGS = [
    Setting(".keras", False),
    Setting(".keras", True),
    Setting(".weights.h5", False),
    Setting(".weights.h5", True, ("--optimizer", "drop")),
    Setting(".weights.json", False),
]


@dataclass(frozen=True)
class Fault:
    setting: Setting
    call: str
    number: int
    """The how-manieth such call of the run."""
    effect: str
    """As strace takes it: `error=EIO`, `signal=KILL`; with `+`, at every later call too."""

    def __str__(self) -> str:
        return f"{self.setting}: {self.effect} at {self.call} {self.number}"


class Bench:
    """Makes runs in folders of their own, and knows how each should end; a context manager."""

    def __init__(self, root: Path, workers: int = 1, settings: Sequence[Setting] = SETTINGS) -> None:
        self.root = root
        self.workers = workers
        self.before: dict[Setting, Counter[str]] = {}
        """How often each call is made before the run proper begins, by the main thread."""
        self.during: dict[Setting, Counter[str]] = {}
        self.expected: dict[Setting, dict[str, bytes]] = {}
        """The complete output: name -> bytes."""
        self.seconds = 0.0
        """How long the longest of the runs without a fault takes."""
        self._original: dict[Setting, dict[str, bytes]] = {}
        self._servers: Queue[Isolated] = Queue()
        self._stack = ExitStack()
        for _ in range(workers):
            self._servers.put(self._stack.enter_context(Isolated()))
        for setting in settings:
            self._prepare(setting)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _prepare(self, setting: Setting) -> None:
        """Trace one run, to know its calls and its output."""
        folder = self.root / "original"
        folder.mkdir()
        for number in (1, 2, 3):
            _WRITERS[setting.suffix](folder / f"a_{number}{setting.suffix}", makers.weights(number))
        if setting.overwrite:
            (folder / setting.output).write_bytes(b"an old average")
        self._original[setting] = _contents(folder)
        shutil.rmtree(folder)
        log = self.root / "trace"
        ended, after = self.fresh_run(setting, strace=["-o", str(log)])
        if ended.code:
            raise RuntimeError(f"{setting}: {ended.err}")
        start = time.monotonic()
        self.fresh_run(setting)
        self.seconds = max(self.seconds, time.monotonic() - start)
        self.expected[setting] = {
            name: data
            for name, data in after.items()
            if name == setting.output or name not in self._original[setting]
        }
        lines = log.read_text("utf-8", "replace").splitlines()
        main = lines[0].split()[0]
        calls = [found for line in lines if (found := re.match(rf"{main} +(\w+)\((.*)", line))]
        begin = next(i for i, found in enumerate(calls) if MARKER in found[2])
        self.before[setting] = Counter(found[1] for found in calls[: begin + 1])
        self.during[setting] = Counter(found[1] for found in calls[begin + 1 :])

    @contextmanager
    def folder(self, setting: Setting, parent: Path | None = None) -> Iterator[Path]:
        """Make a folder with the inputs, and the old output where there is one."""
        with tempfile.TemporaryDirectory(dir=parent or self.root) as name:
            for file, data in self._original[setting].items():
                (Path(name) / file).write_bytes(data)
            yield Path(name)

    def run(self, setting: Setting, folder: Path, **options: Any) -> tuple[Ended, dict[str, bytes]]:
        """Return how a run ended, and what is in its folder then."""
        server = self._servers.get()
        try:
            return server.run(setting.arguments, folder, **options), _contents(folder)
        finally:
            self._servers.put(server)

    def fresh_run(self, setting: Setting, **options: Any) -> tuple[Ended, dict[str, bytes]]:
        """Run in a folder that is made for it."""
        with self.folder(setting) as folder:
            return self.run(setting, folder, **options)

    def faults(self, effects: Callable[[str], Sequence[str]], calls: Sequence[str]) -> list[Fault]:
        """Return every fault of these kinds, in every setting."""
        return [
            Fault(setting, call, number, effect)
            for setting, during in self.during.items()
            for call in calls
            for number in range(1, during[call] + 1)
            for effect in effects(call)
        ]

    def inject(self, fault: Fault) -> str:
        """Inject a fault; return how the run ended, or raise AssertionError."""
        setting = fault.setting
        effect, plus = fault.effect.removesuffix("+"), "+" if fault.effect.endswith("+") else ""
        when = f"when={self.before[setting][fault.call] + fault.number}{plus}"
        strace = ["-o", "/dev/null", "-e", f"trace={fault.call}"]
        strace += ["-e", f"inject={fault.call}:{effect}:{when}"]
        with self.folder(setting) as folder:
            ended, after = self.run(setting, folder, strace=strace)
            outcome = self._judge(fault, after, ended)
            if ended.code == -signal.SIGKILL:
                self._check_next_run(setting, folder, after)
        return outcome

    def interrupt(self, setting: Setting, signals: Sequence[tuple[float, int]]) -> str:
        """Send signals after this many seconds; return how the run ended, or raise AssertionError."""
        ended, after = self.fresh_run(setting, signals=signals)
        names = "+".join(f"signal={signal.Signals(number).name[3:]}" for _, number in signals)
        return self._judge(Fault(setting, "any", 0, names), after, ended)

    def limit(self, setting: Setting, size: int) -> str:
        """Let no file grow beyond `size`; return how the run ended, or raise AssertionError."""
        ended, after = self.fresh_run(setting, limits={"FSIZE": size})
        return self._judge(Fault(setting, "RLIMIT_FSIZE", size, "limit"), after, ended)

    def fill(self, setting: Setting, disk: Path, free: int) -> str:
        """Leave this many bytes of a disk free; return how the run ended, or raise AssertionError."""
        filler = disk / "filler"
        with self.folder(setting, disk) as folder:
            status = os.statvfs(disk)
            with filler.open("wb") as file:
                file.write(bytes(max(0, status.f_bavail * status.f_frsize - free)))
            ended, after = self.run(setting, folder)
            outcome = self._judge(Fault(setting, "full disk", free, "limit"), after, ended)
        filler.unlink()
        return outcome

    def _judge(self, fault: Fault, after: Mapping[str, bytes], ended: Ended) -> str:
        setting, before = fault.setting, self._original[fault.setting]
        expected = self.expected[setting]
        assert not ended.timed_out, "takes too long"
        assert "Traceback" not in ended.err, ended.err
        for name, data in before.items():
            assert name == setting.output or after.get(name) == data, f"{name} has changed"
        temporaries = {name for name in after if name.endswith(".tmp")}
        written = {name: data for name, data in after.items() if name not in before or name == setting.output}
        written = {name: data for name, data in written.items() if name not in temporaries}
        complete = written == expected
        as_before = written == {name: data for name, data in before.items() if name == setting.output}
        if ended.code == -signal.SIGKILL and fault.effect == "signal=KILL":
            # Shards come before the map that makes them a checkpoint.
            partly = setting.suffix == ".weights.json" and setting.output not in after
            assert complete or as_before or partly, sorted(written)
            return "complete" if complete else "old or none" if as_before else "shards without a map"
        if temporaries and fault.call == "unlink" and "error" in fault.effect and complete:
            return "complete, and a temporary that could not be removed"
        assert not temporaries, f"left {sorted(temporaries)} (exit code {ended.code}: {ended.err})"
        if ended.code == 0:
            assert complete, f"exit code 0, but {sorted(written)}"
            return "complete"
        codes = [_SIGNALS[s] for s in _SIGNALS if f"signal={s}" in fault.effect] or [3, 5]
        assert ended.code in codes, f"exit code {ended.code}: {ended.err}"
        assert len(ended.err.splitlines()) == 1, ended.err
        if setting.overwrite and complete and ended.code == 5:
            return "complete, exit code 5"  # the folder could not be synchronized after the replacement
        assert as_before, f"exit code {ended.code}, but {sorted(written)}: {ended.err}"
        return "old or none"

    def _check_next_run(self, setting: Setting, folder: Path, left: Mapping[str, bytes]) -> None:
        """See that the run after a kill works, and leaves alone what the killed one left."""
        ended, after = self.run(setting, folder)
        taken = not setting.overwrite and any(name in left for name in self.expected[setting])
        assert ended.code == (2 if taken else 0), f"the next run: exit code {ended.code}: {ended.err}"
        expected = {**left, **({} if taken else self.expected[setting])}
        assert after == expected, f"the next run leaves {sorted(after)}"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def why_not() -> str | None:
    """Return why nothing can be injected here, if so."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    if not hasattr(os, "pidfd_open"):
        return "runs are isolated by Linux's pidfd"
    with Isolated() as server:
        try:
            ended = server.run([], _TESTS, strace=["-o", "/dev/null", "-e", "inject=fsync:error=EIO"])
        except RuntimeError as error:
            return f"strace may not trace: {error}"
    return None if ended.code == 2 else f"strace does not trace: {ended}"


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a disk of 1 MB; None where this may not be."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def kinds(bench: Bench) -> dict[str, list[Fault]]:
    """Return every fault there is, by kind."""
    every = (*_READING, *_WRITING)
    return {
        "SIGKILL": bench.faults(lambda call: ["signal=KILL"], every),
        "SIGTERM": bench.faults(lambda call: ["signal=TERM", "signal=TERM+"], every),
        "SIGINT": bench.faults(lambda call: ["signal=INT", "signal=INT+"], every),
        "errors of reading": bench.faults(lambda call: [f"error={e}" for e in _ERRORS[call]], _READING),
        "files that end early": bench.faults(lambda call: ["retval=0"], ("preadv", "pread64", "read")),
        "errors of writing": bench.faults(lambda call: [f"error={e}" for e in _ERRORS[call]], _WRITING),
    }


def chosen(faults: Sequence[Fault], count: int, seed: int) -> list[Fault]:
    """Return this many of the faults; all of them, again and again, where there are fewer."""
    rng = random.Random(seed)
    found: list[Fault] = []
    while len(found) < count and faults:
        found += rng.sample(list(faults), min(len(faults), count - len(found)))
    return found


def try_all(tries: Mapping[str, Callable[[], str]], workers: int) -> tuple[Counter[str], list[str]]:
    """Do what is to be tried; return how the runs ended, and what was wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []

    def one(name: str) -> None:
        try:
            outcomes[tries[name]()] += 1
        except AssertionError as error:
            outcomes["WRONG"] += 1
            wrong.append(f"{name}: {str(error)[-600:]}")

    with ThreadPoolExecutor(workers) as executor:
        list(executor.map(one, tries))
    return outcomes, wrong


def injections(bench: Bench, faults: Sequence[Fault]) -> dict[str, Callable[[], str]]:
    return {f"{number}: {fault}": partial(bench.inject, fault) for number, fault in enumerate(faults)}


def moments(bench: Bench, count: int, seed: int) -> dict[str, Callable[[], str]]:
    """Return that many runs that SIGTERM or SIGINT reaches at a random moment, every other one twice."""
    rng = random.Random(seed)
    tries: dict[str, Callable[[], str]] = {}
    for number in range(count):
        setting = rng.choice(SETTINGS)
        first = rng.uniform(0, bench.seconds)
        second = first + rng.uniform(0, bench.seconds / 5)
        signals = [
            (after, rng.choice([signal.SIGTERM, signal.SIGINT]))
            for after in (first, second)[: 1 + number % 2]
        ]
        told = " and ".join(f"{name} after {after:.4f} s" for after, name in signals)
        tries[f"{number}: {setting}: {told}"] = partial(bench.interrupt, setting, signals)
    return tries


def limits(bench: Bench, count: int) -> dict[str, Callable[[], str]]:
    """Return runs whose files may not grow beyond the given sizes."""
    return {
        f"{setting}: RLIMIT_FSIZE {size}": partial(bench.limit, setting, size)
        for setting in SETTINGS
        for size in _steps(max(map(len, bench.expected[setting].values())), count)
    }


def disks(bench: Bench, disk: Path, count: int) -> dict[str, Callable[[], str]]:
    """Return runs on a disk with the given sizes of free space."""
    return {
        f"{setting}: {free} bytes free": partial(bench.fill, setting, disk, free)
        for setting in SETTINGS
        for free in _steps(2 * sum(map(len, bench.expected[setting].values())), count)
    }


def _steps(largest: int, count: int) -> range:
    return range(0, largest + 512, max(1, largest // count))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument(
        "--faults", type=int, default=1000, help="errors, and SIGTERM and SIGINT, by kind in equal parts"
    )
    parser.add_argument("--limits", type=int, default=20, help="sizes of files and of disks a format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)
    start = time.monotonic()
    failures: list[str] = []

    def told(kind: str, tries: Mapping[str, Callable[[], str]], workers: int = arguments.workers) -> None:
        outcomes, wrong = try_all(tries, workers)
        failures.extend(wrong)
        ends = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        print(f"{kind:34}{sum(outcomes.values()):6}: {ends}", flush=True)

    with (
        tempfile.TemporaryDirectory() as root,
        Bench(Path(root), arguments.workers) as bench,
        small_disk(Path(root)) as disk,
    ):
        possible = kinds(bench)
        share = arguments.faults // len(possible)  # SIGKILL apart, random moments in its place
        for kind, faults in possible.items():
            count = arguments.kills if kind == "SIGKILL" else share
            selected = chosen(faults, count, arguments.seed)
            told(f"{kind}, of {len(faults)}", injections(bench, selected))
        told("signals at random moments", moments(bench, share, arguments.seed))
        told("RLIMIT_FSIZE", limits(bench, arguments.limits))
        if disk is None:
            print("full disk: skipped, a tmpfs cannot be mounted here")
        else:
            told("full disk", disks(bench, disk, arguments.limits), 1)
    print(f"seed {arguments.seed}, {time.monotonic() - start:.0f} s")
    for failure in failures:
        print(failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
