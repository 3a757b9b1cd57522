"""The whole story of an average: select, open, plan, combine, refresh, publish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swa_avg.combine import Combiner, open_workers
from swa_avg.combine.drafts import write_draft
from swa_avg.errors import escape, warn
from swa_avg.files.location import Location, any_remote, location
from swa_avg.files.publication import check_output, publication_at
from swa_avg.files.temporary import temporary_folder
from swa_avg.formats import Tensor, is_model_alone, open_checkpoint
from swa_avg.formats.base import Stream
from swa_avg.inputs.digests import check_digests, read_digests
from swa_avg.inputs.listing import Listing, list_checkpoints
from swa_avg.inputs.opening import check_averages, check_contents, check_shared_files, opened
from swa_avg.inputs.related import Relation, check_related
from swa_avg.inputs.selection import Selection, select
from swa_avg.planning.methods import Method
from swa_avg.planning.output import output_path, plan_output
from swa_avg.planning.plan import Plan, coefficients_of
from swa_avg.planning.policy import (
    FLOATS,
    batchnorm_layers,
    batchnorm_warning,
    constants_warning,
    other_weights,
)
from swa_avg.planning.record import describe
from swa_avg.text import Progress, counted

if TYPE_CHECKING:
    from swa_avg.batchnorm import RefreshReport

__all__ = ["Report", "average"]


@dataclass(frozen=True, repr=False)
class Report:
    """What `average` did, or with `dry_run` would do; its text is one line."""

    output: Location
    """Where the average is, or would be."""
    listing: Listing
    """The inputs, and what is known of each without opening it."""
    plan: Plan
    """The opened inputs, the coefficient of each, and what is done with each tensor."""
    method: str
    """As it is written in the output's record, such as `ema:0.9`."""
    verify: bool
    """Whether every byte of every input is read and checked."""
    relation: Relation
    """Whether the inputs that count are related."""
    bytes_to_read: int
    """In all, of the inputs, but for the sample that tells whether they are related."""
    peak_memory: int
    """Predicted peak of the process's resident memory, in bytes, without a refresh."""
    refresh: RefreshReport | None = None
    """What the refresh of BatchNorm statistics did."""
    written: bool = False
    """Whether the output was written: not with `dry_run`."""

    @property
    def treatments(self) -> dict[str, tuple[Tensor, ...]]:
        """What is done with which of the newest checkpoint's tensors."""
        return {
            "averaged": self.plan.averaged,
            "equal in all, copied": self.plan.compared,
            "copied from the newest": self.plan.copied,
            "left out": self.plan.dropped,
        }

    @cached_property
    def batchnorm_layers(self) -> list[str]:
        """BatchNorm layers whose statistics are averages of statistics, not those of the averaged weights."""
        alone = sum(map(bool, self.plan.coefficients)) == 1
        return [] if alone else batchnorm_layers(self.plan.inputs[-1])

    @property
    def other_weights(self) -> str | None:
        """What to know of an optimizer that keeps an average of its own."""
        return other_weights(self.plan.inputs[-1].optimizer_config)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should look at; `average` warns of each."""
        return tuple(self.warnings_naming("refresh=DATA"))

    def warnings_naming(self, refresh: str) -> Iterator[str]:
        """Yield the warnings; `refresh` is how a refresh is asked for."""
        if self.relation.problem is not None:
            yield self.relation.problem
        for checkpoint in self.plan.inputs:
            if checkpoint.is_average:
                yield f"{checkpoint.path} is itself an average that swa-avg wrote"
        if self.other_weights is not None:
            yield self.other_weights
        constants = [tensor.name for tensor in self.plan.compared if tensor.dtype in FLOATS]
        if constants:
            yield constants_warning(constants)
        if self.refresh is not None:
            yield from self.refresh.warnings
        elif self.batchnorm_layers:
            yield batchnorm_warning(self.batchnorm_layers, refresh)

    def __str__(self) -> str:
        verb = "wrote" if self.written else "would write"
        count = counted(len(self.plan.inputs), "checkpoint")
        return f"{verb} {self.output}: the {self.method} average of {count}"

    def __repr__(self) -> str:
        return f"<Report: {escape(self)}>"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        inputs = zip(self.plan.inputs, self.plan.coefficients, strict=True)
        ranking = self.listing.ranking
        return {
            "output": str(self.output),
            "written": self.written,
            "method": self.method,
            "format": self.plan.inputs[-1].kind,
            "verify": self.verify,
            "inputs": [{"path": str(input.path), "coefficient": share} for input, share in inputs],
            "tensors": {title: [tensor.name for tensor in group] for title, group in self.treatments.items()},
            "relation": self.relation.as_json(),
            "other_weights": self.other_weights,
            "batchnorm_layers": self.batchnorm_layers,
            "refresh": None if self.refresh is None else self.refresh.as_json(),
            "bytes_to_read": self.bytes_to_read,
            "peak_memory": self.peak_memory,
            **({} if ranking is None else {"best": ranking.as_json(self.listing.files)}),
        }


def average(
    inputs: str | Path | Sequence[str | Path] = (),
    output: str | Path | None = None,
    *,
    epochs: str | int | range | None = None,
    best: int | None = None,
    monitor: str | None = None,
    mode: str | None = None,
    metrics: str | Path | None = None,
    last: int | None = None,
    every: int | None = None,
    method: str | Sequence[float] = "uniform",
    optimizer: str = "keep",
    dtype: str | None = None,
    allow_unrelated: bool = False,
    overwrite: bool = False,
    verify: bool | None = None,
    expect_sha256: str | Path | None = None,
    max_memory: int | str | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    refresh: Any = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    refresh_progress: Progress | None = None,
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
            else as the names tell. A number or a `range`, whose end is not included, does as well.
        best: Of these, keep this many: those with the best values of a metric.
        monitor: That metric; by default the one that the index monitors, else the only one that is known.
        mode: `min` or `max`, for a metric that the index does not monitor and whose name does not tell.
        metrics: A log as `CSVLogger` writes it, whose metrics go before all others. Without it, they are
            those of the index, of the only such log beside the checkpoints, and of the names, in this order.
        last: Of these, keep this many: the last ones.
        every: Of these, keep every nth, counted back from the newest.
        method: How much each checkpoint counts: `uniform`, `ema:DECAY`, `power-ema:SIGMA_REL`,
            `half-life:FRACTION`, `decay:linear`, `decay:cosine`, `decay:1-sqrt` or `weights:W,W,...`, as
            `swa_avg.planning.methods` explains them; or a sequence of weights, one per checkpoint in
            training order.
        optimizer: `keep` copies the newest checkpoint's optimizer state, `drop` leaves it out.
        dtype: `bfloat16`, where untagged 2-byte tensors of weights-only files hold that.
        allow_unrelated: Average even what a sample of the kernels shows to be of unrelated runs, such as
            folds or seeds, with a warning.
        overwrite: Replace an existing output.
        verify: Read every byte and check it against the CRC-32 that archives store; by default, unless an
            input is a URL.
        expect_sha256: A list as `sha256sum` writes it, which names every input and must agree.
        max_memory: Bytes of resident memory to stay under; or as text, such as `200M`.
        threads: Worker threads; the machine's cores up to 4 by default, 10 where an input is a URL.
        cluster: Address of a Dask scheduler, such as `tcp://node1:8786`, whose workers read the inputs and
            average. They see the same files under the same names as this machine. The output is the same.
        refresh: Re-estimate the BatchNorm statistics on these training data before the average is written: a
            `.npz` or `.npy`, a folder of `tf.data.Dataset.save`, `MODULE:FUNCTION`, arrays or batches, as
            `refresh_batchnorm` takes them; or a `Refresh`, which also says how.
        dry_run: Plan, and write nothing.
        progress: Told how many bytes have been read.
        refresh_progress: Told how many rows of data have been used, as by `refresh_batchnorm`.

    Returns:
        What was done. What is printed on the command line as a note or warning is given as a `SwaAvgWarning`.

    Raises:
        UsageError: the request cannot be met as it was made.
        UnreadableError: an input is missing, damaged, or changed while it was read.
        MismatchError: the inputs do not fit together, are not related, or hold values that cannot be
            averaged.
        SystemRefusalError: disk full, permission denied, input/output error; a service refused; no cluster,
            or one that was lost.

    Example:
        >>> average("run", "swa.keras", last=10, refresh="train.npz")
        <Report: wrote swa.keras: the uniform average of 10 checkpoints>
    """
    if refresh is not None:  # else nothing of it is imported
        from swa_avg.batchnorm import Refresh

        refresh = Refresh.of(refresh)
    chosen_method = Method.parse(method)
    wanted = Selection(epochs, best, monitor, mode, metrics, last, every)
    named = list_checkpoints(inputs)
    target = output_path(output, named.paths)
    listing = select(named, wanted)
    paths = listing.paths
    if not dry_run:
        check_output(target, overwrite=overwrite, is_folder_of_ours=is_model_alone)
    coefficients = coefficients_of(chosen_method, listing)
    far = any_remote(paths)
    verify = not far if verify is None else verify
    # A copy of the newest on this machine is none on the workers'.
    cache_newest = not dry_run and cluster is None
    with (
        open_workers(cluster, threads, max_memory, remote=far) as workers,
        publication_at(target, overwrite=overwrite) as publication,
    ):
        with opened(paths, dtype, cache_newest=cache_newest) as checkpoints, ExitStack() as stack:
            if expect_sha256 is not None:
                expected = location(expect_sha256)
                check_digests(checkpoints, read_digests(expected), expected)
            scratch = stack.enter_context(workers.scratch(publication))
            plan = plan_output(
                checkpoints, coefficients, publication.output, scratch, optimizer=optimizer, dry_run=dry_run
            )
            combiner = Combiner(plan, [coefficients], workers, verify, progress)
            relation = _checked(combiner, allow_unrelated=allow_unrelated)
            if refresh is not None:
                from swa_avg.batchnorm.loading import check_request

                refresh = refresh.for_output(plan.template, plan.inputs[-1], dry_run=dry_run)
                check_request(refresh, plan.template)
            report = Report(
                target,
                listing,
                plan,
                str(chosen_method),
                verify,
                relation,
                combiner.bytes_to_read,
                combiner.peak_memory,
            )
            if dry_run:
                warn([*listing.notes, *report.warnings])
                return report
            stream: Stream = combiner.stream
            further: dict[str, Any] = {}  # that the output's record says
            if refresh is not None:
                from swa_avg.batchnorm.checkpoint import refreshed_statistics

                path = stack.enter_context(temporary_folder(publication.output)) / publication.output.name
                write_draft(path, plan.template, combiner.stream)
                draft = stack.enter_context(closing(open_checkpoint(path)))
                statistics = refreshed_statistics(draft, refresh, refresh_progress, workers.processes)
                stream = statistics.over(draft.stream, draft.tensors)
                further = {"batchnorm": statistics.record()}
                report = replace(report, refresh=statistics.report)

            def record() -> dict[str, Any]:
                checksums = combiner.checksums
                return describe(combiner.settled, report.method, checksums, relation.related, dtype) | further

            plan.template.write(stream, record, publication)
            check_contents(checkpoints, combiner.checksums)
        publication.publish()
    report = replace(report, plan=combiner.settled, written=True)
    warn([*listing.notes, *report.warnings])
    return report


def _checked(combiner: Combiner, *, allow_unrelated: bool) -> Relation:
    """Check that the inputs are distinct, and that those which count are related, and each counts once."""
    plan = combiner.plan
    check_shared_files(plan.inputs)
    check_contents(plan.inputs, combiner.checksums)
    used = [input for input, share in zip(plan.inputs, plan.coefficients, strict=True) if share]
    check_averages(used)
    return check_related(used, plan.averaged, allow=allow_unrelated)
