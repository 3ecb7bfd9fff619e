"""The targets of the segmentor's training, made from pseudo-label maps (docs/method.md section 2)."""

from __future__ import annotations

import cv2
import numpy as np


def fill_class_holes(labels: np.ndarray) -> np.ndarray:
    """Fill the holes of each class of a label map (H, W) uint8, at the size that it was made in.

    All classes are filled, then painted, large ones first: what lies in another class's hole stays in sight.
    """
    classes = []
    for label in np.unique(labels[labels > 0]).tolist():
        own = (labels == label).astype(np.uint8)
        outlines, _ = cv2.findContours(own, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        whole = cv2.drawContours(np.zeros(labels.shape, np.uint8), outlines, -1, 1, cv2.FILLED) > 0
        classes.append((np.count_nonzero(whole), label, whole))
    filled = np.zeros_like(labels)
    for _, label, whole in sorted(classes, key=lambda filled_class: -filled_class[0]):
        filled[whole] = label
    return filled
