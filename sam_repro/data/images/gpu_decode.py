"""JPEGs to pixels by the GPU's own JPEG engines. The one place that knows whose function does it.

torchvision has had a batched nvJPEG decoder since 0.20 and deprecates it in 0.29 for the same one in torchcodec, which
needs the torch that it was built for; nvidia-nvimgcodec stands alone. The first that decodes a test image is taken.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor

from sam_repro.data.datasets import Buffer

Decode = Callable[[list[Buffer], torch.device], list[Tensor]]


def _tensors(jpegs: list[Buffer]) -> list[Tensor]:
    return [torch.frombuffer(jpeg, dtype=torch.uint8) for jpeg in jpegs]


def _torchcodec(jpegs: list[Buffer], device: torch.device) -> list[Tensor]:
    from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports]

    return decode_jpeg(_tensors(jpegs), mode="RGB", device=device)


def _torchvision(jpegs: list[Buffer], device: torch.device) -> list[Tensor]:
    from torchvision.io import ImageReadMode, decode_jpeg

    return list(decode_jpeg(_tensors(jpegs), mode=ImageReadMode.RGB, device=device))


@functools.cache
def _codec(index: int):
    from nvidia import nvimgcodec  # pyright: ignore[reportMissingImports]

    return nvimgcodec.Decoder(device_id=index), nvimgcodec.DecodeParams(apply_exif_orientation=False)


def _nvimgcodec(jpegs: list[Buffer], device: torch.device) -> list[Tensor]:
    decoder, params = _codec(device.index or 0)
    stream = torch.cuda.current_stream(device).cuda_stream
    images = decoder.decode([bytes(jpeg) for jpeg in jpegs], params, cuda_stream=stream)
    if any(image is None for image in images):
        raise RuntimeError("nvimgcodec refuses an image")
    return [torch.as_tensor(image, device=device).permute(2, 0, 1) for image in images]


DECODERS: dict[str, Decode] = {"torchcodec": _torchcodec, "torchvision": _torchvision, "nvimgcodec": _nvimgcodec}


def components(jpeg: Buffer) -> int:
    """Colour components in the frame header of a JPEG: 1 grey, 3 colour, 4 CMYK; 0 where there is no such header."""
    at = 2
    while at + 9 < len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return jpeg[at + 9]
        at += 1 if marker == 0xFF else 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
    return 0


@functools.cache
def find_decoder(device: torch.device) -> tuple[str, str]:
    """(name of the decoder that works on `device`, '') or ('', why none does)."""
    if device.type != "cuda":
        return "", "it needs an NVIDIA GPU"
    jpeg = bytearray(cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes())
    reasons = []
    for name, decode in DECODERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision's deprecation
                if decode([jpeg], device)[0].shape == (3, 32, 32):
                    return name, ""
        except Exception as error:  # ImportError, OSError of a missing library, RuntimeError of nvJPEG
            reasons.append(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return "", f"no decoder works ({'; '.join(reasons)})"
