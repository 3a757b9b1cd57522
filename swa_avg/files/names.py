"""Names of files that come from files."""

from __future__ import annotations

import os

__all__ = ["is_plain_name"]

_ELSEWHERE = "/\\:\0" if os.name == "nt" else "/\0"
"""What leads out of a folder, or is no part of any name, on this system."""


def is_plain_name(name: str) -> bool:
    """Tell whether `name` can only be that of a file in the folder at hand.

    Every name that a file can have on this system is one, `epoch:03.keras` on Linux as well.
    """
    if name in ("", ".", "..") or set(name) & set(_ELSEWHERE):
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
