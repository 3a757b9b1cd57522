"""Where tensors lie, against h5py; and libhdf5 is asked only where a group is of a newer kind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest

import makers
from swa_avg.errors import UnreadableError
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source
from swa_avg.formats.hdf5 import libhdf5
from swa_avg.formats.hdf5.layout import Layout, read_layout

CORPUS = Path(__file__).parents[1] / "corpus"
NAMES = {np.dtype(bool): "bool", makers.BFLOAT16: "opaque16"}


def _layout(path: Path) -> Layout:
    with closing(open_source(path)) as source:
        return read_layout(Region(source))


def _by_h5py(path: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}

    def walk(prefix: str, group: h5py.Group) -> None:
        for name, item in group.items():
            if isinstance(item, h5py.Group):
                walk(f"{prefix}{name}/", item)
            else:
                dtype = "bfloat16" if "dtype" in item.attrs else NAMES.get(item.dtype, item.dtype.name)
                offset = item.id.get_offset() if item.nbytes else 0
                found[prefix + name] = (item.shape or (), dtype, offset, item.nbytes)

    with h5py.File(path, "r") as file:
        walk("", file)
    return found


@pytest.fixture
def without_libhdf5(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("libhdf5 was asked")

    monkeypatch.setattr(libhdf5, "walk_newer", fail)


def _check(path: Path) -> None:
    expected = _by_h5py(path)
    layout = _layout(path)
    assert {n: (t.shape, t.dtype, t.offset, t.nbytes) for n, t in layout.tensors.items()} == expected
    with h5py.File(path, "r") as file:
        groups = {""} | {n for n in layout.groups if n and isinstance(file[n], h5py.Group)}
        assert layout.groups.keys() == groups
        for name in (*layout.groups, *layout.datasets):
            messages = layout.groups.get(name, layout.datasets.get(name, ()))
            assert len(messages) == len(file[name or "/"].attrs)


BARE = sorted(path for pattern in ("*.h5", "*.hdf5") for path in CORPUS.rglob(pattern))


@pytest.mark.usefixtures("without_libhdf5")
@pytest.mark.parametrize("path", BARE, ids=lambda path: str(path.relative_to(CORPUS)))
def test_tensors_of_keras_files_lie_where_h5py_finds_them(path: Path) -> None:
    _check(path)


def _tied(path: Path) -> None:
    makers.write_store(path, makers.weights())
    with h5py.File(path, "r+") as file:
        file["layers/again/vars/0"] = file["layers/dense/vars/0"]


def _many(path: Path) -> None:
    """Groups whose names fill a tree of several levels."""
    makers.write_store(path, {f"layers/dense_{n}/vars/0": np.float32(n) for n in range(3000)})


def _types(path: Path) -> None:
    kinds = [f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)] + ["f2", "f4", "f8", "?", "V2"]
    arrays = {f"layers/a/vars/{number}": np.zeros((number, 3), kind) for number, kind in enumerate(kinds)}
    makers.write_store(path, arrays | {"vars/0": np.float32(1), "vars/empty": np.zeros((0, 4), "f4")})


def _long_attributes(path: Path) -> None:
    makers.write_store(path, makers.weights())
    with h5py.File(path, "r+") as file:
        for number in range(200):
            file["layers/dense"].attrs[f"attribute {number}"] = "x" * number
            file["layers/dense/vars/0"].attrs[f"attribute {number}"] = np.arange(number)


@pytest.mark.usefixtures("without_libhdf5")
@pytest.mark.parametrize("build", [_tied, _many, _types, _long_attributes])
def test_tensors_of_odder_files_do_too(build: Callable[[Path], None], tmp_path: Path) -> None:
    build(tmp_path / "a.weights.h5")
    _check(tmp_path / "a.weights.h5")


@pytest.mark.parametrize("count", [1, 20], ids=["links in the header", "links in a heap"])
def test_layers_may_have_names_that_are_not_ascii(count: int, tmp_path: Path) -> None:
    arrays = {f"größe_{n}/größe_{n}/kernel:0": np.full(3, n, np.float32) for n in range(count)}
    path = makers.write_legacy(tmp_path / "a.h5", arrays)
    _check(path)


def test_a_superblock_that_keras_does_not_write_is_refused(tmp_path: Path) -> None:
    data = bytearray(makers.store_bytes(makers.weights()))
    data[13] = 4  # bytes an address
    (tmp_path / "a.h5").write_bytes(data)
    with pytest.raises(UnreadableError, match="the superblock is not one that Keras writes"):
        _layout(tmp_path / "a.h5")
