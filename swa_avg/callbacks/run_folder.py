"""The folder of a training run: checkpoints that appear complete, and the index that names them."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from swa_avg.callbacks.ownership import SUFFIXES, fingerprint, why_not_ours
from swa_avg.errors import SwaAvgError, SystemRefusalError
from swa_avg.files.publication import cannot_write, sync_folder
from swa_avg.inputs.index import INDEX_NAME, Entry, Index, index_as_json, read_index
from swa_avg.text import first_few

__all__ = ["RunFolder", "prepare_folder", "published", "write_index"]

_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


def write_index(path: Path, index: Index) -> None:
    """Write the index, all or nothing: a temporary beside it takes its name once it is on disk.

    Raises:
        SystemRefusalError: disk full, permission denied, input/output error.
    """
    with published(path) as temporary:
        temporary.write_text(index_as_json(index), "utf-8")


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Give a temporary beside `path` that takes its name when the block ends well, and goes otherwise.

    For writers that want a path, not a file: the temporary's name keeps the suffix.

    Raises:
        SystemRefusalError: the block, or what follows it, met an error of the operating system.
    """
    temporary = path.with_name(f"{_own_prefix()}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None or isinstance(error, SystemRefusalError):
            raise
        raise cannot_write(path, refusal) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def prepare_folder(path: Path) -> None:
    """Create a folder where there is none, and try, before hours of training, whether it can be written to.

    Raises:
        SystemRefusalError: it cannot be created, or cannot be written to.
    """
    probe = path / f"{_own_prefix()}{secrets.token_hex(4)}-probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise SystemRefusalError(
            error.errno, f"cannot write into this folder: {reason}", str(path)
        ) from error


class RunFolder:
    """The folder that one training run saves checkpoints in."""

    def __init__(self, path: Path, keep_last: int | None, keep_best: int | None, *, by_step: bool) -> None:
        self.path = path
        self.first_epoch = 0
        """0-based index of the first epoch that this run trains: what it trains again, it replaces."""
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._by_step = by_step
        self._earlier: set[str] = set()
        self._own: dict[str, str] = {}
        """The files that this run has written -> their fingerprints."""
        self._foreign: set[str] = set()
        self._told: set[str] = set()

    @property
    def index_path(self) -> Path:
        return self.path / INDEX_NAME

    def open(self) -> list[str]:
        """Make the folder ready for a run, and return warnings.

        Raises:
            SystemRefusalError: it cannot be created or written to.
            UnreadableError: it holds an index that cannot be read.
        """
        prepare_folder(self.path)
        self._remove_stale()
        index, warnings = self._read()
        self._earlier = {entry.file for entry in index.entries}
        self._own, self._foreign, self._told = {}, set(), set()
        return warnings

    def place(self, name: str) -> tuple[Path, list[str]]:
        """Return the path under which a file may be saved as `name`, and warnings.

        That is another one, such as `ckpt_0001-again.keras`, where the name is taken by a file that this tool
        is not known to have written: hours of training must not end for a name, and no such file is replaced.
        """
        path = self.path / name
        reason = self.why_taken(name)
        if reason is None:
            return path, []
        suffix = next(suffix for suffix in SUFFIXES if name.endswith(suffix))
        stem = name.removesuffix(suffix)
        others = (f"{stem}-again{'' if number == 1 else number}{suffix}" for number in count(1))
        other = self.path / next(other for other in others if self.why_taken(other) is None)
        return other, self._once(reason, f"{path} is not replaced, since {reason}; saved as {other.name}")

    def why_taken(self, name: str) -> str | None:
        """Return why no file may be saved as `name`; None if none is there, or one that this tool wrote."""
        path = self.path / name
        if not os.path.lexists(path):
            return None
        index, _ = self._read()
        known = {**index.averages, **{entry.file: entry.fingerprint for entry in index.entries}}
        return why_not_ours(path, known.get(name))

    def record(self, entry: Entry, monitor: str | None, mode: str | None) -> list[str]:
        """Add a file that is in place to the index, then delete what need not be kept; return warnings.

        The index never names a file that is not there: it is written before any file goes.
        """
        index, warnings = self._read()
        foreign = {e.file for e in index.entries} - self._earlier - self._own.keys() - self._foreign
        if foreign:
            self._foreign |= foreign
            warnings.append(f"another run saves in {self.path} too; give each run a folder of its own")
        entry = replace(entry, fingerprint=_fingerprint(self.path / entry.file))
        self._own[entry.file] = entry.fingerprint
        again = [
            e
            for e in index.entries
            if e.file in self._earlier - self._own.keys() and self._trained_again(e, entry)
        ]
        replaced = {e.file for e in again if e.epoch == entry.epoch and not self._by_step}
        replaced |= {e.file for e in index.entries if e.position == entry.position} - {entry.file}
        left = sorted({e.file for e in again} - replaced)
        if left:
            warnings.append(
                f"{self.path}: {len(left)} checkpoints of an earlier run of these epochs left the index "
                f"but stay on disk ({first_few(left, 3)}); move them away before you average by pattern"
            )
        gone = [e for e in index.entries if e.file in replaced]
        index = replace(index, monitor=monitor, mode=mode).without({*left, *replaced}).with_entry(entry)
        pruned = index.pruned(self._keep_last, self._keep_best, entry)
        write_index(self.index_path, pruned)
        gone.extend(e for e in index.entries if e not in pruned.entries)
        return warnings + self._delete(gone)

    def record_average(self, path: Path) -> None:
        """Note in the index that this tool wrote the average at `path`."""
        index, _ = self._read()
        averages = {**index.averages, path.name: _fingerprint(path)}
        write_index(self.index_path, replace(index, averages=averages))

    def entries(self) -> tuple[Entry, ...]:
        """Return what the index names and is there, in training order."""
        return self._read()[0].entries

    def forget(self, entries: Sequence[Entry]) -> list[str]:
        """Take entries out of the index, and then delete their files; return warnings."""
        index, warnings = self._read()
        write_index(self.index_path, index.without({entry.file for entry in entries}))
        return warnings + self._delete(entries)

    def _trained_again(self, old: Entry, new: Entry) -> bool:
        passed = old.position <= new.position if self._by_step else old.epoch <= new.epoch
        return self.first_epoch < old.epoch and passed

    def _read(self) -> tuple[Index, list[str]]:
        """Read the index anew, since another run may write it, and drop what is no longer there."""
        if not self.index_path.exists():
            return Index(), []
        index = read_index(self.index_path)
        missing = {e.file for e in index.entries if not (self.path / e.file).is_file()}
        warnings = [f"{self.path / file} is gone; it leaves the index" for file in sorted(missing)]
        return index.without(missing), warnings

    def _delete(self, entries: Iterable[Entry]) -> list[str]:
        """Delete those files that this tool wrote, leave any other, and return warnings."""
        warnings = []
        left: dict[str, list[str]] = {}
        for entry in sorted(entries, key=lambda e: e.file):
            path = self.path / entry.file
            if not os.path.lexists(path):
                continue
            written = self._own.get(entry.file) == entry.fingerprint
            reason = why_not_ours(path, entry.fingerprint, written=written)
            if reason is not None:
                left.setdefault(reason, []).append(entry.file)
                continue
            try:
                path.unlink()
            except OSError as error:
                warnings.append(f"{path} cannot be deleted: {error.strerror or error}")
        for reason, files in left.items():
            said = f"{self.path}: {first_few(files, 3)} left the index, but stayed on disk: {reason}"
            warnings.extend(self._once(reason, said))
        return warnings

    def _once(self, reason: str, warning: str) -> list[str]:
        """Return the warning the first time that it is given for this reason."""
        if reason in self._told:
            return []
        self._told.add(reason)
        return [warning]

    def _remove_stale(self) -> None:
        """Remove temporaries of runs on this machine that no longer live: of a killed one, say."""
        for path in self.path.glob(f".tmp-{_host()}-*"):
            match = re.match(r"([0-9]+)-[0-9a-f]{8}-", path.name.removeprefix(f".tmp-{_host()}-"))
            if match and not _alive(int(match.group(1))):
                with suppress(OSError):
                    path.unlink()


def _fingerprint(path: Path) -> str:
    """Return the fingerprint of a file that was just saved; none if another program took it away already."""
    try:
        return fingerprint(path)
    except SwaAvgError:
        return ""


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", platform.node())[:20] or "local"


def _own_prefix() -> str:
    return f".tmp-{_host()}-{os.getpid()}-"


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere, asking might end the process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _refusal(error: BaseException) -> OSError | None:
    """Return the system's error: this one, or a full disk behind it, since closing a file may add another."""
    if isinstance(error, OSError):
        return error
    hidden = error.__cause__ or error.__context__
    while hidden is not None:
        if isinstance(hidden, OSError) and hidden.errno in _FULL:
            return hidden
        hidden = hidden.__cause__ or hidden.__context__
    return None
