"""Where an image is cut and how it is resampled: one geometry for every backend.

The kernels are compiled once a machine (numba, cached on disk) and run without the GIL, so that any thread may call
them. Randomness is a hash of (seed, epoch, sample index, draw number): the same sample gets the same crop whatever
the number of workers, ranks or the position in the epoch. No fused or reordered arithmetic is allowed, so the pixels
are equal on every machine.

Training (`inception`) follows the rule of TensorFlow's sample_distorted_bounding_box, which the papers' code uses:
the aspect ratio is uniform, then the *height* is uniform among those that keep the area in range (so the area is not
uniform), up to 100 attempts, then the whole image. Evaluation resizes the short side by exact area averaging and
cuts the centre (big_vision's resize_small and central_crop). For weights that were trained elsewhere it does what timm
does, to the pixel: Pillow's bilinear or bicubic filter, torchvision's sizes, and timm's three crop modes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from PIL import Image

from sam_repro.config.schema import AugmentConfig, DataConfig

CENTRE, INCEPTION, PAD = 0, 1, 2
ATTEMPTS = 100  # TensorFlow's max_attempts
PLAIN, AREA, BILINEAR, BICUBIC = 0, 1, 2, 3  # filters: bilinear without antialiasing, area average, Pillow's two
FILTERS = {"area": AREA, "bilinear": BILINEAR, "bicubic": BICUBIC}  # data.interpolation
PILLOW = (BILINEAR, BICUBIC)
SHORT, BOTH, LONG = 0, 1, 2  # which sides of the image become `resize` pixels
FITS = {"center": SHORT, "squash": BOTH, "border": LONG}  # data.crop_mode

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_ONE, _TWO, _THREE = np.uint64(1), np.uint64(2), np.uint64(3)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


class Geometry(NamedTuple):
    """What the kernels need to know. A tuple of scalars, so that a change of value recompiles nothing."""

    mode: int  # CENTRE | INCEPTION | PAD
    size: int  # pixels: side of the square output
    resize: int  # CENTRE: pixels of the sides in `fit` before the cut
    fit: int  # SHORT | BOTH | LONG
    fill: tuple[int, int, int]  # CENTRE: RGB where the output reaches beyond the resized image
    area_min: float  # INCEPTION: fraction of the image's area
    area_max: float
    ratio_min: float  # INCEPTION: width / height
    ratio_max: float
    pad: int  # PAD: zeros on each side
    flip: bool  # left-right with probability 1/2
    filter: int  # PLAIN | AREA | BILINEAR | BICUBIC


def training_geometry(data: DataConfig, augment: AugmentConfig) -> Geometry:
    """The geometry of a training image: augment's crop, scale, ratio, pad and flip; data's size and filter."""
    modes = {"inception": INCEPTION, "pad": PAD, "none": CENTRE}
    (area_min, area_max), (ratio_min, ratio_max) = augment.scale, augment.ratio
    view = evaluation_geometry(data)
    sampling = view.filter if augment.crop != "inception" else AREA if data.antialias else PLAIN
    return view._replace(
        mode=modes[augment.crop],
        area_min=float(area_min),
        area_max=float(area_max),
        ratio_min=float(ratio_min),
        ratio_max=float(ratio_max),
        pad=augment.pad,
        flip=bool(augment.flip),
        filter=sampling,
    )


def evaluation_geometry(data: DataConfig) -> Geometry:
    """The sides that data.crop_mode names to data.eval_resize, then the centre square of data.image_size.

    What lies beyond the resized image is black, and of the mean colour with crop_mode=border, as timm does it.
    """
    fit = FITS[data.crop_mode]
    red, green, blue = (round(255 * mean) if fit == LONG else 0 for mean in data.mean)
    return Geometry(
        mode=CENTRE,
        size=data.image_size,
        resize=data.eval_resize,
        fit=fit,
        fill=(red, green, blue),
        area_min=1.0,
        area_max=1.0,
        ratio_min=1.0,
        ratio_max=1.0,
        pad=0,
        flip=False,
        filter=FILTERS[data.interpolation],
    )


@njit(cache=True, nogil=True)
def _mix(x):
    """splitmix64's finaliser: a bijection of uint64 that scatters every bit."""
    x = (x ^ (x >> _S30)) * _MIX1
    x = (x ^ (x >> _S27)) * _MIX2
    return x ^ (x >> _S31)


@njit(cache=True, nogil=True)
def stream(seed, epoch, index):
    """uint64 key of the random stream that belongs to one sample in one epoch of one seed."""
    key = _mix(np.uint64(seed) + _GOLDEN)
    key = _mix((key ^ np.uint64(epoch)) + _GOLDEN)
    return _mix((key ^ np.uint64(index)) + _GOLDEN)


@njit(cache=True, nogil=True)
def uniform(key, draw):
    """The draw-th number of a stream: float64 in [0, 1)."""
    return np.float64(_mix(key + np.uint64(draw) * _GOLDEN) >> _S11) * 2.0**-53


@njit(cache=True, nogil=True)
def hashes(seed, epoch, count):
    """uint64 [count]: the keys of samples 0 .. count - 1. Sorting by them is a seeded permutation."""
    out = np.empty(count, np.uint64)
    for i in range(count):
        out[i] = stream(seed, epoch, i)
    return out


@njit(cache=True, nogil=True)
def _inception_box(key, height, width, g):
    """(top, left, h, w) by TensorFlow's rule; draws 1 .. 4 * ATTEMPTS of the stream."""
    least, most = g.area_min * height * width, g.area_max * height * width
    for attempt in range(ATTEMPTS):
        ratio = g.ratio_min + uniform(key, 4 * attempt + 1) * (g.ratio_max - g.ratio_min)
        shortest = int(np.rint(np.sqrt(least / ratio)))
        tallest = int(np.rint(np.sqrt(most / ratio)))
        if np.rint(tallest * ratio) > width:  # the tallest box whose rounded width still fits
            tallest = int((width + 0.5 - 1e-7) / ratio)
            if np.rint(tallest * ratio) > width:
                tallest -= 1
        tallest = min(tallest, height)
        shortest = min(shortest, tallest)
        h = shortest + int(uniform(key, 4 * attempt + 2) * (tallest - shortest + 1))
        w = int(np.rint(h * ratio))
        if h * w < least:  # rounding may leave the range by a row: try the neighbour before giving up
            h += 1
            w = int(np.rint(h * ratio))
        if h * w > most:
            h -= 1
            w = int(np.rint(h * ratio))
        if h * w < least or h * w > most or h > height or w > width or h <= 0 or w <= 0:
            continue
        # TensorFlow's offsets are in [0, H - h): the last one is never drawn.
        top = int(uniform(key, 4 * attempt + 3) * (height - h))
        left = int(uniform(key, 4 * attempt + 4) * (width - w))
        return top, left, h, w
    return 0, 0, height, width


@njit(cache=True, nogil=True)
def crop_box(seed, epoch, index, height, width, geometry):
    """(top, left, h, w, flip) of one sample.

    INCEPTION and CENTRE: a box in pixels of the stored image. PAD: the shift, in -pad .. pad, of a size x size window
    over the zero-padded image. Every backend and every test asks this one function.
    """
    key = stream(seed, epoch, index)
    flip = geometry.flip and uniform(key, 0) < 0.5
    if geometry.mode == INCEPTION:
        top, left, h, w = _inception_box(key, height, width, geometry)
    elif geometry.mode == PAD:
        span = 2 * geometry.pad + 1
        top = int(uniform(key, 1) * span) - geometry.pad
        left = int(uniform(key, 2) * span) - geometry.pad
        h, w = geometry.size, geometry.size
    else:
        top, left, h, w = 0, 0, height, width
    return top, left, h, w, flip


@njit(cache=True, nogil=True)
def _fit(h, w, geometry):
    """(height, width) of a resized image or box of h x w pixels, and its row and column at which the output begins.

    Where the output is larger than the resized image, the latter two are negative.
    """
    size = geometry.size
    if geometry.mode == INCEPTION:
        return size, size, 0, 0
    pillow, to = geometry.filter in PILLOW, geometry.resize if geometry.mode == CENTRE else size
    if geometry.fit == BOTH:
        fit_h, fit_w = to, to
    elif geometry.fit == LONG:  # timm's ResizeKeepRatio
        ratio = max(h / to, w / to)
        fit_h, fit_w = int(np.rint(h / ratio)), int(np.rint(w / ratio))
    elif pillow:  # torchvision's Resize truncates
        fit_h, fit_w = to * h // min(h, w), to * w // min(h, w)
    else:
        ratio = to / min(h, w)
        fit_h, fit_w = int(np.rint(h * ratio)), int(np.rint(w * ratio))
    fit_h, fit_w = max(fit_h, 1), max(fit_w, 1)  # of a sliver
    return fit_h, fit_w, _start(fit_h, size, pillow), _start(fit_w, size, pillow)


@njit(cache=True, nogil=True)
def _start(length, size, pillow):
    """The first of `size` pixels in the middle of `length`; torchvision's CenterCrop rounds half to even."""
    if length < size:
        return -((size - length) // 2)
    return int(np.rint((length - size) / 2)) if pillow else (length - size) // 2


@njit(cache=True, nogil=True)
def _axis(length, resized, start, count, filter):
    """Resampling one axis from `length` to `resized` pixels, output pixels start .. start + count - 1.

    Returns (first, taps, weights): int64 [count], int64 [count], fp32 [count, taps at most]. Output j is the sum over
    t < taps[j] of weights[j, t] * input[first[j] + t]; it has no taps where it lies beyond the image. Half-pixel
    centres. Area averages exact fractional boxes; it is used only to shrink, plain bilinear otherwise.
    """
    scale = length / resized
    first = np.empty(count, np.int64)
    taps = np.empty(count, np.int64)
    weights = np.zeros((count, int(np.ceil(scale)) + 2), np.float32)
    for j in range(count):
        out = start + j
        if out < 0 or out >= resized:
            first[j], taps[j] = 0 if out < 0 else length, 0
        elif filter == AREA and scale > 1.0:
            low, high = out * scale, (out + 1) * scale
            begin, end = int(np.floor(low + 1e-9)), int(np.ceil(high - 1e-9))
            for i in range(begin, end):
                weights[j, i - begin] = (min(i + 1.0, high) - max(float(i), low)) / scale
            first[j], taps[j] = begin, end - begin
        else:
            x = (out + 0.5) * scale - 0.5
            floor = int(np.floor(x))
            if floor < 0 or floor + 1 >= length:  # beyond the outermost centres: the edge pixel alone
                first[j], taps[j], weights[j, 0] = max(floor, 0), 1, 1.0
            else:
                first[j], taps[j], weights[j, 0], weights[j, 1] = floor, 2, 1.0 - (x - floor), x - floor
    return first, taps, weights


@njit(cache=True, nogil=True)
def _resample(image, top, left, rows, columns, fill, flip, out):
    """The box of `image` at (top, left), resampled by two `_axis` and written to `out` (uint8, rounded half up).

    Columns first: adding whole rows is the part that the processor's vector unit does well.
    """
    y_first, y_taps, y_weights = rows
    x_first, x_taps, x_weights = columns
    begin, end = x_first[0], x_first[-1] + x_taps[-1]  # the columns that are used at all
    pixels = image.reshape(image.shape[0], 3 * image.shape[1])
    line = np.empty(3 * (end - begin), np.float32)
    for y in range(out.shape[0]):
        line[:] = 0
        for t in range(y_taps[y]):
            weight = y_weights[y, t]
            source = pixels[top + y_first[y] + t, 3 * (left + begin) : 3 * (left + end)]
            for k in range(line.size):
                line[k] += weight * np.float32(source[k])
        for x in range(out.shape[1]):
            at = np.uint64(3 * (x_first[x] - begin))  # unsigned: no test for negative indices, twice as fast
            red = green = blue = np.float32(0.5)
            for t in range(x_taps[x]):
                weight = x_weights[x, t]
                red += weight * line[at]
                green += weight * line[at + _ONE]
                blue += weight * line[at + _TWO]
                at += _THREE
            to = out.shape[1] - 1 - x if flip else x
            if y_taps[y] * x_taps[x] == 0:
                out[y, to, 0], out[y, to, 1], out[y, to, 2] = np.uint8(fill[0]), np.uint8(fill[1]), np.uint8(fill[2])
            else:
                out[y, to, 0], out[y, to, 1], out[y, to, 2] = np.uint8(red), np.uint8(green), np.uint8(blue)


def render_any(image: np.ndarray, out: np.ndarray, geometry: Geometry, seed: int, epoch: int, index: int) -> None:
    """`render` with every filter: Pillow's by Pillow itself, whose order of passes depends on its version."""
    if geometry.filter in PILLOW:
        height, width, top, left = _fit(*image.shape[:2], geometry)
        sampling = Image.Resampling.BICUBIC if geometry.filter == BICUBIC else Image.Resampling.BILINEAR
        view = Image.new("RGB", (geometry.size, geometry.size), geometry.fill)
        view.paste(Image.fromarray(image).resize((width, height), sampling), (-left, -top))
        image = np.array(view)
        geometry = geometry._replace(filter=PLAIN, resize=geometry.size, fit=SHORT)  # which copy it
    render(image, out, geometry, seed, epoch, index)


@njit(cache=True, nogil=True)
def render(image, out, geometry, seed, epoch, index):
    """Cut, resample and flip one sample; not with Pillow's filters, for which there is `render_any`.

    image: uint8 [H, W, 3], C-contiguous; out: uint8 [size, size, 3], overwritten. geometry: a Geometry.
    seed, epoch, index: name the random stream of the sample (see `stream`).
    """
    top, left, h, w, flip = crop_box(seed, epoch, index, image.shape[0], image.shape[1], geometry)
    render_box(image, top, left, h, w, flip, out, geometry)


@njit(cache=True, nogil=True)
def render_box(image, top, left, h, w, flip, out, geometry):
    """`render` with the outcome of crop_box: only the box is looked at, unless the mode is PAD."""
    box = whole_or_box(top, left, h, w, image.shape[0], image.shape[1], geometry)
    rows, columns = axes(box[2], box[3], geometry)
    target = np.empty_like(out) if geometry.mode == PAD else out
    # One call: each further one, with constants for arguments, would be compiled for itself.
    _resample(image, box[0], box[1], rows, columns, geometry.fill, flip, target)
    if geometry.mode == PAD:
        shift(target, top, left, flip, out)


@njit(cache=True, nogil=True)
def whole_or_box(top, left, h, w, height, width, geometry):
    """(top, left, h, w) of what is looked at: the outcome of crop_box, or the whole image with PAD."""
    return (0, 0, height, width) if geometry.mode == PAD else (top, left, h, w)


@njit(cache=True, nogil=True)
def axes(h, w, geometry):
    """The two `_axis` by which a box of h x w pixels becomes the output."""
    fit_h, fit_w, y_start, x_start = _fit(h, w, geometry)
    rows = _axis(h, fit_h, y_start, geometry.size, geometry.filter)
    return rows, _axis(w, fit_w, x_start, geometry.size, geometry.filter)


@njit(cache=True, nogil=True)
def shift(image, down, right, flip, out):
    """PAD: the window over the zero-padded image, which is mirrored already."""
    size = out.shape[0]
    right = -right if flip else right
    for y in range(size):
        for x in range(size):
            inside = 0 <= y + down < size and 0 <= x + right < size
            for c in range(3):
                out[y, x, c] = image[y + down, x + right, c] if inside else np.uint8(0)
