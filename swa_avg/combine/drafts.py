"""Drafts: averages that a model is loaded from, in a temporary folder, before anything is published."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO

from swa_avg.formats import Checkpoint
from swa_avg.formats.base import Stream

__all__ = ["DraftFolder", "write_draft"]


def write_draft(draft: Path, template: Checkpoint, stream: Stream) -> None:
    """Write a copy of `template` with other values, and no record of how it was made.

    Raises:
        OSError: the disk is full.
    """
    with DraftFolder(draft) as stage:
        template.write(stream, lambda: None, stage)


class DraftFolder:
    """A stage whose files need no protection: nobody looks for them there. Leaving it closes them."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._files: list[IO[bytes]] = []

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        path = self.output.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files.append(path.open("w+b"))
        return self._files[-1]

    def __enter__(self) -> DraftFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
