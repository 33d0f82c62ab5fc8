"""jpeg.c, compiled on first use and kept in the user's cache, as a function that numba's kernels can call.

It needs a C compiler and the header of libjpeg-turbo (libjpeg-dev); without them OpenCV decodes whole images, with the
same pixels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
from numba import njit, types

from sam_repro.data.images.crop import PAD, crop_box, render_box

SOURCE = Path(__file__).with_name("jpeg.c")
FLAGS = ("-O2", "-shared", "-fPIC")
SYMBOLS = ("sam_repro_jpeg_sides", "sam_repro_jpeg_box")

# By name, so that kernels can be cached on disk: an address could not.
_sides = types.ExternalFunction(SYMBOLS[0], types.int64(types.uintp, types.uint64))
_box = types.ExternalFunction(SYMBOLS[1], types.int64(types.uintp, types.uint64, *[types.int64] * 6, types.uintp))


@functools.cache
def load() -> str:
    """Make `render_jpeg` callable; returns why that is impossible, or the empty string."""
    source = SOURCE.read_bytes()
    digest = hashlib.sha256(source + platform.machine().encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam_repro"
    library = cache / f"jpeg-{digest}.so"
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    try:
        if not library.exists():
            if compiler is None:
                return "there is no C compiler"
            cache.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}.partial")
            subprocess.run(
                [*compiler.split(), *FLAGS, str(SOURCE), "-o", str(partial), "-ljpeg"],
                check=True, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            os.replace(partial, library)  # ranks may all be here: the last one wins, and all are equal
        handle = ctypes.CDLL(str(library))
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


_keep: list[ctypes.CDLL] = []
assert sys.byteorder == "little"


@njit(cache=True, nogil=True)
def render_jpeg(address, size, height, width, scratch, out, geometry, seed, epoch, index):
    """`crop.render` of a JPEG of `size` bytes in memory, of which only the crop is decoded. Returns whether it could.

    height, width: of the image; 0 asks its header. scratch: uint8, for the decoded pixels; replaced when too small.
    """
    if height == 0:
        sides = _sides(address, size)
        if sides < 0:
            return False
        height, width = sides // 65536, sides % 65536
    top, left, h, w, flip = crop_box(seed, epoch, index, height, width, geometry)
    box = (0, 0, height, width) if geometry.mode == PAD else (top, left, h, w)
    if scratch.size < 3 * height * width:
        scratch = np.empty(3 * height * width, np.uint8)
    place = _box(address, size, height, width, box[0], box[1], box[2], box[3], scratch.ctypes.data)
    if place < 0:
        return False
    x, columns = place // 65536, place % 65536
    pixels = scratch[: 3 * height * columns].reshape(height, columns, 3)
    if geometry.mode != PAD:
        left -= x
    render_box(pixels, top, left, h, w, flip, out, geometry)
    return True
