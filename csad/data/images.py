"""Images as the method sees them: 8-bit RGB as a person sees them, resized with PIL's bilinear filter, aspect ratio not kept."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from csad.data.deep_pixels import deep_pixels, white_is_zero
from csad.data.image_files import Wording, bits_of, displayed_size, holds_lossy, opened, wording_of
from csad.errors import UserError
from csad.progress import ProgressBar

import numpy as np
from PIL import Image, ImageFile, ImageOps

from models.constants import OUTSIDE, SIZE

# What shows through transparent pixels: white, like paper or a web page.
TRANSPARENCY_BACKGROUND = (255, 255, 255)
ASPECT_TOLERANCE = 0.02  # relative difference of width / height that no one sees
_LARGEST_OF_12_BITS = 4095
_LOSSY_BLACK = 16  # of 255: what a lossy format makes of black is darker
_BLOCK_PIXELS = 1 << 20

_said: set[str] = set()


class UnknownWhiteLevel(UserError):
    """Nothing says which value is white.

    Attributes:
        finding: what the picture holds, without advice.
    """

    def __init__(self, finding: str, advice: str):
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


@dataclass(frozen=True)
class View:
    """How the pictures of a category are seen: the same way in every stage and by the exported model."""

    size: int = SIZE  # side in pixels, a multiple of 256 and of `tiles`
    white_level: float | None = None  # see `read_rgb`
    # (size, size) bool, what is inspected; the rest is grey, so that nothing in it can count. None:
    # everything.
    roi: np.ndarray | None = None
    tiles: int = 1  # the patch memory sees tiles x tiles of them

    def read(self, paths: Sequence[Path], description: str = "", size: int | None = None) -> np.ndarray:
        """(N, 3, size, size) uint8; with a progress bar where there is a description.

        Args:
            size: of the means over blocks, for a smaller view; the large ones are then not held together.
        """
        views = np.empty((len(paths), 3, size or self.size, size or self.size), np.uint8)
        bar = ProgressBar(paths, desc=description, unit="image", leave=False, disable=not description)
        for index, path in enumerate(bar):
            view = np.ascontiguousarray(read_rgb(path, self.size, self.white_level).transpose(2, 0, 1))
            if self.roi is not None:
                view[:, ~self.roi] = OUTSIDE
            views[index] = small_views(view[None], views.shape[-1])[0]
        return views

    def read_256(self, paths: Sequence[Path], description: str = "") -> np.ndarray:
        """(N, 3, 256, 256) uint8, what the paper's networks see."""
        return self.read(paths, description, SIZE)

    def read_native(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8, a picture at its own size; what lies outside the region of interest is grey here, too."""
        picture = read_rgb(path, None, self.white_level)
        if self.roi is not None:
            region = Image.fromarray(self.roi).resize(picture.shape[1::-1], Image.Resampling.NEAREST)
            picture[~np.array(region)] = OUTSIDE
        return picture

    def read_tile_sized(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, 3, size / tiles, size / tiles) uint8: the whole picture as large as one tile, for LGST on features."""
        return self.read(paths, size=self.size // self.tiles)

    @property
    def record(self) -> dict[str, object]:
        """What records and models say of it."""
        roi = None if self.roi is None else hashlib.sha256(self.roi.tobytes()).hexdigest()[:16]
        return {"size": self.size, "white_level": self.white_level, "roi": roi, "tiles": self.tiles}


def read_rgb(
    path: str | Path | BinaryIO, size: int | None = None, white_level: float | None = None
) -> np.ndarray:
    """Read any image as (H, W, 3) uint8 RGB, the right way up, transparent pixels on `TRANSPARENCY_BACKGROUND`.

    Args:
        path: or an open file, called in sentences what its str() gives.
        size: resize to (size, size), or keep the image as it is when None.
        white_level: the stored value that is white, in files of more than 8 bits; brighter ones are white, too. None: what the
            format declares, 65535 for 16 bits.

    Raises:
        UserError: the file is missing, no image, damaged, of several pages, or would need its white level to be guessed.
    """
    with opened(path) as image:
        pixels = as_rgb(image, path, white_level)
    return pixels if size is None else resize(pixels, size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8 as the networks see it."""
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def small_views(batch: np.ndarray, size: int = SIZE) -> np.ndarray:
    """(N, 3, S, S) uint8, S a multiple of size -> (N, 3, size, size) uint8: the mean of each block, halves
    rounded up, exactly; ValueError for another shape or type."""
    side = batch.shape[-1]
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-2] != side or side % size or not side:
        raise ValueError(
            f"expected (N, C, S, S) uint8 with S a multiple of {size}, got {batch.shape} {batch.dtype}"
        )
    factor = side // size
    if factor == 1:
        return batch
    # Integers, so that every machine and runtime gets the same bytes.
    total = np.zeros((*batch.shape[:2], size, size), np.uint32)
    for row in range(factor):
        for column in range(factor):
            total += batch[..., row::factor, column::factor]
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a label map or mask as (H, W) uint8, the right way up: 8-bit values as stored, of deeper ones those over 255 as 255.

    No pixel that is not zero is lost: of colours the brightest channel counts, of one bit the value is 255. A palette's indices
    are the values where its index 0 is black, as in label maps; otherwise its colours count. Lossy formats keep no
    values and leave traces around what was drawn: what is brighter than half of the brightest pixel, and than 16,
    becomes 255, the rest 0.

    Raises:
        UserError: the file is missing or unreadable.
    """
    with opened(path, Wording("mask", "delete it and make it again")) as image:
        lossy = holds_lossy(image, path)
        deep = deep_pixels(image, path)
        if deep is not None:
            values, _ = deep
            if white_is_zero(image):
                if image.mode == "F":
                    raise UserError(
                        f"mask {path} says that 0 is white, and not which value is black; store it as a PNG"
                    )
                values = 2 ** bits_of(image) - 1 - values.astype(np.int64)
        else:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "P":
                upright = upright.convert("RGBA") if any((upright.getpalette() or [])[:3]) else upright
            elif upright.mode == "1":
                upright = upright.convert("L")
            elif upright.mode != "L":
                upright = upright.convert("RGBA")
            values = np.array(upright)
        values = values if values.ndim == 2 else _brightest(values)
    if lossy:
        return np.where(values > max(values.max() / 2, _LOSSY_BLACK), 255, 0).astype(np.uint8)
    return np.clip(np.ceil(values), 0, 255).astype(np.uint8)


def as_rgb(
    image: ImageFile.ImageFile, path: str | Path | BinaryIO, white_level: float | None = None
) -> np.ndarray:
    """The pixels of an `opened` image as `read_rgb` returns them."""
    if white_level is not None and not 0 < white_level < math.inf:
        raise UserError(f"--images.white_level is {white_level}; it must be a number above 0")
    deep = deep_pixels(image, path)
    if deep is None:
        ImageOps.exif_transpose(image, in_place=True)  # without a copy where it lies right already
        return _on_background(image, path)
    values, declared = deep
    clear = values[..., 3:] if values.ndim == 3 and values.shape[2] == 4 else None
    colours = values if clear is None else values[..., :3]
    white = white_level or declared
    if white is None or (white_level is None and white == 65535 and colours.max() <= _LARGEST_OF_12_BITS):
        held = f"values from {colours.min():g} to {colours.max():g}"
        raise UnknownWhiteLevel(
            f"{wording_of(path).what} {path} holds {held} and nothing in it says which value is white",
            "set --images.white_level for the whole data set (1 for 0..1, 1023 for 10 bits, "
            "4095 for 12, 65535 for all 16)",
        )
    key = image.info.get("transparency")  # one value or colour that is transparent
    inverted = white_is_zero(image)
    result = np.empty((*values.shape[:2], 3), np.uint8)
    for rows in _row_blocks(*values.shape[:2]):
        brightness = np.clip(colours[rows] / white, 0, 1)
        eight_bit = np.atleast_3d(np.floor((1 - brightness if inverted else brightness) * 255 + 0.5))
        opacity: np.ndarray | None = None if clear is None else clear[rows] / 65535
        if key is not None and clear is None:
            opacity = np.any(np.atleast_3d(colours[rows] != np.asarray(key)), axis=2, keepdims=True)
        if opacity is not None and opacity.min() < 1:
            _say_transparent(path)
            background = np.array(TRANSPARENCY_BACKGROUND) * (1 - opacity)
            eight_bit = np.floor(eight_bit * opacity + background + 0.5)
        result[rows] = eight_bit
    return result


def _on_background(image: Image.Image, path: str | Path | BinaryIO) -> np.ndarray:
    """An 8-bit image of any mode as (H, W, 3) uint8."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.array(image)
    result = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _row_blocks(image.height, image.width):
        block = image.crop((0, rows.start, image.width, rows.stop))
        if block.has_transparency_data:
            layered = block.convert("RGBA")
            if is_see_through(layered):
                _say_transparent(path)
                block = Image.new("RGBA", layered.size, (*TRANSPARENCY_BACKGROUND, 255))
                block.alpha_composite(layered)
        result[rows] = np.asarray(block.convert("RGB"))
    return result


def is_see_through(layered: Image.Image) -> bool:
    """Whether any pixel of an RGBA image is not opaque."""
    return any(layered.getchannel("A").histogram()[:255])


def _row_blocks(height: int, width: int) -> Iterator[slice]:
    """Blocks of rows of about `_BLOCK_PIXELS` each, so that conversions take little memory at a time."""
    rows = max(1, _BLOCK_PIXELS // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _brightest(channels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W) of that type: the brightest colour channel, 0 where a fourth says transparent."""
    brightest = channels[..., :3].max(2)
    if channels.shape[2] < 4:
        return brightest
    return np.where(channels[..., 3] > 0, brightest, 0).astype(brightest.dtype)


def _say_transparent(path: str | Path | BinaryIO) -> None:
    if "transparent" not in _said:
        _said.add("transparent")
        sentence = f"transparent pixels are seen as white ({path} is the first picture that has some)"
        ProgressBar.write(sentence, file=sys.stderr)


def is_grey(image: np.ndarray) -> bool:
    """Whether an image (H, W, 3) has no colours, looked at in at most 512 x 512 of its pixels."""
    few = image[:: max(1, image.shape[0] // 512), :: max(1, image.shape[1] // 512)]
    return bool((few == few[..., :1]).all())


def usual_picture(paths: Sequence[Path], white_level: float | None) -> dict[str, Any]:
    """Size (width, height) that most pictures have, and whether those that were looked at are grey: a few, spread evenly."""
    sizes = Counter(displayed_size(path) for path in paths)
    sample = [paths[index] for index in sorted({0, len(paths) // 3, 2 * len(paths) // 3, len(paths) - 1})]
    return {
        "size": list(sizes.most_common(1)[0][0]),
        "grey": all(is_grey(read_rgb(path, white_level=white_level)) for path in sample),
    }
