"""What `sam-repro sharpness` measures and draws: each gives its numbers and a function that fills a figure."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sam_repro.config.compose import read_config
from sam_repro.curvature.from_log import decay_by_age, measurements
from sam_repro.curvature.lanczos import dominant, lanczos, power_iteration, spectral_density
from sam_repro.curvature.measures import alignment, sharpness
from sam_repro.curvature.probe_images import loss_hessian, probe_batches
from sam_repro.curvature.sde import simulate
from sam_repro.curvature.slices import filter_normalised, line, plane
from sam_repro.distributed.ranks import Ranks, init_ranks
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.pretrained import read_weights
from sam_repro.optim.hessian import Hessian
from sam_repro.paper.toy import as_data, draw_toy, trajectories

Draw = Callable[[Any], None]  # fills a matplotlib figure
Numbers = dict[str, Any]


def measured(args: Namespace, folder: Path | None) -> tuple[Numbers, Draw] | None:
    """What `args.what` asks for, of a run's folder where it needs one. None on all ranks but the first."""
    if args.what in OF_NOTHING:
        return OF_NOTHING[args.what](args)
    assert folder is not None
    if args.what in OF_LOGS:
        return OF_LOGS[args.what](args, folder)
    ranks = init_ranks(args.device)
    try:
        found = of_weights(args, folder, ranks)
    finally:
        ranks.close()
    return found if ranks.main else None


def of_weights(args: Namespace, folder: Path, ranks: Ranks) -> tuple[Numbers, Draw]:
    """One measurement at a run's weights, with a count of sweeps over the images on the terminal."""
    cfg = read_config(folder / "config.yaml")
    if args.root:
        cfg.data.root = args.root
    model = build_model(cfg.model, num_classes=cfg.data.num_classes, image_size=cfg.data.image_size)
    model.load_state_dict(read_weights(args.run))
    model.to(ranks.device).eval()
    batches = probe_batches(cfg, ranks, images=args.images, batch=args.batch_size, seed=args.seed)
    hessian = loss_hessian(cfg, model, batches, ranks)
    patience = 0.1 if sys.stderr.isatty() else 30  # seconds: a log file wants a sign of life, not a film
    with tqdm(desc=args.what, unit=" sweeps", disable=not ranks.main, mininterval=patience, maxinterval=60) as bar:
        hessian.after = bar.update
        try:
            numbers, draw = OF_WEIGHTS[args.what](args, hessian)
        except ValueError as error:  # a loss that is not finite, more eigenvalues than there are
            raise UserError(str(error)) from None
    counted = ranks.sum_(torch.tensor(float(sum(len(b[0]) for b in batches)), device=ranks.device))
    about = {"run": folder.name, "weights": args.run.name, "images": int(counted.item()), "seed": args.seed}
    return about | {"products": hessian.products, "ranks": ranks.world} | numbers, draw


# ---- at a run's weights ----------------------------------------------------------------------------------------------


def eigen(args: Namespace, hessian: Hessian) -> tuple[Numbers, Draw]:
    """The n largest and n smallest eigenvalues and the dominant one."""
    options = {"tol": args.tol, "max_steps": args.max_steps, "seed": args.seed}
    ends = {which: lanczos(hessian, args.n, which=which, **options) for which in ("top", "bottom")}
    numbers = {
        which: {"values": e.values.tolist(), "residuals": e.residuals.tolist(), "products": e.products}
        for which, e in ends.items()
    }
    which, largest = max(((w, v) for w, e in ends.items() for v in e.values.tolist()), key=lambda pair: abs(pair[1]))
    tqdm.write(f"sigma_max = {largest:.6g} (largest magnitude), residual {ends[which].residuals.max():.1e}")

    def draw(figure: Any) -> None:
        ax = figure.add_subplot(title="Convergence of Lanczos", xlabel="products with the Hessian")
        for which, e in ends.items():
            ax.plot(range(1, len(e.history) + 1), [v for v, _ in e.history], label=which)
        ax.set_ylabel("first eigenvalue")
        ax.legend(frameon=False)

    return {"sigma_max": largest, **numbers}, draw


def gap(args: Namespace, hessian: Hessian) -> tuple[Numbers, Draw]:
    """The surrogate gap at several radii beside the dominant eigenvalue."""
    rows = [sharpness(hessian, rho) for rho in args.rho]
    pair = dominant(hessian, tol=args.tol, max_steps=args.max_steps)
    for row in rows:
        shown = " ".join(f"{k} {row[k]:.5g}" for k in ("surrogate_gap", "estimate", "first_order", "curvature"))
        tqdm.write(f"rho {row['rho']:g}: {shown}")
    tqdm.write(f"sigma_max = {pair.value:.6g}, residual {pair.residuals[0]:.1e}")

    def draw(figure: Any) -> None:
        ax = figure.add_subplot(title="What the surrogate gap says of curvature", xlabel="rho", xscale="log")
        for key, label in (("estimate", "2h/rho^2"), ("first_order", "2|g|/rho"), ("curvature", "their difference")):
            ax.plot(args.rho, [row[key] for row in rows], marker="o", label=label)
        ax.axhline(pair.value, linestyle="--", linewidth=1, label="sigma_max (Lanczos)")
        ax.set_yscale("symlog")
        ax.legend(frameon=False)

    return {"rows": rows, "sigma_max": pair.value, "residual": float(pair.residuals[0])}, draw


def spectrum(args: Namespace, hessian: Hessian) -> tuple[Numbers, Draw]:
    """The density of all eigenvalues by stochastic Lanczos quadrature."""
    density = spectral_density(hessian, steps=args.max_steps, seed=args.seed)
    reach = float(density.nodes.abs().max())
    grid = torch.linspace(-1.1 * reach, 1.1 * reach, 400, dtype=torch.float64)

    def draw(figure: Any) -> None:
        ax = figure.add_subplot(title="Spectral density of the Hessian", xlabel="eigenvalue", yscale="log")
        ax.plot(grid, density.smoothed(grid, reach / 60).clamp(min=1e-8))

    return {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()}, draw


def slices(args: Namespace, hessian: Hessian) -> tuple[Numbers, Draw]:
    """The loss along one filter-normalised direction, and over the plane of two."""
    amounts = torch.linspace(-args.width, args.width, args.points).tolist()
    one, two = (filter_normalised(hessian.params, seed=args.seed + i) for i in range(2))
    along, over = line(hessian, one, amounts), plane(hessian, one, two, amounts)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(amounts, along)
        left.set(title="Along one direction", xlabel="filter norms", ylabel="training loss")
        if len(amounts) > 1:
            contours = right.contourf(amounts, amounts, over, levels=20, cmap="cividis")
            figure.colorbar(contours, ax=right, shrink=0.8)
        right.set(title="Over two", xlabel="filter norms", aspect="equal")

    return {"amounts": amounts, "line": along, "plane": over}, draw


def convergence(args: Namespace, hessian: Hessian) -> tuple[Numbers, Draw]:
    """The power method from random starts, product by product, against Lanczos: Eigen-SAM's rebuttal, Fig. 1."""
    pairs = lanczos(hessian, min(2, hessian.size), tol=args.tol, max_steps=args.max_steps)
    truth, v = pairs.values.tolist(), pairs.vectors[0]
    runs = []
    for start in range(args.starts):
        found: list[torch.Tensor] = []
        history = power_iteration(hessian, steps=args.p, seed=args.seed + 1 + start, visit=found.append).history
        runs.append({"cosine": [alignment(x, v) for x in found], "quotient": [value for value, _ in history]})
    ends = ", ".join(f"{run['cosine'][min(5, args.p)]:.3f}" for run in runs)
    tqdm.write(f"lambda = {', '.join(f'{x:.5g}' for x in truth)}; |cos| after {min(5, args.p)} iterations: {ends}")

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for run in runs:
            left.plot(run["cosine"])
            right.plot([q / truth[0] for q in run["quotient"]])
        left.set(title="|cos| with the eigenvector", xlabel="power iterations", ylim=(0, 1.02))
        right.set(title="Rayleigh quotient over λ", xlabel="power iterations")

    return {"eigenvalues": truth, "residuals": pairs.residuals.tolist(), "starts": runs}, draw


# ---- over training, from the log -------------------------------------------------------------------------------------


def decay(args: Namespace, folder: Path) -> tuple[Numbers, Draw]:
    """What is left of an eigenvector after some steps of training: Eigen-SAM's rebuttal, Fig. 2."""
    ages = decay_by_age(measurements(folder))
    if not ages:
        raise UserError(f"{folder}: no measurement has a former eigenvector to look back at")
    means = {a: {k: sum(e[k]) / len(e[k]) for k in ("cosine", "quality")} for a, e in ages.items()}
    for age, mean in means.items():
        print(f"after {age} steps: |cos| {mean['cosine']:.3f}, v'Hv/lambda {mean['quality']:.3f}")

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for key, label in (("cosine", "|cos| with today's"), ("quality", "v'Hv / λ")):
            left.plot(list(means), [mean[key] for mean in means.values()], marker="o", label=label)
        usual = max(ages, key=lambda age: len(ages[age]["step"]))
        right.plot(ages[usual]["step"], ages[usual]["cosine"], marker="o")
        left.set(title="Mean over training", xlabel="age of the eigenvector, steps", ylim=(0, 1.05))
        right.set(title=f"|cos| after {usual} steps", xlabel="training step", ylim=(0, 1.05))
        left.legend(frameon=False)

    return {"run": folder.name, "ages": ages, "means": means}, draw


def aligned(args: Namespace, folder: Path) -> tuple[Numbers, Draw]:
    """Alignment of the method's perturbation with the top eigenvector, and that eigenvalue, over training."""
    found = measurements(folder)
    keys = ("step", "alignment", "lambda_max", "estimate", "first_order")
    series = {key: [record[key] for record in found] for key in keys}
    print(f"|cos(eps, v)| from {series['alignment'][0]:.3f} to {series['alignment'][-1]:.3f}")

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(series["step"], series["alignment"], marker="o")
        right.plot(series["step"], series["lambda_max"], marker="o")
        left.set(title="|cos(ε, v)|, mean over groups", xlabel="training step", ylim=(0, 1.02))
        right.set(title="λ_max", xlabel="training step")

    return {"run": folder.name, **series}, draw


# ---- without a run ---------------------------------------------------------------------------------------------------


def toy(args: Namespace) -> tuple[Numbers, Draw]:
    """Trajectories on the toy surface and how sharp it is where they end."""
    paths = trajectories()
    for name, path in paths.items():
        print(f"{name}: ends in the {path.end}, top eigenvalue {path.top:.2f}")

    def draw(figure: Any) -> None:
        draw_toy(figure.add_subplot(title="Two sharp wells on the way to a flat minimum"), paths)

    return as_data(paths), draw


def sde(args: Namespace) -> tuple[Numbers, Draw]:
    """Mean weights of SAM's iterates and of the SDEs, and how far apart they are."""
    found = simulate(seed=args.seed)
    errors = {name: found.error(name) for name in found.weights if name != "sam"}
    for name, error in errors.items():
        print(f"{name}: max |E w_SAM - E X| = {error:.4f}")

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name in found.loss:
            left.plot(found.steps, found.loss[name], label=name)
            right.plot(found.steps, found.top[name], label=name)
        left.set(title="Mean loss", xlabel="SAM steps")
        right.set(title="Top eigenvalue", xlabel="SAM steps")
        left.legend(frameon=False)

    return {"steps": found.steps, "loss": found.loss, "top_eigenvalue": found.top, "weak_error": errors}, draw


OF_WEIGHTS: dict[str, Callable[[Namespace, Hessian], tuple[Numbers, Draw]]] = {
    "eigen": eigen,
    "gap": gap,
    "spectrum": spectrum,
    "slice": slices,
    "convergence": convergence,
}
OF_LOGS = {"decay": decay, "alignment": aligned}
OF_NOTHING = {"toy": toy, "sde": sde}
