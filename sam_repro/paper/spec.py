"""A table or figure of a paper as data: the YAML format of `results/paper/` and
`results/studies/` (our own experiments), its checks, and the runs it asks for.

```
title:    one line
source:   where the numbers are printed
base:     overrides that all rows share
seeds:    seeds per row (0 ... seeds - 1)
columns:  name: {title, value, magnitude, unit, digits}   the first one decides the order of methods. Without `value`,
          the accuracy in % on the evaluation set of that name; else a dotted path in the ledger row, or
          last.<metric>: the end of a training curve; `magnitude: true` drops its sign
order:    methods from worst to best, as the paper claims; each is the second part of a row's id
select:   evaluation set on which a sweep's winner is chosen, never the test set
warnings: deviation ids (docs/DEVIATIONS.md) that concern every row
notes:    sentences under the table
rows:     list of
    id:        <model>/<method>, unique
    model:     as the table prints it
    method:    as the table prints it
    overrides: what `python train.py` gets after `base`; absent where there is nothing to run
    settings:  of a row without overrides: those of the configuration whose values are shown, as `config.<key>`
    printed:   {column: number, or 'not in our sources'}; a column left out is one that the paper does not have
    where:     the place in the paper, where it differs from `source`
    origin:    who measured the printed number, where it was not the paper
    warnings:  deviation ids
    seeds:     where it differs from the table's
    series, x: the line and the abscissa in a figure of kind `sweep`; a row without x is a level across it
    grid:      {key: [values]}: the row stands for all combinations; `x: <key>` takes the abscissa from it, and
               `series: "alpha {optim_alpha}"` its name
    tuned:     <table>:<model>/<method>, a sweep: the row takes the point that won it on the sweep's `select`, and has
               no runs before all of the sweep's are in the ledger
    after:     <table>:<row id> whose trained weights the run starts from, seed by seed (init=<its run directory>)
claims:   of a study, list of {text, column, better, than, lower}: the row `better` has the higher value, or with
          `lower: true` the lower one; or falls_with: <key of a grid>, or follows: <column>
figure:   {kind: curves | sweep | dots | toy, panels: [columns or metrics], x_title, log_x, by_model}
```
"""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sam_repro.config.compose import nearest
from sam_repro.errors import UserError

UNREADABLE = "not in our sources"


@dataclass(frozen=True)
class Column:
    """One quantity of a table."""

    name: str
    title: str
    value: str | None = None  # dotted path in the ledger row; None: accuracy on the evaluation set `name`
    magnitude: bool = False  # |value|
    unit: str = "%"
    digits: int = 1  # decimals that the paper prints


@dataclass(frozen=True)
class TableRow:
    """One line of a table: the runs that it needs, and the numbers that the paper prints."""

    id: str
    model: str
    method: str
    overrides: tuple[str, ...] | None = None
    settings: tuple[str, ...] = ()
    printed: dict[str, float | str] = field(default_factory=dict)
    where: str = ""
    origin: str = ""
    warnings: tuple[str, ...] = ()
    seeds: int = 0
    series: str = ""
    x: float | str | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    tuned: str = ""
    after: str = ""
    point: dict[str, Any] = field(default_factory=dict)  # this row's place in the grid it came from

    @property
    def method_id(self) -> str:
        """The method's part of the id: what `order` and the colours go by."""
        return self.id.split("/")[1] if "/" in self.id else self.id


@dataclass(frozen=True)
class Claim:
    """What a study expects to see. sam_repro.paper.claims judges it."""

    text: str
    column: str
    better: str = ""
    than: str = ""
    lower: bool = False
    falls_with: str = ""
    follows: str = ""


@dataclass(frozen=True)
class Table:
    """A table or figure."""

    name: str
    title: str
    source: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    base: tuple[str, ...] = ()
    seeds: int = 3
    order: tuple[str, ...] = ()
    select: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    figure: dict[str, Any] = field(default_factory=dict)


def tables_dir(kind: str = "paper") -> Path:
    """The folder of YAML tables, `results/<kind>`: in the checkout, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "results" / kind, package / "results" / kind):
        if candidate.is_dir():
            return candidate
    raise UserError(f"the tables are missing: neither results/{kind} nor sam_repro/results/{kind} in {package.parent}")


KINDS = ("paper", "studies")  # the papers' tables and figures; our own experiments


def table_names(*kinds: str) -> list[str]:
    """The tables that exist, sorted: of these kinds, or of all."""
    return sorted(path.stem for kind in kinds or KINDS for path in tables_dir(kind).glob("*.yaml"))


def load_table(name: str) -> Table:
    """The table of a name (`results/paper/<name>.yaml`, `results/studies/<name>.yaml`) or of a path that ends in .yaml.

    Raises:
        UserError: no such table, or a file that does not follow the format; the message names the nearest word.
    """
    known = [tables_dir(kind) / f"{name}.yaml" for kind in KINDS]
    path = Path(name) if name.endswith(".yaml") else next((p for p in known if p.is_file()), known[0])
    if not path.is_file():
        names = table_names()
        raise UserError(f"there is no table '{name}'{nearest(name, names)} (tables: {', '.join(names)})")
    return table_of(path.stem, path.read_text())


@cache
def table_of(name: str, text: str) -> Table:
    """The table of a file's text: remembered, since rows that start from another table's runs ask for it every time."""
    try:
        tree = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # libyaml's, ten times as fast
    except yaml.YAMLError as error:
        raise UserError(f"{name}.yaml is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{name}.yaml must be a mapping with title, source, columns and rows")
    return parse_table(name, tree)


def parse_table(name: str, tree: dict[str, Any]) -> Table:
    """The mapping of a YAML file as a Table, grids expanded."""
    tree = copy.deepcopy(tree)
    columns = tree.pop("columns", None)
    rows = tree.pop("rows", None)
    if not isinstance(columns, dict) or not columns or not isinstance(rows, list) or not rows:
        raise UserError(f"table {name}: columns must be a mapping and rows a list, neither empty")
    shape: dict[str, Any] = {
        "columns": tuple(build(Column, c or {}, f"table {name}, column {k}", name=k) for k, c in columns.items())
    }
    parsed = []
    for i, row in enumerate(rows):
        where = f"table {name}, row {row.get('id', i + 1) if isinstance(row, dict) else i + 1}"
        parsed += expand_grid(build(TableRow, row, where), where)
    claims = tree.pop("claims", None) or []
    shape["claims"] = tuple(build(Claim, c, f"table {name}, claim {i}") for i, c in enumerate(claims, 1))
    table = build(Table, tree, f"table {name}", name=name, rows=tuple(parsed), **shape)
    table = replace(table, rows=tuple(replace(r, seeds=r.seeds or table.seeds) for r in table.rows))
    check_table(table)
    return table


def build(kind: type, tree: Any, where: str, **given: Any) -> Any:
    """A frozen dataclass from a mapping; lists become tuples; unknown and missing keys are errors."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected a mapping, not {tree!r}")
    known = {f.name: f for f in fields(kind)}
    for key in tree:
        if key not in known:
            raise UserError(f"{where}: there is no key '{key}'{nearest(str(key), list(known))}")
        if not fits(tree[key], str(known[key].type)):
            raise UserError(f"{where}: {key} must be {known[key].type}, not {tree[key]!r}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()} | given
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{where}: {str(error).split('() ')[-1]}") from None


def fits(value: Any, annotation: str) -> bool:
    """Whether a YAML value is of the type that a field above is annotated with."""
    if annotation.startswith("tuple[str"):
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if annotation.startswith("dict[str, list"):
        return isinstance(value, dict) and all(isinstance(v, list) and v for v in value.values())
    kinds = {"str": str, "int": int, "dict": dict}
    return isinstance(value, kinds.get(re.split(r"\W", annotation)[0], object))


def expand_grid(row: TableRow, where: str) -> list[TableRow]:
    """A row with a grid becomes one row per combination; `<key>=<value>` is added to its id and its overrides."""
    if not row.grid:
        return [row]
    if row.overrides is None:
        raise UserError(f"{where}: a grid needs overrides")
    expanded = []
    for values in itertools.product(*row.grid.values()):
        point = dict(zip(row.grid, values, strict=True))
        short = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items())
        named = {key.replace(".", "_"): value for key, value in point.items()}
        x = point.get(row.x, row.x) if isinstance(row.x, str) else row.x
        try:
            series = row.series.format(**named)
        except (KeyError, ValueError, IndexError):
            raise UserError(f"{where}: series '{row.series}' may name {', '.join(named)} in braces") from None
        expanded.append(replace(row, id=f"{row.id}/{short}", x=x, series=series, grid={}, point=point))
    return expanded


def check_table(table: Table) -> None:
    """Check what the types cannot express."""
    names = [c.name for c in table.columns]
    ids = [row.id for row in table.rows]
    for row in table.rows:
        where = f"table {table.name}, row {row.id}"
        if row.seeds < 1:
            raise UserError(f"{where}: seeds={row.seeds} must be at least 1")
        if ids.count(row.id) > 1:
            raise UserError(f"{where}: the id is used {ids.count(row.id)} times")
        for column, value in row.printed.items():
            if column not in names:
                raise UserError(f"{where}: there is no column '{column}'{nearest(column, names)}")
            if isinstance(value, bool) or (value != UNREADABLE and not isinstance(value, (int, float))):
                raise UserError(f"{where}: {column} must be a number or '{UNREADABLE}', not {value!r}")
    for claim in table.claims:
        known = claim.follows in names or any(claim.falls_with in row.point for row in table.rows)
        if claim.column not in names or not (known or {claim.better, claim.than} <= set(ids)):
            raise UserError(
                f"table {table.name}, claim '{claim.text}': it must name a column, and rows or a grid's key"
            )
    kind = table.figure.get("kind", "dots")
    if kind not in FIGURES:
        raise UserError(f"table {table.name}: there is no figure kind '{kind}'{nearest(kind, list(FIGURES))}")


FIGURES = ("curves", "sweep", "dots", "toy")
