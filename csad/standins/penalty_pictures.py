"""ImageNet-like pictures on which LGST's student should say nothing (docs/method.md section 3).

The published ones are the training images of tiny-imagenet, 64x64 pixels each, read from its archive as it was published.
Without it, crops of the photographs that scikit-image and scikit-learn bring along take their place.
"""

from __future__ import annotations

import zipfile
from functools import cache
from importlib.resources import files as package_files
from io import BytesIO
from pathlib import Path

from csad.data import image_files, images
from csad.data.downloads import Checkpoint, obtain, sha256
from csad.errors import UserError

import numpy as np
from PIL import Image

AUTO, BUNDLED, TINY_IMAGENET = "auto", "bundled", "tiny-imagenet"
# The SHA-256 is what many public repositories note of this file (as its MD5, 90528d7ca1a48142e341f4ef8d21d0de).
ARCHIVE = Checkpoint(
    "tiny-imagenet-200.zip",
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
    248,
    "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
)
RESIZED = 512  # side of a picture before its centre is cut out
GREY_PROBABILITY = 0.3
MIN_CROP = 0.4  # of the shorter side of a bundled photograph
PHOTOGRAPHS = {
    "skimage.data": "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png "
    "motorcycle_left.png retina.jpg rocket.jpg",
    "sklearn.datasets.images": "china.jpg flower.jpg",
}


class PenaltyPictures:
    """A source of penalty pictures.

    Args:
        source: ``tiny-imagenet``, a folder of pictures, ``bundled`` for crops of bundled photographs, or ``auto``:
            tiny-imagenet where its archive is at hand, else the photographs, which it then says.
        downloads: folder in which the archive lies.

    Attributes:
        stand_ins: what stands in for ImageNet, for records.

    Raises:
        UserError: the archive is missing or is not the published one, the folder has no pictures, or the packages bring none.
    """

    def __init__(self, source: str, downloads: Path = Path("ckpt")):
        self.paths: list[Path] = []
        self.archive: zipfile.ZipFile | None = None
        self.stand_ins: list[str] = []
        if source == AUTO:
            source = TINY_IMAGENET if (downloads / ARCHIVE.file).exists() else BUNDLED
            if source == BUNDLED:
                print(
                    f"penalty pictures: crops of bundled photographs instead of tiny-imagenet; to have that, put "
                    f"{ARCHIVE.file} into {downloads}, or let --download do it ({ARCHIVE.megabytes:g} MB)"
                )
        if source == TINY_IMAGENET:
            self.archive, self.names = _opened(obtain(ARCHIVE, downloads, download=False))
        elif source == BUNDLED:
            self.stand_ins = ["bundled penalty pictures"]
            _photographs()
        else:
            folder = Path(source).expanduser()
            suffixes = image_files.SUFFIXES
            self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
            if not self.paths:
                raise UserError(
                    f"lgst.penalty_images: no pictures under {source}; name a folder of pictures, '{TINY_IMAGENET}' "
                    f"or '{BUNDLED}'"
                )

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One picture (1, 3, 256, 256), float32 RGB in 0..255: resized to 512, grey with p 0.3, centre 256."""
        if self.archive is not None:
            picture = images.read_rgb(BytesIO(self.archive.read(self.names[rng.integers(len(self.names))])))
        elif self.paths:
            picture = images.read_rgb(self.paths[rng.integers(len(self.paths))])
        else:
            photographs = _photographs()
            picture = _crop(photographs[rng.integers(len(photographs))], rng)
        picture = images.resize(picture, RESIZED)
        margin = (RESIZED - images.SIZE) // 2
        picture = picture[margin : margin + images.SIZE, margin : margin + images.SIZE]
        if rng.random() < GREY_PROBABILITY:
            picture = np.repeat(np.asarray(Image.fromarray(picture).convert("L"))[..., None], 3, axis=2)
        return picture.transpose(2, 0, 1)[None].astype(np.float32)


@cache  # its list of 120,000 files is read once, however many categories there are
def _opened(path: Path) -> tuple[zipfile.ZipFile, list[str]]:
    """The archive of tiny-imagenet, and the names of its training images, sorted.

    It is compared with the published one as a whole: damage would otherwise end a training in its middle.

    Raises:
        UserError: it is another file.
    """
    if (fetched := sha256(path)) != ARCHIVE.sha256:
        raise UserError(
            f"{path} is not the published archive (SHA-256 {fetched}, published {ARCHIVE.sha256}); delete it and "
            f"fetch it again with CSAD.py --download, or take --lgst.penalty_images {BUNDLED}"
        )
    archive = zipfile.ZipFile(path)
    training = [name for name in archive.namelist() if "/train/" in name and name.endswith(".JPEG")]
    return archive, sorted(training)


def _crop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square, mirrored half of the time."""
    height, width = picture.shape[:2]
    side = int(rng.uniform(MIN_CROP, 1) * min(height, width))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    picture = picture[top : top + side, left : left + side]
    return picture[:, ::-1] if rng.random() < 0.5 else picture


@cache
def _photographs() -> tuple[np.ndarray, ...]:
    photographs = []
    for package, names in PHOTOGRAPHS.items():
        paths = [package_files(package) / name for name in names.split()]
        photographs += [images.read_rgb(Path(str(path))) for path in paths if path.is_file()]
    if not photographs:
        raise UserError(
            "scikit-image and scikit-learn bring no photographs here; name a folder of pictures with "
            "--lgst.penalty_images"
        )
    return tuple(photographs)
