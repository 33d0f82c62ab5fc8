"""Several runs at once, several a GPU: worker processes that a thread each feeds from one queue.

A worker takes one run after the other, so that imports and CUDA contexts are paid once, and shares the compile cache
on disk with the others. After a run that failed it is replaced, since its CUDA context may be beyond use; so is one
that died. Such runs are left for the next time. Runs that start from another's weights, or that wait for a sweep's
winner, begin when those are in the ledger.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.paper.runs import Run
from sam_repro.records.log import clock
from sam_repro.runner.plan import finished, lost_start
from sam_repro.training.signals import STOPS, STOPS_AND_CTRL_C, handle, restore

FAILURES = 3  # in a row, of different runs: the GPU is at fault, and takes no more of the queue
GRACE = 45.0  # seconds that runs have to save when the budget is spent
SHARING = "SAM_REPRO_SHARING"  # how many runs share this one's GPU; sam_repro.training.main notes it in the row


class Worker:
    """A process of sam_repro.runner.worker on one GPU."""

    def __init__(self, gpu: str, sharing: int, threads: int, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        # One worker's share of the cores, for arithmetic and for compiling.
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
                start_new_session=True,  # Ctrl-C is for the pool, which passes it on
            )

    def do(self, task: dict[str, Any]) -> dict[str, str]:
        """Send a run and wait for the answer; {"status": "died"} where none comes."""
        assert self.process.stdin and self.process.stdout
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


class Pool:
    """The queue, its workers and what became of the runs.

    Args:
        plan: all runs wanted, in the order in which to start them; asked again after every run, because a sweep's
            winner adds some.
        limit: start at most so many.
        budget: seconds after which all runs are told to save and leave.
    """

    def __init__(
        self,
        plan: Callable[[], list[Run]],
        *,
        gpus: int,
        per_gpu: int,
        ledger_dir: Path | None,
        limit: int | None = None,
        budget: float | None = None,
        say: Callable[[str], None] = print,
    ):
        self.plan, self.known = plan, plan()
        self.ledger_dir, self.limit, self.budget, self.say = ledger_dir, limit, budget, say
        visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
        names = (visible or [str(i) for i in range(gpus)])[:gpus]
        self.slots = [name for _ in range(per_gpu) for name in names]  # one run on every GPU before a second on any
        self.per_gpu = per_gpu
        self.threads = max(1, len(os.sched_getaffinity(0)) // len(self.slots))
        self.changed = threading.Condition()
        self.started: dict[str, float] = {}
        self.took: list[float] = []  # seconds of the runs that ended
        self.at_work: set[str] = set()
        self.left_out: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.workers: dict[int, Worker] = {}
        self.stopped_by: int | None = None
        self.leaving = False  # nothing starts any more
        self.begun = time.monotonic()

    def work(self) -> int:
        """Run until nothing is left, a signal comes or the budget is spent; returns the exit code."""
        before = handle(STOPS_AND_CTRL_C, self.note)
        threads = [threading.Thread(target=self.serve, args=(i,), daemon=True) for i in range(len(self.slots))]
        try:
            for thread in threads:
                thread.start()
            end = self.begun + self.budget if self.budget else float("inf")
            while any(t.is_alive() for t in threads) and self.stopped_by is None and time.monotonic() < end:
                time.sleep(0.1)
            spent = self.stopped_by is None and any(t.is_alive() for t in threads)
            if spent or self.stopped_by is not None:
                self.leave(threads, spent)
        finally:
            restore(before)
        bad = set(self.outcomes.values()) & {"failed", "died", "diverged"}
        self.say(self.tally())
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        return 1 if bad & {"failed", "died"} else 3 if bad else 0

    def leave(self, threads: list[threading.Thread], spent: bool) -> None:
        """Tell every run to save and go; end those that do not."""
        why = "the budget is spent" if spent else f"stopped by {signal.Signals(self.stopped_by or 0).name}"
        self.say(f"{why}: {len(self.at_work)} runs save and leave; the same command goes on from there")
        with self.changed:
            self.leaving = True
            self.changed.notify_all()
        for worker in list(self.workers.values()):
            worker.stop(signal.SIGUSR2)
        end = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.1, end - time.monotonic()))
        for worker in list(self.workers.values()):
            worker.stop(signal.SIGKILL)
        for thread in threads:
            thread.join(5)

    def note(self, number: int, frame: Any) -> None:
        """A signal to the pool."""
        self.stopped_by = number

    # ---- one thread a worker -----------------------------------------------------------------------------------------

    def serve(self, number: int) -> None:
        """Feed one worker."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # workers inherit it; signals to the pool go to its main thread
        worker: Worker | None = None
        failures = 0
        while failures < FAILURES and (r := self.take()) is not None:
            if worker is None:
                log = Path(r.config.log.runs_dir) / "pool" / f"worker-{number}.log"
                try:
                    worker = Worker(self.slots[number], self.per_gpu, self.threads, log)
                except OSError as error:  # no folder for the log, no memory for a process
                    failures += 1
                    self.finish(r, {"status": "failed", "why": f"no worker could be started: {error}"})
                    continue
                self.workers[number] = worker
                if self.leaving:  # it began just as all others were told to go
                    worker.stop(signal.SIGUSR2)
            answer = worker.do({"overrides": list(r.overrides), "ledger": str(self.ledger_dir or "")})
            if answer["status"] not in ("done", "diverged", "held"):
                worker.close()
                worker = None
            if answer["status"] == "died" and self.leaving:
                answer = {"status": "stopped", "why": f"it had not saved after {GRACE:.0f} s"}
            failures = failures + 1 if answer["status"] in ("failed", "died") else 0
            self.finish(r, answer)
        if failures == FAILURES:
            self.say(
                f"worker {number} on GPU {self.slots[number]} takes no more: {FAILURES} runs in a row failed there"
            )
        if worker is not None:
            worker.close()

    def runs(self) -> list[Run]:
        """The plan, or the last one that could be read: its files may be at work too, as in a `git pull`."""
        try:
            self.known = self.plan()
        except (UserError, OSError) as error:
            self.say(f"the plan cannot be read ({error}); going on with the last one")
        return self.known

    def take(self) -> Run | None:
        """The next run that can begin, waiting for one if need be; None when there is nothing more to do."""
        with self.changed:
            while True:
                if self.leaving or self.stopped_by is not None or len(self.started) == self.limit:
                    return None
                taken = self.started.keys() | self.left_out
                left = [r for r in self.runs() if r.run_id not in taken and not finished(r, self.ledger_dir)]
                for r in left:
                    if why := lost_start(r, self.ledger_dir):
                        self.left_out.add(r.run_id)
                        self.say(f"{r.run_id} is left out: {why}")
                    elif r.after is None or finished(r.after, self.ledger_dir):
                        self.started[r.run_id] = time.monotonic()
                        self.at_work.add(r.run_id)
                        return r
                if not self.at_work:
                    return None
                self.changed.wait()

    def finish(self, r: Run, answer: dict[str, str]) -> None:
        """Note what became of a run."""
        with self.changed:
            self.at_work.discard(r.run_id)
            self.outcomes[r.run_id] = answer["status"]
            self.changed.notify_all()  # before anything that can fail
            seconds = time.monotonic() - self.started[r.run_id]
            if answer["status"] in ("done", "diverged"):
                self.took.append(seconds)
            why = f": {answer['why']}" if "why" in answer else ""
            self.say(f"{r.run_id} {answer['status']} after {seconds:.0f} s{why}   {self.tally()}")

    def tally(self) -> str:
        """How far it has come, and how long it may still take."""
        runs = self.runs()
        done = sum(finished(r, self.ledger_dir) for r in runs)
        said = f"{done} of {len(runs)} runs are in the ledger"
        to_go = len(runs) - done
        if self.took and to_go:
            usual = statistics.fmean(self.took)
            behind = sum(min(usual, time.monotonic() - self.started[i]) for i in self.at_work)  # of those at work
            said += f", about {clock((to_go * usual - behind) / min(to_go, len(self.slots)))} left"
        return said
