"""The data set: MVTec LOCO AD's layout (docs/METHOD.md). It is only read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
GOOD, LOGICAL, STRUCTURAL = "good", "logical_anomalies", "structural_anomalies"
SPLITS = (GOOD, LOGICAL, STRUCTURAL)


@dataclass(frozen=True)
class Category:
    """The images of one category, every list in sorted order.

    Raises:
        UserError: an asked-for split has no images, or two images of one folder share a stem.
    """

    root: Path

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def train(self) -> list[Path]:
        return _images(self.root / "train" / GOOD)

    @property
    def validation(self) -> list[Path]:
        return _images(self.root / "validation" / GOOD)

    @property
    def tested(self) -> bool:
        """Whether there are test images: they are optional, and without good ones nothing can be measured."""
        return (self.root / "test" / GOOD).is_dir()

    def test(self, kind: str) -> list[Path]:
        """Test images of one kind; empty where the category has no folder for that kind of anomaly."""
        folder = self.root / "test" / kind
        if kind != GOOD and not folder.is_dir():
            return []
        return _images(folder)

    @property
    def test_images(self) -> list[tuple[str, Path]]:
        """(kind, path) of every test image: good, then logical, then structural."""
        return [(kind, path) for kind in SPLITS for path in self.test(kind)]

    def key(self, path: Path) -> str:
        """A name of an image that is unique within its list, for output files."""
        return path.stem

    def defect_of(self, split: str, path: Path) -> str | None:
        """The name of the defect that a test image shows, where it is known."""
        return None

    @property
    def defects_config(self) -> Path:
        return self.root / "defects_config.json"

    def region_masks(self, kind: str, image: Path) -> list[Path]:
        """Ground truth of one test image: one mask per annotated region, none for a good image."""
        return sorted((self.root / "ground_truth" / kind / image.stem).glob("*.png"))


@dataclass(frozen=True)
class Dataset:
    """A folder of categories in MVTec LOCO AD's layouts."""

    root: Path

    def select(self, names: Sequence[str] | None) -> list[Category]:
        """The named categories in the given order, or all there are, sorted.

        Raises:
            UserError: no data set at this place, or it has no such category.
        """
        if not self.root.is_dir():
            raise UserError(f"data set folder {self.root} does not exist; put MVTec LOCO AD there, name another with "
                            "--dataset_root, or render the built-in one with make_synthetic_loco.py")
        found = sorted(folder.parent.name for folder in self.root.glob("*/train") if folder.is_dir())
        if not found:
            raise UserError(f"no category in {self.root}: expected folders like {self.root}/screw_bag/train/good")
        for name in names or []:
            if name not in found:
                raise UserError(f"there is no category '{name}' in {self.root}; it has {', '.join(found)}")
        return [Category(self.root / name) for name in names or found]


def test_splits(category: Category) -> dict[str, list[Path]]:
    """The test images by split; empty where there are no good ones, because then nothing can be measured."""
    return {split: category.test(split) for split in SPLITS} if category.tested else {}


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist; MVTec LOCO AD's layout has it")
    images = sorted(path for path in folder.iterdir()
                    if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    if not images:
        raise UserError(f"no images in {folder}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    stems = set()
    for path in images:
        if path.stem in stems:
            raise UserError(f"two images in {folder} are called '{path.stem}'; give them different names")
        stems.add(path.stem)
    return images
