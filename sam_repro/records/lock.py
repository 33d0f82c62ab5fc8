"""One process a run directory, also on NFS, where flock cannot be relied on.

The lock is a file that appears by os.link, which is atomic on NFS too, and that its holder touches while it lives.
Nobody compares clocks: whether a holder on another machine lives is seen by watching whether it touches the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError

BEAT = 20.0  # seconds between signs of life
WATCH = 65.0  # how long to look for one: three beats, and longer than NFS clients cache a file's time
STALE = 300.0  # readers that cannot wait take a lock untouched for this long for abandoned


class Held(UserError):
    """Another live process has the run."""


class RunLock:
    """Hold a run until release(), or until the process ends.

    A lock is taken over when its process is gone (same host), when it is of an earlier start of this SLURM job, or
    when nobody touches it for a minute. Of two processes that take over, one wins.

    Raises:
        Held: if another live process holds the run.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / "lock"
        self.me = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
            | {"job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
        )
        for _ in range(3):
            if self.create():
                break
            holder = read(self.path)
            if holder and not gone(holder) and watch(self.path, holder):
                self.refuse(holder)
            self.clear(holder)
        else:
            raise Held(f"another process has just taken {run_dir}")
        self.released = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    def create(self) -> bool:
        """Make the lock, whole from its first moment on; False if there is one."""
        temporary = self.path.with_name(f"lock.{uuid.uuid4().hex}")
        temporary.write_text(self.me)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def clear(self, holder: str) -> None:
        """Remove the abandoned lock of `holder`, and no other's: only who links its name to the claim may."""
        claim = self.path.with_name(f"lock.taken.{fields(holder).get('token', 'unreadable')}")
        try:
            os.link(self.path, claim)
        except FileNotFoundError:
            return  # released meanwhile
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # who took over was quick
                if time.time() - claim.stat().st_ctime < STALE:  # since the link was made; mtime is the lock's own
                    self.refuse(holder)
        if read(claim) == holder:
            self.path.unlink(missing_ok=True)
        claim.unlink(missing_ok=True)

    def refuse(self, holder: str) -> None:
        """Somebody else works here."""
        known = fields(holder)
        job = f", job {known['job']}" if known.get("job") else ""
        who = f" (process {known['pid']} on {known.get('host')}{job})" if "pid" in known else ""
        raise Held(f"another process is at work in {self.path.parent}{who}; if it is not, remove {self.path}")

    def beat(self) -> None:
        """Touch the file until released."""
        while not self.released.wait(BEAT):
            with contextlib.suppress(OSError):  # a file server that is away for a while
                os.utime(self.path)

    def check(self) -> None:
        """Raise UserError if another process took the run over, as it may after this one was stopped for long."""
        try:
            holder = self.path.read_text(errors="replace")
        except FileNotFoundError:
            raise UserError(f"{self.path} was removed while this process worked there") from None
        except OSError:
            return  # a file server that is away; if it stays away, the save that follows says so
        if holder != self.me:
            raise UserError(f"another process took {self.path.parent} over while this one did not run")

    def release(self) -> None:
        """Give the run up."""
        self.released.set()
        if read(self.path) == self.me:
            self.path.unlink(missing_ok=True)


def is_held(run_dir: Path) -> bool:
    """Whether a process works on a run, as far as can be told without waiting."""
    try:
        silent = time.time() - (run_dir / "lock").stat().st_mtime > STALE
    except OSError:
        return False
    return not silent and not gone(read(run_dir / "lock"))


def read(path: Path) -> str:
    """What the holder wrote; opening the file also makes NFS look at the server."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def fields(holder: str) -> dict[str, Any]:
    """The lock's fields; none of a damaged one."""
    try:
        known = json.loads(holder)
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def gone(holder: str) -> bool:
    """Whether the holder is known to be dead: no such process on this host, or this very SLURM job was restarted."""
    known = fields(holder)
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is not None and known.get("job") == job and known.get("restart") != restart:
        return True
    return known.get("host") == socket.gethostname() and not Path(f"/proc/{known.get('pid')}").exists()


def watch(path: Path, holder: str) -> bool:
    """Whether the lock is touched, or changes hands, while we look.

    A process of this host is there for all to see, and is not waited for, unless its number was given to another.
    """
    before, deadline = touched(path), time.monotonic() + WATCH
    if before is not None and fields(holder).get("host") == socket.gethostname():
        return time.time() - before < STALE
    print(f"{path} is another machine's; watching for {WATCH:.0f} s whether it lives", file=sys.stderr)
    while time.monotonic() < deadline:
        time.sleep(1)
        now = touched(path)
        if now is None:
            return False
        if now != before:
            return True
    return False


def touched(path: Path) -> float | None:
    """When the file was last touched, by the file server's clock."""
    try:
        with open(path) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None
