"""Shard maps that leave their folder, or say other than the shards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest
from cases import Case, check_line, check_refused, parameters, snapshot
from isolated import Isolated

import makers

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

ARRAYS = makers.weights()


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


def _good(path: Path) -> None:
    makers.write_sharded(path, makers.weights(len(path.name)))


def _map(edit: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        _good(path)
        record = json.loads(path.read_text())
        edit(record["weight_map"])
        path.write_text(json.dumps(record))

    return build


def _named(name: object) -> Callable[[Path], None]:
    return _map(lambda weight_map: weight_map.__setitem__("/layers/dense/vars", [name]))


def _shard(edit: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a builder: a good set, then an edit of its first shard."""

    def build(path: Path) -> None:
        _good(path)
        edit(path.with_name("m_5_00000.weights.h5"))

    return build


def _replaced_by_link(shard: Path) -> None:
    shard.rename(shard.with_name("elsewhere.h5"))
    shard.symlink_to("elsewhere.h5")


def _renumbered(shard: Path) -> None:
    with h5py.File(shard, "r+") as file:
        file.move("layers/dense/vars/0", "layers/dense/vars/7")


def _replaced_by_fifo(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


OUTSIDE = "names a shard outside its folder"
CASES = [
    Case("missing shard", _shard(Path.unlink), "no such file or directory"),
    Case("shard that is a FIFO", _shard(_replaced_by_fifo), "not a regular file; name a checkpoint file"),
    Case(
        "shard that is a link", _shard(_replaced_by_link), "a symbolic link; put the file itself in its place"
    ),
    Case(
        "truncated shard", _shard(lambda shard: os.truncate(shard, 3000)), r"(.*: )?damaged HDF5 file \(.+\)"
    ),
    Case("empty shard", _shard(lambda shard: os.truncate(shard, 0)), "not an HDF5 file"),
]
MAP_CASES = [
    *(
        Case(f"shard {name!r}", _named(name), f"{OUTSIDE}: {shown}")
        for name, shown in {
            "../x": r"\.\./x",
            "/etc/x": "/etc/x",
            "..": r"\.\.",
            ".": r"\.",
            "": "",
            "a\0b": r"a\\x00b",
            "\ud800": r"\\ud800",
        }.items()
    ),
    Case("shard that is a list", _named(["x"]), rf"{OUTSIDE}: \['x'\]"),
    Case("shard that is a number", _named(7), f"{OUTSIDE}: 7"),
    Case("shard that is null", _named(None), f"{OUTSIDE}: None"),
    Case("no shards", _map(lambda weight_map: weight_map.clear()), "names 0 shards; expected 1 to 10000"),
    Case(
        "map and shard disagree",
        _map(lambda weight_map: weight_map.pop("/layers/dense/vars")),
        r"/layers/dense/vars: the map says \[\], the shards hold it in \[.*\]",
    ),
    Case(
        "map of what is not there",
        _map(lambda weight_map: weight_map.update({"/gone\n/vars": ["m_5_00000.weights.h5"]})),
        r"/gone\\n/vars: the map says \['m_5_00000\.weights\.h5'\], the shards hold it in \[\]",
    ),
    Case(
        "no map", lambda path: path.write_text("{}"), "not the map of a sharded checkpoint: no `weight_map`"
    ),
    Case(
        "brackets",
        lambda path: path.write_text('{"a":' * 100_000),
        r"the shard map is not valid JSON \(nested more than 200 deep\)",
    ),
    Case(
        "digits",
        lambda path: path.write_text('{"a":' + "9" * 5000 + "}"),
        r"the shard map is not valid JSON \(an integer has too many digits\)",
    ),
    Case(
        "variable of another number",
        _shard(_renumbered),
        r"layers/dense/vars/\d: is missing, or its name is damaged",
    ),
    # The line names the shard: the last case belongs to the second test.
    Case("a name too long", _named("x" * 300), "file name too long"),
]


@parameters(MAP_CASES[:-1])
def test_a_hostile_map_is_refused(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    check_refused(isolated, tmp_path, case, _good, ".weights.json")


@parameters([*CASES, MAP_CASES[-1]])
def test_a_shard_that_cannot_be_read_is_named(case: Case, isolated: Isolated, tmp_path: Path) -> None:
    path = tmp_path / "m_5.weights.json"
    case.build(path)
    before = snapshot(tmp_path)
    shard = "x" * 300 if case is MAP_CASES[-1] else r"m_5_00000\.weights\.h5"
    check_line(isolated.run([path.name, "-o", "swa.weights.json"], tmp_path), 3, f"{shard}: {case.text}")
    assert snapshot(tmp_path) == before


def test_a_shard_cannot_be_counted_twice(isolated: Isolated, tmp_path: Path) -> None:
    """Two maps that name the same shards are one checkpoint."""
    _good(tmp_path / "a_1.weights.json")
    (tmp_path / "a_2.weights.json").write_bytes((tmp_path / "a_1.weights.json").read_bytes())
    before = snapshot(tmp_path)
    ended = isolated.run(["a_1.weights.json", "a_2.weights.json", "-o", "swa.weights.json"], tmp_path)
    check_line(
        ended,
        4,
        r"a_2\.weights\.json: .*: the same (bytes as|file as in) a_1\.weights\.json; name one of the two",
    )
    assert snapshot(tmp_path) == before


def test_one_shared_shard_is_refused(isolated: Isolated, tmp_path: Path) -> None:
    for number in (1, 2):
        makers.write_sharded(tmp_path / f"a_{number}.weights.json", makers.weights(number))
    record = (tmp_path / "a_2.weights.json").read_text()
    (tmp_path / "a_2.weights.json").write_text(record.replace("a_2_00001", "a_1_00001"))
    before = snapshot(tmp_path)
    ended = isolated.run(["a_1.weights.json", "a_2.weights.json", "-o", "swa.weights.json"], tmp_path)
    check_line(
        ended,
        4,
        r"a_2\.weights\.json: a_1_00001\.weights\.h5: the same file as in a_1\.weights\.json; name one of the two",
    )
    assert snapshot(tmp_path) == before


def test_an_existing_shard_is_not_replaced(isolated: Isolated, tmp_path: Path) -> None:
    for number in (1, 2):
        makers.write_sharded(tmp_path / f"a_{number}.weights.json", makers.weights(number))
    (tmp_path / "swa_00001.weights.h5").write_bytes(b"precious")
    before = snapshot(tmp_path)
    ended = isolated.run(["a_1.weights.json", "a_2.weights.json", "-q", "-o", "swa.weights.json"], tmp_path)
    check_line(ended, 2, r"the output swa_00001\.weights\.h5 exists; name another one, or overwrite it")
    assert snapshot(tmp_path) == before
