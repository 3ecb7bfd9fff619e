"""Which defect a test image shows: from its folder, the values of its masks, or the rendered data set's list."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from csad.data import files
from csad.data.conventions import GOOD
from csad.data.image_files import is_lossy
from csad.data.images import read_mask
from csad.data.layouts import Category
from csad.errors import UserError

import numpy as np


class DefectNames:
    """The names of a category's defects; its files are read once."""

    def __init__(self, category: Category):
        self.category = category

    def of(self, split: str, image: Path) -> str | None:
        """The name of a test image's defect, several as 'a + b'; None for good images and where nothing tells
        it. UserError if defects_config.json or a mask cannot be read."""
        if split == GOOD:
            return None
        by_folder = self.category.convention.defect(self.category.root, image)
        if by_folder is not None:
            return by_folder
        if names := self._by_pixel_value:
            masks = self.category.region_masks(split, image)
            values = {pixel_value(path, read_mask(path), names) for path in masks}
            if values and values <= names.keys():
                return " + ".join(sorted({names[value] for value in values}))
        rendered = self._rendered.get(split, {}).get(image.stem)
        return str(rendered) if rendered else None

    @cached_property
    def _by_pixel_value(self) -> dict[int, str]:
        """Names by the masks' values, from defects_config.json."""
        config = self.category.defects_config
        if not config.exists():
            return {}
        entries = files.read_json(config, files.MEND)
        try:
            return {int(entry["pixel_value"]): str(entry["defect_name"]) for entry in entries}
        except (KeyError, TypeError, ValueError):
            return {}  # localisation says what is wrong with it

    @cached_property
    def _rendered(self) -> dict[str, dict[str, str]]:
        """Names by split and image, of the rendered data set."""
        data_set = Path(os.path.abspath(self.category.root)).parent
        classes = data_set.with_name(f"{data_set.name}_components") / self.category.name / "classes.json"
        content = files.read_json(classes, files.MEND) if classes.exists() else None
        return content.get("anomalies", {}) if isinstance(content, dict) else {}


def pixel_value(path: Path, mask: np.ndarray, defined: Collection[int]) -> int:
    """The pixel_value of a mask, (H, W) uint8 as read, in defects_config.json; 0 where the mask is empty.

    Args:
        defined: the pixel_values in defects_config.json.

    Raises:
        UserError: a lossy format has not kept the value, and several are defined.
    """
    value = int(mask.max())
    if not value or not is_lossy(path):
        return value
    if len(set(defined)) > 1:
        raise UserError(
            f"{path} is stored in a lossy format, which keeps no exact values, and defects_config.json "
            "has several pixel_values; store the mask as a PNG"
        )
    return next(iter(defined), value)
