"""Draw a table's curves, sweeps or dots, with the paper's own values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sam_repro.errors import UserError
from sam_repro.paper.outcomes import Cell, Outcome, curve, provenance_of
from sam_repro.paper.render.style import (
    LINE,
    METHODS,
    RC,
    SOFT,
    Mark,
    label_lines,
    logarithmic,
    marks_of,
    mathematics,
)
from sam_repro.paper.spec import UNREADABLE, Column, Table
from sam_repro.paper.statistics import Interval, interval
from sam_repro.paper.toys.surface import draw_toy, trajectories
from sam_repro.records.ledger import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# metric of a training curve: (title, what it is)
METRICS = {
    "surrogate_gap": ("Surrogate gap h", "fₚ(w) − f(w) at the run's own ρ"),
    "cosine": ("cos θ", "θ: angle between ∇f and ∇fₚ"),
    "loss": ("Training loss f", "clean pass"),
    "grad_norm": ("‖∇f‖", "clean pass"),
    "rho": ("Radius ρ", "of the perturbation"),
}


def has_number(o: Outcome) -> bool:
    """Whether the paper prints a number for the row that our sources hold."""
    return any(isinstance(value, (int, float)) for value in o.row.printed.values())


def draw(table: Table, outcomes: list[Outcome]) -> Figure:
    """The figure of a table."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(RC):
        return DRAW[table.figure.get("kind", "dots")](table, outcomes)


def draw_surface(table: Table, outcomes: list[Outcome]) -> Figure:
    """GSAM's Fig. 3, computed on the spot: nothing is trained."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.add_subplot()
    ax.set_title(f"{table.title}\n", fontweight="bold")
    ax.text(
        0, 1.02, "our surface and settings: the paper prints neither", transform=ax.transAxes, color=SOFT, fontsize=9
    )
    draw_toy(ax, trajectories())
    plt.close(figure)
    return figure


def panels_figure(table: Table, outcomes: list[Outcome], n: int) -> tuple[Figure, list[Axes]]:
    """An empty figure of n panels with title and provenance."""
    import matplotlib.pyplot as plt

    columns = 2 if n == 4 else min(n, 3)
    inches = min(9.4, max(6.4, 4.1 * columns + 0.6))  # wider, and letters are too small in a README
    figure, grid = plt.subplots(-(-n // columns), columns, figsize=(inches, 3.5), squeeze=False)
    axes = list(grid.flat)
    for ax in axes[n:]:
        ax.axis("off")
    left = axes[0].get_position().x0
    size = min(13, 130 * (0.95 - left) * inches / len(table.title))  # a long title in smaller letters, not a wider page
    figure.text(left, 0.99, table.title, fontsize=size, fontweight="bold", va="top")
    p = provenance_of(outcomes)
    legend = [bars_words(table, len(p.seeds)) if p else "no run yet"] + ["◇ the paper's value"] * any(
        map(has_number, outcomes)
    )
    where = [*p.hardware, f"commit {', '.join(p.commits)}"] if p else []
    legend = "\n".join([" · ".join(legend), " · ".join(where)])
    figure.text(left, 0, legend, fontsize=8, color=SOFT, va="top", linespacing=1.5)
    plt.close(figure)
    return figure, axes[:n]


def arrange(
    figure: Figure, ax: Axes, panel: float, *, above: float = 0.8, below: float = 0.55, **spaces: float
) -> None:
    """Set the heights in inches: of a panel, of what stands above all and of what stands below each."""
    rows = ax.get_subplotspec().get_gridspec().nrows  # pyright: ignore
    between = below + 0.3
    height = above + rows * panel + (rows - 1) * between + below
    figure.set_figheight(height)
    figure.subplots_adjust(top=1 - above / height, bottom=below / height, hspace=between / panel, **spaces)


def bars_words(table: Table, seeds: int) -> str:
    """What dots and bars are, true of every panel of the figure."""
    if seeds < 2:
        return "one seed"
    if table.figure.get("kind") == "curves":
        return f"line and band: mean and 95 % interval over {seeds} seeds"
    magnitudes = [c.magnitude for c in columns_of(table)]
    legend = ["mean and 95 % interval"] * (not all(magnitudes))
    legend += [("on logarithmic axes " if legend else "") + "geometric mean and range"] * any(magnitudes)
    return f"dots and bars, over {seeds} seeds: {', '.join(legend)}"


# ---- curves over training steps ------------------------------------------------------------------------------------


def draw_curves(table: Table, outcomes: list[Outcome]) -> Figure:
    """One panel per metric or evaluation set, one line per row."""
    panels = table.figure.get("panels", [table.columns[0].name, *list(METRICS)[:2]])
    figure, axes = panels_figure(table, outcomes, len(panels))
    arrange(figure, axes[0], 2.1, above=0.95, wspace=0.5)
    titles = {c.name: c.title for c in table.columns}
    marks = marks_of({name_of(o): method_key(o) for o in outcomes})
    for ax, panel in zip(axes, panels, strict=True):
        if panel not in titles and panel not in METRICS:
            raise UserError(f"table {table.name}: '{panel}' is neither a column nor one of {', '.join(METRICS)}")
        title, what = METRICS.get(panel, ("Accuracy", f"{titles.get(panel)}, % correct"))
        ax.set_title(f"{title}\n", loc="left")
        ax.text(0, 1.03, what, transform=ax.transAxes, color=SOFT, fontsize=9)
        ax.set_xlabel("training step")
        ends, lows, highs = [], [], []
        for o in outcomes:
            if panel in METRICS and panel != "loss" and o.row.method_id == "vanilla":
                continue  # without a perturbation there is no gap and no angle
            points = band([line_of(row, panel) for row in o.ledger if row["status"] == "done"])
            if not points:
                continue
            xs, mids, los, his = zip(*points, strict=True)
            colour, marker, dash = marks[name_of(o)]
            start = 0.1 * list(marks).index(name_of(o)) / len(marks)  # so that shapes of lines that meet stay apart
            style = {"color": colour, "linestyle": dash, "marker": marker, "markevery": (start, 0.1)}
            ax.plot(xs, mids, **style, markersize=5, label=name_of(o), solid_capstyle="round")
            ax.fill_between(xs, los, his, color=colour, alpha=0.15, linewidth=0)
            ends.append((xs[-1], mids[-1], o.row.series or o.row.method.split(" (")[0], colour))
            late = len(xs) // 10  # the first steps are a transient that would flatten the rest
            lows.append(min(mids[late:]))
            highs.append(max(mids[late:]))
        if lows:
            room = 0.08 * (max(highs) - min(lows) or 1)
            ax.set_ylim(min(lows) - room, max(highs) + room)
            ax.set_xlim(left=0, right=max(end[0] for end in ends))
        empty_or_labels(ax, ends, outcomes)
    return figure


def line_of(row: Row, panel: str) -> dict[int, float]:
    """{step: value} of one run: a training metric, or the accuracy in % on an evaluation set."""
    if panel in METRICS:
        steps = curve(row, "step")
        return {int(s): v for s, v in zip(steps, curve(row, panel), strict=False) if s is not None and v is not None}
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


def method_key(o: Outcome) -> str:
    """The method that a row's mark is of: as its id says, or its series, or its runs' optimizer."""
    series = o.row.series.split(",")[0].lower().replace("-", "_")
    names = [o.row.method_id, series, *(run.config.optim.name for run in o.runs[:1])]
    return next((name for name in names if name in METHODS), o.row.method_id)


def name_of(o: Outcome) -> str:
    """What a row's mark goes by: its series in a figure that has several of a method, else its method."""
    return o.row.series or o.row.method_id


# ---- sweeps: a value against a hyper-parameter ---------------------------------------------------------------------


def draw_sweep(table: Table, outcomes: list[Outcome]) -> Figure:
    """One panel per column, and per model where the table asks for `by_model`; one line per series."""
    models = list(dict.fromkeys(o.row.model for o in outcomes)) if table.figure.get("by_model") else [""]
    panels = [(column, model) for column in columns_of(table) for model in models]
    figure, axes = panels_figure(table, outcomes, len(panels))
    arrange(figure, axes[0], 2.1, wspace=0.5)
    marks = marks_of({o.row.series: method_key(o) for o in outcomes})
    drawn: dict[str, Mark] = {}
    crowded = len(panels) > 1 and max(map(len, marks)) > 12
    for ax, (column, model) in zip(axes, panels, strict=True):
        shown = [o for o in outcomes if model in ("", o.row.model)]
        shown = [o for o in shown if cell_of(o, column).ours or has_number(o)] or shown  # no empty stretch of an axis
        ax.set_title(f"{model}: {title_of(column)}" if model else title_of(column))
        sweep_axes(ax, table, column, shown)
        xs = [x for o in shown if (x := abscissa(o)) is not None] or [0.0, 1.0]
        ends, left, right = [], min(xs), max(xs)
        for i, (name, mark) in enumerate(marks.items()):
            line = [o for o in shown if o.row.series == name]
            # On a linear axis bars at the same x stand next to each other.
            aside = 0.0 if table.figure.get("log_x") else 0.012 * (right - left or 0.2) * (i - (len(marks) - 1) / 2)
            end = draw_series(ax, column, line, right, aside, name=name, mark=mark)
            if end is not None:
                ends.append((*end, name, mark.colour))
                drawn[name] = mark
        if not ends or not crowded:
            empty_or_labels(ax, ends, shown)
    if crowded:
        label_methods(figure, axes[0], list((drawn or marks).items()), panel=2.1, wspace=0.2)
    return figure


def abscissa(outcome: Outcome) -> float | None:
    """A row's x, where it has a number."""
    return outcome.row.x if isinstance(outcome.row.x, (int, float)) else None


def sweep_axes(ax: Axes, table: Table, column: Column, outcomes: list[Outcome]) -> None:
    """Scales, ticks and names of a sweep's axes."""
    if column.magnitude:
        logarithmic(ax, "y")
    ax.set_xlabel(mathematics(table.figure.get("x_title", "")))
    if table.figure.get("log_x"):
        ax.set_xscale("log")
        at = sorted({x for o in outcomes if (x := abscissa(o)) is not None})
        apart = [x for i, x in enumerate(at) if not i or x > 1.45 * at[i - 1]]  # labels closer than this overlap
        ax.set_xticks(apart, [f"{x:g}" for x in apart], minor=False)
        ax.set_xticks([], minor=True)
    elif xs := sorted({x for o in outcomes if (x := abscissa(o)) is not None}):
        ax.set_xlim(*limits(xs))
        if len(xs) <= 5:
            ax.set_xticks(xs, [f"{x:g}" for x in xs])


def draw_series(
    ax: Axes, column: Column, line: list[Outcome], right: float, aside: float, *, name: str, mark: Mark
) -> tuple[float, float] | None:
    """One line with its bars and the paper's values, or a level where rows have no x; returns the end to label.

    Args:
        right: the abscissa at which a level is labelled.
        aside: how far the line is moved along x, so that its bars do not hide others'.
    """
    end = None
    points = sorted(((x, cell_of(o, column)) for o in line if (x := abscissa(o)) is not None), key=lambda p: p[0])
    ours = [(x, cell.ours) for x, cell in points if cell.ours is not None]
    if ours:
        xs, means = [x + aside for x, _ in ours], [at.mean for _, at in ours]
        style = {"color": mark.colour, "marker": mark.marker, "markersize": 5.5, "linestyle": mark.dash}
        ax.errorbar(xs, means, bars([at for _, at in ours]), elinewidth=1, label=name, **style)
        end = xs[-1], means[-1]
    for x, cell in points:
        if isinstance(cell.printed, (int, float)):
            ax.plot(x, cell.printed, **PRINTED)
    for o in line:  # without an abscissa: a level to compare with
        level = cell_of(o, column).ours
        if abscissa(o) is None and level is not None:
            style = {"color": mark.colour, "marker": mark.marker, "markersize": 4, "markevery": [0]}
            ax.axhline(level.mean, linestyle="--", linewidth=1.2, clip_on=False, label=name, **style)
            end = right, level.mean
    return end


# ---- dots: methods under each other -------------------------------------------------------------------------------


def draw_dots(table: Table, outcomes: list[Outcome]) -> Figure:
    """One panel per column; a line per model with a dot per method, or a line per method where there is one model."""
    panels = columns_of(table)
    figure, axes = panels_figure(table, outcomes, len(panels))
    one_model = len({o.row.model for o in outcomes}) == 1
    known = [o for o in outcomes if o.ledger or has_number(o)] or outcomes  # no empty lines
    lines = list(dict.fromkeys(o.row.method if one_model else o.row.model for o in known))
    marks = marks_of({o.row.method_id: method_key(o) for o in known})
    methods = [] if one_model else list(marks)
    offsets = {
        m: 0.7 * ((i + 0.5) / len(methods) - 0.5) for i, m in enumerate(methods)
    }  # so that intervals do not overlap
    panel = max(0.8, max(0.3, 0.15 * len(methods)) * len(lines))
    if one_model:
        arrange(figure, axes[0], panel, below=0.32, wspace=0.12)
    else:
        key = {o.row.method_id: o.row.method.split(" (")[0] for o in reversed(known)}
        label_methods(figure, axes[0], [(key[m], mark) for m, mark in marks.items()], panel, below=0.32, wspace=0.12)
    for ax, column in zip(axes, panels, strict=True):
        ax.set_title(title_of(column))
        if column.magnitude:
            logarithmic(ax, "x")
        ax.grid(axis="y", visible=False)
        ax.margins(x=0.07)
        ax.hlines(range(len(lines)), 0, 1, transform=ax.get_yaxis_transform(), color=LINE, linewidth=0.6, zorder=0)
        ax.set_ylim(len(lines) - 0.4, -0.6)
        ax.set_yticks(
            range(len(lines)),
            map(mathematics, lines) if ax.get_position().x0 == axes[0].get_position().x0 else [""] * len(lines),
        )
        drawn = False
        for o in known:
            y, cell = lines.index(o.row.method if one_model else o.row.model), cell_of(o, column)
            y, (colour, marker, _) = y + offsets.get(o.row.method_id, 0), marks[o.row.method_id]
            if isinstance(cell.printed, (int, float)):
                ax.plot(cell.printed, y, **PRINTED | {"markeredgecolor": colour})
                drawn = True
            if cell.ours is not None:
                style = {"color": colour, "marker": marker, "markersize": 6.5, "label": o.row.method_id}
                ax.errorbar(cell.ours.mean, y, xerr=bars([cell.ours]), **style)
                drawn = True
        if not drawn:
            ax.set_xticks([])
            ax.text(0.5, 0.5, "no value yet", transform=ax.transAxes, ha="center", va="center", color=SOFT)
    return figure


def bars(intervals: list[Interval]) -> tuple[list[float], list[float]]:
    """What error bars reach below and above: the interval, or a magnitude's range over seeds."""
    ends = [at.span or (at.mean - (at.half or 0), at.mean + (at.half or 0)) for at in intervals]
    below = [max(0.0, at.mean - low) for at, (low, _) in zip(intervals, ends, strict=True)]
    return below, [max(0.0, high - at.mean) for at, (_, high) in zip(intervals, ends, strict=True)]


def title_of(column: Column) -> str:
    """A panel's title."""
    return mathematics(f"{column.title}, {column.unit}" if column.unit else column.title)


def label_methods(figure: Figure, ax: Axes, key: list[tuple[str, Mark]], panel: float, **room: float) -> None:
    """Marks and names under the title, in as many lines as they need, and the panels below them."""
    from matplotlib.lines import Line2D

    left, inches, sample = ax.get_position().x0, figure.get_figwidth(), 0.3
    texts, line, x = [], 0, left
    for title, mark in key:
        text = figure.text(0, 0, mathematics(title), color=mark.colour, fontweight="bold", va="center")
        width = (sample + 0.08) / inches + text.get_window_extent().width / figure.dpi / inches
        if x + width > 0.98 and x > left:
            x, line = left, line + 1
        texts.append((text, mark, x, line))
        x += width + 0.2 / inches
    arrange(figure, ax, panel, above=1.0 + 0.2 * line, **room)
    for text, (colour, marker, dash), x, line in texts:
        y = 1 - (0.42 + 0.2 * line) / figure.get_figheight()
        text.set_position((x + (sample + 0.08) / inches, y))
        style = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 6, "linewidth": 1.6}
        xs = [x, x + sample / 2 / inches, x + sample / inches]
        figure.add_artist(Line2D(xs, [y] * 3, markevery=[1], transform=figure.transFigure, **style))


PRINTED = {"marker": "D", "markersize": 6, "markerfacecolor": "none", "markeredgecolor": SOFT, "linestyle": "none"}


def columns_of(table: Table) -> list[Column]:
    """The columns that the figure shows."""
    by_name = {c.name: c for c in table.columns}
    return [by_name[name] for name in table.figure.get("panels", list(by_name))]


def cell_of(o: Outcome, column: Column) -> Cell:
    """A row's cell in a column."""
    return next(cell for cell in o.cells if cell.column is column)


def empty_or_labels(ax: Axes, ends: list[tuple[float, float, str, str]], outcomes: list[Outcome]) -> None:
    """Label the lines, or say that there are none and why."""
    label_lines(ax, ends)
    if not ends:
        xs = [o.row.x for o in outcomes if isinstance(o.row.x, (int, float))]
        ax.set_xlim(*limits(xs or [0, 1]))
        ax.set_yticks([])
        unread = any(cell.verdict == UNREADABLE for o in outcomes for cell in o.cells)
        text = "no run yet; the paper's values\nare not in our sources" if unread else "no run yet"
        ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color=SOFT)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of some values with a little room."""
    room = 0.05 * (max(values) - min(values) or 1)
    return min(values) - (room if min(values) > room else 0), max(values) + room


DRAW = {"curves": draw_curves, "sweep": draw_sweep, "dots": draw_dots, "toy": draw_surface}
