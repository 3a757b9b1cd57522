"""The whole story of `verify`: open, derive again, compare, and do a refresh of BatchNorm again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from swa_avg.combine import Combiner, open_workers
from swa_avg.combine.drafts import write_draft
from swa_avg.errors import Finding, SystemRefusalError, UsageError
from swa_avg.files.location import Location, any_remote, cached_locally, folder_itself, location
from swa_avg.files.temporary import temporary_folder
from swa_avg.formats import Checkpoint, open_checkpoint
from swa_avg.inputs.listing import list_again
from swa_avg.inputs.opening import opened, resolve_dtypes
from swa_avg.planning.derivation import ContradictionError, derive_method
from swa_avg.planning.output import as_output
from swa_avg.planning.plan import make_plan
from swa_avg.planning.policy import batchnorm_statistics
from swa_avg.planning.record import Record, read_record
from swa_avg.text import Progress, counted, first_few
from swa_avg.verification.comparison import differences, holds_the_same
from swa_avg.verification.origins import check_inputs, check_not_the_output, input_paths
from swa_avg.verification.result import Verification

if TYPE_CHECKING:
    from swa_avg.batchnorm import Refresh
    from swa_avg.batchnorm.repetition import Repetition

__all__ = ["verify"]

_LEAST_SHARE = 0.01


def verify(
    output: str | Path,
    inputs: str | Path | Sequence[str | Path] = (),
    *,
    refresh: Any = None,
    max_memory: int | str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    refresh_progress: Progress | None = None,
) -> Verification:
    """Derive an output of swa-avg again from the inputs that it names, in bounded memory, without Keras.

    Every tensor is compared, copied ones included, and so is the configuration. The output's record is a
    claim: the coefficients are derived again from its method and the inputs. What a refresh of BatchNorm
    replaced is derived again if its data are given, with Keras. Without them it cannot be; then its CRC-32 is
    compared with the one in the record.

    Args:
        output: What `average` or `sweep` wrote.
        inputs: Folder of the inputs, or folders; the output's own by default.
        refresh: The data that BatchNorm was refreshed on, or a `Refresh` as it was then. Its estimator, batch
            size, number of samples and seed are those that the record names; how the model is loaded, which
            arrays go where and what is applied to them is as given here, since nothing that a record names
            is run. The statistics are the same bits on the machine, and with the versions, that wrote them;
            up to 0.001 standard deviations is taken for rounding.
        max_memory: Bytes of resident memory to stay under; or as text, such as `200M`.
        threads: Worker threads; the machine's cores up to 4 by default, 10 where a file is named by a URL.
        progress: Told how many bytes have been read.
        refresh_progress: Told how many rows of data have been used.

    Returns:
        What was compared, and what differs.

    Raises:
        UnreadableError: the output cannot be read or does not say how it was made, or an input is missing,
            or is the output itself.
        MismatchError: inputs have changed since the output was made, or are the same; every one is named.
        UsageError: there was no refresh, or the model cannot be loaded.
        SystemRefusalError: the system could not read.

    Example:
        >>> verify("swa.keras", "run").equal
        True
    """
    target = folder_itself(location(output))
    with ExitStack() as stack:
        found = stack.enter_context(closing(open_checkpoint(stack.enter_context(cached_locally(target)))))
        record = read_record(found)
        again = None if refresh is None else _as_recorded(refresh, record, target)
        (found,) = resolve_dtypes([found], record.dtype)
        named = [inputs] if isinstance(inputs, str | Path) else inputs
        paths = input_paths(record, target, list(dict.fromkeys(map(location, named))) or [target.parent])
        far = any_remote([target, *paths])
        workers = stack.enter_context(open_workers(None, threads, max_memory, remote=far))
        checkpoints = stack.enter_context(opened(paths, record.dtype, cache_newest=again is not None))
        check_not_the_output(checkpoints, record, found)
        check_inputs(checkpoints, record)
        template = as_output(checkpoints[-1], target)
        if record.optimizer == "drop":
            template = template.without_optimizer(_scratch(stack))
        coefficients = [entry.coefficient for entry in record.inputs]
        plan = make_plan(checkpoints, template, coefficients, drop_optimizer=record.optimizer == "drop")
        # The inputs' bytes have just been read and found to be unchanged.
        combiner = Combiner(plan, [coefficients], workers, verify=False, progress=progress)
        statistics = batchnorm_statistics(checkpoints[-1])
        excused = {name for name in record.values if name in statistics and name in found.tensors}
        method, contradictions = _derived(found, record, paths)
        findings = [*contradictions, *differences(found, combiner, record, statistics, excused)]
        names = [tensor.name for tensor in combiner.settled.averaged if tensor.name not in excused]
        copies: list[int] = []
        repetition = None
        if not findings:
            copies = [n for n in record.used if holds_the_same(checkpoints[n], found, names)]
            findings.extend(_copy_findings(found, record, copies))
            if again is not None:
                repetition = _repeated(again, found, combiner, refresh_progress)
                findings.extend(_repetition_findings(found, record, repetition, excused))
        found.check_unchanged()
    return Verification(
        target,
        tuple(paths),
        record,
        method,
        tuple(entry.name for entry in record.inputs if None in entry.crc32),
        tuple(checkpoint.path.name for checkpoint in checkpoints if checkpoint.is_average),
        averaged=len(names),
        copied=len(plan.copied) + len(combiner.settled.compared),
        copies=tuple(copies),
        refreshed=tuple(name for name in record.values if name in excused),
        findings=tuple(findings),
        data=repetition.report.source if repetition else None,
        off=max(repetition.off.values(), default=0.0) if repetition else 0.0,
    )


def _scratch(stack: ExitStack) -> Callable[[], IO[bytes]]:
    def scratch() -> IO[bytes]:
        with _room():
            return stack.enter_context(tempfile.TemporaryFile())

    return scratch


@contextmanager
def _room() -> Iterator[None]:
    """Name the folder for temporary files where the system refuses one."""
    try:
        yield
    except SystemRefusalError:
        raise
    except OSError as error:
        raise SystemRefusalError(error.errno, str(error.strerror), tempfile.gettempdir()) from error


def _derived(
    found: Checkpoint, record: Record, paths: Sequence[Location]
) -> tuple[str | None, list[Finding]]:
    """Return the method that gives the record's coefficients, if it is known, and what contradicts it.

    The order of inputs from several folders was that of their paths then, which is not recorded.
    """
    listings = []
    if len({path.parent for path in paths}) == 1:
        known = list_again(paths)
        listings = [listing for listing in known if listing.paths == paths]
        if not listings:
            order = first_few([path.name for path in known[0].paths])
            return None, [Finding(found.path, "inputs", f"not in training order, which is {order}")]
    try:
        return derive_method(record, listings), []
    except ContradictionError as error:
        return None, [Finding(found.path, "coefficients", str(error))]


def _as_recorded(refresh: Any, record: Record, output: Location) -> Refresh:
    """Return the refresh that an output's record tells of, on these data."""
    from swa_avg.batchnorm import Refresh

    recorded = record.refresh
    if recorded is None or not recorded.samples:  # 0 where the model has no BatchNorm
        raise UsageError(f"{output} does not say that BatchNorm was refreshed; verify it without data")
    wanted = Refresh.of(refresh)
    assert wanted is not None
    return replace(
        wanted,
        estimator=recorded.estimator,
        batch_size=recorded.batch_size,
        samples=recorded.samples,
        seed=recorded.seed,
    )


def _repeated(
    refresh: Refresh, found: Checkpoint, combiner: Combiner, progress: Progress | None
) -> Repetition:
    """Refresh the average again, from a draft where the system keeps temporary files."""
    from swa_avg.batchnorm.loading import check_request
    from swa_avg.batchnorm.repetition import repeat_refresh

    template = combiner.plan.template
    refresh = refresh.for_output(template, combiner.plan.inputs[-1])
    check_request(refresh, template)
    with _room(), temporary_folder() as folder:
        path = folder / found.path.name
        write_draft(path, template, replace(combiner, progress=None).stream)
        with closing(open_checkpoint(path)) as draft:
            return repeat_refresh(draft, found, refresh, progress)


def _repetition_findings(
    found: Checkpoint, record: Record, repetition: Repetition, excused: Set[str]
) -> Iterator[Finding]:
    """Yield one finding for all layers whose statistics are not those that were derived, and what is none."""
    for name in sorted(excused - repetition.names):
        yield Finding(found.path, name, "no statistic that a refresh of this model replaces")
    for layer, off in list(repetition.differing.items())[:1]:
        same = record.refresh is not None and repetition.report.digest == record.refresh.digest
        problem = (
            f"its statistics are {off:.3g} standard deviations off what {repetition.report.source} gives, "
            f"the most of {counted(len(repetition.differing), 'BatchNorm layer')}; the rows are "
            f"{'those' if same else 'not those'} that the record names"
        )
        yield Finding(found.path, layer, problem)


def _copy_findings(found: Checkpoint, record: Record, copies: Sequence[int]) -> Iterator[Finding]:
    """Yield the inputs that hold the output's weights and count for so much that others hardly do.

    Where others count, they give the output without these inputs, too, to rounding divided by their share.
    """
    share = abs(1.0 - math.fsum(record.inputs[number].coefficient for number in copies))
    if copies and len(copies) < len(record.used) and share < _LEAST_SHARE:
        for number in copies:
            problem = f"holds the weights of the output, and other inputs count for {share:.1g} of it alone"
            yield Finding(found.path, record.inputs[number].name, problem)
