"""train.py in processes that are told when to die. They are forked from one that has imported everything: cheap."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = ["model=vit_s32", "optim=gsam", "debug=tiny", "train.device=cpu", "train.threads=1", "data.workers=1"]
COMMAND += ["train.deterministic=true", "recipe.steps=120", "train.save_every_steps=4", "train.eval_every_epochs=1"]
COMMAND += ["train.log_every=3"]

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["sam_repro.cli.train", "sam_repro.training.main", "wandb", "faulty"])


class Attempt:
    """One `python train.py` in the folder `where`.

    Args:
        fault: "<moment> <n>": the process kills itself at the n-th such moment; see `arm`.
    """

    def __init__(self, where: Path, *overrides: str, fault: str = "", **env: str):
        where.mkdir(exist_ok=True)
        self.path = where / f"output{env.get('RANK', '')}.txt"
        self.path.unlink(missing_ok=True)
        words = [*COMMAND, *overrides]
        self.process = forks.Process(target=child, args=(where, words, self.path, fault, env), daemon=True)
        self.process.start()

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.path.read_text(errors="replace") if self.path.exists() else ""

    def reach(self, text: str, seconds: float = 120) -> None:
        """Wait until it says so."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.is_alive() and time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 240) -> int:
        """Its exit code; minus the signal that killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"hangs: {self.output}"
        return self.process.exitcode


def attempt(where: Path, *overrides: str, fault: str = "", after: float = 0, **env: str) -> tuple[int, str]:
    """Exit code and output of one `python train.py`; killed from outside `after` seconds, if any."""
    process = Attempt(where, *overrides, fault=fault, **env)
    if after:
        process.process.join(after)
        process.process.kill()
    return process.end(), process.output


def child(where: Path, words: list[str], output: Path, fault: str, env: dict[str, str]) -> None:
    """The forked process."""
    os.environ.pop("WANDB_MODE", None)
    os.environ.update(env)
    os.chdir(where)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *words]
    from sam_repro.cli.train import cli

    watch_batches(where / "batches.txt")
    if fault:
        arm(*fault.split())
    cli()


def die() -> None:
    """What the kernel does to a process that has used too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def watch_batches(path: Path) -> None:
    """Note which images every step saw."""
    from sam_repro.training import fit

    real = fit.batches

    def watched(loader: Any, done: int, total: int) -> Any:
        for step, (images, labels) in enumerate(real(loader, done, total), done):
            names = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in images]
            with open(path, "a") as file:
                file.write(f"{step} {' '.join(names)}\n")
            yield images, labels

    fit.batches = watched


def arm(moment: str, n: str) -> None:
    """Make the n-th call of what belongs to a moment the last."""
    import torch

    from sam_repro.distributed.ranks import Ranks
    from sam_repro.optim.two_pass import GradientStep
    from sam_repro.records import ledger
    from sam_repro.training import checkpoint, fit
    from sam_repro.training import wandb_writer as tracking
    from sam_repro.training.run_log import RunLog

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
        assert log.file is not None
        log.file.write(b'{"step": 5, "lo')
        die()

    saved = torch.save
    if moment == "gradient":
        fit.rho_of = before(fit.rho_of)
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
    elif moment == "sleep":  # no death: milliseconds before every step
        fit.rho_of = before(fit.rho_of, lambda *a: bool(time.sleep(float(n) / 1000)))
    elif moment == "patience":  # no death: seconds that the end waits for W&B
        tracking.PATIENCE = float(n)
    elif moment == "hungry":  # no death: more memory is asked for than there is
        fit.rho_of = before(fit.rho_of, last=lambda *a: torch.empty(2**60))
    elif moment == "nohup":  # no death: as a process that nohup starts
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    elif moment == "link":
        os.link = before(os.link, lambda source, target: "ledger" in str(target))
    else:
        raise ValueError(moment)
