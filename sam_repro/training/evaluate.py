"""Exact evaluation: counts of correct and of all images, none dropped and none counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sam_repro.config.schema import DataConfig
from sam_repro.data.evalsets import EvalSet, canonical, open_set, parts, require, summary_of_c
from sam_repro.data.loaders.build import Loader, build_set_loader
from sam_repro.distributed.ranks import Ranks
from sam_repro.optim.memory import halving

Logits = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) -> logits (B, classes), in evaluation mode


class InParts:
    """The logits of some images, with fewer per pass if memory runs out."""

    def __init__(self, logits_of: Logits):
        self.logits_of, self.images = logits_of, 0

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""

        def attempt(most: int) -> Tensor:
            return torch.cat([self.logits_of(part) for part in images.split(most)])

        logits, most = halving(attempt, min(self.images or len(images), len(images)), doing="evaluation")
        if most < len(images):
            self.images = most
        return logits


@torch.no_grad()
def count_correct(logits_of: Logits, loader: Loader, ranks: Ranks) -> dict[str, int]:
    """Top-1 over the whole split: {"correct": c, "total": n}.

    Each rank sees its own share of the split, unpadded; the counts are summed over the ranks.

    Raises:
        AssertionError: if the ranks together did not see every image once.
    """
    logits_of = InParts(logits_of)
    hits = (((logits_of(images).argmax(1) == labels).sum(), len(labels)) for images, labels in loader.epoch(0))
    return _summed(hits, loader, ranks)


@torch.no_grad()
def count_set(logits_of: Logits, eval_set: EvalSet, ranks: Ranks, *, progress: bool = False) -> dict[str, int]:
    """{"correct": c, "total": n} of one opened set by its own rule; closes it."""
    loader = build_set_loader(
        eval_set,
        batch_size=eval_set.data.eval_batch_size,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
    )
    logits_of = InParts(logits_of)
    answers = torch.from_numpy(eval_set.answers).to(ranks.device)
    columns = None if eval_set.columns is None else torch.from_numpy(eval_set.columns).to(ranks.device)

    def hits() -> Iterable[tuple[Tensor, int]]:
        batches = tqdm(loader.epoch(0), eval_set.name, len(loader), unit="batch", disable=not progress)
        for images, numbers in batches:
            logits = logits_of(images)
            predicted = logits.argmax(1) if columns is None else columns[logits[:, columns].argmax(1)]
            yield (predicted[:, None] == answers[numbers]).any(1).sum(), len(numbers)

    try:
        return _summed(hits(), loader, ranks)
    finally:
        loader.close()


def evaluate_sets(
    logits_of: Logits,
    data: DataConfig,
    names: list[str],
    ranks: Ranks,
    *,
    progress: bool = False,
    before: Callable[[str], object] = lambda part: None,
) -> dict[str, dict[str, Any]]:
    """{set: {"correct", "total"}} for the named sets of data/evalsets.py; c also has its details.

    `before` is called with the name of each set, or part of c, on all ranks.

    Raises:
        UserError: for a name that does not exist, or images that are missing.
    """
    names = canonical(names)
    require(data, names)
    counts = {}
    for name in names:
        of_parts = {}
        for part in parts(name):
            before(part)
            of_parts[part] = count_set(logits_of, open_set(data, part), ranks, progress=progress)
        counts[name] = summary_of_c(of_parts) if name == "c" else of_parts[name]
    return counts


def _summed(hits: Iterable[tuple[Tensor, int]], loader: Loader, ranks: Ranks) -> dict[str, int]:
    """(correct, images) of batches, added over batches and ranks and checked to be the whole set."""
    counts = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    for correct, images in hits:
        ranks.pulse()
        counts += torch.stack([correct, correct.new_tensor(images)])
    correct, total = ranks.sum_(counts).tolist()
    assert total == loader.samples, f"evaluated {total} of images={loader.samples}"
    return {"correct": correct, "total": total}
