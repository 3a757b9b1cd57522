"""Arrays on disk -> rows: `.npy` and `.npz`, read by rows at their places, never whole and never
unpickled."""

from __future__ import annotations

import errno
import io
import math
import tempfile
import tokenize
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from swa_avg.data.rows import FileRows, Rows, describe, disk_full_named
from swa_avg.errors import SystemRefusalError, UnreadableError
from swa_avg.files.region import Region, RegionFile
from swa_avg.files.sources import LocalSource, open_source
from swa_avg.files.zip_members import ENCRYPTED, ZIP_ERRORS, data_offset

__all__ = ["ArrayFile", "Stored", "open_arrays"]

_HEADER_BYTES = 12 + 10_000  # NumPy refuses a longer header, and that of numbers takes about a hundred
_MAX_MEMBERS = 20_000
_MAX_RATIO = 500
"""Deflate reaches 1,032 to 1 on zeros; data that a model was trained on stay far below."""
_RATIO_MATTERS = 2**26
_CHUNK = 2**20
_TRANSPOSED = 2**24
_MAX_DIMENSIONS = 64  # of NumPy
_HEADER_ERRORS = (  # what NumPy raises for a damaged header
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    SyntaxError,
    tokenize.TokenError,
    MemoryError,
    RecursionError,
    OverflowError,
)


@dataclass(frozen=True)
class Stored:
    """One array of a file, known by its header."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    open: Callable[[bool], Rows]
    """Check what the header says against what is there, and return the rows; True: all of them will be
    read."""

    def __str__(self) -> str:
        return f"{self.key} {describe(self.dtype, self.shape)}"


@dataclass(frozen=True)
class _Unusable:
    """A member that is no array of numbers: an error only where it is the one that is used."""

    key: str
    error: UnreadableError

    def open(self, whole: bool) -> Rows:
        raise self.error

    def __str__(self) -> str:
        return f"{self.key} (not an array of numbers)"


class ArrayFile:
    """An open `.npy` or `.npz`: key -> array, the key of a `.npy` being empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = Region(open_source(path))
        self._files: list[Region | IO[bytes]] = [self._whole]
        self.arrays: dict[str, Stored | _Unusable] = {}
        self.others: list[str] = []
        """What an archive holds besides numeric arrays: only named, never looked into."""

    def check_unchanged(self) -> None:
        """Raise UnreadableError if the file was written to since it was opened."""
        self._whole.check_unchanged()

    def close(self) -> None:
        """Close the file and what was spilled from it."""
        for file in self._files:
            file.close()

    def load(self) -> None:
        """Read the headers.

        Raises:
            UnreadableError: neither format, or damaged.
        """
        start = self._whole.read(0, min(_HEADER_BYTES, self._whole.size))
        if start.startswith(npy.MAGIC_PREFIX):
            stored = self._header("", start, self._whole.size)
            self.arrays[""] = stored(lambda whole: (self._whole, 0))
        elif start[:2] == b"PK":
            with self._damage_named(None):
                self._load_archive()
        else:
            problem = "expected a .npz or .npy file; found something else"
            raise UnreadableError(self.path, problem, hint="write one with numpy.savez(path, x=images)")

    def _load_archive(self) -> None:
        self._archive = zipfile.ZipFile(RegionFile(self._whole))
        infos = self._archive.infolist()
        if len(infos) > _MAX_MEMBERS:
            raise UnreadableError(self.path, f"holds more than {_MAX_MEMBERS} members")
        for info in infos:
            key = info.filename.removesuffix(".npy")
            if key in self.arrays or key in self.others:
                raise UnreadableError(self.path, "appears twice in the archive", tensor=key)
            if key == info.filename:
                self.others.append(key)
                continue
            if info.flag_bits & ENCRYPTED:
                raise UnreadableError(self.path, "is encrypted", tensor=key)
            self._add_member(key, info)

    def _add_member(self, key: str, info: zipfile.ZipInfo) -> None:
        with self._archive.open(info) as file:
            start = file.read(_HEADER_BYTES)
        try:
            stored = self._header(key, start, info.file_size)
        except UnreadableError as error:
            self.arrays[key] = _Unusable(key, error)
            return
        self.arrays[key] = stored(lambda whole: self._member(key, info, whole))

    def _header(
        self, key: str, data: bytes, size: int
    ) -> Callable[[Callable[[bool], tuple[Region, int]]], Stored]:
        """Parse the header that `data` starts with; what it declares must make up the `size` of the file."""
        dtype, shape, fortran, offset = _parse_header(self.path, key, data)
        expected = offset + math.prod(shape) * dtype.itemsize
        if expected != size:
            problem = f"declares {describe(dtype, shape)}: expected {expected} bytes, found {size}"
            raise UnreadableError(self.path, problem, tensor=key or None)

        def stored(place: Callable[[bool], tuple[Region, int]]) -> Stored:
            def rows(whole: bool) -> Rows:
                region, start = place(whole)
                if fortran and len(shape) > 1:
                    return self._transposed(FileRows(region, start + offset, shape, dtype))
                return FileRows(region, start + offset, shape, dtype)

            return Stored(key, shape, dtype, rows)

        return stored

    def _member(self, key: str, info: zipfile.ZipInfo, whole: bool) -> tuple[Region, int]:
        """Return where a member's bytes lie; a compressed one is spilled to a temporary file first."""
        with self._damage_named(key):
            if info.compress_type == zipfile.ZIP_STORED:
                start = data_offset(self._whole, info)
                if info.compress_size != info.file_size or start + info.file_size > self._archive.start_dir:
                    raise UnreadableError(self.path, "reaches beyond the archive", tensor=key)
                if whole:
                    self._check_sum(key, start, info)
                return self._whole, start
            if info.file_size > max(_RATIO_MATTERS, _MAX_RATIO * info.compress_size):
                found = f"{info.compress_size} bytes that inflate to {info.file_size}"
                problem = f"expected training data; found {found}"
                raise UnreadableError(self.path, problem, tensor=key)
            with self._archive.open(info) as source:
                return self._spill(iter(lambda: source.read(_CHUNK), b""), info.file_size, key), 0

    @contextmanager
    def _damage_named(self, key: str | None) -> Iterator[None]:
        try:
            yield
        except (*ZIP_ERRORS, SystemRefusalError) as error:
            # A damaged directory points anywhere, even to before the start of the file.
            refused = isinstance(error, SystemRefusalError) and error.errno != errno.EINVAL
            if refused or isinstance(error, UnreadableError):
                raise
            raise UnreadableError(self.path, f"damaged .npz archive ({error})", tensor=key) from error

    def _check_sum(self, key: str, start: int, info: zipfile.ZipInfo) -> None:
        if self._whole.checksum(start, start + info.file_size) != info.CRC:
            raise UnreadableError(self.path, "damaged: its CRC-32 is not the archive's", tensor=key)

    def _transposed(self, rows: FileRows) -> Rows:
        """Spill an array in Fortran order in C order: there, a row is scattered over the whole file."""
        count, columns = rows.shape[0], math.prod(rows.shape[1:])
        step = max(1, _TRANSPOSED // max(1, columns * rows.dtype.itemsize))

        def chunks() -> Iterator[bytes]:
            for start in range(0, count, step):
                size = min(step, count - start)
                block = np.empty((columns, size), rows.dtype)
                for column in range(columns):
                    place = rows.offset + (column * count + start) * rows.dtype.itemsize
                    rows.region.read_into(block[column].view(np.uint8).data, place)
                # A row's own elements come in Fortran order, too.
                shaped = block.T.reshape(size, *rows.shape[:0:-1])
                yield np.ascontiguousarray(shaped.transpose(0, *range(len(rows.shape) - 1, 0, -1))).tobytes()

        size = count * columns * rows.dtype.itemsize
        return FileRows(self._spill(chunks(), size, ""), 0, rows.shape, rows.dtype)

    def _spill(self, chunks: Iterator[bytes], size: int, key: str) -> Region:
        """Write to a temporary file without a name; it goes with this object, or with the process."""
        written = 0
        with disk_full_named(self.path):
            file = tempfile.TemporaryFile()  # noqa: SIM115
            self._files.append(file)
        for chunk in chunks:
            with disk_full_named(self.path):
                file.write(chunk)
            written += len(chunk)
        with disk_full_named(self.path):
            file.flush()
        if written != size:
            raise UnreadableError(self.path, f"expected {size} bytes, found {written}", tensor=key or None)
        return Region(LocalSource(self.path, file))


def open_arrays(path: Path) -> ArrayFile:
    """Open a `.npy` or `.npz` by its content.

    Raises:
        UnreadableError: it is missing, damaged, or of another format.
    """
    file = ArrayFile(path)
    try:
        file.load()
    except BaseException:
        file.close()
        raise
    return file


def _parse_header(path: Path, key: str, data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Return type, shape, whether in Fortran order, and where the values start; `data` is the file's start.

    Source: NumPy enhancement proposal 1, the .npy format, versions 1.0 to 3.0.
    """

    def refuse(problem: str, hint: str = "") -> UnreadableError:
        return UnreadableError(path, problem, tensor=key or None, hint=hint)

    file = io.BytesIO(data)
    try:
        version, _ = npy.read_magic(file)
    except ValueError:
        version = 0
    if version not in (1, 2, 3):
        raise refuse("expected an array in .npy format; found something else")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that Python 2 wrote it
            # Versions 2 and 3 differ in the encoding of field names only, and arrays of fields are refused.
            read = npy.read_array_header_1_0 if version == 1 else npy.read_array_header_2_0
            shape, fortran, dtype = read(file)
    except _HEADER_ERRORS as error:
        raise refuse("expected a .npy header; found a damaged or a very long one") from error
    if dtype.hasobject:
        raise refuse("expected numbers; found pickled objects, which are never read", "store a plain array")
    if (
        dtype.fields is not None
        or dtype.kind not in "fiubSU"
        or (dtype.kind in "fiub" and dtype.itemsize > 8)
    ):
        raise refuse(f"expected numbers; found {_type_name(dtype)}")
    if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise refuse("expected a shape; found sizes that no array has")
    return dtype, shape, fortran, file.tell()


def _type_name(dtype: np.dtype[Any]) -> str:
    """Return a type's name, shortened: structures can be of any length."""
    name = "a structure of fields" if dtype.fields is not None else str(dtype)
    return name if len(name) < 60 else name[:57] + "..."
