"""Measure the curvature of a trained run, or draw the toys; each writes a picture (SVG, PNG) and its numbers (JSON).

  sam-repro sharpness eigen runs/<run_id> --n 5            # extreme eigenvalues by Lanczos, with residuals
  sam-repro sharpness gap runs/<run_id> --rho 0.05 0.1     # h, 2h/rho^2 and its first-order part, beside sigma_max
  sam-repro sharpness spectrum runs/<run_id>               # density of all eigenvalues
  sam-repro sharpness slice runs/<run_id>                  # loss along one filter-normalised direction, over two
  sam-repro sharpness toy                                  # GSAM's Fig. 3: SGD, SAM and GSAM on a surface with wells
  sam-repro sharpness sde                                  # SAM's iterates against the SDEs of order 1 to 3

The training loss, in fp32, in evaluation mode, centre-cropped, on the first --images images of the training split.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_repro.data import build_loader
from sam_repro.errors import UserError
from sam_repro.evaluate_command import read_config
from sam_repro.initial import read_weights
from sam_repro.models import build_model
from sam_repro.objective import forward_of, loss_of
from sam_repro.optim.hvp import Hessian
from sam_repro.paper.style import RC, colours_of, save
from sam_repro.sharpness.lanczos import dominant, lanczos, spectral_density
from sam_repro.sharpness.measures import sharpness
from sam_repro.sharpness.sde import simulate
from sam_repro.sharpness.surfaces import filter_normalised, line, plane
from sam_repro.sharpness.toy import FLAT, SHARP, surface, trajectories

Draw = Callable[[Any], None]  # fills a matplotlib figure


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("what", choices=sorted(MEASURES), help="what to measure")
    parser.add_argument("run", nargs="?", type=Path, help="a run's directory; not for toy and sde")
    parser.add_argument("--images", type=int, default=512, help="images of the training split (default: 512)")
    parser.add_argument("--batch-size", type=int, default=128, help="images at a time")
    parser.add_argument("--n", type=int, default=1, help="eigen: how many at each end")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual at which Lanczos stops")
    parser.add_argument("--max-steps", type=int, default=60, help="products at most; as many vectors are kept")
    parser.add_argument("--rho", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2], help="gap: radii")
    parser.add_argument("--width", type=float, default=1.0, help="slice: how far to go, in filter norms")
    parser.add_argument("--points", type=int, default=21, help="slice: points a direction")
    parser.add_argument("--seed", type=int, default=0, help="of random directions and start vectors")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--root", help="data.root, where it is not the run's")
    parser.add_argument("--output", type=Path, help="folder (default: <run>/sharpness, or sharpness)")


def run(args: Namespace) -> int:
    """Measure, write, and say where; returns the exit code. Raises UserError for bad input."""
    measure = MEASURES[args.what]
    if (args.run is None) != (args.what in ("toy", "sde")):
        raise UserError(f"sharpness {args.what} {'needs' if args.run is None else 'takes no'} run directory")
    numbers, draw = measure(args)
    folder = args.output or (args.run / "sharpness" if args.run else Path("sharpness"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.what}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    import matplotlib.pyplot as plt

    with plt.rc_context(RC):  # pyright: ignore
        figure = plt.figure(figsize=(6.4, 4.0), layout="constrained")
        draw(figure)
        written = save(figure, folder / args.what)
    for path in [folder / f"{args.what}.json", *written]:
        print(path)
    return 0


def hessian_of(args: Namespace) -> Hessian:
    """The Hessian of a run's training loss at its final weights."""
    cfg = read_config(args.run / "config.yaml")
    if args.root:
        cfg.data.root = args.root
    device = torch.device(args.device)
    model = build_model(cfg.model, num_classes=cfg.data.num_classes, image_size=cfg.data.image_size)
    model.load_state_dict(read_weights(args.run))
    model.to(device).eval()
    forward, loss = forward_of(cfg, model, device, bf16=False), loss_of(cfg)
    loader = build_loader(
        cfg.data, cfg.augment, split="train", training=False, batch_size=args.batch_size, seed=0, device=device
    )
    batches, left = [], args.images
    for images, labels in loader.epoch(0):
        batches.append((images[:left], labels[:left]))
        left -= len(images)
        if left <= 0:
            break
    loader.close()

    def objective(tensors: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return loss(forward(tensors, images), labels)

    return Hessian(objective, dict(model.named_parameters()), batches)


def about(args: Namespace, hessian: Hessian) -> dict[str, Any]:
    """What a number of this run needs beside it."""
    return {"run": args.run.name, "images": sum(len(b[0]) for b in hessian.batches), "products": hessian.products}


def eigen(args: Namespace) -> tuple[dict, Draw]:
    """The n largest and n smallest eigenvalues and the dominant one."""
    hessian = hessian_of(args)
    options = {"tol": args.tol, "max_steps": args.max_steps, "seed": args.seed}
    ends = {which: lanczos(hessian, args.n, which=which, **options) for which in ("top", "bottom")}
    numbers = {
        which: {"values": e.values.tolist(), "residuals": e.residuals.tolist(), "products": e.products}
        for which, e in ends.items()
    }
    largest = max((v for e in ends.values() for v in e.values.tolist()), key=abs)
    print(f"sigma_max = {largest:.6g} (largest magnitude), residual {ends['top'].residuals[0]:.1e}")

    def draw(figure: Any) -> None:
        ax = figure.add_subplot(title="Convergence of Lanczos", xlabel="products with the Hessian")
        for which, e in ends.items():
            ax.plot(range(1, len(e.history) + 1), [v for v, _ in e.history], label=which)
        ax.set_ylabel("first eigenvalue")
        ax.legend(frameon=False)

    return about(args, hessian) | {"sigma_max": largest, **numbers}, draw


def gap(args: Namespace) -> tuple[dict, Draw]:
    """The surrogate gap at several radii beside the dominant eigenvalue."""
    hessian = hessian_of(args)
    rows = [sharpness(hessian, rho) for rho in args.rho]
    pair = dominant(hessian, tol=args.tol, max_steps=args.max_steps)
    for row in rows:
        shown = " ".join(f"{k} {row[k]:.5g}" for k in ("surrogate_gap", "estimate", "first_order", "curvature"))
        print(f"rho {row['rho']:g}: {shown}")
    print(f"sigma_max = {pair.value:.6g}, residual {pair.residuals[0]:.1e}")

    def draw(figure: Any) -> None:
        ax = figure.add_subplot(title="What the surrogate gap says of curvature", xlabel="rho", xscale="log")
        for key, label in (("estimate", "2h/rho^2"), ("first_order", "2|g|/rho"), ("curvature", "their difference")):
            ax.plot(args.rho, [row[key] for row in rows], marker="o", label=label)
        ax.axhline(pair.value, linestyle="--", linewidth=1, label="sigma_max (Lanczos)")
        ax.set_yscale("symlog")
        ax.legend(frameon=False)

    return about(args, hessian) | {"rows": rows, "sigma_max": pair.value, "residual": float(pair.residuals[0])}, draw


def spectrum(args: Namespace) -> tuple[dict, Draw]:
    """The density of all eigenvalues by stochastic Lanczos quadrature."""
    hessian = hessian_of(args)
    density = spectral_density(hessian, steps=args.max_steps, seed=args.seed)
    reach = float(density.nodes.abs().max())
    grid = torch.linspace(-1.1 * reach, 1.1 * reach, 400, dtype=torch.float64)

    def draw(figure: Any) -> None:
        ax = figure.add_subplot(title="Spectral density of the Hessian", xlabel="eigenvalue", yscale="log")
        ax.plot(grid, density.smoothed(grid, reach / 60).clamp(min=1e-8))

    return about(args, hessian) | {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()}, draw


def slices(args: Namespace) -> tuple[dict, Draw]:
    """The loss along one filter-normalised direction, and over the plane of two."""
    hessian = hessian_of(args)
    amounts = torch.linspace(-args.width, args.width, args.points).tolist()
    one, two = (filter_normalised(hessian.params, seed=args.seed + i) for i in range(2))
    along, over = line(hessian, one, amounts), plane(hessian, one, two, amounts)

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.plot(amounts, along)
        left.set(title="Along one direction", xlabel="filter norms", ylabel="training loss")
        contours = right.contourf(amounts, amounts, over, levels=20, cmap="cividis")
        right.set(title="Over two", xlabel="filter norms", aspect="equal")
        figure.colorbar(contours, ax=right, shrink=0.8)

    return about(args, hessian) | {"amounts": amounts, "line": along, "plane": over}, draw


def toy(args: Namespace) -> tuple[dict, Draw]:
    """Trajectories on the toy surface and how sharp it is where they end."""
    paths = trajectories()
    for name, path in paths.items():
        end = ", ".join(f"{x:.2f}" for x in path.points[-1].tolist())
        print(f"{name}: ends at ({end}), top eigenvalue {path.top:.2f}")

    def draw(figure: Any) -> None:
        x, y = torch.meshgrid(torch.linspace(-1, 4, 200), torch.linspace(-1.2, 1.2, 120), indexing="xy")
        ax = figure.add_subplot(title="A ridge, two sharp wells, a flat basin")
        ax.contour(x, y, surface(torch.stack([x, y], -1)), levels=24, linewidths=0.6, cmap="Greys")
        colours = colours_of(["vanilla", "sam", "gsam"])
        for (name, path), colour in zip(paths.items(), colours.values(), strict=True):
            ax.plot(*path.points.T.tolist(), color=colour, label=f"{name}, top eigenvalue {path.top:.1f}")
        ax.scatter(*zip(*SHARP, FLAT, strict=True), marker="x", color="#1b1f24", s=18)
        ax.legend(frameon=False, loc="upper right")

    return {n: {"points": p.points.tolist(), "top_eigenvalue": p.top} for n, p in paths.items()}, draw


def sde(args: Namespace) -> tuple[dict, Draw]:
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


MEASURES: dict[str, Callable[[Namespace], tuple[dict, Draw]]] = {
    "eigen": eigen,
    "gap": gap,
    "spectrum": spectrum,
    "slice": slices,
    "toy": toy,
    "sde": sde,
}
