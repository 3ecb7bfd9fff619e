"""Pictures for people: heat maps and components over an image, outlines of the truth, thumbnails as data URIs."""

from __future__ import annotations

import base64
import io

import cv2
import numpy as np
from PIL import Image

from data.images import colour_labels

FULL_HEAT = 0.3  # anomaly-map value shown at full strength; one normal pixel in two hundred exceeds 0.1 (METHOD.md section 3)
_OPACITY = 0.65


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8, made smaller until its longer side is at most ``side``; aspect ratio kept."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    return cv2.resize(image, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)


def heat_overlay(image: np.ndarray, anomaly_map: np.ndarray) -> np.ndarray:
    """Colour an image (H, W, 3) uint8 by its anomaly map (h, w): nothing at 0 and below, dark red at `FULL_HEAT` and over."""
    heat = _enlarge(np.clip(anomaly_map / FULL_HEAT, 0, 1).astype(np.float32), image, cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    opacity = (_OPACITY * np.minimum(heat * 2, 1))[..., None]
    return (grey * (1 - opacity) + colours * opacity).astype(np.uint8)


def label_overlay(image: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Paint the components of a label map (h, w) uint8 over an image (H, W, 3) uint8; background stays as it is."""
    labels = _enlarge(label_map, image, cv2.INTER_NEAREST_EXACT)
    painted = cv2.addWeighted(image, 0.3, colour_labels(labels), 0.7, 0)
    return np.where((labels > 0)[..., None], painted, image // 2 + 32)


def outline(image: np.ndarray, *truth: np.ndarray) -> np.ndarray:
    """Draw the border of annotated regions, (h, w) bool of any size each, around all of them in an image (H, W, 3) uint8."""
    mask = np.max([_enlarge(region.astype(np.uint8), image, cv2.INTER_NEAREST_EXACT) for region in truth], axis=0)
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn = image.copy()
    cv2.drawContours(drawn, contours, -1, (255, 0, 200), max(1, round(max(image.shape) / 160)))
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


def _enlarge(values: np.ndarray, image: np.ndarray, interpolation: int) -> np.ndarray:
    return cv2.resize(values, image.shape[1::-1], interpolation=interpolation)
