"""What is due after a step: a line of the log, an evaluation, a measurement, a checkpoint, the end."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sam_repro.config.schema import Config
from sam_repro.curvature.monitor import Monitor
from sam_repro.training.data import Data
from sam_repro.training.run import Run

ASK_EVERY = 10  # steps between the moments when several ranks ask each other


@dataclass(frozen=True)
class Due:
    """What is due after a step, the same on all ranks."""

    log: bool
    evaluate: bool
    measure: bool
    save: bool
    stop: int  # the signal that some rank received, or 0; what is due for it is saved

    @property
    def anything(self) -> bool:
        """Whether the host must wait for the device."""
        return self.log or self.measure or self.save  # an evaluation is saved


class Intervals:
    """The intervals of cfg.train and cfg.sharpness, and when the last checkpoint was saved."""

    def __init__(self, cfg: Config, run: Run, data: Data, monitor: Monitor | None):
        self.train, self.run, self.total, self.monitor = cfg.train, run, data.total, monitor
        self.eval_every = round(cfg.train.eval_every_epochs * data.steps_per_epoch) or data.total
        self.saved()

    def saved(self) -> None:
        """A checkpoint is saved."""
        self.saved_at = time.perf_counter()

    def due(self, step: int) -> Due:
        """What is due after update number `step`, counted from 1."""
        last = step == self.total
        late, stop = False, 0
        if self.run.ranks.world == 1 or step % ASK_EVERY == 0:
            # Two collectives. The clock and the signals of the ranks differ, so rank decides with rank; what decides
            # that they are called must be equal on all of them (the step is), or some would wait here for ever.
            late = self.run.ranks.any(time.perf_counter() - self.saved_at > 60 * self.train.save_every_minutes)
            stop = self.run.received()
        evaluate = last or step % self.eval_every == 0
        every = self.train.save_every_steps
        return Due(
            log=last or step % self.train.log_every == 0,
            evaluate=evaluate,
            measure=not last and self.monitor is not None and self.monitor.due(step),
            save=evaluate or late or bool(stop) or bool(every and step % every == 0),
            stop=stop,
        )
