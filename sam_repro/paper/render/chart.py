"""A line chart as inline SVG, for the report: no library, the same bytes on every machine."""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 260, 120, 44, 16, 8

Line = tuple[str, list[tuple[float, float]]]  # CSS class, points


def line_chart(title: str, lines: list[Line], *, digits: int = 3) -> str:
    """A small figure with its title as caption; the empty string where there is nothing to draw."""
    points = [p for _, line in lines for p in line]
    if len(points) < 2:
        return ""
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    room = 0.05 * (y1 - y0) or abs(y1) or 1.0
    y0, y1 = y0 - room, y1 + room

    def place(x: float, y: float) -> str:
        px = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - 6)
        py = TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    drawn = "".join(
        f'<polyline class="{name}" points="{" ".join(place(x, y) for x, y in line)}"/>' for name, line in lines
    )
    labels = [
        f'<text x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{short(y1 - room, digits)}</text>',
        f'<text x="{LEFT - 4}" y="{HEIGHT - BOTTOM}" text-anchor="end">{short(y0 + room, digits)}</text>',
        f'<text x="{WIDTH - 6}" y="{HEIGHT - 3}" text-anchor="end">{x1:g}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 3}">step {x0:g}</text>',
    ]
    axes = f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - 6}"/>'
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{axes}{drawn}'
        f"{''.join(labels)}</svg><figcaption>{escape(title)}</figcaption></figure>"
    )


def short(value: float, digits: int) -> str:
    """A number of few characters."""
    return f"{value:.{digits}g}"
