"""Run what a plan wants and the ledger lacks: in this process one after the other, or in several processes per GPU.

A thread per slot feeds a worker process from one queue. A worker takes one run after the other, so that imports and
CUDA contexts are paid once, and shares the compile cache on disk with the others. After a run that failed it is
replaced, since its CUDA context may be beyond use; so is one that died. Such runs are left for the next time. Runs that
start from another's weights, or that wait for a sweep's winner, begin when those are in the ledger. The one slot
without a process is served by the main thread, which signals can reach while it trains.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam_repro.data.loaders.threads import usable_cores
from sam_repro.errors import UserError, plural
from sam_repro.paper.runs import Run
from sam_repro.records.ledger import read_row, row_path
from sam_repro.records.log import clock
from sam_repro.runner.plan import finished, lost_start
from sam_repro.runner.worker import Answer, ThisProcess, WorkerProcess
from sam_repro.training.signals import STOPS, STOPS_AND_CTRL_C, Interrupted, handle, restore

FAILURES = 3  # in a row, of different runs: the GPU is at fault, and takes no more of the queue
GRACE = 45.0  # seconds that runs have to save when the budget is spent


def say(sentence: str) -> None:
    """A line for the person watching; stdout stays free for what other programs read."""
    with contextlib.suppress(OSError):  # a terminal that is gone ends no queue
        print(sentence, file=sys.stderr, flush=True)


def gpu_slots(gpus: int, per_gpu: int) -> list[str]:
    """The GPU of every slot: one run on every GPU before a second on any."""
    visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    names = (visible or [str(i) for i in range(gpus)])[:gpus]
    return [name for _ in range(per_gpu) for name in names]


class Scheduler:
    """The queue, its slots and what became of the runs.

    Args:
        plan: all runs wanted, in the order in which to start them; asked again after every run, because a sweep's
            winner adds some.
        slots: the GPU of each worker process; none: this process is the one slot.
        ledger_dir: folder of ledger rows, instead of the runs' own.
        limit: start at most so many.
        budget: seconds after which all runs are told to save and leave.
    """

    def __init__(
        self,
        plan: Callable[[], list[Run]],
        slots: list[str] | None = None,
        *,
        ledger_dir: Path | None = None,
        limit: int | None = None,
        budget: float | None = None,
        say: Callable[[str], None] = say,
    ):
        self.plan, self.last_plan = plan, plan()
        self.slots, self.ledger_dir, self.limit, self.budget, self.say = slots or [], ledger_dir, limit, budget, say
        self.changed = threading.Condition()
        self.started: dict[str, float] = {}
        self.at_work: set[str] = set()
        self.left_out: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.workers: dict[int, WorkerProcess | ThisProcess] = {}
        self.seconds = self.seconds_in_ledger()
        self.stopped_by: int | None = None
        self.spent = False
        self.leaving = False  # nothing starts any more

    def work(self) -> int:
        """Run until nothing is left, a signal comes or the budget is spent; returns the exit code."""
        before = handle(STOPS_AND_CTRL_C if self.slots else STOPS, self.note)
        timer = threading.Timer(self.budget or 0, self.spend)
        timer.daemon = True
        if self.budget:
            timer.start()
        try:
            if self.slots:
                self.serve_all()
            else:
                self.workers[0] = ThisProcess()
                self.serve(0)
        finally:
            timer.cancel()
            restore(before)
        if not self.slots and self.stopped_by is not None:
            self.say(f"{self.why_stopped()}; the same command goes on from there")
        if not self.outcomes:  # else the last run's line has said it
            self.say(self.tally())
        if self.stopped_by is not None and not self.spent:
            return 128 + self.stopped_by
        bad = set(self.outcomes.values())
        return 1 if bad & {"failed", "died"} else 3 if "diverged" in bad else 0

    def note(self, number: int, frame: Any) -> None:
        """A signal to the scheduler; while this process trains, train.py's own handler takes it, once it is there."""
        self.stopped_by = number
        worker = self.workers.get(0)
        if isinstance(worker, ThisProcess) and worker.busy:
            raise Interrupted(128 + number)

    def spend(self) -> None:
        """End of the budget: the signal that SLURM sends before it ends a job."""
        self.spent = True
        os.kill(os.getpid(), signal.SIGUSR2)

    def why_stopped(self) -> str:
        """In words."""
        return "the budget is spent" if self.spent else f"stopped by {signal.Signals(self.stopped_by or 0).name}"

    # ---- several processes -------------------------------------------------------------------------------------------

    def serve_all(self) -> None:
        """A thread per slot, until all have ended or a signal comes."""
        threads = [threading.Thread(target=self.serve, args=(i,), daemon=True) for i in range(len(self.slots))]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads) and self.stopped_by is None:
            time.sleep(0.1)
        if self.stopped_by is not None:
            self.leave(threads)

    def leave(self, threads: list[threading.Thread]) -> None:
        """Tell every run to save and go; end those that do not."""
        at_work = plural(len(self.at_work), "run")
        self.say(f"{self.why_stopped()}: {at_work} to be saved first; the same command goes on from there")
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

    def start_worker(self, number: int, r: Run) -> WorkerProcess:
        """A process for a slot. Raises OSError."""
        log = Path(r.config.log.runs_dir) / "pool" / f"worker-{number}.log"
        gpu, threads = self.slots[number], max(1, usable_cores() // len(self.slots))
        worker = WorkerProcess(gpu, self.slots.count(gpu), threads, log)
        self.workers[number] = worker
        if self.leaving:  # it began just as all others were told to go
            worker.stop(signal.SIGUSR2)
        return worker

    # ---- one slot ----------------------------------------------------------------------------------------------------

    def serve(self, number: int) -> None:
        """Feed one worker until there is nothing more to do."""
        if self.slots:  # workers inherit the mask; signals to the scheduler go to its main thread
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        worker, failures = self.workers.get(number), 0
        while failures < FAILURES and (r := self.take()) is not None:
            if worker is None:
                try:
                    worker = self.start_worker(number, r)
                except OSError as error:  # no folder for the log, no memory for a process
                    failures += 1
                    self.finish(r, {"status": "failed", "why": f"no worker could be started: {error}"})
                    continue
            answer = worker.do(r, self.ledger_dir)
            if isinstance(worker, ThisProcess):
                self.stopped_by = self.stopped_by or worker.stopped_by
            elif answer["status"] not in ("done", "diverged", "held"):
                worker.close()
                worker = None
            if answer["status"] == "died" and self.leaving:
                answer = {"status": "stopped", "why": f"it had not saved after {GRACE:.0f} s"}
            failures = failures + 1 if answer["status"] in ("failed", "died") else 0
            self.finish(r, answer)
        if failures == FAILURES:
            self.say(f"worker {number} on GPU {self.slots[number]} stops: {FAILURES} runs in a row failed there")
        if worker is not None:
            worker.close()

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
                        if not self.slots:
                            last = min(len(self.started) - 1 + len(left), self.limit or sys.maxsize)
                            self.say(f"({len(self.started)}/{last}) {r.run_id}")
                        return r
                if not self.at_work:
                    return None
                self.changed.wait()

    def finish(self, r: Run, answer: Answer) -> None:
        """Note what became of a run."""
        with self.changed:
            self.at_work.discard(r.run_id)
            self.outcomes[r.run_id] = answer["status"]
            self.changed.notify_all()  # before anything that can fail
            seconds = time.monotonic() - self.started[r.run_id]
            if answer["status"] in ("done", "diverged"):
                self.seconds.setdefault(kind_of(r.run_id), []).append(seconds)
            why = f": {answer['why']}" if "why" in answer else ""
            if answer["status"] == "held":
                self.say(f"{r.run_id} is left out{why}")
            else:
                self.say(f"{r.run_id} {answer['status']} after {seconds:.0f} s{why}   {self.tally()}")

    # ---- how far it is -----------------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """The plan, or the last one that could be read: its files may be at work too, as in a `git pull`."""
        try:
            self.last_plan = self.plan()
        except (UserError, OSError) as error:
            self.say(f"the plan cannot be read ({error}); going on with the last one")
        return self.last_plan

    def tally(self) -> str:
        """How many runs are in the ledger, and how long the others may take."""
        runs = self.runs()
        to_go = [r.run_id for r in runs if not finished(r, self.ledger_dir)]
        sentence = f"{len(runs) - len(to_go)} of {plural(len(runs), 'run')} in the ledger"
        if not (self.seconds and to_go):
            return sentence
        usual = statistics.fmean(s for known in self.seconds.values() for s in known)
        expected = {i: statistics.fmean(self.seconds.get(kind_of(i), [usual])) for i in to_go}
        behind = sum(min(expected.get(i, 0.0), time.monotonic() - self.started[i]) for i in self.at_work)
        left = (sum(expected.values()) - behind) / min(len(to_go), max(1, len(self.slots)))
        until = time.strftime("%H:%M", time.localtime(time.time() + left))
        return f"{sentence}, about {clock(left)} left, until {until}"

    def seconds_in_ledger(self) -> dict[str, list[float]]:
        """{<model>-<method>: seconds of every finished run of the plan}, as the ledger has them."""
        seconds: dict[str, list[float]] = {}
        for r in self.last_plan:
            path = row_path(self.ledger_dir or r.config.log.ledger_dir, r.run_id)
            row = read_row(path) if path.exists() else {}
            if row.get("status") == "done" and "hours" in row:
                took = 3600 * row["hours"] * row.get("sharing", 1) / row.get("world", 1)
                seconds.setdefault(kind_of(r.run_id), []).append(took)
        return seconds


def kind_of(run_id: str) -> str:
    """<model>-<method> of a run id."""
    return run_id.rsplit("-", 2)[0]
