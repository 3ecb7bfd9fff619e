"""Images as the method sees them: 8-bit RGB, resized with PIL's bilinear filter, aspect ratio not kept (METHOD.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def load_images(paths: Sequence[Path], size: int, description: str) -> torch.Tensor:
    """Read images into one (N, 3, size, size) uint8 tensor: held once, normalised when used."""
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for index, path in enumerate(tqdm(paths, desc=description, unit="image", leave=False)):
        images[index] = torch.from_numpy(read_rgb(path, size).transpose(2, 0, 1).copy())
    return images


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) RGB, uint8 or float in 0..255 -> float32 with the ImageNet mean and std taken off."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std


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
