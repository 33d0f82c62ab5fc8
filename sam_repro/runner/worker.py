"""What a slot of the scheduler trains with: a process of its own on a GPU, or this process.

The process is this module as a program: runs from stdin, one per line, and an answer per line on stdout. What a run
prints goes to stderr, which the scheduler sends to a log file. A run that fails is answered as such; a worker that dies
costs its current run only.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_repro.config.compose import compose_config
from sam_repro.errors import UserError
from sam_repro.paper.runs import Run
from sam_repro.records.lock import Held
from sam_repro.training.signals import STOPS, Interrupted, StopSignal, handle

KEEP = 16  # runs after which a worker forgets its compiled code
SHARING = "SAM_REPRO_SHARING"  # how many runs share this one's GPU; sam_repro.training.progress notes it in the row
Answer = dict[str, str]  # "status": done, diverged, stopped, held, failed or died; "why"


class WorkerProcess:
    """A process of sam_repro.runner.worker on one GPU. It takes one run after the other.

    Args:
        gpu: its name in CUDA_VISIBLE_DEVICES.
        sharing: how many workers share the GPU.
        threads: this worker's share of the cores, for arithmetic and for compiling.
        log: file for what its runs print.

    Raises:
        OSError: no folder for the log, or no memory for a process.
    """

    def __init__(self, gpu: str, sharing: int, threads: int, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        shares = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(threads))
        self.log = log
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sam_repro.runner.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | shares | {"CUDA_VISIBLE_DEVICES": gpu, SHARING: str(sharing)},
                start_new_session=True,  # Ctrl-C is for the scheduler, which passes it on
            )

    def do(self, r: Run, ledger_dir: Path | None) -> Answer:
        """Send a run and wait for the answer; "died" where none comes."""
        assert self.process.stdin and self.process.stdout
        task = {"overrides": list(r.overrides), "ledger": str(ledger_dir or "")}
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.process.wait()
            return {"status": "died", "why": f"the worker ended with code {self.process.returncode}, see {self.log}"}

    def stop(self, number: int) -> None:
        """Send a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()


class ThisProcess:
    """Trains here, as `python train.py` does: with its progress bar, and its errors end the queue."""

    def __init__(self) -> None:
        self.busy = False
        self.stopped_by: int | None = None

    def do(self, r: Run, ledger_dir: Path | None) -> Answer:
        """Train a run. Raises UserError where train.py ends in one."""
        from sam_repro.training.main import main  # torch comes with it: not before there is something to run

        cfg = r.config
        if ledger_dir is not None:  # in a copy: all seeds of a row share their configuration
            cfg = replace(cfg, log=replace(cfg.log, ledger_dir=str(ledger_dir)))
        try:
            self.busy = True
            status = main(cfg, list(r.overrides))["status"]
            self.stopped_by = StopSignal.late  # it came too late for this run, which was just ending
            fresh()
            return {"status": status}
        except Interrupted as stop:
            self.stopped_by = int(stop.code or 0) - 128  # pyright: ignore[reportArgumentType]: an int
            return {"status": "stopped"}
        except Held as error:
            return {"status": "held", "why": str(error)}
        finally:
            self.busy = False

    def stop(self, number: int) -> None:
        """The run's own handler takes the signal; between two runs the scheduler's."""
        os.kill(os.getpid(), number)

    def close(self) -> None:
        """Nothing to close."""


# ---- the process ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer until stdin ends or a run was told to stop."""
    handle(STOPS, leave)  # a run takes them over until it ends
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for runs, line in enumerate(sys.stdin, 1):
        answer = attempt(json.loads(line))
        answers.write(json.dumps(answer) + "\n")
        if answer["status"] == "stopped":
            return
        fresh(keep_code=runs % KEEP != 0)


def leave(number: int, frame: Any) -> None:
    """Told to stop before a run has begun or after it has ended."""
    raise Interrupted(128 + number)


def attempt(task: dict[str, Any]) -> Answer:
    """One run, as `python train.py <overrides>` would do it: {"status": ..., "why": ...}."""
    try:
        from sam_repro.training.main import main as train  # an exception in here leaves modules half made

        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # which the scheduler blocked in a new worker
        cfg = compose_config(task["overrides"])
        cfg.log.progress = "lines"
        if task["ledger"]:
            cfg.log.ledger_dir = task["ledger"]
        return {"status": train(cfg, task["overrides"])["status"]}
    except Interrupted:
        return {"status": "stopped"}
    except Held as error:
        return {"status": "held", "why": str(error)}
    except UserError as error:
        return {"status": "failed", "why": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {
            "status": "failed",
            "why": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        }


def fresh(*, keep_code: bool = False) -> None:
    """Forget the last run's memory and its compiled code; or keep the code, which a run of the same shapes then uses.

    torch.compile traces a ViT for half a minute even where everything it makes is cached on disk. It keeps a limited
    number of variants of a function, and beyond that falls back to eager code without a word: the limit is raised to
    what KEEP runs can need.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch._dynamo.config.recompile_limit = 8 * KEEP
    if not keep_code:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
