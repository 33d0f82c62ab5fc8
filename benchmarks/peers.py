"""The same training through the peers' optimizers and through ours: equal accuracy, and the time to get there.

    python benchmarks/peers.py --peers peers --output results/benchmarks/h100-peers.json \\
        model=vit_s32 data=imagenette data.root=data/imagenette160 data.image_size=160 data.eval_resize=160 ...

Same model, initial weights, images, crops, order, learning rates, decay groups, precision and loss; one perturbation a
batch (m = batch), no clipping, since juntang-zhuang's step leaves no place for it. The peers' code in a folder with
davda54's sam.py and juntang-zhuang's gsam/ is called in the plain loop of its README: compiled model, autocast.

    ours-sam, davda54, pytorch_optimizer (where it is installed)     SAM at model.sam_rho
    ours-gsam, juntang                                               GSAM at the same constant rho, with model.alpha

Seconds are of the training loop with compilation; "steady" is the median step times the number of steps. One run after
the other in one process, the parties in turn for each seed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report import PAIRS, peers_table

from sam_repro.config.compose import compose_config
from sam_repro.config.schema import Config
from sam_repro.distributed.ranks import Ranks, init_ranks
from sam_repro.models.build import build_model
from sam_repro.models.objective import loss_of
from sam_repro.optim import build_base, decay_groups
from sam_repro.records import ledger
from sam_repro.runner.worker import fresh
from sam_repro.training.data import batches, open_split
from sam_repro.training.evaluate import count_correct
from sam_repro.training.job import lr_schedule_of
from sam_repro.training.main import main as train
from sam_repro.training.run import hardware, seed_everything, use_bf16

INTERVAL = 25  # steps between readings of the clock


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of train.py, for all parties")
    parser.add_argument("--peers", type=Path, default="peers", help="folder with davda54's sam.py and gsam/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parties", nargs="+", default=list(dict.fromkeys(p for pair in PAIRS for p in pair)))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the table of a stored result, run nothing")
    return parser.parse_intermixed_args()


def config(overrides: list[str], seed: int, *, ascent: bool) -> Config:
    """What a party trains; the peers read model, data and recipe of it. Without ascent GSAM is SAM."""
    cfg = compose_config([*overrides, "optim=gsam_constant", "recipe.clip=0", "log.wandb=disabled", f"seed={seed}"])
    cfg.optim.m = cfg.recipe.batch_size
    cfg.train.log_every, cfg.train.eval_every_epochs, cfg.log.progress = INTERVAL, 0, "lines"
    cfg.optim.alpha *= ascent
    return cfg


def ours(cfg: Config) -> dict:
    """Through train.py's code."""
    with tempfile.TemporaryDirectory() as folder:
        cfg.log.runs_dir, cfg.log.ledger_dir = folder, f"{folder}/rows"
        row = train(cfg, [])
    steps = row["curves"]["train"]["step_seconds"]
    return {"steady_ms": 1e3 * statistics.median(steps), "seconds": 3600 * row["hours"], **row["evals"]["val"]}


Step = Callable[[torch.Tensor, torch.Tensor, float], None]


def theirs(cfg: Config, make: Callable[..., Step]) -> dict:
    """Through a plain loop around a peer's optimizer."""
    ranks = init_ranks(cfg.train.device)
    bf16 = use_bf16(cfg.train.dtype, ranks.device)
    seed_everything(cfg, ranks)
    loader = open_split(cfg, ranks, "train", training=True, batch_size=cfg.recipe.batch_size)
    val = open_split(cfg, ranks, "val", training=False, batch_size=cfg.data.eval_batch_size)
    shape = {"num_classes": cfg.data.num_classes, "image_size": cfg.data.image_size, "loss": cfg.recipe.loss}
    model = build_model(cfg.model, **shape).to(ranks.device)
    if cfg.model.family == "resnet" and ranks.device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False) if ranks.device.type == "cuda" else model
    logits = plain_logits(cfg, compiled, ranks.device, bf16)
    step = make(cfg, model, logits, loss_of(cfg))
    total = cfg.recipe.steps or int(cfg.recipe.epochs * loader.samples / cfg.recipe.batch_size)
    lr_schedule, times = lr_schedule_of(cfg, total), []
    model.train()
    start = tick = time.perf_counter()
    for done, (images, labels) in enumerate(batches(loader, 0, total), 1):
        step(images, labels, lr_schedule(done - 1))
        if done % INTERVAL == 0 or done == total:
            synchronise(ranks)
            now = time.perf_counter()
            times.append((now - tick) / ((done - 1) % INTERVAL + 1))
            tick = now
    seconds = time.perf_counter() - start
    with torch.no_grad():
        counts = count_correct(plain_logits(cfg, model.eval(), ranks.device, bf16), val, ranks)
    for each in (loader, val):
        each.close()
    return {"steady_ms": 1e3 * statistics.median(times), "seconds": seconds, **counts}


def synchronise(ranks: Ranks) -> None:
    """Wait for the GPU, where there is one."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def plain_logits(
    cfg: Config, model: torch.nn.Module, device: torch.device, bf16: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """uint8 images -> fp32 logits, as a user would write it."""
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (cfg.data.mean, cfg.data.std))
    layout = torch.channels_last if cfg.model.family == "resnet" else torch.contiguous_format

    def logits(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return model(((images.float() - mean) / std).contiguous(memory_format=layout)).float()

    return logits


def davda54(*arguments: Any) -> Step:
    """davda54/sam's optimizer."""
    from sam import SAM  # pyright: ignore[reportMissingImports]

    return two_steps(SAM, *arguments)


def pytorch_optimizer(*arguments: Any) -> Step:
    """pytorch_optimizer's SAM, which took over davda54's two methods."""
    from pytorch_optimizer import SAM  # pyright: ignore[reportMissingImports]

    return two_steps(SAM, *arguments)


def two_steps(sam: Callable, cfg: Config, model: torch.nn.Module, logits: Callable, loss: Callable) -> Step:
    """first_step, second_step."""
    groups = decay_groups(model.named_parameters(), cfg.recipe.weight_decay, decay=cfg.recipe.decay)
    optimizer = sam(groups, lambda params, **_: base_of(cfg, params), rho=cfg.optim.rho_max)

    def step(images: torch.Tensor, labels: torch.Tensor, lr: float) -> None:
        set_lr(optimizer, lr)
        loss(logits(images), labels).backward()
        optimizer.first_step(zero_grad=True)
        loss(logits(images), labels).backward()
        optimizer.second_step(zero_grad=True)

    return step


def juntang(cfg: Config, model: torch.nn.Module, logits: Callable, loss: Callable) -> Step:
    """set_closure's closure, step, update_rho_t."""
    from gsam import GSAM, ProportionScheduler  # pyright: ignore[reportMissingImports]

    base = base_of(cfg, decay_groups(model.named_parameters(), cfg.recipe.weight_decay, decay=cfg.recipe.decay))
    constant = torch.optim.lr_scheduler.ConstantLR(base, factor=1.0)
    rho = ProportionScheduler(constant, 1.0, 1.0, cfg.optim.rho_max, cfg.optim.rho_max)
    optimizer = GSAM(model.parameters(), base, model, gsam_alpha=cfg.optim.alpha, rho_scheduler=rho)

    def step(images: torch.Tensor, labels: torch.Tensor, lr: float) -> None:
        set_lr(base, lr)

        def closure() -> tuple[torch.Tensor, torch.Tensor]:
            base.zero_grad()
            with torch.enable_grad():
                z = logits(images)
                value = loss(z, labels)
            value.backward()
            return z, value.detach()

        optimizer.step(closure)
        optimizer.update_rho_t()

    return step


def base_of(cfg: Config, groups: list) -> torch.optim.Optimizer:
    """The recipe's base optimizer, as our own runs have it."""
    r = cfg.recipe
    more = {"momentum": r.momentum, "nesterov": r.nesterov, "betas": (r.betas[0], r.betas[1]), "eps": r.eps}
    return build_base(r.base, groups, lr=r.lr, **more)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def main() -> None:
    args = arguments()
    if args.show:
        print(peers_table([json.loads(args.show.read_text())]))
        return
    sys.path.insert(0, str(args.peers))
    makers = {"davda54": davda54, "pytorch_optimizer": pytorch_optimizer, "juntang": juntang}
    if not importlib.util.find_spec("pytorch_optimizer"):
        args.parties = [party for party in args.parties if party != "pytorch_optimizer"]
    runs: list[dict] = []
    result: dict = {"kind": "peers", "overrides": args.overrides, "hardware": "", **ledger.provenance(), "runs": runs}
    for seed in range(args.seeds):
        for party in args.parties:
            fresh()
            gc.collect()
            cfg = config(args.overrides, seed, ascent=party in PAIRS[-1])
            run = theirs(cfg, makers[party]) if party in makers else ours(cfg)
            runs.append({"party": party, "seed": seed, **run})
            result["hardware"] = hardware(init_ranks(cfg.train.device))
            print(json.dumps(runs[-1]), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(peers_table([result]))


if __name__ == "__main__":
    main()
