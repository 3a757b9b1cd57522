"""`.keras` archives that lie, and JSON that is meant to hurt."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import Case, check_bounds, check_refused, parameters
from isolated import Isolated

import makers

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

ARRAYS = makers.weights()
WEIGHTS = "model.weights.h5"
DIFFERS = "has a local header that differs from the directory"
DAMAGED = r"damaged \.keras archive \(.+\)"


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


def _good(path: Path) -> None:
    makers.write_archive(path, makers.weights(len(path.name)))


def _members(**members: bytes) -> Callable[[Path], object]:
    return lambda path: makers.write_archive(path, ARRAYS, **members)


def _archive(edit: Callable[[zipfile.ZipFile], object]) -> Callable[[Path], None]:
    """Return a builder: a good archive with more in it."""

    def build(path: Path) -> None:
        _good(path)
        with zipfile.ZipFile(path, "a") as archive:
            edit(archive)

    return build


def _patched(patch: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        _good(path)
        data = bytearray(path.read_bytes())
        patch(data)
        path.write_bytes(data)

    return build


def _entry(data: bytes, name: str) -> int:
    """Return where a member's entry in the central directory starts."""
    return data.rindex(name.encode()) - 46


def _local(data: bytes, name: str) -> int:
    return struct.unpack_from("<I", data, _entry(data, name) + 42)[0]


def _central(name: str, offset: int, form: str, value: int) -> Callable[[Path], None]:
    return _patched(lambda data: struct.pack_into(form, data, _entry(data, name) + offset, value))


def _local_field(name: str, offset: int, form: str, value: int) -> Callable[[Path], None]:
    return _patched(lambda data: struct.pack_into(form, data, _local(data, name) + offset, value))


def _info(name: str, **settings: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    for key, value in settings.items():
        setattr(info, key, value)
    return info


def _duplicate(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        _archive(lambda archive: archive.writestr("config.json", b"{}"))(path)


def _overlap(data: bytearray) -> None:
    """Make config.json start where metadata.json does, with a name to fit."""
    position = _entry(data, "config.json")
    struct.pack_into("<I", data, position + 42, _local(data, "metadata.json"))


def _bomb(path: Path) -> None:
    """Write weights of 1.5 GB of zeros, deflated, that declare a thousand bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    makers.write_archive(path, ARRAYS, **{WEIGHTS: zeros * 96 + packer.flush()})
    data = bytearray(path.read_bytes())
    entry, local = _entry(data, WEIGHTS), _local(data, WEIGHTS)
    for method, size in ((entry + 10, entry + 24), (local + 8, local + 22)):
        struct.pack_into("<H", data, method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", data, size, 1000)
    path.write_bytes(data)


def _many(archive: zipfile.ZipFile) -> None:
    for number in range(60_000):
        archive.writestr(_info(f"assets/{number}"), b"")


def _zip64(path: Path) -> None:
    """Write an archive whose zip64 locator leads nowhere."""
    _good(path)
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    size, start = struct.unpack_from("<2I", data, end + 12)
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 2**40, 1)
    broken = data[end : end + 8] + b"\xff" * 12 + data[end + 20 :]
    path.write_bytes(data[:end] + record[:-8] + struct.pack("<Q", 2**40) + locator + broken)


def _member_bomb(path: Path) -> None:
    makers.write_archive(path, ARRAYS, **{"config.json": b'{"a": "' + b"x" * (65 * 2**20) + b'"}'})


def _json(data: bytes | str) -> Callable[[Path], object]:
    return _members(**{"config.json": data.encode() if isinstance(data, str) else data})


INVALID = r"config\.json is not valid JSON"
CASES = [
    Case(
        "empty archive",
        lambda path: zipfile.ZipFile(path, "w").close(),
        r"not a \.keras archive with HDF5 weights: no model\.weights\.h5, config\.json, metadata\.json",
    ),
    Case(
        "no weights",
        lambda path: _without(path, WEIGHTS),
        r"not a \.keras archive with HDF5 weights: no model\.weights\.h5",
    ),
    Case(
        "weights of NumPy",
        lambda path: _without(path, WEIGHTS, "model.weights.npz"),
        r"not a \.keras archive with HDF5 weights: no model\.weights\.h5",
    ),
    Case("empty weights", _members(**{WEIGHTS: b""}), "not an HDF5 file"),
    Case(
        "truncated weights",
        _members(**{WEIGHTS: makers.store_bytes(ARRAYS)[:-500]}),
        r".*damaged HDF5 file \(.*\)",
    ),
    Case("duplicate member", _duplicate, r"config\.json: appears twice in the archive"),
    Case(
        "overlapping members",
        _patched(_overlap),
        rf"config\.json: {DIFFERS}",
    ),
    Case(
        "other local name",
        _patched(lambda data: data.__setitem__(_local(data, "config.json") + 30, ord("k"))),
        r"config\.json: is named differently in its local header",
    ),
    Case(
        "bad CRC of config.json",
        _patched(lambda data: data.__setitem__(_local(data, "config.json") + 45, 32)),
        DAMAGED,
    ),
    Case(
        "bad CRC of the weights",
        _central(WEIGHTS, 16, "<I", 0xABCD),
        r"damaged: its CRC-32 is [0-9a-f]{8}, the archive says 0000abcd; leave this file out, or restore it",
    ),
    Case(
        "deflated bomb",
        _bomb,
        rf"{WEIGHTS}: is compressed; Keras stores it plain; save it again with Keras, or zip it with: zip -0",
    ),
    Case(
        "compressed size beyond the end",
        _central(WEIGHTS, 20, "<I", 0xFFFFFFFE),
        rf"{WEIGHTS}: is compressed; .*",
    ),
    Case(
        "sizes beyond the end",
        _patched(
            lambda data: struct.pack_into("<2I", data, _entry(data, WEIGHTS) + 20, 0xFFFFFFFE, 0xFFFFFFFE)
        ),
        rf"{WEIGHTS}: {DIFFERS}",
    ),
    Case("local size", _local_field(WEIGHTS, 22, "<I", 1000), rf"{WEIGHTS}: {DIFFERS}"),
    Case("encrypted", _central(WEIGHTS, 8, "<H", 1), rf"{WEIGHTS}: is encrypted"),
    Case("encrypted locally", _local_field(WEIGHTS, 6, "<H", 1), rf"{WEIGHTS}: {DIFFERS}"),
    Case("method 99", _central(WEIGHTS, 10, "<H", 99), rf"{WEIGHTS}: is compressed; .*"),
    Case("method 99 locally", _local_field(WEIGHTS, 8, "<H", 99), rf"{WEIGHTS}: {DIFFERS}"),
    Case(
        "offset beyond the end",
        _central(WEIGHTS, 42, "<I", 0x7FFFFFFF),
        "bytes from 2147483647 on were to be read, which lie outside the file",
    ),
    *(
        Case(
            f"member {name}",
            _archive(lambda archive, name=name: archive.writestr(_info(name), b"x")),
            f"{shown}: has a name that leaves the archive",
        )
        for name, shown in {
            "../x": r"\.\./x",
            "/abs": "/abs",
            "a\\b": r"a\\b",
            "assets/../../x": r"assets/\.\./\.\./x",
        }.items()
    ),
    Case(
        "symbolic link",
        _archive(
            lambda archive: archive.writestr(
                _info("assets/link", create_system=3, external_attr=0o120777 << 16), b"/etc/passwd"
            )
        ),
        "assets/link: is a symbolic link",
    ),
    Case("60,000 members", _archive(_many), "holds more than 20000 members"),
    Case("zip64 locator", _zip64, r"bytes from -?\d+ on were to be read, which lie outside the file"),
    Case("70 kB of trailing junk", _patched(lambda data: data.extend(bytes(70_000))), DAMAGED),
    Case("cut", _patched(lambda data: data.__delitem__(slice(-30, None))), DAMAGED),
    Case(
        "assets with a bad CRC",
        _archive(lambda archive: archive.writestr(_info("assets/a.txt"), b"text")),
        "",
        code=0,
    ),
    Case("brackets", _json("[" * 100_000), rf"{INVALID} \(nested more than 200 deep\)"),
    Case("brackets in an object", _json('{"a":' * 100_000), rf"{INVALID} \(nested more than 200 deep\)"),
    Case("digits", _json('{"a": ' + "9" * 5000 + "}"), rf"{INVALID} \(an integer has too many digits\)"),
    Case("NaN", _json('{"a": NaN}'), rf"{INVALID} \(it holds NaN\)"),
    Case("duplicate keys", _json('{"a": 1, "a": 2}'), rf"{INVALID} \(a key appears twice\)"),
    Case("not UTF-8", _json(b'{"a": "\xff"}'), rf"{INVALID} \(.*codec can't decode byte.*\)"),
    Case("UTF-16", _json('{"a": 1}'.encode("utf-16").decode("latin-1")), rf"{INVALID} \(.*\)"),
    Case("not an object", _json("[]"), r"config\.json is not a JSON object"),
    Case("escaped quotes", _json(b'"' + rb"\"" * 2**22), rf"{INVALID} \(.*\)"),
    Case(
        "values",
        _json("{" + '"a":[' + "[]," * 2**22 + "[]]}"),
        r"config\.json is larger than 64 MiB or 2000000 values",
    ),
    Case("a config.json of 65 MiB", _member_bomb, r"config\.json: is larger than 64 MiB"),
    Case("metadata.json", _members(**{"metadata.json": b"{"}), r"metadata\.json is not valid JSON \(.*\)"),
]


def _without(path: Path, name: str, instead: str | None = None) -> None:
    _good(path)
    with zipfile.ZipFile(path) as archive:
        kept = {n: archive.read(n) for n in archive.namelist()}
    data = kept.pop(name)
    if instead:
        kept[instead] = data
    with zipfile.ZipFile(path, "w") as archive:
        for member, contents in kept.items():
            archive.writestr(member, contents)


@parameters([case for case in CASES if case.code == 3])
def test_a_hostile_archive_is_refused(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    check_refused(isolated, tmp_path, case, _good, ".keras")


def test_a_damaged_asset_of_the_newest_is_refused(isolated: Isolated, tmp_path: Path) -> None:
    from cases import check_line, snapshot

    makers.write_archive(tmp_path / "a_1.keras", ARRAYS, **{"assets/a\n.txt": b"vocabulary"})
    data = bytearray((tmp_path / "a_1.keras").read_bytes())
    data[data.index(b"vocabulary")] ^= 1
    (tmp_path / "a_1.keras").write_bytes(data)
    before = snapshot(tmp_path)
    ended = isolated.run(["a_1.keras", "-o", "swa.keras"], tmp_path)
    check_line(
        ended, 3, r"a_1\.keras: assets/a\\n\.txt: is damaged \(Bad CRC-32 for file 'assets/a\\n\.txt'\)"
    )
    assert snapshot(tmp_path) == before


def test_an_archive_that_is_hdf5_too_is_read_as_what_it_starts_with(
    isolated: Isolated, tmp_path: Path
) -> None:
    """A file of two formats says two things; which of them counts does not depend on its name."""
    import oracle

    makers.write_weights(tmp_path / "a_1.keras", ARRAYS)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(WEIGHTS, makers.store_bytes(makers.weights(5)))
        archive.writestr("config.json", json.dumps(makers.config()))
        archive.writestr("metadata.json", "{}")
    with (tmp_path / "a_1.keras").open("ab") as file:
        file.write(other.getvalue())
    ended = isolated.run(["a_1.keras", "-q", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    assert {name: value.tobytes() for name, value in written.items()} == {
        name: value.tobytes() for name, value in ARRAYS.items()
    }
