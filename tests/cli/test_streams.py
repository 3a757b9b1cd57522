"""Standard output and standard error that are closed, full or read by nobody; and `python -m swa_avg`.

Every run is a process of its own, in an environment that holds nothing but what the test puts there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import makers
import oracle
import swa_avg

pty = pytest.importorskip("pty")
pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")

PACKAGE = Path(swa_avg.__file__).parent
MODULE = ("-m", "swa_avg")
AVERAGE = (*MODULE, "a_1.keras", "a_2.keras")
INSPECT = (*MODULE, "inspect", "a_1.keras")
TERMINATED = """
import os, signal
from swa_avg import cli
from swa_avg.files import publication as publish

def create(self, *arguments):
    os.kill(os.getpid(), signal.SIGTERM)

publish.Publication.create = create
cli.main()
"""
COMMANDS: dict[str, tuple[Sequence[str], int, bool]] = {
    # What Python is to run, the exit code, and whether there are results for standard output.
    "average": (AVERAGE, 0, False),
    "average --json": ((*AVERAGE, "--json"), 0, True),
    "average --quiet --json": ((*AVERAGE, "--quiet", "--json"), 0, True),
    "average --dry-run": ((*AVERAGE, "--dry-run"), 0, False),
    "average --dry-run --json": ((*AVERAGE, "--dry-run", "--json"), 0, True),
    "inspect": ((*INSPECT, "a_2.keras"), 0, False),
    "inspect --json": ((*INSPECT, "a_2.keras", "--json"), 0, True),
    "inspect --json, what does not fit": ((*INSPECT, "b.keras", "--json"), 4, True),
    "verify": ((*MODULE, "verify", "whole.keras"), 0, False),
    "verify --json": ((*MODULE, "verify", "whole.keras", "--json"), 0, True),
    "verify --json, what differs": ((*MODULE, "verify", "bare/changed.weights.h5", "--json"), 4, True),
    "--help": ((*MODULE, "--help"), 0, True),
    "sweep --help": ((*MODULE, "sweep", "--help"), 0, True),
    "--version": ((*MODULE, "--version"), 0, True),
    "an unknown option": ((*MODULE, "--nope"), 2, False),
    "sweep without data": ((*MODULE, "sweep", "a_1.keras"), 2, False),
    "an input that is not there": ((*MODULE, "gone.keras", "--json"), 3, False),
    "average, what does not fit": ((*MODULE, "a_1.keras", "b.keras", "--json"), 4, False),
    "a folder that refuses": ((*MODULE, "a_1.keras", "-o", "/proc/swa.keras", "--json"), 5, False),
    "terminated": (("-c", TERMINATED, "a_1.keras", "a_2.keras", "--json"), 143, False),
}
STREAMS = {"stdout": ["1"], "stderr": ["2"], "both": ["1", "2"]}
REASONS = {"closed": errno.EBADF, "full": errno.ENOSPC, "unread": errno.EPIPE}
"""Why nothing can be written to a stream, and what the system says then."""
BUFFERING: dict[str, Mapping[str, str]] = {"buffered": {}, "unbuffered": {"PYTHONUNBUFFERED": "1"}}

Outcome = tuple[int, str, str, str | None]
"""Exit code, standard output, standard error, SHA-256 of the average."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints that fit, one that does not, and the average of the two."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in (1, 2):
        makers.write_archive(folder / f"a_{number}.keras", makers.weights(number))
    makers.write_archive(folder / "b.keras", makers.weights(3) | {"layers/dense/vars/1": np.zeros(6, "f4")})
    swa_avg.average([folder / "a_1.keras", folder / "a_2.keras"], folder / "whole.keras")
    bare = folder / "bare"
    bare.mkdir()
    for number in (1, 2):
        makers.write_weights(bare / f"a_{number}.weights.h5", makers.weights(number))
    swa_avg.average(sorted(bare.glob("a_*")), bare / "whole.weights.h5")
    kernel = oracle.mean([makers.weights(number)["layers/dense/vars/0"] for number in (1, 2)])
    changed = (bare / "whole.weights.h5").read_bytes().replace(kernel.tobytes(), (kernel + 1).tobytes())
    (bare / "changed.weights.h5").write_bytes(changed)
    return folder


def _run(
    command: Sequence[str],
    folder: Path,
    streams: Sequence[str] = (),
    fate: str = "closed",
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run Python in a folder, with some of the streams closed, full or unread."""
    operator = {"closed": "{}>&-", "full": "{}>/dev/full", "unread": "{}>&0"}[fate]
    redirected = " ".join(operator.format(stream) for stream in streams)
    unread, write = os.pipe()
    os.close(unread)
    shell = f'exec "$@" {redirected}' + ("" if "0" in streams else " 0</dev/null")
    ended = subprocess.run(
        ["/bin/sh", "-c", shell, "sh", sys.executable, *command],
        cwd=folder,
        env=dict(environment or {}),
        stdin=write,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        timeout=600,
        check=False,
    )
    os.close(write)
    average = folder / "swa.keras"
    digest = hashlib.sha256(average.read_bytes()).hexdigest() if average.exists() else None
    return ended.returncode, ended.stdout, ended.stderr, digest


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stream_that_takes_nothing_changes_only_what_it_has_to(name: str, inputs: Path) -> None:
    command, code, results = COMMANDS[name]
    cells = [(stream, fate, how) for stream in ("stdout", "stderr") for fate in REASONS for how in BUFFERING]
    cells.append(("both", "full", "buffered"))

    def outcome(cell: tuple[str, str, str] | None) -> Outcome:
        with tempfile.TemporaryDirectory(dir=inputs.parent) as folder:
            shutil.copytree(inputs, folder, dirs_exist_ok=True)
            if cell is None:
                return _run(command, Path(folder))
            stream, fate, how = cell
            return _run(command, Path(folder), STREAMS[stream], fate, BUFFERING[how])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        usual, *found = pool.map(outcome, [None, *cells])
    _, out, err, digest = usual
    assert usual[0] == code, err
    assert (out != "") == results
    assert (digest is not None) == (name.startswith("average") and code == 0 and "--dry-run" not in name)
    expected = []
    for stream, fate, _ in cells:
        lost = results and stream != "stderr"
        line = (
            f"swa-avg: error: standard output: cannot write: {os.strerror(REASONS[fate])}\n" if lost else ""
        )
        expected.append(
            (
                5 if lost else code,
                out if stream == "stderr" else "",
                err + line if stream == "stdout" else "",
                digest,
            )
        )
    assert dict(zip(cells, found, strict=True)) == dict(zip(cells, expected, strict=True))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which there is more to tell than a pipe holds."""
    folder = tmp_path_factory.mktemp("many")
    arrays = {f"layers/dense_{number}/vars/0": np.zeros(1, np.float32) for number in range(3000)}
    makers.write_weights(folder / "a_1.weights.h5", arrays)
    return folder


MANY = {  # the stream that takes more than a pipe holds
    1: [sys.executable, *MODULE, "inspect", "a_1.weights.h5", "--quiet", "--json"],
    2: [sys.executable, *MODULE, "inspect", "a_1.weights.h5", "--verbose"],
}


@pytest.mark.parametrize("how", BUFFERING)
@pytest.mark.parametrize(("number", "code"), [(1, 5), (2, 0)])
def test_a_reader_may_leave_halfway(number: int, code: int, how: str, many: Path) -> None:
    pipes = {1: subprocess.PIPE, 2: subprocess.PIPE}
    with subprocess.Popen(
        MANY[number], cwd=many, env=BUFFERING[how], stdout=pipes[1], stderr=pipes[2], bufsize=0
    ) as process:
        left, other = (process.stdout, process.stderr) if number == 1 else (process.stderr, process.stdout)
        assert left is not None
        assert other is not None
        assert left.read(1)
        left.close()
        line = f"swa-avg: error: standard output: cannot write: {os.strerror(errno.EPIPE)}\n"
        assert other.read().decode() == (line if number == 1 else "")
    assert process.returncode == code


@pytest.mark.parametrize("how", BUFFERING)
def test_results_of_which_the_file_takes_only_a_part_are_not_delivered(how: str, many: Path) -> None:
    """Python unbuffered drops the rest without a word."""
    shell = ["/bin/sh", "-c", 'ulimit -f 1; exec "$@" >result.json', "sh", *MANY[1]]
    ended = subprocess.run(shell, cwd=many, env=BUFFERING[how], capture_output=True, text=True, check=False)
    line = f"swa-avg: error: standard output: cannot write: {os.strerror(errno.EFBIG)}\n"
    assert (ended.returncode, ended.stderr) == (5, line)
    assert 0 < (many / "result.json").stat().st_size <= 1024


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stream", [1, 2])
def test_a_reader_that_is_stuck_does_not_keep_an_interrupted_run(
    stream: int, number: signal.Signals, many: Path
) -> None:
    pipe, write = os.pipe()
    outputs = {1: subprocess.DEVNULL, 2: subprocess.DEVNULL, stream: write}
    process = subprocess.Popen(MANY[stream], cwd=many, env={}, stdout=outputs[1], stderr=outputs[2])
    try:
        deadline = time.monotonic() + 60
        while select.select([], [write], [], 0)[1]:  # until the pipe is full
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
        process.wait()
        os.close(pipe)
        os.close(write)


NOISY = """
import os
from swa_avg import cli
from swa_avg.files import publication as publish

create = publish.Publication.create

def noisy(self, *arguments):
    file = create(self, *arguments)
    for number in (0, 1, 2):
        try:
            os.write(number, b"what a library in C prints")
        except OSError:
            pass
    return file

publish.Publication.create = noisy
cli.main()
"""


@pytest.mark.parametrize("closed", [("0",), ("1",), ("2",), ("0", "1"), ("1", "2"), ("0", "1", "2")], ids=str)
def test_no_file_takes_the_place_of_a_closed_stream(
    closed: Sequence[str], inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    code, _, _, digest = _run(("-c", NOISY, "a_1.keras", "a_2.keras"), tmp_path, closed)
    assert code == 0
    assert digest == hashlib.sha256((inputs / "whole.keras").read_bytes()).hexdigest()


def _on_a_terminal(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], *, reads: int | None
) -> tuple[int, str, bytes]:
    """Run a command with standard error on a terminal that goes away after so many bytes."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
        text=True,
    ) as process:
        os.close(theirs)
        shown = b""
        while reads is None or len(shown) < reads:
            try:
                data = os.read(ours, 1024 if reads is None else reads - len(shown))
            except OSError:  # the other side has ended
                break
            shown += data
        os.close(ours)
        assert process.stdout is not None
        out = process.stdout.read()
    return process.returncode, out, shown


@pytest.mark.parametrize("how", BUFFERING)
@pytest.mark.parametrize("reads", [0, 1, 40])
def test_a_terminal_that_goes_away_takes_the_progress_bar_with_it_and_nothing_else(
    reads: int, how: str, inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, *AVERAGE, "--json"]
    environment = {"TERM": "xterm", **BUFFERING[how]}
    code, out, shown = _on_a_terminal(command, tmp_path, environment, reads=reads)
    assert (code, len(shown)) == (0, reads)
    assert json.loads(out)["written"]
    assert (tmp_path / "swa.keras").read_bytes() == (inputs / "whole.keras").read_bytes()


def test_a_progress_bar_is_drawn_only_where_it_can_be_erased(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    command = [sys.executable, *AVERAGE, "--overwrite"]
    _, _, plain, _ = _run(command[1:], tmp_path)
    for terminal in ("dumb", "unknown"):
        code, _, shown = _on_a_terminal(command, tmp_path, {"TERM": terminal}, reads=None)
        assert (code, shown.decode().replace("\r\n", "\n")) == (0, plain)
    code, _, shown = _on_a_terminal(command, tmp_path, {"TERM": "xterm"}, reads=None)
    assert code == 0
    assert b"averaging" in shown
    assert shown.decode().replace("\r\n", "\n").endswith(plain)


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "ascii:strict", "PYTHONUNBUFFERED": "1"},
        {"PYTHONIOENCODING": "latin-1"},
        {"FORCE_COLOR": "1", "COLUMNS": "20", "TERM": "xterm"},
        {"NO_COLOR": "1", "COLUMNS": "0", "TERM": "dumb", "TZ": "Asia/Kolkata"},
    ],
    ids=" ".join,
)
def test_characters_that_the_terminal_lacks_stop_no_run(
    environment: Mapping[str, str], tmp_path: Path
) -> None:
    names = [os.fsdecode(f"ünï_{number}.keras".encode()) for number in (1, 2, 3)]
    for number, name in enumerate(names):
        makers.write_archive(tmp_path / name, makers.weights(number))
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names]
    lines = [f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True)]
    (tmp_path / "SHA256SUMS").write_bytes(os.fsencode("".join(lines)))
    report = ["--report", "page.html"] if find_spec("matplotlib") else []
    for command in (
        [*names, "-o", "swa.keras", "--expect-sha256", "SHA256SUMS", "--verbose", "--json"],
        ["inspect", *names, "--verbose", *report, "--json"],
    ):
        code, out, err, _ = _run((*MODULE, *command), tmp_path, environment=environment)
        assert code == 0, err
        assert json.loads(out)
        assert "\x1b" not in err
        assert "Traceback" not in err
    assert not report or "90°" in (tmp_path / "page.html").read_text("utf-8")


@pytest.mark.keras
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_keras_runs_where_the_streams_are_closed(tmp_path: Path) -> None:
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    layers = [keras.Input((3,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((64, 3), np.float32), "y": rng.standard_normal((64, 2), np.float32)}
    np.savez(tmp_path / "data.npz", **arrays)
    for number in (1, 2):
        model.fit(arrays["x"], arrays["y"], verbose=0)
        model.save(tmp_path / f"a_{number}.keras")
    options = ("--val", "data.npz", "--bn-refresh", "data.npz", "--json")
    command = (*MODULE, "sweep", "a_1.keras", "a_2.keras", *options)
    code, out, err, digest = _run(command, tmp_path)
    assert (code, json.loads(out)["written"]) == (0, True), err
    (tmp_path / "swa.keras").unlink()
    assert _run(command, tmp_path, ("0", "1", "2")) == (5, "", "", digest)


class TestModule:
    """`python -m swa_avg`."""

    def test_it_is_the_same_program(self, inputs: Path, tmp_path: Path) -> None:
        shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
        program = ("-c", "from swa_avg.cli import main; main()")
        for arguments in (
            ["--help"],
            ["verify", "--help"],
            ["--version"],
            ["--nope"],
            ["verify", "--nope"],
            ["sweep"],
            ["gone.keras"],
            ["inspect", "a_1.keras", "a_2.keras", "--json"],
            ["verify", "whole.keras", "--json"],
        ):
            outcome = _run((*MODULE, *arguments), tmp_path)
            assert outcome == _run((*program, *arguments), tmp_path)
        assert _run((*MODULE, "--help"), tmp_path)[1].startswith("Usage: swa-avg [OPTIONS]")

    @pytest.mark.parametrize(
        "option",
        ["-S", pytest.param("-SP", marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="no -P"))],
    )
    def test_no_module_beside_the_checkpoints_runs(self, option: str, inputs: Path, tmp_path: Path) -> None:
        """None but those that `python -m` loads itself, before any line of ours: without site, they are few."""
        places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), PACKAGE.parent]
        environment = {"PYTHONPATH": os.pathsep.join(map(str, places))}
        bare = tmp_path / "empty" / "bare"
        bare.mkdir(parents=True)
        (bare / "__main__.py").write_text("import sys\nprint(*sys.modules)\n")
        code, loaded, err, _ = _run(("-S", "-m", "bare"), bare.parent, environment=environment)
        assert code == 0, err
        installed = {"click", "click_default_group", "h5py", "isal", "matplotlib", "numpy", "rich"}
        names = (installed | sys.stdlib_module_names) - {*loaded.split()}
        assert {"__future__", "click", "h5py", "json", "numpy", "signal", "typing"} <= names
        hostile, clean = tmp_path / "hostile", tmp_path / "clean"
        for folder in (hostile, clean):
            shutil.copytree(inputs, folder)
        for name in names:
            (hostile / f"{name}.py").write_text("raise SystemExit('what lay beside the checkpoints ran')\n")
        for arguments in (
            ["--help"],
            ["--nope"],
            ["a_1.keras", "a_2.keras", "--json"],
            ["verify", "whole.keras", "--json"],
            ["inspect", "bare/a_1.weights.h5", "bare/a_2.weights.h5", "--json"],
        ):
            expected = _run((option, *MODULE, *arguments), clean, environment=environment)
            assert expected[0] == (2 if arguments == ["--nope"] else 0), expected
            assert _run((option, *MODULE, *arguments), hostile, environment=environment) == expected

    def test_a_clone_runs_from_its_own_folder(self, inputs: Path, tmp_path: Path) -> None:
        """Once the folder has left the path, the package still finds its own modules there."""
        clone = tmp_path / "clone"
        shutil.copytree(inputs, clone)
        shutil.copytree(PACKAGE, clone / "swa_avg", ignore=shutil.ignore_patterns("__pycache__"))
        source = (clone / "swa_avg" / "text.py").read_text("utf-8")
        (clone / "swa_avg" / "text.py").write_text(
            source.replace(f'__version__ = "{swa_avg.__version__}"', '__version__ = "of the clone"')
        )
        code, out, _, _ = _run((*MODULE, "--version"), clone)
        assert (code, out) == (0, "swa-avg, version of the clone\n")
        code, out, err, _ = _run((*AVERAGE, "--json"), clone)
        assert code == 0, err
        average = (clone / "swa.keras").read_bytes()
        whole = (inputs / "whole.keras").read_bytes()
        assert b'"version": "of the clone"' in average
        assert len(average) - len(whole) == len("of the clone") - len(swa_avg.__version__)

    def test_a_current_folder_that_is_gone_stops_no_run(self, inputs: Path, tmp_path: Path) -> None:
        code = "import os, sys\nos.chdir(sys.argv[1])\nos.rmdir(sys.argv[1])\nos.execv(sys.executable, sys.argv[2:])"
        (tmp_path / "gone").mkdir()
        arguments = ("inspect", str(inputs / "a_1.keras"), str(inputs / "a_2.keras"), "--json")
        gone = _run(("-c", code, str(tmp_path / "gone"), sys.executable, *MODULE, *arguments), tmp_path)
        assert gone == _run((*MODULE, *arguments), tmp_path)
        assert gone[0] == 0
