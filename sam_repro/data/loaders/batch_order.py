"""Which samples make up which batch: pure functions of seed, epoch, rank and world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sam_repro.data.images.crop import hashes

ORDER_TAG = 0x6F72646572  # separates the stream of the order from the augmentation's
NOISE_TAG = 0x6E6F697365  # which labels are wrong is the same for every seed and method
HOLDOUT_TAG = 0x6D696E6976616C  # minival is the same for every seed
SAMPLE_TAG = 0x73616D706C65


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [count]: the permutation of one epoch. Sorting hashes does not depend on a library's generator."""
    return np.argsort(hashes(seed ^ ORDER_TAG, epoch, count), kind="stable")


def holdout(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, minival) indices, sorted: of each class `fraction` is train, the rest (rounded) is minival.

    Which samples are held out depends on nothing but their labels and positions: it is equal for every run.
    """
    by_class, rank_in_class = _shuffled_classes(labels, HOLDOUT_TAG)
    counts = np.bincount(labels)
    held = rank_in_class < np.floor(counts * (1.0 - fraction) + 0.5)[labels[by_class]]
    return np.sort(by_class[~held]), np.sort(by_class[held])


def balanced(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` sample numbers, the classes in turn: no class has two more than another that has any left."""
    by_class, rank_in_class = _shuffled_classes(labels, seed ^ SAMPLE_TAG)
    keys = hashes(seed ^ SAMPLE_TAG, 1, len(labels))
    return by_class[np.lexsort((keys, rank_in_class))[:count]]


def _shuffled_classes(labels: np.ndarray, tag: int) -> tuple[np.ndarray, np.ndarray]:
    """(sample numbers class by class, shuffled within each; the place of each within its class)."""
    by_class = np.lexsort((hashes(tag, 0, len(labels)), labels))
    counts = np.bincount(labels)
    return by_class, np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)


def noisy(labels: np.ndarray, fraction: float, classes: int) -> np.ndarray:
    """Labels of which exactly `fraction` (rounded) are replaced by another class, uniformly: symmetric noise."""
    wrong = np.argsort(hashes(NOISE_TAG, 0, len(labels)), kind="stable")[: round(fraction * len(labels))]
    shift = 1 + hashes(NOISE_TAG, 1, len(labels))[wrong].astype(np.uint64) % np.uint64(classes - 1)
    labels = labels.copy()
    labels[wrong] = (labels[wrong] + shift.astype(labels.dtype)) % classes
    return labels


@dataclass(frozen=True)
class BatchPlan:
    """The batches of one split on one rank.

    Training: global batch b is elements b * B .. (b + 1) * B - 1 of the epoch's permutation, B = batch_size * world,
    and a rank takes its contiguous share, so neither the samples of a global batch nor their order depend on the
    world. The last incomplete global batch is dropped. Evaluation: every world-th sample in order, all of them.
    """

    indices: np.ndarray  # int64: the split's samples, as numbers in the source
    batch_size: int  # of this rank
    seed: int
    training: bool
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        """Batches an epoch on this rank."""
        if self.training:
            return len(self.indices) // (self.batch_size * self.world)
        own = len(range(self.rank, len(self.indices), self.world))
        return -(-own // self.batch_size)

    def batches(self, epoch: int, start: int) -> list[np.ndarray]:
        """Batches start, start + 1, ... of the epoch, each an int64 array of sample numbers."""
        if not self.training:
            own = self.indices[self.rank :: self.world]
            return [own[b * self.batch_size : (b + 1) * self.batch_size] for b in range(start, len(self))]
        order = self.indices[epoch_order(len(self.indices), self.seed, epoch)]
        firsts = [(b * self.world + self.rank) * self.batch_size for b in range(start, len(self))]
        return [order[first : first + self.batch_size] for first in firsts]
