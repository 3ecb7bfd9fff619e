"""Pictures that cannot be read or not without a guess; one picture in the encodings of cameras and phones."""

from __future__ import annotations

import io
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from faults.preparations import link, save, write

CASES = Path(__file__).resolve().parent.parent / "cases"
_RNG = np.random.default_rng(0)
GREY = (_RNG.random((64, 64)) * 255).astype(np.uint8)
RGB = (_RNG.random((64, 64, 3)) * 255).astype(np.uint8)
FLOAT, INT32, TWELVE = GREY / np.float32(255), GREY.astype(np.int32) * 1000, GREY.astype(np.uint16) * 16
PAGES = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}


def encoded(image: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, bits: int, colour_type: int) -> bytes:
    """A PNG that says what it holds, and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    )


# Pictures that cannot be read, or not without a guess: (name, suffix, how it is made, what is said)
ODD = [
    ("a truncated PNG", ".png", partial(write, content=encoded(RGB, "PNG")[:-4000]), "cannot be read"),
    ("a truncated JPEG", ".jpg", partial(write, content=encoded(RGB, "JPEG")[:900]), "cannot be read"),
    ("a truncated WebP", ".webp", partial(write, content=encoded(RGB, "WEBP")[:900]), "cannot be read"),
    ("a truncated TIFF", ".tif", partial(write, content=encoded(RGB, "TIFF")[:900]), "cannot be read"),
    ("an empty file", ".png", partial(write, content=b""), "cannot be read"),
    ("a text file", ".jpg", partial(write, content="no picture"), "cannot be read"),
    ("PostScript called PNG", ".png", partial(write, content="%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot be"),
    ("a dangling link", ".png", partial(link, target="nowhere.png"), "link to a missing file"),
    ("a link to itself", ".png", partial(link, target="odd.png"), "cannot be"),
    ("floats", ".tif", partial(save, picture=FLOAT), "white_level"),
    ("floats with NaN", ".tif", partial(save, picture=FLOAT + np.float32([0, np.nan] * 32)), "finite"),
    ("32-bit integers", ".tif", partial(save, picture=INT32), "white_level"),
    ("numbers below 0", ".tif", partial(save, picture=FLOAT - 1), "below 0"),
    ("signed bytes", ".tif", partial(write, content=(CASES / "signed8.tif").read_bytes()), "below 0"),
    ("12 bits in 16", ".png", partial(save, picture=TWELVE), "white_level"),
    ("a TIFF of two pages", ".tif", partial(save, picture=RGB, **PAGES), "2 pages"),
    ("a GIF that moves", ".gif", partial(save, picture=RGB, **PAGES), "2 pages"),
    ("a WebP that moves", ".webp", partial(save, picture=RGB, **PAGES), "2 pages"),
    ("a PNG that moves", ".png", partial(save, picture=RGB, **PAGES), "2 pages"),
    ("a PNG of absurd size", ".png", partial(write, content=png_header(2**20, 2**20, 8, 2)), "read safely"),
    ("a PNG of few bytes", ".png", partial(write, content=png_header(12000, 12000, 16, 6)), "MB when"),
]


# fmt: off
def encodings(rgb: np.ndarray) -> list[tuple[str, bytes, np.ndarray | str]]:
    """A picture in many encodings, and some others.

    Args:
        rgb: (H, W, 3) uint8.

    Returns:
        File names, contents, and the RGB pictures that people see in them, or the words of the refusal; for
        encodings that lose something, what another reader decodes.
    """
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    alpha = np.full(grey.shape, 255, np.uint8)
    alpha[:40] = 0
    on_white = np.where(alpha[..., None] > 0, rgb, np.uint8(255))
    palette = np.array(Image.fromarray(rgb).quantize(64).convert("RGB"))
    with_alpha, deep_bgr = np.dstack([rgb, alpha]), rgb[..., ::-1].astype(np.uint16) * 257
    lossless, quarter_turns = {"lossless": True}, {3: 2, 6: 1, 8: 3}  # that undo an orientation
    listed = [
        *((f"lossless{suffix}", encoded(rgb, kind, **options), rgb) for suffix, kind, options in (
            (".png", "PNG", {"optimize": True}), (".bmp", "BMP", {}), (".ppm", "PPM", {}), (".tif", "TIFF", {}),
            (".tiff", "TIFF", {"compression": "tiff_lzw"}), (".webp", "WEBP", lossless), (".tga", "TGA", {}),
            (".jp2", "JPEG2000", {}))),
        *((f"turned{tag}{suffix}",
           encoded(np.rot90(rgb, quarter_turns[tag]), kind, exif=_turned(tag), **options), rgb)
          for tag, suffix, kind, options in (
              (6, ".png", "PNG", {}), (8, ".tif", "TIFF", {}), (3, ".webp", "WEBP", lossless))),
        ("palette.png", encoded(palette, "PNG"), palette), ("grey.png", encoded(grey, "PNG"), _as_rgb(grey)),
        ("16_bits.png", encoded(grey.astype(np.uint16) * 257, "PNG"), _as_rgb(grey)),
        *((f"16_bits_colour{suffix}", cv2.imencode(suffix, deep_bgr)[1].tobytes(), rgb)
          for suffix in (".png", ".tif")),
        ("opaque.png", encoded(np.dstack([rgb, alpha | 255]), "PNG"), rgb),
        ("transparent.png", encoded(with_alpha, "PNG"), on_white),
        ("transparent.webp", encoded(with_alpha, "WEBP", exact=True, **lossless), on_white),
        ("12_bits.png", encoded(grey.astype(np.uint16) * 16, "PNG"), "white_level"),
        ("float.tif", encoded(grey / np.float32(255), "TIFF"), "white_level"),
        ("two_pages.tif", encoded(rgb, "TIFF", **PAGES), "2 pages"),
        ("phone.heic", b"\x00\x00\x00\x18ftypheic", "not an image")]
    deep = np.asarray(Image.open(CASES / "black_is_zero_16.tif"), np.float64)
    for name, seen in (("rgb16-565.bmp", None), ("white_is_zero_8.tif", None),
                       ("white_is_zero_16.tif", _as_rgb((deep / 257 + 0.5).astype(np.uint8)))):
        if seen is None:
            seen = np.array(Image.open(CASES / name).convert("RGB"))
        listed.append((name, (CASES / name).read_bytes(), seen))
    for name, options in (("camera.jpg", {}), ("progressive.jpeg", {"progressive": True}),
                          ("phone.jpg", {"subsampling": 2}), ("turned.JPG", {"exif": _turned(6)})):
        content = encoded(np.rot90(rgb, 1) if "exif" in options else rgb, "JPEG", quality=92, **options)
        seen = np.array(Image.open(io.BytesIO(content)))
        listed.append((name, content, np.rot90(seen, -1) if "exif" in options else seen))
    return listed


def _as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, 2)


def _turned(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif
