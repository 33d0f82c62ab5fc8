"""Draw a table's curves, sweeps or dots as SVG and PNG, beside the paper's own values.

  sam-repro figures demo                               # runs/demo/figures/demo.svg and .png
  sam-repro figures fig7 --output /tmp/figures

Lines and dots are means over seeds; bands and bars are 95 % t-intervals. A paper's printed value is a hollow diamond.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sam_repro.errors import UserError
from sam_repro.ledger import Row
from sam_repro.paper.outcome import Outcome, curve, outcomes, provenance_of
from sam_repro.paper.spec import Table, load_table
from sam_repro.paper.stats import interval
from sam_repro.paper.style import RC, SOFT, colour_of, label_lines, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# metric of a training curve: (title, what it is)
METRICS = {
    "surrogate_gap": ("Surrogate gap h", "fₚ(w) − f(w), training batches"),
    "cosine": ("cos θ", "angle between ∇f and ∇fₚ"),
    "loss": ("Training loss f", "clean pass"),
    "grad_norm": ("‖∇f‖", "clean pass"),
    "rho": ("Radius ρ", "of the perturbation"),
}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("table", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the table's own)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder (default: figures/ beside the ledger)")


def run(args: Namespace) -> None:
    """Draw, and print where the files are."""
    table = load_table(args.table)
    found = outcomes(table, args.ledger)
    folder = args.output or beside_ledger(found, args.ledger)
    for path in save(draw(table, found), folder / table.name):
        print(path)
    if not any(o.ledger for o in found):
        print(f"no run of {table.name} is in the ledger yet: the figure shows the paper's values only", file=sys.stderr)


def beside_ledger(found: list[Outcome], ledger_dir: Path | None) -> Path:
    """figures/ in the folder that holds the ledger's."""
    runs = [r for o in found for r in o.runs]
    ledger_dir = ledger_dir or Path(runs[0].config.log.ledger_dir if runs else "results/runs")
    return ledger_dir.parent / "figures"


def draw(table: Table, found: list[Outcome]) -> Figure:
    """The figure of a table."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(RC):
        return DRAW[table.figure.get("kind", "dots")](table, found)


def panels_figure(table: Table, found: list[Outcome], n: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of n panels with title and provenance."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, n, figsize=(4.1 * n + 0.6, 3.5), squeeze=False)
    figure.subplots_adjust(wspace=0.5, top=0.77, bottom=0.2)
    left = axes[0][0].get_position().x0
    figure.text(left, 0.955, table.title, fontsize=13, fontweight="bold", va="bottom")
    p = provenance_of(found)
    said = "no run yet" if p is None else f"mean and 95 % interval over seeds {', '.join(map(str, p.seeds))}"
    if p is not None:
        said += f" · {', '.join(p.hardware)} · commit {', '.join(p.commits)}"
    figure.text(left, 0.01, said, fontsize=8, color=SOFT, va="bottom")
    plt.close(figure)
    return figure, list(axes[0])


# ---- curves over training steps ------------------------------------------------------------------------------------


def draw_curves(table: Table, found: list[Outcome]) -> Figure:
    """One panel a metric or evaluation set, one line a row."""
    panels = table.figure.get("panels", [table.columns[0].name, *list(METRICS)[:2]])
    figure, axes = panels_figure(table, found, len(panels))
    titles = {c.name: c.title for c in table.columns}
    for ax, panel in zip(axes, panels, strict=True):
        if panel not in titles and panel not in METRICS:
            raise UserError(f"table {table.name}: '{panel}' is neither a column nor one of {', '.join(METRICS)}")
        title, what = METRICS.get(panel, ("Accuracy", f"{titles.get(panel)}, % correct"))
        ax.set_title(f"{title}\n", loc="left")
        ax.text(0, 1.03, what, transform=ax.transAxes, color=SOFT, fontsize=9)
        ax.set_xlabel("training step")
        ends, lows, highs = [], [], []
        for i, o in enumerate(found):
            method = o.row.method_id
            if panel in METRICS and panel != "loss" and method == "vanilla":
                continue  # without a perturbation there is no gap and no angle
            points = band([line_of(row, panel) for row in o.ledger if row["status"] == "done"])
            if not points:
                continue
            xs, mids, los, his = zip(*points, strict=True)
            colour = colour_of(method, i)
            ax.plot(xs, mids, color=colour, solid_capstyle="round")
            ax.fill_between(xs, los, his, color=colour, alpha=0.15, linewidth=0)
            ends.append((xs[-1], mids[-1], o.row.series or o.row.method.split(" (")[0], colour))
            late = len(xs) // 10  # the first steps are a transient that would flatten the rest
            lows.append(min(mids[late:]))
            highs.append(max(mids[late:]))
        if lows:
            room = 0.08 * (max(highs) - min(lows) or 1)
            ax.set_ylim(min(lows) - room, max(highs) + room)
            ax.set_xlim(left=0, right=max(end[0] for end in ends))
        label_lines(ax, ends)
    return figure


def line_of(row: Row, panel: str) -> dict[int, float]:
    """{step: value} of one run: a training metric, or the accuracy in % on an evaluation set."""
    if panel in METRICS:
        steps = curve(row, "step")
        return {int(s): v for s, v in zip(steps, curve(row, panel), strict=True) if s is not None and v is not None}
    points = row.get("curves", {}).get("eval", [])
    return {e["step"]: 100 * e["correct"] / e["total"] for e in points if e["eval"] == panel}


def band(lines: list[dict[int, float]]) -> list[tuple[float, float, float, float]]:
    """(step, mean, low, high) at the steps that all lines share."""
    if not lines:
        return []
    points = []
    for step in sorted(set.intersection(*(set(line) for line in lines))):
        at = interval([line[step] for line in lines])
        half = at.half or 0.0
        points.append((step, at.mean, at.mean - half, at.mean + half))
    return points


DRAW = {"curves": draw_curves}
