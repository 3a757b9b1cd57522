"""Where a file is: at a path on this machine, or at a URL. Only this package tells the two apart."""

from __future__ import annotations

import glob
import os
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from swa_avg.errors import UnreadableError, UsageError
from swa_avg.files.names import is_plain_name
from swa_avg.files.remote import RemotePath, is_url
from swa_avg.files.temporary import temporary_folder

__all__ = [
    "Location",
    "any_remote",
    "cached_locally",
    "files_under",
    "folder_itself",
    "identity",
    "local_copy",
    "location",
    "matches",
]

Location: TypeAlias = Path | RemotePath
"""Both have `name`, `parent`, `/`, `exists` and the like; the functions here do what they do differently."""


def location(name: str | Location) -> Location:
    """Return the file that the user named; in text, `~` is the home folder, as in a shell."""
    if isinstance(name, Location):
        return name
    return RemotePath(name) if is_url(name) else Path(_expanded(name))


def _expanded(name: str) -> str:
    return name if os.path.lexists(name) else os.path.expanduser(name)  # noqa: PTH111 (which raises)


def any_remote(paths: Iterable[Location]) -> bool:
    """Tell whether one of the files is at a URL."""
    return any(isinstance(path, RemotePath) for path in paths)


def identity(path: Location) -> Hashable:
    """Return what is equal for two names of one file; whether there is an object at a URL is not asked.

    Raises:
        UnreadableError: a path leads to no file.
    """
    if isinstance(path, RemotePath):
        return path.identity()
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UnreadableError(path, "no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableError(path, reason.lower()) from error
    return status.st_dev, status.st_ino


def matches(pattern: str) -> list[Location]:
    """Return the files that match a shell pattern, or only the one of exactly this name, if it exists.

    Likewise the folder of a pattern is that of exactly this name, if it exists: `run[1]/*.keras`.

    Raises:
        SystemRefusalError: the service did not answer or refused.
    """
    path = location(pattern)
    if isinstance(path, RemotePath):
        return [path] if path.exists() else [*path.matches()]
    if os.path.lexists(path):
        return [path]
    folder, name = os.path.split(_expanded(pattern))
    if os.path.isdir(folder):  # noqa: PTH112 (which takes any name)
        folder = glob.escape(folder)
    return [Path(match) for match in glob.glob(os.path.join(folder, name))]  # noqa: PTH118, PTH207


def folder_itself(path: Location) -> Location:
    """Return a folder under a name like a file's: without a slash at its end, and not as `.` or `..`."""
    if isinstance(path, RemotePath):
        return RemotePath(path.url.rstrip("/"), path.copies)
    return path if path.name not in ("", "..") else path.resolve()


def files_under(folder: Location) -> dict[str, Location]:
    """Return every file in a folder and the folders in it, by its path inside it; links are not followed.

    Raises:
        UnreadableError: the name of one leads out of the folder.
        SystemRefusalError: the service did not answer or refused.
    """
    found: dict[str, Location] = {}
    if isinstance(folder, RemotePath):
        found.update(folder.files())
    else:
        for where, folders, files in os.walk(folder):
            links = [name for name in folders if os.path.islink(os.path.join(where, name))]  # noqa: PTH114, PTH118
            for name in (*files, *links):
                path = Path(where, name)
                found[path.relative_to(folder).as_posix()] = path
    for name in found:
        if not all(map(is_plain_name, name.split("/"))):
            raise UnreadableError(folder, f"holds a file whose name leads out of it: {name}")
    return dict(sorted(found.items()))


@contextmanager
def cached_locally(path: Location) -> Iterator[Location]:
    """Give a location whose file, and those beside it, are copied to this machine when they are opened.

    For a checkpoint that is read from one end to the other, more than once. A path is given as it is.
    """
    if not isinstance(path, RemotePath):
        yield path
        return
    with temporary_folder() as folder:
        yield RemotePath(path.url, folder)


def local_copy(path: Location) -> Path:
    """Return where on this machine a file is: the path itself, or the copy of what is `cached_locally`.

    Raises:
        UsageError: it is at a URL alone.
    """
    if not isinstance(path, RemotePath):
        return path
    if path.copies is None:
        raise UsageError(f"{path} is not on this machine; copy it here, and name the copy")
    return path.copies / path.name
