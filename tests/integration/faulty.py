"""train.py in processes that are told when to die. They are forked from one that has imported everything: cheap."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = ["model=vit_s32", "optim=gsam", "debug=tiny", "train.device=cpu", "train.threads=1", "data.workers=1"]
COMMAND += ["train.deterministic=true", "recipe.steps=120", "train.save_every_steps=4", "train.eval_every_epochs=1"]
COMMAND += ["train.log_every=3"]

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["sam_repro.train", "wandb", "faulty"])


def attempt(where: Path, *overrides: str, fault: str = "", after: float = 0, **env: str) -> tuple[int, str]:
    """Exit code and output of one `python train.py` in the folder `where`.

    Args:
        fault: "<moment> <n>": the process kills itself at the n-th such moment; see `arm`.
        after: seconds after which it is killed from outside; 0 is never.
    """
    where.mkdir(exist_ok=True)
    output = where / "output.txt"
    process = forks.Process(target=child, args=(where, [*COMMAND, *overrides], output, fault, env))
    process.start()
    process.join(after or 240)
    if process.is_alive():
        assert after, f"hangs: {output.read_text()}"
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode, output.read_text(errors="replace")


def child(where: Path, words: list[str], output: Path, fault: str, env: dict[str, str]) -> None:
    """The forked process."""
    os.environ.pop("WANDB_MODE", None)
    os.environ.update(env)
    os.chdir(where)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *words]
    from sam_repro.train import cli

    watch_batches(where / "batches.txt")
    if fault:
        arm(*fault.split())
    cli()


def die() -> None:
    """What the kernel does to a process that has used too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch_batches(path: Path) -> None:
    """Note which images every step saw."""
    from sam_repro import train

    real = train.batches

    def watched(loader: Any, done: int, total: int) -> Any:
        for step, (images, labels) in enumerate(real(loader, done, total), done):
            names = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in images]
            with open(path, "a") as file:
                file.write(f"{step} {' '.join(names)}\n")
            yield images, labels

    train.batches = watched


def arm(moment: str, n: str) -> None:
    """Make the n-th call of what belongs to a moment the last."""
    import torch

    from sam_repro import checkpoint, ledger, tracking, train
    from sam_repro.distributed import Ranks
    from sam_repro.log import RunLog
    from sam_repro.optim.step import GradientStep

    left = int(n)

    def before(real: Callable, when: Callable[..., bool] = lambda *a, **k: True, last: Callable = die) -> Callable:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal left
            if when(*arguments, **more):
                left -= 1
                if left == 0:
                    last(*arguments) if last is not die else die()
            return real(*arguments, **more)

        return call

    def half_saved(state: Any, file: Any) -> None:
        whole = io.BytesIO()
        saved(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    def half_a_line(log: RunLog, record: dict) -> None:
        log.file.write(b'{"step": 5, "lo')
        die()

    saved = torch.save
    if moment == "gradient":
        train.rho_of = before(train.rho_of)
    elif moment == "descent":  # between the gradient and the weights
        GradientStep.clip_ = before(GradientStep.clip_)
    elif moment == "save":
        torch.save = before(torch.save, last=half_saved)
    elif moment in ("rename", "digest", "rewrite"):  # of the data, of its digest, of the log at the start
        ending = {"rename": ".pt", "digest": ".json", "rewrite": "log.jsonl"}[moment]
        os.replace = before(os.replace, lambda source, target: str(target).endswith(ending))
    elif moment == "evaluation":
        Ranks.pulse = before(Ranks.pulse, lambda ranks, step=None: step is None)
    elif moment == "log":
        RunLog.record = before(RunLog.record, last=half_a_line)
    elif moment == "prune":
        checkpoint.prune = before(checkpoint.prune)
    elif moment == "export":
        checkpoint.export = before(checkpoint.export)
    elif moment == "row":
        ledger.write_row = before(ledger.write_row)
    elif moment == "patience":  # no death: seconds that the end waits for W&B
        tracking.PATIENCE = float(n)
    elif moment == "link":
        os.link = before(os.link, lambda source, target: "ledger" in str(target))
    else:
        raise ValueError(moment)
