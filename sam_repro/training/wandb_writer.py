"""The view of a run in W&B, in a thread of its own: whatever the network does, training neither stops nor waits."""

from __future__ import annotations

import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from sam_repro.config.compose import to_dict
from sam_repro.config.schema import Config

PATIENCE = 30.0  # seconds that the end of a run waits for the last of it to be sent


class Tracker:
    """One W&B run, always of the same id, fed through a queue.

    log.jsonl has everything, so what W&B missed is shown there later by `sam-repro sync`.
    """

    def __init__(self, run_dir: Path, cfg: Config, *, run_id: str, mode: str):
        self.todo: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self.run_dir = run_dir
        self.settings: dict[str, Any] = {"project": cfg.log.project, "id": run_id, "name": run_id, "resume": "allow"}
        self.settings |= {"group": cfg.log.group, "dir": str(run_dir), "mode": mode, "config": to_dict(cfg)}
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Hand over; returns at once."""
        self.todo.put((step, metrics))

    def work(self) -> None:
        """The thread."""
        try:
            import wandb

            quiet = wandb.Settings(init_timeout=60, console="off", silent=True)
            run = wandb.init(**self.settings, settings=quiet)
            while (item := self.todo.get()) is not None:
                run.log(item[1], step=item[0])
            run.finish()
        except BaseException as error:  # no network, no package, a bad key: the run goes on without
            self.say(f"W&B is off: {' '.join(str(error).split())[:200].rstrip('.')}")

    def close(self) -> None:
        """Let it send the rest, for a while."""
        self.todo.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.say(f"W&B did not take everything within {PATIENCE:.0f} s")

    def say(self, what: str) -> None:
        """A sentence on stderr; the progress bar is another thread's, and survives it."""
        print(f"{what}; the run has everything, `sam-repro sync {self.run_dir}` shows it there later", file=sys.stderr)


def start_tracking(run_dir: Path, cfg: Config, run_id: str) -> Tracker | None:
    """The tracker, or None when W&B is disabled. "auto" is online with a key, else offline."""
    mode = cfg.log.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    return None if mode == "disabled" else Tracker(run_dir, cfg, run_id=run_id, mode=mode)


def has_key() -> bool:
    """Whether W&B would let this user in."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
    return bool(os.environ.get("WANDB_API_KEY")) or known
