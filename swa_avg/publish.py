"""The output files: all of them complete under their names, or none."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from swa_avg.errors import SystemRefusalError, UsageError
from swa_avg.interrupts import interrupts_held

__all__ = ["Publication", "check_output", "sync_folder"]

_WRITEBACK = 32 * 2**20


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


class _GrowingFile(io.BufferedRandom):
    """A file whose pages go to disk while it grows, so that the last fsync finds little to do."""

    _started = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        position = self.tell()
        if position - self._started >= _WRITEBACK and hasattr(os, "posix_fadvise"):
            # Pages that are dirty are not dropped, as the name of the advice has it, but queued for writing.
            os.posix_fadvise(self.fileno(), self._started, position - self._started, os.POSIX_FADV_DONTNEED)
            self._started = position
        return written


class Publication:
    """Files that grow beside the output and take their names together.

    A context manager: `publish` makes them durable and visible. Left with an error, it removes all of them,
    except one that has replaced another file: that cannot be undone, and an interrupt comes too late then.
    Writing errors surface as SystemRefusalError.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self._overwrite = overwrite
        self._files: list[tuple[IO[bytes], Path]] = []
        """Open file, final path."""
        self._temporaries: list[Path] = []
        self._moved: list[Path] = []
        """Names that were free, and are taken by files of ours."""
        self._scratch: list[IO[bytes]] = []
        self._replaced = False

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        final = self.output.with_name(name)
        temporary = self.output.with_name(f".{self.output.name}.{secrets.token_hex(6)}.tmp")
        # Before it exists: an interrupt may come between any two steps.
        self._temporaries.append(temporary)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        # Opened by its name, which the file keeps: workers on other machines write to it, too.
        raw = io.FileIO(temporary, "r+b", opener=lambda name, _: os.open(name, flags, 0o666))
        file = _GrowingFile(raw)
        self._files.append((file, final))
        _reserve(file, size)
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
        for file, _ in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with interrupts_held():
            for temporary, (_, final) in zip(self._temporaries, self._files, strict=True):
                if self._overwrite and final == self.output:
                    temporary.replace(final)
                    self._replaced = True
                else:
                    self._move_to_free_name(temporary, final)
            sync_folder(self.output.parent)

    def _move_to_free_name(self, temporary: Path, final: Path) -> None:
        exists = f"the output {final} exists; name another one, or add --overwrite"
        try:
            os.link(temporary, final)
        except FileExistsError:
            raise UsageError(exists) from None
        except OSError:  # a file system without hard links
            if final.exists():
                raise UsageError(exists) from None
            temporary.replace(final)
        self._moved.append(final)

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            with interrupts_held():
                for file in (*self._scratch, *(file for file, _ in self._files)):
                    with contextlib.suppress(OSError):
                        file.close()
                self._remove(self._temporaries if error is None else [*self._temporaries, *self._moved])
        except BaseException as interrupt:  # it came meanwhile
            if isinstance(interrupt, Exception) or not self._replaced:
                self._remove(self._moved)
                raise
        if isinstance(error, OSError) and not isinstance(error, SystemRefusalError):
            reason = error.strerror or str(error)
            raise SystemRefusalError(error.errno, f"cannot write: {reason}", str(self.output)) from error
        return self._replaced and error is not None and not isinstance(error, Exception)

    @staticmethod
    def _remove(paths: Iterable[Path]) -> None:
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()


def _reserve(file: IO[bytes], size: int) -> None:
    """Take room for `size` bytes on the disk, where the system can say beforehand that there is none.

    Raises:
        OSError: the disk is full, or the file may not become that large.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise


def sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
