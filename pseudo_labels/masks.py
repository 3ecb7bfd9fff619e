"""The mask algebra of docs/METHOD.md, section 1.

Masks are (N, H, W) arrays in which any non-zero pixel is inside; a single mask is (H, W). What comes out has the dtype
of what went in, except where it is said. Nothing here changes its arguments.
"""

from __future__ import annotations

import cv2
import numpy as np

LEAST_COMPONENT = 50  # pixels; a component has to be larger
LARGEST_BOX = 0.95  # of the image; a component's bounding box has to be smaller
SMALL = 0.001  # of the image; masks up to this area are dropped
BACKGROUND_RATIO = 0.95  # intersect ratio from which a mask is background
GROUNDING_RATIO = 0.9  # intersect ratio over which a mask is inside the grounding mask
COVERED = 0.9  # intersect ratio, or covered share, from which a mask adds nothing to a union
MOST_LABELS = 255  # what an 8-bit label map holds beside 0


def areas(masks: np.ndarray) -> np.ndarray:
    """Pixels inside each mask, (N, H, W) -> (N,) int64."""
    return np.count_nonzero(masks, axis=(1, 2))


def intersect_ratios(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """|A and B| / min(|A|, |B|) of every pair, (N, H, W) and (M, H, W) -> (N, M) float64; 0 where they do not meet."""
    # Counts are exact in float32 up to 2^24 pixels, and its matrix product is the fast one.
    number = np.float32 if masks[:1].size < 2 ** 24 else np.float64
    ours, theirs = ((side != 0).reshape(len(side), masks.shape[1] * masks.shape[2]).astype(number)
                    for side in (masks, others))
    smaller = np.minimum.outer(areas(masks), areas(others))
    return (ours @ theirs.T).astype(np.float64) / np.maximum(smaller, 1)


def intersect_ratio(mask: np.ndarray, other: np.ndarray) -> float:
    """The intersect ratio of two masks (H, W)."""
    return float(intersect_ratios(mask[None], other[None])[0, 0])


def split_components(masks: np.ndarray) -> np.ndarray:
    """Split masks into their 4-connected components, in mask order, then label order.

    Components of at most 50 pixels, or whose bounding box takes 95 % of the image, are left out.

    Returns:
        (M, H, W) uint8, 0 or 255.
    """
    height, width = masks.shape[1:]
    components = []
    for mask in masks:
        count, labels, stats, _ = cv2.connectedComponentsWithStats((mask != 0).astype(np.uint8), connectivity=4)
        box = stats[:, cv2.CC_STAT_WIDTH].astype(np.int64) * stats[:, cv2.CC_STAT_HEIGHT]
        wanted = (stats[:, cv2.CC_STAT_AREA] > LEAST_COMPONENT) & (box < LARGEST_BOX * height * width)
        components += [labels == label for label in range(1, count) if wanted[label]]
    return np.array(components, dtype=np.uint8).reshape(-1, height, width) * 255


def without_background(masks: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Drop the masks whose intersect ratio with the background (H, W) is 0.95 or more."""
    return masks[intersect_ratios(masks, background[None])[:, 0] < BACKGROUND_RATIO]


def inside_grounding(masks: np.ndarray, grounding: np.ndarray) -> np.ndarray:
    """Keep the masks whose intersect ratio with the grounding mask (H, W) is over 0.9."""
    return masks[intersect_ratios(masks, grounding[None])[:, 0] > GROUNDING_RATIO]


def without_small(masks: np.ndarray) -> np.ndarray:
    """Drop the masks that cover 0.1 % of the image or less."""
    return masks[areas(masks) > SMALL * masks.shape[1] * masks.shape[2]]


def largest(masks: np.ndarray, count: int = MOST_LABELS) -> np.ndarray:
    """The ``count`` largest masks, in their given order; of equally large ones the first."""
    return masks[np.sort(np.argsort(-areas(masks), kind="stable")[:count])]


def combine(masks: np.ndarray) -> np.ndarray:
    """Keep the masks that add something to the smaller ones, in order of acceptance.

    Small masks are dropped. From small to large, a mask is kept when its intersect ratio with the union so far is under
    0.9 (the first one always); the others wait. Then a waiting mask is kept when less than 90 % of it is covered.
    """
    masks = without_small(masks)
    union = np.zeros(masks.shape[1:], bool)
    covered_by = 0
    kept, waiting = [], []
    inside, sizes = masks != 0, areas(masks)

    def accept(index: int) -> None:
        nonlocal union, covered_by
        kept.append(index)
        union = union | inside[index]
        covered_by = np.count_nonzero(union)

    for index in np.argsort(sizes, kind="stable"):
        meeting = np.count_nonzero(inside[index] & union)
        if not kept or meeting / min(sizes[index], covered_by) < COVERED:
            accept(index)
        else:
            waiting.append(index)
    for index in waiting:
        if np.count_nonzero(inside[index] & union) / sizes[index] < COVERED:
            accept(index)
    return masks[kept]


def merge(masks: np.ndarray) -> np.ndarray:
    """Paint masks into one label map, from large to small, so that small ones lie on top.

    Small masks are dropped; the largest mask has index 1.

    Args:
        masks: (N, H, W), at most 255 of them.

    Returns:
        (H, W) uint8.
    """
    masks = without_small(masks)
    if len(masks) > MOST_LABELS:
        raise ValueError(f"{len(masks)} masks do not fit into an 8-bit label map")
    labels = np.zeros(masks.shape[1:], np.uint8)
    for index, mask in enumerate(masks[np.argsort(-areas(masks), kind="stable")], start=1):
        labels[mask != 0] = index
    return labels


def label_masks(labels: np.ndarray) -> np.ndarray:
    """The opposite of merge: a label map (H, W) -> masks (N, H, W) bool of the indices that occur, ascending, not 0."""
    indices = np.unique(labels)
    return labels[None] == indices[indices > 0][:, None, None]
