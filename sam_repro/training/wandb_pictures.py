"""A run's curves as one picture, from the records of its log."""

from __future__ import annotations

import io
from typing import Any

from sam_repro.records.log import Record, metrics_of

# panel: the metrics in it, as W&B has them; a panel without any is left out
PANELS = {
    "Loss": {"loss": "clean", "loss_robust": "perturbed"},
    "Surrogate gap h": {"surrogate_gap": "h"},
    "Accuracy, %": {},  # of the evaluation sets that there are
    "Top eigenvalue": {"sharpness/lambda_max": r"$\lambda_{\max}$", "sharpness/estimate": r"$2h/\rho^2$"},
}


def draw_curves(records: list[Record]) -> Any:
    """A PIL image of the curves over training steps, one panel per quantity; None where there is none to draw."""
    from matplotlib.figure import Figure  # without pyplot, which belongs to the main thread
    from PIL import Image

    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in metrics_of(record).items():
            curves.setdefault(name, []).append((record["step"], value))
    sets = {name: name.removesuffix("/accuracy") for name in curves if name.endswith("/accuracy")}
    panels = {title: {k: v for k, v in (names or sets).items() if k in curves} for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    figure = Figure(figsize=(3.2 * len(panels), 2.6), layout="constrained")
    for ax, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for (name, label), dash in zip(names.items(), ("-", "--", ":", "-.") * len(names), strict=False):
            ax.plot(*zip(*curves[name], strict=True), dash, marker="o" * (len(curves[name]) < 20), ms=3, label=label)
        ax.set(title=title, xlabel="step")
        ax.legend(frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return Image.open(file)
