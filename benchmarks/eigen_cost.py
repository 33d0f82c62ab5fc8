"""What Eigen-SAM's eigenvector costs, as a share of SAM's step time, on one GPU.

    python benchmarks/eigen_cost.py --models vit_b32 resnet50 --output results/benchmarks/h100-eigen.json

Synthetic uint8 images resident on the GPU, bf16 passes, compiled, both engines as training builds them. For each model:

    sam          SAM's whole step
    eigen        Eigen-SAM's whole step between estimates (the same passes, another perturbation)
    estimates    p = 5 Hessian products on one group of m images: seconds for each way of making products

    share at k   = seconds of an estimate / (k x SAM's step)                goal: k=100 at most 5 %, k=1000 at most 1 %
    whole at k   = 100 Eigen-SAM steps with one estimate among them, timed as a whole / 100 SAM steps - 1

The estimate runs on the weights and images of the step. What is compiled is compiled before the clock starts, which is
what a run of thousands of steps sees; the seconds it took are reported.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from clock import seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam_repro.config.compose import compose_config
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.build import build_model
from sam_repro.optim import GradientStep, PowerIteration, build_base, decay_groups
from sam_repro.records import ledger
from sam_repro.training.method import gradient_step

KINDS = ("reverse", "forward", "reverse-compiled", "forward-compiled")
KINDS += tuple(f"{kind}-tf32" for kind in KINDS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b32", "resnet50"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--m", type=int, default=64)
    parser.add_argument("--p", type=int, default=5)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["reverse", "reverse-compiled", "forward-compiled"]
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="steps a round")
    parser.add_argument("--whole", type=int, default=100, help="steps timed as a whole, with one estimate; 0: skip")
    parser.add_argument("--tiny", action="store_true", help="a toy of each model at 64 px: to try this script on a CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no model is begun")
    parser.add_argument("--resume", action="store_true", help="keep what --output has of the same commit and hardware")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of a stored result, measure nothing")
    return parser.parse_args()


class Run:
    """One model with one method on one device: its engine and its base optimizer."""

    def __init__(self, name: str, method: str, args: argparse.Namespace):
        device = torch.device(args.device)
        fixed = [f"recipe.batch_size={args.batch}", f"train.device={args.device}", f"optim.m={args.m}"]
        fixed += ["model.tiny=true", "data.image_size=64"] if args.tiny else []
        cfg = compose_config([f"model={name}", f"optim={method}", *fixed])
        torch.manual_seed(0)
        size = cfg.data.image_size
        model = build_model(cfg.model, num_classes=1000, image_size=size, loss=cfg.recipe.loss).to(device)
        if cfg.model.family == "resnet":
            model = model.to(memory_format=torch.channels_last)
        self.images = torch.randint(0, 256, (args.batch, 3, size, size), dtype=torch.uint8, device=device)
        self.labels = torch.randint(0, 1000, (args.batch,), device=device)
        self.base = build_base(cfg.recipe.base, decay_groups(model.named_parameters(), 0.1), lr=1e-4)
        ranks, bf16 = Ranks(0, 1, 0, 1, device), device.type == "cuda"
        self.engine: GradientStep = gradient_step(cfg, model, ranks, local_batch=args.batch, bf16=bf16)

    def __call__(self) -> None:
        self.engine(self.images, self.labels, rho=0.1)
        self.base.step()

    def estimate(self) -> None:
        assert isinstance(self.engine.pre_step, PowerIteration)
        self.engine.pre_step.renew(self.images, self.labels)


def bench_model(name: str, args: argparse.Namespace, row: dict, save: Callable[[], None]) -> None:
    """Fill one model's row of the JSON, saved after each figure."""
    row |= {"kind": "eigen_cost", "model": name, "m": args.m, "batch": args.batch, "p": args.p, "estimates": {}}
    for key, method in (("sam_seconds", "sam"), ("eigen_seconds", "eigen_sam")):
        gc.collect()
        run = Run(name, method, args)
        before = run.engine.pre_step
        setup = seconds(run, 3)
        row[key] = statistics.median(seconds(run, args.steps) for _ in range(args.rounds))
        row[key.replace("seconds", "setup_seconds")] = 3 * setup
        save()
        print(f"{name} {method}: {1e3 * row[key]:.1f} ms per step ({type(run.engine).__name__})", flush=True)
        if isinstance(before, PowerIteration):
            before.every, before.iterations = 10**9, args.p  # no estimate but those asked for here
            estimates(run, before, args, row, save)
        del run, before


def estimates(run: Run, before: PowerIteration, args: argparse.Namespace, row: dict, save: Callable[[], None]) -> None:
    """Every way of making products, then the whole of 100 steps with the fastest exact one."""
    own = f"{before.mode}{'-compiled' if before.compiled else ''}{'-tf32' if before.tf32 else ''}"
    row["own_kind"] = own
    for kind in [*(k for k in args.kinds if k != own), own]:  # last, so that the whole below is of what training uses
        before.mode, *words = kind.split("-")
        before.compiled, before.tf32, before.hessian = "compiled" in words, "tf32" in words, None
        try:
            run.engine.perturb.v = None  # pyright: ignore: the same start for every kind
            setup = seconds(run.estimate)
            first = before.eigenvalue
            median = statistics.median(seconds(run.estimate) for _ in range(args.rounds))
        except Exception as error:  # one kind's failure must not cost the others their run
            print(f"{row['model']} {kind} failed: {type(error).__name__}: {str(error)[:400]}", flush=True)
            continue
        share = median / row["sam_seconds"]
        row["estimates"][kind] = {"seconds": median, "setup_seconds": setup, "eigenvalue": first}
        row["estimates"][kind] |= {"share_k100": share / 100, "share_k1000": share / 1000}
        save()
        print(
            f"{row['model']} {kind}: {args.p} products {1e3 * median:.0f} ms, {share / 100:.2%} of SAM's step at k=100,"
            f" {share / 1000:.3%} at k=1000; eigenvalue {first:.5g}, ready after {setup:.0f} s",
            flush=True,
        )
    if args.whole:
        before.calls, before.every = 0, args.whole - 1  # the last of them estimates
        row["whole_ratio"] = seconds(run, args.whole) / row["sam_seconds"]
        save()
        print(f"{row['model']}: {args.whole} steps with one estimate, x {row['whole_ratio']:.4f} SAM's", flush=True)


def show(result: dict) -> str:
    """The Markdown table of a result."""
    lines = [
        "| model | SAM, ms | Eigen-SAM between estimates, ms | products | 5 products, ms | k = 100 | k = 1000 | whole |"
    ]
    lines += ["|---|--:|--:|---|--:|--:|--:|--:|"]
    for row in result["entries"]:
        for kind, e in row["estimates"].items():
            own = kind == row["own_kind"]
            cells = [row["model"], f"{1e3 * row['sam_seconds']:.1f}", f"{1e3 * row['eigen_seconds']:.1f}"]
            cells += [f"**{kind}**" if own else kind, f"{1e3 * e['seconds']:.0f}", f"{e['share_k100']:.2%}"]
            cells += [f"{e['share_k1000']:.3%}", f"x {row['whole_ratio']:.3f}" if own and "whole_ratio" in row else ""]
            lines.append(f"| {' | '.join(cells)} |")
    v = result["versions"]
    lines += [
        "",
        f"{result['hardware']}, batch {result['batch']} at 224 px, m = {result['m']}, bf16 passes, compiled; ",
    ]
    lines[-1] += f"{', '.join(f'{k} {v[k]}' for k in ('python', 'torch', 'timm'))}; commit {result['commit'][:8]}; in "
    return "\n".join(lines) + "bold the kind that training uses."


def main() -> None:
    args = arguments()
    if args.show:
        print(show(json.loads(args.show.read_text())))
        return
    torch.backends.cuda.matmul.allow_tf32 = True  # as training leaves it for what is not bf16; products switch it off
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU {ledger.cpu_name()}"
    result = {"hardware": hardware, "batch": args.batch, "m": args.m, **ledger.provenance(), "entries": []}

    def save() -> None:
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    if args.resume and args.output and args.output.exists():
        before = json.loads(args.output.read_text())
        if all(before[key] == result[key] for key in ("hardware", "commit", "batch", "m")):
            result["entries"] = [row for row in before["entries"] if row.get("complete")]
    begun, done = time.perf_counter(), {row["model"] for row in result["entries"]}
    for name in [name for name in args.models if name not in done]:
        if time.perf_counter() - begun > args.seconds:
            print(f"{name}: not run, the time is over", flush=True)
            continue
        result["entries"].append(row := {})
        bench_model(name, args, row, save)
        row["complete"] = True
        save()
    print(show(result))


if __name__ == "__main__":
    main()
