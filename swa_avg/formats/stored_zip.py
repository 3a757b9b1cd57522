"""Write a zip archive of stored members, in one pass.

The standard library's zipfile computes CRC-32 with zlib, which is six times slower than isal and takes as
long as the rest of writing an archive. Only what stored members need is written here (APPNOTE 6.3.10,
sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16 and 4.5.3).
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from typing import IO

from isal.isal_zlib import crc32

from swa_avg.formats.base import Buffer, check_written, write_chunks

__all__ = ["StoredZip"]

_ELSEWHERE = 0xFFFFFFFF  # in place of a size or offset that is in a zip64 field
_LIMIT = _ELSEWHERE
_UTF8 = 0x800
_ZIP64_VERSION, _PLAIN_VERSION = 45, 20


class StoredZip:
    """A zip archive that grows at the end of an empty file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self._directory: list[bytes] = []
        self._written: list[tuple[int, int, int]] = []
        """Start, size and CRC-32 of each run of bytes."""

    def add(self, like: zipfile.ZipInfo, size: int, chunks: Iterable[Buffer]) -> None:
        """Append a member of `size` bytes, with the name, date and attributes of `like`.

        Raises:
            ValueError: the chunks do not add up to `size`.
        """
        name = like.filename.encode()
        zip64 = size >= _LIMIT
        start = self._position
        self._write(self._local_header(like, name, 0, size, zip64))
        written, checksum = write_chunks(self._file, chunks)
        self._position += written
        if written != size:
            raise ValueError(f"{like.filename}: {written} bytes instead of {size}")
        header = self._local_header(like, name, checksum, size, zip64)
        self._file.seek(start)
        self._file.write(header)
        self._file.seek(self._position)
        self._written.append((start, len(header), crc32(header)))
        self._written.append((start + len(header), size, checksum))
        self._directory.append(_directory_entry(like, name, checksum, size, start))

    def finish(self) -> None:
        """Write the central directory, and check that everything reads back.

        Raises:
            OSError: it does not.
        """
        start, count = self._position, len(self._directory)
        directory = b"".join(self._directory)
        size = len(directory)
        if start >= _LIMIT or count >= 0xFFFF:
            version = _ZIP64_VERSION
            record = struct.pack(
                "<4sQ2H2I4Q", b"PK\x06\x06", 44, version, version, 0, 0, count, count, size, start
            )
            directory += record + struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
        shown = min(count, 0xFFFF)
        directory += struct.pack(
            "<4s4H2IH", b"PK\x05\x06", 0, 0, shown, shown, _short(size), _short(start), 0
        )
        self._write(directory)
        for run in (*self._written, (start, len(directory), crc32(directory))):
            check_written(self._file, *run)

    def _write(self, data: Buffer) -> None:
        self._file.write(data)
        self._position += len(data)

    @staticmethod
    def _local_header(like: zipfile.ZipInfo, name: bytes, checksum: int, size: int, zip64: bool) -> bytes:
        extra = struct.pack("<2H2Q", 1, 16, size, size) if zip64 else b""
        shown = _short(size)
        version = _ZIP64_VERSION if zip64 else _PLAIN_VERSION
        return (
            struct.pack(
                "<4s5H3I2H",
                b"PK\x03\x04",
                version,
                _flags(name),
                zipfile.ZIP_STORED,
                *_dos_time(like),
                checksum,
                shown,
                shown,
                len(name),
                len(extra),
            )
            + name
            + extra
        )


def _directory_entry(like: zipfile.ZipInfo, name: bytes, checksum: int, size: int, start: int) -> bytes:
    large = [value for value in (size, size, start) if value >= _LIMIT]
    extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = _ZIP64_VERSION if large else _PLAIN_VERSION
    return (
        struct.pack(
            "<4s2B5H3I5H2I",
            b"PK\x01\x02",
            version,
            like.create_system,
            version,
            _flags(name),
            zipfile.ZIP_STORED,
            *_dos_time(like),
            checksum,
            _short(size),
            _short(size),
            len(name),
            len(extra),
            0,
            0,
            like.internal_attr,
            like.external_attr,
            _short(start),
        )
        + name
        + extra
    )


def _short(value: int) -> int:
    return value if value < _LIMIT else _ELSEWHERE


def _flags(name: bytes) -> int:
    return 0 if name.isascii() else _UTF8


def _dos_time(like: zipfile.ZipInfo) -> tuple[int, int]:
    year, month, day, hour, minute, second = like.date_time
    return hour << 11 | minute << 5 | second // 2, (year - 1980) << 9 | month << 5 | day
