"""One self-contained HTML page from sections. Nothing in it is fetched, and nothing runs."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from swa_avg.errors import escape

if TYPE_CHECKING:
    from swa_avg.pages.pictures import Picture

__all__ = ["Section", "command", "facts", "figure", "folded", "items", "page", "paragraph", "table"]

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --muted: #59636e;
  --line: #d5dae0; --accent: #0b62b0; --alert: #a13800; --alert-paper: #fff1e8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1c2025; --ink: #e7eaee; --muted: #a3adb8; --line: #353c45;
    --accent: #6cb6ff; --alert: #ffb086; --alert-paper: #35221a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 74rem; background: var(--paper);
  color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h1, h2, p, li, dd, figcaption { overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { color: var(--muted); }
.alert { background: var(--alert-paper); color: var(--alert); border-left: 4px solid; padding: .5rem .8rem;
  border-radius: 4px; max-width: none; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 10.5rem), 1fr)); gap: .6rem;
  margin: 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .5rem .75rem; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-weight: 600; }
dd.meaning { font-weight: 400; font-size: .8rem; color: var(--muted); }
pre { margin: .4rem 0; padding: .5rem .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 29rem), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
figcaption { color: var(--muted); font-size: .85rem; margin-top: .35rem; }
.scroll { overflow-x: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); color: var(--muted); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.text { text-align: left; }
tr.marked td { background: var(--alert-paper); color: var(--alert); }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--accent); }
"""


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    body: str
    """HTML; what comes from files has been escaped, as all functions of this module do."""


def page(title: str, lead: str, sections: Iterable[Section]) -> str:
    """Return a whole page; `title` and `lead` are plain text."""
    parts = [f"<section>\n<h2>{_text(s.title)}</h2>\n{s.body}\n</section>" for s in sections]
    # No icon: a browser would ask the server, or the folder, for one.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_text(title)}</h1>
<p class="lead">{_text(lead)}</p>
{"".join(part + chr(10) for part in parts)}</main>
</body>
</html>
"""


def paragraph(text: str, *, alert: bool = False) -> str:
    """Return a paragraph of plain text; an alert stands out."""
    return f'<p class="alert" role="note">{_text(text)}</p>' if alert else f"<p>{_text(text)}</p>"


def items(texts: Iterable[str]) -> str:
    """Return a list of plain texts."""
    return "<ul>\n" + "".join(f"<li>{_text(text)}</li>\n" for text in texts) + "</ul>"


def facts(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return names, values and what they mean, side by side where there is room."""
    cells = "".join(
        f'<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><dd class="meaning">{_text(meaning)}</dd></div>\n'
        for name, value, meaning in rows
    )
    return f"<dl>\n{cells}</dl>"


def command(text: str) -> str:
    """Return what to type."""
    return f"<pre><code>{_text(text)}</code></pre>"


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> str:
    """Return a table of plain texts that scrolls inside its frame.

    Columns hold numbers, but for `text_columns`; rows in `marked` stand out.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        kinds = (' class="text"' if column in text_columns else "" for column in range(len(values)))
        return "".join(f"<{tag}{kind}>{_text(v)}</{tag}>" for kind, v in zip(kinds, values, strict=True))

    kinds = (' class="marked"' if number in marked else "" for number in count())
    body = "".join(f"<tr{kind}>{cells('td', row)}</tr>\n" for kind, row in zip(kinds, rows, strict=False))
    head = f"<thead><tr>{cells('th', headers)}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>\n{head}\n<tbody>\n{body}</tbody>\n</table></div>'


def folded(summary: str, body: str) -> str:
    """Return HTML that opens on request."""
    return f"<details><summary>{_text(summary)}</summary>\n{body}\n</details>"


def figure(pictures: Iterable[Picture]) -> str:
    """Return pictures, each with its caption, side by side where there is room."""
    return '<div class="figures">\n' + "\n".join(map(_figure, pictures)) + "\n</div>"


def _figure(picture: Picture) -> str:
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(picture.dark)}">'
        f'<img src="{_data(picture.light)}" width="{picture.width}" height="{picture.height}" '
        f'alt="{_text(picture.caption)}"></picture><figcaption>{_text(picture.caption)}</figcaption></figure>'
    )


def _data(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def _text(text: str) -> str:
    return html.escape(escape(text))
