"""The toy of GSAM's Fig. 3: a surface with two sharp wells on the way to a flat minimum, and three ways down.

The paper prints neither its surface nor its step sizes. This surface, and the radius, alpha and step size, are ours,
searched for so that they show what the figure's caption says: SGD and SAM end in different sharp wells, GSAM in the
flat one. What that choice is worth: of 25 starts y = -0.6 ... 0.6 at x = -0.8, GSAM reaches the flat minimum from all,
SGD and SAM from none (tests/numerics/test_surfaces.py). It needs no torch; a test there runs the engine on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sam_repro.paper.render.style import marks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLAT = np.array([3.2, 0.0])  # centre of the broad bowl
SHARP = np.array([[1.3, -0.65], [2.2, -0.2]])  # centres of the wells
WIDTH, DEPTH, BOWL = 0.25, 0.55, 0.08
START = (-0.8, 0.1)
METHODS = {"vanilla": "SGD", "sam": "SAM", "gsam": "GSAM"}


def surface(w: np.ndarray) -> np.ndarray:
    """f(w) for w (..., 2): a broad bowl minus two narrow Gaussian wells.

    f = BOWL |w - FLAT|^2 - DEPTH sum_i exp(-|w - SHARP_i|^2 / (2 WIDTH^2))
    """
    return BOWL * np.square(w - FLAT).sum(-1) - DEPTH * wells(w).sum(-1)


def wells(w: np.ndarray) -> np.ndarray:
    """exp(-|w - SHARP_i|^2 / (2 WIDTH^2)), (..., 2 wells)."""
    return np.exp(-np.square(w[..., None, :] - SHARP).sum(-1) / (2 * WIDTH**2))


def gradient(w: np.ndarray) -> np.ndarray:
    """grad f at w (2,)."""
    return 2 * BOWL * (w - FLAT) + DEPTH / WIDTH**2 * (wells(w)[:, None] * (w - SHARP)).sum(0)


def top_eigenvalue(w: np.ndarray) -> float:
    """Of the Hessian of f at w (2,)."""
    h = 2 * BOWL * np.eye(2)
    for e, d in zip(wells(w), w - SHARP, strict=True):
        h += DEPTH / WIDTH**2 * e * (np.eye(2) - np.outer(d, d) / WIDTH**2)
    return float(np.linalg.eigvalsh(h)[-1])


@dataclass
class Path:
    """A trajectory: points (steps + 1, 2), the top Hessian eigenvalue where it ends, and which minimum that is."""

    points: np.ndarray
    top: float
    end: str


def descend(
    method: str, *, start: tuple[float, float] = START, rho: float = 0.3, alpha: float = 1.4, lr: float = 0.3,
    steps: int = 300,
) -> Path:  # fmt: skip
    """Gradient descent with one method; lr falls linearly to 0 and rho with it (GSAM paper, Algorithm 1)."""
    w = np.array(start, dtype=np.float64)
    points = [w]
    for t in range(steps):
        left = 1 - t / steps
        g = d = gradient(w)
        if method != "vanilla":
            d = g_p = gradient(w + rho * left * g / (np.linalg.norm(g) + 1e-12))
            if method == "gsam":
                d = g_p - alpha * (g - (g @ g_p) / (g_p @ g_p) * g_p)
        w = w - lr * left * d
        points.append(w)
    return Path(np.array(points), top_eigenvalue(w), where(w))


def where(w: np.ndarray) -> str:
    """The minimum that w is at, or "nowhere"."""
    names = ["first well", "second well", "flat minimum"]
    away = np.linalg.norm(np.vstack([SHARP, FLAT]) - w, axis=1)
    return names[int(away.argmin())] if away.min() < 0.3 else "nowhere"


def trajectories() -> dict[str, Path]:
    """SGD, SAM and GSAM from the same start."""
    return {method: descend(method) for method in METHODS}


def draw_toy(ax: Axes, paths: dict[str, Path]) -> None:
    """The surface, its minima and the trajectories."""
    x, y = np.meshgrid(np.linspace(-1, 4, 200), np.linspace(-1.3, 1.1, 120))
    ax.contour(x, y, surface(np.stack([x, y], -1)), levels=24, linewidths=0.6, cmap="Greys")
    for name, (colour, marker, dash) in marks_of({name: name for name in paths}).items():
        path, style = paths[name], {"color": colour, "marker": marker, "markersize": 5}
        label = f"{METHODS[name]}: {path.end}, top eigenvalue {path.top:.2f}"
        ax.plot(*path.points.T, linestyle=dash, markevery=0.05, label=label, **style)
        ax.plot(*path.points[-1], **style)
    ax.scatter(*np.vstack([SHARP, FLAT]).T, marker="x", color="#1b1f24", s=18, zorder=5)
    ax.legend(frameon=False, loc="upper left")
    ax.set_aspect("equal")
    ax.grid(visible=False)


def as_data(paths: dict[str, Path]) -> dict[str, Any]:
    """The trajectories for JSON."""
    return {n: {"points": p.points.tolist(), "top_eigenvalue": p.top, "end": p.end} for n, p in paths.items()}
