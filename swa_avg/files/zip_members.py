"""Zip archives that may be hostile: where a member's bytes lie."""

from __future__ import annotations

import struct
import zipfile
import zlib

from swa_avg.errors import UnreadableError
from swa_avg.files.region import Region

__all__ = ["ENCRYPTED", "ZIP_ERRORS", "data_offset"]

ENCRYPTED = 0x1
"""Flag of an encrypted member."""
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,
    OverflowError,
    EOFError,
    RuntimeError,
    ValueError,
)
"""What zipfile raises for a damaged archive."""
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


def data_offset(whole: Region, info: zipfile.ZipInfo) -> int:
    """Return where a member's data start, after checking its local header against the directory.

    Raises:
        UnreadableError: the two disagree.
    """
    header = whole.read(info.header_offset, _LOCAL_HEADER.size)
    signature, _, flags, method, _, _, _, packed, size, name_length, extra_length = _LOCAL_HEADER.unpack(
        header
    )
    name = whole.read(info.header_offset + _LOCAL_HEADER.size, name_length)
    sizes_agree = {packed, size} <= {info.file_size, 0xFFFFFFFF} or flags & 0x8
    if signature != b"PK\x03\x04" or method != info.compress_type or flags & ENCRYPTED or not sizes_agree:
        raise UnreadableError(
            whole.path, "has a local header that differs from the directory", tensor=info.filename
        )
    if name.decode("utf-8" if flags & 0x800 else "cp437") != info.orig_filename:
        raise UnreadableError(whole.path, "is named differently in its local header", tensor=info.filename)
    return int(info.header_offset + _LOCAL_HEADER.size + name_length + extra_length)
