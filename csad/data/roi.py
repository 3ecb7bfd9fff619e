"""The region of interest: outside of it nothing counts. `roi.png` in a category's folder, or polygons in its settings."""

from __future__ import annotations

from collections.abc import Sequence

from csad.data.image_files import displayed_size
from csad.data.images import read_mask
from csad.data.layouts import Category
from csad.errors import UserError

import numpy as np
from PIL import Image, ImageDraw

Polygon = Sequence[Sequence[float]]  # [[x, y], ...] in image sides, 0..1, from the top left corner
_FINER = 4  # polygons are drawn so many times larger: a cell counts where at least half of it is inside


def read_roi(category: Category, size: int, polygons: Sequence[Polygon] = ()) -> np.ndarray | None:
    """What of a view is inspected.

    Args:
        size: side of the view.
        polygons: the region from the settings, all polygons together; only where there is no roi.png.

    Returns:
        (size, size) bool, True = inspected; None where everything is.

    Raises:
        UserError: roi.png is unreadable, empty or of another size than the images; both are given.
    """
    path = category.roi_file
    if polygons and path.exists():
        raise UserError(
            f"{category.name} has a region of interest twice, {path} and polygons in its settings; keep one"
        )
    if polygons:
        side = size * _FINER
        canvas = Image.new("L", (side, side))
        for polygon in polygons:
            # Pixel centres lie at half numbers.
            ImageDraw.Draw(canvas).polygon([(x * side - 0.5, y * side - 0.5) for x, y in polygon], fill=255)
        region = np.asarray(canvas) > 0
    elif path.exists() or path.is_symlink():
        region = read_mask(path) > 0
        width, height = displayed_size(category.train[0])
        if region.shape != (height, width):
            raise UserError(
                f"{path} is {region.shape[1]}x{region.shape[0]}, but the images, like {category.train[0].name}, are "
                f"{width}x{height}; draw it over one of the images"
            )
    else:
        return None
    coverage = Image.fromarray(region.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX)
    inspected = np.asarray(coverage) >= 128
    if not inspected.any():
        raise UserError(
            f"the region of interest of {category.name} is empty; what is to be inspected has to be white"
        )
    return inspected
