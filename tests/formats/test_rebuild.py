"""What is built anew is what it was, less what was to be left out; what is written stays off the values."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import h5py
import numpy as np
import pytest

import makers
from swa_avg.errors import UnreadableError
from swa_avg.formats import open_checkpoint
from swa_avg.formats.hdf5.rebuild import _GuardedFile, write_record

ATTRIBUTES = {
    "text": "ünï ☃",
    "empty": "",
    "fixed": np.bytes_(b"fixed"),
    "names": np.array([b"a", b"bb", b""], dtype="S2"),
    "strings": ["one", "two"],
    "none": np.array([], np.float64),
    "no names": np.array([], "S1"),
    "float": np.float32(1.5),
    "floats": np.arange(6, dtype=np.float64).reshape(2, 3),
    "half": np.float16(0.5),
    **{
        f"integer {dtype}": np.dtype(dtype).type(100)
        for dtype in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
    },
}


def _dump(data: bytes) -> dict[str, object]:
    found: dict[str, object] = {}
    with h5py.File(io.BytesIO(data), "r") as file:

        def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
            for key, value in item.attrs.items():
                array = np.asarray(value)
                found[f"{name} {key}"] = (array.tolist(), array.shape, str(array.dtype))
                identifier = item.attrs.get_id(key).get_type()
                found[f"{name} {key} type"] = (identifier.get_class(), identifier.get_size())
            if isinstance(item, h5py.Dataset):
                found[name] = (item.dtype, item.shape, np.asarray(item[()]).tobytes())
                information = h5py.h5o.get_info(item.id)  # holds the memory that its attributes show
                assert not information.hdr.mesg.present & 1 << 0x12, "a time of modification"
            else:
                found[name] = "group"

        visit("", file)
        file.visititems(visit)
        tied = ("vars/tied", "layers/dense/vars/again")
        same = {name for name in tied if file[name] == file["vars/tied"]}
    return found | {"tied": same}


def test_everything_but_the_optimizer_is_kept(tmp_path: Path) -> None:
    arrays = makers.weights() | {
        "vars/tied": np.arange(9, dtype=np.float32),
        "vars/bool": np.array([True, False]),
        "vars/bfloat16": np.zeros(3, makers.BFLOAT16),
        "vars/nothing": np.zeros((0, 3), np.float32),
    }
    makers.write_weights(tmp_path / "a.weights.h5", arrays)
    with h5py.File(tmp_path / "a.weights.h5", "r+") as file:
        file["layers/dense/vars/again"] = file["vars/tied"]
        for target in (file, file["layers"], file["vars/tied"]):
            for name, value in ATTRIBUTES.items():
                target.attrs[name] = value
    checkpoint = open_checkpoint(tmp_path / "a.weights.h5")
    with (tmp_path / "scratch").open("w+b") as file:
        stripped = checkpoint.without_optimizer(lambda: file)
        (region,) = stripped.shards
        found = _dump(region.read(0, region.size))
    checkpoint.close()
    with h5py.File(tmp_path / "a.weights.h5", "r+") as file:
        del file["optimizer"]
    expected = _dump((tmp_path / "a.weights.h5").read_bytes())
    assert found == expected
    assert found["tied"] == {"vars/tied", "layers/dense/vars/again"}


def test_the_record_of_an_average_replaces_that_of_its_inputs(tmp_path: Path) -> None:
    path = makers.write_weights(tmp_path / "a.weights.h5", makers.weights())
    checkpoint = open_checkpoint(path)
    tensors = list(checkpoint.tensors.values())
    checkpoint.close()
    for record in ({"inputs": "x" * 200_000}, {"inputs": "y"}, {"inputs": "z" * 100_000}):
        with path.open("r+b") as file:
            write_record(file, record, path, tensors)
        with h5py.File(path, "r") as file:
            text = b"".join(bytes(file.attrs[name]) for name in sorted(file.attrs))
            assert text.decode() == f'{{"inputs":"{record["inputs"]}"}}'
            assert all(name.startswith("swa_avg") for name in file.attrs)


def test_a_record_is_not_written_over_values(tmp_path: Path) -> None:
    """A file may say that it ends before its values do."""
    path = makers.write_weights(tmp_path / "a.weights.h5", {"vars/0": np.arange(999, dtype=np.float32)})
    checkpoint = open_checkpoint(path)
    tensors = list(checkpoint.tensors.values())
    checkpoint.close()
    data = bytearray(path.read_bytes())
    data[40:48] = (len(data) - 3000).to_bytes(8, "little")
    path.write_bytes(data)
    with path.open("r+b") as file, pytest.raises(UnreadableError, match=r"damaged HDF5 file \(.+\)"):
        write_record(file, {"inputs": "x" * 50_000}, path, tensors)
    offset = tensors[0].offset
    assert path.read_bytes()[offset : offset + 3996] == np.arange(999, dtype=np.float32).tobytes()


def test_an_hdf5_file_that_outlives_its_file_object_goes_quietly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after an interrupt between h5py's opening and its closing."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as hdf5:
        hdf5["x"] = np.arange(3.0)
    with path.open("r+b") as file:
        hdf5 = h5py.File(_GuardedFile(file, ()), "r+")
        hdf5.attrs["y"] = 1
        kept = hdf5["x"]
    del hdf5, kept
    gc.collect()
    assert capsys.readouterr().err == ""
