"""What a training logged: a CSV file with a row an epoch, as Keras's `CSVLogger` writes it."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from io import StringIO

from swa_avg.errors import UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region
from swa_avg.files.sources import open_source

__all__ = ["TrainingLog", "read_log"]

_MAX_BYTES = 16 * 2**20
_MAX_CELLS = 1_000_000
_HEAD = 64 * 1024
_EPOCH = "epoch"
_SEPARATORS = ",;\t"
_WHOLE = re.compile(r"([0-9]{1,9})(\.0*)?")


@dataclass(frozen=True)
class TrainingLog:
    """The metrics of each epoch; the columns of the learning rate are among them."""

    path: Location
    epochs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """By the epoch as the file counts it, from 0; without what was not logged. May hold NaN and infinity."""


def read_log(path: Location) -> TrainingLog:
    """Read a log, which comes from elsewhere and may hold anything.

    Its separator is a comma, a semicolon or a tab. Where logs were joined, a header stands within it; of an
    epoch that a resumed run logged again, the last row counts. A cell that is no number, such as `NA`, says
    nothing.

    Raises:
        UnreadableError: it cannot be read, has no column `epoch`, or is damaged.
        SystemRefusalError: a service did not answer or refused.
    """
    with closing(open_source(path)) as source:
        if source.size > _MAX_BYTES:
            raise UnreadableError(path, f"a log larger than {_MAX_BYTES >> 20} MiB")
        region = Region(source)
        head = region.read(0, min(_HEAD, source.size))
        separator = _separator(_decoded(head, path, final=False), path)
        text = _decoded(head + region.read(len(head), source.size - len(head)), path)
    if text.count(separator) + text.count("\n") > _MAX_CELLS:
        raise UnreadableError(path, f"a log of more than {_MAX_CELLS:,} cells")
    epochs: dict[int, Mapping[str, float]] = {}
    header: list[str] = []
    try:
        for line, cells in _rows(text, separator):
            if _is_header(cells):
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header):
                    raise ValueError(f"line {line} names a column twice")
                continue
            if len(cells) > len(header):
                raise ValueError(f"line {line} has {len(cells)} cells, and its header {len(header)}")
            row = dict(zip(header, cells, strict=False))
            epoch = _WHOLE.fullmatch(row.pop(_EPOCH, "").strip())
            if epoch is None:
                raise ValueError(f"line {line} has no whole number as its epoch")
            epochs[int(epoch[1])] = dict(_numbers(row, decimal_comma=separator != ","))
        if min(epochs, default=0) == 1:
            raise ValueError("it begins with epoch 1, and such a log counts from 0")
    except (ValueError, csv.Error) as error:
        raise UnreadableError(path, f"not a log as CSVLogger writes it: {error}") from error
    return TrainingLog(path, epochs)


def _decoded(data: bytes, path: Location, *, final: bool = True) -> str:
    """Return the text: UTF-8, or UTF-16 where a mark at its beginning says so."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return codecs.getincrementaldecoder("utf-16" if marked else "utf-8-sig")().decode(data, final)
    except UnicodeDecodeError as error:
        raise UnreadableError(path, f"a log that is not UTF-8 (byte {error.start})") from error


def _separator(head: str, path: Location) -> str:
    """Return what separates the cells of the header, the first line that is not empty."""
    line = head.lstrip().partition("\n")[0]
    for separator in _SEPARATORS:
        try:
            if any(_is_header(cells) and len(cells) > 1 for _, cells in _rows(line, separator)):
                return separator
        except csv.Error:
            continue
    raise UnreadableError(path, f"no column `{_EPOCH}` beside others in its first line")


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that is not empty, with the number of its last line."""
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, strict=True)
    for cells in reader:
        if any(map(str.strip, cells)):
            yield reader.line_num, cells


def _is_header(cells: Sequence[str]) -> bool:
    return any(cell.strip() == _EPOCH for cell in cells)


def _numbers(row: Mapping[str, str], *, decimal_comma: bool) -> Iterator[tuple[str, float]]:
    """Yield the columns that hold a number, with it."""
    for name, cell in row.items():
        with suppress(ValueError):
            yield name, float(cell.replace(",", ".") if decimal_comma else cell)
