"""Logical synthesis, LSA: training images whose components are out of order (paper section 3.2).

One or two of an image's own components are copied, rotated, and pasted elsewhere in it together with their
labels (docs/method.md section 2). The segmentor so learns components by their looks and not by their positions.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

MAX_BACKGROUND = (
    0.5,
    0.9,
)  # of the first and the second paste, less than this fraction may lie on background
BORDER = 0.1  # of the side: a pasted component's centre keeps this far from the border
MIN_LABELLED = 0.9  # of a component to be pasted
MAX_UNLABELLED = 100  # pixels of a component to be pasted
MIN_PART = 50  # pixels; smaller crumbs of a label are no components
REMOVED_PART = 0.002  # of the image
TRIALS = 500  # rotations and positions that are tried for a component, as published
CANDIDATES = 2000  # random positions that those of the trials are drawn from


class Synthesis(NamedTuple):
    """An image with components too many."""

    image: np.ndarray  # (H, W, 3) uint8
    labels: np.ndarray  # (H, W) uint8
    pasted: int  # how many components, 0 to 2


class Placement(NamedTuple):
    """Where a component goes."""

    movement: np.ndarray  # (2, 3) affine matrix from the picture to the window
    window: tuple[slice, slice]  # rows and columns of the picture that the component lies within
    mask: np.ndarray  # (h, w) bool, the component in the window


def synthesise(
    image: np.ndarray,
    labels: np.ndarray,
    instances: np.ndarray,
    background: np.ndarray,
    rng: np.random.Generator,
    distance: float,
    trials: int = TRIALS,
) -> Synthesis:
    """Paste one or two of an image's own components elsewhere in it.

    Components are tried in random order until one has been pasted; then one more is tried. One that finds no
    position is left out, so nothing may have been pasted.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) uint8, 0 for no label.
        instances: (H, W) integers, the components to paste from, 0 for none: stage 1's refined masks, or
            `label_parts`.
        background: (H, W) bool, where components would hang in the air.
        distance: minimum move of a component's centre, in image sides.
        trials: rotations and positions that are tried for a component.

    Returns:
        New image and label map, and how many components were pasted; the arguments are not changed.
    """
    pasted_image, pasted_labels, pasted = image.copy(), labels.copy(), 0
    for instance in rng.permutation(labelled_instances(instances, labels)):
        mask, limit = instances == instance, MAX_BACKGROUND[pasted]
        placement = find_placement(mask, background, rng, distance, limit, trials)
        if placement is not None:
            pasted_image[placement.window][placement.mask] = _moved(image, placement, cv2.INTER_LINEAR)
            pasted_labels[placement.window][placement.mask] = _moved(labels, placement, cv2.INTER_NEAREST)
            pasted += 1
        elif pasted:
            break
        if pasted == len(MAX_BACKGROUND):
            break
    return Synthesis(pasted_image, pasted_labels, pasted)


def labelled_instances(instances: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The instances (H, W) that lie in labels, ascending; 10 % of one, and 100 pixels, may have no label."""
    sizes = np.bincount(instances.ravel())
    labelled = np.bincount(instances[labels > 0], minlength=len(sizes))
    wanted = (labelled >= MIN_LABELLED * sizes) & (sizes - labelled <= MAX_UNLABELLED) & (sizes > 0)
    wanted[0] = False
    return np.flatnonzero(wanted)


def label_parts(labels: np.ndarray) -> np.ndarray:
    """The 4-connected parts of over 50 pixels of every label but 0, in label order.

    Args:
        labels: (H, W) uint8.

    Returns:
        (H, W) int32, numbered from 1; 0 for none.
    """
    instances = np.zeros(labels.shape, np.int32)
    number = 0
    for label in np.unique(labels[labels > 0]):
        own = (labels == label).astype(np.uint8)
        _, parts, stats, _ = cv2.connectedComponentsWithStats(own, connectivity=4)
        large = stats[:, cv2.CC_STAT_AREA] > MIN_PART
        large[0] = False
        instances += np.where(large, number + np.cumsum(large), 0)[parts].astype(np.int32)
        number += int(large.sum())
    return instances


def without_a_part(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A copy of a label map (H, W) uint8 that lacks a part of at least `REMOVED_PART` of it, else the largest, if any."""
    parts = label_parts(labels)
    areas = np.bincount(parts.ravel())[1:]
    if not len(areas):
        return labels.copy()
    large = np.flatnonzero(areas >= REMOVED_PART * labels.size)
    part = rng.choice(large) if len(large) else areas.argmax()
    return np.where(parts == part + 1, 0, labels).astype(np.uint8)


def find_placement(
    mask: np.ndarray,
    background: np.ndarray,
    rng: np.random.Generator,
    distance: float,
    max_background: float,
    trials: int = TRIALS,
) -> Placement | None:
    """Draw rotations and positions until not too much of a component lies on background; far ones are likelier.

    Args:
        mask: (H, W) bool, the component.
        background: (H, W) bool.
        distance: minimum move of the component's centre, in image sides.
        max_background: less than this fraction of what is pasted may lie on background.
        trials: how many are drawn at most.

    Returns:
        The first placement that will do; None when no position is that far away, or all trials failed.
    """
    mask, sides = mask.view(np.uint8), np.array(mask.shape[::-1])
    x, y, width, height = cv2.boundingRect(mask)
    centre = np.array([x + (width - 1) / 2, y + (height - 1) / 2])
    positions = rng.uniform(BORDER, 1 - BORDER, (CANDIDATES, 2)) * sides
    moves = np.hypot(*((positions - centre) / sides).T)
    weights = np.where(moves >= distance, moves**2, 0)
    if not weights.any():
        return None
    reach = np.hypot(width, height) / 2 + 1
    drawn = rng.choice(positions, trials, p=weights / weights.sum())
    for position, angle in zip(drawn, rng.integers(360, size=trials).tolist()):
        left, top = np.maximum(position - reach, 0).astype(int).tolist()
        right, bottom = np.minimum(position + reach + 1, sides).astype(int).tolist()
        movement = cv2.getRotationMatrix2D(centre.tolist(), angle, 1.0)
        movement[:, 2] = movement[:, 2] + (position - centre - (left, top))
        window = slice(top, bottom), slice(left, right)
        size = right - left, bottom - top
        moved = cv2.warpAffine(mask, movement, size, flags=cv2.INTER_NEAREST).view(bool)
        area = np.count_nonzero(moved)
        if area and np.count_nonzero(moved & background[window]) < max_background * area:
            return Placement(movement, window, moved)
    return None


def _moved(picture: np.ndarray, placement: Placement, interpolation: int) -> np.ndarray:
    """What a picture (H, W[, 3]) pastes into a placement's mask. Labels need cv2.INTER_NEAREST."""
    size = placement.mask.shape[::-1]
    return cv2.warpAffine(picture, placement.movement, size, flags=interpolation)[placement.mask]
