"""What the streaming backends share: rendering a batch in threads, and bringing batches to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

AHEAD = 3  # batches in preparation while one is used
CHUNK = 8  # samples per task: small enough to balance, large enough that Python's share is small


def empty_batch(count: int, size: int, device: torch.device) -> Tensor:
    """uint8 [count, size, size, 3] on the host, page-locked when it goes to a GPU."""
    return torch.empty((count, size, size, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")


Fill = Callable[[np.ndarray, np.ndarray, int], None]  # (sample numbers, uint8 [n, size, size, 3] to fill, epoch)


def start_batch(pool: ThreadPoolExecutor, fill: Fill, indices: np.ndarray, out: np.ndarray, epoch: int) -> list[Future]:
    """Begin to fill `out` with the samples `indices`, a chunk per task."""
    chunks = range(0, len(indices), CHUNK)
    return [pool.submit(fill, indices[i : i + CHUNK], out[i : i + CHUNK], epoch) for i in chunks]


def upload(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Host batches (uint8 [B, H, W, 3], labels) as (uint8 [B, 3, H, W] with channels-last strides, labels) on `device`.

    On a GPU the next batch is copied on a stream of its own while the current one is used. Every batch is a fresh
    tensor: it may be kept.
    """
    if device.type != "cuda":
        for images, labels in batches:
            yield images.permute(0, 3, 1, 2), labels
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Tensor, Tensor] | None = None
    for images, labels in batches:
        with torch.cuda.stream(stream):
            copied = images.to(device, non_blocking=True), labels.pin_memory().to(device, non_blocking=True)
        if waiting is not None:
            yield _arrived(waiting, stream)
        waiting = copied
    if waiting is not None:
        yield _arrived(waiting, stream)


def _arrived(batch: tuple[Tensor, Tensor], stream: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
    """Make the current stream wait for the copies, and the allocator aware of who uses them."""
    current = torch.cuda.current_stream(batch[0].device)
    current.wait_stream(stream)
    for tensor in batch:
        tensor.record_stream(current)
    return batch[0].permute(0, 3, 1, 2), batch[1]
