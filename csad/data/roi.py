"""The region of interest: outside of it nothing counts. `roi.png` in a category's folder, or polygons in its settings."""

from __future__ import annotations

from collections.abc import Sequence

from csad.data.images import read_mask
from csad.data.layouts import Category
from csad.errors import UserError

import numpy as np
from PIL import Image, ImageDraw

Polygon = Sequence[Sequence[float]]  # [[x, y], ...] in image sides, 0..1, from the top left corner
_FINER = 4  # polygons are drawn so many times larger: a cell counts where at least half of it is inside


def read_roi(category: Category, size: int, polygons: Sequence[Polygon] | None = None) -> np.ndarray | None:
    """What of a view is inspected.

    Args:
        size: side of the view.
        polygons: the region from the settings, all polygons together; only where there is no roi.png.

    Returns:
        (size, size) bool, True = inspected; None where everything is.

    Raises:
        UserError: roi.png is unreadable, empty or of another size than the images; a polygon is none; both are given.
    """
    path = category.roi_file
    if polygons and path.exists():
        raise UserError(
            f"{category.name} has a region of interest twice, {path} and polygons in its settings; keep one"
        )
    if polygons:
        region = _draw(polygons, size * _FINER)
    elif path.exists() or path.is_symlink():
        region = read_mask(path) > 0
        width, height = category.displayed_size(category.train[0])
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


def _draw(polygons: Sequence[Polygon], side: int) -> np.ndarray:
    """Fill the polygons, (side, side) bool."""
    canvas = Image.new("L", (side, side))
    for number, polygon in enumerate(polygons, 1):
        try:
            points = [(float(x), float(y)) for x, y in polygon]
        except (TypeError, ValueError) as problem:
            raise UserError(
                f"polygon {number} of the region of interest is {polygon!r}, expected [[x, y], [x, y], ...]"
            ) from problem
        if len(points) < 3 or not all(0 <= value <= 1 for point in points for value in point):
            raise UserError(
                f"polygon {number} of the region of interest needs at least three points with x and y from 0 to 1, "
                f"got {polygon!r}"
            )
        # Pixel centres lie at half numbers.
        ImageDraw.Draw(canvas).polygon([(x * side - 0.5, y * side - 0.5) for x, y in points], fill=255)
    return np.asarray(canvas) > 0
