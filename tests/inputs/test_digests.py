"""Lists of SHA-256 digests, against hashlib and sha256sum."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import makers
from swa_avg.errors import UnreadableError, UsageError
from swa_avg.formats import open_checkpoint
from swa_avg.inputs.digests import check_digests, read_digests

WRITERS: dict[str, Callable[..., object]] = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".weights.json": makers.write_sharded,
}


def _list(folder: Path) -> Path:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(folder.iterdir())
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))
    return folder / "SHA256SUMS"


def _check(path: Path, listed: Path) -> None:
    checkpoint = open_checkpoint(path)
    try:
        check_digests([checkpoint], read_digests(listed), listed)
    finally:
        checkpoint.close()


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_file_of_a_checkpoint_is_held_against_the_list(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a_1{suffix}"
    WRITERS[suffix](path, makers.weights(1))
    files = sorted(tmp_path.iterdir())
    listed = _list(tmp_path)
    _check(path, listed)
    for file in files:
        data = file.read_bytes()
        value = makers.weights(1)[
            "optimizer/vars/2" if "00000" in file.name or suffix != ".weights.json" else "optimizer/vars/1"
        ].tobytes()
        damaged = bytearray(data)
        position = data.find(value)
        damaged[position if position >= 0 else data.index(b"1.0")] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(UnreadableError) as caught:
            _check(path, listed)
        digest, expected = hashlib.sha256(damaged).hexdigest(), hashlib.sha256(data).hexdigest()
        assert str(caught.value) == (
            f"{file}: damaged: its SHA-256 is {digest}, SHA256SUMS says {expected}; leave this file out, or restore it"
        )
        file.write_bytes(data)
    _check(path, listed)


def test_a_file_that_the_list_does_not_name_is_refused(tmp_path: Path) -> None:
    listed = _list(tmp_path)
    path = makers.write_weights(tmp_path / "a_1.weights.h5", makers.weights(1))
    with pytest.raises(UsageError) as caught:
        _check(path, listed)
    assert str(caught.value) == f"{listed} does not name {path}: add it with sha256sum"


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_what_sha256sum_writes_is_read(tmp_path: Path) -> None:
    encoded = ["plain.h5", "with space.h5", "back\\slash.h5", "new\nline.h5", "ünï.h5"]
    names = [os.fsdecode(name.encode()) for name in encoded]  # whatever the locale makes of it
    for name in names:
        (tmp_path / name).write_bytes(os.fsencode(name))
    for options in ([], ["--binary"]):
        command = ["sha256sum", *options, "--", *names]
        written = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
        (tmp_path / "SHA256SUMS").write_bytes(written)
        assert read_digests(tmp_path / "SHA256SUMS") == {
            tmp_path / name: hashlib.sha256(os.fsencode(name)).hexdigest() for name in names
        }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("not a digest", "line 1 is not what sha256sum writes: DIGEST, two spaces, NAME"),
        (f"{'a' * 64}  x\n{'a' * 63}  y\n", "line 2 is not what sha256sum writes: DIGEST, two spaces, NAME"),
        (f"{'a' * 64}  x\n{'b' * 64}  x\n", "x: line 2 gives another digest than an earlier one"),
    ],
)
def test_a_list_that_is_none_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    listed = tmp_path / "SHA256SUMS"
    listed.write_text(text)
    with pytest.raises(UnreadableError) as caught:
        read_digests(listed)
    assert str(caught.value) == f"{listed}: {problem}"
