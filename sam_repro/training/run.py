"""What a process holds while it trains: ranks, signals, folder, lock, log. It gives everything back at the end."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

import numpy as np
import torch
import yaml

from sam_repro.config.compose import to_dict
from sam_repro.config.run_id import run_id
from sam_repro.config.schema import Config
from sam_repro.distributed.ranks import Ranks, init_ranks
from sam_repro.errors import OutOfMemory, UserError, out_of_memory
from sam_repro.records import failure, ledger
from sam_repro.records.files import remove_temporaries
from sam_repro.records.lock import RunLock
from sam_repro.training.run_log import RunLog
from sam_repro.training.signals import Interrupted, StopSignal

THREADS = torch.get_num_threads()  # train.threads=0


class Closable(Protocol):
    """Something to close."""

    def close(self) -> None:
        """Give back what it holds."""


C = TypeVar("C", bound=Closable)


@dataclass(frozen=True)
class Run:
    """One process of a run. Only rank 0 has the lock, and a log that writes."""

    name: str
    dir: Path
    row_path: Path
    ranks: Ranks
    bf16: bool  # whether the passes run under autocast
    log: RunLog
    lock: RunLock | None
    signal: StopSignal
    process_start: float  # seconds since 1970
    exits: ExitStack

    def closing(self, thing: C) -> C:
        """Close `thing` when the run ends, however it ends."""
        self.exits.callback(thing.close)
        return thing

    def received(self) -> int:
        """The signal that any rank has received, or 0. A collective: the same on all ranks."""
        return int(self.ranks.max(self.signal.received or 0))

    def leave(self, number: int, step: int, total: int) -> NoReturn:
        """End the process after a signal, once everything is saved."""
        self.log.say(f"stopped at step {step} of {total} and saved; the same command goes on from there")
        self.log.close(128 + number)
        self.ranks.finish()
        raise Interrupted(128 + number)


@contextmanager
def running(cfg: Config, process_start: float, overrides: list[str]) -> Iterator[Run]:
    """Join the ranks, take the run's folder, and hear signals, until the block ends.

    An exception that leaves the block is noted in the run's folder, and told to the other ranks before this one goes.

    Raises:
        UserError: if the device is not there, or the folder cannot be written.
        Held: if another process has the run.
        OutOfMemory: in place of torch's errors, wherever in the block memory lacked.
    """
    name = run_id(cfg)
    run_dir, row_path = Path(cfg.log.runs_dir) / name, ledger.row_path(cfg.log.ledger_dir, name)
    with ExitStack() as exits:
        ranks = init_ranks(cfg.train.device, cfg.train.timeout_minutes)
        exits.callback(ranks.close)
        signal = StopSignal()
        exits.callback(signal.restore)
        log = RunLog(run_dir if ranks.main else None, cfg, run_id=name)
        lock = None
        try:
            bf16 = use_bf16(cfg.train.dtype, ranks.device)
            seed_everything(cfg, ranks)
            if ranks.main:
                lock = open_run(cfg, run_dir, row_path, overrides)
                exits.callback(lock.release)
                ranks.on_loss(lambda why: failure.give_up(run_dir, lock, why))
            yield Run(name, run_dir, row_path, ranks, bf16, log, lock, signal, process_start, exits)
        except Exception as error:
            error = out_of_memory(error) or error
            if lock is not None:
                leave_trace(run_dir, lock, error)
            ranks.farewell(failure.sentence_of(error), failure.exit_code(error))
            log.close(failure.exit_code(error))  # the next run of this process has its own
            raise error


def leave_trace(run_dir: Path, lock: RunLock, error: Exception) -> None:
    """Note why the run failed. A command that was refused before training leaves nothing behind."""
    trained = (run_dir / "log.jsonl").exists()
    if trained or not isinstance(error, UserError) or isinstance(error, OutOfMemory):
        failure.note(run_dir, failure.sentence_of(error))
        return
    lock.release()
    with suppress(OSError):  # a folder in which there is more stays
        (run_dir / "config.yaml").unlink()
        run_dir.rmdir()


def open_run(cfg: Config, run_dir: Path, row_path: Path, overrides: list[str]) -> RunLock:
    """Make the run directory, take its lock, and write the resolved configuration, headed by how to repeat the run."""
    try:
        rows = row_path.parent  # needed in days, but it costs nothing to know now
        rows.mkdir(parents=True, exist_ok=True)
        if not os.access(rows, os.W_OK):
            raise UserError(f"cannot write in log.ledger_dir={rows}")
    except OSError as error:
        raise UserError(f"cannot write in log.ledger_dir={cfg.log.ledger_dir}: {error}") from error
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run_dir)
        failure.clear(run_dir)
        remove_temporaries(run_dir)
        remove_temporaries(rows, row_path.name)
        configuration = yaml.safe_dump(to_dict(cfg), sort_keys=False)
        (run_dir / "config.yaml").write_text(how_to_repeat(overrides, row_path) + configuration)
    except OSError as error:
        raise UserError(f"cannot write in {run_dir}: {error}") from error
    return lock


def how_to_repeat(overrides: list[str], row_path: Path) -> str:
    """Comment lines with the command, the commit and the place of the ledger row; W&B has them as the run's notes."""
    made = ledger.provenance()
    lines = [f"`sam-repro train {shlex.join(overrides)}` repeats this run."] if overrides else []
    lines += [f"Commit {made['commit']}{', with uncommitted changes' if made['dirty'] else ''}."]
    return "".join(f"# {line}\n" for line in [*lines, f"Its ledger row, once it is done: {row_path}"])


def use_bf16(dtype: str, device: torch.device) -> bool:
    """Whether the passes run under bf16 autocast."""
    supported = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "bf16" and not supported:
        raise UserError(f"train.dtype=bf16, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic; use fp32")
    return dtype == "bf16" or (dtype == "auto" and supported and device.type == "cuda")


def seed_everything(cfg: Config, ranks: Ranks) -> None:
    """Seed everything: equal initial weights on all ranks. Use deterministic algorithms if configured."""
    torch.manual_seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.set_num_threads(cfg.train.threads or THREADS)
    torch.use_deterministic_algorithms(cfg.train.deterministic)
    torch.backends.cudnn.benchmark = not cfg.train.deterministic
    if cfg.train.deterministic and ranks.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def hardware(ranks: Ranks) -> str:
    """The processor that does the arithmetic."""
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"CPU {ledger.cpu_name()}"
