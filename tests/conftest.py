from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

from swa_avg import cli
from swa_avg.interrupts import interrupts

hypothesis.settings.register_profile("untimed", deadline=None)  # machines are shared and slow at times
hypothesis.settings.load_profile("untimed")

# Python's own settings would reach every process that a test starts: one waits for input as it ends, others print.
for _name in [name for name in os.environ if name.startswith("PYTHON")]:
    if _name not in ("PYTHONPATH", "PYTHONHOME"):  # where packages are
        del os.environ[_name]

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = [] if hasattr(os, "fork") else ["hostile"]  # every run there is a fork with limits

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Ended:
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def swa_avg(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the command line in this process."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["swa-avg", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        complaints = sys.unraisablehook
        monkeypatch.setattr(sys, "stdout", sys.stdout)
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        try:
            with pytest.raises(SystemExit) as exit_info:
                cli.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            # An interrupted process ends; this one goes on.
            interrupts.begin()
            sys.unraisablehook = complaints
        out, err = capfd.readouterr()
        return Ended(int(exit_info.value.code or 0), out, err)

    return run


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Let Keras draw the same initial weights in every run of a test, whatever ran before it."""
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in a fresh process."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=300,
            check=False,
        )

    return run
