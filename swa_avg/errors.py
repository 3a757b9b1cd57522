"""What can go wrong, in the user's terms.

Every class carries the exit code that the command line returns for it. Anything else that is raised is
a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

__all__ = [
    "Finding",
    "MismatchError",
    "Named",
    "NoImprovementError",
    "SwaAvgError",
    "SwaAvgWarning",
    "SystemRefusalError",
    "UnreadableError",
    "UsageError",
    "escape",
    "first_line",
    "warn",
]


_FEW = 3
_DETAILS = re.compile(r"'[^']*'|\w+\[[^\]]*\]|[0-9]+")
"""What differs between problems of one cause: names, types and numbers."""


def escape(text: object) -> str:
    """Return `text` on one printable line: names come from files and may hold newlines or escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in str(text)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says anything, or the name of its class."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class SwaAvgWarning(UserWarning):
    """What a user should look at in a result that was made all the same."""


def warn(problems: Iterable[str]) -> None:
    """Give each problem as a warning, at the line that called the caller.

    The command line, which prints them itself, ignores this class.
    """
    for problem in problems:
        warnings.warn(escape(problem), SwaAvgWarning, stacklevel=3)


class Named(Protocol):
    """A file in a message: a `pathlib.Path`, or what a URL names."""

    @property
    def name(self) -> str: ...


class SwaAvgError(Exception):
    """Base of every error that a user can act on."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are unpickled from `args`, which hold the message alone, and these come from afar, too.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[SwaAvgError], args: tuple[Any, ...], fields: dict[str, Any]) -> SwaAvgError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class UsageError(SwaAvgError, ValueError):
    """What was asked for cannot be done as asked.

    The command line and Python share these messages, so they name an argument by its bare name, with the
    value that was found and what was expected: `method 'ema:2': expected ema:DECAY, from 0 ...`. Only `cli`
    speaks of options, where it refuses something itself.
    """

    exit_code = 2


class UnreadableError(SwaAvgError, ValueError):
    """An input is missing, damaged or not a checkpoint that can be read."""

    exit_code = 3

    def __init__(self, path: Named | str, problem: str, *, tensor: str | None = None, hint: str = "") -> None:
        from pathlib import Path  # `swa-avg --help` does without

        self.path: Named = Path(path) if isinstance(path, str) else path
        self.tensor = tensor
        parts = [path, problem] if tensor is None else [path, tensor, problem]
        super().__init__(escape(": ".join(map(str, parts)) + (f"; {hint}" if hint else "")))


class Finding(NamedTuple):
    """One reason why the inputs cannot be averaged."""

    path: Named
    subject: str
    """The tensor, or the path inside the configuration, that the finding is about."""
    problem: str
    """What was expected and what was found, and what to do where there is something to do."""

    def __str__(self) -> str:
        return escape(f"{self.path}: {self.subject}: {self.problem}")


class MismatchError(SwaAvgError, ValueError):
    """The inputs do not fit together, or hold values that cannot be averaged."""

    exit_code = 4

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(self.lines))

    @property
    def lines(self) -> list[str]:
        """The findings, those of one cause in one line: how many they are, and three examples."""
        causes: dict[object, list[Finding]] = {}
        for finding in self.findings:
            causes.setdefault((finding.path, _DETAILS.sub("", finding.problem)), []).append(finding)
        summaries = {id(alike[0]): _told(alike) for alike in causes.values() if len(alike) > _FEW}
        told = {id(finding) for alike in causes.values() if len(alike) > _FEW for finding in alike[1:]}
        return [summaries.get(id(f), str(f)) for f in self.findings if id(f) not in told]


def _told(alike: Sequence[Finding]) -> str:
    first, *others = alike
    also = ", ".join(finding.subject for finding in others[: _FEW - 1])
    return escape(f"{first.path}: {len(alike)} times: {first.subject}: {first.problem} (also {also}, ...)")


class NoImprovementError(SwaAvgError):
    """No average is better than the best single checkpoint, and one that is was asked for."""

    exit_code = 4

    def __init__(self, message: str, report: Any) -> None:
        self.report = report
        """The SweepReport, with every score."""
        super().__init__(message)


class SystemRefusalError(SwaAvgError, OSError):
    """The operating system refused: disk full, permission, input/output error, too many open files."""

    exit_code = 5
