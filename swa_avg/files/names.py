"""Names of files that come from files."""

from __future__ import annotations

__all__ = ["is_plain_name"]


def is_plain_name(name: str) -> bool:
    """Tell whether `name` can only be that of a file in the folder at hand, on any system."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()
