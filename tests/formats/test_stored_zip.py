"""Archives that the standard library reads back."""

from __future__ import annotations

import io
import zipfile

import pytest

from swa_avg.formats import stored_zip
from swa_avg.formats.stored_zip import StoredZip

MEMBERS = {
    "metadata.json": b"{}",
    "assets/ünï.txt": b"text" * 1000,
    "model.weights.h5": bytes(70_000),
    "empty": b"",
}


def _write() -> io.BytesIO:
    buffer = io.BytesIO()
    archive = StoredZip(buffer)
    for name, data in MEMBERS.items():
        info = zipfile.ZipInfo(name, (2026, 11, 22, 13, 14, 16))
        info.external_attr, info.create_system = 0o600 << 16, 3
        archive.add(info, len(data), [data[start : start + 999] for start in range(0, len(data), 999)])
    archive.finish()
    return buffer


@pytest.mark.parametrize("limit", [0xFFFFFFFF, 3000, 10])
def test_members_read_back_with_and_without_zip64(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_zip, "_LIMIT", limit)
    with zipfile.ZipFile(_write()) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == MEMBERS
        for info in archive.infolist():
            assert info.date_time == (2026, 11, 22, 13, 14, 16)
            assert (info.external_attr, info.create_system) == (0o600 << 16, 3)


def test_bytes_are_those_of_zipfile() -> None:
    expected = io.BytesIO()
    with zipfile.ZipFile(expected, "w") as archive:
        for name, data in MEMBERS.items():
            info = zipfile.ZipInfo(name, (2026, 11, 22, 13, 14, 16))
            info.external_attr, info.create_system = 0o600 << 16, 3
            archive.writestr(info, data)
    assert _write().getvalue() == expected.getvalue()


def test_a_member_of_another_size_is_a_bug() -> None:
    with pytest.raises(ValueError, match="a: 1 bytes instead of 2"):
        StoredZip(io.BytesIO()).add(zipfile.ZipInfo("a"), 2, [b"x"])
