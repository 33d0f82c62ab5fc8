"""A run's log: `log.jsonl` is the truth; the console and W&B are views of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from sam_repro.config.schema import Config
from sam_repro.records.files import write_atomic
from sam_repro.records.log import Record, clock, finite, metrics_of, read_log
from sam_repro.training.wandb_writer import start_tracking

SILENCE = 30  # seconds after which a line says that something long goes on
SLOW = 0.1  # of a step's time: a rank for which the others wait longer is named on the console


class RunLog:
    """Append records to log.jsonl, and show them.

    Every record has a "step". A resumed run first drops the records beyond its checkpoint, so that each step is
    logged once however often the run was interrupted.

    Args:
        run_dir: the run's folder; None on the ranks that do not log.
        step: updates already made.
        total: updates of the whole run.
    """

    def __init__(self, run_dir: Path | None, cfg: Config, *, run_id: str, step: int, total: int):
        self.run_dir = run_dir
        if run_dir is None:
            return
        self.path = run_dir / "log.jsonl"
        kept = [r for r in read_log(self.path) if r["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        bar = cfg.log.progress == "bar" or (cfg.log.progress == "auto" and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=step, desc=run_id, unit="step", disable=not bar, dynamic_ncols=True)
        self.lines = not bar
        self.said = time.monotonic()
        self.tracker = start_tracking(run_dir, cfg, run_id)

    def step(self) -> None:
        """One update was made."""
        if self.run_dir is not None:
            with contextlib.suppress(OSError):
                self.bar.update()

    def say(self, sentence: str) -> None:
        """A sentence for the person watching."""
        if self.run_dir is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone ends no run
                tqdm.write(sentence, file=sys.stderr)
            self.said = time.monotonic()

    def wait(self, doing: str) -> None:
        """Something long goes on: said beside the bar, or on a line now and then."""
        if self.run_dir is None:
            return
        if not self.lines:
            self.beside_bar(doing)
        elif time.monotonic() - self.said > SILENCE:
            self.say(doing)

    def record(self, record: Record) -> None:
        """Append a record; non-finite numbers become null, which JSON has no word for otherwise.

        Raises:
            OSError: if the disk does not take it.
        """
        if self.run_dir is None:
            return
        line = (json.dumps({k: finite(v) for k, v in record.items()}) + "\n").encode()
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        shown = summary(record)
        if self.lines:
            self.say(f"[{record['step']}/{self.bar.total}] {shown}")
        else:
            self.beside_bar(shown)
        if self.tracker is not None:
            self.tracker.log(record["step"], metrics_of(record))

    def beside_bar(self, words: str) -> None:
        """What stands behind the bar."""
        with contextlib.suppress(OSError):
            self.bar.set_postfix_str(words)

    def close(self) -> None:
        """Flush everything; once."""
        if self.run_dir is None or self.file.closed:
            return
        with contextlib.suppress(OSError):
            self.bar.close()
        self.file.close()
        if self.tracker is not None:
            self.tracker.close()


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
