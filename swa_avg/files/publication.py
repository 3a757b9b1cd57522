"""The output files: all of them complete under their names, or none."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import tempfile
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import IO, Any

from swa_avg.errors import SystemRefusalError, UsageError
from swa_avg.files.remote import RemotePath, remote, upload
from swa_avg.interrupts import interrupts, interrupts_held

__all__ = ["Publication", "check_output", "publication_at", "sync_folder"]

_WRITEBACK = 32 * 2**20


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless `output` can be created, or replaced where that is allowed."""
    url = remote(output)
    if url is None and output.is_symlink():
        raise UsageError(f"the output {output} is a symbolic link; name the file itself")
    if output.exists():
        if not (output.is_file() if url is None else url.is_file()):
            raise UsageError(f"the output {output} exists and is not a regular file")
        if not overwrite:
            raise UsageError(f"the output {output} exists; name another one, or add --overwrite")
        if output.suffix == ".json":
            raise UsageError(
                f"the output {output} exists; several files cannot be replaced in one step: name another"
            )
    if url is not None:
        url.check_bucket()
    elif not output.parent.is_dir():
        raise UsageError(f"the folder of the output does not exist: {output.parent}")


def publication_at(output: Path, *, overwrite: bool) -> Publication:
    """Return where the files of an output grow: beside it, or on this machine for a URL."""
    url = remote(output)
    return Publication(output, overwrite=overwrite) if url is None else _Upload(url, overwrite=overwrite)


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
    except one that has replaced another file: that cannot be undone.
    Writing errors surface as SystemRefusalError.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self._overwrite = overwrite
        self._files: list[tuple[IO[bytes], Path]] = []
        """Open file, final path."""
        self._temporaries: list[Path] = []
        self._moved: list[tuple[Path, os.stat_result]] = []
        """Final names that were free and that we gave to our files, with the files' stat."""
        self._scratch: list[IO[bytes]] = []

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        final = self.output.with_name(name)
        temporary = self.output.with_name(f".{self.output.name}.{secrets.token_hex(6)}.tmp")
        # Before it exists: an interrupt may come between any two steps.
        self._temporaries.append(temporary)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        file = _GrowingFile(io.FileIO(os.open(temporary, flags, 0o666), "r+b"))
        self._files.append((file, final))
        _reserve(file, size)
        return file

    def scratch(self) -> IO[bytes]:
        """Return a temporary file without a name in the output's folder."""
        file = tempfile.TemporaryFile(dir=self.output.parent)  # noqa: SIM115 (closed on leaving)
        self._scratch.append(file)
        return file

    def publish(self) -> None:
        """Give every file its name, in the order of creation; from then on, an interrupt comes too late.

        Raises:
            UsageError: a file of that name appeared during the run, and may not be replaced.
        """
        interrupts.check()
        for file, _ in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        with interrupts_held():
            for temporary, (_, final) in zip(self._temporaries, self._files, strict=True):
                if self._overwrite and final == self.output:
                    temporary.replace(final)
                else:
                    ours = temporary.stat()
                    _move_to_free_name(temporary, final)
                    self._moved.append((final, ours))
            sync_folder(self.output.parent)
            self._settled()

    def _settled(self) -> None:
        interrupts.ignore()

    def __enter__(self) -> Publication:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with interrupts_held():
                for file in (*self._scratch, *(file for file, _ in self._files)):
                    with contextlib.suppress(OSError):
                        file.close()
                self._remove(names=error is not None)
        except BaseException:  # an interrupt: before it was held back, or meanwhile
            self._remove(names=True)
            raise
        if isinstance(error, OSError) and not isinstance(error, SystemRefusalError):
            reason = error.strerror or str(error)
            raise SystemRefusalError(error.errno, f"cannot write: {reason}", str(self.output)) from error

    def _remove(self, *, names: bool) -> None:
        """Remove the temporaries; and `names` that were given, unless another run has taken one since."""
        for temporary in self._temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink()
        for final, ours in self._moved if names else ():
            with contextlib.suppress(OSError):
                if os.path.samestat(final.lstat(), ours):
                    final.unlink()


def _move_to_free_name(temporary: Path, final: Path) -> None:
    exists = f"the output {final} exists; name another one, or add --overwrite"
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise UsageError(exists) from None
    except OSError:  # a file system without hard links
        if final.exists():
            raise UsageError(exists) from None
        temporary.replace(final)


class _Upload(Publication):
    """Files that grow in a temporary folder, and are uploaded once all of them are complete."""

    def __init__(self, target: RemotePath, *, overwrite: bool) -> None:
        self._target = target
        self._replace = overwrite
        self._folder = TemporaryDirectory(prefix="swa-avg-")
        super().__init__(Path(self._folder.name, target.name), overwrite=False)

    def publish(self) -> None:
        super().publish()
        done: list[RemotePath] = []
        try:
            for _, file in self._files:
                target = self._target.with_name(file.name)
                upload(file, target, overwrite=self._replace and file == self.output)
                done.append(target)
        except BaseException:
            for target in done:
                target.remove()
            raise
        interrupts.ignore()

    def _settled(self) -> None:
        """Do nothing: the upload is still to come."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._folder.cleanup()


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
