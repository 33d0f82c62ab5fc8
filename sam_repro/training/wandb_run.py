"""A run in W&B, live or replayed: a readable name, tags to filter by, how to repeat it, how it ended."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sam_repro.config.run_id import readable_name
from sam_repro.records.ledger import Row, summary_of
from sam_repro.records.log import read_log
from sam_repro.training.wandb_pictures import draw_curves

LONGEST_TAG = 64  # characters; W&B refuses a run with a longer one


def begin(folder: Path, config: dict[str, Any], *, mode: str, project: str = "", entity: str | None = None) -> Any:
    """The W&B run of a run's folder: always of the same id, so that what is sent again is added to it.

    Args:
        config: the configuration as plain dictionaries.
        mode: "online" | "offline" | ...: what wandb.init takes.
        project: instead of log.project.
    """
    import wandb

    run = wandb.init(
        project=project or config["log"]["project"],
        entity=entity,
        dir=str(folder),
        mode=mode,  # pyright: ignore[reportArgumentType]: one of its words
        resume="allow",
        **identity(config, folder),
        settings=wandb.Settings(init_timeout=60, console="off", silent=True),
    )
    run.define_metric("eta", hidden=True)  # of use while it trains only
    return run


def end(run: Any, folder: Path, row: Row | None, *, code: int) -> None:
    """Send pictures and the columns of W&B's table of runs, and mark how the run ended.

    Args:
        row: of the ledger; None for a run that did not come to its end.
        code: the exit code of the process. W&B calls 0 finished, 129 and more (a signal; it goes on later) preempted,
            everything else failed.
    """
    if row is not None:
        run.log(pictures(folder))  # without a step: the last one's, or after what an earlier start sent
        run.summary.update(summary_of(row))  # after the last log, which would write over it
    if code > 128:
        run.mark_preempting()
    run.finish(exit_code=code)


def identity(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of wandb.init by which people find a run."""
    group = config["log"]["group"]  # the table or study
    tags = {*(config[part]["name"] for part in ("model", "optim", "data")), *(group or "").split("/")}
    return {
        "id": folder.name,
        "name": readable_name(config),
        "group": group,
        "job_type": "train",
        "tags": sorted(tag[:LONGEST_TAG] for tag in tags if tag),
        "notes": notes_of(folder),
        "config": config,
    }


def notes_of(folder: Path) -> str:
    """How the run is repeated: the comment at the top of its config.yaml."""
    with contextlib.suppress(OSError):
        lines = (folder / "config.yaml").read_text().splitlines()
        return "\n".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    return ""


def pictures(folder: Path) -> dict[str, Any]:
    """The curves, and what `sam-repro sharpness` has drawn of the run: the loss surface, the spectrum, ..."""
    import wandb

    drawn = {"curves": draw_curves(read_log(folder / "log.jsonl"))}
    drawn |= {path.stem: str(path) for path in sorted(folder.glob("sharpness/*.png"))}
    return {f"pictures/{name}": wandb.Image(picture) for name, picture in drawn.items() if picture is not None}
