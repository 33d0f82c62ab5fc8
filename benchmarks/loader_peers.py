"""Loaders of other projects that loader_parties.py adds where they are installed: tf.data, simplejpeg, DALI.

Each decodes on the processor, crops as its users do (area 5-100 %, ratio 3/4-4/3), resizes to 224 pixels without
antialiasing where it has a choice, flips, and delivers uint8 [batch, 224, 224, 3]. tf.data and simplejpeg have the
files in memory, so they are spared the reading.
"""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

SIZE, SCALE, RATIO = 224, (0.05, 1.0), (3 / 4, 4 / 3)
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def files(root: Path) -> tuple[list[str], list[int]]:
    """(paths, labels) of the training images."""
    classes = sorted((root / "train").iterdir())
    pairs = [(str(file), label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
    return [p for p, _ in pairs], [label for _, label in pairs]


def in_memory(root: Path) -> tuple[list[bytes], list[int]]:
    """The same with the files' bytes; links to one file share them."""
    paths, labels = files(root)
    known: dict[int, bytes] = {}
    for path in paths:
        known.setdefault(os.stat(path).st_ino, Path(path).read_bytes())
    return [known[os.stat(path).st_ino] for path in paths], labels


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, h, w) of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width


def tfdata(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """The papers' own pipeline: sample_distorted_bounding_box, decode_and_crop_jpeg, resize."""
    import tensorflow as tf

    def load(data, label):
        shape = tf.io.extract_jpeg_shape(data)
        boxes = tf.zeros([0, 0, 4], tf.float32)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, boxes, area_range=SCALE, aspect_ratio_range=RATIO, min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.resize(tf.io.decode_and_crop_jpeg(data, window, channels=3), [SIZE, SIZE])
        return tf.cast(tf.image.random_flip_left_right(image), tf.uint8), label

    # A function of the index: a tensor of the bytes would have a copy for each link.
    contents, labels = in_memory(root)
    distinct = list({id(c): c for c in contents}.values())
    number = {id(c): i for i, c in enumerate(distinct)}
    table, which = tf.constant(distinct), [number[id(c)] for c in contents]
    data = tf.data.Dataset.from_tensor_slices((which, labels)).shuffle(len(labels)).repeat()
    data = data.map(lambda i, label: load(tf.gather(table, i), label), num_parallel_calls=workers, deterministic=False)
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    for x, y in data.batch(batch, drop_remainder=True).prefetch(2).with_options(options).as_numpy_iterator():
        yield torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def simplejpeg(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """Plain threads that decode with simplejpeg and resize with OpenCV."""
    import cv2
    import simplejpeg as codec

    cv2.setNumThreads(1)
    contents, labels = in_memory(root)

    def load(index: int, out: np.ndarray) -> None:
        image = codec.decode_jpeg(contents[index], "RGB")
        top, left, h, w = random_box(*image.shape[:2])
        small = cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        out[:] = small[:, ::-1] if random.random() < 0.5 else small

    def start() -> tuple[list, np.ndarray, list[int]]:
        chosen, images = random.sample(range(len(labels)), batch), np.empty((batch, SIZE, SIZE, 3), np.uint8)
        return [pool.submit(load, i, images[k]) for k, i in enumerate(chosen)], images, [labels[i] for i in chosen]

    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(start() for _ in range(3))
        while True:
            tasks, images, chosen = ahead.popleft()
            for task in tasks:
                task.result()
            ahead.append(start())
            yield torch.from_numpy(images).to(device), torch.tensor(chosen, device=device)


def dali(root: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """DALI's processor pipeline, which decodes the crop alone where its codec can."""
    from nvidia.dali import fn, pipeline_def, types

    paths, labels = files(root)

    @pipeline_def(batch_size=batch, num_threads=workers, device_id=None, prefetch_queue_depth=2)
    def pipeline():
        data, label = fn.readers.file(files=paths, labels=labels, random_shuffle=True, dont_use_mmap=False)
        image = fn.decoders.image_random_crop(data, device="cpu", random_area=SCALE, random_aspect_ratio=RATIO)
        image = fn.resize(image, size=(SIZE, SIZE), antialias=False, interp_type=types.INTERP_LINEAR)
        return fn.flip(image, horizontal=fn.random.coin_flip()), label

    built = pipeline()
    built.build()
    while True:
        images, label = built.run()
        yield torch.from_numpy(images.as_array().copy()).to(device), torch.from_numpy(label.as_array()[:, 0]).to(device)


PEERS = {  # name: (the package it needs, the loader)
    "tf.data": ("tensorflow", tfdata),
    "simplejpeg": ("simplejpeg", simplejpeg),
    "dali-cpu": ("nvidia.dali", dali),
}
