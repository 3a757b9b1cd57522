"""What `inspect` says of the prospects of an average."""

from __future__ import annotations

import numpy as np
import pytest

from swa_avg.inspection.advice import LEVEL, advice, pace_of

BY_HEART = [0.1817, 0.1696, 0.1586, 0.1491, 0.14, 0.1325, 0.1258, 0.1196, 0.1144]
"""Steps of a run that had learnt its data by heart and crept on, at turns of 15 degrees."""
ROUND = [4.44, 3.41, 3.3, 3.85, 4.27, 3.66, 3.92, 3.5, 3.8]
"""Steps of a run that goes round a place, at turns of 100 degrees: as in the README's demo."""


def test_the_pace_is_that_of_the_later_half_of_the_steps_relative_to_the_earlier() -> None:
    assert pace_of(np.array([3.0, 5.0, 1.0, 3.0])) == 0.5
    assert pace_of(np.array([3.0, 5.0, 100.0, 1.0, 3.0])) == 0.5


@pytest.mark.parametrize(
    ("steps", "start"),
    [
        (ROUND, "they do not shrink (the later half is 0.99 times as long as the earlier), and "),
        (BY_HEART, "they shrink (the later half is 0.75 times as long as the earlier), and "),
    ],
)
def test_a_run_that_goes_round_is_told_from_one_that_comes_to_rest(steps: list[float], start: str) -> None:
    assert advice(pace_of(np.array(steps))).startswith(start)


def test_the_level_itself_is_no_shrinking() -> None:
    assert advice(LEVEL).startswith("they do not shrink")


def test_steps_of_no_length_have_no_pace() -> None:
    assert np.isnan(pace_of(np.zeros(4)))
