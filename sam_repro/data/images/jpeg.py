"""jpeg.c, compiled on first use and kept in the user's cache, as a function that numba's kernels can call.

It needs a C compiler and the header of libjpeg-turbo (libjpeg-dev); without them Pillow decodes whole images, with the
same pixels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import llvmlite.binding
import numpy as np
from numba import njit, types

from sam_repro.data.images.crop import PAD, axes, crop_box, shift, whole_or_box
from sam_repro.records.files import sha256, write_atomic

SOURCE = Path(__file__).with_name("jpeg.c")
FLAGS = ("-O3", "-ffp-contract=off", "-shared", "-fPIC")
SYMBOLS = ("sam_repro_jpeg_sides", "sam_repro_jpeg_box", "sam_repro_jpeg_recode", "sam_repro_jpeg_resample")

# By name, so that kernels can be cached on disk: an address could not.
_sides = types.ExternalFunction(SYMBOLS[0], types.int64(types.uintp, types.uint64))
_box = types.ExternalFunction(SYMBOLS[1], types.int64(types.uintp, types.uint64, *[types.int64] * 6, types.uintp))
_axis = types.uintp, types.uintp, types.uintp, types.int64
_resample = types.ExternalFunction(
    SYMBOLS[3], types.int64(types.uintp, types.int64, *_axis, *_axis, *[types.int64] * 3, types.uintp)
)


@functools.cache
def load() -> str:
    """Make `render_jpeg` callable; returns why that is impossible, or the empty string."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    try:
        handle = _library(compiler)
        for symbol in SYMBOLS:
            address = ctypes.cast(getattr(handle, symbol), ctypes.c_void_p).value
            llvmlite.binding.add_symbol(symbol, address)
    except subprocess.CalledProcessError as error:
        missing = "libjpeg's header or library is missing" if "jpeg" in error.stderr else "it does not compile"
        return f"{SOURCE.name}: {missing} (libjpeg-dev)"
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"{SOURCE.name}: {error}"
    _keep.append(handle)
    return ""


def _library(compiler: str | None) -> ctypes.CDLL:
    """The compiled code: from the user's cache, else made and kept there, if it takes files."""
    source = SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam_repro"
    library = cache / f"jpeg-{sha256(source + platform.machine().encode())[:16]}.so"
    if library.exists():
        return ctypes.CDLL(str(library))
    if compiler is None:
        raise OSError("there is no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / library.name
        subprocess.run(
            [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(made), "-ljpeg"],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        with contextlib.suppress(OSError):  # a read-only or full home: compiled again by each process
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(library, made.read_bytes())
        return ctypes.CDLL(str(made))


def recode(data: bytes, segment: int) -> bytes | None:
    """The same coefficients with the best Huffman tables and a restart marker about every `segment` pixels of a row.

    Decoding a crop of the result reads only the segments that it touches. Any JPEG reader reads it; metadata and
    comments are gone. None where that cannot be done without a warning, or `load` gives a reason.
    """
    if load():
        return None
    out = ctypes.create_string_buffer(2 * len(data) + 4096)
    function = getattr(_keep[0], SYMBOLS[2])
    function.restype = ctypes.c_int64
    size = function(data, ctypes.c_uint64(len(data)), ctypes.c_int64(segment), out, ctypes.c_uint64(len(out)))
    return ctypes.string_at(out, size) if size > 0 else None


_keep: list[ctypes.CDLL] = []
assert sys.byteorder == "little"


@njit(cache=True, nogil=True)
def render_jpeg(address, size, height, width, scratch, out, geometry, seed, epoch, index):
    """`crop.render` of a JPEG of `size` bytes in memory, of which only the crop is decoded. Returns whether it could.

    address: int64, of its first byte. height, width: of the image; 0 asks its header. scratch: uint8, for the decoded
    pixels; replaced when too small. out: uint8 [size, size, 3], overwritten. The others are those of `crop.render`.
    """
    if height == 0:
        sides = _sides(address, size)
        if sides < 0:
            return False
        height, width = sides // 65536, sides % 65536
    top, left, h, w, flip = crop_box(seed, epoch, index, height, width, geometry)
    y, x, h, w = whole_or_box(top, left, h, w, height, width, geometry)
    if scratch.size < 4 * height * width:
        scratch = np.empty(4 * height * width, np.uint8)
    place = _box(address, size, height, width, y, x, h, w, scratch.ctypes.data)
    if place < 0:
        return False
    x, stored = x - place // 65536, place % 65536
    rows, columns = axes(h, w, geometry)
    target = np.empty_like(out) if geometry.mode == PAD else out
    red, green, blue = geometry.fill
    done = _resample(
        scratch.ctypes.data + 4 * (y * stored + x), stored,
        rows[0].ctypes.data, rows[1].ctypes.data, rows[2].ctypes.data, rows[2].shape[1],
        columns[0].ctypes.data, columns[1].ctypes.data, columns[2].ctypes.data, columns[2].shape[1],
        flip, red | green << 8 | blue << 16, geometry.size, target.ctypes.data,
    )  # fmt: skip
    if geometry.mode == PAD:
        shift(target, top, left, flip, out)
    return done == 1
