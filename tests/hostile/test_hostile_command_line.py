"""Names, outputs and options that are not what they should be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import check_bounds, check_line, snapshot
from isolated import Isolated

import makers

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

EXISTS = "exists; name another one, or overwrite it"


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of checkpoints, and of what may not be an output."""
    for number in (1, 2):
        makers.write_archive(tmp_path / f"a_{number}.keras", makers.weights(number))
    (tmp_path / "old.keras").write_bytes(b"an old average")
    (tmp_path / "folder.keras").mkdir()
    os.mkfifo(tmp_path / "fifo.keras")
    (tmp_path / "link.keras").symlink_to("old.keras")
    (tmp_path / "broken.keras").symlink_to("nowhere.keras")
    (tmp_path / "input.keras").symlink_to("a_1.keras")
    os.link(tmp_path / "a_2.keras", tmp_path / "hard.keras")
    return tmp_path


OUTPUTS = {
    "a_1.keras": r"the output a_1\.keras is also an input \(a_1\.keras\); name another output, or narrower inputs",
    "./a_1.keras": r"the output a_1\.keras is also an input \(a_1\.keras\); name another output, or narrower inputs",
    "input.keras": r"the output input\.keras is also an input \(a_1\.keras\); name another output, or narrower inputs",
    "hard.keras": r"the output hard\.keras is also an input \(a_2\.keras\); name another output, or narrower inputs",
    "folder.keras": r"the output folder\.keras exists and is not a regular file",
    "fifo.keras": r"the output fifo\.keras exists and is not a regular file",
    "/dev/full": "the output /dev/full exists and is not a regular file",
    "link.keras": r"the output link\.keras is a symbolic link; name the file itself",
    "broken.keras": r"the output broken\.keras is a symbolic link; name the file itself",
    "gone/swa.keras": "the folder of the output does not exist: gone",
    "swa.h5": r"the output swa\.h5 must end with \.keras or \.weights\.h5, since the inputs are \.keras archive",
    "swa": r"the output swa must end with \.keras or \.weights\.h5, since the inputs are \.keras archive",
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_cannot_be_is_refused(
    output: str, overwrite: tuple[str, ...], isolated: Isolated, folder: Path
) -> None:
    before = snapshot(folder)
    ended = isolated.run(["a_1.keras", "a_2.keras", "-o", output, *overwrite], folder)
    check_line(ended, 2, OUTPUTS[output])
    assert snapshot(folder) == before


def test_an_existing_output_is_kept(isolated: Isolated, folder: Path) -> None:
    before = snapshot(folder)
    ended = isolated.run(["a_1.keras", "a_2.keras", "-o", "old.keras"], folder)
    check_line(ended, 2, rf"the output old\.keras {EXISTS}")
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("folder.keras", r"folder\.keras: a folder without checkpoints\.json; name its checkpoints, .*"),
        ("fifo.keras", r"fifo\.keras: not a regular file; name a checkpoint file"),
        ("/dev/zero", "/dev/zero: not a regular file; name a checkpoint file"),
        ("/dev/full", "/dev/full: not a regular file; name a checkpoint file"),
        ("broken.keras", r"broken\.keras: no such file"),
        ("gone.keras", r"gone\.keras: no such file"),
        ("a_1.keras/x", r"a_1\.keras/x: (no such file|not a directory)"),
        ("gone\n\x1b.keras", r"gone\\n\\x1b\.keras: no such file"),
        ("gone\udcff.keras", r"gone\\udcff\.keras: no such file"),
        ("x" * 300, "x{300}: (no such file|file name too long)"),
    ],
)
def test_an_input_that_is_no_file_is_refused(name: str, text: str, isolated: Isolated, folder: Path) -> None:
    before = snapshot(folder)
    check_line(isolated.run([name, "-o", "swa.keras"], folder), 3, text)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["line\nbreak", "\x1b[31mred", "undecodable\udcff", "ünï"])
def test_names_of_any_characters_work_and_are_printed_on_one_line(
    name: str, isolated: Isolated, tmp_path: Path
) -> None:
    name = os.fsdecode(name.encode("utf-8", "surrogateescape"))  # whatever the locale makes of it
    for number in (1, 2):
        makers.write_archive(tmp_path / f"{name}_{number}.keras", makers.weights(number))
    inputs = [f"{name}_{number}.keras" for number in (1, 2)]
    ended = isolated.run([*inputs, "-o", f"{name}.keras", "-v"], tmp_path)
    check_bounds(ended)
    assert ended.code == 0, ended.err
    assert "\x1b" not in ended.err
    assert len([line for line in ended.err.splitlines() if line.startswith("wrote ")]) == 1
    assert (tmp_path / f"{name}.keras").exists()
    again = isolated.run([*inputs, "-o", f"{name}.keras"], tmp_path)
    shown = name if name.isprintable() else name.encode("unicode_escape").decode()
    assert (again.code, again.err) == (2, f"swa-avg: error: the output {shown}.keras {EXISTS}\n")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(
            (["--method", f"weights:{weights}"], rf"method 'weights:{weights}': expected weights:W,W,.*")
            for weights in (
                "nan,1",
                "1,-1",
                "inf,-inf",
                "1e308,1e308",
                "1e-400,0",
                "a,b",
                "",
                ",",
                "1" * 5000,
            )
        ),
        (["--method", "ema:nan"], r"method 'ema:nan': expected ema:DECAY, .*"),
        (["--method", "ema:" + "9" * 5000], r"method 'ema:9+': expected ema:DECAY, .*"),
        (["--method", "\n\x1b[31m"], r"method '\\n\\x1b\[31m': expected uniform, .*"),
        (["--max-memory", "nan"], r"Invalid value for '--max-memory': 'nan' is not a size; .*"),
        (["--max-memory", "inf"], r"Invalid value for '--max-memory': 'inf' is not a size; .*"),
        (["--max-memory", "-1"], "max_memory -1 B is too little; at least .*"),
        (["--threads", "0"], r"Invalid value for '--threads': 0 is not in the range 1<=x<=64\. .*"),
        (["--epochs", "9" * 5000], ".*epochs.*"),
        (["--last", "9" * 5000], ".*"),
        (["--\n\x1b[31m"], r"No such option:? '?--\\n\\x1b\[31m.*"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], text: str, isolated: Isolated, folder: Path
) -> None:
    before = snapshot(folder)
    check_line(isolated.run(["a_1.keras", "a_2.keras", *options], folder), 2, text)
    assert snapshot(folder) == before


def test_no_inputs(isolated: Isolated, tmp_path: Path) -> None:
    line = r"no checkpoints named, and no checkpoints\.json here; such as: swa-avg 'ckpt_\*\.keras' -o swa\.keras"
    check_line(isolated.run([], tmp_path), 2, line)
    assert snapshot(tmp_path) == {}
