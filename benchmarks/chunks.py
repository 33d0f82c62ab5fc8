"""Images per second by images per pass: GSAM's recipe step on one GPU, with the chunk that each cap of memory gives.

    python benchmarks/chunks.py --models vit_b16 vit_b32 --caps 141 24 16 --output results/benchmarks/h200-chunks.json

The batch of 4,096 under each cap, and a batch of 512 in one pass, one after the other in one process; a figure is the
median of `--steps` steps. Under a cap torch may take no more than so many GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from clock import seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam_repro.config.compose import compose_config
from sam_repro.distributed.ranks import Ranks
from sam_repro.models.build import build_model
from sam_repro.optim import build_base, decay_groups
from sam_repro.records import ledger
from sam_repro.training.method import gradient_step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b16", "vit_b32"])
    parser.add_argument("--method", default="gsam")
    parser.add_argument("--caps", nargs="+", type=float, default=[141, 24, 16], help="GB; the first is first measured")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def bench(name: str, args: argparse.Namespace, save) -> None:
    """One model: the same engine throughout, so that a shape is compiled once."""
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    keys = [f"model={name}", f"optim={args.method}", "data=synthetic", "data.num_classes=1000"]
    cfg = compose_config(keys)
    batch = cfg.recipe.batch_size
    ranks = Ranks(0, 1, 0, 1, device)
    model = build_model(cfg.model, num_classes=1000, image_size=224, loss=cfg.recipe.loss).to(device).train()
    base = build_base(cfg.recipe.base, decay_groups(model.named_parameters(), cfg.recipe.weight_decay), lr=1e-4)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 1000, (batch,), device=device)
    chunks = {}
    for cap in args.caps:
        capped = compose_config([*keys, f"train.memory={cap}GB"])
        chunks[cap] = gradient_step(capped, model, ranks, local_batch=batch, bf16=True).chunk
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    step = gradient_step(cfg, model, ranks, local_batch=batch, bf16=True)

    def run(size: int) -> None:
        step(images[:size], labels[:size], rho=0.1)
        step.clip_(cfg.recipe.clip)
        base.step()

    for cap, size in [*((cap, batch) for cap in args.caps), (args.caps[0], 512)]:
        step.chunk = chunks[cap]
        step._forget()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.set_per_process_memory_fraction(min(cap * 1e9 / total, 1.0), device)
        start = time.perf_counter()
        run(size)
        torch.cuda.synchronize()
        setup = time.perf_counter() - start
        rounds = [seconds(lambda size=size: run(size)) for _ in range(args.steps if size == batch else 5 * args.steps)]
        entry = {"kind": "chunk", "model": name, "method": args.method, "m": step.m, "batch": size, "cap_gb": cap}
        entry |= {"images_per_pass": step.chunk, "seconds": statistics.median(rounds), "rounds": rounds}
        entry |= {"images_per_second": size / entry["seconds"], "setup_seconds": setup}
        entry |= {"peak_bytes": torch.cuda.max_memory_reserved(device), "dtype": "bf16", "image_size": 224}
        save(entry)
        print(
            f"{name} batch {size}, {cap:g} GB: {step.chunk} per pass, {entry['images_per_second']:.0f} images/s, ",
            end="",
        )
        print(f"peak {entry['peak_bytes'] / 1e9:.1f} GB, ready after {setup:.0f} s", flush=True)
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    result = {"hardware": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **ledger.provenance()}
    result["entries"] = []

    def save(entry: dict) -> None:
        result["entries"].append(entry)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")

    for name in args.models:
        bench(name, args, save)


if __name__ == "__main__":
    main()
