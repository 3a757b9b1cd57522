"""Functions that the user names on the command line."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, cast

from swa_avg.errors import SwaAvgError, UsageError

__all__ = ["describe_error", "import_function", "import_module", "import_object", "names_function"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def names_function(text: str) -> bool:
    """Tell whether `text` reads as `MODULE:FUNCTION`."""
    return _FUNCTION.fullmatch(text) is not None


def import_module(name: str) -> None:
    """Import a module for what it registers; those in the current folder count, too.

    Raises:
        UsageError: there is no such module.
    """
    with _current_folder_importable():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise UsageError(f"cannot import {name}: {error}") from error


def import_function(name: str) -> Callable[..., Any]:
    """Import `MODULE:FUNCTION`; modules of the current folder count, too.

    Raises:
        UsageError: there is no such module or function.
    """
    found = import_object(name)
    if not callable(found):
        raise UsageError(f"{name} is not a function")
    return _named(cast("Callable[..., Any]", found), name)


def import_object(name: str) -> Any:
    """Import `MODULE:NAME`; modules of the current folder count, too.

    Raises:
        UsageError: there is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    if not names_function(name):
        raise UsageError(f"{name!r} is not MODULE:FUNCTION")
    with _current_folder_importable():
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ModuleNotFoundError, AttributeError) as error:
            hint = f"; write {module[:-3]}:{attribute}, without .py" if module.endswith(".py") else ""
            raise UsageError(f"cannot import {name}: {error}{hint}") from error
    return found


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the function; what it raises becomes an error that names it, and the line."""

    @wraps(function)
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SwaAvgError:
            raise
        except Exception as error:
            raise UsageError(f"{name} failed: {describe_error(error)}") from error

    return called


def describe_error(error: Exception) -> str:
    """Return what an error of the user's code says, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before
