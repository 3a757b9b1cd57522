"""Numbers and lists as text."""

from __future__ import annotations

import math

from swa_avg.text import finite_or_none, first_few


def test_what_does_not_fit_into_a_list_is_counted() -> None:
    assert first_few([]) == ""
    assert first_few(list("abcde")) == "a, b, c, d, e"
    assert first_few(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert first_few(list("abc"), 2, "; ") == "a; b and 1 more"


def test_json_gets_no_numbers_that_it_does_not_have() -> None:
    assert finite_or_none(0.5) == 0.5
    assert [finite_or_none(value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3
