"""The whole story: select, open, plan, combine, publish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from swa_avg import methods
from swa_avg.batchnorm.checkpoint import Refresh, check_request, refreshed_values, with_values
from swa_avg.batchnorm.report import RefreshReport
from swa_avg.blocks import bytes_to_read
from swa_avg.combine import Combiner, block_memory
from swa_avg.digests import check_digests, read_digests
from swa_avg.errors import Finding, MismatchError, UsageError
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.formats.archive import ArchiveCheckpoint
from swa_avg.formats.base import Chunk
from swa_avg.plan import Plan, make_plan
from swa_avg.policy import batchnorm_layers, resolve_dtypes
from swa_avg.provenance import batchnorm_record, describe
from swa_avg.publish import Publication, check_output
from swa_avg.selection import epochs_of, expand, select

__all__ = [
    "Progress",
    "Refreshed",
    "Report",
    "as_output",
    "average",
    "check_contents",
    "check_shared_files",
    "coefficients_of",
    "fit_memory",
    "open_all",
    "output_path",
    "plan_output",
    "write_average",
    "write_draft",
]

Progress = Callable[[int, int], None]
"""Called with (bytes to read in all, bytes read since the last call)."""
Refreshed = Callable[[Path], tuple[Mapping[str, bytes], RefreshReport]]
"""For the draft of an average, tensor name -> new bytes of its BatchNorm statistics, and the report."""

_BLOCK_BYTES = 2**19  # with its sums, it stays in a core's cache
_SMALLEST_BLOCK = 2**16
_SMALLEST_BLOCK_OF_ROWS = 2**12
_MOST_FOR_ROWS = 2**26
_PROCESS_MEMORY = 64 * 2**20  # the interpreter with numpy and h5py, before anything is averaged
_CLUSTER_MEMORY = 96 * 2**20  # with Dask
_CLUSTER_ROOM = 2**30  # for what workers send back
_TASK_BYTES = 2**24  # of averages


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
    target = output_path(output, named)
    paths = select(named, epochs=epochs, best=best, monitor=monitor, mode=mode, last=last, every=every)
    check_output(target, overwrite=overwrite)
    coefficients = coefficients_of(method, paths, decay=decay, sigma_rel=sigma_rel, weights=weights)
    with ExitStack() as stack:
        crew = stack.enter_context(hired(cluster, threads, max_memory))
        checkpoints = resolve_dtypes(open_all(paths, stack), dtype)
        if expect_sha256 is not None:
            check_digests(checkpoints, read_digests(Path(expect_sha256)), Path(expect_sha256))
        publication = stack.enter_context(Publication(target, overwrite=overwrite))
        scratch = crew.scratch(publication, stack)
        plan = plan_output(checkpoints, coefficients, target, scratch, optimizer=optimizer, dry_run=dry_run)
        total = bytes_to_read(plan, verify)
        report = Report(target, plan, method, verify, total, crew.memory)
        combiner = crew.combiner(plan, [coefficients], verify, partial(progress or _ignore, total))
        check_shared_files(plan)
        check_contents(plan, combiner.checksums)
        refreshed = None
        if refresh is not None:
            refresh = _with_model(refresh, plan)
            check_request(refresh, plan.template)
            refreshed = partial(
                refreshed_values,
                refresh=refresh,
                progress=refresh_progress,
                executor=crew.executor if crew.together else None,
                at_once=crew.threads,
            )
        if dry_run:
            return report
        statistics = write_average(
            combiner, lambda: describe(plan, method, combiner.checksums, dtype), publication, refreshed
        )
        publication.publish()
    return replace(report, refresh=statistics)


def write_average(
    combiner: Combiner,
    record: Callable[[], dict[str, Any]],
    publication: Publication,
    refreshed: Refreshed | None = None,
) -> RefreshReport | None:
    """Write the average that a combiner of one row makes, ready to be published.

    With `refreshed`, a draft of it is written first, and its BatchNorm statistics are replaced by the values
    that this returns.
    """
    plan = combiner.plan
    statistics = None
    if refreshed is None:
        plan.template.write(combiner.image, record, publication)
    else:
        with draft_beside(publication.output) as draft:
            write_draft(draft, plan.template, combiner.image)
            values, statistics = refreshed(draft)
            batchnorm = {"batchnorm": batchnorm_record(statistics, values)}
            with closing(open_checkpoint(draft)) as averaged:
                averaged.write(
                    partial(with_values, averaged, values), lambda: record() | batchnorm, publication
                )
    check_contents(plan, combiner.checksums)
    for checkpoint in plan.inputs:
        checkpoint.check_unchanged()
    return statistics


@contextmanager
def draft_beside(output: Path) -> Iterator[Path]:
    """Make a path for a draft of the output, in a temporary folder beside it."""
    with TemporaryDirectory(dir=output.parent, prefix=".swa-avg-") as folder:
        yield Path(folder) / output.name


def write_draft(
    draft: Path, template: Checkpoint, image: Callable[[int, IO[bytes]], Iterator[Chunk]]
) -> None:
    """Write a copy of `template` with other images, and no word of how it was made."""
    with Publication(draft, overwrite=False) as publication:
        template.write(image, lambda: None, publication)
        publication.publish()


def _ignore(total: int, count: int) -> None:
    pass


def output_path(output: str | Path | None, named: Sequence[Path]) -> Path:
    """Return where the output goes, by default beside nothing, and never over an input."""
    target = Path(output) if output is not None else Path("swa" + _suffix(named[-1]))
    for path in named:
        if target.exists() and path.exists() and target.samefile(path):
            raise UsageError(
                f"the output {target} is also an input ({path}); name another output, or narrower inputs"
            )
    return target


def plan_output(
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    output: Path,
    scratch: Callable[[], IO[bytes]],
    *,
    optimizer: str,
    dry_run: bool = False,
) -> Plan:
    """Plan an average in the form that the output's suffix and `optimizer` ask for."""
    template = as_output(checkpoints[-1], output)
    if optimizer == "drop" and not dry_run:
        template = template.without_optimizer(scratch)
    return make_plan(checkpoints, template, coefficients, drop_optimizer=optimizer == "drop")


def _with_model(refresh: Refresh, plan: Plan) -> Refresh:
    """Name the newest input as the source of the model where the output holds its weights alone."""
    newest = plan.inputs[-1]
    if refresh.model is None and plan.template.kind != newest.kind:
        return replace(refresh, model=str(newest.path))
    return refresh


def _suffix(path: Path) -> str:
    for suffix in (".weights.h5", ".weights.json"):
        if path.name.endswith(suffix):
            return suffix
    return path.suffix


def coefficients_of(
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
class Crew:
    """Who works, threads here or a cluster, and how the work is cut for them."""

    executor: Executor
    block_bytes: int
    threads: int
    memory: int
    """Predicted peak of this process's resident memory, in bytes."""
    together: int = 0
    """Blocks a task, on a cluster."""
    sent: int = 0
    """Tasks under way at most while workers send averages back."""

    def combiner(
        self,
        plan: Plan,
        rows: Sequence[Sequence[float]],
        verify: bool,
        progress: Callable[[int], None] = lambda count: None,
    ) -> Combiner:
        return Combiner(
            plan,
            rows,
            self.executor,
            self.block_bytes,
            self.threads,
            verify,
            progress,
            self.together,
            self.sent,
        )

    def scratch(self, publication: Publication, stack: ExitStack) -> Callable[[], IO[bytes]]:
        """Return what opens temporary files; a cluster sees only those that have a name."""
        if not self.together:
            return publication.scratch
        numbers = count()
        draft = stack.enter_context(draft_beside(publication.output))
        return lambda: stack.enter_context(draft.with_name(f"scratch_{next(numbers)}").open("w+b"))


@contextmanager
def hired(cluster: str | None, threads: int | None, max_memory: int | None, rows: int = 1) -> Iterator[Crew]:
    """Start threads, or connect to the cluster at an address; `rows` averages are made at a time."""
    if cluster is None:
        block_bytes, threads = fit_memory(max_memory, threads, rows)
        memory = _PROCESS_MEMORY + block_memory(block_bytes, threads, rows)
        with ThreadPoolExecutor(threads) as local:
            yield Crew(local, block_bytes, threads, memory)
        return
    if threads is not None:
        raise UsageError("--threads is for this machine alone; a cluster's workers say how many they have")
    from swa_avg.cluster import connected

    with connected(cluster) as remote:
        yield fit_cluster(remote, remote.threads, max_memory, rows)


def fit_cluster(executor: Executor, threads: int, max_memory: int | None = None, rows: int = 1) -> Crew:
    """Return how the work is cut for a cluster of so many threads.

    Blocks are those of one machine, and stay in a core's cache; a task is many of them, next to each other,
    since each task costs the scheduler and this process milliseconds.
    """
    block = _BLOCK_BYTES * rows
    room = max(_CLUSTER_ROOM, block) if max_memory is None else max_memory - _CLUSTER_MEMORY
    if room < block:
        problem = f"--max-memory {max_memory} is too little"
        raise UsageError(f"{problem}; at least {_CLUSTER_MEMORY + block} bytes are needed")
    together = max(1, min(_TASK_BYTES // block, room // block))
    sent = room // (together * block)
    # That a task is done is noticed some time later: meanwhile, another one waits at the worker.
    crew = Crew(executor, _BLOCK_BYTES, 2 * threads, 0, together, sent)
    return replace(crew, memory=_CLUSTER_MEMORY + min(sent, 4 * threads) * together * block)


def fit_memory(max_memory: int | None, threads: int | None, rows: int = 1) -> tuple[int, int]:
    """Return the block size and the number of threads that stay under a limit of resident memory.

    Several rows of coefficients take smaller blocks, so that memory does not grow with their number.
    """
    block_bytes, threads = _BLOCK_BYTES, threads or min(4, os.cpu_count() or 1)
    limit = _PROCESS_MEMORY + _MOST_FOR_ROWS if max_memory is None else max_memory
    if max_memory is None and rows == 1:
        return block_bytes, threads
    least = _SMALLEST_BLOCK if rows == 1 else _SMALLEST_BLOCK_OF_ROWS
    while (needed := _PROCESS_MEMORY + block_memory(block_bytes, threads, rows)) > limit:
        if block_bytes > least:
            block_bytes //= 2
        elif threads > 1:
            threads -= 1
        else:
            what = "too many candidates" if max_memory is None else f"--max-memory {max_memory} is too little"
            raise UsageError(f"{what}; at least {needed} bytes are needed")
    return block_bytes, threads


def open_all(paths: Sequence[Path], stack: ExitStack) -> list[Checkpoint]:
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


def as_output(newest: Checkpoint, output: Path) -> Checkpoint:
    """Return the newest checkpoint as what the output's suffix asks for."""
    if isinstance(newest, ArchiveCheckpoint) and output.name.endswith(".weights.h5"):
        return newest.as_weights()
    if not output.name.endswith((*newest.suffixes, _suffix(newest.path))):
        expected = " or ".join(newest.suffixes)
        raise UsageError(
            f"the output {output.name} must end with {expected}, since the inputs are {newest.kind}"
        )
    return newest


def check_shared_files(plan: Plan) -> None:
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


def check_contents(plan: Plan, checksums: Sequence[Sequence[int | None]]) -> None:
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
