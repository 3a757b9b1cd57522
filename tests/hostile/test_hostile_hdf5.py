"""HDF5 files that are damaged, hostile, or merely not what Keras writes."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from cases import Case, check_bounds, check_line, check_refused, parameters, snapshot
from h5py import h5d, h5g, h5p, h5s, h5t, h5z
from isolated import Isolated

import makers
import oracle

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

ARRAYS = makers.weights()
KERNEL = "layers/dense/vars/0"
STORED = "is stored chunked, compressed, compact, virtual or in another file; rewrite it without: h5repack -l CONTI -f NONE IN OUT"
DAMAGED = r"(.*: )?damaged HDF5 file \(.+\)"
OUTSIDE = r"its \d+ bytes lie outside the file; it was truncated or damaged"


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


def _good(path: Path) -> None:
    makers.write_weights(path, makers.weights(len(path.name)))


def _edited(edit: Callable[[h5py.File], object], **options: object) -> Callable[[Path], None]:
    """Return a builder: a good file, then an edit by h5py."""

    def build(path: Path) -> None:
        makers.write_store(path, ARRAYS, **options)
        with h5py.File(path, "r+") as file:
            edit(file)

    return build


def _patched(patch: Callable[[bytearray], object]) -> Callable[[Path], None]:
    """Return a builder: a good file, then an edit of its bytes."""

    def build(path: Path) -> None:
        data = bytearray(makers.store_bytes(ARRAYS))
        result = patch(data)
        path.write_bytes(bytes(data) if result is None else result)  # type: ignore[arg-type]

    return build


def _extent(data: bytes, name: str) -> tuple[int, int]:
    with h5py.File(io.BytesIO(bytes(data)), "r") as file:
        return file[name].id.get_offset(), file[name].id.get_storage_size()


def _layout_message(data: bytes, name: str) -> int:
    """Return where the file says where a dataset lies."""
    position = data.index(struct.pack("<QQ", *_extent(data, name)))
    assert data[position - 2 : position] == b"\x03\x01"  # version 3, contiguous
    return position


def _move(name: str, address: Callable[[bytes], int]) -> Callable[[bytearray], None]:
    def patch(data: bytearray) -> None:
        struct.pack_into("<Q", data, _layout_message(data, name), address(bytes(data)))

    return patch


def _endless_heap(data: bytearray) -> None:
    """Let the first free block of a heap of names be the next one after itself."""
    free, start = struct.unpack_from("<QQ", data, data.index(b"HEAP") + 16)
    struct.pack_into("<Q", data, start + free, free)


def _emptied_group(data: bytearray) -> None:
    """Let the tree of a group say that it has no entries."""
    struct.pack_into("<H", data, data.rindex(b"TREE") + 6, 0)


def _second_place(data: bytearray) -> None:
    """Turn a message that says nothing, behind the one that tells the place, into a second one of these."""
    place = _layout_message(data, KERNEL)
    size = struct.unpack_from("<H", data, place - 2 - 6)[0]
    following = place - 2 + size
    kind, length = struct.unpack_from("<HH", data, following)
    while kind != 0 or length < 18:
        following += 8 + length
        kind, length = struct.unpack_from("<HH", data, following)
    struct.pack_into("<H", data, following, 0x0008)
    data[following + 8 : following + 26] = data[place - 2 : place + 16]


def _dims(data: bytearray, *dims: int) -> None:
    before = struct.pack("<4Q", 7, 5, 7, 5)  # dimensions, and their maxima
    assert data.count(before) == 2
    struct.pack_into("<4Q", data, data.index(before), *dims, *dims)


def _dataset(**options: object) -> Callable[[Path], None]:
    return _edited(lambda file: file.create_dataset("layers/odd/vars/0", **options))


def _typed(stored: Callable[[], h5t.TypeID], size: int) -> Callable[[Path], None]:
    """Return a builder of a dataset with a type that NumPy may not know."""

    def edit(file: h5py.File) -> None:
        group = file.create_group("layers/odd/vars")
        plist = h5p.create(h5p.DATASET_CREATE)
        plist.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        h5d.create(group.id, b"0", stored(), h5s.create_simple((size,)), plist)

    return _edited(edit)


def _odd_float(bias: int) -> h5t.TypeID:
    stored = h5t.IEEE_F32LE.copy()
    stored.set_ebias(bias)
    return stored


def _chunked(
    filters: Callable[[h5p.PropDCID], object], chunk: tuple[int, ...] = (2,)
) -> Callable[[Path], None]:
    def edit(file: h5py.File) -> None:
        group = file.create_group("layers/odd/vars")
        plist = h5p.create(h5p.DATASET_CREATE)
        plist.set_chunk(chunk)
        filters(plist)
        h5d.create(group.id, b"0", h5t.STD_U8LE, h5s.create_simple((2**32,)), plist)

    return _edited(edit)


def _virtual(file: h5py.File, source: str, *, unlimited: bool = False) -> None:
    layout = h5py.VirtualLayout((7, 5), "f4", maxshape=(None, 5) if unlimited else None)
    if unlimited:  # to be asked for its shape, it opens the source
        whole = h5py.VirtualSource(source, "x", (7, 5), maxshape=(None, 5))
        layout[0 : h5s.UNLIMITED : 1, :] = whole[0 : h5s.UNLIMITED : 1, :]
    else:
        layout[:] = h5py.VirtualSource(source, "x", (7, 5))
    file.create_virtual_dataset("layers/odd/vars/0", layout)


def _virtual_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo.h5"))
    _edited(lambda file: _virtual(file, "fifo.h5", unlimited=True))(path)


def _fifo_link(path: Path) -> None:
    os.mkfifo(path.with_name("fifo.h5"))
    _edited(lambda file: file.__setitem__("layers/dense/link", h5py.ExternalLink("fifo.h5", "/")))(path)


def _doubling(file: h5py.File) -> None:
    group = file["layers"]
    for _ in range(40):
        child = group.create_group("a")
        group["b"] = child
        group = child


def _nested(file: h5py.File) -> None:
    group = file.id
    for _ in range(5000):
        group = h5g.create(group, b"g")


def _many_groups(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        parent = h5g.create(file.id, b"layers")
        for number in range(100_000):
            h5g.create(parent, b"%d" % number)


def _legacy(
    edit: Callable[[h5py.File], object] = lambda file: None,
    patch: Callable[[bytearray], object] = lambda data: None,
) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        makers.write_legacy(path, LEGACY)
        with h5py.File(path, "r+") as file:
            edit(file)
        data = bytearray(path.read_bytes())
        patch(data)
        path.write_bytes(data)

    return build


LEGACY = {"dense/dense/kernel:0": ARRAYS[KERNEL], "dense/dense/bias:0": ARRAYS["layers/dense/vars/1"]}


def _zero_heap(data: bytearray) -> None:
    position = data.index(b"GCOL") + 4
    data[position : position + 16] = bytes(16)


def _weight_names(*names: str) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file["model_weights/dense"].attrs["weight_names"] = [name.encode() for name in names]

    return edit


def _at_header(data: bytes) -> int:
    with h5py.File(io.BytesIO(data), "r") as file:
        return int(h5py.h5o.get_info(file["layers/dense/vars/1"].id).addr)


def _of_named_type(file: h5py.File) -> None:
    file["layers/type"] = np.dtype("f4")
    file.create_dataset("layers/odd/vars/0", data=np.zeros(3, np.float32), dtype=file["layers/type"])
    del file["layers/type"]


def _compact_layout() -> h5p.PropDCID:
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(h5d.COMPACT)
    return plist


def _long_attribute(path: Path) -> None:
    with h5py.File(path, "w", libver="latest") as file:
        for name, value in ARRAYS.items():
            file.create_dataset(name, data=value)
        file.create_group("vars").attrs["long"] = np.zeros(240 * 2**20, np.uint8)


CASES = [
    Case("empty file", lambda path: path.touch(), "the file is empty"),
    Case(
        "text",
        lambda path: path.write_text("loss: 0.1\n" * 100),
        r"not a Keras checkpoint: neither a \.keras archive, nor a \.weights\.json, nor HDF5",
    ),
    Case(
        "userblock",
        lambda path: makers.write_store(path, ARRAYS, userblock_size=512),
        r"not a Keras checkpoint: neither a \.keras archive, nor a \.weights\.json, nor HDF5",
    ),
    Case(
        "external link",
        _edited(lambda file: file.__setitem__("layers/dense/link", h5py.ExternalLink("/etc/passwd", "/"))),
        "layers/dense/link: is a soft or external link, which Keras never writes",
    ),
    Case(
        "external link to a FIFO",
        _fifo_link,
        "layers/dense/link: is a soft or external link, which Keras never writes",
    ),
    Case(
        "soft link",
        _edited(lambda file: file.__setitem__("layers/dense/link", h5py.SoftLink("/layers"))),
        "layers/dense/link: is a soft or external link, which Keras never writes",
    ),
    Case(
        "soft link to itself",
        _edited(lambda file: file.__setitem__("layers/loop", h5py.SoftLink("/layers/loop"))),
        "layers/loop: is a soft or external link, which Keras never writes",
    ),
    Case(
        "external storage",
        _dataset(shape=(7, 5), dtype="f4", external=[("/etc/passwd", 0, 140)]),
        f"layers/odd/vars/0: {STORED}",
    ),
    Case(
        "virtual dataset", _edited(lambda file: _virtual(file, "/etc/passwd")), f"layers/odd/vars/0: {STORED}"
    ),
    Case("virtual dataset of a FIFO", _virtual_fifo, f"layers/odd/vars/0: {STORED}"),
    Case(
        "group cycle",
        _edited(lambda file: file.__setitem__("layers/dense/up", file["layers"])),
        "layers/dense/up: is a group that is linked twice",
    ),
    Case("doubling graph", _edited(_doubling), r"layers/[ab/]+: is a group that is linked twice"),
    Case("nested groups", _edited(_nested), "holds groups nested more than 64 deep"),
    Case("100,000 groups", _many_groups, "holds more than 50000 objects"),
    Case(
        "never written",
        _dataset(shape=(2**29,), dtype="f4", compression="gzip", chunks=(2**20,)),
        f"layers/odd/vars/0: {STORED}",
    ),
    Case("never allocated", _dataset(shape=(2**29,), dtype="f4"), "layers/odd/vars/0: was never written"),
    Case(
        "huge shape",
        _patched(lambda data: _dims(data, 2**62, 5)),
        r"(layers/dense|optimizer)/vars/[02]: (its shape takes \d+ bytes, but 140 are stored|damaged HDF5 file \(.+\))",
    ),
    Case(
        "overflowing shape",
        _patched(lambda data: _dims(data, 2**62, 2**62)),
        r"(layers/dense|optimizer)/vars/[02]: (its shape takes \d+ bytes, but 140 are stored|damaged HDF5 file \(.+\))",
    ),
    Case(
        "smaller shape",
        _patched(lambda data: _dims(data, 3, 5)),
        r"(layers/dense|optimizer)/vars/[02]: its shape takes 60 bytes, but 140 are stored",
    ),
    Case(
        "address 0",
        _patched(_move(KERNEL, lambda data: 0)),
        rf"{KERNEL}: ({OUTSIDE}|damaged HDF5 file \(.+\))",
    ),
    Case(
        "address of another dataset",
        _patched(_move(KERNEL, lambda data: _extent(data, "optimizer/vars/2")[0] - 4)),
        r"(layers/dense|optimizer)/vars/\d: overlaps another part of the file; it is damaged",
    ),
    Case(
        "address past the end",
        _patched(_move(KERNEL, lambda data: len(data) - 100)),
        rf"{KERNEL}: ({OUTSIDE}|damaged HDF5 file \(.+\))",
    ),
    Case(
        "address of an object header",
        _patched(_move(KERNEL, _at_header)),
        ".*: overlaps another part of the file; it is damaged",
    ),
    Case(
        "end of file before the data",
        _patched(lambda data: struct.pack_into("<Q", data, 40, _extent(data, "optimizer/vars/2")[0])),
        rf".*: ({OUTSIDE}|damaged HDF5 file \(.+\))",
    ),
    Case("two places for one dataset", _patched(_second_place), DAMAGED),
    Case("free blocks that do not end", _patched(_endless_heap), DAMAGED),
    Case("emptied group", _patched(_emptied_group), DAMAGED),
    Case(
        "corrupt gzip chunk",
        _edited(
            lambda file: file.create_dataset("layers/odd/vars/0", data=np.zeros(999), compression="gzip")
        ),
        f"layers/odd/vars/0: {STORED}",
    ),
    Case(
        "fletcher32 with a two-byte chunk",
        _chunked(lambda plist: plist.set_fletcher32()),
        f"layers/odd/vars/0: {STORED}",
    ),
    Case("huge chunk", _chunked(lambda plist: None, (0x7FFFFFFF,)), f"layers/odd/vars/0: {STORED}"),
    Case(
        "unknown filter",
        _chunked(lambda plist: plist.set_filter(305, h5z.FLAG_OPTIONAL, (1, 2))),
        f"layers/odd/vars/0: {STORED}",
    ),
    Case(
        "compact",
        _edited(
            lambda file: h5d.create(
                file["vars"].id, b"0", h5t.IEEE_F32LE, h5s.create_simple((2,)), _compact_layout()
            )
        ),
        f"vars/0: {STORED}",
    ),
    *(
        Case(f"type {name}", build, "layers/odd/vars/0: has a type that Keras does not write for a variable")
        for name, build in {
            "vlen": _dataset(shape=(2,), dtype=h5py.vlen_dtype(np.float32), fillvalue=None),
            "string": _dataset(data=["a", "b"]),
            "fixed string": _dataset(data=np.array([b"abc"])),
            "compound": _dataset(data=np.zeros(3, [("a", "f4"), ("b", "i4")])),
            "reference": _dataset(shape=(1,), dtype=h5py.ref_dtype),
            "array": _typed(lambda: h5t.array_create(h5t.IEEE_F32LE, (3,)), 2),
            "complex": _dataset(data=np.zeros(3, np.complex64)),
            "long double": _dataset(data=np.zeros(3, np.longdouble)),
            "big-endian": _dataset(data=np.zeros(3, ">f4")),
            "odd bias": _typed(lambda: _odd_float(100), 3),
            "opaque of three bytes": _dataset(data=np.zeros(3, "V3")),
            "enumeration": _dataset(
                data=np.zeros(3, "i1"), dtype=h5py.enum_dtype({"A": 0, "B": 1, "C": 2}, "i1")
            ),
        }.items()
    ),
    Case(
        "named type",
        _edited(lambda file: file.__setitem__("layers/type", np.dtype("f4"))),
        "layers/type: is neither a group nor a dataset",
    ),
    Case(
        "name not UTF-8",
        _edited(lambda file: h5g.create(file["layers"].id, b"\xff\xfe")),
        r"holds a name that is not UTF-8: b'\\xff\\xfe'",
    ),
    Case(
        "name of 60 kB",
        _edited(lambda file: h5g.create(file["layers"].id, b"x" * 60_000)),
        "holds a name of 60000 bytes",
    ),
    Case(
        "dots",
        _patched(lambda data: data.replace(b"dense\0", b"..\0\0\0\0")),
        rf"holds an invalid name: b'\.\.'|{DAMAGED}",
    ),
    Case(
        "writer killed before it flushed",
        lambda path: path.write_bytes(makers.store_bytes(ARRAYS)[:800]),
        DAMAGED,
    ),
    Case("truncated", _patched(lambda data: bytes(data[:-1])), DAMAGED),
]


LEGACY_CASES = [
    Case("zeroed heap", _legacy(patch=_zero_heap), "damaged HDF5 file: an attribute.*"),
    Case(
        "no weight names",
        _legacy(lambda file: file["model_weights/dense"].attrs.__delitem__("weight_names")),
        "dense: no attribute `weight_names`; .*",
    ),
    Case(
        "weight names twice",
        _legacy(_weight_names("dense/kernel:0", "dense/kernel:0")),
        "dense: the same weight listed twice; .*",
    ),
    Case(
        "weight names that leave",
        _legacy(_weight_names("../x")),
        r"dense/\.\./x: weight listed, but not stored; .*",
    ),
    Case(
        "model_config of brackets",
        _legacy(lambda file: file.attrs.__setitem__("model_config", "[" * 50_000)),
        "model_config is not valid JSON .nested more than 200 deep.",
    ),
    Case(
        "model_config of 240 kB, cut",
        _legacy(lambda file: file.attrs.__setitem__("model_config", '{"a": "' + "x" * 60_000)),
        "model_config is not valid JSON .*",
    ),
    Case(
        "layers listed, not stored",
        _legacy(lambda file: file["model_weights"].attrs.__setitem__("layer_names", [b"dense", b"gone\n"])),
        r"gone\\n: layer listed, but not stored; .*",
    ),
]


@parameters(CASES)
def test_a_hostile_file_is_refused(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    check_refused(isolated, tmp_path, case, _good, ".weights.h5")


@parameters(LEGACY_CASES)
def test_a_hostile_legacy_file_is_refused(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    check_refused(isolated, tmp_path, case, lambda path: makers.write_legacy(path, LEGACY), ".h5")


def test_attributes_that_cannot_be_copied_are_refused_with_drop(isolated: Isolated, tmp_path: Path) -> None:
    def edit(file: h5py.File) -> None:
        file["model_weights"].attrs["odd"] = np.zeros(2, [("a", "f4")])
        file["optimizer_weights/iteration:0"] = np.int64(1)  # something to drop
        file["optimizer_weights"].attrs["weight_names"] = [b"iteration:0"]

    _legacy(edit)(tmp_path / "a_1.h5")
    line = (
        r"a_1\.h5: model_weights: an attribute cannot be copied \(it has a type that Keras does not write\); "
        "use --optimizer keep"
    )
    check_line(isolated.run(["a_1.h5", "-o", "swa.h5", "--optimizer", "drop"], tmp_path), 3, line)
    assert list(snapshot(tmp_path)) == ["a_1.h5"]
    ended = isolated.run(["a_1.h5", "-q", "-o", "swa.h5"], tmp_path)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")


HARMLESS = {
    "trailing junk": lambda path: path.write_bytes(makers.store_bytes(ARRAYS) + b"junk" * 5000),
    "two files concatenated": lambda path: path.write_bytes(makers.store_bytes(ARRAYS) * 2),
    "written in HDF5's newest format": lambda path: makers.write_store(path, ARRAYS, libver="latest"),
    "empty dataset": _edited(lambda file: file.create_dataset("layers/odd/vars/0", shape=(0, 3), dtype="f4")),
    "an attribute of 240 MB": _long_attribute,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_odd_and_harmless_gives_the_same_tensors(
    name: str, isolated: Isolated, tmp_path: Path
) -> None:
    HARMLESS[name](tmp_path / "a_1.weights.h5")
    stored = {n: v.tobytes() for n, v in oracle.read_arrays(tmp_path / "a_1.weights.h5").items()}
    ended = isolated.run(["a_1.weights.h5", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert ended.code == 0, ended.err
    assert {n: v.tobytes() for n, v in oracle.read_arrays(tmp_path / "swa.weights.h5").items()} == stored


ODD = {
    "no value": _edited(lambda file: file.create_dataset("layers/odd/vars/0", data=h5py.Empty("f4"))),
    "a named type": _edited(_of_named_type),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_refused_or_gives_the_same_tensors(
    name: str, isolated: Isolated, tmp_path: Path
) -> None:
    ODD[name](tmp_path / "a_1.weights.h5")
    before = snapshot(tmp_path)
    ended = isolated.run(["a_1.weights.h5", "-q", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    if ended.code:
        check_line(ended, 3, r"a_1\.weights\.h5: layers/odd/vars/0: .+")
        assert snapshot(tmp_path) == before
        return
    with h5py.File(tmp_path / "a_1.weights.h5") as read, h5py.File(tmp_path / "swa.weights.h5") as written:
        for tensor in (*ARRAYS, "layers/odd/vars/0"):
            assert (written[tensor].dtype, written[tensor].shape) == (read[tensor].dtype, read[tensor].shape)
            assert read[tensor].shape is None or (written[tensor][()] == read[tensor][()]).all()


def test_20000_names_of_one_dataset_are_one_tensor(isolated: Isolated, tmp_path: Path) -> None:
    for number in (1, 2):
        with h5py.File(tmp_path / f"a_{number}.weights.h5", "w") as file:
            group = file.create_group("vars")
            first = group.create_dataset("0", data=np.full(2**18, number, np.float32))
            for name in range(1, 20_000):
                group.id.links.create_hard(b"%d" % name, group.id, b"0")
            del first
    ended = isolated.run(["a_1.weights.h5", "a_2.weights.h5", "-q", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert (ended.code, ended.err) == (0, "")
    with h5py.File(tmp_path / "swa.weights.h5", "r") as file:
        assert (file["vars/0"][()] == 1.5).all()
        assert file["vars/19999"] == file["vars/0"]


def test_names_with_newlines_and_escapes_stay_on_one_line(isolated: Isolated, tmp_path: Path) -> None:
    for number in (1, 2):
        name = "layers/a\n\x1b[31mb/vars/0"
        value = np.array([1, 2, np.nan if number == 1 else 3], np.float32)
        makers.write_weights(tmp_path / f"a_{number}.weights.h5", {name: value})
    line = (
        r"a_1\.weights\.h5: layers/a\\n\\x1b\[31mb/vars/0: holds NaN or infinity; leave this checkpoint out"
    )
    ended = isolated.run(["a_1.weights.h5", "a_2.weights.h5", "-o", "swa.weights.h5"], tmp_path)
    check_bounds(ended)
    assert ended.code == 4
    assert ended.err.splitlines()[0] == line.replace("\\\\", "\\").replace("\\.", ".").replace(
        "\\[", "["
    ).join(("swa-avg: error: ", ""))


def test_a_writer_that_has_not_flushed_is_refused(isolated: Isolated, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a_1.weights.h5", "w") as file:
        file.create_dataset("vars/0", data=np.ones(3, np.float32))
        ended = isolated.run(["a_1.weights.h5", "-o", "swa.weights.h5"], tmp_path)
        check_line(ended, 3, r"a_1\.weights\.h5: (the file is empty|damaged HDF5 file.*)")


def test_a_writer_that_stopped_half_way_has_fewer_tensors(isolated: Isolated, tmp_path: Path) -> None:
    _good(tmp_path / "a_2.weights.h5")
    half = dict(list(ARRAYS.items())[:5])
    with h5py.File(tmp_path / "a_1.weights.h5", "w") as file:
        file.create_group("vars")
        for name, value in half.items():
            file.create_dataset(name, data=value)
        file.flush()
        (tmp_path / "b_1.weights.h5").write_bytes((tmp_path / "a_1.weights.h5").read_bytes())
    line = r"b_1\.weights\.h5: layers/batch_normalization/vars/3: missing; c_2\.weights\.h5 has it as float32\[5\]"
    (tmp_path / "a_2.weights.h5").rename(tmp_path / "c_2.weights.h5")
    check_line(isolated.run(["b_1.weights.h5", "c_2.weights.h5", "-o", "swa.weights.h5"], tmp_path), 4, line)


def test_a_moved_address_is_told_by_the_other_checkpoints(isolated: Isolated, tmp_path: Path) -> None:
    """HDF5 keeps no checksum of addresses; one that leads to bytes of no tensor is found by comparing."""
    _good(tmp_path / "a_1.weights.h5")
    _good(tmp_path / "z_9.weights.h5")
    _good(tmp_path / "m_5.weights.h5")
    data = bytearray((tmp_path / "m_5.weights.h5").read_bytes()) + bytes(200)
    struct.pack_into("<Q", data, 40, len(data))
    _move(KERNEL, lambda data: len(data) - 160)(data)
    (tmp_path / "m_5.weights.h5").write_bytes(data)
    before = snapshot(tmp_path)
    for inputs in (["a_1.weights.h5", "m_5.weights.h5"], ["m_5.weights.h5", "z_9.weights.h5"]):
        line = rf"{inputs[0]}: {KERNEL}: lies at another offset than in {inputs[1]}, and nothing else does: one of the two is damaged"
        check_line(isolated.run([*inputs, "-q", "-o", "swa.weights.h5"], tmp_path), 3, line)
        assert snapshot(tmp_path) == before


def test_a_moved_address_is_told_where_there_are_two_tensors(isolated: Isolated, tmp_path: Path) -> None:
    """What moves the one that lies last moves the end of the file, too."""
    for name in ("a_1.h5", "z_9.h5"):
        makers.write_legacy(tmp_path / name, {n: v + len(name) for n, v in LEGACY.items()})
    data = bytearray((tmp_path / "z_9.h5").read_bytes())
    bias = "model_weights/dense/dense/bias:0"
    _move(bias, lambda data: _extent(data, bias)[0] + 256)(data)
    (tmp_path / "z_9.h5").write_bytes(data)
    before = snapshot(tmp_path)
    line = r"a_1\.h5: .*bias:0: lies at another offset than in z_9\.h5, and nothing else does: one of the two is damaged"
    check_line(isolated.run(["a_1.h5", "z_9.h5", "-q", "-o", "swa.h5"], tmp_path), 3, line)
    assert snapshot(tmp_path) == before


def test_a_flipped_payload_bit_changes_that_value_alone(isolated: Isolated, tmp_path: Path) -> None:
    """Bare HDF5 has no checksum of its own: see --expect-sha256."""
    data = bytearray(makers.store_bytes(ARRAYS))
    offset, _ = _extent(data, KERNEL)
    data[offset + 2] ^= 1
    (tmp_path / "a_1.weights.h5").write_bytes(data)
    ended = isolated.run(["a_1.weights.h5", "-q", "-o", "swa.weights.h5"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    for name, value in ARRAYS.items():
        differing = np.flatnonzero(written[name].ravel() != np.ravel(value))
        assert differing.tolist() == ([0] if name == KERNEL else [])


TINY = {"vars/0": np.arange(3, dtype=np.float32), "vars/1": np.arange(2, dtype=np.float64)}
EVERY = """
import io, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_hostile_hdf5 import check_every
check_every(Path(sys.argv[3]), sys.argv[4])
"""


def check_every(path: Path, damage: str) -> None:
    """Damage every place of a small file; each gives the same tensors or an error. Runs in its own process."""
    from swa_avg.errors import UnreadableError
    from swa_avg.formats import open_checkpoint

    original = makers.store_bytes(TINY)
    extents = [_extent(original, name) for name in TINY]
    opened = refused = 0
    for position in range(len(original)):
        data = bytearray(original)
        if damage == "truncated":
            del data[position:]
        elif damage.startswith("zeroed"):
            size = int(damage.split()[1])
            if position % max(1, size // 16):
                continue
            data[position : position + size] = bytes(len(data[position : position + size]))
        else:
            data[position] ^= 1 << int(damage.split()[1])
        path.write_bytes(data)
        try:
            checkpoint = open_checkpoint(path)
        except UnreadableError:
            refused += 1
            continue
        opened += 1
        with_values = {name: (t.offset, t.nbytes) for name, t in checkpoint.tensors.items()}
        known = dict(zip(TINY, extents, strict=True))
        names = set(with_values) ^ set(known)
        assert not names or damage.startswith("bit"), (position, names)
        for name in with_values.keys() & known.keys():
            assert with_values[name] == known[name], (position, name, with_values[name])
        checkpoint.close()
    print(opened, refused)


@pytest.mark.parametrize(
    "damage",
    ["truncated", "zeroed 16", "zeroed 64", "zeroed 512", "zeroed 4096", *(f"bit {n}" for n in range(8))],
)
def test_damage_at_every_place_is_refused_or_harmless(
    damage: str, tmp_path: Path, run_python: Callable[..., object]
) -> None:
    here = Path(__file__).parent
    ended = run_python(EVERY, here, here.parent, tmp_path / "tiny.weights.h5", damage)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr  # type: ignore[attr-defined]
    opened, refused = map(int, ended.stdout.split())  # type: ignore[attr-defined]
    assert refused > 0
    assert opened == 0 or damage != "truncated"
