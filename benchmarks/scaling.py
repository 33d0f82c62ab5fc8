"""Images per second on 1, 2, 4, ... GPUs of one host, what the reduction costs, and how far both are from ideal.

    python benchmarks/scaling.py --gpus 1 2 --models vit_b32 resnet50 --output results/benchmarks/<gpu>-scaling.json

Every GPU gets `--batch` images, resident, so that the work per GPU is constant (weak scaling). A party is a model, a
method and m. torchrun starts one process per GPU; each builds and compiles a party once, and then,
in every round, the first N measure it for every N in turn, while the others rest:

    step        the whole step: gradient, reduction over the N, clip, base optimizer
    alone       the same without the reduction, the N GPUs working at the same time
    reduction   the reduction by itself

as the median over rounds of the mean step; the slowest rank counts. Efficiency is images per second over N times those
of one GPU of the same run. The file is written after every party: what was cut off leaves the others.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

METHODS = {"vanilla": "optim=vanilla", "sam": "optim=sam", "gsam": "optim=gsam"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--models", nargs="+", default=["vit_b32", "resnet50"])
    parser.add_argument("--parties", nargs="+", default=["vanilla", "sam", "gsam", "gsam-m64"], help="method[-m<M>]")
    parser.add_argument("--batch", type=int, default=512, help="images per GPU")
    parser.add_argument("--size", type=int, default=224, help="side of an image")
    parser.add_argument("--reduce", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- one rank --------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], object], steps: int, device: Any, group: Any) -> float:
    """Seconds of one call: the mean of `steps`, begun together by the ranks of `group` (None: this one alone)."""
    import torch
    import torch.distributed as dist
    from clock import seconds

    if group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    return seconds(run, steps)


def slowest(times: list[float], device: Any, group: Any) -> float:
    """The median over rounds, of the slowest rank of `group`."""
    import torch
    import torch.distributed as dist

    median = torch.tensor([statistics.median(times)], dtype=torch.float64, device=device)
    if group is not None:
        dist.all_reduce(median, op=dist.ReduceOp.MAX, group=group)
    return median.item()


def worker(args: argparse.Namespace) -> None:
    """Every party on this rank; rank 0 writes the file."""
    import torch
    import torch.distributed as dist

    from sam_repro.distributed.ranks import init_ranks
    from sam_repro.records import ledger
    from sam_repro.training.run import hardware

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    ranks, rows = init_ranks(args.device), []
    several = ranks.world > 1
    groups = {n: dist.new_group(list(range(n))) if n > 1 else None for n in args.gpus}
    everybody = dist.new_group(backend="gloo") if several else None  # to wait in without work for the GPU
    result = {"batch": args.batch, "rounds": args.rounds, "steps": args.steps, "hardware": hardware(ranks)}
    result |= {"entries": rows, **ledger.provenance()}
    images = torch.randint(0, 256, (args.batch, 3, args.size, args.size), dtype=torch.uint8, device=ranks.device)
    labels = torch.randint(0, 1000, (args.batch,), device=ranks.device)
    parties = [(model, party, reduce) for model in args.models for party in args.parties for reduce in args.reduce]
    for name, party, reduce in parties:
        gc.collect()
        method, _, m = party.partition("-m")
        step, run = build(name, method, m, reduce, args, ranks, images, labels)
        for _ in range(5):
            run()
        mine = [n for n in args.gpus if ranks.rank < n]
        times = {(n, what): [] for n in mine for what in ("step", "reduction", "alone")}
        for n in args.rounds * args.gpus:  # in turn, since a GPU that gets warm gets slower
            ranks.pulse()
            if everybody is not None:
                dist.barrier(group=everybody)
            if n not in mine:
                continue
            group = groups[n]
            step.all_reduce = (lambda t, group=group: dist.all_reduce(t, group=group)) if group is not None else None
            times[n, "step"].append(timed(run, args.steps, ranks.device, group))
            alone = group is None
            times[n, "reduction"].append(0.0 if alone else timed(step._reduce, args.steps, ranks.device, group))
            step.all_reduce = None
            times[n, "alone"].append(timed(run, args.steps, ranks.device, group))
        for n in mine:
            row = {"kind": "scaling", "model": name, "method": method, "m": int(m or args.batch), "reduce": reduce}
            row |= {"gpus": n, "batch": args.batch, "bytes": 4 * len(step.flat)}
            row |= {w: slowest(times[n, w], ranks.device, groups[n]) for w in ("step", "reduction", "alone")}
            row["images_per_second"] = n * args.batch / row["step"]
            rows.append(row)
            if ranks.main:
                print(json.dumps(row), flush=True)
        if ranks.main:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
        del step, run
    ranks.close()


def build(name: str, method: str, m: str, reduce: str, args: argparse.Namespace, ranks: Any, images: Any, labels: Any):
    """(the engine, a whole step) of a party."""
    import torch

    from sam_repro.config.compose import compose_config
    from sam_repro.models.build import build_model
    from sam_repro.optim import build_base, decay_groups
    from sam_repro.training.method import gradient_step

    words = [f"model={name}", METHODS[method], f"optim.m={m or args.batch}", f"train.reduce={reduce}"]
    words += [f"recipe.batch_size={args.batch * ranks.world}", f"train.device={args.device}"]
    words += [f"data.image_size={args.size}", f"data.eval_resize={args.size}"]
    cfg = compose_config([*words, f"model.tiny={str(args.device == 'cpu').lower()}"])
    torch.manual_seed(0)
    model = build_model(cfg.model, num_classes=1000, image_size=args.size, loss=cfg.recipe.loss).to(ranks.device)
    if cfg.model.family == "resnet" and args.device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    base = build_base(cfg.recipe.base, decay_groups(model.named_parameters(), 0.1), lr=1e-4)
    step = gradient_step(cfg, model, ranks, local_batch=args.batch, bf16=args.device == "cuda")

    def run() -> None:
        step(images, labels, rho=0.1)
        step.clip_(1.0)
        base.step()

    return step, run


# ---- all of them -----------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    args.gpus = sorted(set(args.gpus))
    if args.worker:
        worker(args)
        return
    from report import scaling_table as table

    with tempfile.TemporaryDirectory() as folder:
        output = args.output or Path(folder) / "scaling.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.unlink(missing_ok=True)  # what is printed in the end is this run's
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.gpus[-1]}"]
        command += [__file__, *sys.argv[1:], "--worker", "--output", str(output)]
        code = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            print(f"exit code {code}", file=sys.stderr)
        if output.exists():
            print(table([json.loads(output.read_text())]))
        sys.exit(code)


if __name__ == "__main__":
    main()
