"""Train one model with one method: `main`, from the configuration to the row of the ledger."""

from __future__ import annotations

import sys
import time

from sam_repro.config.checks import validate
from sam_repro.config.run_id import run_id
from sam_repro.config.schema import Config
from sam_repro.distributed.ranks import require_device
from sam_repro.records import ledger
from sam_repro.training.data import open_data
from sam_repro.training.fit import evaluate_end, fit
from sam_repro.training.job import build_job
from sam_repro.training.progress import resume
from sam_repro.training.results import write_results
from sam_repro.training.run import running


def main(cfg: Config, overrides: list[str] | None = None, *, process_start: float | None = None) -> ledger.Row:
    """Train, evaluate and write the ledger row of `cfg`; resume it, or return its row if it has one.

    Args:
        overrides: what was typed after train.py, for the row to say how the run is repeated.
        process_start: in seconds since 1970, to say how long the first step took; None is now.

    Returns:
        the ledger row: status "done" or "diverged", counts, curves, provenance.

    Raises:
        UserError: bad input, in one sentence.
        Interrupted: after saving, on a signal of training/signals.py.
        RankLost: when another rank is gone.
    """
    validate(cfg)
    ledger.provenance()  # remembered now, before anybody goes on in the checkout
    if row := finished(cfg):
        return row
    with running(cfg, process_start or time.time(), overrides or []) as run:
        if run.ranks.first(run.row_path.exists()):  # another process has finished it in the meantime
            run.ranks.finish()
            return ledger.read_row(run.row_path)
        data = open_data(cfg, run)
        job = build_job(cfg, run, data)
        progress = resume(cfg, run, data, job)
        status = fit(cfg, run, data, job, progress)
        sharpness = evaluate_end(cfg, run, data, job, progress) if status == "done" else {}
        row = write_results(cfg, run, data, job, progress, status, sharpness, overrides or [])
        run.ranks.finish()
        return row


def finished(cfg: Config) -> ledger.Row | None:
    """The row of a run that is in the ledger."""
    require_device(cfg.train.device)  # who asks for what is not there is told so, and not that all is done
    path = ledger.row_path(cfg.log.ledger_dir, run_id(cfg))
    if not path.exists():
        return None
    row = ledger.read_row(path)
    root = row["config"]["data"]["root"]
    where = "" if root == cfg.data.root else f", with the images of data.root={root}"
    print(f"{row['run_id']} is {row['status']}: {path}{where}", file=sys.stderr)
    return row
