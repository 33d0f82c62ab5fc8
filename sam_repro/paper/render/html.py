"""HTML pieces that the table command and the report share: one style, no network."""

from __future__ import annotations

import re
from html import escape

from sam_repro.paper.render.sheet import Sheet

STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d9dee3; --paper: #ffffff; --tint: #f5f7f9; --accent: #0072b2;
  --good: #00704f; --bad: #b34700; --two: #b87700; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa4ae; --line: #363c43; --paper: #16191d;
  --tint: #1e2227; --accent: #56b4e9; --good: #2fc79a; --bad: #f0914d; --two: #e69f00; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  padding: 1.5rem 1rem 4rem; max-width: 80rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0; display: inline; } p { max-width: 46rem; margin: .4rem 0; }
a { color: var(--accent); } .soft, figcaption, li { color: var(--soft); font-size: .9rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
.tile { background: var(--tint); border-radius: .5rem; padding: .7rem 1rem; font-size: .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: .5rem 0; } table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { background: var(--tint); color: var(--soft); font-weight: 600; }
th.sortable { cursor: pointer; } th.sortable:hover { color: var(--ink); }
th:first-child, td:first-child, th.left, td.left { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal;
  min-width: 7rem; }
.wide td:first-child { min-width: min(24rem, 50vw); } th:first-child { background: var(--tint); }
.tag { font-size: .75rem; text-decoration: none; margin-left: .3rem; }
details { border-top: 1px solid var(--line); padding: .6rem 0; } summary { cursor: pointer; }
summary .soft { margin-left: .6rem; }
input[type=search] { font: inherit; padding: .45rem .7rem; width: min(24rem, 100%); color: inherit;
  background: var(--paper); border: 1px solid var(--line); border-radius: .4rem; }
.within { color: var(--good); font-weight: 600; } .below, .diverged { color: var(--bad); font-weight: 600; }
.above { color: var(--accent); font-weight: 600; } .pending, .dash, .unread { color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: .5rem 0; width: 260px; max-width: 100%; }
svg { display: block; width: 100%; } svg text { font: 10px system-ui, sans-serif; fill: var(--soft); }
polyline { fill: none; stroke: var(--accent); stroke-width: 1.6; stroke-linejoin: round; }
polyline.second { stroke: var(--two); } .axis { fill: none; stroke: var(--line); }
@media (max-width: 40rem) { th, td { padding: .3rem .45rem; } td.left { white-space: normal; }
  th:first-child, td:first-child { min-width: 4.6rem; } td.left .tag { margin: 0 .3rem 0 0; }
  .wide td:first-child { min-width: 46vw; } ul { padding-left: 1.1rem; } }
.scroll { background: linear-gradient(var(--paper), var(--paper)) right / 1rem 100% no-repeat local,
  linear-gradient(to left, var(--line), transparent 1rem) right / 1rem 100% no-repeat scroll; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--tint); padding: .6rem .8rem;
  border-radius: .4rem; font-size: .8rem; }
"""
CLASSES = {w: w for w in ("within", "above", "below", "pending", "diverged")}
CLASSES |= {"–": "dash", "not in our sources": "unread"}


def page(title: str, body: str, script: str = "") -> str:
    """A self-contained page."""
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    tail = f"<script>{script}</script>\n" if script else ""
    return f"{head}<style>{STYLE}</style></head>\n<body>\n{body}{tail}</body></html>\n"


def table_html(s: Sheet) -> str:
    """A table with its heading, footnotes and provenance."""
    return f'<h2>{escape(s.title)}</h2>\n<p class="soft">{escape(s.source)}</p>\n{grid(s)}{notes(s)}'


def grid(s: Sheet, runs: list[dict[str, str]] | None = None, words: list[str] | None = None) -> str:
    """The table itself; in the report, `runs` are {seed: run id} a row leads to, `words` what a filter finds it by."""
    head = "".join(f"<th{' class=left' if i < 2 else ''}>{escape(h)}</th>" for i, h in enumerate(s.header))
    lines = []
    for i, line in enumerate(s.lines):
        cells = [cell(text, left=k < 2) for k, text in enumerate(line)]
        if runs is not None:
            cells[1] = f'<td class="left">{linked(line[1], runs[i])}</td>'
        said = f' data-words="{escape(words[i])}"' if words else ""
        lines.append(f"<tr{said}>{''.join(cells)}</tr>\n")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody></table></div>\n'
    )


def linked(method: str, runs: dict[str, str]) -> str:
    """A method that leads to its first run, with small links to those of other seeds and to its deviations."""
    name, *tags = re.split(r" \[(D-\d+)\]", method)
    first, *others = runs.items() or [("", "")]
    head = f'<a href="#{escape(first[1])}">{escape(name)}</a>' if runs else escape(name)
    small = [(f"seed {seed}", run) for seed, run in others] + [(tag, tag) for tag in tags if tag]
    return head + "".join(f' <a class="tag" href="#{escape(to)}">{text}</a>' for text, to in small)


def notes(s: Sheet) -> str:
    """Order of methods, footnotes and provenance."""
    lines = (*s.orders, *s.footnotes, *s.provenance)
    return "<ul>" + "".join(f"<li>{escape(n)}</li>\n" for n in lines) + "</ul>\n"


def cell(text: str, *, left: bool = False) -> str:
    """A table cell; verdicts carry a class for their colour."""
    name = "left" if left else CLASSES.get(text, "")
    return f'<td class="{name}">{escape(text)}</td>' if name else f"<td>{escape(text)}</td>"
