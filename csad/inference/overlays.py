"""Pictures for people: heat maps and components over an image, outlines of the truth, thumbnails as data URIs. No OpenCV."""

from __future__ import annotations

import base64
import io

from csad.data.images import colour_labels

import numpy as np
from PIL import Image, ImageFilter

FULL_HEAT = 3.0  # scaled anomaly-map value shown at full strength; of the validation maps' values 0.5 % lie over 1
_OPACITY = 0.65
# From blue over green and yellow to dark red, as maps of this kind usually are.
_HEAT = np.array([[48, 18, 59], [70, 117, 237], [27, 207, 212], [97, 252, 108], [209, 232, 52], [254, 155, 45], [217, 56, 6],
                  [122, 4, 2]], np.float32)
_OUTLINE = (255, 0, 200)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8, made smaller until its longer side is at most ``side``; aspect ratio kept."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def heat_overlay(image: np.ndarray, anomaly_map: np.ndarray) -> np.ndarray:
    """Colour an image (H, W, 3) uint8 by its scaled anomaly map (h, w): nothing at 0 and below, dark red at `FULL_HEAT`."""
    heat = _enlarge(np.clip(anomaly_map / FULL_HEAT, 0, 1).astype(np.float32), image, Image.Resampling.BILINEAR)
    position = heat * (len(_HEAT) - 1)
    colours = np.stack([np.interp(position, np.arange(len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    opacity = (_OPACITY * np.minimum(heat * 2, 1))[..., None]
    return (grey * (1 - opacity) + colours * opacity).astype(np.uint8)


def label_overlay(image: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Paint the components of a label map (h, w) uint8 over an image (H, W, 3) uint8; background stays as it is."""
    labels = _enlarge(label_map, image, Image.Resampling.NEAREST)
    painted = (0.3 * image + 0.7 * colour_labels(labels)).astype(np.uint8)
    return np.where((labels > 0)[..., None], painted, image // 2 + 32)


def outline(image: np.ndarray, *truth: np.ndarray) -> np.ndarray:
    """Draw the border of annotated regions, (h, w) bool of any size each, around all of them in an image (H, W, 3) uint8."""
    mask = np.max([_enlarge(region.astype(np.uint8) * 255, image, Image.Resampling.NEAREST) for region in truth], axis=0)
    thickness = 2 * max(1, round(max(image.shape) / 200)) + 1
    grown, shrunk = (np.asarray(Image.fromarray(mask).filter(kind(thickness)))
                     for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    drawn = image.copy()
    drawn[grown != shrunk] = _OUTLINE
    return drawn


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """Pictures of one size (H, W, 3) uint8 in a row, a little white between them."""
    height = pictures[0].shape[0]
    gap = np.full((height, max(4, height // 64), 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def data_uri(image: np.ndarray, quality: int) -> str:
    """An image (H, W, 3) uint8 as WebP inside an address that needs no file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _enlarge(values: np.ndarray, image: np.ndarray, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(image.shape[1::-1], how))
