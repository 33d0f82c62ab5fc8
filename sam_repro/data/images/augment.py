"""Augmentation beyond crop and flip: RandAugment in the loader's threads, cutout and mixup on the device.

All draw from counter-based streams, as the crops do: the same images for any number of workers and ranks.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from sam_repro.data.images.crop import stream, uniform

LAYERS = 2  # operations an image
LEVELS = 10  # magnitude 10 is the full range of AutoAugment; 15 goes beyond it, as in the reference
GREY = (128, 128, 128)  # what rotations and shifts bring in
TAG, CUTOUT_TAG = 0x72616E64, 0x6375746F7574  # separate these streams from the crop's


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=GREY)


def _enhance(kind: type) -> object:
    """Colour, contrast, brightness, sharpness: a factor of 0.1 to 1.9 at magnitude 10."""
    return lambda image, level, sign, place: kind(image).enhance(max(1.8 * level + 0.1, 0.0))


def _cutout(image: Image.Image, level: float, sign: float, place: tuple[float, float]) -> Image.Image:
    """A grey square of side 2 * 40 level pixels, centred anywhere."""
    half = int(40 * level)
    x, y = int(place[0] * image.width), int(place[1] * image.height)
    image = image.copy()
    image.paste(GREY, (max(x - half, 0), max(y - half, 0), min(x + half, image.width), min(y + half, image.height)))
    return image


def _solarize_add(image: Image.Image, level: float, sign: float, place: tuple[float, float]) -> Image.Image:
    """Brighten what is darker than the middle."""
    added = int(110 * level)
    return image.point([min(v + added, 255) if v < 128 else v for v in range(256)] * 3)


# The 16 operations and ranges of TensorFlow's RandAugment (Cubuk et al. 2020), which the reference calls:
# (image, level = magnitude / 10, random sign, random place in [0, 1)^2) -> image.
OPERATIONS = {
    "autocontrast": lambda image, level, sign, place: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign, place: ImageOps.equalize(image),
    "invert": lambda image, level, sign, place: ImageOps.invert(image),
    "rotate": lambda image, level, sign, place: image.rotate(30 * level * sign, fillcolor=GREY),
    "posterize": lambda image, level, sign, place: ImageOps.posterize(image, min(max(int(4 * level), 1), 8)),
    "solarize": lambda image, level, sign, place: ImageOps.solarize(image, int(256 * level)),
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda image, level, sign, place: _affine(image, (1, 0.3 * level * sign, 0, 0, 1, 0)),
    "shear_y": lambda image, level, sign, place: _affine(image, (1, 0, 0, 0.3 * level * sign, 1, 0)),
    "translate_x": lambda image, level, sign, place: _affine(image, (1, 0, 100 * level * sign, 0, 1, 0)),
    "translate_y": lambda image, level, sign, place: _affine(image, (1, 0, 0, 0, 1, 100 * level * sign)),
    "cutout": _cutout,
    "solarize_add": _solarize_add,
}


def rand_augment(pixels: np.ndarray, magnitude: int, *, seed: int, epoch: int, index: int) -> None:
    """Two random operations on one image, in place: uint8 [H, W, 3]. A function of (seed, epoch, index)."""
    key = np.uint64(stream(seed ^ TAG, epoch, index))
    image = Image.fromarray(pixels)
    for layer in range(LAYERS):
        draws = [uniform(key, 4 * layer + i) for i in range(4)]
        operation = list(OPERATIONS.values())[int(draws[0] * len(OPERATIONS))]
        sign = 1.0 if draws[1] < 0.5 else -1.0
        image = operation(image, magnitude / LEVELS, sign, (draws[2], draws[3]))
    pixels[:] = np.asarray(image)


def cutout(images: Tensor, *, side: int, mean: list[float], seed: int, step: int, first: int = 0) -> Tensor:
    """Hide a square of each image, centred anywhere and cut at the edges (DeVries & Taylor 2017).

    Done before a step, so that both of its passes see the same images.

    Args:
        images: uint8 (B, 3, H, W).
        side: of the square, pixels.
        mean: colour of the square, in [0, 1]: nothing, once normalised.
        seed, step: of the run, of the update.
        first: the place of images[0] in the global batch; the squares depend on nothing else.

    Returns:
        the images, with their strides.
    """
    height, width = images.shape[2:]
    centres = _sent(_centres(seed ^ CUTOUT_TAG, step, first, len(images), height, width), images.device)
    colour = _sent(np.array([round(255 * v) for v in mean], np.uint8), images.device)
    rows, columns = _covered(centres[0], side, height), _covered(centres[1], side, width)
    return torch.where(rows[:, None, :, None] & columns[:, None, None, :], colour.view(1, 3, 1, 1), images)


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without making the host wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _covered(centres: Tensor, side: int, length: int) -> Tensor:
    """bool [B, length]: which pixels of an axis a segment of `side` covers."""
    place = torch.arange(length, device=centres.device) - centres[:, None] + side // 2
    return (place >= 0) & (place < side)


@njit(cache=True, nogil=True)
def _centres(seed, step, first, count, height, width):
    out = np.empty((2, count), np.int64)
    for i in range(count):
        key = stream(seed, step, first + i)
        out[0, i], out[1, i] = int(uniform(key, 0) * height), int(uniform(key, 1) * width)
    return out


def mixup(
    images: Tensor, labels: Tensor, *, p: float, classes: int, m: int, seed: int, step: int, rank: int = 0
) -> tuple[Tensor, Tensor]:
    """Mix each image with the next one of its group of m, and the labels alike (Zhang et al. 2018).

    One lambda ~ Beta(p, p) a group, the larger part for the image itself, as in the reference, whose groups are
    devices. Done before a step, so that both of its passes see the same images.

    Args:
        images: uint8 (B, 3, H, W); labels: int64 (B,).
        m: images per group; must divide B.
        seed, step, rank: of the run, of the update, of this process: lambda depends on nothing else.

    Returns:
        fp32 images in the range of uint8, with the strides of `images`, and fp32 targets (B, classes).
    """
    groups = len(images) // m
    draws = [np.random.default_rng([seed, step, rank * groups + g]).beta(p, p) for g in range(groups)]
    share = _sent(np.array([max(a, 1 - a) for a in draws], np.float32).repeat(m), images.device)
    partner = torch.arange(len(images), device=images.device).view(groups, m).roll(-1, 1).flatten()
    x, targets = images.float(), F.one_hot(labels, classes).float()
    other = x[partner]
    mixed = x.sub_(other).mul_(share.view(-1, 1, 1, 1)).add_(other)
    return mixed, torch.lerp(targets[partner], targets, share[:, None])
