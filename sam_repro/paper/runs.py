"""The training runs that a table asks for: overrides composed into configurations, each run named once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_repro.config.compose import choices, compose_config, nearest
from sam_repro.config.run_id import run_id
from sam_repro.config.schema import Config
from sam_repro.errors import UserError
from sam_repro.paper.spec import Table, TableRow, load_table


@dataclass(frozen=True)
class Run:
    """One training run that a row wants."""

    run_id: str
    overrides: tuple[str, ...]  # what stands after `python train.py`
    config: Config = field(repr=False, compare=False)
    after: Run | None = None  # the run whose weights this one starts from


def runs_of(
    table: Table, row: TableRow, *, seeds: int | None = None, extra: Iterable[str] = (), ledger: Path | None = None
) -> list[Run]:
    """The runs of a row, by seed; none where the row has nothing to run, or waits for a sweep.

    Args:
        seeds: instead of the row's own number.
        extra: overrides laid over the row's.
        ledger: folder of ledger rows, for a sweep's winner; None: where the sweep's runs say.
    """
    if row.overrides is None:
        return []
    extra = tuple(extra)
    if row.tuned:
        point = winning_point(row.tuned, extra, ledger)
        if point is None:
            return []
        row = replace(row, point=point | row.point)
    assert row.overrides is not None
    overrides = (*table.base, *row.overrides, *extra)
    starts: list[Run] | list[None] = [None] * (row.seeds if seeds is None else seeds)
    if row.after:
        starts = start_runs(row.after, len(starts), extra)
    found = []
    for seed, start in enumerate(starts):
        point = row.point | ({"init": f"{start.config.log.runs_dir}/{start.run_id}"} if start else {})
        config = replace(compose_point(overrides, point), seed=seed)
        typed = (*overrides, *words_of(point), f"seed={seed}")
        found.append(Run(run_id(config), typed, config, start))
    return found


def winning_point(tuned: str, extra: tuple[str, ...], ledger: Path | None) -> dict[str, Any] | None:
    """The point of the sweep `<table>:<model>/<method>` that won on the table's `select`, or None before it is over."""
    from sam_repro.paper.outcomes import outcome, winners  # which imports this module

    name, _, sweep = tuned.partition(":")
    table = load_table(name)
    rows = [row for row in table.rows if row.point and row.id.rpartition("/")[0] == sweep]
    if not rows or not table.select:
        raise UserError(f"tuned: {tuned}: table {name} has no `select`, or no sweep '{sweep}'")
    found = [outcome(table, row, ledger, seeds=None, extra=extra) for row in rows]
    if any(len(o.ledger) < len(o.runs) for o in found):
        return None
    best = winners(table, found)
    return best[0].outcome.row.point if best else None


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
    Only numbers and words have markers; switches, lists and choices of files are composed one by one.
    """
    marked = [key for key, value in point.items() if type(value) in (int, float, str) and not choices(key)]
    markers = {key: marker_like(point[key], i) for i, key in enumerate(marked)}
    template = compose_once((*overrides, *words_of(point | markers)))
    return fill(template, {marker: point[key] for key, marker in markers.items()})


def words_of(point: dict[str, Any]) -> tuple[str, ...]:
    """Overrides, as they are typed."""
    return tuple(f"{key}={'null' if value is None else value}" for key, value in point.items())


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


def unique_runs(
    tables: Iterable[Table], *, seeds: int | None = None, extra: Iterable[str] = (), ledger: Path | None = None
) -> dict[str, Run]:
    """All runs of some tables by run id, each once, after the run whose weights it starts from.

    The first seed of every row comes before the second of any, so that an interrupted plan is evenly filled.
    """
    extra = tuple(extra)
    wanted_rows = [(table, row) for table in tables for row in table.rows]
    bar = tqdm(wanted_rows, desc="rows", leave=False, disable=None, delay=1)  # composing hundreds takes a minute
    rows = [runs_of(table, row, seeds=seeds, extra=extra, ledger=ledger) for table, row in bar]
    in_turn = [run for turn in itertools.zip_longest(*rows) for run in turn if run is not None]
    return {run.run_id: run for wanted in in_turn for run in (wanted.after, wanted) if run is not None}
