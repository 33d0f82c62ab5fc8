"""How all our figures look: Okabe and Ito's colour-blind-safe palette, direct labels, little ink."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sam_repro.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1b1f24", "#5b6570", "#d9dee3"


class Mark(NamedTuple):
    """How a method or a series is drawn."""

    colour: str
    marker: str
    dash: str = "-"


# A method keeps its mark in every figure: relatives are shades of one hue, and no two share a shape, for grey paper.
METHODS = {
    "vanilla": Mark("#5b6570", "o"),
    "vanilla2x": Mark("#a3adb7", "<"),
    "vanilla600": Mark("#a3adb7", "<"),
    "sam": Mark("#E69F00", "s"),
    "gsam": Mark("#0072B2", "^"),
    "gsam_constant": Mark("#56B4E9", "v"),
    "eigen_sam": Mark("#009E73", "P"),
    "eigen_ascent": Mark("#00573f", "X"),
    "asam": Mark("#CC79A7", "*"),
    "asam_ascent": Mark("#8a3a68", ">"),
    "min_f_h": Mark("#D55E00", "p"),
    "weighted": Mark("#8c5a2b", "h"),
    "entropy_sgd": Mark("#6a51a3", "d"),
    "random": Mark("#b8a000", "8"),
}
# What is not above takes a colour of these in turn, and a shape that no other has in its figure.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#6a51a3", "#8c5a2b", "#5b6570")
DASHES = ("-", "--", ":", "-.")  # of the series of one method, which are shades of its colour
CYCLE = f"cycler(color={list(PALETTE[:8])}, linestyle={list(2 * DASHES)})"  # of lines that are of no method
# Symbols as they stand in tables: as mathematics.
MATHEMATICS = {
    "|λ_max|": r"$|\lambda_{\max}|$",
    "λ_max": r"$\lambda_{\max}$",
    "2h/ρ²": r"$2h/\rho^2$",
    "f_p": r"$f_p$",
}
RC = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "svg.fonttype": "none",  # text stays text: searchable, and small
    "svg.hashsalt": "sam-repro",  # the same data gives the same bytes
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


def marks_of(keys: dict[str, str]) -> dict[str, Mark]:
    """{name: mark} for {name: method}: the method's mark; several names of one method differ in shade and dash.

    A method without a mark takes the next colour and the next shape that no other has here, so none appears twice.
    """
    methods = list(dict.fromkeys(keys.values()))
    own = {m: METHODS[m] for m in methods if m in METHODS}
    colours = [c for c in PALETTE if c not in {mark.colour for mark in own.values()}] or PALETTE
    markers = dict.fromkeys(mark.marker for mark in METHODS.values())
    free = [m for m in markers if m not in {mark.marker for mark in own.values()}] or list(markers)
    others = [m for m in methods if m not in own]
    own |= {m: Mark(colours[i % len(colours)], free[i % len(free)]) for i, m in enumerate(others)}
    marks = {}
    for m in methods:
        names = [name for name, key in keys.items() if key == m]
        for i, (name, colour) in enumerate(zip(names, shades(own[m].colour, len(names)), strict=True)):
            marks[name] = Mark(colour, own[m].marker, DASHES[i % len(DASHES)])
    return {name: marks[name] for name in keys}


def shades(colour: str, n: int) -> list[str]:
    """The colour itself; of two also a darker one; of more a ramp from light to dark."""
    from matplotlib.colors import to_hex, to_rgb

    steps = [0.0, -0.5][:n] if n <= 2 else list(np.linspace(0.5, -0.6, n))
    rgb = np.array(to_rgb(colour))
    return [colour if t == 0 else to_hex(rgb + (1 - rgb) * t if t > 0 else rgb * (1 + t)) for t in steps]


def mathematics(text: str) -> str:
    """Text with its symbols set by matplotlib as mathematics."""
    for plain, symbol in MATHEMATICS.items():
        text = text.replace(plain, symbol)
    return text


def spread(positions: list[float], gap: float) -> list[float]:
    """Positions moved apart by at least `gap`, as little as possible, in the same order."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    groups: list[list[int]] = []
    centre = lambda group: sum(positions[i] for i in group) / len(group)  # noqa: E731
    for i in order:
        groups.append([i])
        while len(groups) > 1:
            below, above = groups[-2], groups[-1]
            if centre(above) - centre(below) >= gap * (len(below) + len(above)) / 2:
                break
            groups[-2:] = [below + above]
    moved = list(positions)
    for group in groups:
        for k, i in enumerate(group):
            moved[i] = centre(group) + gap * (k - (len(group) - 1) / 2)
    return moved


def logarithmic(ax: Axes, which: str) -> None:
    """A logarithmic x or y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    class Major(LogLocator):
        """1, 2 and 5 times powers of ten; over two decades and more these powers only, which are what is labelled."""

        def tick_values(self, vmin: float, vmax: float) -> list[float]:
            ticks = super().tick_values(vmin, vmax)
            return [t for t in ticks if vmax < 200 * vmin or math.log10(t).is_integer()]

    ax.set(**{f"{which}scale": "log"})
    axis = ax.xaxis if which == "x" else ax.yaxis

    def plain(value: float) -> str:
        return f"{value:,.0f}" if value >= 2 else f"{value:g}"

    def between(value: float, _: int) -> str:
        low, high = axis.get_view_interval()
        return plain(value) if high < 5 * low else ""

    axis.set_major_locator(Major(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(LogLocator(subs=(1.5, 3, 7), numticks=8))
    axis.set_minor_formatter(FuncFormatter(between))


def label_lines(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of the ends of lines, moved apart where they would overlap."""
    if not ends:
        return
    place = np.log if ax.get_yscale() == "log" else np.asarray
    low, high = place(ax.get_ylim())
    ys = spread(list(place([y for _, y, _, _ in ends])), 0.075 * (high - low))
    ys = list(np.exp(ys)) if ax.get_yscale() == "log" else ys
    x = max(x for x, _, _, _ in ends)
    style = {"fontweight": "bold", "fontsize": 9.5, "va": "center", "annotation_clip": False}
    for (_, _, text, colour), y in zip(ends, ys, strict=True):
        ax.annotate(mathematics(text), (x, y), (8, 0), textcoords="offset points", color=colour, **style)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write <stem>.svg and <stem>.png, the same bytes for the same figure; returns both paths."""
    import matplotlib

    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(RC):
            figure.savefig(paths[0], bbox_inches="tight", metadata={"Date": None})
            figure.savefig(paths[1], bbox_inches="tight", metadata={"Software": None})
    except OSError as error:
        raise UserError(f"cannot write {stem}.svg: {error}") from error
    return paths
