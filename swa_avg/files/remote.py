"""Files that are named by URLs, such as `s3://bucket/run/ckpt_1.keras`, by way of fsspec.

fsspec is imported where the first URL is met, and not before.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

from swa_avg.errors import SwaAvgError, SystemRefusalError, UsageError, first_line

__all__ = ["CONNECTIONS", "RemotePath", "is_url", "limit", "service_errors", "upload", "version_of"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://")  # one letter would be a drive
CONNECTIONS = 10
"""Requests under way at a time; botocore keeps that many connections."""
_SECONDS = 45
"""Seconds that one request may take, retries included; a service that is up answers sooner."""
_UPLOADED = 8 * 2**20
_MOST_PARTS = 9_000  # S3 takes 10,000
# Where an object appears whole or not at all; elsewhere a file grows under its name during the upload.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}
_OBJECT_STORES = _BUCKETS | {"memory"}
# Keys of `info`, in one filesystem or another, whose values change when an object's contents do.
_VERSION = {
    "size", "etag", "lastmodified", "last_modified", "mtime", "modified", "updated", "created",
    "generation", "versionid", "version_id", "md5hash", "content_md5", "checksum", "blob_id",
}  # fmt: skip


def is_url(name: str) -> bool:
    """Tell whether a name is a URL rather than a path."""
    return _URL.match(name) is not None


class RemotePath:
    """A URL, with the part of `pathlib.Path` that checkpoints, their indices and outputs need.

    `copies` is a folder on this machine that files are copied to when they are opened; without one they are
    read in place.
    """

    def __init__(self, url: str, copies: Path | None = None) -> None:
        self.url = url
        self.copies = copies

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (self.url,)  # copies are on this machine alone

    @property
    def name(self) -> str:
        return self._unsigned.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder, with a slash at its end."""
        return RemotePath(self._unsigned.removesuffix(self.name), self.copies)

    @property
    def _unsigned(self) -> str:
        return self.url.partition("?")[0] if self.url.startswith("http") else self.url

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def __truediv__(self, name: str) -> RemotePath:
        first, _, rest = name.partition("/")
        copies = self.copies and self.copies / self.name  # which is empty behind a slash
        inside = RemotePath(self.url + ("" if self.is_dir() else "/") + first, copies)
        return inside / rest if rest else inside

    def absolute(self) -> RemotePath:
        return self

    def is_dir(self) -> bool:
        """Tell whether the URL is written as a folder's; the service is not asked."""
        return self.url.endswith("/")

    def exists(self) -> bool:
        try:
            self.info()
        except SystemRefusalError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def is_file(self) -> bool:
        return self.exists() and self.info().get("type", "file") == "file"

    def matches(self) -> list[RemotePath]:
        """Return the files whose URLs match this one, a shell pattern."""
        system, key = self.filesystem()
        start = self.url[: self.url.index("://") + 3]
        with service_errors(self.url):
            system.invalidate_cache()
            keys = system.glob(key, **limit(system))
        return [RemotePath(start + key.rpartition("://")[2]) for key in keys]  # over HTTP, keys are URLs

    def files(self) -> dict[str, RemotePath]:
        """Return every file in this folder, by its path inside it."""
        system, key = self.filesystem()
        with service_errors(self.url):
            system.invalidate_cache()
            start = key.rstrip("/") + "/"
            keys = system.find(key, **limit(system))
        return {key.removeprefix(start): self / key.removeprefix(start) for key in keys}

    def check_bucket(self) -> None:
        """Raise SystemRefusalError if the service says that the bucket of the object does not exist."""
        system, key = self.filesystem()
        with service_errors(self.url), contextlib.suppress(PermissionError):
            if _protocols(system) & _BUCKETS:
                system.info(key.split("/")[0], **limit(system))

    def remove(self) -> None:
        """Remove the object, if the service allows it."""
        with contextlib.suppress(Exception):
            system, key = self.filesystem()
            system.rm_file(key)

    def make_folder(self) -> None:
        """Make the folder of this name, and those above it, where the service has folders."""
        system, key = self.filesystem()
        if not _protocols(system) & _OBJECT_STORES:
            with service_errors(self.url):
                system.makedirs(key, exist_ok=True)

    def remove_folder(self) -> None:
        """Remove the folder of this name if it is empty, where the service has folders."""
        with contextlib.suppress(Exception):
            system, key = self.filesystem()
            system.rmdir(key)

    def info(self) -> Mapping[str, Any]:
        """Return the filesystem's current description of the object.

        Raises:
            SystemRefusalError: there is none (ENOENT), or the service did not answer or refused.
        """
        system, key = self.filesystem()
        with service_errors(self.url):
            system.invalidate_cache()
            return cast(Mapping[str, Any], system.info(key, **limit(system)))

    def identity(self) -> tuple[object, str]:
        """Return what is equal for two URLs of one object."""
        return self.filesystem()

    def filesystem(self) -> tuple[Any, str]:
        """Return the filesystem that the URL names, with what is configured for it, and the key in it.

        Raises:
            UsageError: a package is missing, or the protocol is not known.
        """
        try:
            import fsspec
        except ImportError:
            raise UsageError(f"{self.url} is a URL, which needs: pip install 'swa-avg[remote]'") from None
        try:
            with service_errors(self.url):
                return cast("tuple[Any, str]", fsspec.url_to_fs(self.url))
        except SystemRefusalError as error:
            if isinstance(error.__cause__, ImportError | ValueError):
                raise UsageError(f"{self.url}: {first_line(error.__cause__)}") from error.__cause__
            raise


def upload(source: Path, target: RemotePath, *, overwrite: bool) -> None:
    """Upload a complete local file such that it is visible whole or not at all.

    Raises:
        UsageError: there is an object of that name, and it may not be replaced.
        SystemRefusalError: the service did not answer or refused.
    """
    exists = UsageError(f"the output {target} exists; name another one, or overwrite it")
    if not overwrite and target.exists():
        raise exists
    system, key = target.filesystem()
    with service_errors(target.url):
        if _protocols(system) & _OBJECT_STORES:
            try:
                _put(system, source, key, "overwrite" if overwrite else "create")
            except FileExistsError:
                raise exists from None
            return
        folder, _, name = key.rpartition("/")
        temporary = f"{folder}/.{name}.{os.urandom(6).hex()}.tmp"
        try:
            _put(system, source, temporary, "overwrite")
            system.mv(temporary, key)
        except BaseException:
            target.with_name(temporary.rpartition("/")[2]).remove()
            raise


def _put(system: Any, source: Path, key: str, mode: str) -> None:
    """Upload with the filesystem's own method: in small parts, and with a `mode` where it knows one."""
    wanted = {
        "mode": mode,
        "chunksize": max(_UPLOADED, source.stat().st_size // _MOST_PARTS),
        "max_concurrency": 4,
    }
    known = inspect.signature(getattr(system, "_put_file", system.put_file)).parameters
    system.put_file(str(source), key, **{name: value for name, value in wanted.items() if name in known})


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def version_of(info: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return what the service says of the object's contents: size, and date, ETag or generation."""
    return tuple(sorted((key, str(value)) for key, value in info.items() if key.lower() in _VERSION))


def limit(system: Any) -> dict[str, int]:
    """Return the keyword that ends a call in time, where the filesystem has one."""
    return {"timeout": _SECONDS} if getattr(system, "async_impl", False) else {}


@contextmanager
def service_errors(url: str) -> Iterator[None]:
    """Turn whatever a filesystem raises, from many libraries, into one line that names the URL."""
    try:
        yield
    except (SwaAvgError, MemoryError, FileExistsError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # over HTTP, fsspec raises this for every failure
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) != 404:
            raise SystemRefusalError(errno.EIO, first_line(cause or error), url) from error
        raise SystemRefusalError(errno.ENOENT, "no such file or bucket", url) from error
    except PermissionError as error:
        reason = f"access denied ({first_line(error)}); check the credentials, and what they allow"
        raise SystemRefusalError(errno.EACCES, reason, url) from error
    except Exception as error:
        if type(error).__name__ in ("TimeoutError", "FSTimeoutError"):  # whatever class they derive from
            raise SystemRefusalError(errno.ETIMEDOUT, "the service does not answer", url) from error
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise SystemRefusalError(number, first_line(error), url) from error
