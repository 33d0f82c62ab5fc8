"""Exact evaluation: counts of correct and of all images, none dropped and none counted twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sam_repro.data import Loader
from sam_repro.distributed import Ranks


@torch.no_grad()
def count_correct(logits_of: Callable[[Tensor], Tensor], loader: Loader, ranks: Ranks) -> dict[str, int]:
    """Top-1 over the whole split: {"correct": c, "total": n}.

    Each rank sees its own share of the split, unpadded; the counts are summed over the ranks.

    Args:
        logits_of: uint8 images (B, 3, H, W) -> logits (B, classes), in evaluation mode.

    Raises:
        AssertionError: if the ranks together did not see every image once.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    for images, labels in loader.epoch(0):
        hits = (logits_of(images).argmax(1) == labels).sum()
        counts += torch.stack([hits, hits.new_tensor(len(labels))])
    correct, total = ranks.sum_(counts).tolist()
    assert total == loader.samples, f"evaluated {total} of {loader.samples} images"
    return {"correct": correct, "total": total}
