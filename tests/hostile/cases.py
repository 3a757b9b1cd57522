"""What every hostile case is held to: one line, nothing left, nothing changed, in time and in memory."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from isolated import MEMORY_LIMIT, TIME_LIMIT, Ended, Isolated

_LARGE = 2**24


@dataclass(frozen=True)
class Case:
    """One hostile input: how it is made, and how a run with it ends."""

    id: str
    build: Callable[[Path], object]
    """Write the file at the given path."""
    text: str
    """What the line on standard error says after the file's name: a regular expression."""
    code: int = 3
    options: Sequence[str] = field(default=())


def parameters(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.id for case in cases])


def snapshot(folder: Path) -> dict[str, object]:
    """Return what is in a folder: bytes of files, targets of links, kinds of what is neither."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        name = os.fspath(path.relative_to(folder))
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("link", os.readlink(path))  # noqa: PTH115
        elif not stat.S_ISREG(status.st_mode):
            found[name] = stat.S_IFMT(status.st_mode)
        elif status.st_size > _LARGE:
            found[name] = (status.st_size, status.st_mtime_ns)
        else:
            found[name] = path.read_bytes()
    return found


def check_bounds(ended: Ended) -> None:
    """Fail if a run crashed, hung, took too much memory or showed a traceback."""
    assert not ended.timed_out, f"took over {TIME_LIMIT} s"
    assert ended.code >= 0, f"signal {-ended.code}: {ended.err}"
    assert "Traceback" not in ended.err, ended.err
    assert ended.peak < MEMORY_LIMIT


def check_line(ended: Ended, code: int, line: str) -> None:
    """Fail unless a run ended with this exit code and exactly one line, a regular expression."""
    check_bounds(ended)
    assert re.fullmatch(f"swa-avg: error: (?:{line})\n", ended.err), ended.err
    assert "\n" not in ended.err[:-1]
    assert (ended.code, ended.out) == (code, "")


def check_refused(
    isolated: Isolated, folder: Path, case: Case, good: Callable[[Path], object], suffix: str
) -> None:
    """Run with the hostile input alone, as the newest and as an older one; with and without an old output."""
    bad = folder / f"m_5{suffix}"
    for name in ("a_1", "z_9"):
        good(folder / f"{name}{suffix}")
    case.build(bad)
    line = f"{re.escape(bad.name)}: (?:{case.text})"
    output = f"swa{suffix}"
    before = snapshot(folder)
    check_line(isolated.run([bad.name, "-o", output, *case.options], folder), case.code, line)
    assert snapshot(folder) == before
    if suffix != ".weights.json":  # several files cannot be replaced
        (folder / output).write_bytes(b"an old average")
        before = snapshot(folder)
    options = ["-o", output, *case.options, *([] if suffix == ".weights.json" else ["--overwrite"])]
    for inputs in ([f"a_1{suffix}", bad.name], [bad.name, f"z_9{suffix}"]):
        check_line(isolated.run([*inputs, *options], folder), case.code, line)
        assert snapshot(folder) == before


def check_same(
    isolated: Isolated, folder: Path, inputs: Sequence[str], output: str, expected: Mapping[str, bytes]
) -> None:
    """Run, and fail unless the output holds these tensors."""
    import oracle

    ended = isolated.run([*inputs, "-q", "-o", output], folder)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")
    assert {n: v.tobytes() for n, v in oracle.read_arrays(folder / output).items()} == expected
