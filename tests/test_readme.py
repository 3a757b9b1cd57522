"""What the README says of the command line, of tests and of other sections is so, and its page is short."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from conftest import Ended

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = ("average", "inspect", "sweep", "verify")


def options_named(text: str) -> list[tuple[str, str]]:
    """Return (command, option) for all options of swa-avg; the command is "" where the text does not say it."""
    named = []
    for line in re.findall(r"^swa-avg .*$", text, re.MULTILINE) + re.findall(r"`(swa-avg [^`]*)`", text):
        words = line.split()
        command = words[1] if words[1] in COMMANDS else "average"
        named += [(command, word) for word in words if re.fullmatch(r"--?[a-z][\w-]*", word)]
    return named + [("", option) for option in re.findall(r"`(--?[a-z][\w-]*)[^`]*`", text)]


def test_it_is_a_page_that_a_newcomer_finishes() -> None:
    assert len(README.splitlines()) <= 300


def test_every_option_that_it_names_exists(swa_avg: Callable[..., Ended]) -> None:
    own = README.split("**Scripts of timm")[0]
    helps = {command: swa_avg(command, "--help").out for command in COMMANDS}
    known = {command: set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text)) for command, text in helps.items()}
    known[""] = set().union(*known.values())
    named = options_named(own)
    assert len(named) > 30
    assert [pair for pair in named if pair[1] not in known[pair[0]]] == []


def test_every_link_within_the_repository_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", README)
    assert links
    for name, section in links:
        target = ROOT / name if name else ROOT / "README.md"
        assert target.exists(), name
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert section in [heading.lower().replace(" ", "-") for heading in headings]


def test_every_guarantee_names_the_tests_that_hold_it() -> None:
    section = README.split("## Guarantees\n")[1].split("\nExit codes")[0]
    guarantees = re.split(r"\n\d\. ", section)[1:]
    assert len(guarantees) >= 6
    for guarantee in guarantees:
        assert re.search(r"`tests/[\w/]+\.py`", guarantee), guarantee


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"`((?:tests|scripts)/[\w/]*(?:\.\w+)?)`", README)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_sections_that_the_code_names_exist() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "swa_avg").rglob("*.py")]
    named = re.findall(r'"([^"\n]*)"\s+in\s+the\s+README', "\n".join(sources))
    assert named
    for section in named:
        assert f"\n## {section}\n" in README


def test_the_set_up_commands_are_the_scripts() -> None:
    assert "\nbash scripts/demo.sh\nbash scripts/test.sh\n" in README
