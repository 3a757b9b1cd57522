"""JSON from files that may be hostile."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from swa_avg.errors import Named, UnreadableError

__all__ = ["MAX_JSON", "objects", "parse_json"]

MAX_JSON = 64 * 2**20
_MAX_VALUES = 2_000_000  # a value takes up to 100 bytes of memory, however few in the file
_MAX_DEPTH = 200
_MAX_DIGITS = 400
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(data: bytes, path: Named, what: str) -> dict[str, Any]:
    """Parse a JSON object, with limits on size, nesting and digits.

    Raises:
        UnreadableError: it is not UTF-8 or not JSON, holds a key twice or NaN, or exceeds a limit.
    """
    if len(data) > MAX_JSON or data.count(b",") + data.count(b"[") + data.count(b"{") > _MAX_VALUES:
        raise UnreadableError(path, f"{what} is larger than {MAX_JSON >> 20} MiB or {_MAX_VALUES} values")
    try:
        _check_depth(data)
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_int=_parse_int,
            parse_constant=_parse_constant,
        )
    except (ValueError, RecursionError) as error:
        raise UnreadableError(path, f"{what} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UnreadableError(path, f"{what} is not a JSON object")
    return value


def _check_depth(data: bytes) -> None:
    unescaped = data.replace(rb"\\", b"").replace(rb"\"", b"")
    depth = 0
    for outside in unescaped.split(b'"')[::2]:
        for token in outside.translate(None, _NO_BRACKETS):
            depth += 1 if token in b"[{" else -1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key appears twice")
    return value


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError("an integer has too many digits")
    return int(digits)


def _parse_constant(name: str) -> float:
    if name == "NaN":  # it equals nothing, so no two configurations that hold it would fit
        raise ValueError("it holds NaN")
    return float(name)


def objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every JSON object in a value, outermost first."""
    pending = deque([value])
    while pending:
        current = pending.popleft()
        if isinstance(current, Mapping):
            yield current
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)
