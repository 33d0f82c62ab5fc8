"""Measurements at a run's weights, one line of each on the terminal and all of it as plain numbers."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sam_repro.config.compose import read_config
from sam_repro.curvature.lanczos import dominant, lanczos, power_iteration, spectral_density
from sam_repro.curvature.measures import alignment, sharpness
from sam_repro.curvature.probe_images import loss_hessian, probe_batches
from sam_repro.curvature.slices import filter_normalised, line, plane
from sam_repro.distributed.ranks import Ranks, init_ranks
from sam_repro.errors import UserError, plural
from sam_repro.models.build import build_model
from sam_repro.models.pretrained import read_weights
from sam_repro.optim.hessian import Hessian

Numbers = dict[str, Any]


def measure(args: Namespace, folder: Path) -> Numbers | None:
    """What `args.what` names in REPORTS, at the weights of a run; None on all ranks but the first.

    Args:
        args: the command's arguments (cli.sharpness.add_arguments says what each is).
        folder: the run's, which holds its configuration.

    Raises:
        UserError: for weights that are not that model's, a loss that is not finite, or more eigenvalues than there are.
    """
    ranks = init_ranks(args.device)
    try:
        numbers = _measure(args, folder, ranks)
    finally:
        ranks.close()
    return numbers if ranks.main else None


def _measure(args: Namespace, folder: Path, ranks: Ranks) -> Numbers:
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
            with contextlib.redirect_stdout(sys.stdout if ranks.main else io.StringIO()):  # one rank says it
                numbers = REPORTS[args.what](hessian, args)
        except ValueError as error:
            raise UserError(str(error)) from None
    counted = ranks.sum_(torch.tensor(float(sum(len(b[0]) for b in batches)), device=ranks.device))
    about = {"run": folder.name, "weights": args.run.name, "images": int(counted.item()), "seed": args.seed}
    return about | {"products": hessian.products, "ranks": ranks.world} | numbers


def eigen(hessian: Hessian, args: Namespace) -> Numbers:
    """The n largest and n smallest eigenvalues and the dominant one."""
    options = {"tol": args.tol, "max_steps": args.max_steps, "seed": args.seed}
    ends = {which: lanczos(hessian, args.n, which=which, **options) for which in ("top", "bottom")}
    which, largest = max(((w, v) for w, e in ends.items() for v in e.values.tolist()), key=lambda pair: abs(pair[1]))
    tqdm.write(f"sigma_max = {largest:.6g} (largest magnitude), residual {ends[which].residuals.max():.1e}")
    return {"sigma_max": largest} | {
        which: {
            "values": e.values.tolist(), "residuals": e.residuals.tolist(), "products": e.products,
            "history": [value for value, _ in e.history],
        }
        for which, e in ends.items()
    }  # fmt: skip


def gap(hessian: Hessian, args: Namespace) -> Numbers:
    """The surrogate gap at several radii, and the dominant eigenvalue."""
    rows = [sharpness(hessian, rho) for rho in args.rho]
    pair = dominant(hessian, tol=args.tol, max_steps=args.max_steps)
    for row in rows:
        shown = " ".join(f"{k} {row[k]:.5g}" for k in ("surrogate_gap", "estimate", "first_order", "curvature"))
        tqdm.write(f"rho {row['rho']:g}: {shown}")
    tqdm.write(f"sigma_max = {pair.value:.6g}, residual {pair.residuals[0]:.1e}")
    return {"rows": rows, "sigma_max": pair.value, "residual": float(pair.residuals[0])}


def spectrum(hessian: Hessian, args: Namespace) -> Numbers:
    """The density of all eigenvalues by stochastic Lanczos quadrature, at its nodes and smoothed on a grid."""
    density = spectral_density(hessian, steps=args.max_steps, seed=args.seed)
    reach = float(density.nodes.abs().max())
    grid = torch.linspace(-1.1 * reach, 1.1 * reach, 400, dtype=torch.float64)
    smooth = density.smoothed(grid, reach / 60)
    nodes = {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()}
    return nodes | {"grid": grid.tolist(), "density": smooth.tolist()}


def slices(hessian: Hessian, args: Namespace) -> Numbers:
    """The loss along one filter-normalised direction, and over the plane of two."""
    amounts = torch.linspace(-args.width, args.width, args.points).tolist()
    one, two = (filter_normalised(hessian.params, seed=args.seed + i) for i in range(2))
    return {"amounts": amounts, "line": line(hessian, one, amounts), "plane": plane(hessian, one, two, amounts)}


def convergence(hessian: Hessian, args: Namespace) -> Numbers:
    """The power method from random starts, product by product, against Lanczos: Eigen-SAM's rebuttal, Fig. 1."""
    pairs = lanczos(hessian, min(2, hessian.size), tol=args.tol, max_steps=args.max_steps)
    truth, v = pairs.values.tolist(), pairs.vectors[0]
    runs = []
    for start in range(args.starts):
        iterates: list[torch.Tensor] = []
        history = power_iteration(hessian, steps=args.p, seed=args.seed + 1 + start, visit=iterates.append).history
        runs.append({"cosine": [alignment(x, v) for x in iterates], "quotient": [value for value, _ in history]})
    ends = ", ".join(f"{run['cosine'][min(5, args.p)]:.3f}" for run in runs)
    tqdm.write(
        f"lambda = {', '.join(f'{x:.5g}' for x in truth)}; |cos| after {plural(min(5, args.p), 'iteration')}: {ends}"
    )
    return {"eigenvalues": truth, "residuals": pairs.residuals.tolist(), "starts": runs}


REPORTS: dict[str, Callable[[Hessian, Namespace], Numbers]] = {
    "eigen": eigen,
    "gap": gap,
    "spectrum": spectrum,
    "slice": slices,
    "convergence": convergence,
}
