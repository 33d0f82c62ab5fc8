"""What W&B would show of a dashboard, drawn from its runs' ledger rows: without a key, and for the manual."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from sam_repro.config.run_id import readable_name
from sam_repro.errors import plural
from sam_repro.paper.outcomes import curve
from sam_repro.paper.render.style import INK, RC, SOFT, logarithmic, mathematics
from sam_repro.records.ledger import Row, summary_of
from sam_repro.records.log import metrics_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACROSS, MOST_ROWS = 3, 12  # panels next to each other; runs in the table
WIDTH, PANEL, HEADING, LINE = 11.0, 2.1, 0.3, 0.2  # inches
SMALL = RC | {"font.size": 8, "axes.titlesize": 8.5, "axes.titlepad": 6, "axes.titleweight": "normal"}

Points = dict[float, float]  # {step: value}


def draw_preview(tree: dict[str, Any], rows: dict[str, Row]) -> Figure:
    """The table of runs, then every section with its panels.

    Args:
        tree: as render.dashboard.dashboard_of makes it.
        rows: the ledger rows that there are, by run id; what is in no row is left out.
    """
    import matplotlib
    from matplotlib.figure import Figure

    sections = [
        (s["name"], s["panels"][i : i + ACROSS]) for s in tree["sections"] for i in range(0, len(s["panels"]), ACROSS)
    ]
    runs = sorted(rows.values(), key=lambda row: -final(row, tree["columns"][0]))[:MOST_ROWS]
    heights = [LINE * (len(runs) + 2)] + [PANEL] * len(sections)
    with matplotlib.rc_context(SMALL):
        figure = Figure(figsize=(WIDTH, sum(heights) + HEADING * len(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=[h + HEADING for h in heights], squeeze=False)[:, 0]
        parts[0].suptitle(tree["name"], x=0.01, ha="left", fontweight="bold", fontsize=11)
        draw_runs(parts[0].subplots(), tree, runs)
        before = ""
        for part, (name, panels) in zip(parts[1:], sections, strict=True):
            part.suptitle(name if name != before else " ", x=0.01, ha="left", fontweight="bold", fontsize=9)
            before = name
            axes = part.subplots(1, ACROSS, squeeze=False)[0]
            for ax, panel in zip(axes, panels, strict=False):
                ax.set_title(mathematics(panel["title"]))
                DRAW[panel["kind"]](ax, panel, tree["groups"], rows)
                if not ax.has_data():
                    ax.set(xticks=[], yticks=[])
                    ax.text(0.5, 0.5, "in none of these rows", transform=ax.transAxes, ha="center", color=SOFT)
            for ax in axes[len(panels) :]:
                ax.remove()
    return figure


def draw_runs(ax: Axes, tree: dict[str, Any], runs: list[Row]) -> None:
    """The table of runs: a dot in the group's colour, the name, and the columns."""
    colours = {run: group["colour"] for group in tree["groups"] for run in group["runs"]}
    ax.set(xlim=(0, 1), ylim=(len(runs) + 0.5, -0.5))
    ax.axis("off")
    columns = tree["columns"]
    places = [1 - 0.08 * i for i in reversed(range(len(columns)))]
    ax.text(0.02, 0, f"Name ({len(runs)} of {plural(len(colours), 'run')})", color=SOFT)
    for x, name in zip(places, columns, strict=True):
        ax.text(x, 0, name.removeprefix("sharpness/"), color=SOFT, ha="right", fontsize=6)
    for y, row in enumerate(runs, 1):
        ax.plot(0.008, y - 0.2, "o", color=colours[row["run_id"]], markersize=5, clip_on=False)
        ax.text(0.02, y, readable_name(row["config"])[: int(160 - 12.8 * len(columns))], color=INK)
        for x, name in zip(places, columns, strict=True):
            value = final(row, name)
            ax.text(x, y, f"{value:.4g}" if value == value else "", ha="right")


def series(row: Row, metric: str) -> Points:
    """{step: value} of a metric as it was logged; of what a row only has the end of, one point."""
    curves = row.get("curves", {})
    train = {"step_seconds": curve(row, "step_seconds"), metric: curve(row, metric)}
    if metric == "images_per_second":
        batch = row["config"]["recipe"]["batch_size"]
        train[metric] = [batch / seconds if seconds else None for seconds in train["step_seconds"]]
    points = dict(zip(curve(row, "step"), train[metric], strict=False))
    measured = [{"step": record["step"], "sharpness": record} for record in curves.get("sharpness", [])]
    points |= {
        r["step"]: metrics_of(r)[metric] for r in [*curves.get("eval", []), *measured] if metric in metrics_of(r)
    }
    end = summary_of(row).get(metric)
    return {s: v for s, v in points.items() if s is not None and v is not None} or ({row["step"]: end} if end else {})


def final(row: Row, metric: str) -> float:
    """The value that W&B's summary has; NaN without one."""
    points = series(row, metric)
    return summary_of(row).get(metric, points[max(points)] if points else float("nan"))


def groups_of(groups: list[dict[str, Any]], rows: dict[str, Row]) -> list[tuple[str, str, list[Row]]]:
    """(name, colour, rows) of the groups that have a row."""
    varying = [len({g["path"][i] for g in groups}) > 1 for i in range(len(groups[0]["path"]))]
    names = [" ".join(itertools.compress(g["path"], varying)) or g["path"][-1] for g in groups]
    found = [
        (name, g["colour"], [rows[run] for run in g["runs"] if run in rows])
        for name, g in zip(names, groups, strict=True)
    ]
    return [group for group in found if group[2]]


def lines(ax: Axes, panel: dict[str, Any], groups: list[dict[str, Any]], rows: dict[str, Row]) -> None:
    """Over steps: the mean of each group's runs, and their range."""
    for name, colour, members in groups_of(groups, rows):
        for metric, dash in zip(panel["y"], ("-", "--"), strict=False):
            curves = [points for row in members if (points := series(row, metric))]
            steps = sorted(set.intersection(*map(set, curves))) if curves else []
            at = [[points[step] for points in curves] for step in steps]
            marker = "o" if len(steps) == 1 else ""
            ax.plot(
                steps, [statistics.fmean(v) for v in at], dash, color=colour, linewidth=1.5, marker=marker, label=name
            )
            ax.fill_between(steps, [min(v) for v in at], [max(v) for v in at], color=colour, alpha=0.15, linewidth=0)
    if panel.get("log_y"):
        logarithmic(ax, "y")


def bars(ax: Axes, panel: dict[str, Any], groups: list[dict[str, Any]], rows: dict[str, Row]) -> None:
    """The end of training: a bar for each group's mean, and a line over its range."""
    found = [
        (n, c, [v for row in members if (v := final(row, panel["y"][0])) == v])
        for n, c, members in groups_of(groups, rows)
    ]
    shown = [group for group in found if group[2]]
    for y, (_, colour, values) in enumerate(shown):
        ax.barh(y, statistics.fmean(values), color=colour, height=0.6)
        ax.plot([min(values), max(values)], [y, y], color=INK, linewidth=1)
    ax.grid(axis="y", visible=False)
    ax.set_yticks(range(len(shown)), [name for name, _, _ in shown])
    ax.invert_yaxis()


def points(ax: Axes, panel: dict[str, Any], groups: list[dict[str, Any]], rows: dict[str, Row]) -> None:
    """The end of training over a setting: a dot for each run."""
    node, _, key = panel["x"].partition(".")
    for _, colour, members in groups_of(groups, rows):
        at = [(row["config"][node][key], final(row, panel["y"][0])) for row in members]
        ax.plot(*zip(*at, strict=True), "o", color=colour, markersize=4)
    ax.set_xlabel(panel["x"])
    for axis, wanted in (("x", panel["log_x"]), ("y", panel.get("log_y"))):
        if wanted:
            logarithmic(ax, axis)


DRAW = {"lines": lines, "bars": bars, "points": points}
