"""The view of a run in W&B, in its own thread. Whatever the network does, training neither stops nor waits."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sam_repro.config.compose import to_dict
from sam_repro.config.schema import Config
from sam_repro.records.ledger import Row
from sam_repro.training.wandb_run import begin, end

PATIENCE = 30.0  # seconds that the end of a run waits for the last of it to be sent


class Tracker:
    """One W&B run, fed through a queue. log.jsonl has everything that W&B missed."""

    def __init__(self, run_dir: Path, cfg: Config, *, mode: str, say: Callable[[str], object]):
        self.todo: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self.run_dir, self.mode, self.say = run_dir, mode, say
        self.config = to_dict(cfg)
        self.row: Row | None = None
        self.code = 0
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Hand over; returns at once."""
        if self.thread.is_alive():
            self.todo.put((step, metrics))

    def work(self) -> None:
        """The thread."""
        try:
            run = begin(self.run_dir, self.config, mode=self.mode)
            if self.mode == "online":
                self.say(f"W&B shows this run at {run.url}")
            while (item := self.todo.get()) is not None:
                run.log(item[1], step=item[0])
            end(run, self.run_dir, self.row, code=self.code)
            if self.mode == "offline":
                self.say(f"W&B has nothing of this run yet: `wandb sync {self.run_dir}/wandb/offline-run-*` sends it")
        except ImportError as error:
            self.off(f"{error.name} is not installed")
        except BaseException as error:  # no network, a bad key: the run goes on without
            self.off(" ".join(str(error).split())[:200].rstrip("."))

    def off(self, why: str) -> None:
        """Say that W&B does not have all of the run."""
        self.say(f"W&B is off: {why}; log.jsonl has everything, and `sam-repro sync {self.run_dir}` sends it later")

    def close(self, code: int = 0, row: Row | None = None) -> None:
        """Wait for a while until the rest is sent.

        Args:
            code: with which the process will exit.
            row: of the ledger, where the run came to its end.
        """
        self.code, self.row = code, row
        self.todo.put(None)
        self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.off(f"it did not take everything within {PATIENCE:.0f} s")


def start_tracking(run_dir: Path, cfg: Config, say: Callable[[str], object]) -> Tracker | None:
    """The tracker, or None when W&B is disabled. Without a key it is offline, which it says.

    The client would ask for a key on a terminal, and nobody may be there to answer.
    """
    mode = cfg.log.wandb if cfg.log.wandb != "auto" else os.environ.get("WANDB_MODE") or "online"
    if mode == "online" and not has_key():
        mode = "offline"
        say(f"W&B is offline, since there is no key for {hosts()[0]}: `wandb login` or WANDB_API_KEY gives it one")
    return None if mode == "disabled" else Tracker(run_dir, cfg, mode=mode, say=say)


def has_key() -> bool:
    """Whether this user has a key for the W&B server of the settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path("~/.netrc").expanduser()
    path = Path(os.environ.get("NETRC") or (home if home.exists() else home.with_name("_netrc"))).expanduser()
    try:
        known = netrc.netrc(path)
    except (OSError, ValueError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) for host in hosts())


def hosts() -> list[str]:
    """The W&B server as netrc names it: of WANDB_BASE_URL, else of `wandb login --host`, else the public one."""
    settings = configparser.ConfigParser(default_section="default", interpolation=None)
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    with contextlib.suppress(OSError, ValueError, configparser.Error):
        settings.read([Path(folder).expanduser() / "settings", Path("wandb/settings")])
    address = os.environ.get("WANDB_BASE_URL") or settings.get("default", "base_url", fallback="")
    return [urlsplit(address).netloc] if address else ["api.wandb.ai", "api.forge.coreweave.com"]
