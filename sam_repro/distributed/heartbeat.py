"""Ranks that watch each other: who died, who hangs, who is slow.

A collective waits for every rank, so one that is gone stops all the others without a word. Here each rank says every
few seconds that it lives and how far it is, through the key-value store that the process group has anyway, and reads
what the others say. That is a thread; the training step is not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sam_repro.errors import RankLost

BEAT = 5.0  # seconds between signs of life
SILENT = 60.0  # without a sign of life for this long, the process is dead or stopped


class Heart:
    """Say that this rank lives, and end it with one sentence when another does not.

    Args:
        store: the ranks' common key-value store, through a connection of its own.
        limit: seconds without progress after which this rank is stuck. A compilation must fit in it.
    """

    def __init__(self, store: dist.Store, *, rank: int, world: int, limit: float):
        self.store, self.rank, self.world, self.limit = store, rank, world, limit
        self.me: dict[str, Any] = {"host": socket.gethostname(), "beat": 0, "step": 0, "waits": False}
        self.peers: dict[int, dict[str, Any]] = {}
        self.heard = dict.fromkeys(range(world), time.monotonic())
        self.moved = time.monotonic()
        self.on_loss: Callable[[str], None] = lambda sentence: None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def pulse(self, step: int | None = None) -> None:
        """This rank got on. Sets two attributes; nothing is sent here."""
        self.moved = time.monotonic()
        self.me["waits"] = False
        if step is not None:
            self.me["step"] = step

    def run(self) -> None:
        """The thread."""
        while True:
            lost = self.look()
            if self.stopped.is_set():
                return
            if lost:
                self.end(lost)
            self.stopped.wait(BEAT)

    def look(self, *, in_trouble: bool = False) -> RankLost | None:
        """Publish, read the others; what to say if one of them is lost or this rank is stuck.

        Rank 0 reads all, the others rank 0, which ends when one is lost: the store's load grows with the ranks, not
        with their square. In trouble everybody wants to know more.
        """
        self.me["beat"] += 1
        now = time.monotonic()
        stuck = now - self.moved > self.limit
        try:
            self.store.set(f"beat/{self.rank}", json.dumps(self.me))
            for rank in range(self.world if self.rank == 0 or stuck or in_trouble else 1):
                if rank != self.rank and self.store.check([f"beat/{rank}"]):
                    beat = json.loads(self.store.get(f"beat/{rank}"))
                    if beat["beat"] != self.peers.get(rank, {}).get("beat"):
                        self.heard[rank] = now
                    self.peers[rank] = beat
        except (RuntimeError, ValueError) as error:
            return RankLost(f"the ranks' store, kept by rank 0 or torchrun, is gone ({first_line(error)})")
        for rank, beat in self.peers.items():
            if "last" in beat:
                with contextlib.suppress(RuntimeError):
                    self.store.set(f"read/{self.rank}", "")
                return RankLost(f"{self.name(rank)} gave up: {beat['last']}", beat["code"])
            if now - self.heard[rank] > SILENT:
                where = f"for {SILENT:.0f} s, after step {beat['step']}"
                return RankLost(f"{self.name(rank)} has given no sign of life {where}")
        if stuck:
            return RankLost(f"no progress for {now - self.moved:.0f} s at step {self.me['step']}: {self.culprits()}")
        return None

    def culprits(self) -> str:
        """Who holds the others up: those with the fewest steps, and of these the ones that wait for nobody."""
        everyone = self.peers | {self.rank: self.me}
        behind = min((beat["step"], beat["waits"]) for beat in everyone.values())
        late = [rank for rank, beat in sorted(everyone.items()) if (beat["step"], beat["waits"]) == behind]
        if len(late) == self.world:
            return "all ranks are equally far, so the network or a device hangs"
        return f"the others wait for {', '.join(map(self.name, late))}"

    def name(self, rank: int) -> str:
        """'rank 3 on gpu07'."""
        host = (self.peers | {self.rank: self.me}).get(rank, {}).get("host", "?")
        return f"rank {rank} on {host}"

    def farewell(self, sentence: str, code: int) -> None:
        """Tell the others why this rank ends before its time, and with which exit code."""
        self.stop()
        with contextlib.suppress(RuntimeError):  # without the store, they hear it from the broken connection
            self.store.set(f"beat/{self.rank}", json.dumps(self.me | {"beat": -1, "last": sentence, "code": code}))
            if self.rank == 0:  # the store may end with this process: not before the others have read it
                self.store.wait([f"read/{r}" for r in range(1, self.world)], timedelta(seconds=BEAT + 1))

    def why(self, error: Exception) -> RankLost:
        """What to say about a collective that failed: what a peer said before it left, else the error."""
        self.stop()
        for _ in range(4):
            lost = self.look(in_trouble=True)
            if lost:
                return lost
            time.sleep(0.5)
        return RankLost(f"the connection to another rank broke, it was probably killed ({first_line(error)})")

    def end(self, lost: RankLost) -> None:
        """Leave, although the main thread may be waiting for ever in a collective."""
        print(f"error: rank {self.rank} ends: {lost}", file=sys.stderr, flush=True)
        self.on_loss(str(lost))
        os._exit(lost.code)

    def stop(self) -> None:
        """No more watching."""
        self.stopped.set()
        if self.thread is not threading.current_thread():
            self.thread.join(BEAT)


class Waits:
    """How long this rank waits in its gradient reductions: the rank for which the others wait, waits least itself.

    On a GPU two events a reduction are recorded in the stream and read when the host has waited for the device anyway.
    """

    MOST = 256  # events kept between two readings

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, reduce: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> None:
        """Call reduce(tensor) and remember how long it took."""
        if not self.cuda:
            start = time.perf_counter()
            reduce(tensor)
            self.seconds.append(time.perf_counter() - start)
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        reduce(tensor)
        pair[1].record()
        if len(self.events) < self.MOST:
            self.events.append(pair)

    def take(self) -> float:
        """Mean seconds of a reduction since the last call."""
        seconds = self.seconds + [a.elapsed_time(b) / 1000 for a, b in self.events if b.query()]
        self.seconds, self.events = [], []
        return sum(seconds) / len(seconds) if seconds else 0.0


def attempt() -> str:
    """A prefix for the store's keys: torchrun's store outlives the ranks, and with them what they wrote there."""
    return f"sam-repro/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def open_store(timeout: float = 60.0) -> dist.Store:
    """A connection of our own to the store at MASTER_ADDR:MASTER_PORT, so that no call of the group's can block it."""
    env = os.environ
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    return dist.PrefixStore(f"{attempt()}/heart", store)


def first_line(error: Exception) -> str:
    """An exception's first line; the others are a stack trace in C++."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
