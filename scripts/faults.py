"""Break the system under runs of swa-avg: python scripts/faults.py [--kills 1000] [--faults 1000] [--seed 0]

strace makes a system call fail, or sends a signal at it: at the Nth write, fsync, link and so on, for
every N that a run has, or as many as asked for, chosen by the seed. After each run, the inputs are what they
were; the output is complete, or absent, or the old one; what the exit code says is so; and no temporary is
left, except where unlink itself fails, and by SIGKILL, and then the next run does its work and leaves it
alone. Last, files may not grow beyond a limit (RLIMIT_FSIZE), from nothing to as much as a run needs.

Exits with 1 if any of this is not so, and with 77 where strace is missing or may not trace.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(_TESTS))

import makers  # noqa: E402

SKIPPED = 77
MARKER = "/swa-avg-begins-here"
_RUN = (
    "import os, sys, difflib, click.testing, h5py, concurrent.futures.thread, swa_avg.run, swa_avg.cli\n"
    f"os.path.exists({MARKER!r})\n"
    "sys.argv[0] = 'swa-avg'\n"
    "swa_avg.cli.main()\n"
)
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


@dataclass
class Bench:
    """Makes runs in folders of their own, and knows how each should end."""

    root: Path
    before: dict[Setting, Counter[str]] = field(default_factory=dict)
    """How often each call is made before the run proper begins, by the main thread."""
    during: dict[Setting, Counter[str]] = field(default_factory=dict)
    expected: dict[Setting, dict[str, bytes]] = field(default_factory=dict)
    """The complete output: name -> bytes."""

    def prepare(self, settings: Sequence[Setting]) -> None:
        """Trace one run of each setting, to know its calls and its output."""
        for setting in settings:
            folder = self.folder(setting, "traced")
            inputs = {path.name for path in folder.iterdir()} - {"swa" + setting.suffix}
            log = self.root / "trace"
            command = ["strace", "-f", "-qq", "-o", str(log), *self.command(setting)]
            ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise RuntimeError(f"{setting}: {ended.stderr}")
            self.expected[setting] = {
                p.name: p.read_bytes() for p in folder.iterdir() if p.name not in inputs
            }
            lines = log.read_text("utf-8", "replace").splitlines()
            main = lines[0].split()[0]
            calls = [found[1] for line in lines if (found := re.match(rf"{main} +(\w+)\(", line))]
            begin = next(i for i, line in enumerate(_of(lines, main)) if MARKER in line)
            self.before[setting] = Counter(calls[: begin + 1])
            self.during[setting] = Counter(calls[begin + 1 :])

    def folder(self, setting: Setting, name: str) -> Path:
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number in (1, 2, 3):
            _WRITERS[setting.suffix](folder / f"a_{number}{setting.suffix}", makers.weights(number))
        if setting.overwrite:
            (folder / f"swa{setting.suffix}").write_bytes(b"an old average")
        return folder

    def command(self, setting: Setting) -> list[str]:
        inputs = [f"a_{number}{setting.suffix}" for number in (1, 2, 3)]
        options = [*setting.options, *(["--overwrite"] if setting.overwrite else [])]
        arguments = [*inputs, "-q", "--threads", "1", "-o", f"swa{setting.suffix}", *options]
        return [sys.executable, "-c", _RUN, *arguments]

    def faults(self, effects: Callable[[str], Sequence[str]], calls: Sequence[str]) -> list[Fault]:
        """Return every fault of these kinds, in every setting."""
        return [
            Fault(setting, call, number, effect)
            for setting, during in self.during.items()
            for call in calls
            for number in range(1, during[call] + 1)
            for effect in effects(call)
        ]

    def outcome(self, fault: Fault, name: str) -> str:
        """Inject a fault; return how the run ended, or raise AssertionError."""
        folder = self.folder(fault.setting, name)
        before = _contents(folder)
        place = self.before[fault.setting][fault.call] + fault.number
        effect, plus = fault.effect.removesuffix("+"), "+" if fault.effect.endswith("+") else ""
        inject = f"inject={fault.call}:{effect}:when={place}{plus}"
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={fault.call}", "-e", inject]
        ended = subprocess.run(
            [*command, *self.command(fault.setting)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        outcome = self._judge(fault, before, _contents(folder), ended)
        shutil.rmtree(folder)
        return outcome

    def _judge(
        self,
        fault: Fault,
        before: dict[str, bytes],
        after: dict[str, bytes],
        ended: subprocess.CompletedProcess[str],
    ) -> str:
        output = f"swa{fault.setting.suffix}"
        expected = self.expected[fault.setting]
        for name, data in before.items():
            assert name == output or after.get(name) == data, f"{name} has changed"
        temporaries = {name for name in after if name.endswith(".tmp")}
        written = {name: data for name, data in after.items() if name not in before or name == output}
        written = {name: data for name, data in written.items() if name not in temporaries}
        complete = written == expected
        as_before = written == {name: data for name, data in before.items() if name == output}
        killed = fault.effect == "signal=KILL" and ended.returncode == -9
        assert "Traceback" not in ended.stderr, ended.stderr
        if killed:
            # Shards come before the map that makes them a checkpoint.
            partly = fault.setting.suffix == ".weights.json" and output not in after
            assert complete or as_before or partly, sorted(written)
            return "complete" if complete else "old or none" if as_before else "shards without a map"
        if temporaries and fault.call == "unlink" and "error" in fault.effect and complete:
            return "complete, and a temporary that could not be removed"
        assert not temporaries, f"left {sorted(temporaries)} (exit code {ended.returncode}: {ended.stderr})"
        if ended.returncode == 0:
            assert complete, f"exit code 0, but {sorted(written)}"
            return "complete"
        codes = [_SIGNALS[s] for s in _SIGNALS if f"signal={s}" in fault.effect] or [3, 5]
        assert ended.returncode in codes, f"exit code {ended.returncode}: {ended.stderr}"
        assert len(ended.stderr.splitlines()) == 1, ended.stderr
        if fault.setting.overwrite and complete and ended.returncode == 5:
            return "complete, exit code 5"  # the folder could not be synchronized after the replacement
        assert as_before, f"exit code {ended.returncode}, but {sorted(written)}: {ended.stderr}"
        return "old or none"

    def after_kill(self, fault: Fault, name: str) -> None:
        """Kill a run, and see that the next one succeeds and leaves alone what the first one left."""
        folder = self.folder(fault.setting, name)
        place = self.before[fault.setting][fault.call] + fault.number
        inject = f"inject={fault.call}:signal=KILL:when={place}"
        command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={fault.call}", "-e", inject]
        subprocess.run([*command, *self.command(fault.setting)], cwd=folder, capture_output=True, check=False)
        left = {n: d for n, d in _contents(folder).items() if n.endswith(".tmp")}
        again = [part for part in self.command(fault.setting) if part != "--overwrite"]
        if fault.setting.suffix != ".weights.json":
            again.append("--overwrite")
            ended = subprocess.run(again, cwd=folder, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr
            after = _contents(folder)
            assert {n: d for n, d in after.items() if n in self.expected[fault.setting]} == self.expected[
                fault.setting
            ]
            assert {n: d for n, d in after.items() if n.endswith(".tmp")} == left
        shutil.rmtree(folder)


def _of(lines: Sequence[str], process: str) -> Iterator[str]:
    return (line for line in lines if re.match(rf"{process} +\w+\(", line))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def why_not() -> str | None:
    """Return why nothing can be injected here, if so."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO:when=1", "true"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"strace may not trace: {ended.stderr.strip()}" if ended.returncode else None


def kinds(bench: Bench) -> dict[str, list[Fault]]:
    """Return every fault there is, by kind."""
    every = (*_READING, *_WRITING)
    return {
        "SIGKILL": bench.faults(lambda call: ["signal=KILL"], every),
        "SIGTERM": bench.faults(lambda call: ["signal=TERM", "signal=TERM+"], every),
        "SIGINT": bench.faults(lambda call: ["signal=INT", "signal=INT+"], every),
        "errors of reading": bench.faults(lambda call: [f"error={e}" for e in _ERRORS[call]], _READING),
        "errors of writing": bench.faults(lambda call: [f"error={e}" for e in _ERRORS[call]], _WRITING),
    }


def chosen(faults: Sequence[Fault], count: int, seed: int) -> list[Fault]:
    """Return so many of the faults; all of them, again and again, where there are fewer."""
    rng = random.Random(seed)
    found: list[Fault] = []
    while len(found) < count and faults:
        found += rng.sample(list(faults), min(len(faults), count - len(found)))
    return found


def inject(bench: Bench, faults: Sequence[Fault], workers: int) -> tuple[Counter[str], list[str]]:
    """Inject faults one after the other; return how the runs ended, and what was wrong."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []

    def one(numbered: tuple[int, Fault]) -> None:
        number, fault = numbered
        try:
            outcomes[bench.outcome(fault, f"run{number}")] += 1
            if fault.effect == "signal=KILL" and number % 10 == 0:
                bench.after_kill(fault, f"run{number}")
        except AssertionError as error:
            outcomes["WRONG"] += 1
            wrong.append(f"{fault}: {str(error)[:600]}")

    with ThreadPoolExecutor(workers) as executor:
        list(executor.map(one, enumerate(faults)))
    return outcomes, wrong


def limited(bench: Bench, setting: Setting, size: int) -> str:
    """Run with files that may not grow beyond `size`; return how it ended, or raise AssertionError."""
    folder = bench.folder(setting, "limited")
    before = _contents(folder)
    ended = subprocess.run(
        bench.command(setting),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    fault = Fault(setting, "RLIMIT_FSIZE", size, "limit")
    return bench._judge(fault, before, _contents(folder), ended)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument(
        "--faults", type=int, default=1000, help="errors and SIGTERM and SIGINT, in equal parts"
    )
    parser.add_argument("--limits", type=int, default=20, help="sizes of RLIMIT_FSIZE a format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)
    start = time.monotonic()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        bench.prepare(SETTINGS)
        for kind, faults in kinds(bench).items():
            count = arguments.kills if kind == "SIGKILL" else arguments.faults // 4
            outcomes, wrong = inject(bench, chosen(faults, count, arguments.seed), arguments.workers)
            failures += wrong
            print(
                f"{kind:20}{sum(outcomes.values()):6} of {len(faults)} different: {_told(outcomes)}",
                flush=True,
            )
        outcomes = Counter()
        for setting in SETTINGS:
            largest = max(map(len, bench.expected[setting].values()))
            for size in range(0, largest + 512, max(1, largest // arguments.limits)):
                try:
                    outcomes[limited(bench, setting, size)] += 1
                except AssertionError as error:
                    outcomes["WRONG"] += 1
                    failures.append(f"{setting}: RLIMIT_FSIZE {size}: {error}")
        print(f"{'RLIMIT_FSIZE':20}{sum(outcomes.values()):6}: {_told(outcomes)}")
    print(f"seed {arguments.seed}, {time.monotonic() - start:.0f} s")
    for failure in failures:
        print(failure)
    sys.exit(bool(failures))


def _told(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))


if __name__ == "__main__":
    main()
