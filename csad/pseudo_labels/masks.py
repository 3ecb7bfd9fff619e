"""The mask algebra of docs/method.md, section 1, on the masks of one picture at its native size.

Two hundred masks of a picture of 1600x1280 would take half a gigabyte as an array and several as numbers to multiply, so
they are kept bit-packed and unpacked one at a time. A single mask is an array (H, W) in which any non-zero pixel is inside.
Nothing here changes its arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import cv2
import numpy as np

MIN_COMPONENT = 50  # pixels; a component has to be larger
MAX_BOX = 0.95  # of the image; a component's bounding box has to be smaller
SMALL = 0.001  # of the image; masks up to this area are dropped
BACKGROUND_RATIO = 0.95  # intersect ratio from which a mask is background
GROUNDING_RATIO = 0.9  # intersect ratio over which a mask is inside the grounding mask
COVERED = 0.9  # intersect ratio, or covered fraction, from which a mask adds nothing to a union
MAX_LABELS = 255  # what an 8-bit label map holds beside 0


class PackedMasks:
    """Masks (N, H, W) of one picture, eight pixels to a byte.

    Iterating gives single masks (H, W) bool; an array as index gives those that it selects, packed.

    Args:
        bits: (N, ceil(H W / 8)) uint8, as `numpy.packbits` packs each mask row by row.
        shape: (H, W).
    """

    def __init__(self, bits: np.ndarray, shape: tuple[int, int]):
        self.bits, self.shape = bits, (shape[0], shape[1])

    @classmethod
    def pack(cls, masks: Iterable[np.ndarray], shape: tuple[int, int]) -> PackedMasks:
        """Pack masks (H, W) as they come, so that no two of them need be held unpacked."""
        rows = [pack(mask) for mask in masks]
        return cls(np.array(rows, np.uint8).reshape(-1, -(-shape[0] * shape[1] // 8)), shape)

    def __len__(self) -> int:
        return len(self.bits)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self._unpacked, self.bits)

    def __getitem__(self, selected: np.ndarray) -> PackedMasks:
        return PackedMasks(self.bits[selected], self.shape)

    def union(self) -> np.ndarray:
        """(H, W) bool."""
        return self._unpacked(np.bitwise_or.reduce(self.bits, axis=0))

    def _unpacked(self, bits: np.ndarray) -> np.ndarray:
        return np.unpackbits(bits, count=self.shape[0] * self.shape[1]).view(bool).reshape(self.shape)


def pack(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) as `PackedMasks` holds it."""
    return np.packbits(mask if mask.dtype == bool else mask != 0)


def areas(masks: PackedMasks) -> np.ndarray:
    """Pixels inside each mask, (N,) int64."""
    return np.array([_count(row) for row in masks.bits], np.int64)


def intersect_ratios(masks: PackedMasks, mask: np.ndarray) -> np.ndarray:
    """|A and B| / min(|A|, |B|) of each mask A with a mask B (H, W), (N,) float64; 0 where they do not meet."""
    packed = pack(mask)
    meeting = np.array([_count(row & packed) for row in masks.bits], np.float64)
    return meeting / np.maximum(np.minimum(areas(masks), _count(packed)), 1)


def split_components(masks: PackedMasks) -> PackedMasks:
    """Split masks into their 4-connected components, in mask order, then label order.

    What lies outside of a mask is one more component and comes first, however many pieces it has, as in the published
    implementation: the frame that SAM outlined instead of what it frames. Components of at most 50 pixels, or whose bounding
    box takes 95 % of the image, are left out.
    """
    height, width = masks.shape
    components = []
    for mask in masks:
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
        box = stats[:, cv2.CC_STAT_WIDTH].astype(np.int64) * stats[:, cv2.CC_STAT_HEIGHT]
        is_component = (stats[:, cv2.CC_STAT_AREA] > MIN_COMPONENT) & (box < MAX_BOX * height * width)
        components += [pack(labels == label) for label in range(count) if is_component[label]]
    return PackedMasks(np.array(components, np.uint8).reshape(-1, masks.bits.shape[1]), masks.shape)


def without_background(masks: PackedMasks, background: np.ndarray) -> PackedMasks:
    """Drop the masks whose intersect ratio with the background (H, W) is 0.95 or more."""
    return masks[intersect_ratios(masks, background) < BACKGROUND_RATIO]


def inside_grounding(masks: PackedMasks, grounding: np.ndarray) -> PackedMasks:
    """Keep the masks whose intersect ratio with the grounding mask (H, W) is over 0.9."""
    return masks[intersect_ratios(masks, grounding) > GROUNDING_RATIO]


def without_small(masks: PackedMasks) -> PackedMasks:
    """Drop the masks that cover 0.1 % of the image or less."""
    return masks[areas(masks) > SMALL * masks.shape[0] * masks.shape[1]]


def largest(masks: PackedMasks, count: int = MAX_LABELS) -> PackedMasks:
    """The ``count`` largest masks, in their given order; of equally large ones the first."""
    return masks[np.sort(np.argsort(-areas(masks), kind="stable")[:count])]


def combine(masks: PackedMasks) -> PackedMasks:
    """Keep the masks that add something to the smaller ones, in order of acceptance.

    Small masks are dropped. From small to large, a mask is kept when its intersect ratio with the union so far is under
    0.9 (the first one always); the others wait. Then a waiting mask is kept when less than 90 % of it is covered.
    """
    masks = without_small(masks)
    sizes, union = areas(masks), np.zeros(masks.bits.shape[1], np.uint8)
    accepted, waiting = [], []
    for index in np.argsort(sizes, kind="stable"):
        smaller = min(sizes[index], _count(union))  # 0 for the first
        if not smaller or _count(masks.bits[index] & union) / smaller < COVERED:
            accepted.append(index)
            union |= masks.bits[index]
        else:
            waiting.append(index)
    for index in waiting:
        if _count(masks.bits[index] & union) / sizes[index] < COVERED:
            accepted.append(index)
            union |= masks.bits[index]
    return masks[np.array(accepted, np.int64)]


def merge(masks: PackedMasks) -> np.ndarray:
    """Paint masks into one label map, from large to small, so that small ones lie on top.

    Small masks are dropped; the largest mask has index 1.

    Args:
        masks: at most 255 of them, see `largest`.

    Returns:
        (H, W) uint8.
    """
    masks = without_small(masks)
    labels = np.zeros(masks.shape, np.uint8)
    for index, mask in enumerate(masks[np.argsort(-areas(masks), kind="stable")], start=1):
        labels[mask] = index
    return labels


def label_masks(labels: np.ndarray, indices: np.ndarray | None = None) -> PackedMasks:
    """The opposite of merge: a label map (H, W) -> a mask for each of the indices; without any, for all that occur but 0."""
    if indices is None:
        indices = np.unique(labels[labels > 0])
    return PackedMasks.pack((labels == index for index in indices), labels.shape)


def components_in_sight(labels: np.ndarray) -> np.ndarray:
    """The indices, ascending, that cover over 0.1 % of a label map (H, W): what counts as a component of the picture."""
    pixels = np.bincount(labels.ravel(), minlength=MAX_LABELS + 1)
    pixels[0] = 0
    return np.flatnonzero(pixels > SMALL * labels.size)


def _count(bits: np.ndarray) -> int:
    return int(cv2.norm(bits, cv2.NORM_HAMMING))
