"""One decoder: every kind of image file shows the same picture from class folders and from what `write` stores."""

from __future__ import annotations

import io
import itertools
import struct
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from sam_repro.config.schema import DataConfig
from sam_repro.data.beton import BetonFile
from sam_repro.data.datasets import FolderSource, decode
from sam_repro.data.images.crop import evaluation_geometry
from sam_repro.data.loaders.render_batch import BatchRenderer
from sam_repro.data.write import encode, write_dataset
from sam_repro.errors import UserError

HEIGHT, WIDTH = 40, 60
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
RGB = np.stack([X * 4, Y * 6, 255 - X * 4], 2).astype(np.uint8)
GREY16 = (X * 1100).astype(np.uint16)
ALPHA = Image.fromarray(np.dstack([RGB, (X < 30) * 255]).astype(np.uint8))
PICTURE = Image.fromarray(RGB)
PALETTE = PICTURE.quantize(64)
NO_SUCH_FILE = (OSError, ValueError, KeyError, AttributeError, SystemError)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def by_opencv(suffix: str, pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(suffix, pixels)
    if not done:
        raise OSError(suffix)
    return data.tobytes()


def tiff(pixels: np.ndarray, order: str) -> bytes:
    """A grey TIFF of one strip, big-endian ('>') or little-endian ('<')."""
    bits = 8 * pixels.itemsize
    tags = [(256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, HEIGHT)]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in [*tags, (279, len(data))])
    start = b"MM\0*" if order == ">" else b"II*\0"
    directory = struct.pack(f"{order}H", 9) + entries + bytes(4)
    return start + struct.pack(f"{order}I", 8 + len(data)) + data + directory


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.find(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0] :]


def kinds() -> dict[str, bytes]:
    """Every mode that Pillow stores in every format, OpenCV's depths, and what files have besides pixels."""
    files = {}
    modes = [*map(PICTURE.convert, ("1", "L", "RGB", "CMYK", "YCbCr", "LAB", "HSV", "I", "F")), PALETTE, ALPHA]
    modes += [ALPHA.convert(mode) for mode in ("LA", "RGBa", "La", "PA")] + [Image.fromarray(GREY16)]
    formats = ["JPEG", "PNG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI"]
    formats += ["MPO", "DDS", "MSP", "XBM"]
    for kind, image in itertools.product(formats, modes):
        try:
            files[f"{image.mode} {kind}"] = saved(image, kind)
        except NO_SUCH_FILE:
            continue
    for compression, image in itertools.product(("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"), modes):
        try:
            files[f"{image.mode} TIFF {compression}"] = saved(image, "TIFF", compression=compression)
        except NO_SUCH_FILE:
            continue
    depths = [GREY16, RGB.astype(np.uint16) * 257, np.dstack([RGB.astype(np.uint16) * 257, GREY16]), RGB, RGB[..., 0]]
    depths += [GREY16.astype(np.int16), GREY16.astype(np.int32), *(a.astype(np.float32) / 255 for a in (RGB, X))]
    for suffix, pixels in itertools.product((".png", ".tiff", ".ppm", ".pgm", ".pam", ".jp2", ".webp", ".bmp"), depths):
        try:
            files[f"{pixels.dtype} {pixels.shape[2:]} {suffix}"] = by_opencv(suffix, pixels)
        except (cv2.error, OSError):
            continue
    for order, pixels in itertools.product("<>", (GREY16, RGB[..., 0].copy(), GREY16.astype(np.uint32))):
        files[f"TIFF {order} {pixels.dtype}"] = tiff(pixels, order)
    exif = Image.Exif()
    exif[0x0112] = 6
    cmyk = saved(PICTURE.convert("CMYK"), "JPEG", quality=95)
    turned = PICTURE.rotate(90)
    return files | {
        "palette with transparency": saved(PALETTE, "PNG", transparency=3),
        "palette with alpha": saved(PALETTE, "PNG", transparency=bytes(range(64))),
        "RGB with a transparent colour": saved(PICTURE, "PNG", transparency=(0, 0, 255)),
        "animated GIF": saved(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(90)]),
        "animated PNG": saved(PICTURE, "PNG", save_all=True, append_images=[turned]),
        "animated PNG with a cover": saved(PICTURE, "PNG", save_all=True, default_image=True, append_images=[turned]),
        "animated WebP": saved(PICTURE, "WEBP", save_all=True, append_images=[turned], lossless=True),
        "WebP with alpha": saved(ALPHA, "WEBP", lossless=True, exact=True),
        "two-page TIFF": saved(PICTURE, "TIFF", save_all=True, append_images=[turned]),
        "CMYK JPEG without Adobe's marker": without_adobe(cmyk),
        "progressive JPEG": saved(PICTURE, "JPEG", progressive=True),
        "JPEG in RGB": saved(PICTURE, "JPEG", keep_rgb=True),
        "two-picture MPO": saved(PICTURE, "MPO", save_all=True, append_images=[turned]),
        "JPEG with broken EXIF": saved(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0"),
        **{f"turned {kind}": saved(PICTURE, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")},
        "interlaced 4-bit PNG": saved(PICTURE.quantize(16), "PNG", bits=4),
        "top-down BMP": saved(PICTURE, "BMP")[:22] + struct.pack("<i", -HEIGHT) + saved(PICTURE, "BMP")[26:],
        "plain PPM": b"P3 2 1 255 1 2 3 255 0 9".replace(b"2 1 255", b"%d %d 255" % (WIDTH, HEIGHT), 1)
        + b" 7" * (3 * WIDTH * HEIGHT - 6),
    }


@pytest.fixture(scope="module")
def files():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield kinds()


def read_or_refused(read):
    try:
        return read()
    except (ValueError, OSError):  # UserError is a ValueError
        return None


pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")


def as_read_from_a_folder(root, data: bytes, side: int) -> np.ndarray:
    """The centre of an image, by the code that fills batches."""
    (root / "a").mkdir(exist_ok=True)
    (root / "a" / "x.jpg").write_bytes(data)
    geometry = evaluation_geometry(DataConfig(name="x", image_size=side, eval_resize=side))
    out = np.empty((1, side, side, 3), np.uint8)
    BatchRenderer(FolderSource(root), geometry, 0)(np.array([0]), out, 0)
    return out[0]


def test_folders_and_write_agree(files, tmp_path):
    """The same pixels up to re-encoding, or refused by both; and by every way in which a folder is read."""
    wrong, refused = [], []
    for name, data in files.items():
        folder = read_or_refused(lambda data=data: decode(data, "x"))
        stored = read_or_refused(lambda data=data: encode(data, max_side=500, quality=95))
        if folder is None and stored is None:
            refused.append(name)
            continue
        if folder is None or stored is None or folder.shape != (stored.height, stored.width, 3):
            wrong.append(name)
            continue
        difference = np.abs(decode(stored.data, name).astype(int) - folder)
        side = min(folder.shape[:2])
        top, left = (folder.shape[0] - side) // 2, (folder.shape[1] - side) // 2
        batch = as_read_from_a_folder(tmp_path, data, side)
        same = np.array_equal(batch, folder[top : top + side, left : left + side])
        kept = stored.data == data and difference.max() == 0
        if not same or folder.dtype != np.uint8 or not (difference.mean() < 6 if stored.reencoded else kept):
            wrong.append(name)
    assert not wrong
    assert len(files) > 150 and len(refused) < len(files) / 4, refused
    assert not [name for name in refused if name.startswith(("L ", "RGB ", "RGBA ", "P ", "1 "))]


def test_the_pixels_are_pillows(files):
    """So that weights of others see what timm shows them; sixteen bits of grey are the exception."""
    wrong = []
    for name, data in files.items():
        ours = read_or_refused(lambda data=data: decode(data, "x"))
        if ours is None:
            continue
        with Image.open(io.BytesIO(data)) as image:
            wide = image.mode.startswith("I")
            want = (np.asarray(image).astype(int) >> 8)[..., None] if wide else np.asarray(image.convert("RGB"))
        if not np.array_equal(ours, np.broadcast_to(want, ours.shape)):
            wrong.append(name)
    assert not wrong


def test_sixteen_bits_of_grey_keep_their_picture(files):
    want = np.repeat((GREY16 >> 8).astype(np.uint8)[..., None], 3, 2)
    for name in ("uint16 () .png", "uint16 () .tiff", "uint16 () .pgm", "TIFF > uint16", "TIFF < uint16", "I;16 PNG"):
        assert np.array_equal(decode(files[name], name), want), name


def test_pixels_of_unknown_range_are_refused_in_a_sentence(files):
    for name in ("F TIFF", "TIFF < uint32", "float32 () .tiff"):
        with pytest.raises(UserError, match="cannot decode x: its pixels are .* of unknown range; store it with 8 or"):
            decode(files[name], "x")


def test_what_is_written_is_what_was_read(files, tmp_path):
    """The same over files: a .beton of all kinds has the pixels of the class folders that it was written from."""
    folder = tmp_path / "src" / "train" / "a"
    folder.mkdir(parents=True)
    for i, data in enumerate(files.values()):
        (folder / f"{i:03}.png").write_bytes(data)
    content = write_dataset(tmp_path / "src", tmp_path / "dst", skip_bad=True, progress=False, workers=1)["train"]
    kept = [i for i in range(len(files)) if f"a/{i:03}.png" not in content["skipped"]]
    source, file = FolderSource(tmp_path / "src" / "train"), BetonFile.open(tmp_path / "dst" / "train.beton")
    assert len(kept) == len(file) > 100
    for place, i in enumerate(kept):
        stored, original = decode(file.sample(place), "x"), source.read(i)
        assert stored.shape == original.shape and np.abs(stored.astype(int) - original).mean() < 8, list(files)[i]
