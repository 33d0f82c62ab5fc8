"""A table or figure of a paper as data: the YAML format of `results/paper/`, its checks, and the runs it asks for.

title:    one line
source:   where the numbers are printed
base:     overrides that all rows share
seeds:    how many seeds a row wants (0 ... seeds - 1)
columns:  name: {title, value, unit, digits}   the first one decides the order of methods. Without `value`, the
          accuracy in % on the evaluation set of that name; else a dotted path in the ledger row, or
          last.<metric>: the end of a training curve
order:    methods from worst to best, as the paper claims; each is the second part of a row's id
select:   evaluation set on which a sweep's winner is chosen, never the test set
warnings: deviation ids (docs/DEVIATIONS.md) that concern every row
notes:    sentences under the table
rows:     list of
    id:        <model>/<method>, unique
    model:     as the table prints it
    method:    as the table prints it
    overrides: what `python train.py` gets after `base`; absent where there is nothing to run
    printed:   {column: number, or 'not in our sources'}; a column left out is one that the paper does not have
    where:     the place in the paper, where it differs from `source`
    origin:    who measured the printed number, where it was not the paper
    warnings:  deviation ids
    seeds:     where it differs from the table's
    series, x: the line and the abscissa in a figure of kind `sweep`
    grid:      {key: [values]}: the row stands for all combinations; `x: <key>` takes the abscissa from it, and
               `series: "alpha {optim_alpha}"` its name
    after:     <table>:<row id> whose trained weights the run starts from, seed by seed (init=<its run directory>)
figure:   {kind: curves | sweep | dots, panels: [columns or metrics], x_title, log_x}
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sam_repro.config import Config, compose_config, nearest, run_id
from sam_repro.errors import UserError

UNREADABLE = "not in our sources"


@dataclass(frozen=True)
class Column:
    """One quantity of a table."""

    name: str
    title: str
    value: str | None = None  # dotted path in the ledger row; None: accuracy on the evaluation set `name`
    unit: str = "%"
    digits: int = 1  # decimals that the paper prints


@dataclass(frozen=True)
class TableRow:
    """One line of a table: the runs it wants and what the paper says came out."""

    id: str
    model: str
    method: str
    overrides: tuple[str, ...] | None = None
    printed: dict[str, float | str] = field(default_factory=dict)
    where: str = ""
    origin: str = ""
    warnings: tuple[str, ...] = ()
    seeds: int = 0
    series: str = ""
    x: float | str | None = None
    grid: dict[str, list[Any]] = field(default_factory=dict)
    after: str = ""
    point: dict[str, Any] = field(default_factory=dict)  # this row's place in the grid it came from

    @property
    def method_id(self) -> str:
        """The method's part of the id: what `order` and the colours go by."""
        return self.id.split("/")[1] if "/" in self.id else self.id


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
    figure: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run that a row wants."""

    run_id: str
    overrides: tuple[str, ...]  # what stands after `python train.py`
    config: Config = field(repr=False, compare=False)
    after: Run | None = None  # the run whose weights this one starts from


def tables_dir() -> Path:
    """The folder of YAML tables: in the checkout, or inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "results" / "paper", package / "results" / "paper"):
        if candidate.is_dir():
            return candidate
    raise UserError(f"the tables are missing: neither results/paper nor sam_repro/results/paper in {package.parent}")


def table_names() -> list[str]:
    """The tables that exist, sorted."""
    return sorted(path.stem for path in tables_dir().glob("*.yaml"))


def load_table(name: str) -> Table:
    """The table of a name (results/paper/<name>.yaml) or of a path that ends in .yaml.

    Raises:
        UserError: no such table, or a file that does not follow the format; the message names the nearest word.
    """
    path = Path(name) if name.endswith(".yaml") else tables_dir() / f"{name}.yaml"
    if not path.is_file():
        names = table_names()
        raise UserError(f"there is no table '{name}'{nearest(name, names)} (tables: {', '.join(names)})")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path.name} must be a mapping with title, source, columns and rows")
    return parse_table(path.stem, tree)


def parse_table(name: str, tree: dict[str, Any]) -> Table:
    """The mapping of a YAML file as a Table, grids expanded."""
    tree = copy.deepcopy(tree)
    columns = tree.pop("columns", None)
    rows = tree.pop("rows", None)
    if not isinstance(columns, dict) or not columns or not isinstance(rows, list) or not rows:
        raise UserError(f"table {name}: columns must be a mapping and rows a list, neither empty")
    shape = {"columns": tuple(build(Column, c or {}, f"table {name}, column {k}", name=k) for k, c in columns.items())}
    parsed = []
    for i, row in enumerate(rows):
        where = f"table {name}, row {row.get('id', i + 1) if isinstance(row, dict) else i + 1}"
        parsed += expand_grid(build(TableRow, row, where), where)
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
    """A row with a grid becomes one row a combination; `<key>=<value>` is added to its id and its overrides."""
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
    """What the types cannot say."""
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
    kind = table.figure.get("kind", "dots")
    if kind not in FIGURES:
        raise UserError(f"table {table.name}: there is no figure kind '{kind}'{nearest(kind, list(FIGURES))}")


FIGURES = ("curves", "sweep", "dots")


def runs_of(table: Table, row: TableRow, *, seeds: int | None = None, extra: Iterable[str] = ()) -> list[Run]:
    """The runs of a row, by seed; none where the row has nothing to run.

    Args:
        seeds: instead of the row's own number.
        extra: overrides laid over the row's.
    """
    if row.overrides is None:
        return []
    extra = tuple(extra)
    overrides = (*table.base, *row.overrides, *extra)
    starts: list[Run] | list[None] = [None] * (row.seeds if seeds is None else seeds)
    if row.after:
        starts = start_runs(row.after, len(starts), extra)
    found = []
    for seed, start in enumerate(starts):
        point = row.point | ({"init": f"{start.config.log.runs_dir}/{start.run_id}"} if start else {})
        config = replace(compose_point(overrides, point), seed=seed)
        typed = (*overrides, *(f"{k}={v}" for k, v in point.items()), f"seed={seed}")
        found.append(Run(run_id(config), typed, config, start))
    return found


def start_runs(after: str, seeds: int, extra: tuple[str, ...]) -> list[Run]:
    """The runs of `<table>:<row id>`."""
    name, _, row_id = after.partition(":")
    table = load_table(name)
    rows = {row.id: row for row in table.rows}
    if row_id not in rows:
        raise UserError(f"after: {after}: table {name} has no row '{row_id}'{nearest(row_id, list(rows))}")
    return runs_of(table, rows[row_id], seeds=seeds, extra=extra)


def compose_point(overrides: tuple[str, ...], point: dict[str, Any]) -> Config:
    """The configuration of `overrides` with these dotted keys set.

    Composing takes tenths of a second and a sweep has hundreds of points, so one composition, with a marker in the
    place of every value, shows which leaves of the configuration follow which key; the values are then filled in.
    """
    markers = {key: marker_like(value, i) for i, (key, value) in enumerate(point.items())}
    template = compose_once((*overrides, *(f"{key}={marker}" for key, marker in markers.items())))
    return fill(template, {marker: point[key] for key, marker in markers.items()})


def marker_like(value: Any, i: int) -> Any:
    """A value of the same type that stands nowhere else."""
    return f"marker-{i}" if isinstance(value, str) else type(value)(98765432 + i)


def fill(node: Any, values: dict[Any, Any]) -> Any:
    """A configuration with every marker replaced by its value, as the type that the field has."""
    if is_dataclass(node) and not isinstance(node, type):
        return replace(node, **{f.name: fill(getattr(node, f.name), values) for f in fields(node)})
    if isinstance(node, (list, dict, bool)) or node not in values:
        return node
    kind: Any = type(node)
    return kind(values[node])


@cache
def compose_once(overrides: tuple[str, ...]) -> Config:
    """compose_config, remembered."""
    return compose_config(list(overrides))


def unique_runs(tables: Iterable[Table], *, seeds: int | None = None, extra: Iterable[str] = ()) -> dict[str, Run]:
    """All runs of some tables by run id, each once, after the run whose weights it starts from.

    The first seed of every row comes before the second of any, so that an interrupted plan is evenly filled.
    """
    extra = tuple(extra)
    rows = [runs_of(table, row, seeds=seeds, extra=extra) for table in tables for row in table.rows]
    in_turn = [run for turn in itertools.zip_longest(*rows) for run in turn if run is not None]
    return {run.run_id: run for wanted in in_turn for run in (wanted.after, wanted) if run is not None}
