"""The loader without FFCV: threads of this process read, decode and render with our kernels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch import Tensor

from sam_repro.data.datasets import Source
from sam_repro.data.images.crop import Geometry
from sam_repro.data.loaders.batch_order import BatchPlan
from sam_repro.data.loaders.batches import AHEAD, empty_batch, start_batch, upload
from sam_repro.data.loaders.render_batch import BatchRenderer


class TorchLoader:
    """Batches of a source (see the Loader protocol). Threads suffice: decoding and rendering release the GIL."""

    backend = "torch"

    def __init__(
        self,
        source: Source,
        plan: BatchPlan,
        geometry: Geometry,
        *,
        workers: int,
        device: torch.device,
        magnitude: int = 0,
        reason: str = "",
    ) -> None:
        self.source, self.plan, self.geometry, self.device = source, plan, geometry, device
        self.fill = BatchRenderer(source, geometry, plan.seed, magnitude)
        self.samples, self.manifest, self.reason = len(plan.indices), source.manifest, reason
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of one epoch. Fresh tensors: they may be kept."""
        return upload(self._host_batches(epoch, start), self.device)

    def close(self) -> None:
        """End the threads and close the source."""
        self.pool.shutdown(cancel_futures=True)
        self.source.close()

    def _host_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        pending: deque = deque()
        try:
            for indices in self.plan.batches(epoch, start):
                images = empty_batch(len(indices), self.geometry.size, self.device)
                tasks = start_batch(self.pool, self.fill, indices, images.numpy(), epoch)
                pending.append((tasks, images, torch.from_numpy(self.source.labels[indices])))
                if len(pending) > AHEAD:
                    yield self._finish(pending)
            while pending:
                yield self._finish(pending)
        finally:  # the consumer left early, or a sample failed: nothing of this epoch keeps running
            tasks = [task for batch in pending for task in batch[0] if not task.cancel()]
            wait(tasks)

    @staticmethod
    def _finish(pending: deque) -> tuple[Tensor, Tensor]:
        for task in pending[0][0]:
            task.result()
        _, images, labels = pending.popleft()
        return images, labels
