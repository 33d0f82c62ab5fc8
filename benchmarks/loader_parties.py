"""The loaders that benchmarks/loader.py compares: each an endless iterator of (images on the device, labels).

All start from the same JPEG files. Ours read them as `sam-repro write` stores them; `ours-bytes` and the other projects
read the files' own bytes. All deliver training images of 224 pixels: random-resized crop (area 5-100 %) and flip, as
uint8. Only `torchvision` and `timm` also normalise them, because their users do. Run as a program, this file serves one
party to the benchmark: a line of seconds in, a line of JSON out.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loader_peers import PEERS, RATIO, SCALE, SIZE, Batches

from sam_repro.config.schema import AugmentConfig, DataConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _torchvision(root: Path, batch: int, workers: int, device: torch.device, *, normalise: bool) -> Batches:
    from torchvision import transforms as T
    from torchvision.datasets import ImageFolder

    last = [T.ToTensor(), T.Normalize(MEAN, STD)] if normalise else [T.PILToTensor()]
    crop = T.RandomResizedCrop(SIZE, SCALE, RATIO)
    data = ImageFolder(str(root / "train"), T.Compose([crop, T.RandomHorizontalFlip(), *last]))
    more = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": True}
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True, drop_last=True, **more)
    while True:
        for x, y in loader:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)


def torchvision(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """ImageFolder and DataLoader, Pillow, normalised fp32: what the tutorials say."""
    return _torchvision(root, batch, workers, device, normalise=True)


def torchvision_uint8(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """The same, delivering uint8: the faster way that fewer people know."""
    return _torchvision(root, batch, workers, device, normalise=False)


def timm(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """timm's ImageDataset and create_loader; on a GPU with its prefetcher, which normalises there."""
    from timm.data import ImageDataset, create_loader

    loader = create_loader(
        ImageDataset(str(root / "train")), (3, SIZE, SIZE), batch, is_training=True, scale=SCALE, ratio=RATIO,
        hflip=0.5, color_jitter=None, auto_augment=None, interpolation="bilinear", mean=MEAN, std=STD,
        num_workers=workers, persistent_workers=True, pin_memory=device.type == "cuda",
        use_prefetcher=device.type == "cuda", device=device,
    )  # fmt: skip
    while True:
        yield from loader


def ffcv(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """FFCV's own pipeline: its crop, its flip, its compiled loop."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler
    from ffcv.transforms import RandomHorizontalFlip, Squeeze, ToDevice, ToTensor, ToTorchImage

    there = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    image = [RandomResizedCropRGBImageDecoder((SIZE, SIZE), SCALE, RATIO), RandomHorizontalFlip(), ToTensor(), *there]
    with patch.object(Compiler, "set_num_threads", STOCK_THREADS or Compiler.set_num_threads):
        loader = Loader(
            str(root / "train.beton"), batch_size=batch, num_workers=workers, order=OrderOption.RANDOM, os_cache=True,
            drop_last=True, seed=0,
            pipelines={"image": [*image, ToTorchImage()], "label": [IntDecoder(), ToTensor(), Squeeze(), *there]},
        )  # fmt: skip
        while True:
            yield from loader


STOCK_THREADS = None  # FFCV's own function, where our loader, which replaces it, lives in the same process


def keep_stock_ffcv() -> None:
    """To be called before our FFCV loader is imported in a process that also runs FFCV's own."""
    global STOCK_THREADS
    from ffcv.pipeline.compiler import Compiler

    STOCK_THREADS = Compiler.set_num_threads


def ours(
    root: Path, batch: int, workers: int, device: torch.device, *, backend: str, written: str = "segments"
) -> Batches:
    """This project's loader with one of its backends, of a file in restart segments or with its sources' bytes."""
    from sam_repro.data.loaders.build import build_loader

    classes = len(list((root / "train").iterdir()))
    data = DataConfig(name="benchmark", root=str(root / written), num_classes=classes, workers=workers, backend=backend)
    augment = AugmentConfig(name="light")
    loader = build_loader(data, augment, split="train", training=True, batch_size=batch, seed=0, device=device)
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


PARTIES = {
    "torchvision": torchvision,
    "torchvision-uint8": torchvision_uint8,
    "timm": timm,
    "ffcv": ffcv,
    **{name: loader for name, (_, loader) in PEERS.items()},
    "ours-ffcv": lambda *a: ours(*a, backend="ffcv"),
    "ours-torch": lambda *a: ours(*a, backend="torch"),
    "ours-bytes": lambda *a: ours(*a, backend="torch", written="."),
}


def available() -> list[str]:
    """The parties that this machine can run."""
    needed = {name: package for name, (package, _) in PEERS.items()}
    needed |= {name: "ffcv" for name in PARTIES if "ffcv" in name}
    lacking = {name for name, package in needed.items() if not _installed(package)}
    return [name for name in PARTIES if name not in lacking]


def _installed(package: str) -> bool:
    return all(importlib.util.find_spec(".".join(package.split(".")[: n + 1])) for n in range(len(package.split("."))))


def lockstep(name: str, workers: int) -> int:
    """Batches that arrive together: every worker process of a DataLoader makes one of its own."""
    return workers if name.startswith(("torchvision", "timm")) else 1


def processor_seconds() -> float:
    """Of this process and its workers."""
    me = psutil.Process()
    times = [p.cpu_times() for p in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def measure(batches: Batches, seconds: float, group: int) -> dict[str, float]:
    """Images per second over at least `seconds` and a multiple of `group` batches, once the queues are empty."""
    for _ in range(2 * group + 4):
        next(batches)
    synchronise()
    images, count, cpu, start = 0, 0, processor_seconds(), time.perf_counter()
    while count % group or time.perf_counter() - start < seconds:
        x, _ = next(batches)
        images, count = images + len(x), count + 1
    synchronise()
    return {
        "images": images,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": processor_seconds() - cpu,
    }


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(name: str, root: str, batch: str, workers: str, device: str) -> None:
    start = time.perf_counter()
    batches = PARTIES[name](Path(root), int(batch), int(workers), torch.device(device))
    next(batches)
    synchronise()
    print(json.dumps({"first_batch_seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(batches, float(line), lockstep(name, int(workers)))), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
