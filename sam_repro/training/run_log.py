"""A run's log: `log.jsonl` is the truth; the console and W&B are views of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from sam_repro.config.schema import Config
from sam_repro.records.files import write_atomic
from sam_repro.records.ledger import Row
from sam_repro.records.log import Record, clock, finite, metrics_of, stream_log
from sam_repro.training.wandb_writer import start_tracking

SILENCE = 30  # seconds after which a line says that something long goes on
SLOW = 0.1  # of a step's time: a rank for which the others wait longer is named on the console


class RunLog:
    """Append records to log.jsonl, and show them.

    Every record has a "step". A resumed run first drops the records beyond its checkpoint, so that each step is
    logged once however often the run was interrupted.

    Args:
        run_dir: the run's folder; None on the ranks that do not log.
    """

    def __init__(self, run_dir: Path | None, cfg: Config, *, run_id: str):
        self.run_dir, self.cfg, self.run_id = run_dir, cfg, run_id
        self.file: BinaryIO | None = None
        self.last_words = time.monotonic()

    def start(self, step: int, total: int) -> None:
        """Open the log for the steps after `step`, of `total`; until then there is only say()."""
        if self.run_dir is None:
            return
        path = self.run_dir / "log.jsonl"

        def kept(file: BinaryIO) -> None:
            for _, record in stream_log(path):
                if record["step"] <= step:
                    file.write(json.dumps(record).encode() + b"\n")

        write_atomic(path, kept)
        bar = self.cfg.log.progress == "bar" or (self.cfg.log.progress == "auto" and sys.stderr.isatty())
        self.lines = not bar
        self.bar = tqdm(total=total, initial=step, desc=self.run_id, unit="step", disable=not bar, dynamic_ncols=True)
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self.tracker = start_tracking(self.run_dir, self.cfg, self.say)

    def step(self) -> None:
        """One update was made."""
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.bar.update()

    def say(self, sentence: str) -> None:
        """A sentence for the person watching."""
        if self.run_dir is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone ends no run
                tqdm.write(sentence, file=sys.stderr)
            self.last_words = time.monotonic()

    def wait(self, doing: str) -> None:
        """Say that something long goes on: next to the bar, or on a line from time to time."""
        if self.file is None:
            return
        if not self.lines:
            self.beside_bar(doing)
        elif time.monotonic() - self.last_words > SILENCE:
            self.say(doing)

    def record(self, record: Record) -> None:
        """Append a record; non-finite numbers become null, which JSON has no word for otherwise.

        Raises:
            OSError: if the disk does not take it.
        """
        if self.file is None:
            return
        line = (json.dumps({k: finite(v) for k, v in record.items()}) + "\n").encode()
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        shown = summary(record)
        if self.lines:
            self.say(f"[{record['step']}/{self.bar.total}] {shown}")
        else:
            self.beside_bar(shown)
        if self.tracker is not None:
            self.tracker.log(record["step"], metrics_of(record))

    def beside_bar(self, words: str) -> None:
        """The text after the bar."""
        with contextlib.suppress(OSError):
            self.bar.set_postfix_str(words)

    def close(self, code: int = 0, row: Row | None = None) -> None:
        """Flush everything, once; `code` and `row` are for W&B: how the process will exit, and what came out."""
        if self.file is None or self.file.closed:
            return
        with contextlib.suppress(OSError):
            self.bar.close()
        self.file.close()
        if self.tracker is not None:
            self.tracker.close(code, row)


def summary(record: Record) -> str:
    """The few numbers of a record that fit on a line."""
    if "eval" in record:
        correct, total = record["correct"], record["total"]
        return f"{record['eval']} {100 * correct / total:.2f} % ({correct}/{total})"
    if "sharpness" in record:
        s = record["sharpness"]
        return f"λ_max {s['lambda_max']:.4g}, 2h/ρ² {s['estimate']:.4g}, |cos(ε, v)| {s['alignment']:.3f}"
    parts = [f"loss {record['loss']:.4f}", f"h {record['surrogate_gap']:.4f}", f"lr {record['lr']:.2e}"]
    parts += [f"rho {record['rho']:.3f}", f"{record['images_per_second']:.0f} images/s", f"ETA {clock(record['eta'])}"]
    if record.get("lag_seconds", 0.0) > SLOW * record["step_seconds"]:
        share = record["lag_seconds"] / record["step_seconds"]
        parts.append(f"{100 * share:.0f} % of a step is waiting for rank {record['slowest_rank']}")
    return ", ".join(parts)


def rates(interval: float, counted: int, left: int, batch: int, hours: float) -> dict[str, float]:
    """Speed over the last interval, time left, and processor-hours so far.

    Args:
        interval: seconds of `counted` steps since the last line.
        left: steps.
        batch: images per step, of all ranks together.
    """
    per_step = interval / counted
    return {
        "images_per_second": batch / per_step,
        "step_seconds": per_step,
        "eta": per_step * left,
        "hours": hours,
    }


def lag(waits: list[float]) -> dict[str, float]:
    """Which rank the others wait for in the gradient's reduction, and how long; nothing for one rank.

    Args:
        waits: mean seconds that each rank spent in a reduction. All pay for the transfer; the slowest pays no more.
    """
    if len(waits) == 1:
        return {}
    return {"slowest_rank": waits.index(min(waits)), "lag_seconds": max(waits) - min(waits)}
