"""What the README says of the command line is what the command line says of itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Ended

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


@pytest.mark.parametrize("command", ["", " inspect", " sweep", " verify"])
def test_the_help_text_is_current(
    command: str, swa_avg: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    block = re.search(f"<!-- help{command} -->\n```\n(.*?)```\n<!-- /help{command} -->", README, re.DOTALL)
    assert block is not None
    assert block.group(1) == swa_avg(*command.split(), "--help").out


def test_every_guarantee_names_the_tests_that_hold_it() -> None:
    section = README.split("## Guarantees\n")[1].split("\nExit codes")[0]
    guarantees = re.split(r"\n\d\. ", section)[1:]
    assert len(guarantees) >= 6
    for guarantee in guarantees:
        assert re.search(r"`tests/[\w/]+\.py`", guarantee), guarantee


def test_every_test_file_that_holds_a_guarantee_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", README)
    assert named
    for name in named:
        assert (Path(__file__).parents[1] / name).exists(), name


def test_the_set_up_commands_are_the_scripts() -> None:
    assert "\nbash scripts/demo.sh\nbash scripts/test.sh\n" in README
