"""Images as the method sees them: 8-bit RGB, resized with PIL's bilinear filter, aspect ratio not kept (METHOD.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from errors import UserError

SIZE = 256  # every network of the paper sees 256x256
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageSettings(Protocol):
    """How pictures are read (settings.ImageSettings)."""

    size: int
    white_level: float | None


def read_rgb(path: str | Path, size: int | None = None) -> np.ndarray:
    """Read any 8- or 16-bit grey, palette, RGB or RGBA image as (H, W, 3) uint8 RGB; alpha is dropped.

    Args:
        size: resize to (size, size), or keep the image as it is when None.

    Raises:
        UserError: the file is missing, no image, or truncated.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError as problem:
        raise UserError(f"image {path} is missing") from problem
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise UserError(f"image {path} cannot be read ({problem}); replace it or take it out of the folder") from problem
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips 16-bit grey to 255 when it converts; scale it instead.
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / max(values.max(), 1) * 255 if values.max() > 65535 else values / 257)
                                .round().astype(np.uint8))
    pixels = np.asarray(image.convert("RGB"))
    return pixels if size is None else resize(pixels, size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8 as the networks see it."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def read_mask(path: str | Path) -> np.ndarray:
    """Read an 8-bit label map or mask as (H, W) uint8, values as stored.

    Raises:
        UserError: the file is missing, unreadable, or has more than one channel.
    """
    try:
        with Image.open(path) as image:
            mask = np.asarray(image)
    except FileNotFoundError as problem:
        raise UserError(f"mask {path} is missing") from problem
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as problem:
        raise UserError(f"mask {path} cannot be read ({problem}); delete it and make it again") from problem
    if mask.ndim != 2:
        raise UserError(f"mask {path} has {mask.ndim} dimensions, expected an 8-bit single-channel image")
    return mask.astype(np.uint8)


def small_views(images: np.ndarray) -> np.ndarray:
    """(N, 3, S, S) uint8 -> (N, 3, 256, 256) uint8: means over blocks, rounded half up."""
    factor = images.shape[-1] // SIZE
    if factor == 1:
        return images
    sums = images.reshape(len(images), 3, SIZE, factor, SIZE, factor).sum((3, 5), dtype=np.uint32)
    return ((sums + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def read_views(paths: Sequence[Path], size: int, description: str, white_level: float | None = None) -> np.ndarray:
    images = np.empty((len(paths), 3, size, size), np.uint8)
    for index, path in enumerate(tqdm(paths, desc=description, unit="image", leave=False, disable=not description)):
        images[index] = read_rgb(path, size).transpose(2, 0, 1)
    return images


def read_small_views(paths: Sequence[Path], description: str, settings: ImageSettings) -> np.ndarray:
    """Read images at `settings.size`, and keep of each the 256 view alone: (N, 3, 256, 256) uint8."""
    images = np.empty((len(paths), 3, SIZE, SIZE), np.uint8)
    for index, path in enumerate(tqdm(paths, desc=description, unit="image", leave=False, disable=not description)):
        large = read_rgb(path, settings.size).transpose(2, 0, 1)
        images[index] = small_views(large[None])[0]
    return images


def colour_labels(labels: np.ndarray) -> np.ndarray:
    """Paint a label map (H, W) uint8 with one well-separated colour per index, (H, W, 3) uint8; 0 stays black."""
    return _PALETTE[labels]


def _make_palette() -> np.ndarray:
    # Steps of the golden ratio around the hue circle keep neighbouring indices apart.
    indices = np.arange(256)
    hsv = np.stack([(indices * 0.618034) % 1.0 * 179, np.full(256, 190) - indices % 3 * 40,
                    np.full(256, 255) - indices % 4 * 30], axis=1).astype(np.uint8)
    rgb = np.asarray(Image.fromarray(np.stack([hsv[:, 0] / 179 * 255, hsv[:, 1], hsv[:, 2]], 1)
                                     .astype(np.uint8)[None], mode="HSV").convert("RGB"))[0].copy()
    rgb[0] = 0
    return rgb


_PALETTE = _make_palette()
