"""Ground truth: its masks, what their values mean, and which defect a test image shows."""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from csad.data import files
from csad.data.conventions import GOOD
from csad.data.image_files import is_lossy
from csad.data.images import read_mask
from csad.data.layouts import Category, Loco
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


def read_saturations(category: Category) -> dict[int, tuple[float, bool]] | None:
    """pixel_value -> (saturation_threshold, relative_saturation), from defects_config.json; None in layouts
    that have none. UserError if the file is missing or says something else."""
    path = category.defects_config
    if not path.exists():
        if category.layout == Loco.name:
            raise UserError(f"{path} is missing; MVTec LOCO AD's layout has it")
        return None
    saturations: dict[int, tuple[float, bool]] = {}
    try:
        for entry in files.read_json(path, files.MEND):
            value = int(entry["pixel_value"])
            saturation = float(entry["saturation_threshold"]), bool(entry["relative_saturation"])
            if saturations.setdefault(value, saturation) != saturation:
                raise UserError(
                    f"{path}: pixel_value {value} occurs twice with different saturations; keep one of them"
                )
            if not saturation[0] > 0:
                raise UserError(
                    f"{path}: the saturation_threshold of pixel_value {value} is {saturation[0]}, expected more than 0"
                )
    except (TypeError, KeyError, ValueError) as problem:
        raise UserError(
            f"{path} should be a list of entries with pixel_value, saturation_threshold and "
            "relative_saturation"
        ) from problem
    return saturations


def read_region_mask(
    category: Category, path: Path, size: tuple[int, int] | None, defined: Collection[int] | None
) -> tuple[np.ndarray, int]:
    """A ground-truth mask, (H, W) uint8, and its pixel_value.

    Args:
        size: (W, H) of its image, if that can be read.
        defined: the pixel_values in defects_config.json; None in layouts that have none.

    Raises:
        UserError: the mask is unreadable, empty, of another size, or names no defect.
    """
    mask = read_mask(path)
    if size is not None and mask.shape != size[::-1]:
        raise UserError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, but its image {size[0]}x{size[1]}")
    value = pixel_value(path, mask, defined or ())
    if not value:
        raise UserError(f"{path} is empty: it marks no region")
    if defined is not None and value not in defined:
        raise UserError(f"{path} has value {value}, which is not in {category.defects_config}")
    return mask, value


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
