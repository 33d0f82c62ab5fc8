"""Lack of memory: how it is recognised, and how work on many images goes on with fewer of them at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Of torch's allocators, and of libraries that allocate for themselves and raise a plain RuntimeError.
WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def no_memory(error: BaseException) -> bool:
    """Whether memory lacks, on a GPU or a CPU; some interpreters of torch wrap the error in another."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in WORDS)


def halving(
    attempt: Callable[[int], T],
    images: int,
    *,
    least: int = 1,
    doing: str = "this",
    say: Callable[[str], object] | None = None,
) -> tuple[T, int]:
    """attempt(images at once), with half as many after each lack of memory.

    For work whose result does not depend on how its images are cut. It must start from nothing at each attempt, and
    must not wait for another rank: a rank that tries again would leave the others in a collective.

    Args:
        attempt: the work; what it holds when it fails is freed before the next attempt.
        images: at the first attempt.
        least: below this many the error is raised.
        doing: the work, for the sentence: "<doing> takes 32 images at once: there is no memory for 64".
        say: what is done with that sentence; None prints it on stderr.

    Returns:
        (what `attempt` returned, images at once that it had memory for).
    """
    while True:
        try:
            return attempt(images), images
        except (RuntimeError, MemoryError) as error:
            if images <= least or not no_memory(error):
                raise
        # Outside of the handler: while the error lives, its traceback holds the tensors of the failed attempt.
        torch.cuda.empty_cache()
        fewer = max(least, images // 2)
        sentence = f"{doing} takes {fewer} image{'s' * (fewer > 1)} at once: there is no memory for {images}"
        print(sentence, file=sys.stderr) if say is None else say(sentence)
        images = fewer


def cut(batch: Sequence[Tensor], images: int) -> list[tuple[Tensor, ...]]:
    """The batch in parts of so many images; the last may have fewer."""
    return list(zip(*(tensor.split(images) for tensor in batch), strict=True))


def fitting(batches: list[Any], attempt: Callable[[Any], object], *, doing: str = "a pass") -> list[Any]:
    """`batches` of (images, ...), cut until `attempt` has memory for the first: other runs may share the GPU."""
    if not batches:
        return batches
    size = len(batches[0][0])
    _, images = halving(lambda n: attempt(cut(batches[0], n)[0]), size, doing=doing)
    return batches if images == size else [part for batch in batches for part in cut(batch, images)]
