"""Pictures that cannot be read or not without a guess, and one picture in the encodings that cameras and phones write."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks.fault_preparations import link, picture, write

_RNG = np.random.default_rng(0)
GREY = (_RNG.random((64, 64)) * 255).astype(np.uint8)
RGB = (_RNG.random((64, 64, 3)) * 255).astype(np.uint8)
FLOAT, INT32, TWELVE = GREY / np.float32(255), GREY.astype(np.int32) * 1000, GREY.astype(np.uint16) * 16
PAGES = {"save_all": True, "append_images": [Image.fromarray(255 - RGB)]}


def encoded(image: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


# Pictures that cannot be read, or not without a guess: (name, suffix, how it is made, what is said)
ODD = [
    ("a truncated PNG", ".png", partial(write, content=encoded(RGB, "PNG")[:-4000]), "cannot be read"),
    ("a truncated JPEG", ".jpg", partial(write, content=encoded(RGB, "JPEG")[:900]), "cannot be read"),
    ("a truncated WebP", ".webp", partial(write, content=encoded(RGB, "WEBP")[:900]), "cannot be read"),
    ("a truncated TIFF", ".tif", partial(write, content=encoded(RGB, "TIFF")[:900]), "cannot be read"),
    ("an empty file", ".png", partial(write, content=b""), "cannot be read"),
    ("a text file", ".jpg", partial(write, content="no picture"), "cannot be read"),
    ("PostScript called PNG", ".png", partial(write, content="%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "cannot be"),
    ("a dangling link", ".png", partial(link, target="nowhere.png"), "link to a file that is not there"),
    ("a link to itself", ".png", partial(link, target="odd.png"), "cannot be"),
    ("floats", ".tif", partial(picture, image=FLOAT), "white_level"),
    ("floats with NaN", ".tif", partial(picture, image=np.where(GREY > 9, FLOAT, np.float32(np.nan))), "finite"),
    ("32-bit integers", ".tif", partial(picture, image=INT32), "white_level"),
    ("numbers below 0", ".tif", partial(picture, image=FLOAT - 1), "below 0"),
    ("12 bits in 16", ".png", partial(picture, image=TWELVE), "white_level"),
    ("a TIFF of two pages", ".tif", partial(picture, image=RGB, **PAGES), "2 pages"),
    ("a GIF that moves", ".gif", partial(picture, image=RGB, **PAGES), "2 pages"),
    ("a WebP that moves", ".webp", partial(picture, image=RGB, **PAGES), "2 pages"),
    ("a PNG that moves", ".png", partial(picture, image=RGB, **PAGES), "2 pages"),
    ("a PNG of absurd size", ".png", partial(write, content=encoded(RGB, "PNG").replace(
        b"IHDR\x00\x00\x00\x40\x00\x00\x00\x40", b"IHDR\x00\x0f\xff\xff\x00\x0f\xff\xff")), "image"),
]

# One picture in the encodings that cameras and phones write: (file name, its content, what people see in it, or the words that
# a refusal has to hold).

def _turned(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def encodings(picture_: np.ndarray) -> list[tuple[str, bytes, np.ndarray | str]]:
    """Of an RGB picture (H, W, 3) uint8; those that lose something are compared with what another reader decodes."""
    grey = cv2.cvtColor(picture_, cv2.COLOR_RGB2GRAY)
    three = np.repeat(grey[..., None], 3, 2)
    clear = np.full(grey.shape, 255, np.uint8)
    clear[:40] = 0
    on_white = np.where(clear[..., None] > 0, picture_, np.uint8(255))
    few = np.array(Image.fromarray(picture_).quantize(64).convert("RGB"))
    with_alpha = np.dstack([picture_, clear])
    back = {3: 2, 6: 1, 8: 3}  # quarter turns that undo an orientation
    found = [
        *((f"lossless{suffix}", encoded(picture_, kind, **options), picture_) for suffix, kind, options in (
            (".png", "PNG", {"optimize": True}), (".bmp", "BMP", {}), (".tif", "TIFF", {}), (".tiff", "TIFF", {
                "compression": "tiff_lzw"}), (".webp", "WEBP", {"lossless": True}), (".jp2", "JPEG2000", {}), (".ppm", "PPM", {}),
            (".tga", "TGA", {}))),
        *((f"turned{tag}{suffix}", encoded(np.rot90(picture_, back[tag]), kind, exif=_turned(tag), **options), picture_)
          for tag, suffix, kind, options in ((6, ".png", "PNG", {}), (8, ".tif", "TIFF", {}), (3, ".webp", "WEBP", {
              "lossless": True}))),
        ("palette.png", encoded(few, "PNG"), few), ("grey.png", encoded(grey, "PNG"), three),
        ("16_bits.png", encoded(grey.astype(np.uint16) * 257, "PNG"), three),
        ("16_bits_colour.png", cv2.imencode(".png", picture_[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), picture_),
        ("16_bits_colour.tif", cv2.imencode(".tif", picture_[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), picture_),
        ("opaque.png", encoded(np.dstack([picture_, clear | 255]), "PNG"), picture_),
        ("transparent.png", encoded(with_alpha, "PNG"), on_white),
        ("transparent.webp", encoded(with_alpha, "WEBP", lossless=True, exact=True), on_white),
        ("12_bits.png", encoded(grey.astype(np.uint16) * 16, "PNG"), "white_level"),
        ("float.tif", encoded(grey / np.float32(255), "TIFF"), "white_level"),
        ("two_pages.tif", encoded(picture_, "TIFF", save_all=True, append_images=[Image.fromarray(few)]), "2 pages"),
        ("phone.heic", b"\x00\x00\x00\x18ftypheic", "no images")]
    for name, options in (("camera.jpg", {}), ("progressive.jpeg", {"progressive": True}), ("phone.jpg", {"subsampling": 2}),
                          ("turned.JPG", {"exif": _turned(6)})):
        content = encoded(np.rot90(picture_, 1) if "exif" in options else picture_, "JPEG", quality=92, **options)
        seen = np.array(Image.open(io.BytesIO(content)))
        found.append((name, content, np.rot90(seen, -1) if "exif" in options else seen))
    return found
