"""One process per run directory, also on NFS, where flock cannot be relied on.

The lock is a file that appears by os.link, which is atomic on NFS too, and that its holder touches while it lives.
Nobody compares clocks: whether a holder lives that cannot be seen from here, on another machine or in another
container, is found by watching whether it touches the file.
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
STALE = 300.0  # a lock, or a claim to one, untouched for this long is abandoned for readers that cannot wait


class Held(UserError):
    """Another live process has the run."""


class RunLock:
    """Hold a run until release(), or until the process ends.

    A lock is taken over when its process is seen to be gone, when it is of an earlier start of this SLURM job, or when
    nobody touches it for a minute. Of two processes that take over, one wins.

    Raises:
        Held: if another live process holds the run.
    """

    def __init__(self, run_dir: Path):
        self.path = run_dir / "lock"
        self.me = json.dumps(
            {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
            | {"job": os.environ.get("SLURM_JOB_ID"), "restart": os.environ.get("SLURM_RESTART_COUNT", "0")}
            | {"place": place(), "born": birth(os.getpid())}
        )
        for _ in range(3):
            if self.create():
                break
            holder = read(self.path)
            alive = lives(holder)
            if holder and (alive or (alive is None and watch(self.path))):
                self.refuse(holder)
            self.clear(holder)
        else:
            raise Held(f"another process has just taken {run_dir}")
        for path in run_dir.glob("lock.*"):  # of starts that were killed; a live one sees this lock, and gives way
            path.unlink(missing_ok=True)
        self.released = threading.Event()
        threading.Thread(target=self.beat, daemon=True).start()

    def create(self) -> bool:
        """Make the lock, whole from its first moment on; False if there is one."""
        temporary = self.path.with_name(f"lock.{uuid.uuid4().hex}")
        temporary.write_text(self.me)
        try:
            os.link(temporary, self.path)
        except (FileExistsError, FileNotFoundError):  # not found: who has the lock has swept
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def clear(self, holder: str) -> None:
        """Remove the abandoned lock of `holder`. Only the process that links its name to the claim may do so."""
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
            raise UserError(f"another process took over {self.path.parent} while this one did not run")

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
    return not silent and lives(read(run_dir / "lock")) is not False


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


def lives(holder: str) -> bool | None:
    """Whether the holder's process lives: known where it can be seen from here, or where this SLURM job was restarted.

    A process is its number and the moment it was born: numbers are given again, and in a container the first is 1.
    """
    known = fields(holder)
    job, restart = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is not None and known.get("job") == job and known.get("restart") != restart:
        return False
    here = place()
    if here is None or known.get("place") != here:
        return None
    return known.get("born") is not None and birth(known.get("pid")) == known["born"]


def place() -> str | None:
    """Where the numbers of processes mean the same: a running kernel, and in it a namespace. None without /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def birth(pid: Any) -> str | None:
    """When a process was started, in the kernel's ticks since its own start; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (OSError, ValueError):
        return None
    state, *others = stat.rpartition(")")[2].split()  # what is in front is the program's name, with any characters
    return None if state in "ZX" else others[18]


def watch(path: Path) -> bool:
    """Whether the lock is touched, or changes hands, while we look."""
    before, deadline = touched(path), time.monotonic() + WATCH
    where = "a process on another machine or in another container"
    print(f"{path} belongs to {where}; watching for {WATCH:.0f} s whether it lives", file=sys.stderr)
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
