"""Score averages and single checkpoints on validation data, and write the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from swa_avg import candidates
from swa_avg.batchnorm.checkpoint import Loading, Refresh, check_request
from swa_avg.batchnorm.report import RefreshReport
from swa_avg.candidates import Candidate
from swa_avg.crew import Crew, hired
from swa_avg.errors import Finding, MismatchError, NoImprovementError, UsageError
from swa_avg.evaluation import Scorer, Scoring, Validation
from swa_avg.policy import batchnorm_layers, resolve_dtypes
from swa_avg.provenance import describe
from swa_avg.publish import Publication, check_output, publication_at
from swa_avg.remote import kept_at_hand, remote
from swa_avg.run import (
    open_all,
    output_path,
    plan_output,
    write_average,
)
from swa_avg.selection import epochs_of, expand, select
from swa_avg.trials import POINTS, Scored, Trials, greedy_soup, line, rank

__all__ = ["SweepReport", "candidate_rows", "sweep"]

_PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class SweepReport:
    """What `sweep` found."""

    output: Path
    checkpoints: tuple[Path, ...]
    """In training order."""
    monitor: str
    """The metric that decides."""
    mode: str
    singles: tuple[Scored, ...]
    """The checkpoints alone, in training order."""
    averages: tuple[Scored, ...]
    winner: Scored
    """What was written: of equals, the average of the most checkpoints."""
    validation: str
    """The validation data."""
    rows: int
    """Of the validation data."""
    digest: str
    """BLAKE2b-256 of these rows."""
    batchnorm_layers: tuple[str, ...] = ()
    """BatchNorm layers whose statistics are averages of statistics, for want of a refresh."""
    path: tuple[Mapping[str, float], ...] = ()
    """Metrics at points of equal distance from the last checkpoint to the best average."""

    @property
    def best_single(self) -> Scored:
        """Of equals, the newest."""
        return min(reversed(self.singles), key=lambda scored: scored.badness)

    @property
    def best_average(self) -> Scored | None:
        averages = [scored for scored in reversed(self.averages) if scored.candidate.is_average]
        return min(averages, key=rank, default=None)

    @property
    def improved(self) -> bool:
        """Whether an average is better than every single checkpoint."""
        average = self.best_average
        return average is not None and average.badness < self.best_single.badness


def sweep(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    validation: Validation,
    refresh: Refresh | None = None,
    loading: Loading | None = None,
    tried: Sequence[str] = (),
    epochs: str | None = None,
    last: int | None = None,
    every: int | None = None,
    optimizer: str = "keep",
    dtype: str | None = None,
    overwrite: bool = False,
    verify: bool | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    require_improvement: bool = False,
    path: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    score_progress: Callable[[int, int], None] | None = None,
    published: Callable[[], None] | None = None,
) -> SweepReport:
    """Score every checkpoint and averages of them, and write the best.

    One pass over the inputs makes all averages but the greedy soup, into a temporary file beside the output;
    each step of the greedy soup is a pass over what it averages. Every candidate is treated alike, single
    checkpoints too: with `refresh`, each has its BatchNorm statistics re-estimated before it is scored. The
    model is built once. What is written is what `average` writes with these coefficients and this refresh.

    Args:
        inputs: As for `average`, and likewise `output`, `epochs`, `last`, `every`, `optimizer`, `dtype`,
            `overwrite`, `verify`, `max_memory`, `threads`, `cluster`, `progress` and `published`.
        validation: Data and metric. Choose by data that you did not train on, and do not report the score
            that it was chosen by.
        refresh: Training data to re-estimate BatchNorm statistics on.
        loading: How to load the model; `refresh`, where there is one, says it itself.
        tried: Averages, as `candidates.parse` reads them; by default, `candidates.default_candidates`.
        require_improvement: Write nothing if no average is better than the best single checkpoint.
        path: Also score 11 points on the line from the last checkpoint to the best average, each refreshed
            likewise, and draw them into this `.png`, `.svg` or `.pdf`; needs matplotlib.
        score_progress: Called with (candidates to score, candidates scored since the last call).

    Raises:
        NoImprovementError: there is no improvement, and it was required.
        UsageError, UnreadableError, MismatchError, SystemRefusalError: as for `average`.
    """
    named = expand(inputs)
    for data in (validation.data, refresh and refresh.data):
        if isinstance(data, Iterator):
            raise UsageError(
                "a sweep reads its data anew for each candidate; pass arrays, a file or MODULE:FUNCTION, "
                "not an iterator"
            )
    target = output_path(output, named)
    paths = select(named, epochs=epochs, last=last, every=every)
    if len(paths) < 2:
        raise UsageError("a sweep compares averages of at least 2 checkpoints; found 1")
    check_output(target, overwrite=overwrite)
    draw = _drawing(Path(path), overwrite=overwrite) if path is not None else None
    rows, with_greedy = candidate_rows(paths, tried)
    far = any(remote(path) is not None for path in paths)
    verify = not far if verify is None else verify
    most_rows = max(len(rows), POINTS if draw else 1)
    with ExitStack() as stack:
        crew = stack.enter_context(hired(cluster, threads, max_memory, most_rows, far=far))
        if cluster is None:  # a copy on this machine is none on the workers'
            paths[-1] = stack.enter_context(kept_at_hand(paths[-1]))  # the template of most drafts
        checkpoints = resolve_dtypes(open_all(paths, stack), dtype)
        publication = stack.enter_context(publication_at(target, overwrite=overwrite))
        beside = publication.output.parent
        folder = Path(stack.enter_context(TemporaryDirectory(dir=beside, prefix=".swa-avg-")))
        loading = refresh or loading or Loading()
        if not isinstance(loading.model, str | Path | None):
            raise UsageError(
                "a sweep gives the model other weights for each candidate; name a file or MODULE:FUNCTION "
                "that makes one, not a live model"
            )
        check_request(loading, checkpoints[-1], "a sweep", compiled=validation.metric is None)
        steps = len(rows) + (len(paths) - 1 if with_greedy else 0) + (POINTS if draw else 0)
        trials = Trials(
            checkpoints,
            publication,
            crew,
            folder,
            *_scoring(Scorer(validation, loading, refresh), crew),
            score_progress and partial(score_progress, steps),
            drop_optimizer=optimizer == "drop",
        )
        scored = trials.scored(rows, verify=verify, progress=progress)
        singles, averages = scored[: len(paths)], scored[len(paths) :]
        if with_greedy:
            averages = (*averages, greedy_soup(trials, singles))
        report = _report(target, trials, singles, averages, refresh)
        if require_improvement and not report.improved:
            raise NoImprovementError(_no_improvement(report), report)
        values = trials.best_values  # of the winner: the points of the line are scored after it
        if draw and report.best_average is not None:
            report = replace(report, path=line(trials, report.best_average.candidate))
        scratch = crew.scratch(publication, stack)
        _write(report, values, trials, scratch, optimizer=optimizer, dtype=dtype, verify=verify)
        for checkpoint in trials.checkpoints:  # those that lost have decided, too
            checkpoint.check_unchanged()
        publication.publish(published)
    if path is not None and draw and report.path:
        with Publication(Path(path), overwrite=overwrite) as picture:
            picture.create(Path(path).name).write(draw(report))
            picture.publish()
    return report


def _scoring(scorer: Scorer, crew: Crew) -> tuple[Callable[[Path], Future[Scoring]], int]:
    """Return what has a draft scored, here or by a worker of a cluster, and how many drafts at a time."""
    if crew.together:
        distant = scorer.elsewhere()
        return lambda draft: crew.executor.submit(distant.score, draft), crew.threads

    def here(draft: Path) -> Future[Scoring]:
        done: Future[Scoring] = Future()
        done.set_result(scorer.score(draft))
        return done

    return here, 1


def _drawing(output: Path, *, overwrite: bool) -> Callable[[SweepReport], bytes]:
    """Return what draws a report's line, once it is sure that the picture can be written."""
    if output.suffix not in _PICTURES:
        raise UsageError(f"--path {output}; expected a name that ends with {' or '.join(_PICTURES)}")
    check_output(output, overwrite=overwrite)
    try:
        from swa_avg.pages.sweep import plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise UsageError("--path needs matplotlib; pip install 'swa-avg[plot]'") from None
    return partial(plot, suffix=output.suffix)


def candidate_rows(paths: Sequence[Path], tried: Sequence[str]) -> tuple[list[Candidate], bool]:
    """Return the candidates that are known beforehand, single checkpoints first, and whether a soup is asked
    for."""
    count = len(paths)
    times: list[float] | None
    try:
        times = [float(epoch) for epoch in epochs_of(paths, "--candidates power-ema")]
        candidates.parse("power-ema:0.1", count, times)
    except UsageError:
        if any(text.startswith("power-ema") for text in tried):
            raise
        times = None
    rows = [
        Candidate(path.name, tuple(float(other == number) for other in range(count)))
        for number, path in enumerate(paths)
    ]
    with_greedy = False
    for text in dict.fromkeys(tried or candidates.default_candidates(count, times)):
        candidate = candidates.parse(text, count, times)
        with_greedy = with_greedy or candidate is None
        if candidate is not None:
            rows.append(candidate)
    return rows, with_greedy


def _report(
    target: Path,
    trials: Trials,
    singles: Sequence[Scored],
    averages: Sequence[Scored],
    refresh: Refresh | None,
) -> SweepReport:
    assert trials.best is not None
    assert trials.decides is not None
    assert trials.last is not None
    monitor, mode = trials.decides
    if trials.best.badness == math.inf:
        raise MismatchError(
            [Finding(target, monitor, "is not finite for any candidate; nothing was written")]
        )
    newest = trials.checkpoints[-1]
    return SweepReport(
        output=target,
        checkpoints=tuple(checkpoint.path for checkpoint in trials.checkpoints),
        monitor=monitor,
        mode=mode,
        singles=tuple(singles),
        averages=tuple(averages),
        winner=trials.best,
        validation=trials.last.source,
        rows=trials.last.rows,
        digest=trials.last.digest,
        batchnorm_layers=tuple(batchnorm_layers(newest)) if refresh is None else (),
    )


def _no_improvement(report: SweepReport) -> str:
    single, average = report.best_single, report.best_average
    found = "there is no average"
    if average is not None:
        found = f"{average.candidate.name} has {average.metrics[report.monitor]:.6g}"
    return (
        f"no average beats the best single checkpoint: {single.candidate.name} has {report.monitor} "
        f"{single.metrics[report.monitor]:.6g}, {found}; nothing was written"
    )


def _write(
    report: SweepReport,
    values: Mapping[str, bytes] | None,
    trials: Trials,
    scratch: Callable[[], IO[bytes]],
    *,
    optimizer: str,
    dtype: str | None,
    verify: bool,
) -> None:
    """Write the winner as `average` does, with the statistics that it was scored with."""
    winner = report.winner
    inputs = [trials.checkpoints[number] for number in winner.candidate.used]
    coefficients = [winner.candidate.coefficients[number] for number in winner.candidate.used]
    plan = plan_output(inputs, coefficients, trials.publication.output, scratch, optimizer=optimizer)
    combiner = trials.crew.combiner(plan, [coefficients], verify)
    method = winner.candidate.name if winner.candidate.is_average else "single"

    def refreshed(draft: Path) -> tuple[Mapping[str, bytes], RefreshReport]:
        assert values is not None
        assert winner.refresh is not None
        return values, winner.refresh

    write_average(
        combiner,
        lambda: describe(plan, method, combiner.checksums, dtype) | {"sweep": _record(report)},
        trials.publication,
        refreshed if values is not None else None,
    )


def _record(report: SweepReport) -> dict[str, Any]:
    """Return what the output says of the candidates that it was chosen from."""
    best = report.best_single
    return {
        "monitor": report.monitor,
        "mode": report.mode,
        "data": report.validation,
        "digest": report.digest,
        "rows": report.rows,
        "candidates": {
            scored.candidate.name: _rounded(scored.metrics[report.monitor])
            for scored in (*report.singles, *report.averages)
        },
        "best_single": best.candidate.name,
        "improved": report.improved,
    }


def _rounded(value: float) -> float | None:
    """Return a score as JSON can hold it, to the digits that do not change from run to run."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
