"""Put what was recorded of evidence.py, and with a file of what demo.sh printed, the demo, into the READMEs.

python scripts/update_readme.py [FILE]
python scripts/update_readme.py --check FILE    tell, by 1, whether the demo's words differ from the README's
"""

import re
import sys
from pathlib import Path

import evidence_tables

SCRIPTS = Path(__file__).parent
README = SCRIPTS.parent / "README.md"
SHOWN = ("trained ", "$ swa-avg ckpt_*.keras -o swa.keras --bn-refresh", " " * 15 + "last checkpoint")
"""What the parts of the demo that the README shows begin with."""


def excerpt(printed: str) -> str:
    """Return the parts of the demo that the README shows."""
    parts = re.split(r"\n(?=\n|\$ |trained )", printed)
    return "\n".join(part.strip("\n") + "\n" for part in parts if part.lstrip("\n").startswith(SHOWN))


def block(text: str, marker: str) -> str:
    return re.search(rf"<!-- {marker} -->\n(?:```\n)?(.*?)(?:```\n)?<!-- /{marker} -->", text, re.DOTALL)[1]


def replaced(text: str, marker: str, new: str) -> str:
    old = block(text, marker)
    return (
        text.replace(old, new)
        if old
        else re.sub(rf"(<!-- {marker} -->\n(?:```\n)?)", lambda m: m[1] + new, text)
    )


def words(text: str) -> str:
    """Return a text without numbers, which depend on the processor, and without their alignment."""
    return re.sub(r"[\s\d.]+", " ", text)


def main() -> int:
    check = "--check" in sys.argv
    files = [Path(name) for name in sys.argv[1:] if name != "--check"]
    text = README.read_text("utf-8")
    demo = "".join(excerpt(file.read_text("utf-8")) for file in files)
    if check:
        return int(words(block(text, "demo")) != words(demo))
    records = evidence_tables.load()
    text = replaced(text, "evidence", evidence_tables.summary(records) + "\n")
    README.write_text(replaced(text, "demo", demo) if demo else text, "utf-8")
    details = SCRIPTS / "README.md"
    table = evidence_tables.details(records) + "\n"
    details.write_text(replaced(details.read_text("utf-8"), "evidence", table), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
