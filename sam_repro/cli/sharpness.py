"""Measure the curvature of a trained run, or draw the papers' toys: a picture (SVG, PNG) and numbers (JSON).

  sam-repro sharpness eigen runs/<run_id> --n 5            # extreme eigenvalues by Lanczos, with residuals
  sam-repro sharpness gap runs/<run_id> --rho 0.05 0.1     # h, 2h/rho^2 and its first-order part, and sigma_max
  sam-repro sharpness spectrum runs/<run_id>               # density of all eigenvalues
  sam-repro sharpness slice runs/<run_id>                  # loss along one filter-normalised direction, over two
  sam-repro sharpness convergence runs/<run_id>            # the power method, product by product (Eigen-SAM's rebuttal)
  torchrun --nproc-per-node=8 -m sam_repro.cli sharpness eigen runs/<run_id> --images 50000

They measure the training loss in fp32, in evaluation mode. The images are centre crops of --images training images,
drawn from --seed with the classes in turn. <run> may also be a checkpoint, runs/<run_id>/step-*.pt. Under torchrun or
srun the ranks share the images. These two read the log of a run that trained with sharpness.every=100:

  sam-repro sharpness decay runs/<run_id>                  # what is left of an old eigenvector (rebuttal)
  sam-repro sharpness alignment runs/<run_id>              # the perturbation and the top eigenvector; lambda_max

Without a run:

  sam-repro sharpness toy                                  # GSAM's Fig. 3: SGD, SAM and GSAM on a surface with wells
  sam-repro sharpness sde                                  # SAM's iterates against the SDEs of order 1 to 3
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError, plural

# What there is to measure or draw, by what it needs.
OF_WEIGHTS = ("convergence", "eigen", "gap", "slice", "spectrum")
OF_LOGS = ("alignment", "decay")
OF_NOTHING = ("sde", "toy")


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("what", choices=sorted(OF_WEIGHTS + OF_LOGS + OF_NOTHING), help="what to measure or draw")
    parser.add_argument("run", nargs="?", type=Path, help="a run's directory or a checkpoint in it; not for toy, sde")
    parser.add_argument("--images", type=int, default=512, help="images of the training split (default: 512)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time on each rank (default: 64)")
    parser.add_argument("--n", type=int, default=1, help="eigen: how many at each end")
    parser.add_argument("--tol", type=float, default=1e-3, help="relative residual at which Lanczos stops")
    parser.add_argument(
        "--max-steps", type=int, default=60, help="at most this many products; as many vectors are kept"
    )
    parser.add_argument("--rho", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2], help="gap: radii")
    parser.add_argument("--width", type=float, default=1.0, help="slice: how far to go, in filter norms")
    parser.add_argument("--points", type=int, default=21, help="slice: points per direction")
    parser.add_argument("--starts", type=int, default=3, help="convergence: random first vectors")
    parser.add_argument("--p", type=int, default=20, help="convergence: power iterations")
    parser.add_argument("--seed", type=int, default=0, help="of the images, random directions and first vectors")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--root", help="data.root, where it is not the run's")
    parser.add_argument("--output", type=Path, help="folder (default: <run>/sharpness, or sharpness)")


def run(args: Namespace) -> int:
    """Measure, write, and say where; returns the exit code. Raises UserError for bad input."""
    check(args)
    folder = args.run if args.run is None or args.run.is_dir() else args.run.parent
    numbers = measure(args, folder)
    if numbers is None:
        return 0
    output = args.output or (folder / "sharpness" if folder else Path("sharpness"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{args.what}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write in {output}: {error}") from error
    for path in [output / f"{args.what}.json", *draw(args.what, numbers, output)]:
        print(path)
    return 0


def check(args: Namespace) -> None:
    """Bad input, in one sentence with what to type."""
    if args.run is None and args.what not in OF_NOTHING:
        raise UserError(f"sharpness {args.what} needs a run directory: sam-repro sharpness {args.what} runs/<run_id>")
    if args.run is not None and args.what in OF_NOTHING:
        raise UserError(f"sharpness {args.what} takes no run directory: sam-repro sharpness {args.what}")
    if args.run is not None and not args.run.exists():
        raise UserError(f"there is no {args.run}")
    for name in ("images", "batch_size", "n", "max_steps", "points", "starts", "p"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(args, name)} must be at least 1")
    for name, values in (("tol", [args.tol]), ("width", [args.width]), ("rho", args.rho)):
        for value in values:
            if not 0 < value < float("inf"):
                raise UserError(f"--{name}={value} must be a finite number greater than 0")


def measure(args: Namespace, folder: Path | None) -> dict[str, Any] | None:
    """The numbers that `args.what` asks for; None on all ranks but the first."""
    if args.what == "toy":
        return toy()
    if args.what == "sde":
        return sde(args.seed)
    assert folder is not None
    if args.what in OF_WEIGHTS:
        from sam_repro.curvature.reports import measure  # torch takes seconds: not before the words are right

        return measure(args, folder)
    return decay(folder) if args.what == "decay" else alignment(folder)


def draw(what: str, numbers: dict[str, Any], output: Path) -> list[Path]:
    """The picture of `numbers`, as files in `output`."""
    import matplotlib.pyplot as plt

    from sam_repro.cli.sharpness_pictures import DRAW
    from sam_repro.paper.render.style import CYCLE, RC, save

    with plt.rc_context(RC | {"axes.prop_cycle": CYCLE}):  # pyright: ignore
        figure = plt.figure(figsize=(6.4, 4.0), layout="constrained")
        DRAW[what](figure, numbers)
        written = save(figure, output / what)
        plt.close(figure)
    return written


def decay(folder: Path) -> dict[str, Any]:
    """How well an eigenvector still fits after some steps of training: Eigen-SAM's rebuttal, Fig. 2."""
    from sam_repro.curvature.from_log import decay_by_age, measurements

    ages = decay_by_age(measurements(folder, "decay"))
    if not ages:
        raise UserError(
            f"{folder}: no measurement has an earlier eigenvector to compare with; train with sharpness.every=100"
        )
    means = {a: {k: sum(e[k]) / len(e[k]) for k in ("cosine", "quality")} for a, e in ages.items()}
    for age, mean in means.items():
        print(f"after {plural(age, 'step')}: |cos| {mean['cosine']:.3f}, v'Hv/lambda {mean['quality']:.3f}")
    return {"run": folder.name, "ages": ages, "means": means}


def alignment(folder: Path) -> dict[str, Any]:
    """Alignment of the method's perturbation with the top eigenvector, and that eigenvalue, over training."""
    from sam_repro.curvature.from_log import measurements

    keys = ("alignment", "lambda_max", "estimate", "first_order")
    records = measurements(folder, *keys)
    series = {key: [record[key] for record in records] for key in ("step", *keys)}
    print(f"|cos(eps, v)| from {series['alignment'][0]:.3f} to {series['alignment'][-1]:.3f}")
    return {"run": folder.name, **series}


def toy() -> dict[str, Any]:
    """Trajectories on the toy surface and how sharp it is where they end."""
    from sam_repro.paper.toys.surface import as_data, trajectories

    paths = trajectories()
    for name, path in paths.items():
        print(f"{name}: ends in the {path.end}, top eigenvalue {path.top:.2f}")
    return as_data(paths)


def sde(seed: int) -> dict[str, Any]:
    """Mean weights of SAM's iterates and of the SDEs, and how far apart they are."""
    from sam_repro.paper.toys.sde import simulate

    simulation = simulate(seed=seed)
    errors = {name: simulation.error(name) for name in simulation.weights if name != "sam"}
    for name, error in errors.items():
        print(f"{name}: max |E w_SAM - E X| = {error:.4f}")
    return {"steps": simulation.steps, "loss": simulation.loss, "top_eigenvalue": simulation.top, "weak_error": errors}
