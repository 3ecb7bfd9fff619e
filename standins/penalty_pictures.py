"""ImageNet-like pictures on which LGST's student should say nothing (docs/METHOD.md section 3).

Without ImageNet, crops of the photographs that scikit-image and scikit-learn bring along take their place.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files as package_files
from pathlib import Path

import numpy as np
from PIL import Image

from data import images
from errors import UserError

BUNDLED = "bundled"
RESIZED = 512  # side of a picture before its centre is cut out
GREY_PROBABILITY = 0.3
LEAST_CROP = 0.4  # of the shorter side of a bundled photograph
PHOTOGRAPHS = {"skimage.data": ("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
                                "gravel.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
               "sklearn.datasets.images": ("china.jpg", "flower.jpg")}


class PenaltyPictures:
    """A source of penalty pictures.

    Args:
        source: a folder of pictures, or ``bundled`` for crops of bundled photographs.

    Attributes:
        stand_ins: what stands in for ImageNet, for records.

    Raises:
        UserError: the folder has no pictures, or the packages bring none.
    """

    def __init__(self, source: str):
        self.paths: list[Path] = []
        self.stand_ins: list[str] = []
        if source == BUNDLED:
            self.stand_ins = ["bundled penalty pictures"]
            _photographs()
        else:
            folder = Path(source).expanduser()
            self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in images.SUFFIXES)
            if not self.paths:
                raise UserError(f"lgst.penalty_images: no pictures under {source}; name a folder of pictures or '{BUNDLED}'")

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One picture (1, 3, 256, 256), float32 RGB in 0..255: resized to 512, grey with p 0.3, centre 256."""
        if self.paths:
            picture = images.read_rgb(self.paths[rng.integers(len(self.paths))])
        else:
            photographs = _photographs()
            picture = _crop(photographs[rng.integers(len(photographs))], rng)
        picture = images.resize(picture, RESIZED)
        margin = (RESIZED - images.SIZE) // 2
        picture = picture[margin:margin + images.SIZE, margin:margin + images.SIZE]
        if rng.random() < GREY_PROBABILITY:
            picture = np.repeat(np.asarray(Image.fromarray(picture).convert("L"))[..., None], 3, axis=2)
        return picture.transpose(2, 0, 1)[None].astype(np.float32)


def _crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square, mirrored half of the time."""
    height, width = picture.shape[:2]
    side = int(rng.uniform(LEAST_CROP, 1) * min(height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    picture = picture[top:top + side, left:left + side]
    return picture[:, ::-1] if rng.random() < 0.5 else picture


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    found = []
    for package, names in PHOTOGRAPHS.items():
        paths = [package_files(package) / name for name in names]
        found += [images.read_rgb(Path(str(path))) for path in paths if path.is_file()]
    if not found:
        raise UserError("scikit-image and scikit-learn bring no photographs here; name a folder of pictures with "
                        "--lgst.penalty_images")
    return tuple(found)
