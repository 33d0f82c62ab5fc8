"""What came out of a row of a table, from its runs and their ledger rows: data that all renderers share."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_repro.config.compose import compose_config
from sam_repro.config.schema import Config
from sam_repro.paper.runs import Run
from sam_repro.paper.spec import Column, Table, TableRow
from sam_repro.paper.statistics import Comparison, Interval, compare, interval, magnitudes
from sam_repro.records.ledger import Row
from sam_repro.records.lock import is_held


@dataclass(frozen=True)
class Cell:
    """One number of a table and the paper's."""

    column: Column
    ours: Interval | None
    printed: float | str | None
    verdict: str

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        if self.ours is None or not isinstance(self.printed, (int, float)):
            return None
        return self.ours.mean - self.printed


@dataclass(frozen=True)
class Outcome:
    """One row of a table with its runs and their ledger rows."""

    row: TableRow
    runs: tuple[Run, ...]
    ledger: tuple[Row, ...]  # of the runs that finished or diverged
    state: str  # nothing to run | pending | running 40 % | partial | done | diverged
    cells: tuple[Cell, ...]

    def by_seed(self, column: Column) -> dict[int, float]:
        """{seed: value} of the runs that are done."""
        values = {row["seed"]: value_of(row, column) for row in self.ledger if row["status"] == "done"}
        return {seed: value for seed, value in values.items() if value is not None}

    def metric(self, name: str) -> float | None:
        """Mean over seeds of the last logged value of a training curve: surrogate_gap, cosine, ..."""
        ends = [last(row, name) for row in self.ledger if row["status"] == "done"]
        ends = [end for end in ends if end is not None]
        return statistics.fmean(ends) if ends else None

    @property
    def step_ms(self) -> float | None:
        """Median milliseconds per step, over all logged intervals of all seeds."""
        alone = [row for row in self.ledger if row.get("sharing", 1) == 1]  # several runs on a GPU slow each other
        times = [t for row in alone for t in curve(row, "step_seconds") if t is not None]
        return 1000 * statistics.median(times) if times else None


def state_of(runs: list[Run], rows: list[Row]) -> str:
    """One word on the runs of a row."""
    if not runs:
        return "nothing to run"
    if any(row["status"] == "diverged" for row in rows):
        return "diverged"
    if len(rows) == len(runs):
        return "done"
    if any(is_running(r) for r in runs):
        return "running"
    return "partial" if rows else "pending"


def is_running(r: Run) -> bool:
    """Whether a process on this machine or file system holds the run's lock and shows signs of life."""
    return is_held(Path(r.config.log.runs_dir) / r.run_id)


def summary(values: list[float], column: Column) -> Interval | None:
    """Mean and interval of a column's values; for magnitudes geometric mean and range. None without values."""
    return (magnitudes if column.magnitude else interval)(values) if values else None


def value_of(row: Row, column: Column) -> float | None:
    """A column's value in a ledger row: accuracy in % from counts, or what the dotted path leads to.

    `last.<metric>` is the last logged value of a training curve.
    """
    if column.value is None:
        counts = row["evals"].get(column.name)
        return 100 * counts["correct"] / counts["total"] if counts and counts["total"] else None
    node: Any = row
    if column.value.startswith("last."):
        node = last(row, column.value.removeprefix("last."))
    else:
        for key in column.value.split("."):
            node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, (int, float)):
        return None
    return abs(float(node)) if column.magnitude else float(node)


def computed(row: TableRow, column: Column) -> float | None:
    """A value that needs no run: a setting (Table 4), or in GSAM's toy (Fig. 3) the top eigenvalue at the end."""
    if row.settings and column.value:
        return setting(compose_config(list(row.settings)), column.value)
    if column.value != "toy.sharpness":
        return None
    from sam_repro.paper.toys.surface import descend

    return descend(row.method_id).top


def setting(cfg: Config, path: str) -> float:
    """The value at `config.<key>` of a configuration; recipe.lr_min is the learning rate at the end."""
    if path == "config.recipe.lr_min":
        return cfg.recipe.lr * cfg.recipe.lr_min_ratio
    node: Any = cfg
    for key in path.removeprefix("config.").split("."):
        node = getattr(node, key)
    return float(node)


def is_as_printed(value: float, printed: float | str | None) -> bool:
    """Whether a setting is the printed one, all its digits."""
    return isinstance(printed, (int, float)) and abs(value - printed) <= 1e-9


def curve(row: Row, name: str) -> list[float | None]:
    """A training curve of a ledger row, empty where it has none."""
    return row.get("curves", {}).get("train", {}).get(name, [])


def last(row: Row, name: str) -> float | None:
    """The last value of a training curve: the mean over the last logging interval."""
    values = curve(row, name)
    return values[-1] if values else None


@dataclass(frozen=True)
class Order:
    """Whether one method beats the one before it, for one model."""

    model: str
    worse: str
    better: str
    comparison: Comparison | None


def order_of_methods(table: Table, outcomes: list[Outcome]) -> list[Order]:
    """Every neighbouring pair of `table.order`, model by model, on the first column, paired by seed."""
    by_id = {o.row.id: o for o in outcomes}
    models = list(dict.fromkeys(o.row.id.split("/")[0] for o in outcomes))
    pairs = []
    for model in models:
        named = [by_id[f"{model}/{method}"] for method in table.order if f"{model}/{method}" in by_id]
        for worse, better in zip(named, named[1:], strict=False):
            tested = compare(worse.by_seed(table.columns[0]), better.by_seed(table.columns[0]))
            pairs.append(Order(worse.row.model, worse.row.method, better.row.method, tested))
    return pairs


@dataclass(frozen=True)
class Winner:
    """The best point of a sweep on the evaluation set that selects."""

    outcome: Outcome
    score: float  # mean over seeds, in %
    measured: int  # points of the sweep that have a run
    points: int


def winners(table: Table, outcomes: list[Outcome]) -> list[Winner]:
    """The winner of every sweep, <model>/<method>, on `table.select`; the test set has no say.

    A point of which any seed diverged cannot win by the seeds that did not.
    """
    if not table.select:
        return []
    chooser = Column(table.select, table.select)
    sweeps: dict[str, list[Outcome]] = {}
    for o in outcomes:
        if o.row.point:
            sweeps.setdefault("/".join(o.row.id.split("/")[:-1]), []).append(o)
    best = []
    for points in sweeps.values():
        sound = [o for o in points if o.state != "diverged"]
        scored = [(interval(list(values.values())).mean, o) for o in sound if (values := o.by_seed(chooser))]
        if scored:
            score, o = max(scored, key=lambda pair: pair[0])
            best.append(Winner(o, score, len(scored), len(points)))
    return best


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a table come from."""

    runs: int
    seeds: tuple[int, ...]
    commits: tuple[str, ...]  # abbreviated; "+" marks a changed checkout
    hardware: tuple[str, ...]
    versions: tuple[str, ...]
    dates: tuple[str, ...]
    hours: float


def provenance_of(outcomes: Iterable[Outcome]) -> Provenance | None:
    """The provenance of all ledger rows of a table, or None without any."""
    rows = list({row["run_id"]: row for o in outcomes for row in o.ledger}.values())
    if not rows:
        return None
    named = ("torch", "timm", "ffcv")
    versions = {f"{k} {row['versions'][k]}" for row in rows for k in named if k in row.get("versions", {})}
    days = sorted({row["finished"][:10] for row in rows if row.get("finished")})
    return Provenance(
        runs=len(rows),
        seeds=tuple(sorted({row["seed"] for row in rows})),
        commits=tuple(sorted({row["commit"][:8] + ("+" if row["dirty"] else "") for row in rows})),
        hardware=tuple(sorted({f"{row.get('world', 1)} x {row['hardware']}" for row in rows})),
        versions=tuple(sorted(versions)),
        dates=tuple(dict.fromkeys((days[0], days[-1]))) if days else (),
        hours=sum(row.get("hours", 0.0) for row in rows),
    )
