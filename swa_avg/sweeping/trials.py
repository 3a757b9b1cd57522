"""The candidates of a sweep made into drafts, one at a time, and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

from swa_avg.batchnorm.statistics import RefreshedStatistics
from swa_avg.combine import Combiner, Spill, Workers
from swa_avg.combine.drafts import write_draft
from swa_avg.files.publication import Publication
from swa_avg.formats import Checkpoint
from swa_avg.formats.base import Stream
from swa_avg.inputs.metrics import badness
from swa_avg.inputs.opening import check_contents, check_shared_files
from swa_avg.planning.plan import Plan, make_plan
from swa_avg.sweeping import candidates
from swa_avg.sweeping.candidates import Candidate
from swa_avg.sweeping.report import Scored, rank
from swa_avg.sweeping.scoring import Scoring
from swa_avg.text import Progress

__all__ = ["POINTS", "Trials", "greedy_soup", "line"]

POINTS = 11
"""Of the line from the last checkpoint to the average."""


@dataclass
class Trials:
    """Writes candidates as drafts, and has each scored by a live model."""

    checkpoints: Sequence[Checkpoint]
    publication: Publication
    workers: Workers
    folder: Path
    """Temporary, beside the output."""
    score_drafts: Callable[[Iterable[Path]], Iterator[tuple[Path, Scoring]]]
    """Has drafts scored in order, here or on a cluster, and asks for one when there is a model for it."""
    progress: Callable[[int], None] | None
    drop_optimizer: bool = False
    """Whether the output will have no optimizer state, so that damage to it does not matter."""
    last: Scoring | None = None
    decides: tuple[str, str] | None = None
    """The metric that decides and its mode, once the first score is known."""
    best: Scored | None = None
    best_statistics: RefreshedStatistics | None = None
    """The re-estimated statistics of the best; of the others, none are kept."""

    def combiner(
        self,
        rows: Sequence[Candidate],
        *,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> Combiner:
        """Return what averages the checkpoints that any row uses; the newest of them is the template."""
        used = sorted({number for row in rows for number in row.used})
        inputs = [self.checkpoints[number] for number in used]
        matrix = [[row.coefficients[number] for number in used] for row in rows]
        plan = make_plan(inputs, inputs[-1], matrix[0], drop_optimizer=self.drop_optimizer)
        return Combiner(plan, matrix, self.workers, verify, progress)

    def scored(
        self,
        rows: Sequence[Candidate],
        *,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Scored, ...]:
        """Average all rows in one pass over the checkpoints, then score one after the other."""
        combiner = self.combiner(rows, verify=verify, progress=progress)
        plan = combiner.plan
        check_shared_files(plan.inputs)
        check_contents(plan.inputs, combiner.checksums)
        with closing(self.publication.scratch()) as file:
            spill = Spill(combiner, file)
            check_contents(plan.inputs, combiner.checksums)
            streams = [partial(spill.stream, number) for number in range(len(rows))]
            return tuple(self._score(rows, plan, streams))

    def score(self, candidate: Candidate, plan: Plan, stream: Stream) -> Scored:
        """Write a draft, have it scored, and remember what it takes to write it if it is the best so far."""
        (scored,) = self._score([candidate], plan, [stream])
        return scored

    def _score(self, rows: Sequence[Candidate], plan: Plan, streams: Iterable[Stream]) -> Iterator[Scored]:
        drafts = (self._draft(plan, stream) for stream in streams)
        for row, (draft, scoring) in zip(rows, self.score_drafts(drafts), strict=True):
            rmtree(draft.parent)
            yield self._scored(row, scoring)

    def _draft(self, plan: Plan, stream: Stream) -> Path:
        """Write a draft in a folder of its own."""
        draft = Path(mkdtemp(dir=self.folder)).absolute() / f"draft{plan.template.suffixes[0]}"
        write_draft(draft, plan.template, stream)
        return draft

    def _scored(self, candidate: Candidate, scoring: Scoring) -> Scored:
        self.last = scoring
        score = self.last.score
        report = score.statistics.report if score.statistics is not None else None
        self.decides = self.decides or self.last.decides
        monitor, mode = self.decides
        scored = Scored(candidate, score.metrics, report, badness(score.metrics[monitor], mode))
        if self.best is None or rank(scored) <= rank(self.best):
            self.best, self.best_statistics = scored, score.statistics
        if self.progress is not None:
            self.progress(1)
        return scored


def greedy_soup(trials: Trials, singles: Sequence[Scored]) -> Scored:
    """Return the greedy soup; each step reads what it averages once."""
    soups: dict[tuple[int, ...], Scored] = {}

    def badness_of(accepted: tuple[int, ...]) -> float:
        candidate = candidates.mean_of(accepted, len(singles))
        combiner = trials.combiner([candidate])
        soups[accepted] = trials.score(candidate, combiner.plan, combiner.stream)
        return soups[accepted].badness

    accepted = candidates.greedy([single.badness for single in singles], badness_of)
    if len(accepted) == 1:
        return replace(singles[accepted[0]], candidate=candidates.mean_of(accepted, len(singles)))
    return soups[accepted]


def line(trials: Trials, average: Candidate) -> tuple[Mapping[str, float], ...]:
    """Score points on the line from the last checkpoint, `at` 0, to an average, `at` 1."""
    points = []
    for step in range(POINTS):
        share = step / (POINTS - 1)
        mixed = [share * coefficient for coefficient in average.coefficients]
        mixed[-1] += 1.0 - share
        points.append((share, Candidate(f"line:{share}", tuple(mixed))))
    scored = trials.scored([candidate for _, candidate in points])
    return tuple({"at": share, **point.metrics} for (share, _), point in zip(points, scored, strict=True))
