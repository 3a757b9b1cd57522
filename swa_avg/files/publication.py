"""The output files: all of them complete under their names, or none."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from swa_avg.errors import SystemRefusalError, UsageError, escape
from swa_avg.files.location import Location
from swa_avg.files.remote import RemotePath, upload
from swa_avg.files.temporary import temporary_folder
from swa_avg.interrupts import interrupts, interrupts_held

__all__ = ["Publication", "cannot_write", "check_output", "publication_at", "publish_file", "sync_folder"]

_WRITEBACK = 32 * 2**20
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE (renameat2(2))


def check_output(
    output: Location, *, overwrite: bool, is_folder_of_ours: Callable[[Location], bool] | None = None
) -> None:
    """See that `output` can be created, or replaced where that is allowed.

    `is_folder_of_ours` tells which folder may be replaced: one that holds nothing but such an output.

    Raises:
        UsageError: it cannot.
        SystemRefusalError: the system or a service says so: there is no such bucket, or the name is too long.
    """
    if isinstance(output, RemotePath):
        output.check_bucket()
    else:
        _check_path(output)
    if output.exists():
        is_folder = is_folder_of_ours is not None and not output.is_file() and is_folder_of_ours(output)
        if not is_folder and not output.is_file():
            raise UsageError(f"the output {output} exists and is not a regular file")
        if not overwrite:
            raise UsageError(f"the output {output} exists; name another one, or overwrite it")
        if output.suffix == ".json" or (is_folder and isinstance(output, RemotePath)):
            raise UsageError(
                f"the output {output} exists; several files cannot be replaced in one step: name another"
            )


def _check_path(output: Path) -> None:
    try:
        if stat.S_ISLNK(output.lstat().st_mode):
            raise UsageError(f"the output {output} is a symbolic link; name the file itself")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long
        raise SystemRefusalError(error.errno, str(error.strerror), str(output)) from error
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the output {escape(output)}: {error}") from error
    if not output.parent.is_dir():
        raise UsageError(f"the folder of the output does not exist: {output.parent}")


def publication_at(output: Location, *, overwrite: bool) -> Publication:
    """Return what publishes an output: its files grow beside it, or for a URL in a temporary folder."""
    if isinstance(output, RemotePath):
        return _Upload(output, overwrite=overwrite)
    return Publication(output, overwrite=overwrite)


def publish_file(output: Path, content: bytes, *, overwrite: bool) -> None:
    """Write one file, all or nothing; errors as for `Publication`."""
    with Publication(output, overwrite=overwrite) as publication:
        publication.create(output.name).write(content)
        publication.publish()


class _GrowingFile(io.BufferedRandom):
    """A file whose pages go to disk while it grows, so that the last fsync finds little to do."""

    _started = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        position = self.tell()
        if position - self._started >= _WRITEBACK and hasattr(os, "posix_fadvise"):
            # Despite its name, this advice drops no dirty page: it queues them for writing.
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
        self._temporaries: dict[Path, Path] = {}
        """Final path of a file or folder beside the output -> where it grows."""
        self._moved: list[tuple[Path, os.stat_result]] = []
        """Final names that were free and that we gave to what is ours, with its stat."""
        self._scratch: list[IO[bytes]] = []

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        final = self.output.parent / name
        outermost, _, inside = name.partition("/")
        # Before it exists: an interrupt may come between any two steps.
        temporary = self._temporaries.setdefault(self.output.with_name(outermost), self._hidden("tmp"))
        if inside:
            temporary /= inside
            temporary.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        file = _GrowingFile(io.FileIO(os.open(temporary, flags, 0o666), "r+b"))
        self._files.append((file, final))
        _reserve(file, size)
        return file

    def _hidden(self, suffix: str) -> Path:
        return self.output.with_name(f".{self.output.name}.{os.urandom(6).hex()}.{suffix}")

    def scratch(self) -> IO[bytes]:
        """Return a temporary file without a name in the output's folder."""
        import tempfile

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
        for temporary in self._temporaries.values():
            if temporary.is_dir():
                for folder in {path.parent for path in temporary.rglob("*")}:
                    sync_folder(folder)
        with interrupts_held():
            for final, temporary in self._temporaries.items():
                if self._overwrite and final == self.output:
                    self._replace(temporary, final)
                else:
                    ours = temporary.stat()
                    _move_to_free_name(temporary, final)
                    self._moved.append((final, ours))
            sync_folder(self.output.parent)
            self._settled()

    def _replace(self, temporary: Path, final: Path) -> None:
        """Give ours the name of the output; a folder that had it is removed on leaving.

        Where two folders cannot exchange their names, none has the output's for a moment, and the old one
        gets it back if ours cannot have it.
        """
        if not final.is_dir():
            temporary.replace(final)
            return
        if _exchange(temporary, final):
            return
        old = self._hidden("old")
        final.rename(old)
        try:
            temporary.rename(final)
        except BaseException:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)

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
            raise cannot_write(self.output, error) from error

    def _remove(self, *, names: bool) -> None:
        """Remove the temporaries, and with `names` the files that have theirs; not those of another run."""
        for temporary in self._temporaries.values():
            _delete(temporary)
        for final, ours in self._moved if names else ():
            with contextlib.suppress(OSError):
                if os.path.samestat(final.lstat(), ours):
                    _delete(final)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's names in one step; return False where the system cannot (Linux can)."""
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return False
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _move_to_free_name(temporary: Path, final: Path) -> None:
    exists = f"the output {final} exists; name another one, or overwrite it"
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise UsageError(exists) from None
    except OSError:  # a folder, or a file system without hard links
        if final.exists():
            raise UsageError(exists) from None
        temporary.replace(final)


class _Upload(Publication):
    """Files that grow in a temporary folder, and are uploaded once all of them are complete."""

    def __init__(self, target: RemotePath, *, overwrite: bool) -> None:
        self._target = target
        self._may_replace = overwrite
        self._stack = ExitStack()
        folder = self._stack.enter_context(temporary_folder())
        super().__init__(folder / target.name, overwrite=False)

    def publish(self) -> None:
        super().publish()
        done: list[RemotePath] = []
        folders: dict[RemotePath, None] = {}
        try:
            for _, file in self._files:
                inside = file.relative_to(self.output.parent)
                for folder in reversed(inside.parents[:-1]):
                    where = self._target.parent / folder.as_posix()
                    folders[where] = None
                    where.make_folder()
                target = self._target.parent / inside.as_posix()
                upload(file, target, overwrite=self._may_replace and file == self.output)
                done.append(target)
        except BaseException:
            for target in done:
                target.remove()
            for where in reversed(folders):
                where.remove_folder()
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
            self._stack.close()


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve `size` bytes on the disk, where the system can do that before they are written.

    Raises:
        OSError: the disk is full, or the file may not become that large.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise


def cannot_write(path: Path, error: OSError) -> SystemRefusalError:
    return SystemRefusalError(error.errno, f"cannot write: {error.strerror or error}", str(path))


def sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)
