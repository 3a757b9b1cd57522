"""String attributes, read from the bytes, against h5py; and damage, which must never crash or hang."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_avg.files.region import Region
from swa_avg.files.sources import open_source
from swa_avg.formats.hdf5.messages import AttributeReader, DamagedStructureError
from swa_avg.formats.hdf5.objects import NewerStructureError, Structures


def _region(path: Path) -> Region:
    return Region(open_source(path))


def _root(region: Region) -> tuple[bytes, ...]:
    """Return the attribute messages of the root."""
    structures = Structures(region)
    return structures.attributes(structures.messages(structures.root))


@pytest.mark.parametrize(
    "value",
    [
        "text",
        "ünï ☃",
        "",
        b"bytes",
        np.bytes_(b"fixed"),
        [b"a", b"bb", b""],
        ["one", "two"],
        np.array([], dtype="S3"),
        np.array([], dtype=np.float64),
        "x" * 50_000,
    ],
    ids=repr,
)
def test_strings_are_those_that_h5py_wrote(value: object, tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["before"] = np.arange(10)
        file.attrs["it"] = value
        for number in range(20):
            file.attrs[f"after{number}"] = "filler" * number
    flat = np.asarray(value).reshape(-1).tolist()
    expected = [item.encode() if isinstance(item, str) else item for item in flat]
    region = _region(path)
    assert AttributeReader(region).strings(_root(region), ["it", "absent"]) == {"it": expected}
    region.close()


def test_parts_of_a_long_attribute_are_joined_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    names = [f"layer_{number}".encode() for number in range(24)]
    with h5py.File(path, "w") as file:
        for part in range(12):
            file.attrs[f"layer_names{part}"] = names[2 * part : 2 * part + 2]
    region = _region(path)
    assert AttributeReader(region).strings(_root(region), ["layer_names"]) == {"layer_names": names}
    region.close()


def _original() -> bytes:
    import io

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["model_config"] = '{"a": 1}' * 20
        file.attrs["layer_names"] = [b"one", b"two"]
    return buffer.getvalue()


ORIGINAL = _original()


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damage_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    path.write_bytes(ORIGINAL)
    damaged = bytearray(ORIGINAL)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged) - 8))
        damaged[position : position + 8] = data.draw(
            st.sampled_from([bytes(8), b"\xff" * 8, (1 << 62).to_bytes(8, "little")])
            | st.binary(min_size=8, max_size=8)
        )
    path.write_bytes(damaged)
    region = _region(path)
    try:
        AttributeReader(region).strings(_root(region), ["model_config", "layer_names"])
    except (DamagedStructureError, NewerStructureError, struct.error, IndexError):
        pass
    finally:
        region.close()
