"""Validation images for a data set that has none: some of the training images are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

FRACTION = 0.15  # of the training images
MIN_TRAINING_IMAGES = 5  # to hold some of them out
_MANY, _MIN_OF_MANY = 40, 10  # from so many training images on, at least so many are held out


def held_out(keys: Mapping[Path, str]) -> set[Path]:
    """The training images that become validation images.

    Ranked by the hash of their names: the choice depends on the names alone, on no library's version, and few images
    change sides when others join.

    Args:
        keys: at least `MIN_TRAINING_IMAGES` images with a unique name each.
    """
    at_least = _MIN_OF_MANY if len(keys) >= _MANY else 1 if len(keys) < 10 else 2
    number = max(at_least, int(FRACTION * len(keys) + 0.5))

    def rank(path: Path) -> bytes:
        return hashlib.sha256(f"0 {keys[path]}".encode(errors="surrogateescape")).digest()

    return set(sorted(keys, key=rank)[:number])
