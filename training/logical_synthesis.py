"""Logical synthesis, LSA: training images whose components are out of order (paper section 3.2, docs/METHOD.md section 2).

One or two of an image's own components are copied, rotated, and pasted elsewhere in it together with their labels. The
segmentor so learns components by their looks and not by their places.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

MOST_PASTES = 2
BORDER = 0.1  # of the side: a pasted component's centre keeps this far from the border
MOST_BACKGROUND = 0.5  # a component more than this share of which would lie on background is not placed there
SMALLEST_COMPONENT = 50  # pixels; smaller crumbs are not worth pasting
PLACEMENT_TRIALS = 10


@dataclass(frozen=True)
class Component:
    """One connected part of a label map.

    Attributes:
        mask: (H, W) bool, holes filled where asked for.
        labels: (H, W) uint8, what the mask's pixels are labelled when pasted.
        centre: (x, y) of its bounding box, in pixels.
    """

    mask: np.ndarray
    labels: np.ndarray
    centre: tuple[float, float]


def find_components(labels: np.ndarray, fill_holes: bool) -> list[Component]:
    """The 4-connected parts of every label but 0 with more than 50 pixels, in label order.

    Args:
        labels: (H, W) uint8.
        fill_holes: a component takes what lies in its holes along: other components with their labels, background
            as part of itself.
    """
    found = []
    for label in np.unique(labels[labels > 0]):
        count, parts, boxes, _ = cv2.connectedComponentsWithStats((labels == label).astype(np.uint8), connectivity=4)
        for part in range(1, count):
            x, y, width, height, area = boxes[part]
            if area <= SMALLEST_COMPONENT:
                continue
            mask, own = parts == part, labels
            if fill_holes:
                mask = _filled(mask)
                own = np.where(mask & (labels == 0), label, labels)
            found.append(Component(mask, own, (x + (width - 1) / 2, y + (height - 1) / 2)))
    return found


def synthesise(image: np.ndarray, labels: np.ndarray, background: np.ndarray, rng: np.random.Generator,
               distance: float, fill_holes: bool) -> tuple[np.ndarray, np.ndarray]:
    """Paste one or two of an image's own components elsewhere in it.

    A component for which no place is found in ten trials is left out, so the result may equal the input.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8.
        background: (H, W) bool, where components would hang in the air.
        distance: least move of a component's centre, in image sides.
        fill_holes: see `find_components`.

    Returns:
        New image and label map; the arguments are not changed.
    """
    image, pasted_labels = image.copy(), labels.copy()
    components = find_components(labels, fill_holes)
    if not components:
        return image, pasted_labels
    source = image.copy()
    for _ in range(rng.integers(1, MOST_PASTES + 1)):
        component = components[rng.integers(len(components))]
        movement = find_place(component, background, rng, distance)
        if movement is None:
            continue
        mask = warp(component.mask.astype(np.uint8), movement, cv2.INTER_NEAREST) > 0
        image[mask] = warp(source, movement, cv2.INTER_LINEAR)[mask]
        pasted_labels[mask] = warp(component.labels, movement, cv2.INTER_NEAREST)[mask]
    return image, pasted_labels


def find_place(component: Component, background: np.ndarray, rng: np.random.Generator,
               distance: float) -> np.ndarray | None:
    """Draw rotations and places until one is far enough from the original and not mostly on background.

    Returns:
        The (2, 3) affine matrix of the movement, or None when all trials failed.
    """
    height, width = component.mask.shape
    for _ in range(PLACEMENT_TRIALS):
        angle = rng.uniform(0, 360)
        x, y = rng.uniform(BORDER, 1 - BORDER, 2) * (width, height)
        moved = np.hypot((x - component.centre[0]) / width, (y - component.centre[1]) / height)
        if moved < distance:
            continue
        movement = cv2.getRotationMatrix2D(component.centre, angle, 1.0)
        movement[:, 2] += (x - component.centre[0], y - component.centre[1])
        mask = warp(component.mask.astype(np.uint8), movement, cv2.INTER_NEAREST) > 0
        if mask.any() and background[mask].mean() <= MOST_BACKGROUND:
            return movement
    return None


def warp(picture: np.ndarray, movement: np.ndarray, interpolation: int) -> np.ndarray:
    """Move a picture within its frame; what comes in from outside is 0. Labels need cv2.INTER_NEAREST."""
    return cv2.warpAffine(picture, movement, picture.shape[1::-1], flags=interpolation)


def _filled(mask: np.ndarray) -> np.ndarray:
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), outlines, -1, 1, cv2.FILLED) > 0
