"""What the recipe's own batch takes of a card: every model and method under caps of memory, on one GPU.

    python benchmarks/memory.py --caps 16 24 40 80 141 --output results/benchmarks/h200-memory.json
    python benchmarks/memory.py --plan                 # only which passes would be chosen, from the trial passes
    python benchmarks/memory.py --models vit_b16 --methods gsam --caps 16 141 --alone 6     # speeds
    python benchmarks/memory.py --table results/benchmarks/h200-memory.json                 # README's table

Each entry is a run of train.py's code with debug=profile (generated images) and train.memory=<cap>: its images per
pass and its peak. Runs share the GPU as far as their caps allow, so images per second are only kept with --alone, which
makes one run after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam_repro.config.compose import compose_config
from sam_repro.config.memory import GB
from sam_repro.paper.memory import footprint
from sam_repro.paper.render.numbers import markdown_table
from sam_repro.records import ledger

MODELS = ["vit_b32", "vit_b16", "mixer_b16", "resnet50", "vit_s16", "vit_s32", "mixer_b32", "resnet152"]
MODELS += ["resnet101", "mixer_s8", "mixer_s16", "mixer_s32"]
METHODS = ["gsam", "sam", "vanilla"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--caps", nargs="+", type=float, default=[16, 24, 40, 80, 141], help="GB of a card")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides")
    parser.add_argument("--table", type=Path, help="print the stored measurements as Markdown")
    parser.add_argument("--plan", action="store_true", help="choose the passes, and train nothing")
    parser.add_argument("--alone", type=int, default=0, metavar="STEPS", help="one run at a time, of so many steps")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--total", type=float, default=132, help="GB that all runs together may use")
    parser.add_argument("--seconds", type=float, default=3600, help="begin nothing after so many")
    parser.add_argument("--output", type=Path, help="a file to go on with: what it holds is not run again")
    return parser.parse_args()


def config_of(model: str, method: str, cap: float, steps: int, more: list[str], folder: str) -> Any:
    keys = [f"model={model}", f"optim={method}", "debug=profile", f"recipe.steps={steps}", "train.log_every=1"]
    keys += [f"train.memory={cap}GB", f"log.runs_dir={folder}", "log.progress=lines", "recipe.warmup_steps=1"]
    return compose_config([*keys, *more])


def plan(model: str, method: str, cap: float, more: list[str]) -> dict[str, Any]:
    """The passes that a run would choose."""
    import torch

    from sam_repro.distributed.ranks import Ranks
    from sam_repro.models.build import build_model
    from sam_repro.training.method import gradient_step

    cfg, device = config_of(model, method, cap, 2, more, "runs"), torch.device("cuda", 0)
    start = time.perf_counter()
    net = build_model(cfg.model, num_classes=1000, image_size=cfg.data.image_size, loss=cfg.recipe.loss).to(device)
    if cfg.model.family == "resnet":
        net = net.to(memory_format=torch.channels_last)
    build = time.perf_counter() - start
    step = gradient_step(cfg, net, Ranks(0, 1, 0, 1, device), local_batch=cfg.recipe.batch_size, bf16=True)
    found = step.plan
    needs = {k: getattr(found.needs, k) for k in ("fixed", "per_image", "per_group", "sums")}
    seconds = time.perf_counter() - start - build
    return {
        "m": step.m,
        "images_per_pass": step.chunk,
        "expected_bytes": found.expected,
        "plan_seconds": seconds,
    } | needs


def train(model: str, method: str, cap: float, more: list[str], steps: int) -> dict[str, Any]:
    """A short run; its log's words on memory."""
    import torch

    from sam_repro.runner.worker import fresh
    from sam_repro.training import memory
    from sam_repro.training.main import main

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cfg = config_of(model, method, cap, max(steps, 2), more, folder)
        device = torch.device("cuda", 0)
        row = main(cfg)
        peaks = memory.recall(memory.key_of(cfg, device, row["m"]))
    fresh()
    entry = {"m": row["m"], "images_per_pass": row["images_per_pass"], "peak_bytes": row["peak_bytes"]}
    entry |= {k: peaks[k] for k in ("transient", "per_image") if k in peaks}
    entry |= {"batch": cfg.recipe.batch_size, "dtype": row["dtype"], "hardware": row["hardware"]}
    if steps:
        seconds = statistics.median(row["curves"]["train"]["step_seconds"][2:])
        entry |= {"step_seconds": seconds, "images_per_second": cfg.recipe.batch_size / seconds}
    return entry | {"seconds": time.perf_counter() - start}


def table(path: Path, caps: list[float]) -> str:
    """Images per pass that GSAM's plan takes under each cap; where runs were made, their highest peak and number."""
    stored = json.loads(path.read_text())["entries"]
    passes, runs = ([e for e in stored if e["kind"] == kind] for kind in ("passes", "memory"))
    tried = [cap for cap in caps if any(e["cap_gb"] == cap for e in runs)]
    lines = []
    for model in sorted({e["model"] for e in passes}):
        found = footprint(compose_config([f"model={model}", "optim=gsam"]), passes)
        assert found is not None
        lines.append([f"`{model}`", *(found.chosen(cap * GB) or "none" for cap in caps)])
        for cap in tried:
            peaks = [e["peak_bytes"] / GB for e in runs if e["model"] == model and e["cap_gb"] == cap]
            lines[-1].append(f"{max(peaks):.1f} GB ({len(peaks)})" if peaks else "not run")
    header = ["model", *(f"{cap:g} GB" for cap in caps), *(f"peak under {cap:g} GB" for cap in tried)]
    return markdown_table(header, lines)


def work(tasks: Any, results: Any, room: Any, used: Any, args: argparse.Namespace, end: float) -> None:
    """One process: models under caps, until there are none or time is up. A model's methods share compiled code."""
    while True:
        try:
            model, methods, cap = tasks.get(timeout=1)
        except Exception:
            return
        for method in methods:
            if time.time() > end:
                return
            entry = {"kind": "memory", "model": model, "method": method, "cap_gb": cap, "image_size": 224}
            taken = 0.0 if args.plan else min(cap, args.total)
            with room:
                while used.value + taken > args.total:
                    room.wait(1)
                used.value += taken
            try:
                if args.plan:
                    entry |= plan(model, method, cap, args.set)
                else:
                    entry |= train(model, method, cap, args.set, args.alone)
            except Exception as error:
                entry |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            finally:
                with room:
                    used.value -= taken
                    room.notify_all()
            results.put(entry)


def main() -> None:
    args = arguments()
    if args.table:
        print(table(args.table, args.caps))
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "sam_repro_compiled"))
    context, end = multiprocessing.get_context("spawn"), time.time() + args.seconds
    tasks, results, room = context.Queue(), context.Queue(), context.Condition()
    result = json.loads(args.output.read_text()) if args.output and args.output.exists() else {"entries": []}
    done = {
        (e["model"], e["method"], e["cap_gb"]) for e in result["entries"] if e["kind"] == "memory" and "error" not in e
    }
    for cap in args.caps:
        for model in args.models:
            missing = [method for method in args.methods if (model, method, cap) not in done]
            tasks.put((model, missing, cap))
    used = context.Value("d", 0.0, lock=False)
    count = 1 if args.alone else args.processes
    processes = [context.Process(target=work, args=(tasks, results, room, used, args, end)) for _ in range(count)]
    for process in processes:
        process.start()
    result |= {"date": time.strftime("%Y-%m-%d"), **ledger.provenance()}
    while any(p.is_alive() for p in processes) or not results.empty():
        with contextlib.suppress(Exception):
            entry = results.get(timeout=1)
            result |= {"hardware": entry.pop("hardware")} if "hardware" in entry else {}
            result["entries"].append(entry | {"commit": result["commit"]})
            print(json.dumps(entry), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
