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
    """Import a module for what it registers; one of the current folder if none of this name is installed.

    Raises:
        UsageError: there is no such module.
    """
    _find(name, name)


def import_function(name: str) -> Callable[..., Any]:
    """Import `MODULE:FUNCTION`; of the current folder if no module of this name is installed.

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
    return _find(name, module, *attribute.split("."))


def _find(name: str, module: str, *attributes: str) -> Any:
    """Return a module, or what it holds; errors name it as the user did."""
    with _current_folder_last():
        try:
            found: Any = importlib.import_module(module)
            for attribute in attributes:
                found = getattr(found, attribute)
        except (ModuleNotFoundError, AttributeError) as error:
            hint = f"; write {name.replace('.py:', ':')}, without .py" if module.endswith(".py") else ""
            raise UsageError(f"cannot import {name}: {error}{hint or _hidden(module)}") from error
    return found


def _hidden(module: str) -> str:
    """Return a hint where a file of the current folder was not imported, since another one is installed."""
    top = module.partition(".")[0]
    own, found = Path(f"{top}.py"), getattr(sys.modules.get(top), "__file__", None)
    if found is None or not own.exists() or Path(found).resolve() == own.resolve():
        return ""
    return f"; {own} of the current folder comes after {found}: give it another name"


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
def _current_folder_last() -> Iterator[None]:
    """Search the current folder after all else: checkpoints that came with a `keras.py` bring no code in.

    Python itself may have put it first, as `python -m` does.
    """
    before = list(sys.path)
    try:
        here = [str(Path.cwd())]
    except FileNotFoundError:  # there is no current folder any more
        here = []
    sys.path[:] = [*(entry for entry in before if entry not in ("", *here)), *here]
    try:
        yield
    finally:
        sys.path[:] = before
