"""Averaging on a Dask cluster: the same bytes, and one line where the cluster fails."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import makers
import oracle
from swa_avg import average
from swa_avg.errors import MismatchError, SystemRefusalError, UnreadableError, UsageError

distributed = pytest.importorskip("distributed")

from swa_avg.batchnorm import Refresh  # noqa: E402
from swa_avg.combine import budget, combiner, workers  # noqa: E402
from swa_avg.combine import cluster as module  # noqa: E402
from swa_avg.planning import output  # noqa: E402
from swa_avg.sweeping.scoring import Validation  # noqa: E402
from swa_avg.sweeping.search import sweep  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # Keras's own
]

COUNT = 5


def two_processes() -> Any:
    return distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with two_processes() as started:
        yield started


@pytest.fixture
def mortal() -> Iterator[Any]:
    """Two processes of a test's own: Dask does not always start another in the place of one that is killed."""
    with two_processes() as started:
        yield started


@pytest.fixture
def lonely() -> Iterator[Any]:
    """A cluster of one worker, in this process."""
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        silence_logs=50,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_TASK_BYTES", 2**14)
    for name in ("LOCAL", "REMOTE", "CLUSTER", "REMOTE_CLUSTER"):
        monkeypatch.setattr(workers, name, replace(getattr(budget, name), block_bytes=2**12))


def arrays(number: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    values = 2 + np.random.default_rng(100 + number).standard_normal((311, 517))
    stored = (
        oracle.nearest_bfloat16(values).view("V2").reshape(values.shape)
        if dtype == "bfloat16"
        else values.astype(dtype)
    )
    return makers.weights(number) | {
        "layers/dense_1/vars/0": stored,
        "optimizer/vars/3": values.astype(np.float32),
    }


def write_run(folder: Path, suffix: str = ".keras", dtype: str = "float32") -> list[Path]:
    writers = {
        ".keras": makers.write_archive,
        ".weights.h5": makers.write_weights,
        ".weights.json": makers.write_sharded,
        "": makers.write_folder,
    }
    return [
        writers[suffix](folder / f"ckpt_{number}{suffix}", arrays(number, dtype)) for number in range(COUNT)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def wait_for(condition: Callable[[], Any]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it did not come about within half a minute")


def both(paths: list[Path], folder: Path, address: str, **options: Any) -> tuple[Path, Path]:
    """Average here and on the cluster, to the same name in two folders."""
    outputs = []
    for name, where in (("here", None), ("cluster", address)):
        (folder / name).mkdir()
        outputs.append(folder / name / f"swa{output.suffix_of(paths[0])}")
        average(paths, outputs[-1], cluster=where, **options)
    assert contents(folder / "here") == contents(folder / "cluster")
    return outputs[0], outputs[1]


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "archives": (".keras", "float32", {}),
    "only what is averaged": (".keras", "float32", {"verify": False}),
    "ema": (".weights.h5", "float32", {"method": "ema:0.7"}),
    "bfloat16": (".weights.h5", "bfloat16", {"verify": False}),
    "shards": (".weights.json", "float16", {}),
    "folders": ("", "float32", {}),
    "folders without the optimizer": ("", "float32", {"optimizer": "drop"}),
    "without the optimizer": (".keras", "float32", {"optimizer": "drop"}),
    "shards without the optimizer": (".weights.json", "float32", {"optimizer": "drop"}),
    "little memory": (".keras", "float32", {"max_memory": 2**12 + budget.CLUSTER.process}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_one_machine(case: str, cluster: Any, tmp_path: Path) -> None:
    suffix, dtype, options = CASES[case]
    paths = write_run(tmp_path, suffix, dtype)
    _, output = both(paths, tmp_path, cluster.scheduler_address, **options)
    if "method" not in options:
        name = "layers/dense_1/vars/0"
        expected = oracle.mean([arrays(number, dtype)[name] for number in range(COUNT)])
        assert oracle.read_arrays(output)[name].tobytes() == expected.tobytes()


def test_inputs_of_different_layouts_are_checked_and_averaged_by_name(cluster: Any, tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    makers.write_archive(paths[1], dict(reversed(arrays(1).items())))
    both(paths, tmp_path, cluster.scheduler_address)


@pytest.mark.parametrize("verify", [None, True])
@pytest.mark.parametrize("suffix", [".keras", ".weights.json", ""])
def test_workers_read_urls_themselves(suffix: str, verify: bool | None, cluster: Any, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    write_run(tmp_path, suffix)
    for name in ("here", "cluster"):
        (tmp_path / name).mkdir()
    urls = f"file://{tmp_path}/ckpt_?{suffix}"
    average(urls, tmp_path / "here" / f"swa{suffix}", verify=verify)
    output = f"file://{tmp_path}/cluster/swa{suffix}"
    average(urls, output, verify=verify, cluster=cluster.scheduler_address)
    assert contents(tmp_path / "here") == contents(tmp_path / "cluster")


def test_damage_to_any_input_is_found(cluster: Any, tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    makers.write_archive(paths[1], dict(reversed(arrays(1).items())))
    for path in (paths[1], paths[2]):
        good = path.read_bytes()
        at = good.index(max(arrays(int(path.stem[-1])).values(), key=lambda value: value.nbytes).tobytes())
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(UnreadableError, match=f"{path.name}: damaged: its CRC-32 is"):
            average(paths, tmp_path / "swa.keras", cluster=cluster.scheduler_address)
        path.write_bytes(good)


def test_relative_names_are_those_of_the_client(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    average("ckpt_*.keras", "swa.keras", cluster=cluster.scheduler_address)
    average("ckpt_*.keras", "here.keras")
    assert Path("swa.keras").read_bytes() == Path("here.keras").read_bytes()


def test_values_that_are_not_finite_are_named_as_on_one_machine(cluster: Any, tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    makers.write_archive(paths[2], arrays(2) | {"layers/dense/vars/1": np.full(5, np.nan, np.float32)})
    with pytest.raises(MismatchError) as error:
        average(paths, tmp_path / "swa.keras", cluster=cluster.scheduler_address)
    assert str(error.value) == (
        f"{paths[2]}: layers/dense/vars/1: holds NaN or infinity; leave this checkpoint out"
    )


def test_a_worker_killed_half_way_changes_nothing(mortal: Any, tmp_path: Path) -> None:
    paths = write_run(tmp_path)
    killed = []

    def kill(total: int, count: int) -> None:
        if not killed:
            killed.append(next(iter(mortal.workers.values())).pid)
            os.kill(killed[0], signal.SIGKILL)

    average(paths, tmp_path / "swa.keras", cluster=mortal.scheduler_address, progress=kill)
    assert killed
    average(paths, tmp_path / "here.keras")
    assert (tmp_path / "swa.keras").read_bytes() == (tmp_path / "here.keras").read_bytes()


def test_a_cluster_that_loses_all_workers_ends_the_run_with_the_last_one_and_the_file(
    lonely: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.5)
    monkeypatch.setattr(module, "_LOOK", 0.1)
    paths = write_run(tmp_path)
    worker = next(iter(lonely.scheduler.workers))

    def desert(total: int, count: int) -> None:
        lonely.scale(0)
        wait_for(lambda: not lonely.scheduler.workers)

    with pytest.raises(SystemRefusalError) as error:
        average(paths, tmp_path / "swa.keras", cluster=lonely.scheduler_address, progress=desert)
    assert error.value.exit_code == 5
    assert error.value.filename == lonely.scheduler_address
    assert error.value.strerror == (
        f"worker {worker} was lost while {paths[-1]} was being read, and no other came; "
        f"look at its log; start workers: dask worker {lonely.scheduler_address}"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]


def test_a_result_whose_worker_is_lost_once_it_was_fetched_counts(
    lonely: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_run(tmp_path)
    average(paths, tmp_path / "here.keras")
    gather = distributed.Client._gather
    lost = []

    async def gather_and_lose(client: Any, futures: Any, *args: Any, **kwargs: Any) -> Any:
        results = await gather(client, futures, *args, **kwargs)
        for future in futures:
            future._state.lose()  # what the scheduler's message about the lost data does
            lost.append(future.key)
        return results

    monkeypatch.setattr(distributed.Client, "_gather", gather_and_lose)
    average(paths, tmp_path / "swa.keras", cluster=lonely.scheduler_address)
    assert lost
    assert (tmp_path / "swa.keras").read_bytes() == (tmp_path / "here.keras").read_bytes()


@pytest.mark.parametrize("change", ["missing", "replaced"])
def test_a_worker_that_sees_no_file_or_another_is_named_with_the_file(
    change: str, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client has the file open; then it goes, or is replaced: to a worker, as on another file system."""
    paths = write_run(tmp_path)
    make_plan = output.make_plan

    def change_file(*args: Any, **kwargs: Any) -> Any:
        other = tmp_path / "other"
        other.write_bytes(paths[1].read_bytes())
        os.utime(other, (1, 1))
        other.replace(paths[1])
        if change == "missing":
            paths[1].unlink()
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(output, "make_plan", change_file)
    with pytest.raises(UnreadableError) as error:
        average(paths, tmp_path / "swa.keras", cluster=cluster.scheduler_address)
    problem = {
        "missing": "no such file or directory",
        "replaced": "another file here, of another size or time of modification; mount one file system everywhere",
    }
    expected = [f"worker {worker}: {paths[1]}: {problem[change]}" for worker in cluster.scheduler.workers]
    assert str(error.value) in expected
    assert not list(tmp_path.glob("*swa*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_cancels_the_work_and_leaves_nothing(
    number: int, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Callable[..., Any]
) -> None:
    paths = write_run(tmp_path)
    calls = itertools.count()
    combined = combiner.crc32_combine

    def interrupted(*args: int) -> int:
        if next(calls) == 3:
            signal.raise_signal(number)
        return combined(*args)

    monkeypatch.setattr(combiner, "crc32_combine", interrupted)
    ended = swa_avg(*paths, "-o", tmp_path / "swa.keras", "--cluster", cluster.scheduler_address)
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
    assert (ended.code, ended.err) == (128 + number, f"swa-avg: {word}; nothing was written\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    wait_for(lambda: not cluster.scheduler.tasks)


def test_where_no_scheduler_answers_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Callable[..., Any]
) -> None:
    monkeypatch.setattr(module, "_CONNECT", 1.0)
    paths = write_run(tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        busy = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        for address, line in (
            (busy, "no Dask scheduler answers there, within 1 s; start one with: dask scheduler"),
            ("127.0.0.1:9", "no Dask scheduler answers there, within 1 s; start one with: dask scheduler"),
            (
                "node1",
                "not the address of a Dask scheduler (missing port number in address 'node1'); "
                "expected such as tcp://node1:8786",
            ),
        ):
            ended = swa_avg(*paths, "-o", tmp_path / "swa.keras", "--cluster", address)
            assert (ended.code, ended.err) == (5, f"swa-avg: error: {address}: {line}\n")


def test_the_address_of_a_worker_is_told_from_that_of_a_scheduler(cluster: Any, tmp_path: Path) -> None:
    worker = next(iter(cluster.scheduler.workers))
    with pytest.raises(SystemRefusalError, match="a Dask worker answers, not a scheduler"):
        average(write_run(tmp_path), tmp_path / "swa.keras", cluster=worker)


def test_another_version_on_the_workers_is_one_line(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swa_avg: Callable[..., Any]
) -> None:
    there = module.__version__
    monkeypatch.setattr(module, "__version__", "99.0")
    address = cluster.scheduler_address
    ended = swa_avg(*write_run(tmp_path), "-o", tmp_path / "swa.keras", "--cluster", address)
    lines = [
        f"swa-avg: error: {address}: worker {worker} has swa-avg {there}, the client has 99.0; "
        "install the same versions on the client and on all workers\n"
        for worker in cluster.scheduler.workers
    ]
    assert ended.code == 5
    assert ended.err in lines


def test_a_worker_of_another_version_that_comes_later_is_refused(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__version__", "99.0")
    monkeypatch.setattr(module.Connection, "check_workers", lambda self: None)  # it was not there then
    with pytest.raises(SystemRefusalError, match=r"has swa-avg .*, the client has 99\.0"):
        average(write_run(tmp_path), tmp_path / "swa.keras", cluster=cluster.scheduler_address)


def test_a_scheduler_without_workers_is_one_line(
    lonely: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    lonely.scale(0)
    wait_for(lambda: not lonely.scheduler.workers)
    with pytest.raises(
        SystemRefusalError, match="the cluster has no worker; start workers: dask worker tcp://"
    ):
        average(write_run(tmp_path), tmp_path / "swa.keras", cluster=lonely.scheduler_address)


def test_threads_and_cluster_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads is for this machine alone"):
        average(write_run(tmp_path), tmp_path / "swa.keras", threads=2, cluster="tcp://127.0.0.1:9")


def test_too_little_memory_for_one_block_is_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"max_memory 1\.0 MiB is too little"):
        average(
            write_run(tmp_path), tmp_path / "swa.keras", max_memory=2**20, cluster=cluster.scheduler_address
        )


def test_without_dask_the_command_to_install_it_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path)
    code = (
        "import sys\nsys.modules['distributed'] = None\n"
        "from swa_avg.cli.program import main\n"
        "sys.argv = ['swa-avg', 'ckpt_*.keras', '--cluster', 'tcp://127.0.0.1:9']\nmain()"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "swa-avg: error: cluster needs Dask: pip install 'swa-avg[dask]'\n"


# --- refresh ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of a model with dropout and BatchNorm, and data for it."""
    keras = pytest.importorskip("keras")
    layers = keras.layers
    folder = tmp_path_factory.mktemp("trained")
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Flatten(),
            layers.Dense(5),
            layers.BatchNormalization(),
        ]
    )
    rng = np.random.default_rng(3)
    for number in range(2):
        for variable in model.trainable_variables:
            variable.assign(rng.standard_normal(variable.shape))
        model.save(folder / f"ckpt_{number}.keras")
    np.savez(folder / "x.npz", x=rng.standard_normal((333, 6, 6, 2)).astype("float32"))
    return folder


def refresh_of(folder: Path, **options: Any) -> Any:
    return Refresh(str(folder / "x.npz"), batch_size=20, **options)


@pytest.mark.keras
@pytest.mark.parametrize("estimator", ["pooled", "batch-mean"])
def test_a_refresh_is_that_of_one_machine(
    estimator: str, cluster: Any, trained: Path, tmp_path: Path
) -> None:
    paths = [trained / "ckpt_0.keras", trained / "ckpt_1.keras"]
    refresh = refresh_of(trained, estimator=estimator, samples=310)
    rows = []
    both(
        paths,
        tmp_path,
        cluster.scheduler_address,
        refresh=refresh,
        refresh_progress=lambda total, count: rows.append((total, count)),
    )
    assert rows == [(310, 20)] * 15 + [(310, 10)] + [(310, 20)] * 15 + [(310, 10)]


@pytest.mark.keras
def test_a_worker_killed_during_a_refresh_changes_nothing(mortal: Any, trained: Path, tmp_path: Path) -> None:
    killed = []

    def kill(total: int | None, count: int) -> None:
        if len(killed) == 3:
            os.kill(next(iter(mortal.workers.values())).pid, signal.SIGKILL)
        killed.append(count)

    paths, refresh = [trained / "ckpt_0.keras", trained / "ckpt_1.keras"], refresh_of(trained)
    average(paths, tmp_path / "here.keras", refresh=refresh)
    address = mortal.scheduler_address
    average(paths, tmp_path / "swa.keras", refresh=refresh, cluster=address, refresh_progress=kill)
    assert len(killed) == 17
    assert (tmp_path / "swa.keras").read_bytes() == (tmp_path / "here.keras").read_bytes()


@pytest.mark.keras
def test_data_in_memory_are_used_on_this_machine_and_the_report_says_so(
    lonely: Any, trained: Path, tmp_path: Path
) -> None:
    data = makers.arrays_in(trained / "x.npz")["x"]
    report = average(
        trained / "ckpt_0.keras",
        tmp_path / "swa.keras",
        refresh=Refresh({"x": data}),
        cluster=lonely.scheduler_address,
    )
    assert report.refresh is not None
    assert report.refresh.notes == (
        "refreshed on this machine alone, since its memory holds the data or the model",
    )


@pytest.mark.keras
def test_data_that_a_worker_sees_differently_are_named(
    cluster: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swa_avg.batchnorm import distributed

    data = tmp_path / "x.npz"
    data.write_bytes((trained / "x.npz").read_bytes())
    of = distributed.BatchWorker.of

    def then_changed(*args: Any) -> Any:
        worker = of(*args)
        os.utime(data, (1, 1))
        return worker

    monkeypatch.setattr(distributed.BatchWorker, "of", then_changed)
    with pytest.raises(UnreadableError) as error:
        average(
            trained / "ckpt_0.keras",
            tmp_path / "swa.keras",
            refresh=Refresh(str(data), batch_size=20),
            cluster=cluster.scheduler_address,
        )
    size = data.stat().st_size
    assert str(error.value) in [
        f"worker {worker}: {data}: another file here: expected {size} bytes, found {size}; "
        "mount one file system everywhere, and change nothing"
        for worker in cluster.scheduler.workers
    ]


# --- sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(trained: Path) -> Path:
    """The trained folder, with a third checkpoint and validation data."""
    keras = pytest.importorskip("keras")
    rng = np.random.default_rng(4)
    model = keras.models.load_model(trained / "ckpt_1.keras")
    for variable in model.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape))
    model.save(trained / "ckpt_2.keras")
    x = rng.standard_normal((60, 6, 6, 2)).astype("float32")
    np.savez(trained / "val.npz", x=x, y=rng.integers(0, 5, 60))
    return trained


def agreement(targets: np.ndarray, predictions: np.ndarray) -> float:
    return float((predictions.argmax(axis=1) == targets).mean())


@pytest.mark.keras
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_sweep_is_that_of_one_machine(refreshed: bool, cluster: Any, swept: Path, tmp_path: Path) -> None:
    reports = []
    for name, address in (("here", None), ("cluster", cluster.scheduler_address)):
        (tmp_path / name).mkdir()
        report = sweep(
            [swept / f"ckpt_{number}.keras" for number in range(3)],
            tmp_path / name / "best.keras",
            validation=Validation(str(swept / "val.npz"), metric=agreement, mode="max"),
            refresh=refresh_of(swept) if refreshed else None,
            tried=["uniform", "last:2", "greedy"],
            cluster=address,
        )
        reports.append(report)
    assert contents(tmp_path / "here") == contents(tmp_path / "cluster")
    here, there = reports
    assert there.singles == here.singles
    assert there.averages == here.averages
    assert (there.rows, there.digest, there.winner) == (here.rows, here.digest, here.winner)
