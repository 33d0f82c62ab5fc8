"""What a run needs before its first step: precision, seeds, its directory, its share of the batch, its loaders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sam_repro.config.compose import to_dict
from sam_repro.config.run_id import config_hash
from sam_repro.config.schema import Config
from sam_repro.data.loaders.build import Loader, build_loader
from sam_repro.distributed.ranks import Ranks
from sam_repro.errors import UserError
from sam_repro.records import failure, ledger
from sam_repro.records.lock import RunLock
from sam_repro.training import checkpoint

THREADS = torch.get_num_threads()  # train.threads=0


def use_bf16(dtype: str, device: torch.device) -> bool:
    """Whether the passes run under bf16 autocast."""
    supported = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bf16" and not supported:
        raise UserError(f"train.dtype=bf16, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic; use fp32")
    return dtype == "bf16" or (dtype == "auto" and supported and device.type == "cuda")


def seed_everything(cfg: Config, ranks: Ranks) -> None:
    """Equal initial weights on all ranks; deterministic algorithms where asked for."""
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.set_num_threads(cfg.train.threads or THREADS)
    torch.use_deterministic_algorithms(cfg.train.deterministic)
    torch.backends.cudnn.benchmark = not cfg.train.deterministic
    if cfg.train.deterministic and ranks.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def open_run(cfg: Config, run_dir: Path) -> RunLock:
    """Make the run directory, take its lock, and leave the resolved configuration in it."""
    try:
        rows = Path(cfg.log.ledger_dir)  # needed in days, but it costs nothing to know now
        rows.mkdir(parents=True, exist_ok=True)
        if not os.access(rows, os.W_OK):
            raise UserError(f"cannot write in log.ledger_dir={rows}")
    except OSError as error:
        raise UserError(f"cannot write in log.ledger_dir={cfg.log.ledger_dir}: {error}") from error
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir)
        failure.clear(run_dir)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg), sort_keys=False))
    except OSError as error:
        raise UserError(f"cannot write in {run_dir}: {error}") from error
    return lock


def find_state(cfg: Config, run_dir: Path, ranks: Ranks, *, manifest: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest good checkpoint that rank 0 finds, on all ranks, and a sentence for each damaged one.

    Raises:
        UserError: if it is of another configuration, or of other training images than those called `manifest`.
    """
    state, damaged = None, []
    if ranks.main:
        state, damaged = checkpoint.load_newest(run_dir, config_hash=config_hash(cfg), device=ranks.device)
    step = int(ranks.first(state["step"] if state else -1))
    if step >= 0 and not ranks.main:
        state = checkpoint.load_step(run_dir, step, ranks.device)
    if state is not None and state.get("manifest", manifest) != manifest:
        raise UserError(
            f"{run_dir} was begun with other training images (manifest {state['manifest']}; {cfg.data.root} now: "
            f"{manifest}); give these another data.name, or remove that folder"
        )
    return state, damaged


def split_batch(cfg: Config, world: int) -> int:
    """Images a rank, a step."""
    local, rest = divmod(cfg.recipe.batch_size, world)
    if rest:
        raise UserError(f"recipe.batch_size={cfg.recipe.batch_size} does not divide over {world} processes")
    if cfg.optim.perturb != "none" and local % cfg.optim.m:
        most = cfg.recipe.batch_size // cfg.optim.m
        hint = f"; recipe.batch_size={cfg.recipe.batch_size} is enough for {most} of them" if 0 < most < world else ""
        raise UserError(f"optim.m={cfg.optim.m} does not divide the batch of {local} images a process{hint}")
    if cfg.augment.mixup and (cfg.optim.m == 1 or local % (cfg.optim.m or local)):
        why = "mixes nothing" if cfg.optim.m == 1 else f"does not divide the batch of {local} images a process"
        raise UserError(f"augment.mixup mixes within groups of optim.m={cfg.optim.m} images, which {why}")
    return local


def loader_factory(cfg: Config, ranks: Ranks) -> Callable[..., Loader]:
    """build_loader with everything that the splits share filled in."""

    def loader_of(split: str, *, training: bool, batch_size: int) -> Loader:
        return build_loader(
            cfg.data,
            cfg.augment,
            split=split,  # pyright: ignore[reportArgumentType]
            training=training,
            batch_size=batch_size,
            seed=cfg.seed,
            rank=ranks.rank,
            world=ranks.world,
            device=ranks.device,
        )

    return loader_of


def hardware(ranks: Ranks) -> str:
    """The processor that does the arithmetic."""
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU {ledger.cpu_name()}"
