"""Measure this machine: the step of every model and method of some tables, and their loaders, for results/benchmarks/.

A step is measured by a real run of train.py's code on generated images, so that nothing is timed that is not trained.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_repro.config.compose import compose_config
from sam_repro.config.schema import Config
from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import unique_runs
from sam_repro.paper.measured_speeds import Entry, benchmarks_dir, period_of
from sam_repro.paper.outcomes import curve
from sam_repro.paper.spec import Table
from sam_repro.records import ledger
from sam_repro.records.files import write_atomic
from sam_repro.runner.worker import fresh

BATCH = 256  # images per step: a multiple of m, and no more than the generated training set has
STEPS, WARM = 13, 4  # logged one by one; the first ones compile and allocate
CYCLE = 3  # steps, instead of k, between those that a method with a period makes dearer or cheaper
LOADER_SECONDS = 10.0


def calibrate(tables: list[Table], gpu: str) -> Path:
    """Measure one run of each (model, method, m) and each data set; return the JSON file, written after each of them.

    What the file held of this hardware and is not measured again stays, under the commit and date it was made at.
    """
    runs = unique_runs(tables, seeds=1).values()
    kinds = {(r.config.model.name, r.config.optim.name, r.config.optim.m): r.config for r in runs}
    path = benchmarks_dir() / f"calibration-{gpu}.json"
    hardware = ""
    for i, cfg in enumerate(kinds.values(), 1):
        print(f"({i}/{len(kinds)}) step of {cfg.model.name} with {cfg.optim.name}", file=sys.stderr)
        entry, hardware = measure_step(cfg)
        fresh()
        store(path, entry, {"hardware": hardware, "gpu": gpu})
    for name, cfg in {cfg.data.name: cfg for cfg in kinds.values()}.items():
        print(f"loader of {name}", file=sys.stderr)
        try:
            store(path, measure_loader(cfg), {"hardware": hardware, "gpu": gpu})
        except UserError as error:
            print(f"not measured: {error}", file=sys.stderr)
    print(path, file=sys.stderr)
    return path


# Of two entries equal in these the newer one stays.
SUBJECT = ("kind", "model", "method", "m", "image_size", "period", "data")


def store(path: Path, entry: Entry, machine: dict[str, str]) -> None:
    """Put an entry in the place of the older one of the same subject; a file of other hardware is begun anew."""
    older: list[Entry] = []
    if path.is_file():
        tree = json.loads(path.read_text())
        if tree["hardware"] == machine["hardware"]:
            made = {k: tree[k] for k in ("commit", "date")}
            older = [made | e for e in tree["entries"] if any(e.get(k) != entry.get(k) for k in SUBJECT)]
    now = {"date": time.strftime("%Y-%m-%d"), **ledger.provenance()}
    entries = [*older, {k: now[k] for k in ("commit", "date")} | entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(machine | now | {"entries": entries}, indent=1) + "\n")


def measure_step(cfg: Config) -> tuple[Entry, str]:
    """Images per second of one process, from the median over logged steps; and the hardware's name.

    Of a method with a period both kinds of steps are timed, and weighed as in the period.
    """
    from sam_repro.training.main import main

    synthetic = compose_config(["data=synthetic"]).data
    side = cfg.data.image_size
    data = replace(synthetic, image_size=side, eval_resize=side, num_classes=cfg.data.num_classes)
    recipe = replace(cfg.recipe, batch_size=BATCH, steps=STEPS, warmup_steps=1)
    train = replace(cfg.train, log_every=1, eval_every_epochs=0)
    with tempfile.TemporaryDirectory() as folder:
        log = replace(cfg.log, runs_dir=folder, ledger_dir=f"{folder}/ledger", wandb="disabled", progress="lines")
        plain = compose_config(["augment=none"]).augment
        unmeasured = replace(cfg.sharpness, images=0)
        measured = replace(cfg, data=data, recipe=recipe, train=train, augment=plain, sharpness=unmeasured, log=log)
        if (period := period_of(cfg)) > 1:
            cycle = {"k": CYCLE} if cfg.optim.perturb == "eigen" else {"every": CYCLE}
            measured = replace(measured, optim=replace(cfg.optim, **cycle))
        row = main(measured)
        if row["status"] != "done":
            raise UserError(f"the calibration run {row['run_id']} ended as {row['status']}")
        row = ledger.read_row(ledger.row_path(f"{folder}/ledger", row["run_id"]))
    mean = mean_step(curve(row, "step_seconds"), period)
    entry: dict[str, Any] = {"kind": "step", "model": cfg.model.name, "method": cfg.optim.name, "m": cfg.optim.m}
    entry |= {"batch": BATCH, "dtype": row["dtype"], "image_size": side, "compile": cfg.train.compile, "period": period}
    return entry | {"images_per_second": BATCH / mean / row["world"]}, row["hardware"]


def mean_step(seconds: Sequence[float | None], period: int) -> float:
    """Seconds of a step: the median after the first WARM; of a period, median by median of its two kinds."""
    timed = [(i, s) for i, s in enumerate(seconds) if i >= WARM and s is not None]
    if period == 1:
        return statistics.median(s for _, s in timed)
    rare, others = (statistics.median(s for i, s in timed if (i % CYCLE == 0) == wanted) for wanted in (True, False))
    return others + (rare - others) / period


def measure_loader(cfg: Config) -> Entry:
    """Images per second that the training loader delivers to one process, after its first batch."""
    import torch

    from sam_repro.data.loaders.build import build_loader

    batch = min(cfg.recipe.batch_size, 512)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = build_loader(
        cfg.data, cfg.augment, split="train", training=True, batch_size=batch, seed=0, rank=0, world=1, device=device
    )
    with closing(loader):
        batches = iter(loader.epoch(0, 0))
        next(batches)
        images, start = 0, time.perf_counter()
        for pixels, _ in batches:
            images += len(pixels)
            if time.perf_counter() - start > LOADER_SECONDS:
                break
        elapsed = time.perf_counter() - start
    if not images:
        raise UserError(f"data={cfg.data.name} has only one batch of {batch}: too few to time the loader")
    entry = {"kind": "loader", "data": cfg.data.name, "backend": loader.backend, "workers": cfg.data.workers}
    return entry | {"images_per_second": images / elapsed}
