"""Temporary folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["temporary_folder"]


@contextmanager
def temporary_folder(beside: Path | None = None) -> Iterator[Path]:
    """Make a folder for as long as the block runs: on the file system of an output, hidden `beside` it, or
    where the system keeps temporary files."""
    from tempfile import TemporaryDirectory  # few runs need one, and it takes a while to import

    parent, prefix = (None, "swa-avg-") if beside is None else (beside.parent, ".swa-avg-")
    with TemporaryDirectory(dir=parent, prefix=prefix) as folder:
        yield Path(folder)
