"""Models that are folders, and presets, which have more files of weights than one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import makers
import oracle
from conftest import Ended
from swa_avg import average, verify
from swa_avg.errors import MismatchError, UnreadableError, UsageError
from swa_avg.formats import open_checkpoint

Cli = Callable[..., Ended]
NUMBERS = (1, 2, 3)
VOCABULARY = b"the\nfox\n" * 1000


def _head(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(100 + seed)
    return {"layers/dense/vars/0": rng.standard_normal((5, 2)).astype("float32")}


def _preset(path: Path, seed: int, **files: bytes) -> Path:
    """Write a preset of a task, as KerasHub lays it out."""
    contents = {
        "task.json": json.dumps({"class_name": "Classifier", "config": {"num_classes": 2}}).encode(),
        "task.weights.h5": makers.store_bytes(_head(seed)),
        "tokenizer.json": json.dumps({"class_name": "Tokenizer", "config": {"lowercase": True}}).encode(),
        "assets/tokenizer/vocabulary.txt": VOCABULARY,
    }
    return makers.write_folder(path, makers.weights(seed), **(contents | files))


def _sharded(path: Path, seed: int) -> Path:
    """Write a preset whose weights are a set of shards."""
    _preset(path, seed)
    (path / "model.weights.h5").unlink()
    makers.write_sharded(path / "model.weights.json", makers.weights(seed))
    return path


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _mean(paths: list[Path], name: str) -> np.ndarray:
    return oracle.mean([oracle.read_arrays(path)[name] for path in paths])


def test_a_pattern_may_name_folders_and_the_output_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for number in (2, 10, 1):
        makers.write_folder(Path(f"run/ckpt_{number}"), makers.weights(number))
    assert swa_avg("run/ckpt_*", "-q").code == 0
    assert _names(Path("swa")) == ["config.json", "metadata.json", "model.weights.h5"]
    metadata = json.loads(Path("swa/metadata.json").read_text())
    assert [entry["name"] for entry in metadata["swa_avg"]["inputs"]] == ["ckpt_1", "ckpt_2", "ckpt_10"]
    assert metadata["keras_version"] == "3.15.1"
    assert swa_avg("verify", "swa", "--inputs", "run", "-q").code == 0
    # One that is named by itself, or as the current folder, is a checkpoint, too.
    assert swa_avg("inspect", "run/ckpt_1", "-q").code == 0
    monkeypatch.chdir(tmp_path / "run" / "ckpt_1")
    average([".", "../ckpt_2"], "../../two")
    assert [entry["name"] for entry in json.loads(Path("../../two/metadata.json").read_text())["swa_avg"]["inputs"]] == ["ckpt_1", "ckpt_2"]  # fmt: skip


def test_a_folder_of_folders_proposes_a_pattern(tmp_path: Path) -> None:
    makers.write_folder(tmp_path / "run" / "ckpt_1", makers.weights(1))
    with pytest.raises(UnreadableError, match=r"a folder without checkpoints\.json; name its models, such as '.*/run/\*/'$"):  # fmt: skip
        average(tmp_path / "run", tmp_path / "swa")


@pytest.mark.parametrize("write", [_preset, _sharded])
@pytest.mark.parametrize("optimizer", ["keep", "drop"])
def test_both_weights_of_a_preset_are_averaged_and_all_else_is_copied(
    write: Callable[[Path, int], Path], optimizer: str, tmp_path: Path
) -> None:
    inputs = [write(tmp_path / f"ckpt_{n}", n) for n in NUMBERS]
    (inputs[-1] / "notes.txt").write_text("not of the model")
    output = tmp_path / "swa"
    average(inputs, output, optimizer=optimizer)
    assert _names(output) == [name for name in _names(inputs[-1]) if name != "notes.txt"]
    assert (output / "assets/tokenizer/vocabulary.txt").read_bytes() == VOCABULARY
    for name in ("config.json", "task.json", "tokenizer.json"):
        assert (output / name).read_bytes() == (inputs[-1] / name).read_bytes()
    for file in ("task.weights.h5", "model.weights.json" if write is _sharded else "model.weights.h5"):
        written = oracle.read_arrays(output / file)
        kept = {
            name: value
            for name, value in oracle.read_arrays(inputs[-1] / file).items()
            if optimizer == "keep" or not name.startswith("optimizer")
        }
        assert written.keys() == kept.keys()
        for name, value in written.items():
            expected = kept[name]
            if not name.startswith("optimizer"):
                expected = _mean([path / file for path in inputs], name)
            assert (value.dtype, value.tobytes()) == (expected.dtype, expected.tobytes())
    assert verify(output, tmp_path).equal
    (output / "assets/tokenizer/vocabulary.txt").write_bytes(VOCABULARY[::-1])
    assert "assets/tokenizer/vocabulary.txt: differs from the newest input's" in str(
        verify(output, tmp_path).findings[0]
    )


def test_parts_of_presets_that_must_be_equal_are_compared(tmp_path: Path) -> None:
    one = _preset(tmp_path / "ckpt_1", 1, **{"tokenizer.json": b'{"config": {"lowercase": false}}'})
    two = _preset(tmp_path / "ckpt_2", 2)
    with pytest.raises(MismatchError) as caught:
        average([one, two], tmp_path / "swa")
    assert "ckpt_1: config.tokenizer.json.config.lowercase: expected True as in ckpt_2, found False" in str(
        caught.value
    )
    (one / "task.weights.h5").unlink()
    with pytest.raises(MismatchError, match=r"task\.weights\.h5/layers/dense/vars/0: missing; ckpt_2 has it"):
        average([one, two], tmp_path / "swa")


def test_the_head_of_a_preset_is_not_left_out_silently(tmp_path: Path, swa_avg: Cli) -> None:
    inputs = [_preset(tmp_path / f"ckpt_{n}", n) for n in NUMBERS]
    ended = swa_avg(*inputs, "-o", tmp_path / "swa.weights.h5")
    line = "the output swa.weights.h5 must be named as a folder, since the inputs are Keras model folders"
    assert (ended.code, ended.err) == (2, f"swa-avg: error: {line}\n")
    if _has_keras():
        ended = swa_avg(*inputs, "-o", tmp_path / "swa", "--bn-refresh", "x.npz")
        line = (
            "ckpt_3 is a preset of a task, which --bn-refresh cannot load: average without it, load the average "
            "with KerasHub, and call swa_avg.refresh_batchnorm"
        )
        assert (ended.code, ended.err) == (2, f"swa-avg: error: {line}\n")


def _has_keras() -> bool:
    import importlib.util

    return importlib.util.find_spec("keras") is not None


def test_folders_may_become_weights_alone(tmp_path: Path) -> None:
    inputs = [makers.write_folder(tmp_path / f"ckpt_{n}", makers.weights(n)) for n in NUMBERS]
    average(inputs, tmp_path / "swa.weights.h5")
    value = oracle.read_arrays(tmp_path / "swa.weights.h5")["layers/dense/vars/0"]
    np.testing.assert_array_equal(value, _mean(inputs, "layers/dense/vars/0"))
    with pytest.raises(UsageError) as caught:
        average(inputs, tmp_path / "swa.keras")
    assert str(caught.value) == (
        "the output swa.keras must be named as a folder, or end with .weights.h5, since the inputs are Keras "
        "model folders"
    )


def test_a_folder_is_replaced_only_if_asked_and_if_it_holds_a_model_alone(tmp_path: Path) -> None:
    inputs = [makers.write_folder(tmp_path / f"ckpt_{n}", makers.weights(n)) for n in NUMBERS]
    output = makers.write_folder(tmp_path / "swa", makers.weights(9), **{"assets/old.txt": b"old"})
    with pytest.raises(UsageError, match="exists; name another one, or overwrite it"):
        average(inputs, output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a regular file"):
        average(inputs, output, overwrite=True)
    (output / "notes.txt").unlink()
    average(inputs, output, overwrite=True)
    assert _names(output) == ["config.json", "metadata.json", "model.weights.h5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_1", "ckpt_2", "ckpt_3", "swa"]
    with pytest.raises(UsageError, match=r"the output .* is also an input"):
        average([*inputs, output], output, overwrite=True)
    with pytest.raises(UsageError, match=r"lies in an input; name one elsewhere$"):
        average(inputs, inputs[0] / "swa")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="exists and is not a regular file"):
        average(inputs, empty, overwrite=True)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: (path / "config.json").unlink(), "a folder without checkpoints.json"),
        (lambda path: (path / "model.weights.h5").unlink(), "a folder without checkpoints.json"),
        (lambda path: (path / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda path: (path / "metadata.json").write_text("[]"), "metadata.json is not a JSON object"),
        (lambda path: _linked(path / "config.json"), "a symbolic link; put the file itself in its place"),
        (lambda path: _linked(path / "model.weights.h5"), "a symbolic link; put the file itself"),
        (lambda path: _linked(path / "assets"), "a symbolic link; put the file itself in its place"),
        (lambda path: _linked(path / "assets/tokenizer"), "a symbolic link; put the file itself"),
        (lambda path: os.mkfifo(path / "more.json"), "not a regular file"),
        (lambda path: makers.write_sharded(path / "model.weights.json", makers.weights(1)), "holds both"),
        (lambda path: makers.write_archive(path / "model.weights.h5", makers.weights(1)), "does not hold"),
        (lambda path: makers.write_legacy(path / "task.weights.h5", {"a/a/b": np.ones(2)}), "does not hold"),
    ],
)
def test_a_folder_that_keras_does_not_write_is_refused(
    spoil: Callable[[Path], Any], problem: str, tmp_path: Path, swa_avg: Cli
) -> None:
    _preset(tmp_path / "ckpt_1", 1)
    spoil(_preset(tmp_path / "ckpt_2", 2))
    ended = swa_avg(tmp_path / "ckpt_1", tmp_path / "ckpt_2", "-o", tmp_path / "swa")
    assert ended.code == 3
    (line,) = ended.err.splitlines()
    assert line.startswith(f"swa-avg: error: {tmp_path}/ckpt_2")
    assert problem in line
    assert not (tmp_path / "swa").exists()


def _linked(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere_{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def test_a_list_of_digests_names_the_files_of_a_folder(tmp_path: Path, swa_avg: Cli) -> None:
    import hashlib

    inputs = [_preset(tmp_path / f"ckpt_{n}", n) for n in (1, 2)]
    lines = [
        f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in _names(tmp_path)
    ]
    (tmp_path / "SHA256SUMS").write_text("".join(lines))
    command = (
        *inputs,
        "-o",
        tmp_path / "swa",
        "--expect-sha256",
        tmp_path / "SHA256SUMS",
        "-q",
        "--overwrite",
    )
    assert swa_avg(*command).code == 0
    (inputs[0] / "assets/tokenizer/vocabulary.txt").write_bytes(b"other")
    assert swa_avg(*command).code == 3


def test_a_run_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    inputs = [_preset(tmp_path / f"ckpt_{n}", n) for n in NUMBERS]

    def interrupt(total: int | None, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average(inputs, tmp_path / "swa", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_1", "ckpt_2", "ckpt_3"]


def test_an_output_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    inputs = [makers.write_folder(tmp_path / f"ckpt_{n}", makers.weights(n)) for n in NUMBERS]

    def appear(total: int | None, count: int) -> None:
        if not (tmp_path / "swa").exists():
            makers.write_folder(tmp_path / "swa", makers.weights(9))

    with pytest.raises(UsageError, match="exists; name another one, or overwrite it"):
        average(inputs, tmp_path / "swa", progress=appear)
    found = oracle.read_arrays(tmp_path / "swa")
    assert {name: value.tobytes() for name, value in found.items()} == {
        name: value.tobytes() for name, value in makers.weights(9).items()
    }
    assert len([*tmp_path.iterdir()]) == 4


_KILLED = """
import os, signal, sys
from pathlib import Path

from swa_avg import average

place, number = sys.argv[1], int(sys.argv[2])
seen = 0

def count(event, arguments):
    # The events in the output's folder: files opened, folders made, names given, old ones removed.
    global seen
    if any(isinstance(value, (str, os.PathLike)) and f"{place}/out" in str(value) for value in arguments):
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
average(f"{place}/run/*", f"{place}/out/swa", overwrite=True)
print(seen)
"""


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_where_names_cannot_be_exchanged_too(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr("swa_avg.files.publication._exchange", lambda one, other: False)
    inputs = [makers.write_folder(tmp_path / f"ckpt_{n}", makers.weights(n)) for n in NUMBERS]
    output = _preset(tmp_path / "swa", 7)
    average(inputs, output, overwrite=True)
    assert _names(output) == ["config.json", "metadata.json", "model.weights.h5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_1", "ckpt_2", "ckpt_3", "swa"]


@pytest.mark.parametrize("exists", [False, True])
def test_killed_at_any_moment_there_is_no_half_folder(
    exists: bool, tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    for number in NUMBERS:
        _preset(tmp_path / "run" / f"ckpt_{number}", number)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "swa"

    def weights(path: Path) -> list[bytes]:
        with_head = [oracle.read_arrays(path / name) for name in ("model.weights.h5", "task.weights.h5")]
        return [value.tobytes() for arrays in with_head for value in arrays.values()]

    old, expected = _preset(tmp_path / "old", 7), tmp_path / "expected"
    average(f"{tmp_path}/run/*", expected)
    whole = [weights(expected), *([weights(old)] if exists else [])]
    events = int(run_python(_KILLED, tmp_path, 0).stdout)
    assert events > 20
    found = []
    for number in random.Random(exists).sample(range(1, events + 1), 6):
        for path in (tmp_path / "out").iterdir():
            path.rename(tmp_path / f"{number}{path.name}")
        if exists:
            _preset(output, 7)
        assert run_python(_KILLED, tmp_path, number).returncode == -9
        if output.exists():
            open_checkpoint(output).close()
            assert weights(output) in whole
            assert (output / "assets/tokenizer/vocabulary.txt").read_bytes() == VOCABULARY
            found.append(number)
    assert found or not exists


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_keras_loads_the_average_of_what_it_saved(tmp_path: Path) -> None:
    import keras

    keras.utils.set_random_seed(0)
    text = keras.layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=3)
    layers = [text, keras.layers.Embedding(5, 2), keras.layers.Flatten(), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((1,), dtype="string"), *layers])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    values = []
    for number in NUMBERS:
        model.set_weights([np.random.default_rng(number).normal(size=w.shape) for w in model.get_weights()])
        model.save(tmp_path / f"ckpt_{number}", zipped=False)
        values.append(model.get_weights())
    average(str(tmp_path / "ckpt_*"), tmp_path / "swa")
    loaded = keras.models.load_model(tmp_path / "swa")
    for found, *arrays in zip(loaded.get_weights(), *values, strict=True):
        assert found.tobytes() == oracle.mean(arrays).tobytes()
    assert loaded.layers[0].get_vocabulary() == model.layers[0].get_vocabulary()


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("size", [10.0, 1e-6], ids=["whole", "sharded"])
def test_keras_hub_loads_the_average_of_presets(size: float, tmp_path: Path) -> None:
    hub = pytest.importorskip("keras_hub")
    backbone = hub.models.BertBackbone(
        vocabulary_size=7, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16, max_sequence_length=8
    )
    tokenizer = hub.models.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox"]
    )
    preprocessor = hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    task = hub.models.BertTextClassifier(backbone=backbone, num_classes=2, preprocessor=preprocessor)
    values = []
    for number in NUMBERS:
        task.set_weights([np.random.default_rng(number).normal(size=w.shape) for w in task.get_weights()])
        task.save_to_preset(str(tmp_path / f"ckpt_{number}"), max_shard_size=size)
        values.append(task.get_weights())
    average(str(tmp_path / "ckpt_*"), tmp_path / "swa")
    assert ("model.weights.json" in _names(tmp_path / "swa")) == (size < 1)
    loaded = hub.models.BertTextClassifier.from_preset(str(tmp_path / "swa"))
    for found, *arrays in zip(loaded.get_weights(), *values, strict=True):
        assert found.tobytes() == oracle.mean(arrays).tobytes()
