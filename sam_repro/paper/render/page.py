"""HTML pages from the templates in this folder: self-contained, no network, every value escaped."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sam_repro.paper.render.sheet import Sheet

# Words in a cell that have a colour of their own.
CLASSES = {word: word for word in ("within", "above", "below", "pending", "diverged")}
CLASSES |= {"–": "dash", "not in our sources": "unread"}


@cache
def environment() -> Environment:
    """The templates, with autoescape: a ledger row of a stranger stays text."""
    loader = PackageLoader("sam_repro.paper.render", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals["classes"] = CLASSES
    return made


def page(template: str, **values: Any) -> str:
    """The page of a template."""
    return environment().get_template(template).render(**values) + "\n"


def table_page(sheet: Sheet) -> str:
    """A table as a page of its own."""
    return page("table.html", title=sheet.title, sheet=sheet)
