"""The whole story: select, open, plan, combine, publish."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

from swa_avg.batchnorm.checkpoint import Refresh, check_request, refreshed_values, with_values
from swa_avg.combine.blocks import bytes_to_read
from swa_avg.combine.budget import REMOTE_THREADS, allow_open_files
from swa_avg.combine.combiner import Combiner
from swa_avg.combine.workers import hired
from swa_avg.errors import Finding, MismatchError, SystemRefusalError, UsageError, escape
from swa_avg.files.publication import Publication, check_output, publication_at
from swa_avg.files.remote import as_path, kept_at_hand, on_this_machine, remote
from swa_avg.formats import Checkpoint, open_checkpoint, suffix_of
from swa_avg.formats.base import Stream
from swa_avg.inputs.digests import check_digests, read_digests
from swa_avg.inputs.selection import epochs_of, expand, select
from swa_avg.planning import methods
from swa_avg.planning.plan import Plan, make_plan
from swa_avg.planning.policy import batchnorm_layers, is_model_optimizer, resolve_dtypes
from swa_avg.planning.record import batchnorm_record, describe

if TYPE_CHECKING:
    from swa_avg.batchnorm.report import RefreshReport

__all__ = [
    "Progress",
    "Refreshed",
    "Report",
    "as_output",
    "average",
    "check_contents",
    "check_shared_files",
    "coefficients_of",
    "open_all",
    "output_path",
    "plan_output",
    "write_average",
    "write_draft",
]

Progress = Callable[[int, int], None]
"""Called with (bytes to read in all, bytes read since the last call)."""
Refreshed = Callable[[Path], "tuple[Mapping[str, bytes], RefreshReport]"]
"""For the draft of an average, tensor name -> new bytes of its BatchNorm statistics, and the report."""


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
        alone = sum(map(bool, self.plan.coefficients)) == 1
        return [] if alone else batchnorm_layers(self.plan.inputs[-1])


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
    verify: bool | None = None,
    expect_sha256: str | Path | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    refresh: Refresh | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    refresh_progress: Callable[[int | None, int], None] | None = None,
    published: Callable[[], None] | None = None,
) -> Report:
    """Average Keras checkpoints into one, without Keras.

    Floating-point weights (float16, bfloat16, float32, float64; any shape) are summed in float64 in training
    order and rounded once to their stored dtype, ties to even. Everything else is the newest checkpoint's:
    see the table "What is averaged" in the README. Source: Izmailov et al. 2018, "Averaging Weights Leads to
    Wider Optima and Better Generalization" (arXiv:1803.05407).

    Args:
        inputs: Names, URLs (`s3://bucket/ckpt.keras`) and shell patterns of checkpoints of one format. Their
            training order is the natural order of the names (`ckpt_2` before `ckpt_10`), in whichever order
            they are given; of several folders, that of the epochs, if no two share one. A folder
            stands for those that its `checkpoints.json` names, in its order; without any input, the current
            folder does.
        output: The path or URL to which the average is written; `swa` + the inputs' suffix by default. From
            `.keras` inputs it may end with `.weights.h5`.
        epochs: Use only these epochs: `A:B[:STEP]`, both ends included; by the index beside the checkpoints,
            else by the last whole number in each name.
        best: Of these, the best so many by a metric in the index.
        monitor: That metric; the one that the index monitors by default.
        mode: `min` or `max`, for a metric that the index does not monitor and whose name does not tell.
        last: Of these, the last so many.
        every: Of these, every so many-th, counted back from the newest.
        method: `uniform`; `ema` with `decay`; `power-ema` with `sigma_rel`; `weights` with `weights`.
        decay: Share in [0, 1) that each step of `ema` keeps.
        sigma_rel: Width of the `power-ema` profile relative to the length of training, in (0, 0.2887).
        weights: One coefficient a checkpoint, in training order, with sum 1.
        optimizer: `keep` copies the newest checkpoint's optimizer state, `drop` leaves it out.
        dtype: `bfloat16`, where untagged 2-byte tensors of weights-only files hold that.
        overwrite: Replace an existing output.
        verify: Read every byte and check it against the CRC-32 that archives store; by default, unless an
            input is a URL.
        expect_sha256: A list as `sha256sum` writes it, which names every input and must agree.
        max_memory: Bytes of resident memory to stay under.
        threads: Worker threads; the machine's cores up to 4 by default, 10 where an input is a URL.
        cluster: Address of a Dask scheduler, such as `tcp://node1:8786`, whose workers read the inputs and
            average. They see the same files under the same names as this machine. The output is the same.
        refresh: Re-estimate the BatchNorm statistics on these data before the average is written.
        dry_run: Plan, and write nothing.
        progress: Told how many bytes have been read.
        refresh_progress: Told how many rows of data have been used, as by `refresh_batchnorm`.
        published: Called right after the output got its name, before a SIGINT or SIGTERM that came meanwhile
            takes effect.

    Raises:
        UsageError: the request cannot be met as it was made.
        UnreadableError: an input is missing, damaged, or changed while it was read.
        MismatchError: the inputs do not fit together or hold values that cannot be averaged.
        SystemRefusalError: disk full, permission denied, input/output error; a service refused; no cluster,
            or one that was lost.
    """
    named = expand(inputs)
    target = output_path(output, named)
    paths = select(named, epochs=epochs, best=best, monitor=monitor, mode=mode, last=last, every=every)
    check_output(target, overwrite=overwrite)
    coefficients = coefficients_of(method, paths, decay=decay, sigma_rel=sigma_rel, weights=weights)
    far = any(remote(path) is not None for path in paths)
    verify = not far if verify is None else verify
    with ExitStack() as stack:
        crew = stack.enter_context(hired(cluster, threads, max_memory, far=far))
        if not dry_run and cluster is None:  # a copy on this machine is none on the workers'
            paths[-1] = stack.enter_context(kept_at_hand(paths[-1]))  # the template is read whole
        checkpoints = resolve_dtypes(open_all(paths, stack), dtype)
        if expect_sha256 is not None:
            check_digests(checkpoints, read_digests(as_path(expect_sha256)), as_path(expect_sha256))
        publication = stack.enter_context(publication_at(target, overwrite=overwrite))
        scratch = crew.scratch(publication, stack)
        plan = plan_output(
            checkpoints, coefficients, publication.output, scratch, optimizer=optimizer, dry_run=dry_run
        )
        total = bytes_to_read(plan, verify)
        report = Report(target, plan, method, verify, total, crew.memory)
        combiner = crew.combiner(plan, [coefficients], verify, progress and partial(progress, total))
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
        publication.publish(published)
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
        plan.template.write(combiner.stream, record, publication)
    else:
        with draft_beside(publication.output) as draft:
            write_draft(draft, plan.template, combiner.stream)
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


def write_draft(draft: Path, template: Checkpoint, stream: Stream) -> None:
    """Write a copy of `template` with other values, and no word of how it was made."""
    with Publication(draft, overwrite=False) as publication:
        template.write(stream, lambda: None, publication)
        publication.publish()


def output_path(output: str | Path | None, named: Sequence[Path]) -> Path:
    """Return where the output goes, in the current folder by default, and never over an input."""
    target = as_path(output) if output is not None else Path("swa" + suffix_of(named[-1]))
    if remote(target) is None:
        try:
            target.lstat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:  # such as a name that is too long
            raise SystemRefusalError(error.errno, str(error.strerror), str(target)) from error
        except ValueError as error:
            raise UsageError(f"the output {escape(target)}: {error}") from error
    for path in named:
        if _same_file(target, path):
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
    if optimizer not in ("keep", "drop"):
        raise UsageError(f"optimizer is keep or drop, not {optimizer!r}")
    template = checkpoints[-1]
    if all(checkpoint.kind == template.kind for checkpoint in checkpoints):  # else the plan names the others
        template = as_output(template, output)
        if optimizer == "drop" and not dry_run and any(map(is_model_optimizer, template.tensors.values())):
            template = template.without_optimizer(scratch)
    return make_plan(checkpoints, template, coefficients, drop_optimizer=optimizer == "drop")


def _with_model(refresh: Refresh, plan: Plan) -> Refresh:
    """Name the newest input as the source of the model where the output holds its weights alone."""
    newest = plan.inputs[-1]
    if refresh.model is None and plan.template.kind != newest.kind:
        return replace(refresh, model=str(on_this_machine(newest.path)))
    return refresh


def _same_file(one: Path, other: Path) -> bool:
    urls = remote(one), remote(other)
    if urls[0] is not None and urls[1] is not None:
        return urls[0].identity() == urls[1].identity()
    return urls == (None, None) and one.exists() and other.exists() and one.samefile(other)


def coefficients_of(
    method: str,
    paths: Sequence[Path],
    *,
    decay: float | None,
    sigma_rel: float | None,
    weights: Sequence[float] | None,
) -> list[float]:
    """Return the method's coefficients; each method takes its own option, and no other's."""
    if method not in methods.METHODS:
        raise UsageError(f"the method is {' or '.join(methods.METHODS)}, not {method!r}")
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


def open_all(paths: Sequence[Path], stack: ExitStack) -> list[Checkpoint]:
    """Open every checkpoint, the newest first: the others are compared with its layout."""
    allow_open_files(len(paths))
    newest = stack.enter_context(closing(open_checkpoint(paths[-1])))

    def opened(path: Path) -> Checkpoint:
        return stack.enter_context(closing(open_checkpoint(path, newest)))

    if all(remote(path) is None for path in paths[:-1]):
        return [*map(opened, paths[:-1]), newest]
    with ThreadPoolExecutor(REMOTE_THREADS) as executor:  # each waits for a dozen answers
        return [*executor.map(opened, paths[:-1]), newest]


def as_output(newest: Checkpoint, output: Path) -> Checkpoint:
    """Return the newest checkpoint in the form that the output's suffix asks for."""
    weights = newest.as_weights()
    if weights is not None and output.name.endswith(weights.suffixes):
        return weights
    suffixes = dict.fromkeys([*newest.suffixes, *(weights.suffixes if weights else ())])
    if not output.name.endswith((*suffixes, suffix_of(newest.path))):
        expected = " or ".join(suffixes)
        raise UsageError(
            f"the output {output.name} must end with {expected}, since the inputs are {newest.kind}"
        )
    return newest


def check_shared_files(plan: Plan) -> None:
    """Raise MismatchError if two inputs hold one file between them: a shard that both maps name."""
    seen: dict[Hashable, Checkpoint] = {}
    findings = []
    for checkpoint in plan.inputs:
        shared = []
        for shard in checkpoint.shards:
            first = seen.setdefault(shard.identity(), checkpoint)
            if first is not checkpoint:
                problem = f"the same file as in {first.path.name}; name one of the two"
                shared.append(Finding(checkpoint.path, shard.path.name, problem))
        if len(shared) < len(checkpoint.shards):  # else they hold the same bytes, which is said once
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
                (shard.size, checksum or 0) for shard, checksum in zip(checkpoint.shards, sums, strict=True)
            )
            first = seen.setdefault(key, checkpoint.path)
            if first is not checkpoint.path:
                findings.append(
                    Finding(checkpoint.path, "weights", f"the same bytes as {first}; name one of the two")
                )
    if findings:
        raise MismatchError(findings)
