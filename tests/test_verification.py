"""`swa-avg verify`: equal, or which tensors differ; the outputs are damaged here, byte by byte."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest

import makers
from conftest import Ended
from swa_avg.verification import verify

Cli = Callable[..., Ended]
WRITERS = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".h5": makers.write_legacy,
    ".weights.json": makers.write_sharded,
}
OUTPUTS = [(suffix, suffix, ()) for suffix in WRITERS] + [
    (".keras", ".weights.h5", ()),
    (".keras", ".keras", ("--optimizer", "drop")),
    (".weights.h5", ".weights.h5", ("--optimizer", "drop")),
    (".weights.json", ".weights.json", ("--optimizer", "drop")),
    (".keras", ".keras", ("--method", "ema:0.5")),
    (".keras", ".keras", ("--method", "weights:1,1,0")),
    (".weights.h5", ".weights.h5", ("--no-verify",)),
    (".keras", ".keras", ("--last", "1")),
]


def _write_inputs(folder: Path, suffix: str) -> None:
    for number in (1, 2, 10):
        arrays = makers.weights(number)
        arrays["layers/table/vars/0"] = np.arange(6)
        if suffix == ".h5":
            arrays = {f"dense/{n.replace('/', '_')}": v for n, v in arrays.items() if "optimizer" not in n}
        WRITERS[suffix](folder / f"ckpt_{number}{suffix}", arrays)


def _places(path: Path) -> dict[str, tuple[Path, int, int]]:
    """Return tensor -> (file, first byte, size), by h5py and zipfile."""
    base = 0
    if path.suffix == ".json":
        files = sorted(path.parent.glob(path.name.removesuffix(".weights.json") + "_[0-9]*.weights.h5"))
    else:
        files = [path]
    places: dict[str, tuple[Path, int, int]] = {}
    for file in files:
        data = file.read_bytes()
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo("model.weights.h5")
            base = info.header_offset + 30 + len(info.filename)
            data = data[base : base + info.file_size]
        with h5py.File(io.BytesIO(data), "r") as hdf5:

            def visit(name: str, item: object, file: Path = file, base: int = base) -> None:
                if isinstance(item, h5py.Dataset) and item.nbytes:
                    places[name] = file, base + item.id.get_offset(), item.nbytes

            hdf5.visititems(visit)
    return places


def _flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(("suffix", "output", "options"), OUTPUTS, ids=str)
def test_an_output_is_equal_until_one_bit_of_any_tensor_is_flipped(
    suffix: str, output: str, options: tuple[str, ...], tmp_path: Path, swa_avg: Cli
) -> None:
    _write_inputs(tmp_path, suffix)
    target = tmp_path / f"swa{output}"
    assert swa_avg(tmp_path / f"ckpt_*{suffix}", "-o", target, *options).code == 0
    ended = swa_avg("verify", target, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["equal"]
    rng = np.random.default_rng(0)
    places = _places(target)
    assert len(places) >= 6
    assert any("optimizer" in name for name in places) == (suffix != ".h5" and "drop" not in options)
    for name, (file, start, size) in places.items():
        position, bit = start + int(rng.integers(size)), int(rng.integers(8))
        _flip(file, position, bit)
        ended = swa_avg("verify", target, "--json")
        found = [finding["subject"] for finding in json.loads(ended.out)["findings"]]
        assert found == [name, *(["model.weights.h5"] if output == ".keras" else [])]
        assert ended.code == 4
        assert f"{target}: {name}: differs from what the inputs give" in ended.err
        _flip(file, position, bit)
    assert swa_avg("verify", target).code == 0


@pytest.mark.parametrize(
    "name", ["10:00:0{}.keras", "runs\\ckpt_{}.keras", "ckpt_{}\u200b.keras", "..{}.keras"]
)
def test_whatever_a_file_may_be_called_its_output_is_verified(
    name: str, tmp_path: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        makers.write_archive(Path(name.format(number)), makers.weights(number))
    assert swa_avg(*(name.format(number) for number in (1, 2)), "-o", "swa.keras").code == 0
    assert swa_avg("verify", "swa.keras").code == 0


def test_what_is_printed_names_method_and_numbers(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".keras")
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_*.keras", "-o", target).code == 0
    assert swa_avg("verify", target).err == (
        f"equal: {target} is the uniform average of 3 checkpoints "
        "(6 tensors averaged again, 4 compared with the newest input's)\n"
    )
    _, start, _ = _places(target)["layers/dense/vars/1"]
    _flip(target, start + 8, 0)
    ended = swa_avg("verify", target)
    assert ended.code == 4
    assert ended.err.splitlines()[0] == (
        f"swa-avg: error: {target}: layers/dense/vars/1: differs from what the inputs give, first at value 2 of 5"
    )


def test_one_checkpoint_alone_is_named(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".keras")
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_2.keras", "-o", target).code == 0
    assert swa_avg("verify", target).err.startswith(
        f"equal: {target} is a copy of ckpt_2.keras, no average ("
    )


def test_values_in_another_block_are_compared_too(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2):
        rng = np.random.default_rng(number)
        arrays = {"layers/dense/vars/0": (2 + rng.standard_normal((1000, 700))).astype(np.float32)}
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", arrays)
    target = tmp_path / "swa.weights.h5"
    assert swa_avg(tmp_path / "ckpt_*.weights.h5", "-o", target).code == 0
    _, start, size = _places(target)["layers/dense/vars/0"]
    _flip(target, start + size - 1, 7)
    ended = swa_avg("verify", target)
    assert ended.code == 4
    assert "first at value 699999 of 700000" in ended.err


def _members(path: Path, **replaced: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (members | replaced).items():
            archive.writestr(zipfile.ZipInfo(name), data)


def test_what_stands_beside_the_weights_is_compared(tmp_path: Path, swa_avg: Cli) -> None:
    for number in (1, 2):
        makers.write_archive(
            tmp_path / f"ckpt_{number}.keras", makers.weights(number), **{"assets/words.txt": b"cat"}
        )
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_*.keras", "-o", target).code == 0
    good = target.read_bytes()
    with zipfile.ZipFile(target) as archive:
        metadata = json.loads(archive.read("metadata.json"))
    settings = makers.config()
    settings["config"]["layers"][0]["config"]["units"] = 6
    for replaced, subject in (
        ({"assets/words.txt": b"dog"}, "assets/words.txt"),
        ({"config.json": json.dumps(settings).encode()}, "config.config.layers[0].config.units"),
        ({"config.json": json.dumps(makers.config() | {"compile_config": {}}).encode()}, "config.json"),
        ({"metadata.json": json.dumps(metadata | {"keras_version": "2"}).encode()}, "metadata.json"),
    ):
        target.write_bytes(good)
        _members(target, **replaced)
        ended = swa_avg("verify", target)
        assert ended.code == 4
        assert f"{target}: {subject}: " in ended.err.splitlines()[0]


def test_bytes_between_the_tensors_of_an_archive_are_compared(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".keras")
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_*.keras", "-o", target).code == 0
    spans = sorted((start, start + size) for _, start, size in _places(target).values())
    gap = next(stop for (_, stop), (start, _) in pairwise(spans) if start - stop > 8)
    _flip(target, gap + 1, 0)
    ended = swa_avg("verify", target)
    assert ended.code in (3, 4)  # HDF5 itself may notice
    assert "bytes outside the tensors differ" in ended.err or "damaged" in ended.err


def test_inputs_that_changed_are_all_named(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".weights.h5")
    target = tmp_path / "swa.weights.h5"
    assert swa_avg(tmp_path / "ckpt_*.weights.h5", "-o", target).code == 0
    for number in (1, 10):
        file, start, _ = _places(tmp_path / f"ckpt_{number}.weights.h5")["layers/dense/vars/0"]
        _flip(file, start, 0)
    makers.write_weights(tmp_path / "ckpt_2.weights.h5", {"layers/dense/vars/0": np.ones(3)})
    ended = swa_avg("verify", target)
    assert ended.code == 4
    lines = ended.err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [
        str(tmp_path / f"ckpt_{number}.weights.h5") for number in (1, 2, 10)
    ]
    assert all("has changed since" in line for line in lines)
    assert "bytes of weights then" in lines[1]


def test_inputs_are_found_in_the_folder_that_is_named(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".keras")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "swa.keras"
    assert swa_avg(tmp_path / "ckpt_*.keras", "-o", target).code == 0
    ended = swa_avg("verify", target)
    assert (ended.code, ended.err) == (
        3,
        f"swa-avg: error: {target}: was made from ckpt_1.keras, ckpt_2.keras, ckpt_10.keras, not found in "
        f"{tmp_path / 'out'}; name the folder that holds them (inputs)\n",
    )
    assert swa_avg("verify", target, "--inputs", tmp_path).code == 0


@pytest.mark.parametrize("options", [(), ("--no-verify",)], ids=str)
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_inputs_of_one_name_are_told_apart_by_their_content(
    suffix: str, options: tuple[str, ...], tmp_path: Path, swa_avg: Cli
) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        WRITERS[suffix](folder / f"ckpt{suffix}", makers.weights(number))
    target = tmp_path / f"swa{suffix}"
    average = ("--method", "weights:0.25,0.75")
    assert (
        swa_avg(*(folder / f"ckpt{suffix}" for folder in folders), "-o", target, *average, *options).code == 0
    )
    for named in (folders, folders[::-1]) if suffix == ".keras" or not options else (folders,):
        ended = swa_avg("verify", target, "--inputs", named[0], "--inputs", named[1], "--json")
        assert ended.code == 0, ended.err
        assert json.loads(ended.out)["inputs"] == [str(folder / f"ckpt{suffix}") for folder in folders]
    assert verify(target, folders).equal
    ended = swa_avg("verify", target, "--inputs", folders[0], "--inputs", folders[0])
    assert (ended.code, ended.err) == (
        3,
        f"swa-avg: error: {target}: was made from 2 checkpoints named ckpt{suffix}, 1 found in {folders[0]}; "
        "name each folder (inputs)\n",
    )


def test_of_one_name_in_several_folders_the_input_of_then_is_taken(tmp_path: Path, swa_avg: Cli) -> None:
    for folder in ("damaged", "other", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "damaged" / "ckpt_1.keras").write_bytes(b"PK\x03\x04")
    makers.write_archive(tmp_path / "other" / "ckpt_1.keras", makers.weights(3))
    for number in (1, 2):
        makers.write_archive(tmp_path / "run" / f"ckpt_{number}.keras", makers.weights(number))
    target = tmp_path / "swa.keras"
    assert swa_avg(tmp_path / "run" / "ckpt_*.keras", "-o", target).code == 0
    folders = [tmp_path / folder for folder in ("damaged", "other", "run")]
    assert verify(target, folders).inputs == tuple(folders[2] / f"ckpt_{number}.keras" for number in (1, 2))


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_swa_avg_did_not_write_is_refused_in_one_line(suffix: str, tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, suffix)
    path = tmp_path / f"ckpt_1{suffix}"
    ended = swa_avg("verify", path)
    assert (ended.code, ended.err) == (
        3,
        f"swa-avg: error: {path}: does not say how it was made: it is not an output of swa-avg\n",
    )


GOOD_INPUT = {"name": "ckpt_1.keras", "size": 1, "crc32": ["00000000"], "coefficient": 1.0}
GOOD = {"method": "uniform", "optimizer": "keep", "inputs": [GOOD_INPUT]}


@pytest.mark.parametrize(
    "record",
    [
        [],
        {},
        GOOD | {"inputs": []},
        GOOD | {"inputs": [GOOD_INPUT | {"name": "../ckpt_1.keras"}]},
        GOOD | {"inputs": [GOOD_INPUT | {"size": "1"}]},
        GOOD | {"inputs": [GOOD_INPUT | {"crc32": ["xyz"]}]},
        GOOD | {"inputs": [GOOD_INPUT | {"crc32": 5}]},
        GOOD | {"inputs": [GOOD_INPUT | {"coefficient": "1"}]},
        GOOD | {"inputs": [GOOD_INPUT | {"coefficient": True}]},
        GOOD | {"inputs": [GOOD_INPUT | {"coefficient": 10**309}]},
        GOOD | {"optimizer": "burn"},
        GOOD | {"dtype": "float8"},
        GOOD | {"batchnorm": {"values": {"x": 1}}},
        GOOD | {"batchnorm": 3},
    ],
    ids=str,
)
def test_a_record_that_is_not_ours_is_refused_in_one_line(
    record: object, tmp_path: Path, swa_avg: Cli
) -> None:
    path = makers.write_archive(
        tmp_path / "swa.keras",
        makers.weights(),
        **{"metadata.json": json.dumps({"swa_avg": record}).encode()},
    )
    ended = swa_avg("verify", path)
    assert ended.code == 3
    assert ended.err.startswith(f"swa-avg: error: {path}: its record of how it was made is damaged")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_record_that_is_no_object_is_refused_by_every_format(
    suffix: str, tmp_path: Path, swa_avg: Cli
) -> None:
    _write_inputs(tmp_path, suffix)
    path = tmp_path / f"ckpt_1{suffix}"
    if suffix == ".keras":
        _members(path, **{"metadata.json": b'{"swa_avg": null}'})
    elif suffix == ".weights.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"swa_avg": "yes"}))
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["swa_avg"] = np.bytes_(b"[1]")
    for command in (["verify", path], [path, "-o", tmp_path / f"swa{suffix}"]):
        ended = swa_avg(*command)
        assert ended.code == 3
        assert ended.err.startswith(f"swa-avg: error: {path}: its record of how it was made is ")
        assert ended.err.endswith("not a JSON object\n")
        assert ended.err.count("\n") == 1


def test_an_output_of_another_format_than_its_inputs_is_named(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".weights.h5")
    target = tmp_path / "swa.weights.h5"
    assert swa_avg(tmp_path / "ckpt_*.weights.h5", "-o", target).code == 0
    with h5py.File(target, "r") as file:
        metadata = json.dumps({"swa_avg": json.loads(bytes(file.attrs["swa_avg"]))}).encode()
        arrays = {}
        file.visititems(
            lambda name, item: arrays.update({name: item[()]} if isinstance(item, h5py.Dataset) else {})
        )
    makers.write_archive(target, arrays, **{"metadata.json": metadata})
    ended = swa_avg("verify", target)
    assert (ended.code, ended.err) == (
        4,
        f"swa-avg: error: {target}: format: expected Keras weights, found .keras archive\n",
    )


def test_a_tensor_that_is_missing_or_extra_is_named(tmp_path: Path, swa_avg: Cli) -> None:
    _write_inputs(tmp_path, ".weights.h5")
    target = tmp_path / "swa.weights.h5"
    assert swa_avg(tmp_path / "ckpt_*.weights.h5", "-o", target).code == 0
    with h5py.File(target, "r+") as file:
        del file["layers/dense/vars/1"]
        file["layers/other/vars/0"] = np.ones(3, np.float32)
    ended = swa_avg("verify", target)
    assert ended.code == 4
    assert ended.err == (
        f"swa-avg: error: {target}: layers/dense/vars/1: missing; the inputs have it\n"
        f"swa-avg: error: {target}: layers/other/vars/0: extra; the inputs do not have it\n"
    )


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refreshed_statistics_are_held_against_their_digest(tmp_path: Path, swa_avg: Cli) -> None:
    keras = pytest.importorskip("keras")
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), layers.BatchNormalization(), layers.Dense(2)]
    )
    for number in (1, 2):
        keras.utils.set_random_seed(number)
        model.set_weights([np.random.default_rng(number).random(w.shape) for w in model.get_weights()])
        model.save(tmp_path / f"ckpt_{number}.keras")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((50, 4)).astype("float32"))
    target = tmp_path / "swa.keras"
    ended = swa_avg(tmp_path / "ckpt_*.keras", "-o", target, "--bn-refresh", tmp_path / "x.npy")
    assert ended.code == 0, ended.err
    ended = swa_avg("verify", target)
    assert ended.code == 0, ended.err
    statistics = [f"layers/batch_normalization/vars/{number}" for number in (2, 3)]
    assert (
        f"compared with the digests in the record alone: {', '.join(statistics)}\nequal, but for 2 statistics that "
        f"a refresh replaced and that cannot be derived without its data: {target} is the uniform average"
        in ended.err
    )
    for name, (file, start, _) in _places(target).items():
        _flip(file, start, 0)
        ended = swa_avg("verify", target)
        assert ended.code == 4
        reason = (
            "the refresh of BatchNorm left" if name in statistics else "differs from what the inputs give"
        )
        assert f"{target}: {name}: " in ended.err
        assert reason in ended.err.splitlines()[0]
        _flip(file, start, 0)


def test_an_output_at_a_url_is_verified(tmp_path: Path, swa_avg: Cli) -> None:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    _write_inputs(tmp_path, ".keras")
    for path in tmp_path.iterdir():
        system.pipe(f"/verify/{path.name}", path.read_bytes())
    assert swa_avg("memory://verify/ckpt_*.keras", "-o", "memory://verify/swa.keras").code == 0
    ended = swa_avg("verify", "memory://verify/swa.keras")
    assert (ended.code, ended.err[:6]) == (0, "equal:"), ended.err
    target = tmp_path / "swa.keras"
    target.write_bytes(system.cat("/verify/swa.keras"))
    assert swa_avg("verify", target, "--inputs", "memory://verify").code == 0
    _, start, _ = _places(target)["layers/dense/vars/1"]
    _flip(target, start, 3)
    system.pipe("/verify/swa.keras", target.read_bytes())
    ended = swa_avg("verify", "memory://verify/swa.keras")
    assert ended.code == 4
    assert "layers/dense/vars/1: differs from what the inputs give, first at value 0 of 5" in ended.err
    system.store.clear()
