"""What a sharpness-aware step costs, beside its floor and its peers, in one run on one GPU.

    python benchmarks/step.py --models vit_b32 resnet50 --output results/benchmarks/h100-step.json
    python benchmarks/step.py --device cpu --models vit_digits --size 32 --batch 64 --m 64 16     # fp32, not compiled

Synthetic uint8 images resident on the GPU, the model's own recipe, bf16, compiled. The parties run one after the other,
since a GPU does not hold the captured memory of all; each is warmed up and measured for `--rounds` rounds of `--steps`
steps. A figure is the median over rounds of the mean step; the floor is measured again at the end, to see whether the
machine drifted. Parties:

    timm        vanilla with timm's own layers, written plainly: compiled model, fp32 leaves, autocast, .backward()
    vanilla     the same with this project's layers (linear patch embedding, attention in one tile, blocked stem)
    floor       two such forward+backward passes and one base-optimizer step: what SAM cannot go below, written plainly
                with the same layers as everybody below
    ours-vanilla  this project's engine with method `vanilla`
    ours-floor  the engine's own two passes and one base-optimizer step: the stricter floor
    gsam-m<M>   this project's engine, groups of M images
    sam-m<M>    likewise, SAM
    davda54, juntang   the peers' optimizers in their own recipe, if --peers names a folder with sam.py and gsam/
    pytorch_optimizer  its SAM likewise, if it is installed
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import seconds
from timm.layers.attention import Attention
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sam_repro import ledger
from sam_repro.config import Config, compose_config
from sam_repro.distributed import Ranks
from sam_repro.layers.attention import ShortAttention
from sam_repro.layers.pool import StemPool
from sam_repro.models import PatchLinear, StemConv, build_model
from sam_repro.objective import gradient_step, loss_of
from sam_repro.optim import build_base, decay_groups
from sam_repro.optim.grouped import GroupedLayerNorm, GroupedLinear
from sam_repro.setup import hardware

Party = Callable[[], None]

# This project's layers and those of timm that they stand for.
OURS: dict[type, type] = {
    PatchLinear: nn.Conv2d,
    StemConv: nn.Conv2d,
    StemPool: nn.MaxPool2d,
    ShortAttention: Attention,
}
OURS |= {GroupedLinear: nn.Linear, GroupedLayerNorm: nn.LayerNorm}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_b32", "resnet50", "vit_b16", "mixer_b16"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--size", type=int, default=224, help="side of an image")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--m", nargs="+", type=int, default=[512, 64])
    parser.add_argument("--groups", default="auto", help="optim.groups of the m < batch parties")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--peers", type=Path, help="folder with davda54's sam.py and juntang-zhuang's gsam/")
    parser.add_argument("--parties", nargs="+", help="only these")
    parser.add_argument("--warm", action="store_true", help="compile everything, so that a later start finds it cached")
    parser.add_argument("--profile", metavar="PARTY", help="print the kernels of one party")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


class Bench:
    """One model on one device and everything that the parties share."""

    def __init__(self, name: str, batch: int, size: int, device: str):
        self.name, self.batch, self.size, self.device = name, batch, size, torch.device(device)
        self.gpu = device == "cuda"
        self.images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        self.labels = torch.randint(0, 1000, (batch,), device=self.device)
        self.ranks = Ranks(0, 1, 0, 1, self.device)

    def config(self, *overrides: str) -> Config:
        fixed = [f"recipe.batch_size={self.batch}", f"train.device={self.device}", "train.dtype=auto"]
        return compose_config([f"model={self.name}", *fixed, *overrides])

    def model(self, cfg: Config) -> torch.nn.Module:
        torch.manual_seed(0)
        model = build_model(cfg.model, num_classes=1000, image_size=self.size, loss=cfg.recipe.loss).to(self.device)
        return model.to(memory_format=torch.channels_last) if cfg.model.family == "resnet" else model

    def base(self, cfg: Config, model: torch.nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model.named_parameters(), cfg.recipe.weight_decay)
        return build_base(cfg.recipe.base, groups, lr=1e-4)

    # ---- parties -----------------------------------------------------------------------------------------------------

    def plain(self, passes: int, *, timm: bool = False) -> Party:
        """The obvious loop: compiled, autocast, .backward()."""
        cfg = self.config("optim=vanilla")
        model = self.model(cfg)
        if timm:
            for module in model.modules():  # every layer of ours is a subclass of what timm built
                module.__class__ = OURS.get(type(module), type(module))
        base = self.base(cfg, model)
        forward = self.plain_loss(cfg, model)

        def step() -> None:
            for _ in range(passes):
                base.zero_grad(set_to_none=True)
                forward().backward()
            base.step()

        return step

    def plain_loss(self, cfg: Config, model: torch.nn.Module) -> Callable[[], torch.Tensor]:
        loss = loss_of(cfg)
        layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format

        def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu):
                x = (images.float() / 127.5 - 1).contiguous(memory_format=layout)
                z = model(x)
            return loss(z.float(), labels)

        compiled = torch.compile(forward, dynamic=False) if self.gpu else forward
        return lambda: compiled(self.images, self.labels)

    def engine(self, *overrides: str, passes: int = 1) -> Party:
        """This project's engine; `passes` > 1 repeats the gradient before the one base-optimizer step."""
        cfg = self.config(*overrides)
        model = self.model(cfg)
        base = self.base(cfg, model)
        step = gradient_step(cfg, model, self.ranks, local_batch=self.batch, bf16=self.gpu)

        def run() -> None:
            for _ in range(passes):
                step(self.images, self.labels, rho=0.1)
            base.step()

        return run

    def davda54(self) -> Party:
        from sam import SAM  # pyright: ignore[reportMissingImports]

        return self.two_steps(SAM)

    def pytorch_optimizer(self) -> Party:
        from pytorch_optimizer import SAM  # pyright: ignore[reportMissingImports]

        return self.two_steps(SAM)

    def two_steps(self, sam: Callable[..., Any]) -> Party:
        """The loop of davda54's README, which others took over with its two methods."""
        cfg = self.config("optim=sam")
        model = self.model(cfg)
        kind = torch.optim.AdamW if cfg.recipe.base == "adamw" else torch.optim.SGD
        optimizer = sam(model.parameters(), kind, rho=0.1, lr=1e-4, fused=True)
        loss = self.plain_loss(cfg, model)

        def step() -> None:
            loss().backward()
            optimizer.first_step(zero_grad=True)
            loss().backward()
            optimizer.second_step(zero_grad=True)

        return step

    def juntang(self) -> Party:
        from gsam import GSAM, ProportionScheduler  # pyright: ignore[reportMissingImports]

        cfg = self.config("optim=gsam")
        model = self.model(cfg)
        base = self.base(cfg, model)
        lr = torch.optim.lr_scheduler.ConstantLR(base, factor=1.0)
        rho = ProportionScheduler(lr, max_lr=1e-4, min_lr=0.0, max_value=0.1, min_value=0.0)
        optimizer = GSAM(model.parameters(), base_optimizer=base, model=model, gsam_alpha=0.4, rho_scheduler=rho)
        layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format
        compiled = torch.compile(model, dynamic=False) if self.gpu else model
        loss = loss_of(cfg)

        def logits(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.gpu):
                return compiled((images.float() / 127.5 - 1).contiguous(memory_format=layout)).float()

        def step() -> None:
            def closure():
                optimizer.base_optimizer.zero_grad()
                with torch.enable_grad():
                    z = logits(self.images)
                    value = loss(z, self.labels)
                value.backward()
                return z, value.detach()

            optimizer.step(closure)

        return step


def matmul_ceiling() -> float:
    """TFLOP/s of an 8192^3 bf16 product on random data: what the chip can do."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(seconds(lambda: torch.mm(a, b), 20) for _ in range(5)) / 1e12


def forward_gflop(bench: Bench) -> float:
    """GFLOP of one image's forward pass, 2 x MAC."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build_model(bench.config().model, num_classes=1000, image_size=bench.size)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, bench.size, bench.size))
    return counter.get_total_flops() / 1e9


def bench_model(name: str, args: argparse.Namespace, ceiling: float, save: Callable[[list[dict]], None]) -> list[dict]:
    """Every party of one model; rows of the JSON, saved after each. `ceiling`: TFLOP/s, 0 where it is not known."""
    bench = Bench(name, args.batch, args.size, args.device)
    makers: dict[str, Callable[[], Party]] = {
        "timm": lambda: bench.plain(1, timm=True),
        "vanilla": lambda: bench.plain(1),
        "floor": lambda: bench.plain(2),
        "ours-vanilla": lambda: bench.engine("optim=vanilla", f"optim.m={args.batch}"),
        "ours-floor": lambda: bench.engine("optim=vanilla", f"optim.m={args.batch}", passes=2),
    }
    for m in args.m:
        for method in ("gsam", "sam"):
            makers[f"{method}-m{m}"] = lambda method=method, m=m: bench.engine(
                f"optim={method}", f"optim.m={m}", f"optim.groups={args.groups}"
            )
    if args.peers:
        sys.path.insert(0, str(args.peers))
        makers |= {"davda54": bench.davda54, "juntang": bench.juntang}
    if importlib.util.find_spec("pytorch_optimizer"):
        makers["pytorch_optimizer"] = bench.pytorch_optimizer
    makers["floor-again"] = makers["floor"]  # last, to see a drift of the machine
    if args.parties:
        makers = {k: v for k, v in makers.items() if k in args.parties}
    gflop, medians, rows = forward_gflop(bench), {}, []
    for party, make in makers.items():
        gc.collect()
        torch.cuda.empty_cache()
        if bench.gpu:
            torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        try:
            run = make()
            seconds(run, 3)
            setup = time.perf_counter() - start
            if args.warm:
                print(f"{name} {party}: compiled, {setup:.0f} s", flush=True)
                continue
            times = [seconds(run, args.steps) for _ in range(args.rounds)]
            if party == args.profile:
                profile(run)
        except Exception as error:  # one party's failure must not cost the others their run
            print(f"{name} {party} failed: {type(error).__name__}: {str(error)[:400]}", flush=True)
            continue
        finally:
            run = None
        peak = torch.cuda.max_memory_allocated() - before
        medians[party] = median = statistics.median(times)
        method, _, m = party.partition("-m")
        row = {"kind": "step", "model": name, "method": method, "m": int(m or args.batch), "batch": args.batch}
        row |= {
            "dtype": "bf16" if bench.gpu else "fp32",
            "image_size": args.size,
            "images_per_second": args.batch / median,
            "seconds": median,
        }
        row |= {"rounds": times, "peak_bytes": peak, "setup_seconds": setup}
        for floor in ("floor", "ours-floor"):
            if floor in medians:
                row[f"over_{floor}"] = median / medians[floor]
        if ceiling and party in ("timm", "vanilla", "ours-vanilla"):
            row["ceiling_share"] = 3 * gflop * args.batch / median / 1e3 / ceiling
        rows.append(row)
        save(rows)
        ratios = ", ".join(f"{k[5:]} x {v:.3f}" for k, v in row.items() if k.startswith("over_"))
        print(
            f"{name:10} {party:13} {1e3 * median:8.2f} ms {args.batch / median:8.0f} img/s  {ratios}  peak "
            f"{peak / 1e9:.2f} GB, ready after {setup:.0f} s, spread {100 * (max(times) / min(times) - 1):.1f} %"
            + (f", {100 * row['ceiling_share']:.1f} % of the ceiling" if "ceiling_share" in row else ""),
            flush=True,
        )
    return rows


def profile(party: Party) -> None:
    """Print where the GPU's time goes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            party()
        torch.cuda.synchronize()
    kernels = sorted(trace.key_averages(), key=lambda k: -k.device_time_total)
    total = sum(k.device_time_total for k in kernels)
    print(f"kernels: {total / 3e3:.2f} ms a step")
    for k in kernels[:32]:
        print(f"  {k.device_time_total / 3e3:7.3f} ms  {k.count // 3:5d} x  {k.key[:110]}", flush=True)


def main() -> None:
    args = arguments()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if args.device == "cpu":
        torch.set_num_threads(1)  # as the demo does
    ceiling = matmul_ceiling() if args.device == "cuda" else 0.0
    result = {
        "hardware": hardware(Ranks(0, 1, 0, 1, torch.device(args.device))),
        **({"matmul_tflops": ceiling} if ceiling else {}),
        "batch": args.batch,
        "rounds": args.rounds,
        "steps": args.steps,
        **ledger.provenance(),
        "entries": [],
    }
    print(f"{result['hardware']}" + (f", {ceiling:.0f} TFLOP/s bf16 product" if ceiling else ""), flush=True)
    for name in args.models:
        known = result["entries"]

        def save(rows: list[dict], known: list[dict] = known) -> None:
            result["entries"] = known + rows
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n")

        bench_model(name, args, ceiling, save)


if __name__ == "__main__":
    main()
