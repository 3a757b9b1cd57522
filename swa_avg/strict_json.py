"""JSON from files that may be hostile."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from swa_avg.errors import UnreadableError

__all__ = ["parse_json"]

_MAX_BYTES = 64 * 2**20
_MAX_DEPTH = 200
_MAX_DIGITS = 400
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """Parse a JSON object, with limits on size, nesting and digits.

    Raises:
        UnreadableError: it is not UTF-8 or not JSON, holds a key twice, or passes a limit.
    """
    if len(data) > _MAX_BYTES:
        raise UnreadableError(path, f"{what} is larger than {_MAX_BYTES >> 20} MiB")
    try:
        _check_depth(data)
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(path, f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UnreadableError(path, f"{what} is not a JSON object")
    return value


def _check_depth(data: bytes) -> None:
    depth = 0
    for match in _BRACKETS.finditer(data):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        elif token in (b"]", b"}"):
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("an integer has too many digits")
    return int(digits)
