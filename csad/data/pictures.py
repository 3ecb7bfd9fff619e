"""Image files of a data set: what their headers say, thumbnails, and which of them are copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csad.data import image_files, images, records
from csad.errors import UserError

import imagehash
import numpy as np
from PIL import Image, ImageFile

THUMBNAIL = 96
# Near copies: recompressed or resized ones differ in up to 36 of 256 bits, but by less than a grey level; different good pictures
# of one kind by 4 grey levels and more (measured on the rendered categories and on real parts).
HASH_SIDE, HASH_DISTANCE, MEAN_DIFFERENCE, LOCAL_DIFFERENCE = 16, 40, 1.5, 10


@dataclass(frozen=True)
class ImageInfo:
    """What is known of one image file."""

    path: Path
    split: str  # train, validation or test
    problem: str | None = None  # a sentence, where it cannot be read; nothing below holds then
    size: tuple[int, int] = (0, 0)  # (W, H), the right way up
    format: str = ""
    bits: int = 8
    colour: bool = True
    turned: bool = False  # by an EXIF orientation
    transparent: bool = False
    values: tuple[int, int] = (0, 255)  # darkest and brightest, in 8 bits
    digest: str = ""
    thumbnail: np.ndarray | None = None  # (THUMBNAIL, THUMBNAIL, 3) uint8
    hash: np.ndarray | None = None  # (HASH_SIDE**2,) bool, which recompression and resizing hardly change

    @property
    def stored(self) -> str:
        return f"{self.bits}-bit {'colour' if self.colour else 'grey'}"


def examine(path: Path, split: str, white_level: float | None) -> ImageInfo:
    """Read an image as the stages do, JPEG at a reduced size."""
    try:
        with image_files.opened(path) as image:
            fields = header_fields(image)
            if image.format == "JPEG":
                image.draft(image.mode, (2 * THUMBNAIL, 2 * THUMBNAIL))
            layered = image.has_transparency_data
            pixels = images.as_rgb(image, path, white_level)
            transparent = layered and fields["bits"] == 8 and image.convert("RGBA").getextrema()[-1][0] < 255
        thumbnail = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return ImageInfo(
            path,
            split,
            **fields,
            transparent=transparent,
            values=(int(pixels.min()), int(pixels.max())),
            digest=records.digest(path),
            thumbnail=np.asarray(thumbnail),
            hash=imagehash.phash(thumbnail, hash_size=HASH_SIDE).hash.ravel(),
        )
    except UserError as problem:
        return ImageInfo(path, split, str(problem))


def header_fields(image: ImageFile.ImageFile) -> dict[str, Any]:
    """What `ImageInfo` notes of an image whose pixels are not read yet."""
    raw_mode = image_files.raw_mode_of(image)
    deep = ";16" in image.mode + raw_mode and raw_mode not in image_files.PACKED
    bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if deep else 8)
    # A PNG's orientation may come after its pixels; that rare one is still turned, but not counted here.
    has_orientation = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(image_files.ORIENTATION_TAG, 1) if has_orientation else 1
    across = orientation in (5, 6, 7, 8) and image.format != "TIFF"
    return {
        "size": image.size[::-1] if across else image.size,
        "format": "JPEG" if image.format == "MPO" else image.format,
        "bits": bits,
        "colour": image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"),
        "turned": orientation in range(2, 9),
    }


def near_copies(pictures: Sequence[ImageInfo]) -> list[tuple[ImageInfo, ImageInfo]]:
    """Pairs that look the same: hashes nearly alike, and no part of the thumbnails differs once brightness is taken off."""
    hashed = [
        (picture, picture.hash, picture.thumbnail)
        for picture in pictures
        if picture.hash is not None and picture.thumbnail is not None
    ]
    if len(hashed) < 2:
        return []
    signs = np.stack([bits for _, bits, _ in hashed]).astype(np.float32) * 2 - 1
    grey = [Image.fromarray(thumbnail).convert("L") for *_, thumbnail in hashed]
    small = np.stack([np.asarray(thumbnail, np.int16) for thumbnail in grey])
    small = small - small.mean((1, 2), keepdims=True, dtype=np.float32).round().astype(np.int16)
    copies = []
    # Rows at a time: memory grows with the number of images, not with its square.
    for start in range(0, len(hashed), 500):
        distances = (signs.shape[1] - signs[start : start + 500] @ signs.T) / 2
        for row, column in zip(*np.nonzero(distances <= HASH_DISTANCE)):
            first = start + row
            if first < column:
                difference = np.abs(small[first] - small[column])
                if difference.mean() <= MEAN_DIFFERENCE and np.percentile(difference, 99) <= LOCAL_DIFFERENCE:
                    copies.append((hashed[first][0], hashed[column][0]))
    return copies
