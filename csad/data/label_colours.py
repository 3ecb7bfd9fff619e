"""A colour for each index of a label map, the same in pictures, reports and pages."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Black, and the colours of Okabe and Ito (2008), which colour-blind people can tell apart, too.
_DISTINCT = ["000000", "e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7"]


def _make_palette() -> np.ndarray:
    # Steps of the golden ratio around the hue circle keep neighbouring indices apart.
    indices = np.arange(256)
    hue = (indices * 0.618034 % 1.0 * 179).astype(np.uint8) / 179 * 255
    hsv = np.stack([hue, 190 - indices % 3 * 40, 255 - indices % 4 * 30], 1).astype(np.uint8)
    rgb = np.array(Image.fromarray(hsv[None], mode="HSV").convert("RGB"))[0]
    rgb[: len(_DISTINCT)] = [tuple(bytes.fromhex(colour)) for colour in _DISTINCT]
    return rgb


_PALETTE = _make_palette()


def colour_labels(labels: np.ndarray) -> np.ndarray:
    """Paint a label map (H, W) uint8 with one well-separated colour per index, (H, W, 3) uint8; 0 stays black."""
    return _PALETTE[labels]


def label_colour(label: int) -> str:
    """The colour of an index in `colour_labels`, as style sheets write it."""
    return "#" + colour_labels(np.array(label, np.uint8)).tobytes().hex()
