"""HTML pieces that the table command and the report share: no script, no network."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sam_repro.paper.tables import Sheet

STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --paper: #ffffff; --tint: #f5f7f9; --accent: #0072b2;
  --good: #00704f; --bad: #b34700; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa4ae; --line: #363c43; --paper: #16191d;
  --tint: #1e2227; --accent: #56b4e9; --good: #2fc79a; --bad: #f0914d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; padding: 1rem;
  max-width: 76rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
a { color: var(--accent); } .soft, figcaption, li { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { background: var(--tint); position: sticky; top: 0; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.within { color: var(--good); font-weight: 600; } .below, .diverged { color: var(--bad); font-weight: 600; }
.above { color: var(--accent); font-weight: 600; } .pending, .dash { color: var(--soft); }
"""


def page(title: str, body: str) -> str:
    """A self-contained page."""
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    return f"{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"


def table_html(s: Sheet) -> str:
    """A table with its heading, footnotes and provenance."""
    head = "".join(f"<th>{escape(h)}</th>" for h in s.header)
    rows = "\n".join("<tr>" + "".join(map(cell_html, line)) + "</tr>" for line in s.lines)
    notes = "".join(f"<li>{escape(n)}</li>" for n in (*s.orders, *s.footnotes, *s.provenance))
    return (
        f'<h2>{escape(s.title)}</h2>\n<p class="soft">{escape(s.source)}</p>\n'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>\n'
        f"<ul>{notes}</ul>\n"
    )


def cell_html(text: str) -> str:
    """A table cell; verdicts carry a class for their colour."""
    word = "dash" if text == "–" else text if text in ("within", "above", "below", "pending", "diverged") else ""
    return f'<td class="{word}">{escape(text)}</td>' if word else f"<td>{escape(text)}</td>"
