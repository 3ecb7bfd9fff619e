"""Structural defects planted in good pictures: by them it is decided, without any anomalous picture, which branches are fused.

Beyond the paper (docs/METHOD.md section 6). No network is trained on them, so they need not look like real ones; they only have
to be as hard to find, so many are faint.
"""

from __future__ import annotations

import cv2
import numpy as np

OPACITY = (0.15, 0.8)
SOFT = 1.0  # standard deviation in pixels of the Gaussian over a defect's outline


def plant(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One defect, on a component where there is any: a foreign piece, a scratch, or a stain.

    Args:
        image: (H, W, 3) uint8, square.
        labels: (h, w) component of each pixel, 0 for background; H is a multiple of h.

    Returns:
        (H, W, 3) uint8; at least one pixel differs in nearly all.
    """
    inside = labels > 0 if (labels > 0).any() else np.ones_like(labels, dtype=bool)
    places = np.argwhere(inside)
    centre = (places[rng.integers(len(places))] + rng.random(2)) * (len(image) / len(labels))  # (y, x)
    kind = (foreign_piece, scratch, stain)[rng.integers(3)]
    outline, content = kind(image, centre, rng)
    opacity = cv2.GaussianBlur(outline, (0, 0), SOFT)[..., None] * rng.uniform(*OPACITY)
    return np.clip(image * (1 - opacity) + content * opacity, 0, 255).round().astype(np.uint8)


def foreign_piece(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An ellipse of what lies elsewhere in the picture, in another light: outline (H, W) in 0..1, content (H, W, 3)."""
    side = len(image)
    axes = rng.integers(side // 64, side // 16, 2)  # half ones
    outline = cv2.ellipse(np.zeros((side, side), np.float32), centre[::-1].astype(int).tolist(), axes.tolist(),
                          rng.uniform(0, 180), 0, 360, 1, -1)
    moved = np.roll(image, tuple(rng.integers(side // 8, 7 * side // 8, 2)), (0, 1)).astype(np.float32)
    return outline, np.clip(moved * rng.uniform(0.6, 1.4) + rng.uniform(-30, 30), 0, 255)


def scratch(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A line with a few bends, of one colour; as `foreign_piece`."""
    side = len(image)
    steps = rng.normal(0, side / 24, (rng.integers(1, 4), 2))
    points = centre[::-1] + np.concatenate([np.zeros((1, 2)), steps]).cumsum(0)
    outline = cv2.polylines(np.zeros((side, side), np.float32), [points.astype(np.int32)[:, None]], False, 1,
                            int(rng.integers(max(side // 256, 1), max(side // 72, 2))))
    return outline, np.full(image.shape, rng.uniform(0, 255, 3), np.float32)


def stain(image: np.ndarray, centre: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A blot with ragged edges, of one grainy colour; as `foreign_piece`."""
    side = len(image)
    grains = int(rng.integers(12, 48))
    rough = 0.5 + 0.5 * cv2.resize(rng.random((grains, grains), np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    y, x = np.ogrid[:side, :side]
    near = np.exp(-((y - centre[0])**2 + (x - centre[1])**2) / (2 * rng.uniform(side / 60, side / 16)**2))
    colour = rng.uniform(0, 255, 3) * 0.7 + 30 * rng.random((side, side, 1))
    return (rough * near > 0.35).astype(np.float32), colour.astype(np.float32)
