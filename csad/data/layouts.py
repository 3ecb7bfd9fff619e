"""The data set's layouts, recognised by themselves (csad/data/conventions.py). A data set is only read.

Where there are no validation images, some of the training images are held out. Folders may hold folders, links are
followed, and what is left out is named (csad/data/checks.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from csad.data.conventions import (
    BAD_NAMES,
    GOOD,
    LAYOUTS,
    LOGICAL,
    SPLITS,
    STRUCTURAL,
    FolderPerDefect,
    Layout,
    Loco,
)
from csad.data.image_files import SUFFIXES
from csad.data.listing import Unused, count, unique_names, walk
from csad.errors import UserError

__all__ = ["GOOD", "LOGICAL", "SPLITS", "STRUCTURAL", "Category", "Loco", "test_splits"]

MIN_WITH_VALIDATION = 4  # training images, where there are validation images of their own
MIN_WITHOUT_VALIDATION = 5  # training images, of which some are held out
HELD_OUT = 0.15  # of the training images
_MANY, _MIN_OF_MANY = 40, 10  # from so many training images on, at least so many are held out


@dataclass(frozen=True)
class Category:
    """The images of one category, every list in sorted order. One object looks at the disk once: make another to look again.

    Args:
        root: the category's folder.
        logical_defects: in a layout with a folder for each defect, those that are logical anomalies; the others are structural.

    Raises:
        UserError: a split has no images, two layouts are mixed, a defect is not there, or there are too few images.
    """

    root: Path
    logical_defects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.logical_defects:
            if not isinstance(self.convention, FolderPerDefect):
                raise UserError(
                    f"{self.name} has the layout '{self.layout}', in which folders say what is logical; the setting "
                    f"logical ({', '.join(self.logical_defects)}) is for layouts with a folder for each defect"
                )
            self.convention.tests(self.root, self.logical_defects)

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.root)).name  # "." has none, and a link keeps its own

    @property
    def layout(self) -> str:
        return self.convention.name

    @cached_property
    def walk(self) -> Callable[[Path], tuple[list[Path], Unused]]:
        """See `csad.data.listing.walk`; each folder is walked once."""
        root = self.root  # not self, which then would never be let go
        return cache(lambda folder: walk(folder, flat=folder == root))

    def images_in(self, folder: Path) -> list[Path]:
        """The images of a folder of this category, sorted; UserError if there are none."""
        images = self.walk(folder)[0]
        if not images:
            raise UserError(f"no images in {folder}; expected files ending in {', '.join(SUFFIXES)}")
        return images

    @cached_property
    def convention(self) -> Layout:
        return next(layout for layout in LAYOUTS if layout.recognises(self.root))

    # Training and validation

    @property
    def train(self) -> list[Path]:
        return self._train_and_validation[0]

    @property
    def validation(self) -> list[Path]:
        return self._train_and_validation[1]

    @property
    def validation_is_held_out(self) -> bool:
        """Whether the validation images are set aside from the training images, for want of others."""
        return self._folder("validation") is None

    @cached_property
    def _train_and_validation(self) -> tuple[list[Path], list[Path]]:
        folder = self.training_folder
        images = self.images_in(folder)
        folders = {part for path in images for part in path.relative_to(folder).parts[:-1]}
        if bad := [name for name in folders if name.lower() in BAD_NAMES]:
            raise UserError(
                f"{folder} holds a folder {min(bad)}, but training images have to be good ones; put the good ones into "
                f"{self.root / 'train' / self.convention.good}"
            )
        validation_folder = self._folder("validation")
        if validation_folder is not None:
            if len(images) < MIN_WITH_VALIDATION:
                raise UserError(
                    f"{self.name} has {count(len(images), 'training image')}; at least {MIN_WITH_VALIDATION} are "
                    f"needed to learn what is usual, put more into {folder}"
                )
            return images, self.images_in(validation_folder)
        if len(images) < MIN_WITHOUT_VALIDATION:
            raise UserError(
                f"{self.name} has {count(len(images), 'training image')} and none for validation; at least "
                f"{MIN_WITHOUT_VALIDATION} are needed to set some aside, or put some into "
                f"{self.root / 'validation' / GOOD}"
            )
        aside = held_out(unique_names(images, folder))
        return [path for path in images if path not in aside], sorted(aside)

    @cached_property
    def training_folder(self) -> Path:
        folder = self._folder("train")
        if folder is not None:
            return folder
        if self.walk(self.root)[0]:
            return self.root
        raise UserError(
            f"folder {self.root / 'train' / GOOD} does not exist; every layout has its training images there "
            "(or in train/ alone)"
        )

    def _folder(self, part: str) -> Path | None:
        """{part}/good if there is such a folder, else {part} itself, else None."""
        folder = self.root / part
        if part == "train" and all((folder / layout.good).is_dir() for layout in LAYOUTS):
            names = " and ".join(sorted({layout.good for layout in LAYOUTS}))
            raise UserError(f"{folder} has the folders {names} of two layouts; keep one of them")
        good = folder / self.convention.good
        return good if good.is_dir() else folder if folder.is_dir() else None

    # Test

    @property
    def tested(self) -> bool:
        """Whether there are test images: they are optional, and without good ones nothing can be measured."""
        return bool(self.test_folders.get(GOOD))

    def test(self, split: str) -> list[Path]:
        """Test images of one split; empty where the category has no folder for it."""
        return [image for folder in self.test_folders.get(split, []) for image in self.images_in(folder)]

    @property
    def test_images(self) -> list[tuple[str, Path]]:
        """(split, path) of every test image: good, then logical, then structural."""
        return [(split, path) for split in SPLITS for path in self.test(split)]

    @cached_property
    def test_folders(self) -> dict[str, list[Path]]:
        """Split -> folders of its test images."""
        return self.convention.tests(self.root, self.logical_defects)

    @property
    def defects_config(self) -> Path:
        return self.root / "defects_config.json"

    def region_masks(self, split: str, image: Path) -> list[Path]:
        """Ground truth of one test image: one mask per annotated region (one for all in MVTec AD's layout),
        empty if it is good; UserError if another image of the folder may be the one that the masks belong
        to."""
        masks = [] if split == GOOD else self.convention.masks(self.root, image)
        of_this_name = {image.stem + suffix for suffix in {*SUFFIXES, image.suffix}}
        if masks and sum(image.with_name(name).exists() for name in of_this_name) > 1:
            raise UserError(
                f"two images in {image.parent} are called '{image.stem}', and {masks[0]} may belong to either; "
                "give them different names"
            )
        return masks

    # Names, region of interest

    def key(self, image: Path) -> str:
        """A name for files made from an image, unique within its list: the stem, after its folders' names if there are any."""
        if image not in self._keys:
            raise ValueError(f"{image} is no image of {self.root}")
        return self._keys[image]

    @cached_property
    def _keys(self) -> dict[Path, str]:
        keys: dict[Path, str] = {}
        for folders, base in self.folder_lists:
            keys |= unique_names([path for folder in folders for path in self.walk(folder)[0]], base)
        return keys

    @cached_property
    def folder_lists(self) -> list[tuple[list[Path], Path]]:
        """The folders of every list of images, and the one from which their names count."""
        training, validation = self.training_folder, self._folder("validation")
        lists = [([training], training)] + ([([validation], validation)] if validation else [])
        for split, folders in self.test_folders.items():
            if folders:
                by_defect = split != GOOD and isinstance(self.convention, FolderPerDefect)
                lists.append((folders, self.root / "test" if by_defect else folders[0]))
        return lists

    @property
    def roi_file(self) -> Path:
        """The region of interest, white = inspected (csad/data/roi.py); optional."""
        return self.root / "roi.png"

    @property
    def listed(self) -> dict[str, list[Path]]:
        """Folder -> its images, of all folders that are used, without a complaint about what is too few or empty."""
        folders = [folder for folders, _ in self.folder_lists for folder in folders]
        return {str(folder.relative_to(self.root)): self.walk(folder)[0] for folder in folders}


def held_out(keys: Mapping[Path, str]) -> set[Path]:
    """The training images, by their unique names, that become validation images where there are no others.

    Ranked by the hash of their names: the choice depends on the names alone, on no library's version, and few images
    change sides when others join.
    """
    at_least = _MIN_OF_MANY if len(keys) >= _MANY else 1 if len(keys) < 10 else 2
    number = max(at_least, int(HELD_OUT * len(keys) + 0.5))

    def rank(path: Path) -> bytes:
        return hashlib.sha256(f"0 {keys[path]}".encode(errors="surrogateescape")).digest()

    return set(sorted(keys, key=rank)[:number])


def test_splits(category: Category) -> dict[str, list[Path]]:
    """The test images by split; empty where there are no good ones, because then nothing can be measured."""
    return {split: category.test(split) for split in SPLITS} if category.tested else {}
