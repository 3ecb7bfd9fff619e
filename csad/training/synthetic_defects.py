"""Synthetic defects in good pictures: they decide the branches' weights, without any anomalous picture.

Structural ones change the surface (scratch, stain, foreign piece, blur, missing texture), logical ones the
arrangement of parts (removed, moved, turned, doubled, exchanged). Every kind has a strength, thus they can be
made as faint as the decision needs them (evaluation.branch_weights). No network is trained on them, so they need
not look like real ones. Beyond the paper (docs/beyond.md).
"""

from __future__ import annotations

from collections.abc import Callable

from csad.training.logical_synthesis import label_parts

import cv2
import numpy as np
from numpy import ndarray as Array
from numpy.random import Generator

SOFT = 1.0  # standard deviation in pixels of the Gaussian over a defect's outline
MAX_PART = 0.06  # of the image; of a larger component, a piece counts as the part
PIECE = (0.04, 0.12)  # half axes of such a piece, in image sides
INPAINTING_SIDE = 128  # pixels; parts are filled in on a smaller picture, which takes milliseconds


def synthesise_defect(image: Array, labels: Array, kind: str, strength: float, rng: Generator) -> Array:
    """A copy of a good picture with one defect, on a component if there is any.

    Args:
        image: (H, W, 3) uint8, square.
        labels: (h, w) component of each pixel, 0 for background; H is a multiple of h.
        kind: a name in `STRUCTURAL` or `LOGICAL`.
        strength: 0 (hardly to be seen) to 1.

    Returns:
        (H, W, 3) uint8; equal to the image where the defect is too faint for whole numbers.
    """
    if kind in LOGICAL:
        defective = LOGICAL[kind](image.astype(np.float32), _part(image, labels, rng), strength, rng)
    else:
        on = labels > 0 if (labels > 0).any() else np.ones_like(labels, dtype=bool)
        positions, scale = np.argwhere(on), len(image) / len(labels)
        centre = (positions[rng.integers(len(positions))] + rng.random(2)) * scale  # (y, x)
        outline, content = STRUCTURAL[kind](image.astype(np.float32), centre, strength, rng)
        defective = _blend(image, outline * _between(0.1, 0.9, strength), content)
    return np.clip(defective, 0, 255).round().astype(np.uint8)


# Structural: image (H, W, 3) float32 in 0..255, centre (y, x) -> outline (H, W) in 0..1, content (H, W, 3)


def foreign_piece(image: Array, centre: Array, strength: float, rng: Generator) -> tuple[Array, Array]:
    """An ellipse of what lies elsewhere in the picture, in another light."""
    side = len(image)
    moved = np.roll(image, tuple(rng.integers(side // 8, 7 * side // 8, 2)), (0, 1))
    outline = _ellipse(side, centre, strength, side / 64, side / 16, rng)
    return outline, moved * rng.uniform(0.6, 1.4) + rng.uniform(-30, 30)


def scratch(image: Array, centre: Array, strength: float, rng: Generator) -> tuple[Array, Array]:
    """A line with a few bends, of one colour."""
    side = len(image)
    steps = rng.normal(0, side / 24, (rng.integers(1, 4), 2))
    points = centre[::-1] + np.concatenate([np.zeros((1, 2)), steps]).cumsum(0)
    width = int(rng.integers(max(side // 256, 1), max(side // 72, 2)))
    canvas, line = np.zeros((side, side), np.float32), points.astype(np.int32)[:, None]
    outline = cv2.polylines(canvas, [line], False, 1, width)
    return outline, np.full(image.shape, rng.uniform(0, 255, 3), np.float32)


def stain(image: Array, centre: Array, strength: float, rng: Generator) -> tuple[Array, Array]:
    """A blot with ragged edges, of one grainy colour."""
    side = len(image)
    grains = int(rng.integers(12, 48))
    noise = rng.random((grains, grains), np.float32)
    rough = 0.5 + 0.5 * cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    (y, x), radius = np.ogrid[:side, :side], rng.uniform(side / 60, side / 16)
    near = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * radius**2))
    colour = rng.uniform(0, 255, 3) * 0.7 + 30 * rng.random((side, side, 1))
    return (rough * near > 0.35).astype(np.float32), colour.astype(np.float32)


def blur(image: Array, centre: Array, strength: float, rng: Generator) -> tuple[Array, Array]:
    """An ellipse out of focus."""
    side = len(image)
    soft = cv2.GaussianBlur(image, (0, 0), _between(0.003, 0.012, strength) * side)
    return _ellipse(side, centre, strength, side / 32, side / 10, rng), soft


def missing_texture(image: Array, centre: Array, strength: float, rng: Generator) -> tuple[Array, Array]:
    """An ellipse of the mean colour that it had."""
    outline = _ellipse(len(image), centre, strength, len(image) / 40, len(image) / 12, rng)
    return outline, np.broadcast_to(image[outline > 0].mean(0) if outline.any() else image, image.shape)


STRUCTURAL: dict[str, Callable[..., tuple[Array, Array]]] = {
    function.__name__: function for function in (foreign_piece, scratch, stain, blur, missing_texture)
}


# Logical: image (H, W, 3) float32 in 0..255, part (H, W) bool -> image


def removed(image: Array, part: Array, strength: float, rng: Generator) -> Array:
    """The part, or as much of it as the strength says, filled in from what is around it."""
    return _filled_in(image, _cut(part, _between(0.15, 1, strength), rng))


def moved(image: Array, part: Array, strength: float, rng: Generator) -> Array:
    """The part somewhere near."""
    angle, distance = rng.uniform(0, 2 * np.pi), _between(0.02, 0.25, strength) * len(image)
    shift = np.array([[1, 0, distance * np.cos(angle)], [0, 1, distance * np.sin(angle)]], np.float32)
    return _pasted(_filled_in(image, part), image, part, shift)


def turned(image: Array, part: Array, strength: float, rng: Generator) -> Array:
    """The part turned about its centre."""
    turn = cv2.getRotationMatrix2D(_centre(part), rng.choice([-1, 1]) * _between(8, 180, strength), 1)
    return _pasted(_filled_in(image, part), image, part, turn)


def doubled(image: Array, part: Array, strength: float, rng: Generator) -> Array:
    """The part once more, elsewhere, the smaller the fainter."""
    copy = cv2.getRotationMatrix2D(_centre(part), rng.uniform(0, 360), _between(0.3, 1, strength))
    copy[:, 2] = copy[:, 2] + rng.uniform(0.1, 0.9, 2) * len(image) - _centre(part)
    return _pasted(image, image, part, copy)


def exchanged(image: Array, part: Array, strength: float, rng: Generator) -> Array:
    """The part with the look of what lies elsewhere in the picture, mirrored."""
    elsewhere = np.roll(image, tuple(rng.integers(len(image) // 8, 7 * len(image) // 8, 2)), (0, 1))
    mirrored = cv2.flip(elsewhere, int(rng.integers(-1, 2)))
    return _blend(image, part * np.float32(_between(0.15, 1, strength)), mirrored)


LOGICAL: dict[str, Callable[..., Array]] = {
    function.__name__: function for function in (removed, moved, turned, doubled, exchanged)
}


def _between(low: float, high: float, strength: float) -> float:
    return low + (high - low) * strength


def _blend(image: Array, opacity: Array, content: Array) -> Array:
    opacity = cv2.GaussianBlur(opacity.astype(np.float32), (0, 0), SOFT)[..., None]
    return image * (1 - opacity) + content * opacity


def _ellipse(
    side: int, centre: Array, strength: float, smallest: float, largest: float, rng: Generator
) -> Array:
    """(H, W) in 0..1, the larger the stronger; smallest and largest half axis in pixels, at strength 0.4."""
    axes = (_between(0.6, 1.6, strength) * rng.uniform(smallest, largest, 2)).round().astype(int)
    canvas, middle = np.zeros((side, side), np.float32), centre[::-1].astype(int).tolist()
    return cv2.ellipse(canvas, middle, axes.tolist(), rng.uniform(0, 180), 0, 360, 1, cv2.FILLED)


def _part(image: Array, labels: Array, rng: Generator) -> Array:
    """(H, W) bool: a component of the picture, or a piece of it if it is large; without components, any piece."""
    side = len(image)
    parts = label_parts(labels.astype(np.uint8))
    mask = parts == rng.integers(1, parts.max() + 1) if parts.any() else np.ones(labels.shape, bool)
    if mask.mean() > MAX_PART:
        positions = np.argwhere(mask)
        centre = positions[rng.integers(len(positions))]
        smallest, largest = (share * len(labels) for share in PIECE)
        piece = _ellipse(len(labels), centre, 0.4, smallest, largest, rng)
        mask = mask & (piece > 0)
    return cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) > 0


def _cut(part: Array, fraction: float, rng: Generator) -> Array:
    """What of a part lies on one side of a line such that it is this fraction of it."""
    positions, angle = np.argwhere(part), rng.uniform(0, 2 * np.pi)
    along = positions @ [np.sin(angle), np.cos(angle)]
    kept = positions[along <= np.quantile(along, fraction)]
    cut = np.zeros_like(part)
    cut[tuple(kept.T)] = True
    return cut


def _filled_in(image: Array, part: Array) -> Array:
    """The picture with a part inpainted (Telea) at a low resolution, with grain as the picture has it elsewhere."""
    side = len(image)
    small = cv2.resize(image, (INPAINTING_SIDE,) * 2, interpolation=cv2.INTER_AREA)
    covered = cv2.resize(part.astype(np.float32), (INPAINTING_SIDE,) * 2, interpolation=cv2.INTER_AREA)
    mask = cv2.dilate(covered, np.ones((3, 3))) > 0
    small = cv2.inpaint(small.round().astype(np.uint8), mask.astype(np.uint8), 3, cv2.INPAINT_TELEA)
    filled = cv2.resize(small.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    grain = image - cv2.GaussianBlur(image, (0, 0), 2)
    outside = cv2.resize(mask.astype(np.uint8), (side, side), interpolation=cv2.INTER_NEAREST) == 0
    quiet = np.median(np.abs(grain[outside]), axis=0) if outside.any() else np.zeros(3)
    noise = np.random.default_rng(0).normal(0, 1.4826, image.shape) * quiet
    soft = cv2.GaussianBlur((~outside).astype(np.float32), (0, 0), 2 * SOFT)[..., None]
    return (image * (1 - soft) + (filled + noise) * soft).astype(np.float32)


def _pasted(onto: Array, image: Array, part: Array, movement: Array) -> Array:
    size = image.shape[1::-1]
    opacity = cv2.warpAffine(part.astype(np.float32), movement, size)
    return _blend(onto, opacity, cv2.warpAffine(image, movement, size))


def _centre(part: Array) -> tuple[float, float]:
    """(x, y) of its middle, in pixels."""
    x, y, width, height = cv2.boundingRect(part.astype(np.uint8))
    return x + (width - 1) / 2, y + (height - 1) / 2
