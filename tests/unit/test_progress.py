"""What a checkpoint holds, and that those of older versions go on."""

from __future__ import annotations

from dataclasses import fields

import torch

from sam_repro.optim import METRICS
from sam_repro.training.progress import Progress

# The keys of a checkpoint beside model, base, method and manifest, by the version that wrote them first.
FIRST = {"step": 7, "seconds": 36.0, "totals": torch.ones(len(METRICS)), "counted": 2, "counts": {}}
LATER = {"interval": 3.0, "hours": 0.5, "sharing": 4, "starts": 1, "starting": 2.5}


def test_what_is_saved_comes_back():
    progress = Progress(torch.arange(float(len(METRICS))), counted=3, step=9, seconds=1.5, interval=0.5, hours=2.0)
    progress.counts = {"val": {"correct": 1, "total": 2}}
    again = Progress.from_checkpoint(progress.state_dict(), world=2)
    assert again.totals is progress.totals and all(
        again.state_dict()[k] == v for k, v in progress.state_dict().items() if k != "totals"
    )
    assert progress.state_dict().keys() == {f.name for f in fields(Progress)} == (FIRST | LATER).keys()


def test_older_checkpoints_go_on():
    """Whichever of the later keys is missing, the others count."""
    first = Progress.from_checkpoint(FIRST, world=2)
    assert (first.step, first.counted, first.interval, first.sharing) == (7, 2, 0.0, 1)
    assert first.hours == 36.0 * 2 / 3600
    for missing in LATER:
        state = {k: v for k, v in (FIRST | LATER).items() if k != missing} | {"model": {}, "manifest": "x"}
        found = Progress.from_checkpoint(state, world=2)
        assert all(getattr(found, key) == value for key, value in LATER.items() if key != missing)


def test_means_and_hours():
    progress = Progress(torch.zeros(len(METRICS)))
    for value in (1.0, 3.0):
        progress.count(torch.full((len(METRICS),), value))
    assert progress.step == 2 and set(progress.means().values()) == {2.0}
    progress.spend(1800, world=4)
    assert (progress.seconds, progress.interval, progress.hours) == (1800, 1800, 2.0)
    progress.start_interval()
    assert (progress.counted, progress.interval, progress.seconds) == (0, 0.0, 1800)


def test_first_steps_are_not_in_the_rate():
    """A process's first step compiles: it counts in the hours, and in the rate only where no other step was made."""
    progress = Progress(torch.zeros(len(METRICS)))
    progress.count(torch.ones(len(METRICS)))
    progress.spend(60, world=1, first=True)
    assert progress.timed() == (60, 1)
    for _ in range(4):
        progress.count(torch.ones(len(METRICS)))
    progress.spend(2, world=1)
    assert progress.timed() == (2, 4) and progress.seconds == 62
    again = Progress.from_checkpoint(progress.state_dict(), world=1)  # a second process goes on in the same interval
    again.count(torch.ones(len(METRICS)))
    again.spend(30, world=1, first=True)
    assert again.timed() == (2, 4) and again.seconds == 92
    again.start_interval()
    again.count(torch.ones(len(METRICS)))
    again.spend(0.5, world=1)
    assert again.timed() == (0.5, 1)
