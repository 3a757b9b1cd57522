"""What every format owes the rest of the tool; the files are written by h5py and zipfile, not by us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

import makers
import oracle
from swa_avg import average
from swa_avg.errors import SwaAvgError, UnreadableError
from swa_avg.formats import open_checkpoint

DTYPES = {
    "float16": np.arange(6, dtype=np.float16),
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "float64": np.arange(6, dtype=np.float64),
    "int64": np.array(5, np.int64),
    "uint32": np.array([1, 2], np.uint32),
    "bool": np.array([True, False]),
}


class Conformance:
    """Tests that each format's class inherits."""

    suffix: str
    kind: str

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        raise NotImplementedError

    def name(self, layer: str, weight: str) -> str:
        return f"layers/{layer}/vars/{weight}"

    def arrays(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            self.name("dense", "0"): (2 + rng.standard_normal((40, 30))).astype(np.float32),
            self.name("dense", "1"): rng.standard_normal(30).astype(np.float16),
            self.name("odd", "0"): np.float64(seed),
            self.name("odd", "1"): np.zeros((0, 3), np.float32),
        }

    def test_tensors_are_what_h5py_reads(self, tmp_path: Path) -> None:
        arrays = {self.name(dtype, "0"): value for dtype, value in DTYPES.items()}
        path = self.write(tmp_path / f"ckpt_1{self.suffix}", arrays)
        checkpoint = open_checkpoint(path)
        stored = oracle.read_arrays(path)
        assert checkpoint.kind == self.kind
        assert len(checkpoint.tensors) == len(stored) == len(DTYPES)
        for name, value in stored.items():
            tensor = checkpoint.tensors[name]
            assert (tensor.shape, tensor.dtype, tensor.role) == (value.shape, value.dtype.name, "weight")
            assert checkpoint.shards[tensor.shard].read(tensor.offset, tensor.nbytes) == value.tobytes()
        checkpoint.close()

    def test_average_is_the_mean_and_reads_back(self, tmp_path: Path) -> None:
        inputs = [self.write(tmp_path / f"ckpt_{seed}{self.suffix}", self.arrays(seed)) for seed in (1, 2, 3)]
        average(inputs, tmp_path / f"swa{self.suffix}")
        written = oracle.read_arrays(tmp_path / f"swa{self.suffix}")
        stored = [oracle.read_arrays(path) for path in inputs]
        assert written.keys() == stored[0].keys()
        for name, value in written.items():
            expected = oracle.mean([arrays[name] for arrays in stored])
            assert (value.dtype, value.shape, value.tobytes()) == (
                expected.dtype,
                expected.shape,
                expected.tobytes(),
            )

    def test_average_is_known_as_one(self, tmp_path: Path) -> None:
        inputs = [self.write(tmp_path / f"ckpt_{seed}{self.suffix}", self.arrays(seed)) for seed in (1, 2)]
        average(inputs, tmp_path / f"swa{self.suffix}")
        for path, expected in ((inputs[0], False), (tmp_path / f"swa{self.suffix}", True)):
            checkpoint = open_checkpoint(path)
            assert checkpoint.is_average == expected
            checkpoint.close()

    def test_a_checkpoint_of_the_same_layout_shares_its_tensors(self, tmp_path: Path) -> None:
        first, second = (self.write(tmp_path / f"ckpt_{n}{self.suffix}", self.arrays(n)) for n in (1, 2))
        other = self.write(
            tmp_path / f"other{self.suffix}", {**self.arrays(3), self.name("more", "0"): np.ones(3)}
        )
        like = open_checkpoint(first)
        same, different = open_checkpoint(second, like), open_checkpoint(other, like)
        if self.kind != "sharded Keras weights":  # its map names the shards, and so differs
            assert same.tensors is like.tensors
        assert dict(same.tensors) == dict(like.tensors)
        assert different.tensors != like.tensors
        for checkpoint in (like, same, different):
            checkpoint.close()

    def test_every_truncation_is_refused(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / f"ckpt_1{self.suffix}", self.arrays(1))
        for file in _files(tmp_path):
            data = file.read_bytes()
            step = max(1, len(data) // 60)
            for size in range(0, len(data), step):
                file.write_bytes(data[:size])
                with pytest.raises(UnreadableError, match="ckpt_1"):
                    open_checkpoint(path).close()
            file.write_bytes(data)
        open_checkpoint(path).close()

    def test_inputs_are_never_written_to(self, tmp_path: Path) -> None:
        inputs = [self.write(tmp_path / f"ckpt_{seed}{self.suffix}", self.arrays(seed)) for seed in (1, 2)]
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in _files(tmp_path)}
        for path in before:
            path.chmod(0o444)
        average(inputs, tmp_path / f"swa{self.suffix}")
        assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


class TestArchive(Conformance):
    suffix, kind = ".keras", ".keras archive"

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        return makers.write_archive(path, arrays)

    @pytest.mark.parametrize("offset", range(8))
    def test_a_member_may_start_at_any_offset(self, offset: int, tmp_path: Path) -> None:
        settings = makers.config() | {"padding": "x" * offset}
        inputs = [
            makers.write_archive(tmp_path / f"ckpt_{n}.keras", self.arrays(n), settings) for n in (1, 2)
        ]
        average(inputs, tmp_path / "swa.keras")
        written = oracle.read_arrays(tmp_path / "swa.keras")
        for name, value in written.items():
            assert (
                value.tobytes() == oracle.mean([np.asarray(self.arrays(n)[name]) for n in (1, 2)]).tobytes()
            )

    def test_assets_are_copied(self, tmp_path: Path) -> None:
        import zipfile

        vocabulary = {"assets/layers/text/vocabulary.txt": b"cat\nmat" * 1000}
        inputs = [
            makers.write_archive(tmp_path / f"ckpt_{n}.keras", self.arrays(n), **vocabulary) for n in (1, 2)
        ]
        average(inputs, tmp_path / "swa.keras")
        with zipfile.ZipFile(tmp_path / "swa.keras") as archive:
            assert archive.testzip() is None
            for name, data in vocabulary.items():
                assert archive.read(name) == data


class TestFolder(Conformance):
    suffix, kind = "", "Keras model folder"

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        return makers.write_folder(path, arrays)


class TestWeights(Conformance):
    suffix, kind = ".weights.h5", "Keras weights"

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        return makers.write_weights(path, arrays)


class TestLegacyModel(Conformance):
    suffix, kind = ".h5", "legacy HDF5 model"

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        return makers.write_legacy(
            path, {name.removeprefix("model_weights/"): value for name, value in arrays.items()}
        )

    def name(self, layer: str, weight: str) -> str:
        return f"model_weights/{layer}/{layer}/{weight}:0"


class TestLegacyWeights(Conformance):
    suffix, kind = ".hdf5", "legacy HDF5 weights"

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        return makers.write_legacy(path, arrays, full=False)

    def name(self, layer: str, weight: str) -> str:
        return f"{layer}/{layer}/{weight}:0"

    def test_a_layer_may_be_called_optimizer(self, tmp_path: Path) -> None:
        inputs = [
            self.write(tmp_path / f"ckpt_{n}.hdf5", {"optimizer/optimizer/w:0": np.full(3, n, np.float32)})
            for n in (1, 4)
        ]
        average(inputs, tmp_path / "swa.hdf5", optimizer="drop")
        assert oracle.read_arrays(tmp_path / "swa.hdf5")["optimizer/optimizer/w:0"].tolist() == [2.5] * 3


class TestSharded(Conformance):
    suffix, kind = ".weights.json", "sharded Keras weights"

    def write(self, path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
        return makers.write_sharded(path, arrays)

    def test_shards_may_be_split_differently(self, tmp_path: Path) -> None:
        import json

        arrays = {n: {f"l{i}/vars/0": np.full(4, n * i, np.float32) for i in range(5)} for n in (1, 3)}
        one = self.write(tmp_path / "ckpt_1.weights.json", arrays[1])
        other = makers.write_weights(tmp_path / "ckpt_3_00000.weights.h5", arrays[3])
        weight_map = {f"/l{i}/vars": other.name for i in range(5)}
        (tmp_path / "ckpt_3.weights.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for newest, older in (
            (tmp_path / "ckpt_3.weights.json", one),
            (one, tmp_path / "ckpt_3.weights.json"),
        ):
            output = tmp_path / f"swa_{newest.name}"
            last = newest.rename(tmp_path / "zzz.weights.json") if newest is one else newest
            average([older, last], output)
            found = oracle.read_arrays(output)
            assert {name: value.tolist() for name, value in found.items()} == {
                f"l{i}/vars/0": [2.0 * i] * 4 for i in range(5)
            }

    def test_an_existing_set_cannot_be_replaced_in_one_step(
        self, tmp_path: Path, swa_avg: Callable[..., object]
    ) -> None:
        inputs = [self.write(tmp_path / f"ckpt_{n}.weights.json", self.arrays(n)) for n in (1, 2)]
        output = tmp_path / "swa.weights.json"
        average(inputs, output)
        with pytest.raises(SwaAvgError, match="several files cannot be replaced in one step"):
            average(inputs, output, overwrite=True)
