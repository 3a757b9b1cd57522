"""Numbers and lists as text."""

from __future__ import annotations

import math

from swa_avg.text import finite_or_none, first_few, ranges_text, short_names


def test_what_does_not_fit_into_a_list_is_counted() -> None:
    assert first_few([]) == ""
    assert first_few(list("abcde")) == "a, b, c, d, e"
    assert first_few(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert first_few(list("abc"), 2, "; ") == "a; b and 1 more"


def test_numbers_in_a_row_are_a_range() -> None:
    assert ranges_text([]) == ""
    assert ranges_text([7]) == "7"
    assert ranges_text([1, 2, 10]) == "1, 2, 10"
    assert ranges_text(range(11, 21)) == "11 to 20"
    assert ranges_text([1, 3, 4, 5, 9, 10, 20, 21, 22]) == "1, 3 to 5, 9, 10, 20 to 22"


def test_paths_are_shortened_as_long_as_they_differ() -> None:
    assert short_names([]) == []
    assert short_names(["a/x.keras", "a/y.keras"]) == ["x.keras", "y.keras"]
    assert short_names(["run/a/x", "run/b/x", "run/b/y"]) == ["a/x", "b/x", "b/y"]
    assert short_names(["a/run/x", "b/run/x"]) == ["a/run/x", "b/run/x"]
    assert short_names(["x", "b/x"]) == ["x", "b/x"]
    assert short_names(["x", "x"]) == ["x", "x"]


def test_json_gets_no_numbers_that_it_does_not_have() -> None:
    assert finite_or_none(0.5) == 0.5
    assert [finite_or_none(value) for value in (math.nan, math.inf, -math.inf)] == [None] * 3
