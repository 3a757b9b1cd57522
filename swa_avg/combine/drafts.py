"""Drafts: averages that a model is loaded from, in a temporary folder, before anything is published."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from swa_avg.formats import Checkpoint
from swa_avg.formats.base import Stream

__all__ = ["write_draft"]


def write_draft(draft: Path, template: Checkpoint, stream: Stream) -> None:
    """Write a copy of `template` with other values, and no record of how it was made.

    Raises:
        OSError: the disk is full.
    """
    stage = _Folder(draft)
    try:
        template.write(stream, lambda: None, stage)
    finally:
        for file in stage.files:
            file.close()


class _Folder:
    """A stage whose files need no protection: nobody looks for them there."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.files: list[IO[bytes]] = []

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        path = self.output.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files.append(path.open("w+b"))
        return self.files[-1]
