"""Inputs and outputs that are URLs: in memory, on disk, and at an S3 service on the loopback interface."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import h5py
import numpy as np
import pytest

import makers
import oracle
import swa_avg
from conftest import Ended
from swa_avg.combine import workers
from swa_avg.errors import SystemRefusalError, UnreadableError, UsageError
from swa_avg.files.location import location
from swa_avg.files.remote import RemotePath, upload
from swa_avg.inputs.listing import list_checkpoints

fsspec = pytest.importorskip("fsspec")

Cli = Callable[..., Ended]
NUMBERS = (1, 2, 10)
FORBIDDEN = b"<Error><Code>InvalidAccessKeyId</Code><Message>No such access key.</Message></Error>"
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
WRITERS: dict[str, Callable[[Path, makers.Arrays], Path]] = {
    ".keras": makers.write_archive,
    ".weights.h5": makers.write_weights,
    ".weights.json": makers.write_sharded,
    ".h5": lambda path, arrays: makers.write_legacy(
        path, {f"dense/dense/{name[-6:].replace('/', '_')}": value for name, value in arrays.items()}
    ),
}


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's filesystem in memory, empty."""
    system = fsspec.filesystem("memory")
    for clear in (system.store.clear, system.pseudo_dirs.clear):
        clear()
    yield system
    for clear in (system.store.clear, system.pseudo_dirs.clear):
        clear()


def _write(folder: Path, suffix: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [WRITERS[suffix](folder / f"ckpt_{n}{suffix}", _arrays(n)) for n in NUMBERS]


def _arrays(seed: int) -> dict[str, np.ndarray]:
    """Return variables of which one is larger than what is read ahead."""
    rng = np.random.default_rng(seed)
    return makers.weights(seed) | {
        "layers/dense_1/vars/0": (2 + rng.standard_normal((300, 300))).astype("float32")
    }


def _put(system: Any, folder: Path) -> None:
    for path in folder.iterdir():
        system.pipe_file(f"/run/{path.name}", path.read_bytes())


def _lines(ended: Ended) -> list[str]:
    return ended.err.splitlines()


@pytest.mark.parametrize("options", [{}, {"optimizer": "drop"}, {"verify": True}], ids=str)
@pytest.mark.parametrize("suffix", list(WRITERS))
def test_urls_give_the_bytes_that_files_give(
    suffix: str, options: dict[str, Any], tmp_path: Path, memory: Any
) -> None:
    paths = _write(tmp_path / "in", suffix)
    _put(memory, tmp_path / "in")
    (tmp_path / "out").mkdir()
    swa_avg.average(paths, tmp_path / "out" / f"swa{suffix}", **{"verify": False, **options})
    swa_avg.average(f"memory://run/ckpt_*{suffix}", f"memory://out/swa{suffix}", **options)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    found = {name.rpartition("/")[2]: memory.cat_file(name) for name in memory.find("/out")}
    assert found == expected
    averages = [oracle.read_arrays(path)["layers/dense_1/vars/0"] for path in paths if suffix == ".keras"]
    if averages:
        result = oracle.read_arrays(tmp_path / "out" / "swa.keras")["layers/dense_1/vars/0"]
        np.testing.assert_array_equal(result, oracle.mean(averages))


def test_a_remote_file_of_another_layout_is_parsed(tmp_path: Path, memory: Any) -> None:
    paths = _write(tmp_path / "in", ".weights.h5")
    with h5py.File(paths[0], "r+") as file:
        file.attrs["written_by"] = "another version" * 100
    _put(memory, tmp_path / "in")
    swa_avg.average(paths, tmp_path / "swa.weights.h5", verify=False)
    swa_avg.average("memory://run/ckpt_*", "memory://swa.weights.h5")
    assert memory.cat_file("/swa.weights.h5") == (tmp_path / "swa.weights.h5").read_bytes()


def test_a_template_at_a_url_and_others_on_disk_go_together(
    tmp_path: Path, memory: Any, swa_avg: Cli
) -> None:
    paths = _write(tmp_path / "in", ".keras")
    memory.pipe_file("/z/ckpt_11.keras", paths[2].read_bytes())
    assert swa_avg(*paths, "-o", tmp_path / "a.keras", "--no-verify").code == 0
    ended = swa_avg(*paths[:2], "memory://z/ckpt_11.keras", "-o", tmp_path / "b.keras")
    assert ended.code == 0, ended.err
    assert oracle.read_arrays(tmp_path / "a.keras").keys() == oracle.read_arrays(tmp_path / "b.keras").keys()
    for name, value in oracle.read_arrays(tmp_path / "a.keras").items():
        np.testing.assert_array_equal(value, oracle.read_arrays(tmp_path / "b.keras")[name])


def test_patterns_are_taken_in_natural_order_and_the_index_beside_is_used(
    tmp_path: Path, memory: Any, swa_avg: Cli
) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    entries = [
        {"file": f"ckpt_{n}.keras", "epoch": n + 100, "metrics": {"val_loss": loss}}
        for n, loss in zip(NUMBERS, (0.3, 0.1, 0.2), strict=True)
    ]
    index = {"version": 1, "monitor": "val_loss", "mode": "min", "checkpoints": entries}
    memory.pipe_file("/run/checkpoints.json", json.dumps(index).encode())

    def chosen(*options: object, named: str = "memory://run/ckpt_*.keras") -> list[str]:
        ended = swa_avg(named, "-o", tmp_path / "x.keras", "--dry-run", "--json", *options)
        assert ended.code == 0, ended.err
        return [item["path"].rpartition("/run/")[2] for item in json.loads(ended.out)["inputs"]]

    assert chosen() == ["ckpt_1.keras", "ckpt_2.keras", "ckpt_10.keras"]
    assert chosen(named="memory://run/") == ["ckpt_1.keras", "ckpt_2.keras", "ckpt_10.keras"]
    assert chosen("--epochs", "101:102") == ["ckpt_1.keras", "ckpt_2.keras"]
    assert chosen("--best", "2") == ["ckpt_2.keras", "ckpt_10.keras"]


def test_a_dry_run_writes_nothing_and_copies_nothing(
    tmp_path: Path, memory: Any, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    ended = swa_avg("memory://run/ckpt_*.keras", "-o", tmp_path / "x.keras", "--dry-run")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "x.keras").exists()


def test_checksums_are_checked_on_request_and_it_is_said_when_not(
    tmp_path: Path, memory: Any, swa_avg: Cli
) -> None:
    paths = _write(tmp_path / "in", ".keras")
    values = oracle.read_arrays(paths[0])["layers/dense_1/vars/0"].tobytes()
    content = bytearray(paths[0].read_bytes())
    content[content.index(values[:64])] ^= 1
    paths[0].write_bytes(content)
    _put(memory, tmp_path / "in")
    urls = [f"memory://run/{path.name}" for path in paths]
    unverified = swa_avg(*urls, "-o", tmp_path / "a.keras", "--json")
    assert unverified.code == 0
    assert json.loads(unverified.out)["verify"] is False
    assert "of URLs only what is averaged is read, and no checksum checked; --verify does both" in _lines(
        unverified
    )
    verified = swa_avg(*urls, "-o", tmp_path / "b.keras", "--verify")
    assert verified.code == 3
    assert verified.err.startswith("swa-avg: error: memory://run/ckpt_1.keras: damaged: its CRC-32 is ")
    assert not (tmp_path / "b.keras").exists()


def test_urls_are_inspected_as_files_are(tmp_path: Path, memory: Any, swa_avg: Cli) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    results = []
    for where in (f"{tmp_path}/in/", "memory:///run/"):
        ended = swa_avg("inspect", f"{where}ckpt_*.keras", "--json")
        assert ended.code == 0, ended.err
        results.append(json.loads(ended.out.replace(where, "")))
    assert results[0] == results[1]


@pytest.mark.parametrize("at_urls", ["nothing", "inputs", "inputs and output"])
def test_verify_uses_the_threads_that_its_help_names(
    at_urls: str, tmp_path: Path, memory: Any, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "run", ".keras")
    assert swa_avg(f"{tmp_path}/run/ckpt_*.keras", "-o", tmp_path / "run" / "swa.keras").code == 0
    _put(memory, tmp_path / "run")
    started = []

    def start(threads: int) -> ThreadPoolExecutor:
        started.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(workers, "ThreadPoolExecutor", start)
    shown = " ".join(swa_avg("verify", "--help").out.split()).partition("--threads")[2]
    most, of_urls = map(int, re.findall(r"\d+", shown)[:2])
    options = {
        "nothing": (tmp_path / "run" / "swa.keras",),
        "inputs": (tmp_path / "run" / "swa.keras", "--inputs", "memory://run"),
        "inputs and output": ("memory://run/swa.keras",),
    }[at_urls]
    ended = swa_avg("verify", *options)
    assert ended.code == 0, ended.err
    assert started == [min(most, os.cpu_count() or 1) if at_urls == "nothing" else of_urls]


@pytest.mark.parametrize("threads", [-1, 0])
def test_verify_refuses_what_is_no_number_of_threads(threads: int, tmp_path: Path) -> None:
    paths = _write(tmp_path / "run", ".keras")
    swa_avg.average(paths, tmp_path / "run" / "swa.keras")
    with pytest.raises(UsageError, match=f"threads is {threads}; expected 1 or more"):
        swa_avg.verify(tmp_path / "run" / "swa.keras", threads=threads)


def test_memory_is_kept_under_a_limit(tmp_path: Path, memory: Any, swa_avg: Cli) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    command = ("memory://run/ckpt_*.keras", "-o", tmp_path / "x.keras", "--dry-run", "--json", "--max-memory")
    limited = swa_avg(*command, "190M")
    assert json.loads(limited.out)["peak_memory"] <= 190 * 2**20
    assert "max_memory 100.0 MiB is too little" in swa_avg(*command, "100M").err


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_predicted_memory_is_enough(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    for number in (1, 2, 3):
        values = np.full(64 * 2**20 // 4, number, np.float32)
        makers.write_weights(tmp_path / f"ckpt_{number}.weights.h5", {"layers/dense/vars/0": values})
    code = (
        "import swa_avg, sys\n"
        "predicted = swa_avg.average(sys.argv[1], sys.argv[2]).peak_memory\n"
        "(peak,) = (line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM:'))\n"
        "print(int(peak) * 1024, predicted)"
    )
    ended = run_python(code, f"file://{tmp_path}/ckpt_*", f"file://{tmp_path}/swa.weights.h5")
    assert ended.returncode == 0, ended.stderr
    peak, predicted = map(int, ended.stdout.split())
    assert peak <= predicted < 300 * 2**20


def test_what_signs_an_address_is_not_part_of_the_name() -> None:
    assert location("https://host/run/ckpt_7.keras?Signature=abc/def").name == "ckpt_7.keras"
    assert location("s3://bucket/run/ckpt?7.keras").name == "ckpt?7.keras"
    signed = location("https://host/run/ckpt.weights.json?Signature=abc/def")
    assert str(signed.with_name("ckpt_0.weights.h5")) == "https://host/run/ckpt_0.weights.h5"


@pytest.mark.parametrize("folder", ["memory://run", "memory://run/", "s3://bucket", "file:///", "memory://"])
def test_a_file_is_in_the_folder_that_it_was_looked_for_in(folder: str) -> None:
    path = location(folder) / "ckpt_7.keras"
    assert str(path) == f"{folder.removesuffix('/')}/ckpt_7.keras"
    assert path.parent / path.name == path
    assert path.parent.is_dir()


def test_one_object_under_two_urls_is_found(tmp_path: Path, memory: Any, swa_avg: Cli) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    ended = swa_avg("memory://run/ckpt_1.keras", "memory:///run/ckpt_1.keras", "-o", tmp_path / "x.keras")
    assert (ended.code, ended.err) == (
        4,
        "swa-avg: error: memory://run/ckpt_1.keras: file: the same file as memory:///run/ckpt_1.keras; "
        "name it once\n",
    )


def test_a_shard_that_two_remote_maps_name_is_found(tmp_path: Path, memory: Any, swa_avg: Cli) -> None:
    paths = _write(tmp_path / "in", ".weights.json")
    text = paths[0].read_text().replace("ckpt_1_00001", "ckpt_10_00001")
    paths[0].write_text(text)
    _put(memory, tmp_path / "in")
    ended = swa_avg("memory://run/ckpt_*.json", "-o", tmp_path / "x.weights.json")
    assert ended.code == 4
    assert ended.err.endswith(
        "ckpt_10_00001.weights.h5: the same file as in ckpt_1.weights.json; name one of the two\n"
    )


def test_an_output_that_exists_is_replaced_only_when_asked(tmp_path: Path, memory: Any, swa_avg: Cli) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    memory.pipe_file("/out/swa.keras", b"before")
    command = ("memory://run/ckpt_*.keras", "-o", "memory://out/swa.keras")
    refused = swa_avg(*command)
    line = "the output memory://out/swa.keras exists; name another one, or overwrite it"
    assert (refused.code, refused.err) == (2, f"swa-avg: error: {line}\n")
    assert memory.cat_file("/out/swa.keras") == b"before"
    assert swa_avg(*command, "--overwrite").code == 0
    assert memory.cat_file("/out/swa.keras")[:2] == b"PK"


def test_an_output_that_appears_during_the_run_stays(tmp_path: Path, memory: Any) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")

    def appear(total: int, count: int) -> None:
        memory.pipe_file("/out/swa.keras", b"theirs")

    with pytest.raises(UsageError, match="exists; name another one"):
        swa_avg.average("memory://run/ckpt_*", "memory://out/swa.keras", progress=appear)
    assert memory.cat_file("/out/swa.keras") == b"theirs"


def test_the_output_may_not_be_an_input(tmp_path: Path, memory: Any, swa_avg: Cli) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")
    ended = swa_avg("memory://run/ckpt_*", "-o", "memory://run/ckpt_2.keras", "--overwrite")
    assert ended.code == 2
    assert "is also an input" in ended.err


def test_an_object_that_changes_during_the_run_ends_it(tmp_path: Path, memory: Any) -> None:
    _write(tmp_path / "in", ".keras")
    _put(memory, tmp_path / "in")

    def change(total: int, count: int) -> None:
        memory.pipe_file("/run/ckpt_1.keras", (tmp_path / "in" / "ckpt_2.keras").read_bytes())

    with pytest.raises(UnreadableError, match=r"memory:///run/ckpt_1.keras: the file changed"):
        swa_avg.average("memory://run/ckpt_*", "memory://out/swa.keras", progress=change)
    assert not memory.exists("/out/swa.keras")


def test_a_set_that_cannot_be_uploaded_whole_leaves_nothing(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "in", ".weights.json")
    _put(memory, tmp_path / "in")
    put_file = type(memory).put_file

    def refuse_the_map(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith(".json"):
            raise PermissionError("not yours")
        put_file(self, source, target, **options)

    monkeypatch.setattr(type(memory), "put_file", refuse_the_map)
    with pytest.raises(SystemRefusalError, match="access denied"):
        swa_avg.average("memory://run/ckpt_*.json", "memory://out/swa.weights.json")
    assert memory.find("/out") == []


def _put_folders(memory: Any, folder: Path) -> list[Path]:
    """Write models in folders, and put them into `memory`, where `hf://` would have them."""
    paths = []
    for number in NUMBERS:
        files = {"assets/a/words.txt": b"cat", "assets/b/words.txt": b"mat"}
        paths.append(makers.write_folder(folder / f"ckpt_{number}", _arrays(number), **files))
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/run/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return paths


@pytest.mark.parametrize("named", ["memory://run/ckpt_*", "each", "each/"])
@pytest.mark.parametrize("options", [{}, {"optimizer": "drop"}], ids=str)
def test_folders_at_urls_give_the_bytes_that_those_on_disk_give(
    named: str, options: dict[str, Any], tmp_path: Path, memory: Any
) -> None:
    paths = _put_folders(memory, tmp_path / "in")
    (tmp_path / "out").mkdir()
    swa_avg.average(paths, tmp_path / "out" / "swa", verify=False, **options)
    urls = [f"memory://run/{path.name}{'/' if named.endswith('/') else ''}" for path in paths]
    swa_avg.average(urls if named.startswith("each") else named, "memory://out/swa/", **options)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    expected = {f"/out/{path.relative_to(tmp_path / 'out').as_posix()}": path.read_bytes() for path in files}
    assert {name: memory.cat_file(name) for name in memory.find("/out")} == expected
    assert len(expected) == 5
    for url in ("memory://out/swa", "memory://out/swa/"):
        assert swa_avg.verify(url, "memory://run").equal


def test_a_folder_at_a_url_is_never_replaced_and_never_half_there(
    tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_folders(memory, tmp_path / "in")
    urls = [f"memory://run/ckpt_{number}" for number in NUMBERS]
    swa_avg.average(urls, "memory://out/swa")
    for overwrite, problem in (
        (False, "exists; name another one"),
        (True, "several files cannot be replaced"),
    ):
        with pytest.raises(UsageError, match=problem):
            swa_avg.average(urls, "memory://out/swa", overwrite=overwrite)
    put_file = type(memory).put_file

    def refuse_the_last(self: Any, source: str, target: str, **options: Any) -> None:
        if target.endswith("config.json"):
            raise PermissionError("not yours")
        put_file(self, source, target, **options)

    monkeypatch.setattr(type(memory), "put_file", refuse_the_last)
    with pytest.raises(SystemRefusalError, match="access denied"):
        swa_avg.average(urls, "memory://out/other")
    assert memory.find("/out/other") == []


def test_a_folder_at_a_url_whose_names_lead_out_of_it_is_refused(tmp_path: Path, memory: Any) -> None:
    _put_folders(memory, tmp_path / "in")
    memory.store["/run/ckpt_1/assets/../../x"] = memory.store["/run/ckpt_1/config.json"]
    with pytest.raises(UnreadableError, match=r"holds a file whose name leads out of it: assets/\.\./\.\./x"):
        swa_avg.average("memory://run/ckpt_*", tmp_path / "swa")


class TestFileSystemsWhereFilesGrow:
    """`file://`, as one where an upload is visible while it lasts."""

    def test_the_output_takes_its_name_when_it_is_whole(self, tmp_path: Path, swa_avg: Cli) -> None:
        paths = _write(tmp_path / "in", ".keras")
        out = tmp_path / "out"
        out.mkdir()
        ended = swa_avg(*(f"file://{path}" for path in paths), "-o", f"file://{out}/swa.keras")
        assert ended.code == 0, ended.err
        assert swa_avg(*paths, "--no-verify", "-o", tmp_path / "swa.keras").code == 0
        assert [path.name for path in out.iterdir()] == ["swa.keras"]
        assert (out / "swa.keras").read_bytes() == (tmp_path / "swa.keras").read_bytes()

    def test_an_upload_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from fsspec.implementations.local import LocalFileSystem

        def full(self: Any, source: str, target: str, **options: Any) -> None:
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(LocalFileSystem, "put_file", full)
        source = tmp_path / "swa.keras"
        source.write_bytes(b"whole")
        out = tmp_path / "out"
        out.mkdir()
        with pytest.raises(SystemRefusalError, match="No space left"):
            upload(source, RemotePath(f"file://{out}/swa.keras"), overwrite=False)
        assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("nosuch://bucket/a.keras", "Protocol not known: nosuch"),
        ("gs://bucket/a.keras", "Please install gcsfs to access Google Storage"),
    ],
)
def test_a_protocol_without_its_package_is_one_line(
    url: str, line: str, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    ended = swa_avg(url, "-o", "x.keras")
    assert (ended.code, ended.err) == (2, f"swa-avg: error: {url}: {line}\n")


def test_an_object_that_is_missing_is_one_line(memory: Any, swa_avg: Cli) -> None:
    ended = swa_avg("memory://run/a.keras", "-o", "x.keras")
    assert (ended.code, ended.err) == (5, "swa-avg: error: memory://run/a.keras: no such file or bucket\n")


def test_a_pattern_that_matches_nothing_is_a_usage_error(memory: Any, swa_avg: Cli) -> None:
    ended = swa_avg("memory://run/a*.keras", "-o", "x.keras")
    assert (ended.code, ended.err) == (2, "swa-avg: error: no file matches 'memory://run/a*.keras'\n")


def test_a_pattern_over_http_gives_the_urls_of_the_files(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    _write(tmp_path / "run", ".keras")
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        folder = f"http://127.0.0.1:{server.server_port}/run"
        found = list_checkpoints(f"{folder}/ckpt_*.keras").paths
        server.shutdown()
    assert [str(path) for path in found] == [f"{folder}/ckpt_{number}.keras" for number in NUMBERS]


def _show() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "remote_bytes.py"
    spec = importlib.util.spec_from_file_location("remote_bytes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server() -> tuple[Any, str]:
    """An S3 service that counts what it answers, and its address."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    if sys.flags.dev_mode:
        pytest.skip("in Python's development mode, aiohttp refuses two headers of one name, which moto sends")
    counting, address = _show().serve()
    return counting, address


@pytest.fixture
def s3(server: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """s3fs at that service, with a bucket of its own."""
    import s3fs

    _configure(monkeypatch, server[1])
    system = s3fs.S3FileSystem()
    if not system.exists("bucket"):
        system.mkdir("bucket")
    yield system
    system.rm("bucket", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def _configure(monkeypatch: pytest.MonkeyPatch, address: str, key: str = "testing") -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)


def _refusing(
    application: Any,
    allows: Callable[[dict[str, Any]], bool],
    status: str = "403 Forbidden",
    error: bytes = FORBIDDEN,
) -> Any:
    """Return a WSGI application that answers as S3 does to an unknown access key, unless `allows`."""

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        if allows(environ):
            return application(environ, start_response)
        body = b"" if environ["REQUEST_METHOD"] == "HEAD" else error
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    return answer


def _put_s3(system: Any, folder: Path) -> None:
    for path in folder.iterdir():
        system.put_file(str(path), f"bucket/run/{path.name}")


class TestS3:
    def test_no_more_is_read_than_is_averaged_and_the_template(
        self, s3: Any, server: tuple[Any, str], tmp_path: Path
    ) -> None:
        (tmp_path / "in").mkdir()
        rng = np.random.default_rng(0)
        for number in (1, 2, 3):
            arrays = {"layers/dense/vars/0": (2 + rng.standard_normal((500, 500))).astype("float32")}
            arrays |= {f"optimizer/vars/{n}": rng.standard_normal((500, 500)) for n in range(2)}
            makers.write_archive(tmp_path / "in" / f"ckpt_{number}.keras", arrays)
        _put_s3(s3, tmp_path / "in")
        counting = server[0]
        counting.read.clear()
        swa_avg.average("s3://bucket/run/ckpt_*.keras", "s3://bucket/swa.keras")
        read = {path.rpartition("/")[2]: count for path, count in counting.read.items() if "ckpt_" in path}
        size = (tmp_path / "in" / "ckpt_3.keras").stat().st_size
        averaged, optimizer = 500 * 500 * 4, 2 * 500 * 500 * 8
        outside = size - averaged - optimizer
        sample = 2**17  # by which related checkpoints are told
        ahead = 6 * 16 * 1024  # the ends of the archive are read in blocks
        assert read["ckpt_3.keras"] == size
        for name in ("ckpt_1.keras", "ckpt_2.keras"):
            assert averaged <= read[name] <= averaged + sample + 2 * outside + ahead
        assert sum(read.values()) <= 3 * (averaged + outside) + size
        swa_avg.average(tmp_path / "in" / "ckpt_*.keras", tmp_path / "swa.keras", verify=False)
        assert s3.cat_file("bucket/swa.keras") == (tmp_path / "swa.keras").read_bytes()

    def test_a_service_that_is_busy_is_asked_again(
        self, s3: Any, server: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = _write(tmp_path / "in", ".keras")
        _put_s3(s3, tmp_path / "in")
        refusals = iter(range(3))

        def allows(environ: dict[str, Any]) -> bool:
            payload = "ckpt_1.keras" in environ["PATH_INFO"] and environ["REQUEST_METHOD"] == "GET"
            return not payload or next(refusals, None) is None

        busy = _refusing(server[0].application, allows, "503 Slow Down", BUSY)
        monkeypatch.setattr(server[0], "application", busy)
        swa_avg.average("s3://bucket/run/ckpt_*.keras", tmp_path / "a.keras")
        assert next(refusals, None) is None
        swa_avg.average(paths, tmp_path / "b.keras", verify=False)
        assert (tmp_path / "a.keras").read_bytes() == (tmp_path / "b.keras").read_bytes()

    def test_an_upload_in_several_parts_is_whole(self, s3: Any, tmp_path: Path) -> None:
        content = np.random.default_rng(0).bytes(2**20) * 17
        (tmp_path / "big").write_bytes(content)
        upload(tmp_path / "big", RemotePath("s3://bucket/big"), overwrite=False)
        assert s3.cat_file("bucket/big") == content

    def test_the_service_refuses_to_replace_what_came_first(
        self, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = RemotePath("s3://bucket/swa.keras")
        s3.pipe_file("bucket/swa.keras", b"theirs")
        (tmp_path / "ours").write_bytes(b"ours")
        monkeypatch.setattr(type(target), "exists", lambda self: False)  # it came after the look
        with pytest.raises(UsageError, match="exists; name another one"):
            upload(tmp_path / "ours", target, overwrite=False)
        assert s3.cat_file("bucket/swa.keras") == b"theirs"

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (("s3://bucket/none.keras", "-o", "x.keras"), "s3://bucket/none.keras: no such file or bucket"),
            (("s3://none/a.keras", "-o", "x.keras"), "s3://none/a.keras: no such file or bucket"),
            (("in.keras", "-o", "s3://none/x.keras"), "s3://none/x.keras: no such file or bucket"),
        ],
    )
    def test_a_missing_key_or_bucket_is_one_line(
        self,
        arguments: tuple[str, ...],
        line: str,
        s3: Any,
        swa_avg: Cli,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        makers.write_archive(tmp_path / "in.keras", makers.weights())
        ended = swa_avg(*arguments)
        assert (ended.code, ended.err) == (5, f"swa-avg: error: {line}\n")

    def test_a_pattern_in_a_missing_bucket_is_one_line(self, s3: Any, swa_avg: Cli) -> None:
        ended = swa_avg("s3://none/a*.keras", "-o", "x.keras")
        found = "s3://none/a*.keras: no such file or bucket"
        nothing = "no file matches 's3://none/a*.keras'"  # where s3fs is older than 2026.4
        assert (ended.code, ended.err) in [
            (5, f"swa-avg: error: {found}\n"),
            (2, f"swa-avg: error: {nothing}\n"),
        ]

    @pytest.mark.parametrize("name", ["ckpt_1.keras", "ckpt_*.keras"])
    def test_wrong_credentials_are_one_line(
        self,
        name: str,
        s3: Any,
        server: tuple[Any, str],
        swa_avg: Cli,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        _configure(monkeypatch, server[1], key="nobody")
        application = _refusing(
            server[0].application, lambda environ: "nobody/" not in environ["HTTP_AUTHORIZATION"]
        )
        monkeypatch.setattr(server[0], "application", application)
        ended = swa_avg(f"s3://bucket/{name}", "-o", "x.keras")
        assert ended.code == 5
        assert ended.err.startswith(f"swa-avg: error: s3://bucket/{name}: access denied (")
        assert ended.err.endswith("); check the credentials, and what they allow\n")
        assert ended.err.count("\n") == 1

    def test_a_wrong_address_is_one_line(
        self, s3: Any, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _configure(monkeypatch, "http://127.0.0.1:9")
        ended = swa_avg("s3://bucket/a.keras", "-o", "x.keras")
        line = (
            's3://bucket/a.keras: Could not connect to the endpoint URL: "http://127.0.0.1:9/bucket/a.keras"'
        )
        assert (ended.code, ended.err) == (5, f"swa-avg: error: {line}\n")

    def test_a_service_that_never_answers_is_given_up(
        self, s3: Any, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import socket

        monkeypatch.setattr("swa_avg.files.remote._SECONDS", 1)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            _configure(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
            ended = swa_avg("s3://bucket/a.keras", "-o", "x.keras")
        assert (ended.code, ended.err) == (
            5,
            "swa-avg: error: s3://bucket/a.keras: the service does not answer\n",
        )

    def test_access_that_ends_during_the_run_is_one_line_and_writes_nothing(
        self,
        s3: Any,
        server: tuple[Any, str],
        swa_avg: Cli,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        _write(tmp_path / "in", ".keras")
        _put_s3(s3, tmp_path / "in")
        answering = server[0].application
        budget = iter(range(12))
        application = _refusing(server[0].application, lambda environ: next(budget, None) is not None)
        monkeypatch.setattr(server[0], "application", application)
        ended = swa_avg("s3://bucket/run/ckpt_*.keras", "-o", "s3://bucket/swa.keras")
        monkeypatch.setattr(server[0], "application", answering)
        assert s3.ls("bucket", detail=False) == ["bucket/run"]
        assert ended.code == 5
        assert ended.err.startswith("swa-avg: error: s3://bucket/run/ckpt_")
        assert "access denied" in ended.err
        assert ended.err.count("\n") == 1
