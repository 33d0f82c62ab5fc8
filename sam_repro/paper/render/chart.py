"""A small line chart as the coordinates of an inline SVG, for the report: the same bytes on every machine."""

from __future__ import annotations

from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 260, 120, 44, 6, 16, 8

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """What the template draws, in pixels of a box of width x height."""

    title: str
    lines: list[tuple[str, str]]  # CSS class, "x,y x,y ..."
    labels: list[tuple[int, int, str, str]]  # x, y, anchor, text
    axes: tuple[str, ...] = (f"M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}",)
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(title: str, first: Points, second: Points | None = None, *, digits: int = 3) -> Chart | None:
    """A chart of one or two lines; None with fewer than two points to draw."""
    curves = {"first": first, "second": second or []}
    points = [point for curve in curves.values() for point in curve]
    if len(points) < 2:
        return None
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = 0.05 * (high - low) or abs(high) or 1.0
    y0, y1 = low - room, high + room

    def place(x: float, y: float) -> str:
        px = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
        py = TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    lines = [(name, " ".join(place(x, y) for x, y in curve)) for name, curve in curves.items() if curve]
    labels = [
        (LEFT - 4, TOP + 8, "end", f"{high:.{digits}g}"),
        (LEFT - 4, HEIGHT - BOTTOM, "end", f"{low:.{digits}g}"),
        (WIDTH - RIGHT, HEIGHT - 3, "end", f"{x1:g}"),
        (LEFT, HEIGHT - 3, "start", f"step {x0:g}"),
    ]
    return Chart(title, lines, labels)
