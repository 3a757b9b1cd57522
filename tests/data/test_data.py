"""Data for the refresh: which arrays, which rows, and what is refused."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.data.batches import Data
from swa_avg.data.permutation import Permutation
from swa_avg.data.sources import open_data
from swa_avg.data.spec import VALIDATION, Spec
from swa_avg.data.user_functions import import_function
from swa_avg.errors import SystemRefusalError, UnreadableError, UsageError

IMAGES = np.random.default_rng(0).normal(size=(50, 4, 3)).astype("float32")
LABELS = np.arange(50)


def rows_of(source, **options) -> tuple[np.ndarray, Data]:
    with open_data(source, Spec(**options)) as data:
        return np.concatenate([batch for batch, _ in data]), data


def refused(source, **options) -> str:
    with pytest.raises(UnreadableError) as info:
        rows_of(source, **options)
    assert "\n" not in str(info.value)
    return str(info.value)


def sorted_rows(values):
    return values[np.lexsort(values.reshape(len(values), -1).T)]


@pytest.fixture
def saved(tmp_path):
    def save(name="data.npz", /, *, compressed=False, **arrays):
        path = tmp_path / name
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        return path

    return save


# --- the order of rows --------------------------------------------------------------------------------------------


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_every_row_is_drawn_once(size, seed):
    assert sorted(Permutation(size, seed)(0, size)) == list(range(size))


@given(size=st.integers(2, 2**40), seed=st.integers(0, 2**32), start=st.integers(0, 2**30))
def test_an_order_is_computed_where_it_is_asked_for(size, seed, start):
    start %= size
    stop = min(size, start + 50)
    order = Permutation(size, seed)
    drawn = order(start, stop)
    assert ((drawn >= 0) & (drawn < size)).all()
    np.testing.assert_array_equal(drawn, [order(k, k + 1)[0] for k in range(start, stop)])


def test_orders_look_random():
    """Positions are uncorrelated with rows, neighbours with each other, and seeds give different orders."""
    size = 100_000
    orders = [Permutation(size, seed)(0, size) for seed in (0, 1)]
    assert abs(np.corrcoef(np.arange(size), orders[0])[0, 1]) < 0.02
    assert abs(np.corrcoef(orders[0][1:], orders[0][:-1])[0, 1]) < 0.02
    assert (orders[0] == orders[1]).sum() < 20


def test_batches_of_data_sorted_by_class_have_the_classes_of_the_whole():
    labels = np.repeat(np.arange(10.0), 1000)
    with open_data(labels[:, None], Spec(batch_size=500)) as data:
        for batch, _ in data:
            assert abs(batch.mean() - 4.5) < 0.6


# --- sources ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("dtype", ["float32", ">f8", "uint8", "float16", "bool", "int64"])
def test_npz_members_come_row_by_row(saved, compressed, fortran, dtype):
    values = np.asarray((IMAGES * 10), order="F" if fortran else "C").astype(dtype, order="K")
    path = saved(x=values, y=LABELS, compressed=compressed)
    found, data = rows_of(path, batch_size=7)
    np.testing.assert_array_equal(sorted_rows(found), sorted_rows(np.ascontiguousarray(values)))
    assert data.used == {f"x {values.dtype}[50, 4, 3]": "the input"}
    assert data.ignored == ("y int64[50]",)


def test_fortran_order_in_four_dimensions(saved):
    values = np.asfortranarray(np.arange(2 * 3 * 4 * 5.0).reshape(5, 4, 3, 2))
    found, _ = rows_of(saved(x=values))
    np.testing.assert_array_equal(sorted_rows(found), values)


def test_npy_files_hold_the_only_array(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    found, data = rows_of(tmp_path / "a.npy")
    np.testing.assert_array_equal(sorted_rows(found), sorted_rows(IMAGES))
    assert data.used == {"a.npy float32[50, 4, 3]": "the input"}


def test_arrays_in_memory_and_in_files_give_the_same_batches(saved):
    found, data = rows_of(saved(x=IMAGES), seed=5, batch_size=8)
    same, other = rows_of({"x": IMAGES}, seed=5, batch_size=8)
    np.testing.assert_array_equal(found, same)
    assert data.digest == other.digest


def test_the_digest_depends_on_the_rows_and_not_on_the_batches():
    digests = [
        rows_of(IMAGES, batch_size=3)[1].digest,
        rows_of(IMAGES, batch_size=50)[1].digest,
        rows_of(IMAGES, seed=1)[1].digest,
        rows_of(IMAGES, samples=49)[1].digest,
        rows_of(IMAGES.astype("float64"))[1].digest,
        rows_of(IMAGES.reshape(50, 12))[1].digest,
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


def test_samples_are_drawn_without_repetition_and_the_last_batch_is_smaller():
    with open_data(np.arange(1000.0)[:, None], Spec(samples=250, batch_size=100)) as data:
        batches = [batch for batch, _ in data]
    assert [len(batch) for batch in batches] == [100, 100, 50]
    assert len(np.unique(np.concatenate(batches))) == 250
    assert data.total == data.samples == 250


@pytest.mark.parametrize(
    "batches",
    [
        [IMAGES[:20], IMAGES[20:]],
        [(IMAGES[:20], LABELS[:20]), (IMAGES[20:], LABELS[20:])],
        [[IMAGES[:20], LABELS[:20]], [IMAGES[20:], LABELS[20:]]],  # as torch's DataLoader collates
        [(IMAGES[:20], LABELS[:20], LABELS[:20]), (IMAGES[20:], LABELS[20:], LABELS[20:])],
        [{"x": IMAGES[:20], "y": LABELS[:20]}, {"x": IMAGES[20:], "y": LABELS[20:]}],
    ],
    ids=["x", "x y", "list", "x y weights", "dict"],
)
def test_streams_of_batches_come_in_their_order_without_labels(batches):
    found, data = rows_of(iter(batches))
    np.testing.assert_array_equal(found, IMAGES)
    assert data.samples == 50
    found, _ = rows_of(batches, samples=30)
    np.testing.assert_array_equal(found, IMAGES[:30])


def test_batches_by_number_come_in_a_seeded_order():
    class ByNumber:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return IMAGES[10 * index : 10 * index + 10], LABELS[:10]

    found, _ = rows_of(ByNumber())
    np.testing.assert_array_equal(sorted_rows(found), sorted_rows(IMAGES))
    assert (found != IMAGES).any()


def test_functions_are_imported_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_batches.py").write_text(
        "import numpy as np\n"
        "def arrays(): return {'x': np.ones((6, 2)), 'y': np.zeros(6)}\n"
        "def pair(): return np.ones((6, 2)), np.zeros(6)\n"
        "def stream(): yield np.ones((6, 2))\n"
        "def number(): return 3\n"
    )
    before = list(sys.path)
    for name in ("arrays", "pair", "stream"):
        assert rows_of(f"my_batches:{name}")[0].shape == (6, 2)
    assert sys.path == before
    assert "expected arrays or an iterable of batches; found int" in refused("my_batches:number")
    for name, problem in (
        ("my_batches:nothing", "has no attribute"),
        ("no_such_module:nothing", "No module named"),
        ("nothing", "is not MODULE:FUNCTION"),
        ("my_batches:np.pi", "is not a function"),
    ):
        with pytest.raises(UsageError, match=problem):
            import_function(name)


def test_what_a_module_holds_is_data_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "holds.py").write_text(
        "import numpy as np\n"
        "array = np.ones((6, 2))\n"
        "pair = array, np.zeros(6)\n"
        "batches = [array[:3], array[3:]]\n"
        "class Made:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, number): return array[3 * number:][:3]\n"
        "made = Made()\n"
    )
    for name in ("array", "pair", "batches", "Made", "made"):
        assert rows_of(f"holds:{name}")[0].shape == (6, 2)
    with pytest.raises(
        UsageError, match=r"cannot import holds\.py:array: .+; write holds:array, without \.py"
    ):
        rows_of("holds.py:array")


def test_a_module_beside_the_checkpoints_hides_none_that_is_installed(tmp_path, monkeypatch):
    folders = {name: tmp_path / name for name in ("here", "installed")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "my_twice_there.py").write_text(f"def where(): return {name!r}\n")
    (folders["here"] / "my_only_here.py").write_text("import my_twice_there\nwhere = my_twice_there.where\n")
    (folders["here"] / "my_hidden.py").write_text("def own(): return 1\n")
    (folders["installed"] / "my_hidden.py").write_text("")
    monkeypatch.chdir(folders["here"])
    # As Python has it that is run with -m, or without a script.
    for first in ("", str(folders["here"])):
        monkeypatch.setattr(sys, "path", [first, *sys.path, str(folders["installed"])])
        before = list(sys.path)
        assert import_function("my_twice_there:where")() == "installed"
        assert import_function("my_only_here:where")() == "installed"
        with pytest.raises(UsageError, match=r"no attribute 'own'; my_hidden.py of the current folder comes"):
            import_function("my_hidden:own")
        assert sys.path == before
        for name in ("my_twice_there", "my_only_here", "my_hidden"):
            del sys.modules[name]


def test_without_a_current_folder_installed_modules_are_found(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert import_function("math:sqrt")(4.0) == 2.0
    finally:
        os.chdir(tmp_path)


def test_preprocessing_is_applied_to_each_batch_before_shapes_are_checked(saved):
    path = saved(x=IMAGES)
    options = {"input_names": ["in"], "input_shapes": [(None, 12)]}
    found, _ = rows_of(path, preprocess=lambda batch: batch.reshape(-1, 12) * 2, **options)
    assert found.shape == (50, 12)
    assert "expected rows of shape [12]; found [4, 3]" in refused(path, **options)
    assert "found [3, 4]" in refused(path, preprocess=lambda batch: batch.transpose(0, 2, 1), **options)


# --- choosing arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "options", "chosen"),
    [
        (["x", "y"], {}, "x"),
        (["x_train", "y_train", "x_test"], {}, "x_train"),
        (["images", "labels"], {}, "images"),
        (["anything"], {}, "anything"),
        (["a", "x", "picture"], {"input_names": ["picture"]}, "picture"),
        (["a", "x"], {"input_names": ["picture"]}, "x"),
        (["a", "x"], {"bind": ["a"]}, "a"),
        (["a", "x"], {"bind": ["a=picture"], "input_names": ["picture"]}, "a"),
        (["k=v", "x"], {"bind": ["k=v=picture"], "input_names": ["picture"]}, "k=v"),
    ],
)
def test_the_array_is_named_or_known_by_its_key(saved, keys, options, chosen):
    path = saved(**{key: np.full((3, 2), number) for number, key in enumerate(keys)})
    found, _ = rows_of(path, **options)
    assert found[0, 0] == keys.index(chosen)


def test_ambiguous_arrays_are_listed_with_shapes_and_types(saved):
    message = refused(saved(a=IMAGES, b=LABELS))
    assert message.endswith(
        "expected one array for the model's input; found a float32[50, 4, 3], b int64[50]; choose with --bn-input KEY"
    )


def test_an_unknown_key_is_named_with_those_there_are(saved):
    message = refused(saved(a=IMAGES, b=LABELS), bind=["c"])
    assert "expected c; found a float32[50, 4, 3], b int64[50]" in message


def test_an_input_that_the_model_does_not_have_is_a_usage_error():
    with pytest.raises(UsageError, match="--bn-input a=other names no input"):
        Spec(bind=["a=other"], input_names=["one"])
    with pytest.raises(UsageError, match="names no input"):
        Spec(bind=["a"], input_names=["one", "two"])


def test_several_inputs_are_taken_by_name_from_the_same_rows(saved):
    options = {"input_names": ["image", "row"], "input_shapes": [(None, 4, 3), (None,)]}
    path = saved(image=IMAGES, number=LABELS, other=LABELS)
    with open_data(path, Spec(bind=["number=row"], batch_size=20, **options)) as data:
        for batch, _ in data:
            np.testing.assert_array_equal(batch["image"], IMAGES[batch["row"]])
    assert data.used == {"image float32[50, 4, 3]": "image", "number int64[50]": "row"}
    assert data.ignored == ("other int64[50]",)
    assert "expected row; found image" in refused(path, **options)
    path = saved("uneven.npz", image=IMAGES, row=LABELS[:49])
    assert "expected arrays of one length; found image 50, row 49" in refused(path, **options)


def test_a_missing_or_extra_last_axis_of_one_is_taken_as_fit_takes_it():
    options = {"input_names": ["in"]}
    assert len(rows_of(IMAGES, input_shapes=[(None, 4, 3, 1)], **options)[0]) == 50
    assert len(rows_of(IMAGES[..., None], input_shapes=[(None, 4, 3)], **options)[0]) == 50
    assert "expected rows of shape [4, 4]" in refused(IMAGES, input_shapes=[(None, 4, 4)], **options)


def test_a_model_of_a_fixed_batch_size_gets_whole_batches():
    options = {"input_names": ["in"], "input_shapes": [(16, 4, 3)]}
    found, data = rows_of(IMAGES, **options)
    assert len(found) == data.total == 48
    assert data.notes == ["left out 2 rows, since the model takes batches of 16 only"]
    assert "the model takes batches of 16 rows only; found 10 rows" in refused(IMAGES[:10], **options)
    with pytest.raises(UsageError, match="batches of 16 only, not of 20"):
        Spec(batch_size=20, **options)


# --- what is refused ----------------------------------------------------------------------------------------------


def npy(header: bytes, payload: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header + payload


def header(descr="'<f4'", shape="(2, 3)", fortran="False") -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode()


DATA = bytes(24)
BAD_NPY = {
    "pickled objects": (npy(header("'|O'"), DATA), "found pickled objects, which are never read"),
    "negative size": (npy(header(shape="(-1, 3)"), DATA), "expected a shape"),
    "huge shape": (npy(header(shape="(1099511627776, 3)"), DATA), "expected 13194139533"),
    "shape not a tuple": (npy(header(shape="6"), DATA), "found a damaged or a very long one"),
    "boolean shape": (npy(header(shape="(True, 6)"), DATA), "expected a shape"),
    "long header": (
        npy(header() + b" " * 200_000, DATA, 2),
        "found a damaged or a very long one",
    ),
    "header of a gigabyte": (
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**30) + bytes(100),
        "found a damaged or a very long one",
    ),
    "header of four terabytes": (
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100),
        "found a damaged or a very long one",
    ),
    "header cut off": (npy(header())[:30], "found a damaged or a very long one"),
    "brackets": (npy(b"(" * 60_000, DATA), "found a damaged or a very long one"),
    "code": (npy(b"__import__('os').getcwd()", DATA), "found a damaged or a very long one"),
    "long integer": (npy(header(shape=f"({'9' * 5000}, 1)"), DATA), "found a damaged or a very long one"),
    "null byte": (npy(header() + b"\0", DATA), "found a damaged or a very long one"),
    "open string": (npy(b"{'descr': '<f4", DATA), "found a damaged or a very long one"),
    "indentation": (npy(b"  {}\n {}\n      {}", DATA), "found a damaged or a very long one"),
    "unknown type": (npy(header("'<q99'"), DATA), "found a damaged or a very long one"),
    "type of another kind": (npy(header("{'a': 1}"), DATA), "found a damaged or a very long one"),
    "a key too many": (npy(header(fortran="False, 'x': 1"), DATA), "found a damaged or a very long one"),
    "latin-1 where UTF-8 is due": (npy(header("'\xe9'"), DATA, 3), "found a damaged or a very long one"),
    "numbers with fields": (
        npy(header("('<i4', [('a', '<i2'), ('b', '<i2')])", "(6,)"), DATA),
        "a structure",
    ),
    "arrays in an array": (
        npy(header("('<f4', (2,))", "(3,)"), DATA),
        "expected numbers; found ('<f4', (2,))",
    ),
    "sizes of thousands of digits": (
        npy(header(shape=f"({'9' * 4000}, {'9' * 4000})"), DATA),
        "expected a shape",
    ),
    "hundreds of dimensions": (
        npy(header(shape=f"({'9223372036854775807, ' * 400})"), DATA),
        "expected a shape",
    ),
    "unknown version": (npy(header(), DATA, 9), "expected an array in .npy format"),
    "text": (npy(header("'<U1'"), DATA), "expected numbers; found <U1"),
    "complex": (npy(header("'<c8'", "(3,)"), DATA), "expected numbers; found complex64"),
    "time": (npy(header("'<M8[ns]'", "(3,)"), DATA), "expected numbers; found datetime64[ns]"),
    "fields": (npy(header("[('a', '<f4'), ('b', '<i4')]", "(3,)"), DATA), "found a structure of fields"),
    "too short": (npy(header(), DATA[:-1]), "bytes, found"),
    "trailing bytes": (npy(header(), DATA + b"\0"), "bytes, found"),
    "zero rows": (npy(header(shape="(0, 3)")), "expected at least one row; found float32[0, 3]"),
    "a number": (npy(header(shape="()"), bytes(4)), "expected at least one row; found float32[]"),
    "empty rows": (npy(header(shape="(3, 0)")), "expected numbers; found float32[3, 0]"),
}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_each_version_of_the_header_is_read(tmp_path, version):
    content = npy(header(shape="(2, 3)"), np.arange(6, dtype=np.float32).tobytes(), version)
    (tmp_path / "a.npy").write_bytes(content)
    found, _ = rows_of(tmp_path / "a.npy")
    np.testing.assert_array_equal(np.sort(found.ravel()), np.arange(6))


def test_headers_of_python_2_are_read(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(header(shape="(2L, 3L)"), DATA))
    assert len(rows_of(tmp_path / "a.npy")[0]) == 2


@pytest.mark.parametrize("case", BAD_NPY)
@pytest.mark.parametrize("suffix", [".npy", ".npz", "compressed.npz"])
def test_bad_arrays_are_refused_in_one_line(tmp_path, case, suffix):
    content, problem = BAD_NPY[case]
    path = tmp_path / f"bad{suffix}"
    if suffix == ".npy":
        path.write_bytes(content)
    else:
        method = zipfile.ZIP_DEFLATED if suffix.startswith("c") else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", content)
    message = refused(path)
    assert message.startswith(f"{path}: " if suffix == ".npy" else f"{path}: x: ")
    assert problem in message


def test_a_bad_array_that_is_not_used_does_no_harm(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=IMAGES)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("meta.npy", BAD_NPY["pickled objects"][0])
        archive.writestr("README", b"hello")
    found, data = rows_of(path)
    assert len(found) == 50
    assert data.ignored == ("meta (not an array of numbers)", "README")


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.savez(tmp_path / "bomb.npz", x=np.array([Bomb()], dtype=object))
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    for name in ("bomb.npz", "bomb.npy"):
        assert "pickled objects" in refused(tmp_path / name)
    (tmp_path / "raw.npz").write_bytes(b"\x80\x04\x95\x10\x00")
    assert "expected a .npz or .npy file; found something else" in refused(tmp_path / "raw.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_at_any_place_is_refused_or_harmless(saved, compressed):
    path = saved(x=IMAGES[:4], compressed=compressed)
    whole = path.read_bytes()
    expected = sorted_rows(IMAGES[:4])
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x40]) + whole[position + 1 :])
        with contextlib.suppress(UnreadableError):
            np.testing.assert_array_equal(sorted_rows(rows_of(path)[0]), expected)
        path.write_bytes(whole[:position])
        with pytest.raises(UnreadableError):
            rows_of(path)


def test_duplicate_keys_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        archive.writestr("x.npy", npy(header(), DATA))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", npy(header(), DATA))
    assert "x: appears twice in the archive" in refused(tmp_path / "twice.npz")


def test_an_archive_without_arrays_says_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "none.npz", "w") as archive:
        archive.writestr("README", "hello")
    assert "found no numeric array" in refused(tmp_path / "none.npz")


def test_zeros_packed_a_thousand_to_one_are_refused_before_they_are_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as file,
    ):
        file.write(npy(header("'|u1'", f"({2**17}, 1024)")))
        for _ in range(2**7):
            file.write(bytes(2**20))
    assert "x: expected training data; found" in refused(tmp_path / "bomb.npz")


def test_a_member_that_declares_more_than_it_holds_is_refused(saved):
    path = saved(x=IMAGES, compressed=True)
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # uncompressed size, in the directory
    content[place : place + 4] = struct.pack("<I", 10**9)
    path.write_bytes(content)
    assert "bytes, found 1000000000" in refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named_with_file_key_and_row(saved, value):
    values = IMAGES.copy()
    values[17, 2, 1] = value
    path = saved(x=values)
    assert refused(path) == f"{path}: x: expected finite numbers; found NaN or infinity in row 17"
    assert "found NaN or infinity in row 17" in refused([(values[:10],), (values[10:],)])


def test_streams_of_the_wrong_kind_are_refused():
    assert "expected at least one row; found none" in refused(iter([]))
    assert "expected numbers; found <U1" in refused([np.array(["a"])])
    assert "expected batches of 2 inputs; found 1" in refused([IMAGES], input_names=["a", "b"])
    assert "expected equal numbers of rows" in refused([[IMAGES, LABELS[:3]]], input_names=["a", "b"])
    assert "expected batches; found an empty tuple" in refused([()])
    for options in ({}, {"samples": 3}):
        assert "expected an array of rows; found a single value" in refused([np.float32(1)], **options)


def test_what_a_maker_of_batches_raises_is_told_with_its_place(tmp_path, monkeypatch):
    def batches():
        yield IMAGES
        with open(tmp_path / "17.png", "rb"):
            pass

    text = refused(batches())
    assert "no batch came (FileNotFoundError: [Errno 2] No such file or directory:" in text
    assert re.search(r"17\.png' \(test_data\.py, line \d+\)\)$", text)
    (tmp_path / "makes.py").write_text("def batches():\n    yield 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert "no batch came (ZeroDivisionError: division by zero (makes.py, line 2))" in refused(
        "makes:batches"
    )


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}, {"samples": -3}])
def test_numbers_below_one_are_usage_errors(options):
    with pytest.raises(UsageError, match="must be at least 1"):
        Spec(**options)


def test_missing_files_and_other_things_are_unreadable(tmp_path):
    assert "no such file or directory" in refused(tmp_path / "none.npz")
    assert "without dataset_spec.pb; of images, name a function, MODULE:FUNCTION" in refused(tmp_path)
    assert "file name too long" in refused("z" * 300)
    os.mkfifo(tmp_path / "fifo.npz")
    assert "not a regular file" in refused(tmp_path / "fifo.npz")
    (tmp_path / "empty.npz").touch()
    assert "expected a .npz or .npy file" in refused(tmp_path / "empty.npz")


def test_a_file_that_changes_while_it_is_read_is_refused(saved):
    path = saved(x=IMAGES)
    with open_data(path, Spec(batch_size=10)) as data:
        batches = iter(data)
        next(batches)
        os.utime(path, ns=(1, 1))
        with pytest.raises(UnreadableError, match="the file changed while it was being read"):
            list(batches)


def test_no_room_to_unpack_is_the_systems_refusal(saved):
    path = saved(x=np.random.default_rng(0).normal(size=(1000, 100)), compressed=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(SystemRefusalError, match=r"cannot unpack data\.npz"):
            rows_of(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_arrays_are_read_in_bounded_memory(tmp_path):
    """Neither the array nor an order of its rows is ever in memory: 400 MB of data, 40 MB of address space more."""
    path = tmp_path / "large.npy"
    shape = (100_000, 1_000)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * shape[0] * shape[1])
    import tracemalloc

    tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]  # more than nothing where Python traces from its start
    try:
        with open_data(path, Spec(batch_size=64)) as data:
            for count, _ in enumerate(data):
                if count == 50:
                    break
        assert tracemalloc.get_traced_memory()[1] - before < 5_000_000
    finally:
        tracemalloc.stop()


# --- folders of tf.data -------------------------------------------------------------------------------------------


@pytest.mark.keras
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("labelled", ["x", "x y", "dict"])
def test_saved_datasets_are_drawn_in_a_seeded_order(tmp_path, batched, labelled):
    tf = pytest.importorskip("tensorflow")
    elements = {"x": IMAGES, "x y": (IMAGES, LABELS), "dict": {"x": IMAGES, "label": LABELS}}[labelled]
    dataset = tf.data.Dataset.from_tensor_slices(elements)
    (dataset.batch(8) if batched else dataset).save(str(tmp_path / "saved"))
    options = {"input_names": ["in"], "input_shapes": [(None, 4, 3)], "batch_size": 20}
    found, data = rows_of(tmp_path / "saved", **options)
    np.testing.assert_array_equal(sorted_rows(found), sorted_rows(IMAGES))
    again, _ = rows_of(tmp_path / "saved", **options)
    np.testing.assert_array_equal(found, again)
    assert data.total == 50
    assert len(rows_of(tmp_path / "saved", samples=13, **options)[0]) == 13


@pytest.mark.keras
def test_saved_datasets_of_several_shapes_come_in_their_order(tmp_path):
    tf = pytest.importorskip("tensorflow")

    def batches():
        yield np.ones((2, 5), "float32")
        yield np.zeros((2, 7), "float32")

    dataset = tf.data.Dataset.from_generator(batches, output_signature=tf.TensorSpec((None, None)))
    dataset.save(str(tmp_path / "saved"))
    with open_data(tmp_path / "saved", Spec(input_names=["in"], input_shapes=[(None, None)])) as data:
        assert [batch.shape for batch, _ in data] == [(2, 5), (2, 7)]
    assert data.notes == ["rows of several shapes are used in the order in which they were saved"]


@pytest.mark.keras
def test_damaged_datasets_are_unreadable(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tf.data.Dataset.from_tensor_slices(IMAGES).save(str(tmp_path / "saved"))
    (tmp_path / "saved" / "dataset_spec.pb").write_bytes(b"garbage")
    assert "damaged dataset" in refused(tmp_path / "saved")


@pytest.mark.keras
def test_datasets_without_end_ask_for_a_number_of_samples():
    tf = pytest.importorskip("tensorflow")
    endless = tf.data.Dataset.from_tensor_slices(IMAGES).batch(10).repeat()
    with pytest.raises(UsageError, match="never ends"):
        rows_of(endless)
    assert len(rows_of(endless, samples=75)[0]) == 75


# --- targets ------------------------------------------------------------------------------------------------------


def labelled(source, **options) -> tuple[np.ndarray, np.ndarray]:
    with open_data(source, Spec(purpose=VALIDATION, batch_size=16, **options)) as data:
        parts = list(data.labelled())
    assert sum(rows for *_, rows in parts) == sum(len(x) for x, *_ in parts)
    return tuple(np.concatenate(column) for column in list(zip(*parts, strict=True))[:2])


ONE_HOT = np.eye(50, dtype="float32")


@pytest.mark.parametrize(
    "labels", [LABELS, LABELS[:, None], ONE_HOT, LABELS.astype("uint8")], ids=lambda y: f"{y.dtype}{y.ndim}"
)
@pytest.mark.parametrize(
    "kind", ["stored", "compressed", "arrays", "mapping", "batches", "lists", "indexed", "fortran"]
)
def test_targets_stay_beside_their_rows(kind, labels, saved):
    class Indexed:
        def __len__(self):
            return 5

        def __getitem__(self, number):
            return IMAGES[10 * number : 10 * number + 10], labels[10 * number : 10 * number + 10]

    batches = [(IMAGES[start : start + 20], labels[start : start + 20]) for start in range(0, 50, 20)]
    source = {
        "stored": lambda: saved(x=IMAGES, y=labels),
        "compressed": lambda: saved(compressed=True, x_val=IMAGES, y_val=labels),
        "fortran": lambda: saved(x_test=np.asfortranarray(IMAGES), y_test=np.asfortranarray(labels)),
        "arrays": lambda: (IMAGES, labels),
        "mapping": lambda: {"images": IMAGES, "labels": labels},
        "batches": lambda: iter(batches),
        "lists": lambda: [list(batch) for batch in batches],
        "indexed": Indexed,
    }[kind]()
    x, y = labelled(source)
    np.testing.assert_array_equal(x, IMAGES)  # in their own order
    np.testing.assert_array_equal(y, labels)
    assert y.dtype == labels.dtype


def test_targets_of_a_saved_dataset_stay_beside_their_rows(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).save(str(tmp_path / "rows"))
    tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(7).save(str(tmp_path / "batches"))
    for name in ("rows", "batches"):
        x, y = labelled(tmp_path / name, input_names=["image"], input_shapes=[(None, 4, 3)])
        np.testing.assert_array_equal(x, IMAGES)
        np.testing.assert_array_equal(y, LABELS)


def test_only_inputs_are_preprocessed(saved):
    x, y = labelled(saved(x=IMAGES, y=LABELS), preprocess=lambda batch: batch * 0 + 1)
    assert (x == 1).all()
    np.testing.assert_array_equal(y, LABELS)


def test_targets_are_chosen_by_name(saved):
    path = saved(left=IMAGES, right=IMAGES + 1, kind=LABELS, other=-LABELS)
    names = {"input_names": ["left", "right"], "output_names": ["kind", "size"]}
    spec = Spec(purpose=VALIDATION, bind_targets=["other=size"], **names)
    with open_data(path, spec) as data:
        ((x, y, _, rows),) = data.labelled()
    assert rows == 50
    assert set(x) == {"left", "right"}
    np.testing.assert_array_equal(y["kind"], LABELS)
    np.testing.assert_array_equal(y["size"], -LABELS)
    with pytest.raises(UsageError, match="--val-target other=none names no output of the model"):
        Spec(purpose=VALIDATION, bind_targets=["other=none"], **names)


def test_the_only_other_array_is_the_input(saved):
    x, y = labelled(saved(digits=IMAGES, y=LABELS))
    np.testing.assert_array_equal(x, IMAGES)
    np.testing.assert_array_equal(y, LABELS)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            {"x": IMAGES},
            "expected one array for the model's target; found x float32[50, 4, 3]; choose with --val-target KEY",
        ),
        (
            {"y": LABELS},
            "expected one array for the model's input; found y int64[50]; choose with --val-input KEY",
        ),
        ({"x": IMAGES, "y": LABELS[:9]}, "expected arrays of one length; found x 50, y 9"),
        (
            {"x": IMAGES, "y": np.full(50, np.nan)},
            "y: expected finite numbers; found NaN or infinity in row 0",
        ),
        ([IMAGES], "expected batches (x, y); found x alone"),
        ([(IMAGES, LABELS[:9])], "expected equal numbers of rows"),
        ([(IMAGES, (LABELS, LABELS, LABELS))], "expected batches of 2 outputs; found 3"),
    ],
    ids=str,
)
def test_targets_that_do_not_fit_are_refused(source, expected):
    outputs = ["a", "b"] if "outputs" in expected else []
    with pytest.raises(UnreadableError) as info:
        labelled(source, output_names=outputs)
    assert expected in str(info.value)


def test_a_single_array_has_no_targets(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    with pytest.raises(UnreadableError, match=r"expected inputs and targets; found a single array \(.npy\)"):
        labelled(tmp_path / "x.npy")


def test_a_function_that_fails_is_named_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_failing.py").write_text("def batches():\n    raise RuntimeError('no such disk')\n")
    monkeypatch.chdir(tmp_path)
    line = "my_failing:batches failed: RuntimeError: no such disk (my_failing.py, line 2)"
    with pytest.raises(UsageError, match=f"^{re.escape(line)}$"):
        import_function("my_failing:batches")()
