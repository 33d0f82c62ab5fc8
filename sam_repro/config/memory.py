"""Memory: amounts as they are typed, what a pass of n images needs, and which n are possible."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sam_repro.errors import UserError

MOST = 512  # images per pass: with more no GPU is faster
MARGIN = 0.9  # of the memory that a run may use is planned for
GB = 10**9  # bytes; a card that is sold as 24 GB has a little more


def memory_bytes(text: str, key: str, *, total: float | None = None) -> float:
    """Bytes of "24GB", or of a share such as "0.5" where the `total` that it is of is known.

    Raises:
        UserError: for anything else; `key` is what was typed before it.
    """
    amount = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(GB|gb|Gb)?\s*", text)
    value = float(amount[1]) if amount else 0.0
    if amount and amount[2] and value > 0:
        return value * GB
    if amount and not amount[2] and total is not None and 0 < value <= 1:
        return value * total
    share = "" if total is None else ", or a share of the memory in (0, 1], such as 0.5"
    raise UserError(f"{key}={text} is not an amount of memory: give GB, such as 24GB{share}")


def batch_bytes(batch: float, image_size: int) -> float:
    """Bytes of a batch of uint8 images and of the next batch, which is already being loaded."""
    return 2.0 * batch * 3 * image_size**2


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak of a step, for passes of n images and groups of m."""

    fixed: float  # weights, optimizer, reduced gradient: whatever the passes are
    per_image: float  # activations
    per_group: float  # of groups at once: gradients g and g_p, perturbed weights
    sums: float  # of a group in micro-batches: g and g_p accumulated
    m: int

    def at(self, images: int) -> float:
        """For passes of so many images."""
        groups = max(images // self.m, 1)
        return self.fixed + images * self.per_image + groups * self.per_group + (images < self.m) * self.sums

    def largest_group(self, budget: float) -> int:
        """Images of the largest group that fits in one pass."""
        return max(int((budget - self.fixed - self.per_group) / self.per_image), 0)

    def fitting(self, sizes: Iterable[int], budget: float) -> list[int]:
        """Those numbers of images per pass that fit into `budget` bytes with a margin."""
        return [images for images in sizes if self.at(images) <= MARGIN * budget]


def choices(batch: int, m: int, *, at_once: bool, divisible: bool) -> Iterator[int]:
    """Images per pass from the most to the fewest: several groups, one, and where it is `divisible` parts of one.

    Numbers of groups that leave a smaller last pass, which is compiled on its own, are left out where one that does not
    is nearly as large.
    """
    groups = batch // m
    for c in range(min(groups, MOST // m) if at_once else 0, 1, -1):
        if groups % c == 0 or not any(groups % d == 0 for d in range(c // 2 + 1, c)):
            yield c * m
    if m <= MOST or not divisible:
        yield m
    images = m
    while divisible and images > 1:
        images = -(-images // 2)
        if images <= MOST:
            yield images
