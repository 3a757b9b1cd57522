"""A system that refuses: limits, full disks, files that change under the run, closed streams."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cases import check_bounds, check_line, snapshot
from isolated import Ended, Isolated

import makers
import oracle
from swa_avg import average
from swa_avg.errors import SystemRefusalError, UnreadableError
from swa_avg.files import sources
from swa_avg.formats import base

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")

WRITERS: dict[str, Callable[..., object]] = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".weights.json": makers.write_sharded,
}
BIG = 2**20


@pytest.fixture(scope="module")
def isolated() -> Iterator[Isolated]:
    with Isolated() as server:
        yield server


@pytest.fixture(params=WRITERS)
def suffix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A format, of which the temporary folder holds a_1, a_2 and a_3."""
    suffix = str(request.param)
    for number in (1, 2, 3):
        WRITERS[suffix](tmp_path / f"a_{number}{suffix}", makers.weights(number))
    return suffix


def _inputs(suffix: str) -> list[str]:
    return [f"a_{number}{suffix}" for number in (1, 2, 3)]


@pytest.mark.parametrize("options", [[], ["--optimizer", "drop"]], ids=["keep", "drop"])
def test_a_file_that_may_not_grow_is_refused_at_any_size(
    options: list[str], suffix: str, isolated: Isolated, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    command = [*_inputs(suffix), "-q", "-o", f"swa{suffix}", *options]
    sizes = [0, 1, 100, 511, 512, 513, *range(1000, 40_000, 997)]
    refused = 0
    for size in sizes:
        ended = isolated.run(command, tmp_path, limits={"FSIZE": size})
        if ended.code == 0:
            break
        refused += 1
        check_line(ended, 5, rf"swa{suffix}: cannot write: File too large")
        assert snapshot(tmp_path) == before, size
    assert 3 < refused < len(sizes)


def _limited(
    isolated: Isolated, command: list[str], folder: Path, name: str, values: range
) -> tuple[int, int]:
    """Run under ever higher limits; return how many runs were refused, and how many succeeded."""
    before = snapshot(folder)
    refused = done = 0
    for value in values:
        ended = isolated.run(command, folder, limits={name: value})
        check_bounds(ended)
        assert ended.code in (0, 5), (value, ended)
        if ended.code == 0:
            done += 1
            for path in folder.glob("swa*"):
                path.unlink()
        else:
            refused += 1
            assert ended.err.startswith("swa-avg: error: "), (value, ended)
            assert len(ended.err.splitlines()) == 1
        assert snapshot(folder) == before
    return refused, done


def test_few_file_descriptors_are_an_error_of_the_system(
    suffix: str, isolated: Isolated, tmp_path: Path
) -> None:
    command = [*_inputs(suffix), "-q", "-o", f"swa{suffix}"]
    refused, done = _limited(isolated, command, tmp_path, "NOFILE", range(4, 32))
    assert refused
    assert done


def test_little_memory_never_leaves_part_of_an_output(isolated: Isolated, tmp_path: Path) -> None:
    """Nearly all such runs end with one line; in the last kilobytes Python, NumPy or HDF5 may crash."""
    for number in (1, 2):
        makers.write_archive(tmp_path / f"a_{number}.keras", {"vars/0": np.full(BIG, number, np.float32)})
    before = snapshot(tmp_path)
    refused = done = 0
    for more in range(2**21, 2**26, 2**21):  # than start-up takes
        command = ["a_1.keras", "a_2.keras", "-q", "-o", "swa.keras", "--threads", "2"]
        ended = isolated.run(command, tmp_path, limits={"AS_MORE": more})
        after = snapshot(tmp_path)
        if "swa.keras" in after:
            written = oracle.read_arrays(tmp_path / "swa.keras")["vars/0"]
            assert (written == 1.5).all()
        for name in after.keys() - before.keys():
            assert name == "swa.keras" or (ended.code < 0 and name.endswith(".tmp")), (more, name)
            (tmp_path / name).unlink()
        assert snapshot(tmp_path) == before
        if ended.code == 0:
            assert "swa.keras" in after
            done += 1
        elif ended.code == 5:
            assert re.fullmatch("swa-avg: error: .*memory.*|swa-avg: error: .*thread.*", ended.err.strip())
            assert after == before
            refused += 1
    assert refused
    assert done


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("options", [[], ["--json"], ["-q"]], ids=str)
def test_closed_standard_streams_do_no_harm(
    closed: list[int], options: list[str], isolated: Isolated, tmp_path: Path
) -> None:
    for number in (1, 2):
        makers.write_weights(tmp_path / f"a_{number}.weights.h5", makers.weights(number))
    ended = isolated.run(
        ["a_1.weights.h5", "a_2.weights.h5", "-o", "swa.weights.h5", *options], tmp_path, closed=closed
    )
    check_bounds(ended)
    assert ended.code == (5 if 1 in closed and "--json" in options else 0)  # the results have nowhere to go
    written = oracle.read_arrays(tmp_path / "swa.weights.h5")
    expected = oracle.mean([makers.weights(number)["layers/dense/vars/0"] for number in (1, 2)])
    assert written["layers/dense/vars/0"].tobytes() == expected.tobytes()
    failed = isolated.run(["a_1.weights.h5", "-o", "swa.weights.h5"], tmp_path, closed=closed)
    check_bounds(failed)
    assert failed.code == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("options", [[], ["--optimizer", "drop"]], ids=["keep", "drop"])
def test_a_full_disk_is_found_early(
    options: list[str], suffix: str, isolated: Isolated, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this system does not allow to mount a tmpfs")
    try:
        (small / "filler").write_bytes(bytes(BIG))
        filler = small / "filler"
        refused = 0
        for free in range(0, 120_000, 4096):
            os.truncate(filler, BIG - free)
            ended = isolated.run([*_inputs(suffix), "-q", "-o", f"small/swa{suffix}", *options], tmp_path)
            if ended.code == 0:
                break
            refused += 1
            check_line(ended, 5, f"small/swa{suffix}: cannot write: No space left on device")
            assert [path.name for path in small.iterdir()] == ["filler"]
        assert refused
        assert ended.code == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_unwritable_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    makers.write_weights(tmp_path / "a_1.weights.h5", makers.weights(1))
    code = "import sys; from swa_avg import cli; sys.argv[0] = 'swa-avg'; cli.main()"
    command = [sys.executable, "-c", code, "a_1.weights.h5", "-q", "-o", "swa.weights.h5"]
    if os.geteuid() == 0:  # permissions are to hold for root, too
        prefix = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        if not shutil.which("setpriv") or subprocess.run([*prefix, "true"], check=False).returncode:
            pytest.skip("root cannot give up a privilege here")
        command = [*prefix, *command]
    before = snapshot(tmp_path)
    tmp_path.chmod(0o555)
    try:
        ended = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "TMPDIR": "/nowhere"},
            timeout=60,
            check=False,
        )
    finally:
        tmp_path.chmod(0o755)
    line = "swa-avg: error: swa.weights.h5: cannot write: Permission denied\n"
    assert (ended.returncode, ended.stderr) == (5, line)
    assert snapshot(tmp_path) == before


def test_averaging_needs_no_temporary_folder(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it puts aside lies beside the output, where there has to be room anyway."""

    def unusable() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", unusable)
    before = snapshot(tmp_path)
    average([tmp_path / name for name in _inputs(suffix)], tmp_path / f"swa{suffix}", optimizer="drop")
    assert f"swa{suffix}" in snapshot(tmp_path).keys() - before.keys()


def _changed(path: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "appended to":
        with path.open("ab") as file:
            file.write(b"more")
    elif how == "overwritten":
        with path.open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(bytes(100))
    else:
        other = path.with_name("other")
        other.write_bytes(b"another file")
        other.replace(path)


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("how", ["truncated", "appended to", "overwritten", "replaced"])
def test_an_input_that_changes_during_the_run_is_refused(how: str, suffix: str, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        arrays = {"vars/0": np.full(2 * BIG, number, np.float32), "vars/1": np.full(9, number, np.float32)}
        WRITERS[suffix](tmp_path / f"a_{number}{suffix}", arrays)
    victim = tmp_path / ("a_2_00000.weights.h5" if suffix == ".weights.json" else f"a_2{suffix}")
    names = {path.name for path in tmp_path.iterdir()}
    pending = [how]

    def progress(total: int, count: int) -> None:
        if pending:
            _changed(victim, pending.pop())

    with pytest.raises(
        UnreadableError,
        match=rf"{victim.name}: (the file (changed|became shorter) while|damaged: its CRC-32)",
    ):
        average([tmp_path / name for name in _inputs(suffix)], tmp_path / f"swa{suffix}", progress=progress)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_short_reads_and_writes_change_no_byte(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [tmp_path / name for name in _inputs(suffix)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "short").mkdir()
    average(inputs, tmp_path / "whole" / f"swa{suffix}")
    read_at = sources._read_at
    rng = np.random.default_rng(0)

    def short(descriptor: int, buffer: memoryview, position: int) -> int:
        return read_at(descriptor, buffer[: int(rng.integers(1, len(buffer) + 1))], position)

    monkeypatch.setattr(sources, "_read_at", short)
    average(inputs, tmp_path / "short" / f"swa{suffix}", threads=1)
    assert snapshot(tmp_path / "short") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_on_one_output_leave_one_of_the_two(overwrite: bool, suffix: str, tmp_path: Path) -> None:
    output = f"swa{suffix}"
    replaces = overwrite and suffix != ".weights.json"  # several files cannot be replaced
    single = []
    for number in (1, 2):  # what each of the two writes
        (tmp_path / "single").mkdir()
        average([tmp_path / f"a_{number}{suffix}"], tmp_path / "single" / output)
        single.append(snapshot(tmp_path / "single"))
        for path in (tmp_path / "single").iterdir():
            path.unlink()
        (tmp_path / "single").rmdir()
    before = snapshot(tmp_path)
    options = ["--overwrite"] if overwrite else []
    ended: list[Ended] = []

    def run(name: str) -> None:
        with Isolated() as server:
            barrier.wait()
            for _ in range(5):
                ended.append(server.run([name, "-q", "-o", output, *options], tmp_path))

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=run, args=(f"a_{number}{suffix}",)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in ended:
        check_bounds(one)
    assert sorted(one.code for one in ended) == ([0] * 10 if replaces else [0, *[2] * 9])
    written = {name: data for name, data in snapshot(tmp_path).items() if name not in before}
    assert written in single


SIGNALLED = """
import os, signal, sys
from swa_avg import cli
from swa_avg.files import publication as publish

number = getattr(signal, sys.argv.pop(1))

def signalled(owner, name):
    original = getattr(owner, name)
    def call(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)
    setattr(owner, name, call)

for name in sys.argv.pop(1).split():
    signalled(publish if name == "sync_folder" else publish.Publication, name)
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "moments", ["create", "create __exit__", "create _remove", "create __exit__ _remove"]
)
def test_a_signal_leaves_nothing_and_another_one_does_not_stop_the_cleaning_up(
    moments: str,
    name: str,
    suffix: str,
    tmp_path: Path,
    run_python: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    ended = run_python(SIGNALLED, name, moments, *_inputs(suffix), "-o", f"swa{suffix}")
    word, code = ("interrupted", 130) if name == "SIGINT" else ("terminated", 143)
    assert (ended.returncode, ended.stderr) == (code, f"swa-avg: {word}; nothing was written\n")  # type: ignore[attr-defined]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("moments", "name"),
    [("sync_folder", "SIGINT"), ("_remove", "SIGTERM"), ("sync_folder _remove", "SIGINT")],
)
def test_a_signal_comes_too_late_once_the_output_has_its_name(
    moments: str,
    name: str,
    suffix: str,
    tmp_path: Path,
    run_python: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run_python(SIGNALLED, name, moments, *_inputs(suffix), "-q", "-o", f"swa{suffix}")
    assert (ended.returncode, ended.stderr) == (0, "")  # type: ignore[attr-defined]
    (tmp_path / "whole").mkdir()
    average([tmp_path / name for name in _inputs(suffix)], tmp_path / "whole" / f"swa{suffix}")
    whole = snapshot(tmp_path / "whole")
    assert {name: data for name, data in snapshot(tmp_path).items() if name in whole} == whole
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_does_not_read_back_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swa_avg.formats import stored_zip

    check_written = base.check_written

    def damaged(file, start, size, checksum):  # type: ignore[no-untyped-def]
        file.flush()
        file.seek(start + size // 2)
        file.write(b"\xa5\x5a\xa5")
        check_written(file, start, size, checksum)

    monkeypatch.setattr(base, "check_written", damaged)
    monkeypatch.setattr(stored_zip, "check_written", damaged)
    for suffix, write in WRITERS.items():
        path = tmp_path / f"a_1{suffix}"
        write(path, makers.weights(1))
        before = snapshot(tmp_path)
        with pytest.raises(SystemRefusalError, match="what was written does not read back the same"):
            average([path], tmp_path / f"swa{suffix}")
        assert snapshot(tmp_path) == before
