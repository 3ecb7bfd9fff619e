"""What tells one component from another: the component features of docs/method.md section 1.

A component is a mask (H, W) in an RGB image (H, W, 3) uint8 of the same size; any non-zero pixel is inside. These
are the shallow features, of NumPy and OpenCV alone; the deep one, ``cnn_image``, is in `crop_embedding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import cv2
import numpy as np

CROP = 65  # side of the aligned crop
# Values of each feature but cnn_image.
SHALLOW = {"area": 1, "color": 1, "position": 2, "shape_hu": 7, "lab": 3}


def area(mask: np.ndarray) -> np.ndarray:
    """Fraction of the image that the mask covers, (1,)."""
    return np.array([np.count_nonzero(mask) / mask.size])


def color(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the mask of the per-pixel (b / a)^2 in 8-bit Lab, (1,)."""
    image, mask = _around(image, mask)
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[mask != 0].astype(np.float64)
    return np.array([np.mean((lab[:, 2] / np.maximum(lab[:, 1], 1)) ** 2)])


def lab(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean colour over the mask in CIE Lab with L in 0..100, (3,). Not in the paper."""
    image, mask = _around(image, mask)
    colours = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return colours[mask != 0].mean(0).astype(np.float64)


def position(mask: np.ndarray) -> np.ndarray:
    """Centre of the bounding box as fractions of width and height, (2,): x, y."""
    x, y, width, height = cv2.boundingRect((mask != 0).astype(np.uint8))
    return np.array([(x + width / 2) / mask.shape[1], (y + height / 2) / mask.shape[0]])


def aligned_crop(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a component out and scale it so that it fits into 65x65 pixels at any rotation.

    The crop's mask is the component's largest contour, filled: holes and crumbs vanish from it, not from the image.

    Returns:
        The mask, (65, 65) uint8, 0 or 255, and the image, (65, 65, 3) uint8, black outside the component.
    """
    inside = (mask != 0).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    contour = max(contours, key=cv2.contourArea)
    filled = cv2.drawContours(np.zeros_like(inside), [contour], -1, 255, cv2.FILLED)
    scale = CROP / (math.hypot(*cv2.minAreaRect(contour)[1]) + 1)
    x, y, width, height = cv2.boundingRect(contour)
    # A sliver keeps one pixel of thickness.
    size = max(int(width * scale), 1), max(int(height * scale), 1)
    left, top = (math.ceil((CROP - side) / 2) for side in size)

    def place(source: np.ndarray) -> np.ndarray:
        canvas = np.zeros((CROP, CROP, *source.shape[2:]), np.uint8)
        scaled = cv2.resize(source, size, interpolation=cv2.INTER_LINEAR)
        canvas[top : top + size[1], left : left + size[0]] = scaled
        return canvas

    box = slice(y, y + height), slice(x, x + width)
    aligned_mask = np.where(place(filled[box]) > 128, 255, 0).astype(np.uint8)
    return aligned_mask, place(image[box] * inside[box][..., None])


def shape_hu(aligned_mask: np.ndarray) -> np.ndarray:
    """Hu moments of the aligned mask's grey values on a signed logarithmic scale, (7,)."""
    moments = cv2.HuMoments(cv2.moments(aligned_mask))[:, 0]
    nonzero = moments != 0
    return -np.sign(moments) * np.log10(np.abs(moments), where=nonzero, out=np.zeros(7))


def shallow_features(
    image: np.ndarray, masks: Iterable[np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every feature but cnn_image for the components of one image.

    Args:
        image: (H, W, 3) uint8 RGB.
        masks: N of them, (H, W) each, processed one after the other.

    Returns:
        {"area": (N, 1), "color": (N, 1), "position": (N, 2), "shape_hu": (N, 7), "lab": (N, 3)} float64,
        and the aligned image crops (N, 65, 65, 3) uint8 for `crop_embedding.CropEmbedding`.
    """
    rows, crops = [], []
    for mask in masks:
        aligned, crop = aligned_crop(image, mask)
        crops.append(crop)
        shape = shape_hu(aligned)
        rows.append([area(mask), color(image, mask), position(mask), shape, lab(image, mask)])
    columns = zip(*rows) if rows else [()] * len(SHALLOW)
    features = {
        name: np.array(values, np.float64).reshape(-1, size)
        for (name, size), values in zip(SHALLOW.items(), columns)
    }
    return features, np.array(crops, np.uint8).reshape(-1, CROP, CROP, 3)


def _around(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both cut to the mask's bounding box: a native picture has millions of pixels and hundreds of components."""
    x, y, width, height = cv2.boundingRect((mask != 0).astype(np.uint8))
    box = slice(y, y + height), slice(x, x + width)
    return image[box], mask[box]
