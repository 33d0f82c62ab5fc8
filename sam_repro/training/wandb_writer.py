"""The view of a run in W&B, in a thread of its own: whatever the network does, training neither stops nor waits."""

from __future__ import annotations

import configparser
import contextlib
import netrc
import os
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
        self.settings: dict[str, Any] = {
            "project": cfg.log.project,
            "resume": "allow",
            "dir": str(run_dir),
            "mode": mode,
        }
        self.settings |= identity(to_dict(cfg), run_id)
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


def identity(config: dict[str, Any], run_id: str) -> dict[str, Any]:
    """What W&B shows of a run, live or replayed: a name for people, tags to filter by, and where the command is."""
    model, method, data = (config[part]["name"] for part in ("model", "optim", "data"))
    group = config["log"]["group"]
    return {
        "id": run_id,
        "name": f"{model} {method}, {data}, seed {config['seed']}",
        "group": group,
        "tags": sorted({tag for tag in (model, method, data, group) if tag}),
        "notes": f"{run_id}: its row, {config['log']['ledger_dir']}/{run_id}.json, has the command and the hardware.",
        "config": config,
    }


def start_tracking(run_dir: Path, cfg: Config, run_id: str, say: Callable[[str], object]) -> Tracker | None:
    """The tracker, or None when W&B is disabled. "auto" is online with a key, else offline, which it says."""
    mode = cfg.log.wandb
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if mode == "offline":
            where = "WANDB_MODE=offline" if "WANDB_MODE" in os.environ else f"there is no key for {hosts()[0]}"
            say(f"W&B is offline, since {where}; `wandb login` and `sam-repro sync {run_dir}` show the run there later")
    return None if mode == "disabled" else Tracker(run_dir, cfg, run_id=run_id, mode=mode)


def has_key() -> bool:
    """Whether W&B would let this user in, at the server that its settings name."""
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
