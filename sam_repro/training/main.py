"""Train one model with one method. `main` reads from top to bottom."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from sam_repro.config.checks import check_warmup, validate
from sam_repro.config.compose import to_dict
from sam_repro.config.run_id import config_hash, run_id
from sam_repro.config.schema import Config
from sam_repro.curvature.monitor import Monitor
from sam_repro.data.evalsets import canonical, require
from sam_repro.data.images.augment import cutout, mixup
from sam_repro.distributed.ranks import average_buffers, init_ranks
from sam_repro.errors import UserError
from sam_repro.models.build import build_model
from sam_repro.models.objective import forward_of
from sam_repro.models.pretrained import start_from
from sam_repro.optim import METRICS, PowerIteration, build_base, decay_groups
from sam_repro.records import failure, ledger
from sam_repro.records.log import read_log
from sam_repro.training import checkpoint
from sam_repro.training.evaluate import count_correct, evaluate_sets
from sam_repro.training.method import gradient_step
from sam_repro.training.run_log import RunLog
from sam_repro.training.schedules import batches, lr_schedule_of, rho_of, step_seed
from sam_repro.training.setup import (
    find_state,
    hardware,
    loader_factory,
    open_run,
    seed_everything,
    split_batch,
    use_bf16,
)
from sam_repro.training.signals import Interrupted, StopSignal
from sam_repro.training.summary import curves, lag, model_card, rates, report

AGREE_EVERY = 10  # steps between the moments when ranks ask each other whether to stop or save


def main(cfg: Config, overrides: list[str] | None = None, *, born: float | None = None) -> ledger.Row:
    """Train, evaluate and write the ledger row of `cfg`; resume or return the row where there is one.

    Args:
        overrides: what was typed after train.py, for the row to say how the run is repeated.
        born: when this process started, in seconds since 1970, to say how long the first step took; None is now.

    Returns:
        the ledger row: status "done" or "diverged", counts, curves, provenance.

    Raises:
        UserError: bad input, in one sentence.
        Interrupted: after saving, on SIGTERM, SIGUSR2 or Ctrl-C.
    """
    # ---- setup -----------------------------------------------------------------------------------------------
    born = born or time.time()
    validate(cfg)
    ledger.provenance()  # remembered now, before anybody goes on in the checkout
    name, run_dir = run_id(cfg), Path(cfg.log.runs_dir) / run_id(cfg)
    row_path = ledger.row_path(cfg.log.ledger_dir, name)
    if row_path.exists():
        row = ledger.read_row(row_path)
        root = row["config"]["data"]["root"]
        where = "" if root == cfg.data.root else f", with the images of data.root={root}"
        print(f"{name} is {row['status']}: {row_path}{where}", file=sys.stderr)
        return row
    ranks = init_ranks(cfg.train.device, cfg.train.timeout_minutes)
    lock, log, stop, loaders = None, None, StopSignal(), []
    try:
        bf16 = use_bf16(cfg.train.dtype, ranks.device)
        seed_everything(cfg, ranks)
        if ranks.main:
            lock = open_run(cfg, run_dir)
            ranks.on_loss(lambda why: failure.give_up(run_dir, lock, why))
        if ranks.first(row_path.exists()):  # another process has finished it in the meantime
            ranks.finish()
            return ledger.read_row(row_path)
        # ---- data ------------------------------------------------------------------------------------------------
        local_batch = split_batch(cfg, ranks.world)
        loader_of = loader_factory(cfg, ranks)
        train_loader = loader_of("train", training=True, batch_size=local_batch)
        loaders.append(train_loader)
        splits = ["minival", "val"] if cfg.data.train_fraction < 1 else ["val"]
        eval_loaders = {s: loader_of(s, training=False, batch_size=cfg.data.eval_batch_size) for s in splits}
        loaders += eval_loaders.values()
        test_sets = require(cfg.data, [name for name in canonical(cfg.data.eval_sets) if name != "val"])
        steps_per_epoch = len(train_loader)
        if steps_per_epoch == 0:
            raise UserError(
                f"the training split has {train_loader.samples} images, fewer than one batch of {cfg.recipe.batch_size}"
            )
        total = cfg.recipe.steps or max(1, int(cfg.recipe.epochs * train_loader.samples / cfg.recipe.batch_size))
        check_warmup(cfg, total)

        # ---- model and method ------------------------------------------------------------------------------------
        model = build_model(
            cfg.model, num_classes=cfg.data.num_classes, image_size=cfg.data.image_size, loss=cfg.recipe.loss
        ).to(ranks.device)
        if cfg.model.family == "resnet" and ranks.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)  # the layout that tensor cores convolve in
        started = [start_from(model, cfg.init)] if cfg.init else []
        step = gradient_step(cfg, model, ranks, local_batch=local_batch, steps_per_epoch=steps_per_epoch, bf16=bf16)
        if isinstance(step.pre_step, PowerIteration) and cfg.optim.eigen_images == "fixed":
            step.pre_step.fix(*(t.clone() for t in next(iter(train_loader.epoch(0, 0)))))
        monitor = Monitor(cfg, model, step, ranks) if cfg.sharpness.images else None
        try:
            base = build_base(
                cfg.recipe.base,
                decay_groups(model.named_parameters(), cfg.recipe.weight_decay, decay=cfg.recipe.decay),
                lr=cfg.recipe.lr,
                momentum=cfg.recipe.momentum,
                nesterov=cfg.recipe.nesterov,
                betas=(cfg.recipe.betas[0], cfg.recipe.betas[1]),
                eps=cfg.recipe.eps,
            )
        except ValueError as error:
            raise UserError(f"recipe.base: {error}") from None

        # ---- resume ----------------------------------------------------------------------------------------------
        done, seconds, interval = 0, 0.0, 0.0  # interval: seconds of the steps since the last line of the log
        sharing = most = int(os.environ.get("SAM_REPRO_SHARING", "1"))  # runs on this GPU (paper/pool.py), now; ever
        hours = 0.0  # of processors, of shared ones this run's share
        totals, counted = torch.zeros(len(METRICS), device=ranks.device), 0
        counts = {}
        state, damaged = find_state(cfg, run_dir, ranks, manifest=train_loader.manifest)
        if state is not None:
            model.load_state_dict(state["model"])
            base.load_state_dict(state["base"])
            step.load_state_dict(state["method"])
            done, seconds, totals, counted = state["step"], state["seconds"], state["totals"], state["counted"]
            interval = state.get("interval", 0.0)
            hours, most = state.get("hours", seconds * ranks.world / 3600), max(sharing, state.get("sharing", 1))
            counts = state["counts"] if done == total else {}
        resumed_at: int = done
        log = RunLog(run_dir if ranks.main else None, cfg, run_id=name, step=done, total=total)
        for sentence in started + damaged:
            log.say(sentence)
        log.say(
            f"{name}: {total} steps of {cfg.recipe.batch_size} images ({total / steps_per_epoch:.1f} epochs) on "
            f"{ranks.world} x {hardware(ranks)}, {'bf16' if bf16 else 'fp32'}, {train_loader.backend} loader"
            + (f", resumed at step {done}" if done else "")
        )
        log.say(f"{train_loader.backend} loader: {train_loader.reason}")

        def save(score: float | None = None) -> None:
            """Save everything that step `done` + 1 depends on; rank 0 writes."""
            average_buffers(model, ranks)
            state = {"model": model.state_dict(), "base": base.state_dict(), "method": step.state_dict()}
            state |= {"step": done, "seconds": seconds, "interval": interval, "totals": totals, "counted": counted}
            state |= {"hours": hours, "sharing": most, "counts": counts, "manifest": train_loader.manifest}
            if lock is not None:
                lock.check()
                checkpoint.save(run_dir, state, step=done, config_hash=config_hash(cfg), score=score)

        def leave(number: int) -> NoReturn:
            """Told to stop by a signal, and saved."""
            log.say(f"stopped at step {done} of {total} and saved; the same command goes on from there")
            log.close()
            ranks.finish()
            raise Interrupted(128 + number)

        def pause(doing: str) -> None:
            """After training, where all is saved: leave if told to, else show what goes on."""
            if number := int(ranks.max(stop.received or 0)):
                leave(number)
            log.wait(doing)

        def evaluate() -> dict[str, dict[str, int]]:
            """Exact counts on every evaluation split."""
            average_buffers(model, ranks)
            model.eval()
            forward = forward_of(cfg, model, ranks.device, bf16=bf16)
            counts = {s: count_correct(lambda x: forward({}, x), ld, ranks) for s, ld in eval_loaders.items()}
            model.train()
            for split, count in counts.items():
                log.record({"step": done, "eval": split, **count})
            return counts

        def measure(*, final: bool = False) -> dict[str, Any]:
            """The sharpness at these weights, logged; empty where none is wanted."""
            if monitor is None:
                return {}
            if final:
                log.say(f"measuring the sharpness on {cfg.sharpness.images} images; the weights are saved")
            after = (lambda products: pause(f"{products} products with the Hessian")) if final else None
            found = monitor(done, rho_of(cfg, lr_schedule(max(done - 1, 0))), final=final, after=after)
            if "problem" in found:
                log.say(found["problem"])
            else:
                log.record({"step": done, "sharpness": found})
            return found

        # ---- loop ------------------------------------------------------------------------------------------------
        eval_every = round(cfg.train.eval_every_epochs * steps_per_epoch) or total
        lr_schedule = lr_schedule_of(cfg, total)
        status = "done"
        tick = saved_at = time.perf_counter()
        model.train()
        for images, labels in batches(train_loader, done, total):
            lr = lr_schedule(done)
            for group in base.param_groups:
                group["lr"] = lr
            rho = rho_of(cfg, lr)
            if cfg.augment.cutout:
                hide = {"side": cfg.augment.cutout, "mean": cfg.data.mean, "first": ranks.rank * local_batch}
                images = cutout(images, **hide, seed=cfg.seed, step=done)
            if cfg.augment.mixup:
                mix = {"p": cfg.augment.mixup, "classes": cfg.data.num_classes, "m": cfg.optim.m or local_batch}
                images, labels = mixup(images, labels, **mix, seed=cfg.seed, step=done, rank=ranks.rank)
            totals += step(images, labels, rho=rho, seed=step_seed(cfg.seed, done))
            if cfg.recipe.clip:
                step.clip_(cfg.recipe.clip)
            base.step()
            step.apply_decoupled_(lr)
            done, counted = done + 1, counted + 1
            log.step()
            if done == resumed_at + 1:
                totals.sum().item()  # wait for the device, this once
                log.say(f"the first step was done after {time.time() - born:.0f} s")
            ranks.pulse(done)

            due = done % cfg.train.log_every == 0 or done == total
            agree = done % AGREE_EVERY == 0 or ranks.world == 1
            late = agree and ranks.any(time.perf_counter() - saved_at > 60 * cfg.train.save_every_minutes)
            stopping = int(ranks.max(stop.received or 0)) if agree else 0  # the signal, equal on all ranks
            evaluating = done % eval_every == 0 or done == total
            saving = late or bool(stopping) or evaluating
            saving = saving or bool(cfg.train.save_every_steps and done % cfg.train.save_every_steps == 0)
            measuring = monitor is not None and monitor.due(done) and done < total
            if due or saving or measuring:
                means = dict(zip(METRICS, (totals / counted).tolist(), strict=True))
                now = time.perf_counter()
                hours += (now - tick) * ranks.world / 3600 / sharing
                seconds, interval, tick = seconds + now - tick, interval + now - tick, now
                if not math.isfinite(means["loss"] + means["grad_norm"] + means["grad_norm_robust"]):
                    status = "diverged"
            if due:
                log.record(
                    {"step": done, "epoch": done / steps_per_epoch, **means, "lr": lr, "rho": rho}
                    | rates(interval, counted, total - done, cfg.recipe.batch_size, hours)
                    | lag(ranks.each(ranks.waits.take()))
                    | step.report(seconds)
                )
                totals, counted, interval = torch.zeros_like(totals), 0, 0.0
            if status == "diverged":
                log.say(
                    f"loss or gradient not finite at step {done}: stopping; older checkpoints, if any, are in {run_dir}"
                )
                break
            if evaluating:
                counts = evaluate()
            if measuring:
                measure()
                tick = time.perf_counter()
            if saving:
                first = next(iter(counts.values())) if evaluating else None
                save(first["correct"] / first["total"] if first else None)
                saved_at = tick = time.perf_counter()
            if stopping and done < total:
                leave(stopping)

        # ---- test sets -------------------------------------------------------------------------------------------
        if status == "done" and test_sets:
            forward = forward_of(cfg, model.eval(), ranks.device, bf16=bf16)
            counts |= evaluate_sets(lambda x: forward({}, x), cfg.data, test_sets, ranks, before=pause)
        curvature = measure(final=True) if status == "done" else {}

        # ---- ledger ----------------------------------------------------------------------------------------------
        row = {
            "run_id": name,
            "status": status,
            "seed": cfg.seed,
            "step": done,
            "steps": total,
            "steps_per_epoch": steps_per_epoch,
            "evals": counts,
            "sharpness": curvature,
            "config": to_dict(cfg),
            "config_hash": config_hash(cfg),
            "overrides": overrides or [],
            "manifest": train_loader.manifest,
            "backend": train_loader.backend,
            "m": step.m,
            "world": ranks.world,
            "hardware": hardware(ranks),
            "dtype": "bf16" if bf16 else "fp32",
            "hours": hours,
            "sharing": most,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **ledger.provenance(),
        }
        if ranks.main:
            row["curves"] = curves(read_log(run_dir / "log.jsonl"))
            if status == "done":
                checkpoint.export(model, run_dir / "model.safetensors", {"run_id": name, "timm": cfg.model.timm})
                (run_dir / "model_card.md").write_text(model_card(row))
            path = ledger.write_row(cfg.log.ledger_dir, row)
            log.close()
            log.say(report(row, path))
        ranks.finish()
        return row
    except Exception as error:
        if lock is not None:
            failure.note(run_dir, failure.sentence_of(error))
        ranks.farewell(failure.sentence_of(error), failure.exit_code(error))
        if log is not None:
            log.close()  # the next run of this process has its own
        raise
    finally:
        for loader in loaders:
            loader.close()
        if lock is not None:
            lock.release()
        ranks.close()
        stop.restore()
