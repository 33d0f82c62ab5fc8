"""The pictures of `sam-repro sharpness`: each fills a figure from the numbers that its JSON file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sam_repro.errors import plural
from sam_repro.paper.toys.surface import draw_toy, trajectories

Numbers = dict[str, Any]


def eigen(figure: Any, numbers: Numbers) -> None:
    """The first eigenvalue at either end after each product."""
    ax = figure.add_subplot(title="Convergence of Lanczos", xlabel="products with the Hessian")
    for which in ("top", "bottom"):
        history = numbers[which]["history"]
        ax.plot(range(1, len(history) + 1), history, label=which)
    ax.set_ylabel("first eigenvalue")
    ax.legend(frameon=False)


def gap(figure: Any, numbers: Numbers) -> None:
    """2h/rho^2 and its parts over rho, and the eigenvalue."""
    rows = numbers["rows"]
    ax = figure.add_subplot(title="What the surrogate gap says about curvature", xlabel="rho", xscale="log")
    for key, label in (("estimate", "2h/rho^2"), ("first_order", "2|g|/rho"), ("curvature", "their difference")):
        ax.plot([row["rho"] for row in rows], [row[key] for row in rows], marker="o", label=label)
    ax.axhline(numbers["sigma_max"], linestyle="--", linewidth=1, label="sigma_max (Lanczos)")
    ax.set_yscale("symlog")
    ax.legend(frameon=False)


def spectrum(figure: Any, numbers: Numbers) -> None:
    """The smoothed density of all eigenvalues."""
    ax = figure.add_subplot(title="Spectral density of the Hessian", xlabel="eigenvalue", yscale="log")
    ax.plot(numbers["grid"], [max(value, 1e-8) for value in numbers["density"]])


def slices(figure: Any, numbers: Numbers) -> None:
    """The loss along a direction and over a plane."""
    left, right = figure.subplots(1, 2)
    amounts = numbers["amounts"]
    left.plot(amounts, numbers["line"])
    left.set(title="Along one direction", xlabel="filter norms", ylabel="training loss")
    if len(amounts) > 1:
        contours = right.contourf(amounts, amounts, numbers["plane"], levels=20, cmap="cividis")
        figure.colorbar(contours, ax=right, shrink=0.8)
    right.set(title="Over two", xlabel="filter norms", aspect="equal")


def convergence(figure: Any, numbers: Numbers) -> None:
    """The power method, iteration by iteration."""
    left, right = figure.subplots(1, 2)
    for start in numbers["starts"]:
        left.plot(start["cosine"])
        right.plot([q / numbers["eigenvalues"][0] for q in start["quotient"]])
    left.set(title="|cos| with the eigenvector", xlabel="power iterations", ylim=(0, 1.02))
    right.set(title="Rayleigh quotient over λ", xlabel="power iterations")


def decay(figure: Any, numbers: Numbers) -> None:
    """How well old eigenvectors still fit, by age and over training."""
    left, right = figure.subplots(1, 2)
    ages, means = numbers["ages"], numbers["means"]
    for key, label in (("cosine", "|cos| with today's"), ("quality", "v'Hv / λ")):
        left.plot(list(means), [mean[key] for mean in means.values()], marker="o", label=label)
    usual = max(ages, key=lambda age: len(ages[age]["step"]))
    right.plot(ages[usual]["step"], ages[usual]["cosine"], marker="o")
    left.set(title="Mean over training", xlabel="age of the eigenvector, steps", ylim=(0, 1.05))
    right.set(title=f"|cos| after {plural(usual, 'step')}", xlabel="training step", ylim=(0, 1.05))
    left.legend(frameon=False)


def alignment(figure: Any, numbers: Numbers) -> None:
    """Alignment and eigenvalue over training."""
    left, right = figure.subplots(1, 2)
    left.plot(numbers["step"], numbers["alignment"], marker="o")
    right.plot(numbers["step"], numbers["lambda_max"], marker="o")
    left.set(title="|cos(ε, v)|, mean over groups", xlabel="training step", ylim=(0, 1.02))
    right.set(title="λ_max", xlabel="training step")


def toy(figure: Any, numbers: Numbers) -> None:
    """The toy surface with the trajectories."""
    draw_toy(figure.add_subplot(title="Two sharp wells on the way to a flat minimum"), trajectories())


def sde(figure: Any, numbers: Numbers) -> None:
    """Mean loss and top eigenvalue of SAM and the SDEs."""
    left, right = figure.subplots(1, 2)
    for name, losses in numbers["loss"].items():
        left.plot(numbers["steps"], losses, label=name)
        right.plot(numbers["steps"], numbers["top_eigenvalue"][name], label=name)
    left.set(title="Mean loss", xlabel="SAM steps")
    right.set(title="Top eigenvalue", xlabel="SAM steps")
    left.legend(frameon=False)


DRAW: dict[str, Callable[[Any, Numbers], None]] = {
    "eigen": eigen,
    "gap": gap,
    "spectrum": spectrum,
    "slice": slices,
    "convergence": convergence,
    "decay": decay,
    "alignment": alignment,
    "toy": toy,
    "sde": sde,
}
