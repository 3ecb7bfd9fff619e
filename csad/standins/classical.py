"""A stand-in for SAM-HQ by image processing alone. It has no notion of what a part is called: no grounding masks."""

from __future__ import annotations

import heapq

from csad.pseudo_labels.masks import SMALL, PackedMasks, without_small
from csad.pseudo_labels.proposers import Proposals

import cv2
import numpy as np
from skimage.segmentation import felzenszwalb, find_boundaries

# All colours here are CIE Lab with L in 0..100; a difference of 2 is just visible.
SMOOTHING_RADIUS, SMOOTHING_COLOR = 3, 8  # mean-shift filter: pixels, 8-bit levels
FINE_SCALE, MIN_FINE = 8.0, 20  # Felzenszwalb on Lab / 10; pixels
ALIKE = 10.0  # neighbouring regions that differ less are one part
FULL_WEIGHT = 80  # pixels (harmonic) from which a region's colour difference counts in full
ENCLOSED_DISCOUNT = 0.7  # how much of a difference is forgiven when one region encloses the other
THIN, THIN_ALIKE = 4, 25.0  # pixels, colour difference: a rim between two regions rather than a cable
CORNER = 0.04  # of the side: the patches in the corners that are background
BORDER_SHARE = 0.15  # of the image's border: a region that holds so much of it is background
HUE_ALIKE = 14.0  # in a and b alone: a container differs from the background in lightness rather than in hue
SPAN = 0.6  # of the side: no part is so long when there is a container around all parts


class ClassicalProposer:
    """Whole parts from colour: a merge tree of superpixels, cut where neighbours stop being alike.

    1. The mean-shift filter and Felzenszwalb's method turn the image into a few hundred superpixels.
    2. Neighbours are merged, the most alike first, until all differ by 10 or more.
    3. Regions nowhere wider than four pixels (blended edges, shadows along them) join the neighbour most like them,
       unless they stand out like a cable.
    4. Regions in the corners, along the border, or of their colour are background; see ``container``.
    5. A region that lies in another one and differs moderately from it (glare, shading) joins it.
    6. Holes are filled, unless one sees the background through them. What lies in them are masks of their own.

    It works on pictures squeezed to 256x256, whatever their native size: at other sizes its radii in pixels would mean
    something else. Its masks and maps have that size, too.

    Args:
        container: the parts lie in something (a tray, a bag) that is no part itself. Whatever has the background's hue
            and encloses something else, and whatever spans most of the image, is then background, too.
    """

    name = "classical"
    is_stand_in = True
    working_size: int | None = 256

    def __init__(self, container: bool = False):
        self.container = container
        self.checkpoints: dict[str, str] = {}

    def load(self) -> None:
        """There is nothing to load."""

    def propose(self, image: np.ndarray) -> Proposals:
        smooth = cv2.pyrMeanShiftFiltering(np.ascontiguousarray(image), SMOOTHING_RADIUS, SMOOTHING_COLOR)
        lab = cv2.cvtColor(smooth.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
        superpixels = felzenszwalb(lab / 10, scale=FINE_SCALE, sigma=0, min_size=MIN_FINE, channel_axis=-1)
        regions = merge_thin(merge_alike(superpixels, lab, ALIKE), lab)
        background = self._background(regions, lab)
        regions = merge_enclosed(regions, lab, ~background)
        parts = [regions == region for region in np.unique(regions[~background])]
        filled = PackedMasks.pack((part | _enclosed(part, background) for part in parts), background.shape)
        return Proposals(without_small(filled), background)

    def _background(self, regions: np.ndarray, lab: np.ndarray) -> np.ndarray:
        """(H, W) bool: the regions that are background."""
        _, colours = _statistics(regions, lab)
        border = _at_the_border(regions)
        # What looks like background is background: one sees it through a ring, or between two parts.
        apart = np.linalg.norm(colours[:, None] - colours[None, border], axis=2).min(1)
        is_background = apart < ALIKE
        if self.container:
            hue_apart = np.linalg.norm(colours[:, None, 1:] - colours[None, border, 1:], axis=2).min(1)
            for region in np.flatnonzero(~is_background):
                mask = regions == region
                _, _, width, height = cv2.boundingRect(mask.astype(np.uint8))
                spans = max(width / mask.shape[1], height / mask.shape[0]) > SPAN
                is_background[region] = spans or (
                    hue_apart[region] < HUE_ALIKE
                    and np.count_nonzero(_enclosed(mask, is_background[regions])) > SMALL * mask.size
                )
        return is_background[regions]


def merge_alike(superpixels: np.ndarray, lab: np.ndarray, alike: float) -> np.ndarray:
    """Merge neighbouring regions, the most alike first, until none differ by less than ``alike``.

    Two regions differ by the distance of their mean colours; the difference counts less while one of them is tiny,
    because the colour of a few pixels says little.

    Args:
        superpixels: (H, W) int labels 0..n-1.
        lab: (H, W, 3) float32.

    Returns:
        (H, W) labels 0..m-1.
    """
    statistics = _statistics(superpixels, lab)
    count = len(statistics[0])
    # With room for what is merged: of n regions, n - 1 at most.
    sizes, colours = np.zeros(2 * count), np.zeros((2 * count, 3))
    sizes[:count], colours[:count] = statistics
    pairs, _ = _boundaries(superpixels)
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for first, second in pairs.tolist():
        neighbours[first].add(second)
        neighbours[second].add(first)

    def alike_pairs(firsts: np.ndarray, seconds: np.ndarray | int) -> list[tuple[float, int, int]]:
        """(difference, first, second) of those that may be merged."""
        seconds = np.broadcast_to(seconds, firsts.shape)
        harmonic = sizes[firsts] * sizes[seconds] / (sizes[firsts] + sizes[seconds])
        apart = ((colours[firsts] - colours[seconds]) ** 2).sum(1)
        differences = np.sqrt(apart * np.minimum(1.0, harmonic / FULL_WEIGHT))
        mergeable = differences < alike
        return list(zip(*(values[mergeable].tolist() for values in (differences, firsts, seconds))))

    queue = alike_pairs(pairs[:, 0], pairs[:, 1])
    heapq.heapify(queue)
    parent = list(range(count))
    while queue:
        _, first, second = heapq.heappop(queue)
        if parent[first] != first or parent[second] != second:
            continue
        merged = len(parent)
        parent[first] = parent[second] = merged
        parent.append(merged)
        sizes[merged] = sizes[first] + sizes[second]
        colours[merged] = (sizes[first] * colours[first] + sizes[second] * colours[second]) / sizes[merged]
        neighbours.append((neighbours[first] | neighbours[second]) - {first, second})
        for neighbour in neighbours[merged]:
            neighbours[neighbour] -= {first, second}
            neighbours[neighbour].add(merged)
        for pair in alike_pairs(np.fromiter(neighbours[merged], int), merged):
            heapq.heappush(queue, pair)
    for node in range(len(parent) - 1, -1, -1):
        parent[node] = parent[parent[node]]
    return _renumber(np.array(parent)[superpixels])


def merge_thin(regions: np.ndarray, lab: np.ndarray) -> np.ndarray:
    """Let each region nowhere wider than four pixels join the larger neighbour most like it, unless it stands out.

    Args:
        regions: (H, W) labels 0..n-1.

    Returns:
        (H, W) labels 0..m-1.
    """
    sizes, colours = _statistics(regions, lab)
    pairs, _ = _boundaries(regions)
    joins = np.arange(len(sizes))
    for region in np.flatnonzero(_widths(regions) <= THIN):
        neighbours = pairs[(pairs == region).any(1)].sum(1) - region
        larger = neighbours[sizes[neighbours] > sizes[region]]
        if len(larger):
            apart = np.linalg.norm(colours[larger] - colours[region], axis=1)
            if apart.min() < THIN_ALIKE:
                joins[region] = larger[apart.argmin()]
    # Thin regions may join thin ones; sizes grow along each chain, so it ends.
    while (joins[joins] != joins).any():
        joins = joins[joins]
    return _renumber(joins[regions])


def merge_enclosed(regions: np.ndarray, lab: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Let regions that lie mostly in a neighbour join it when they differ from it only moderately.

    The difference is discounted by the fraction of a region's outline that it has in common with the neighbour.

    Args:
        regions: (H, W) labels 0..n-1.
        among: (H, W) bool, the regions that may join or be joined; each region is wholly inside or outside.

    Returns:
        (H, W) labels 0..m-1.
    """
    while True:
        sizes, colours = _statistics(regions, lab)
        eligible = np.zeros(len(sizes), bool)
        eligible[regions[among]] = True
        pairs, lengths = _boundaries(regions)
        outline = np.bincount(pairs.ravel(), np.repeat(lengths, 2), len(sizes))
        pairs, lengths = pairs[eligible[pairs].all(1)], lengths[eligible[pairs].all(1)]
        if not len(pairs):
            return regions
        # The smaller of the two joins the larger one.
        smaller = np.where(sizes[pairs[:, 0]] < sizes[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
        apart = np.linalg.norm(colours[pairs[:, 0]] - colours[pairs[:, 1]], axis=1)
        discounted = apart * (1 - ENCLOSED_DISCOUNT * lengths / outline[smaller])
        best = discounted.argmin()
        if discounted[best] >= ALIKE:
            return regions
        regions = _renumber(np.where(regions == pairs[best, 0], pairs[best, 1], regions))


def _statistics(regions: np.ndarray, lab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n,) and mean colour (n, 3) of each region."""
    flat = regions.ravel()
    sizes = np.bincount(flat).astype(np.float64)
    sums = [np.bincount(flat, lab[..., channel].ravel()) for channel in range(3)]
    return sizes, np.stack(sums, 1) / sizes[:, None]


def _boundaries(regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of neighbouring regions (p, 2), smaller label first, and the lengths (p,) of their boundaries in pixels."""
    across = np.stack([regions[:, :-1].ravel(), regions[:, 1:].ravel()], 1)
    down = np.stack([regions[:-1].ravel(), regions[1:].ravel()], 1)
    pairs = np.concatenate([across, down]).astype(np.int64)
    pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    count = int(regions.max()) + 1
    codes, lengths = np.unique(pairs[:, 0] * count + pairs[:, 1], return_counts=True)
    return np.stack([codes // count, codes % count], 1), lengths


def _widths(regions: np.ndarray) -> np.ndarray:
    """Width in pixels of each region where it is widest, (n,); at the image's border a region is taken to end."""
    edge = find_boundaries(np.pad(regions, 1, constant_values=-1))[1:-1, 1:-1]
    # 0 on a region's outermost pixels: two pixels more than twice the distance to them, or one where rows are odd.
    inwards = cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_C, 3)
    deepest = np.zeros(int(regions.max()) + 1)
    np.maximum.at(deepest, regions.ravel(), inwards.ravel())
    return 2 * deepest + 2


def _at_the_border(regions: np.ndarray) -> np.ndarray:
    """(n,) bool: regions in the image's corners, or along a good part of its border."""
    height, width = regions.shape
    border = np.concatenate([regions[0], regions[-1], regions[1:-1, 0], regions[1:-1, -1]])
    along = np.bincount(border, minlength=regions.max() + 1) / len(border) > BORDER_SHARE
    down, right = max(round(CORNER * height), 1), max(round(CORNER * width), 1)
    for rows in (slice(0, down), slice(-down, None)):
        for columns in (slice(0, right), slice(-right, None)):
            along[np.bincount(regions[rows, columns].ravel()).argmax()] = True
    return along


def _enclosed(mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    """(H, W) bool: what lies in the holes of a mask, except for the background seen through them."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED)
    return (filled != 0) & ~mask & ~background


def _renumber(labels: np.ndarray) -> np.ndarray:
    """Labels 0..n-1 in the same order, without gaps."""
    return (np.cumsum(np.bincount(labels.ravel()) > 0) - 1)[labels]
