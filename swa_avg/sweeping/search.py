"""Score averages and single checkpoints on validation data, and write the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from swa_avg.batchnorm import Loading, Refresh
from swa_avg.batchnorm.loading import check_request
from swa_avg.batchnorm.statistics import RefreshedStatistics
from swa_avg.combine import Combiner, Workers, open_workers
from swa_avg.errors import Finding, MismatchError, NoImprovementError, UsageError, warn
from swa_avg.files.location import Location, any_remote
from swa_avg.files.publication import check_output, publication_at, publish_file
from swa_avg.files.temporary import temporary_folder
from swa_avg.formats import is_model_alone
from swa_avg.formats.base import Stream
from swa_avg.inputs.listing import Listing, list_checkpoints
from swa_avg.inputs.opening import check_averages, check_contents, opened
from swa_avg.inputs.ranking import ranked, with_log
from swa_avg.inputs.related import Relation, check_related, relation_of
from swa_avg.inputs.selection import Selection, select
from swa_avg.inspection.movement import Movement, movement_of
from swa_avg.inspection.outputs import PAGE, PICTURES, checked_outputs
from swa_avg.planning.output import output_path, plan_output
from swa_avg.planning.policy import batchnorm_layers, other_weights
from swa_avg.planning.record import describe
from swa_avg.sweeping import candidates
from swa_avg.sweeping.candidates import Candidate
from swa_avg.sweeping.report import Scored, SweepReport
from swa_avg.sweeping.scoring import Scorer, Scoring, Validation
from swa_avg.sweeping.trials import POINTS, Trials, greedy_soup, line
from swa_avg.text import Progress, finite_or_none, short_names

__all__ = ["candidate_rows", "sweep"]


def sweep(
    inputs: str | Path | Sequence[str | Path] = (),
    output: str | Path | None = None,
    *,
    validation: Any,
    refresh: Any = None,
    loading: Loading | None = None,
    tried: str | Sequence[str] = (),
    metrics: str | Path | None = None,
    epochs: str | int | range | None = None,
    last: int | None = None,
    every: int | None = None,
    optimizer: str = "keep",
    dtype: str | None = None,
    allow_unrelated: bool = False,
    overwrite: bool = False,
    verify: bool | None = None,
    max_memory: int | str | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    require_improvement: bool = False,
    path: str | Path | None = None,
    report: str | Path | None = None,
    progress: Progress | None = None,
    score_progress: Progress | None = None,
) -> SweepReport:
    """Score every checkpoint and averages of them, and write the best.

    One pass over the inputs makes all averages but the greedy soup, into a temporary file beside the output;
    each step of the greedy soup is a pass over what it averages. Every candidate is treated alike, single
    checkpoints too: with `refresh`, each has its BatchNorm statistics re-estimated before it is scored. The
    model is built once. What is written is what `average` writes with these coefficients and this refresh.

    Args:
        inputs: As for `average`, and likewise `output`, `epochs`, `last`, `every`, `optimizer`, `dtype`,
            `allow_unrelated`, `overwrite`, `verify`, `max_memory`, `threads`, `cluster` and `progress`.
        validation: Data with targets, such as arrays (x, y), batches of them or a `.npz`; or a `Validation`,
            which also says by what metric they are scored. Choose by data that you did not train on, and do
            not report the score that it was chosen by.
        refresh: Training data to re-estimate BatchNorm statistics on, or a `Refresh`, as for `average`.
        loading: How to load the model; where `refresh` is a `Refresh`, that says it itself.
        tried: Averages: methods as for `average`, `last:K` for the mean of the last K, `best:K` for that of
            the best K, as `average` ranks them by the metrics of their training, and `greedy` for the greedy
            soup; by default, those of `candidates.default_candidates`.
        metrics: For `best:K`, the log that holds these metrics, as for `average`.
        require_improvement: Write nothing if no average is better than the best single checkpoint.
        path: Also score 11 points on the line from the last checkpoint to the best average, each refreshed
            likewise, and draw them into this `.png`, `.svg` or `.pdf`; needs matplotlib.
        report: A `.html` to write a page into, which begins with a verdict; needs matplotlib.
        score_progress: Called with (candidates to score, candidates scored since the last call).

    Returns:
        Every candidate with its metrics. What is printed on the command line as a note or warning is given as
        a `SwaAvgWarning`.

    Raises:
        NoImprovementError: there is no improvement, and it was required.
        UsageError, UnreadableError, MismatchError, SystemRefusalError: as for `average`.

    Example:
        >>> sweep("run", "best.keras", validation=(x_val, y_val), refresh=x_train)
        <SweepReport: wrote best.keras: last:8, accuracy 0.951 on 5000 rows; it beats the best single ...>
    """
    validation = Validation.of(validation)
    refresh = Refresh.of(refresh, loading)
    tried = [tried] if isinstance(tried, str) else tried
    named = list_checkpoints(inputs)
    if any(map(candidates.needs_ranking, tried)):
        named = with_log(named, metrics)
    elif metrics is not None:
        raise UsageError(f"metrics goes with a candidate {candidates.BEST}")
    for data in (validation.data, refresh and refresh.data):
        if isinstance(data, Iterator):
            raise UsageError(
                "a sweep reads its data anew for each candidate; pass arrays, a file or MODULE:FUNCTION, "
                "not an iterator"
            )
    target = output_path(output, named.paths)
    listing = select(named, Selection(epochs, last=last, every=every))
    paths = listing.paths
    if len(paths) < 2:
        raise UsageError("a sweep compares averages of at least 2 checkpoints; found 1")
    check_output(target, overwrite=overwrite, is_folder_of_ours=is_model_alone)
    outputs = checked_outputs(
        {"path": (path, PICTURES), "report": (report, PAGE)}, _renderer, overwrite=overwrite
    )
    listing, order = _ranked(listing, tried, validation)
    rows, with_greedy = candidate_rows(listing, tried, order)
    far = any_remote(paths)
    verify = not far if verify is None else verify
    most_rows = max(len(rows), POINTS if path is not None else 1)
    loading = refresh or loading or Loading()
    if not isinstance(loading.model, str | Path | None):
        raise UsageError(
            "a sweep gives the model other weights for each candidate; name a file or MODULE:FUNCTION "
            "that makes one, not a live model"
        )
    with (
        open_workers(cluster, threads, max_memory, most_rows, remote=far) as workers,
        publication_at(target, overwrite=overwrite) as publication,
    ):
        # The newest is the template of most drafts; a copy on this machine is none on the workers'.
        with opened(paths, dtype, cache_newest=cluster is None) as checkpoints, ExitStack() as stack:
            check_request(loading, checkpoints[-1], "a sweep", compiled=validation.metric is None)
            steps = len(rows) + (len(paths) - 1 if with_greedy else 0) + (POINTS if path is not None else 0)
            trials = Trials(
                checkpoints,
                publication,
                workers,
                stack.enter_context(temporary_folder(publication.output)),
                _scoring(Scorer(validation, loading, refresh), workers),
                score_progress and partial(score_progress, steps),
                drop_optimizer=optimizer == "drop",
            )
            check_averages(checkpoints)
            relation = check_related(checkpoints, trials.combiner(rows).plan.averaged, allow=allow_unrelated)
            scored = trials.scored(rows, verify=verify, progress=progress)
            singles, averages = scored[: len(paths)], scored[len(paths) :]
            if with_greedy:
                averages = (*averages, greedy_soup(trials, singles))
            found = _report(target, trials, singles, averages, refresh, listing, relation)
            if require_improvement and not found.improved:
                raise NoImprovementError(_no_improvement(found), found)
            statistics = trials.best_statistics  # of the winner: the points of the line are scored after it
            if path is not None and found.best_average is not None:
                found = replace(found, path=line(trials, found.best_average.candidate))
            scratch = stack.enter_context(workers.scratch(publication))
            _write(found, statistics, trials, scratch, optimizer=optimizer, dtype=dtype, verify=verify)
        publication.publish()
    found = replace(found, written=True)
    for picture, render in outputs.items():
        if found.path or picture.suffix in PAGE:
            publish_file(picture, render(found), overwrite=overwrite)
    warn([*found.notes, *found.warnings])
    return found


def _scoring(scorer: Scorer, workers: Workers) -> Callable[[Iterable[Path]], Iterator[tuple[Path, Scoring]]]:
    """Return what has drafts scored, each with one model a process: one after the other, or on a cluster."""
    if workers.processes is None:
        return lambda drafts: ((draft, scorer.score(draft)) for draft in drafts)
    return partial(workers.processes.run, scorer.portable().score)


def _renderer(argument: str, suffix: str) -> Callable[[SweepReport], bytes]:
    from swa_avg.sweeping.page import page, plot

    return page if argument == "report" else partial(plot, suffix=suffix)


def candidate_rows(
    listing: Listing, tried: Sequence[str], order: Sequence[int] = ()
) -> tuple[list[Candidate], bool]:
    """Return the candidates that are known beforehand, single checkpoints first, and whether a soup is asked
    for; `order` holds the numbers of the checkpoints, the best first."""
    paths = listing.paths
    count = len(paths)
    listing.check_order("candidates")
    needed = next((text for text in tried if candidates.needs_times(text)), None)
    times: list[float] | None = None
    try:
        times = [float(epoch) for epoch in listing.epochs(f"candidate {needed!r}")]
    except UsageError:
        if needed is not None:
            raise
    singles = [
        Candidate(name, tuple(float(other == number) for other in range(count)))
        for number, name in enumerate(short_names(paths))
    ]
    texts = tried or candidates.default_candidates(count, times)
    averages = [candidates.parse(text, count, times, order) for text in texts]
    known = dict.fromkeys(average for average in averages if average is not None)
    return [*singles, *known], None in averages


def _ranked(listing: Listing, tried: Sequence[str], validation: Validation) -> tuple[Listing, Sequence[int]]:
    """Return the numbers of the checkpoints, the best first, and the listing with a note of what ranks them;
    none where no candidate asks for it.

    That is the namesake of the metric that decides, as Keras logs it of validation data, where one is named.
    """
    if not any(map(candidates.needs_ranking, tried)):
        return listing, ()
    listing.check_indices()
    monitor, mode = validation.monitor, validation.mode
    if monitor is None and validation.metric is not None:
        mode = None  # which is that of another metric
    if monitor is not None and any(f"val_{monitor}" in listed.metrics for listed in listing.files):
        monitor = f"val_{monitor}"
    ranking, order = ranked(listing, monitor, mode)
    sources = " and ".join(dict.fromkeys(listing.files[row].sources[ranking.monitor] for row in order))
    note = f"{candidates.BEST} goes by {ranking.monitor} ({ranking.mode}) from {sources}"
    return replace(listing, notes=(*listing.notes, note)), order


def _report(
    target: Location,
    trials: Trials,
    singles: Sequence[Scored],
    averages: Sequence[Scored],
    refresh: Refresh | None,
    listing: Listing,
    relation: Relation,
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
    by_epochs = any(candidates.needs_times(average.candidate.name) for average in averages)
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
        epochs=tuple(listing.epochs("candidates")) if by_epochs else (),
        notes=listing.notes,
        relation=relation,
        movement=_movement(relation, listing),
        other_weights=other_weights(newest.optimizer_config),
    )


def _movement(relation: Relation, listing: Listing) -> Movement | None:
    if not relation.related:
        return None
    return movement_of(relation.squared, [listed.learning_rate for listed in listing.files])


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
    statistics: RefreshedStatistics | None,
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
    combiner = Combiner(plan, [coefficients], trials.workers, verify)
    related = relation_of(inputs, plan.averaged).related
    method = winner.candidate.name if winner.candidate.is_average else "single"
    stream: Stream = combiner.stream
    further = {"sweep": _record(report)}
    if statistics is not None:
        stream = statistics.over(stream, plan.template.tensors)
        further["batchnorm"] = statistics.record()
    plan.template.write(
        stream,
        lambda: describe(combiner.settled, method, combiner.checksums, related, dtype) | further,
        trials.publication,
    )
    check_contents(inputs, combiner.checksums)


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
    return finite_or_none(float(f"{value:.6g}"))
