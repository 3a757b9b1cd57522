"""The candidates of a sweep made into drafts, one at a time, and scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from swa_avg import candidates
from swa_avg.batchnorm.report import RefreshReport
from swa_avg.blocks import bytes_to_read
from swa_avg.candidates import Candidate, badness
from swa_avg.combine import Combiner
from swa_avg.crew import Crew
from swa_avg.evaluation import Scoring
from swa_avg.formats import Checkpoint
from swa_avg.formats.base import Chunk
from swa_avg.plan import Plan, make_plan
from swa_avg.publish import Publication
from swa_avg.run import check_contents, check_shared_files, write_draft
from swa_avg.spill import Spill

__all__ = ["POINTS", "Scored", "Trials", "greedy_soup", "line", "rank"]

POINTS = 11
"""Of the line from the last checkpoint to the average."""

_Underway = tuple[Candidate, "TemporaryDirectory[str]", "Future[Scoring]"]
"""A candidate, the folder of its draft, and the work."""

Image = Callable[[int, IO[bytes]], Iterator[Chunk]]


@dataclass(frozen=True)
class Scored:
    """A candidate and what it achieved."""

    candidate: Candidate
    metrics: Mapping[str, float]
    refresh: RefreshReport | None
    badness: float
    """The deciding metric such that less is better, infinite for NaN."""


def rank(scored: Scored) -> tuple[float, int]:
    """Return a sort key: the better first, and of equals the average of the most checkpoints."""
    return scored.badness, -len(scored.candidate.used)


@dataclass
class Trials:
    """Writes candidates as drafts, up to `at_once` at a time, and has each scored by a live model."""

    checkpoints: Sequence[Checkpoint]
    publication: Publication
    crew: Crew
    folder: Path
    """Temporary, beside the output."""
    submit: Callable[[Path], Future[Scoring]]
    """Has a draft scored, here or on a cluster."""
    at_once: int
    """Drafts on disk."""
    progress: Callable[[int], None] | None
    drop_optimizer: bool = False
    """Whether the output will be without the optimizer's state, so that it need not be in order."""
    last: Scoring | None = None
    decides: tuple[str, str] | None = None
    """The metric that decides and its mode, once the first score is known."""
    best: Scored | None = None
    best_values: Mapping[str, bytes] | None = None
    """The refreshed statistics of the best; of the others, none are kept."""

    def combiner(
        self,
        rows: Sequence[Candidate],
        *,
        verify: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Combiner:
        """Return what averages the checkpoints that any row uses; the newest of them is the template."""
        used = sorted({number for row in rows for number in row.used})
        inputs = [self.checkpoints[number] for number in used]
        matrix = [[row.coefficients[number] for number in used] for row in rows]
        plan = make_plan(inputs, inputs[-1], matrix[0], drop_optimizer=self.drop_optimizer)
        advance = progress and partial(progress, bytes_to_read(plan, verify))
        return self.crew.combiner(plan, matrix, verify, advance)

    def scored(
        self,
        rows: Sequence[Candidate],
        *,
        verify: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Scored, ...]:
        """Average all rows in one pass over the checkpoints, then score one after the other."""
        combiner = self.combiner(rows, verify=verify, progress=progress)
        plan = combiner.plan
        check_shared_files(plan)
        check_contents(plan, combiner.checksums)
        with closing(self.publication.scratch()) as file:
            spill = Spill(combiner, file)
            check_contents(plan, combiner.checksums)
            with ExitStack() as stack:
                under_way: deque[_Underway] = deque()
                results = []
                for number, row in enumerate(rows):
                    if len(under_way) == self.at_once:
                        results.append(self._finish(under_way.popleft()))
                    under_way.append(self._start(row, plan, partial(spill.image, number), stack))
                return (*results, *map(self._finish, under_way))

    def score(self, candidate: Candidate, plan: Plan, image: Image) -> Scored:
        """Write a draft, have it scored, and remember what it takes to write it if it is the best so far."""
        with ExitStack() as stack:
            return self._finish(self._start(candidate, plan, image, stack))

    def _start(self, candidate: Candidate, plan: Plan, image: Image, stack: ExitStack) -> _Underway:
        folder = TemporaryDirectory(dir=self.folder)
        stack.callback(folder.cleanup)
        draft = Path(folder.name) / f"draft{plan.template.suffixes[0]}"
        write_draft(draft, plan.template, image)
        work = self.submit(draft.absolute())
        stack.callback(work.cancel)
        return candidate, folder, work

    def _finish(self, under_way: _Underway) -> Scored:
        candidate, folder, work = under_way
        self.last = work.result()
        folder.cleanup()
        score = self.last.score
        self.decides = self.decides or self.last.decides
        monitor, mode = self.decides
        scored = Scored(candidate, score.metrics, score.refresh, badness(score.metrics[monitor], mode))
        if self.best is None or rank(scored) <= rank(self.best):
            self.best, self.best_values = scored, score.values
        if self.progress is not None:
            self.progress(1)
        return scored


def greedy_soup(trials: Trials, singles: Sequence[Scored]) -> Scored:
    """Return the greedy soup; each step reads what it averages once."""
    soups: dict[tuple[int, ...], Scored] = {}

    def badness_of(accepted: tuple[int, ...]) -> float:
        candidate = candidates.soup_of(accepted, len(singles))
        combiner = trials.combiner([candidate])
        soups[accepted] = trials.score(candidate, combiner.plan, combiner.image)
        return soups[accepted].badness

    accepted = candidates.greedy([single.badness for single in singles], badness_of)
    if len(accepted) == 1:
        return replace(singles[accepted[0]], candidate=candidates.soup_of(accepted, len(singles)))
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
