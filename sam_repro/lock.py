"""One process a run directory, also on NFS, where flock cannot be relied on."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

from sam_repro.errors import UserError

BEAT = 20.0  # seconds between signs of life
STALE = 300.0  # a lock without a sign of life for this long belongs to a dead process


class Held(UserError):
    """Another live process has the run."""


class RunLock:
    """A lock file created exclusively and touched while its holder lives.

    A lock whose process is gone (same host) or that was not touched for five minutes is taken over.

    Raises:
        Held: if another live process holds the run.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / "lock"
        me = {"host": socket.gethostname(), "pid": os.getpid()}
        for _ in range(2):
            try:
                with os.fdopen(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "w") as file:
                    json.dump(me, file)
                break
            except FileExistsError:
                if not self.abandoned():
                    raise Held(
                        f"another process is at work in {run_dir} ({self.path.read_text()}); "
                        f"if it is not, remove {self.path}"
                    ) from None
                self.path.unlink(missing_ok=True)
        else:
            raise Held(f"another process has just taken {run_dir}")
        self.released = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    def abandoned(self) -> bool:
        """Whether the process that wrote the lock is gone."""
        try:
            silent = time.time() - self.path.stat().st_mtime > STALE
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            return True
        except ValueError:  # not yet written, or torn
            return silent
        if holder["host"] != socket.gethostname():
            return silent
        return silent or not Path(f"/proc/{holder['pid']}").exists()

    def beat(self) -> None:
        """Touch the file until released."""
        while not self.released.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:
                return

    def release(self) -> None:
        """Give the run up."""
        self.released.set()
        self.path.unlink(missing_ok=True)
