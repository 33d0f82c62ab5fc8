"""The loader for small data sets: every image is decoded once and stays on the device, where a batch is a gather.

No thread decodes during training, so that networks for 32-pixel images are not starved by the processor. The
samples, their order, crops and pixels are those of the other backends: the boxes come from the same function, and the
arithmetic on the device is the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sam_repro.data.datasets import ArraySource, BetonSource, Source
from sam_repro.data.images.crop import CENTRE, INCEPTION, PLAIN, Geometry, crop_box, render_any
from sam_repro.data.loaders.batch_order import BatchPlan
from sam_repro.data.loaders.batches import CHUNK

SHARE = 0.05  # of the device's free memory that data.backend=auto takes for one split


class MemoryLoader:
    """Batches of a source that fits on the device (see the Loader protocol)."""

    backend = "memory"

    def __init__(
        self,
        source: Source,
        plan: BatchPlan,
        geometry: Geometry,
        *,
        workers: int,
        device: torch.device,
        reason: str = "",
    ) -> None:
        self.plan, self.geometry, self.device, self.reason = plan, geometry, device, reason
        self.samples, self.manifest = len(plan.indices), source.manifest
        self.place = np.zeros(len(source.labels), np.int64)  # sample number -> its place among the kept ones
        self.place[plan.indices] = np.arange(len(plan.indices))
        self.labels = torch.from_numpy(source.labels[plan.indices]).to(device)
        images = decode_all(source, plan.indices, geometry, workers)
        self.heights, self.widths = (np.array([image.shape[i] for image in images]) for i in (0, 1))
        sizes = self.heights * self.widths
        self.starts = np.cumsum(sizes) - sizes  # of each image among the pixels
        self.pixels = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images])).to(device)
        source.close()

    def __len__(self) -> int:
        return len(self.plan)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of one epoch. Fresh tensors: they may be kept."""
        batches = self.plan.batches(epoch, start)
        if not batches:
            return
        order = np.concatenate(batches)
        places = self.place[order]
        # The whole epoch's geometry goes to the device at once, so that no batch waits for the host.
        boxes = np.empty((len(order), 6), np.int64)
        boxes[:, 0] = self.starts[places]
        _boxes(self.plan.seed, epoch, order, self.heights[places], self.widths[places], self.geometry, boxes)
        widths = torch.from_numpy(self.widths[places]).to(self.device)
        table, on_device, first = torch.from_numpy(boxes).to(self.device), torch.from_numpy(places).to(self.device), 0
        for batch in batches:
            rows = slice(first, first + len(batch))
            first += len(batch)
            images = self._render(table[rows], widths[rows])
            yield images.permute(0, 3, 1, 2), self.labels[on_device[rows]]

    def close(self) -> None:
        """Give the memory back."""
        self.pixels = self.labels = torch.empty(0)

    def _render(self, boxes: Tensor, widths: Tensor) -> Tensor:
        """uint8 [B, size, size, 3] of boxes [B, (start, top, left, h, w, flip)] in images of these widths."""
        start, top, left, h, w, flip = (column.view(-1, 1, 1) for column in boxes.unbind(1))
        size, across = self.geometry.size, torch.arange(self.geometry.size, device=self.device)
        rows, columns = across.view(1, -1, 1), across.view(1, 1, -1)
        columns = torch.where(flip > 0, size - 1 - columns, columns)
        if self.geometry.mode == INCEPTION:
            return self._bilinear(start, widths.view(-1, 1, 1), (top, left), (h, w), (rows, columns))
        if self.geometry.mode == CENTRE:
            return self.pixels[start + rows * size + columns]
        # PAD: a window over the image with zeros around, mirrored with it.
        y, x = rows + top, columns + left
        inside = (y >= 0) & (y < size) & (x >= 0) & (x < size)
        return self.pixels[start + y.clamp(0, size - 1) * size + x.clamp(0, size - 1)] * inside.unsqueeze(-1)

    def _bilinear(self, start: Tensor, stride: Tensor, corner: tuple, box: tuple, out: tuple) -> Tensor:
        """Plain bilinear sampling of a box, in the order of crop.py's kernel: rows first, then columns, fp32."""
        (y0, y1, fy), (x0, x1, fx) = (
            _taps(length, self.geometry.size, at, first) for length, at, first in zip(box, out, corner, strict=True)
        )
        near, far = (1.0 - fy).float().unsqueeze(-1), fy.float().unsqueeze(-1)
        left, right = (
            near * self.pixels[start + y0 * stride + x].float() + far * self.pixels[start + y1 * stride + x].float()
            for x in (x0, x1)
        )
        near, far = (1.0 - fx).float().unsqueeze(-1), fx.float().unsqueeze(-1)
        return ((0.5 + near * left) + far * right).to(torch.uint8)


def _taps(length: Tensor, size: int, at: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(lower pixel, upper pixel, weight of the upper one, fp64) of output pixels `at`: crop.py's _axis, PLAIN."""
    x = (at.double() + 0.5) * (length.double() / size) - 0.5
    x = torch.minimum(x.clamp(min=0.0), (length - 1).double())
    low = torch.minimum(x.floor(), (length - 2).clamp(min=0).double())
    upper = torch.minimum(low + 1, (length - 1).double())
    return first + low.long(), first + upper.long(), x - low


def decode_all(source: Source, indices: np.ndarray, geometry: Geometry, workers: int) -> list[np.ndarray]:
    """The images of these samples, uint8 [h, w, 3]: as stored where crops are resampled, else at their final size."""
    if geometry.mode == INCEPTION:
        task = source.read
    else:
        side = geometry.resize if geometry.mode == CENTRE else geometry.size
        whole = geometry._replace(mode=CENTRE, resize=side, flip=False)

        def task(index: int) -> np.ndarray:
            out = np.empty((geometry.size, geometry.size, 3), np.uint8)
            render_any(source.read(index), out, whole, 0, 0, index)
            return out

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        parts = pool.map(lambda part: [task(i) for i in part], np.split(indices, range(CHUNK, len(indices), CHUNK)))
        return [image for part in parts for image in part]


def memory_obstacle(
    source: Source, plan: BatchPlan, geometry: Geometry, device: torch.device, *, magnitude: int
) -> str:
    """Why this split cannot be held on the device, or the empty string."""
    if magnitude:
        return "RandAugment works on the processor"
    if geometry.mode == INCEPTION and geometry.filter != PLAIN:
        return "data.antialias=true is not done on the device"
    if device.type != "cuda":
        return ""
    count, pixels = len(plan.indices), geometry.size**2
    if geometry.mode == INCEPTION:
        if isinstance(source, BetonSource):
            pixels = float((source.file.heights[plan.indices] * source.file.widths[plan.indices]).mean())
        elif not isinstance(source, ArraySource):
            return "the sizes of the images are not known before they are decoded"
    free, _ = torch.cuda.mem_get_info(device)
    if 3 * count * pixels > SHARE * free:
        return f"{3e-9 * count * pixels:.1f} GB of pixels are more than {SHARE:.0%} of the free memory"
    return ""


@njit(cache=True, nogil=True)
def _boxes(seed, epoch, order, heights, widths, geometry, out):
    """crop_box of every sample into columns 1 ... 5; images of the other modes are at their final size."""
    for i in range(len(order)):
        top, left, h, w, flip = crop_box(seed, epoch, order[i], heights[i], widths[i], geometry)
        out[i, 1], out[i, 2], out[i, 3], out[i, 4], out[i, 5] = top, left, h, w, flip
