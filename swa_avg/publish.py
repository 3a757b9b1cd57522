"""The output files: all of them complete under their names, or none."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

from swa_avg.errors import SystemRefusalError, UsageError

__all__ = ["Publication", "check_output", "sync_folder"]


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless `output` can be created, or replaced where that is allowed."""
    if output.is_symlink():
        raise UsageError(f"the output {output} is a symbolic link; name the file itself")
    if output.exists():
        if not output.is_file():
            raise UsageError(f"the output {output} exists and is not a regular file")
        if not overwrite:
            raise UsageError(f"the output {output} exists; name another one, or add --overwrite")
        if output.suffix == ".json":
            raise UsageError(
                f"the output {output} exists; several files cannot be replaced in one step: name another"
            )
    if not output.parent.is_dir():
        raise UsageError(f"the folder of the output does not exist: {output.parent}")


class Publication:
    """Files that grow beside the output and take their names together.

    A context manager: `publish` makes them durable and visible; whatever has not been published is removed
    on leaving. Writing errors surface as SystemRefusalError.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self._overwrite = overwrite
        self._files: list[tuple[IO[bytes], Path, Path]] = []
        """Open file, temporary path, final path."""
        self._scratch: list[IO[bytes]] = []

    def create(self, name: str) -> IO[bytes]:
        final = self.output.with_name(name)
        temporary = self.output.with_name(f".{self.output.name}.{secrets.token_hex(6)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        file = os.fdopen(os.open(temporary, flags, 0o666), "w+b")
        self._files.append((file, temporary, final))
        return file

    def scratch(self) -> IO[bytes]:
        """Return a temporary file without a name in the output's folder."""
        file = tempfile.TemporaryFile(dir=self.output.parent)  # noqa: SIM115 (closed on leaving)
        self._scratch.append(file)
        return file

    def publish(self) -> None:
        """Give every file its name, in the order of creation.

        Raises:
            UsageError: a file of that name appeared during the run, and may not be replaced.
        """
        for file, _, _ in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        while self._files:
            _, temporary, final = self._files[0]
            if self._overwrite and final == self.output:
                temporary.replace(final)
            else:
                _move_to_free_name(temporary, final)
            self._files.pop(0)
        sync_folder(self.output.parent)

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._scratch, *(file for file, _, _ in self._files)):
            with contextlib.suppress(OSError):
                file.close()
        for _, temporary, _ in self._files:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, SystemRefusalError):
            reason = error.strerror or str(error)
            raise SystemRefusalError(error.errno, f"cannot write: {reason}", str(self.output)) from error


def _move_to_free_name(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise UsageError(f"the output {final} exists; name another one, or add --overwrite") from None
    except OSError:  # a file system without hard links
        if final.exists():
            raise UsageError(f"the output {final} exists; name another one, or add --overwrite") from None
        temporary.replace(final)
    else:
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
