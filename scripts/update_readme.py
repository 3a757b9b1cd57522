"""Put the help text, the evidence and what demo.sh printed (a file named as argument), into README.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import evidence_tables

README = Path(__file__).parents[1] / "README.md"


def replace(text: str, marker: str, block: str) -> str:
    pattern = rf"(<!-- {marker} -->\n(?:```\n)?).*?((?:```\n)?<!-- /{marker} -->)"
    return re.sub(pattern, lambda match: match[1] + block + match[2], text, flags=re.DOTALL)


def main() -> None:
    text = README.read_text()
    environment = {**os.environ, "COLUMNS": "80"}
    for command in ([], ["inspect"], ["sweep"], ["verify"]):
        arguments = [str(Path(sys.executable).with_name("swa-avg")), *command, "--help"]
        ended = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
        text = replace(text, " ".join(["help", *command]), ended.stdout)
    text = replace(text, "evidence", evidence_tables.section(evidence_tables.load()) + "\n")
    if len(sys.argv) > 1:
        text = replace(text, "demo", Path(sys.argv[1]).read_text())
    README.write_text(text)


if __name__ == "__main__":
    main()
