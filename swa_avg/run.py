"""The whole story: select, open, plan, combine, publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, NoReturn

from swa_avg import methods
from swa_avg.batchnorm.checkpoint import Refresh, check_request, refreshed_values, with_values
from swa_avg.batchnorm.report import RefreshReport
from swa_avg.blocks import bytes_to_read
from swa_avg.combine import Combiner, block_memory, sent_memory
from swa_avg.digests import check_digests, read_digests
from swa_avg.errors import Finding, MismatchError, UsageError
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.formats.archive import ArchiveCheckpoint
from swa_avg.plan import Plan, make_plan
from swa_avg.policy import batchnorm_layers, resolve_dtypes
from swa_avg.provenance import describe
from swa_avg.publish import Publication, check_output
from swa_avg.selection import epochs_of, expand, select

__all__ = ["Progress", "Report", "average"]

Progress = Callable[[int, int], None]
"""Called with (bytes to read in all, bytes read since the last call)."""

_BLOCK_BYTES = 2**19  # with its sums, it stays in a core's cache
_SMALLEST_BLOCK = 2**16
_PROCESS_MEMORY = 64 * 2**20  # the interpreter with numpy and h5py, before anything is averaged
_CLUSTER_MEMORY = 160 * 2**20  # with Dask
_CLUSTER_ROOM = 2**30  # for what workers send back
_SENT_BYTES = 2**23  # what they send at a time


@dataclass(frozen=True)
class Report:
    """What `average` did, or with `dry_run` would do."""

    output: Path
    plan: Plan
    method: str
    verify: bool
    bytes_to_read: int
    peak_memory: int
    """Predicted peak of the process's resident memory, in bytes, without a refresh."""
    refresh: RefreshReport | None = None
    """What the refresh of BatchNorm statistics did."""

    @cached_property
    def batchnorm_layers(self) -> list[str]:
        """BatchNorm layers whose statistics are averages of statistics, not those of the averaged weights."""
        return batchnorm_layers(self.plan.inputs[-1])


def average(
    inputs: str | Path | Sequence[str | Path] = (),
    output: str | Path | None = None,
    *,
    epochs: str | None = None,
    best: int | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    last: int | None = None,
    every: int | None = None,
    method: str = "uniform",
    decay: float | None = None,
    sigma_rel: float | None = None,
    weights: Sequence[float] | None = None,
    optimizer: str = "keep",
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    expect_sha256: str | Path | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    refresh: Refresh | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    refresh_progress: Callable[[int | None, int], None] | None = None,
) -> Report:
    """Average Keras checkpoints into one, without Keras.

    Floating-point weights (float16, bfloat16, float32, float64; any shape) are summed in float64 in training
    order and rounded once to their stored dtype, ties to even. Everything else is the newest checkpoint's:
    see the table "What is averaged" in the README. Source: Izmailov et al. 2018, "Averaging Weights Leads to
    Wider Optima and Better Generalization" (arXiv:1803.05407).

    Args:
        inputs: Names and shell patterns of checkpoints of one format. Their training order is the natural
            order of the names (`ckpt_2` before `ckpt_10`), in whichever order they are given. Without any:
            those that `checkpoints.json` in the current folder names, in its order.
        output: Where the average is written; `swa` + the inputs' suffix by default. From `.keras` inputs it
            may end with `.weights.h5`.
        epochs: Use only these epochs: `A:B[:STEP]`, both ends included; by the index beside the checkpoints,
            else by the last whole number in each name.
        best: Of these, the best so many by a metric in the index.
        monitor: That metric; the one that the index monitors by default.
        mode: `min` or `max`, for a metric that the index does not monitor.
        last: Of these, the last so many.
        every: Of these, every so many-th, counted back from the newest.
        method: `uniform`; `ema` with `decay`; `power-ema` with `sigma_rel`; `weights` with `weights`.
        decay: Share in [0, 1) that each step of `ema` keeps.
        sigma_rel: Width of the `power-ema` profile relative to the length of training, in (0, 0.2887).
        weights: One coefficient a checkpoint, in training order, with sum 1.
        optimizer: `keep` copies the newest checkpoint's optimizer state, `drop` leaves it out.
        dtype: `bfloat16`, where untagged 2-byte tensors of weights-only files hold that.
        overwrite: Replace an existing output.
        verify: Read every byte and check it against the CRC-32 that archives store.
        expect_sha256: A list as `sha256sum` writes it, which names every input and must agree.
        max_memory: Bytes of resident memory to stay under.
        threads: Worker threads; the machine's cores up to 4 by default.
        cluster: Address of a Dask scheduler, such as `tcp://node1:8786`, whose workers read the inputs and
            average. They see the same files under the same names as this machine. The output is the same.
        refresh: Re-estimate the BatchNorm statistics on these data before the average is written.
        dry_run: Plan, and write nothing.
        progress: Told how many bytes have been read.
        refresh_progress: Told how many rows of data have been used, as by `refresh_batchnorm`.

    Raises:
        UsageError: the request cannot be met as it was made.
        UnreadableError: an input is missing, damaged, or changed while it was read.
        MismatchError: the inputs do not fit together or hold values that cannot be averaged.
        SystemRefusalError: disk full, permission denied, input/output error; no cluster, or a lost one.
    """
    named = expand(inputs)
    target = Path(output) if output is not None else Path("swa" + _suffix(named[-1]))
    _check_not_an_input(target, named)
    paths = select(named, epochs=epochs, best=best, monitor=monitor, mode=mode, last=last, every=every)
    check_output(target, overwrite=overwrite)
    coefficients = _coefficients(method, paths, decay=decay, sigma_rel=sigma_rel, weights=weights)
    if cluster is not None and threads is not None:
        raise UsageError("--threads is for this machine alone; a cluster's workers say how many they have")
    with ExitStack() as stack:
        executor, work = stack.enter_context(_workers(cluster, threads, max_memory))
        checkpoints = resolve_dtypes(_open_all(paths, stack), dtype)
        if expect_sha256 is not None:
            check_digests(checkpoints, read_digests(Path(expect_sha256)), Path(expect_sha256))
        publication = stack.enter_context(Publication(target, overwrite=overwrite))
        template = _as_output(checkpoints[-1], target)
        if optimizer == "drop" and not dry_run:
            scratch = publication.scratch if cluster is None else _named(stack.enter_context(_draft(target)))
            template = template.without_optimizer(scratch)
        plan = make_plan(checkpoints, template, coefficients, drop_optimizer=optimizer == "drop")
        total = bytes_to_read(plan, verify)
        report = Report(target, plan, method, verify, total, work.memory)
        advance = partial(progress or _ignore, total)
        combiner = Combiner(
            plan, [coefficients], executor, work.block_bytes, work.threads, verify, advance, work.together
        )
        _check_shared_files(plan)
        _check_contents(plan, combiner.checksums)
        if refresh is not None:
            check_request(refresh, template)
            if refresh.model is None and template.kind != checkpoints[-1].kind:
                # The output holds weights alone; the newest input has the configuration.
                refresh = replace(refresh, model=str(checkpoints[-1].path))
        if dry_run:
            return report
        if refresh is None:
            template.write(combiner.image, lambda: describe(plan, method, combiner.checksums), publication)
        else:
            draft = stack.enter_context(_draft(target))
            with Publication(draft, overwrite=False) as unrefreshed:
                template.write(combiner.image, lambda: None, unrefreshed)
                unrefreshed.publish()
            values, statistics = refreshed_values(draft, refresh, draft.parent, refresh_progress)
            report = replace(report, refresh=statistics)
            averaged = stack.enter_context(closing(open_checkpoint(draft)))
            averaged.write(
                partial(with_values, averaged, values),
                lambda: describe(plan, method, combiner.checksums) | {"batchnorm": statistics.record()},
                publication,
            )
        _check_contents(plan, combiner.checksums)
        for checkpoint in checkpoints:
            checkpoint.check_unchanged()
        publication.publish()
    return report


@contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """Make a path for the average before its refresh, in a temporary folder beside the output."""
    with TemporaryDirectory(dir=output.parent, prefix=".swa-avg-") as folder:
        yield Path(folder) / output.name


def _ignore(total: int, count: int) -> None:
    pass


def _suffix(path: Path) -> str:
    for suffix in (".weights.h5", ".weights.json"):
        if path.name.endswith(suffix):
            return suffix
    return path.suffix


def _check_not_an_input(output: Path, named: Sequence[Path]) -> None:
    for path in named:
        if output.exists() and path.exists() and output.samefile(path):
            raise UsageError(
                f"the output {output} is also an input ({path}); name another output, or narrower inputs"
            )


def _coefficients(
    method: str,
    paths: Sequence[Path],
    *,
    decay: float | None,
    sigma_rel: float | None,
    weights: Sequence[float] | None,
) -> list[float]:
    """Return the method's coefficients; each method takes its own option, and no other's."""
    for option, value, owner in (
        ("--decay", decay, "ema"),
        ("--sigma-rel", sigma_rel, "power-ema"),
        ("--weights", weights, "weights"),
    ):
        if (value is not None) != (method == owner):
            raise UsageError(f"{option} and --method {owner} go together; the method is {method}")
    if decay is not None:
        return methods.ema(len(paths), decay)
    if sigma_rel is not None:
        return methods.power_ema(
            [float(epoch) for epoch in epochs_of(paths, "--method power-ema")], sigma_rel
        )
    if weights is not None:
        return methods.given(len(paths), weights)
    return methods.uniform(len(paths))


@dataclass(frozen=True)
class _Work:
    """How the work is cut."""

    block_bytes: int
    threads: int
    memory: int
    """Predicted peak of this process's resident memory, in bytes."""
    together: int = 0
    """Blocks a task, on a cluster."""


@contextmanager
def _workers(
    cluster: str | None, threads: int | None, max_memory: int | None
) -> Iterator[tuple[Executor, _Work]]:
    """Start threads, or connect to a cluster, and fit the work into the memory."""
    if cluster is None:
        work = _fit(max_memory, threads or min(4, os.cpu_count() or 1))
        with ThreadPoolExecutor(work.threads) as local:
            yield local, work
    else:
        from swa_avg.cluster import connected

        with connected(cluster) as remote:
            yield remote, _fit_cluster(max_memory, remote.threads)


def _fit(max_memory: int | None, threads: int) -> _Work:
    """Return the block size and the number of threads that stay under a limit of resident memory."""
    block_bytes = _BLOCK_BYTES
    while max_memory is not None and _PROCESS_MEMORY + block_memory(block_bytes, threads) > max_memory:
        if block_bytes > _SMALLEST_BLOCK:
            block_bytes //= 2
        elif threads > 1:
            threads -= 1
        else:
            _refuse_limit(max_memory, _PROCESS_MEMORY + block_memory(block_bytes, threads))
    return _Work(block_bytes, threads, _PROCESS_MEMORY + block_memory(block_bytes, threads))


def _fit_cluster(max_memory: int | None, threads: int) -> _Work:
    """Return how much is sent back at a time, such that all that is under way fits here.

    Blocks are those of one machine, and stay in a core's cache; a task is many of them, next to each other,
    since each task costs the scheduler about a millisecond.
    """
    threads *= 2  # that a task is done is noticed some time later: another one waits at the worker
    room = _CLUSTER_ROOM if max_memory is None else max_memory - _CLUSTER_MEMORY
    if room < sent_memory(_BLOCK_BYTES, 1):
        _refuse_limit(max_memory, _CLUSTER_MEMORY + sent_memory(_BLOCK_BYTES, 1))
    threads = min(threads, room // sent_memory(_BLOCK_BYTES, 1))
    together = min(_SENT_BYTES // _BLOCK_BYTES, room // sent_memory(_BLOCK_BYTES, threads))
    return _Work(
        _BLOCK_BYTES, threads, _CLUSTER_MEMORY + sent_memory(_BLOCK_BYTES * together, threads), together
    )


def _refuse_limit(limit: int | None, least: int) -> NoReturn:
    raise UsageError(f"--max-memory {limit} is too little; at least {least} bytes are needed")


def _named(draft: Path) -> Callable[[], IO[bytes]]:
    """Return what opens temporary files that other machines see: unlike unnamed ones, these have a name."""
    numbers = count()
    return lambda: draft.with_name(f"template_{next(numbers)}").open("w+b")


def _open_all(paths: Sequence[Path], stack: ExitStack) -> list[Checkpoint]:
    """Open every checkpoint, the newest first: the others are compared with its layout."""
    _allow_open_files(len(paths))
    newest = stack.enter_context(closing(open_checkpoint(paths[-1])))
    return [*(stack.enter_context(closing(open_checkpoint(path, newest))) for path in paths[:-1]), newest]


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files where many checkpoints need it: each stays open for the run."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 64
    if soft != resource.RLIM_INFINITY and soft < needed and (hard == resource.RLIM_INFINITY or soft < hard):
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _as_output(newest: Checkpoint, output: Path) -> Checkpoint:
    """Return the newest checkpoint as what the output's suffix asks for."""
    if isinstance(newest, ArchiveCheckpoint) and output.name.endswith(".weights.h5"):
        return newest.as_weights()
    if not output.name.endswith((*newest.suffixes, _suffix(newest.path))):
        expected = " or ".join(newest.suffixes)
        raise UsageError(
            f"the output {output.name} must end with {expected}, since the inputs are {newest.kind}"
        )
    return newest


def _check_shared_files(plan: Plan) -> None:
    """Raise MismatchError if two inputs hold one file between them: a shard that both maps name."""
    seen: dict[tuple[int, int], Checkpoint] = {}
    findings = []
    for checkpoint in plan.inputs:
        shared = []
        for image in checkpoint.images:
            first = seen.setdefault(image.identity(), checkpoint)
            if first is not checkpoint:
                problem = f"the same file as in {first.path.name}; name one of the two"
                shared.append(Finding(checkpoint.path, image.path.name, problem))
        if len(shared) < len(checkpoint.images):  # else they hold the same bytes, which is said once
            findings.extend(shared)
    if findings:
        raise MismatchError(findings)


def _check_contents(plan: Plan, checksums: Sequence[Sequence[int | None]]) -> None:
    """Raise MismatchError if two inputs hold the same bytes: one checkpoint, counted twice."""
    seen: dict[tuple[tuple[int, int], ...], Path] = {}
    findings = []
    for checkpoint, sums in zip(plan.inputs, checksums, strict=True):
        if None not in sums:
            key = tuple(
                (image.size, checksum or 0) for image, checksum in zip(checkpoint.images, sums, strict=True)
            )
            first = seen.setdefault(key, checkpoint.path)
            if first is not checkpoint.path:
                findings.append(
                    Finding(checkpoint.path, "weights", f"the same bytes as {first}; name one of the two")
                )
    if findings:
        raise MismatchError(findings)
