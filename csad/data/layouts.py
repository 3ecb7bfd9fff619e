"""The data set's layouts, recognised by themselves (csad/data/conventions.py). A data set is only read.

Where there are no validation images, a share of the training images is set aside. Folders may hold folders, links are followed,
and what is left out is named (`Category.unused`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from csad.data import files
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
    advice_on_other_layout,
)
from csad.data.image_files import SUFFIXES, displayed_size, is_lossy
from csad.data.images import read_mask
from csad.data.listing import CLUTTER, Unused, count, entries, reason_to_skip, unique_names, walk
from csad.errors import UserError

import numpy as np

__all__ = ["GOOD", "LOGICAL", "SPLITS", "STRUCTURAL", "Category", "Dataset", "Loco", "test_splits"]

VALIDATION_SHARE = 0.15  # of the training images, where a data set has no validation images
FEWEST_TRAINING_IMAGES = 5  # to set some aside from
FEWEST_WITH_VALIDATION = 4  # where there are validation images of their own
_MANY, _OF_MANY = 40, 10  # from so many training images on, at least so many are set aside


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

    def __post_init__(self):
        if self.logical_defects:
            if not isinstance(self._layout, FolderPerDefect):
                raise UserError(
                    f"{self.name} has the layout '{self.layout}', in which folders say what is logical; the setting "
                    f"logical ({', '.join(self.logical_defects)}) is for layouts with a folder for each defect"
                )
            self._layout.tests(self.root, self.logical_defects)

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.root)).name  # "." has none, and a link keeps its own

    @property
    def layout(self) -> str:
        return self._layout.name

    @cached_property
    def _walk(self) -> Callable[[Path], tuple[list[Path], Unused]]:
        root = self.root  # not self, which then would never be let go
        return cache(lambda folder: walk(folder, flat=folder == root))

    def _some_images(self, folder: Path) -> list[Path]:
        images = self._walk(folder)[0]
        if not images:
            raise UserError(f"no images in {folder}; expected files ending in {', '.join(SUFFIXES)}")
        return images

    @cached_property
    def _layout(self) -> Layout:
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
        folder = self._training_folder
        images = self._some_images(folder)
        bad = sorted(
            {
                part
                for path in images
                for part in path.relative_to(folder).parts[:-1]
                if part.lower() in BAD_NAMES
            }
        )
        if bad:
            raise UserError(
                f"{folder} holds a folder {bad[0]}, but training images have to be good ones; put the good ones into "
                f"{self.root / 'train' / self._layout.good}"
            )
        own = self._folder("validation")
        if own is not None:
            if len(images) < FEWEST_WITH_VALIDATION:
                raise UserError(
                    f"{self.name} has {count(len(images), 'training image')}; at least {FEWEST_WITH_VALIDATION} are "
                    f"needed to learn what is usual, put more into {folder}"
                )
            return images, self._some_images(own)
        if len(images) < FEWEST_TRAINING_IMAGES:
            raise UserError(
                f"{self.name} has {count(len(images), 'training image')} and none for validation; at least "
                f"{FEWEST_TRAINING_IMAGES} are needed to set some aside, or put some into "
                f"{self.root / 'validation' / GOOD}"
            )
        keys = unique_names(images, folder)
        # Ranked by hash: it depends on the names alone, on no library's version, and few change sides when images join.
        ranked = sorted(
            images,
            key=lambda path: hashlib.sha256(f"0 {keys[path]}".encode(errors="surrogateescape")).digest(),
        )
        aside = set(ranked[: _set_aside(len(images))])
        return [path for path in images if path not in aside], sorted(aside)

    @cached_property
    def _training_folder(self) -> Path:
        folder = self._folder("train")
        if folder is not None:
            return folder
        if self._walk(self.root)[0]:
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
        good = folder / self._layout.good
        return good if good.is_dir() else folder if folder.is_dir() else None

    # Test

    @property
    def tested(self) -> bool:
        """Whether there are test images: they are optional, and without good ones nothing can be measured."""
        return bool(self._tests.get(GOOD))

    def test(self, split: str) -> list[Path]:
        """Test images of one split; empty where the category has no folder for it."""
        return [image for folder in self._tests.get(split, []) for image in self._some_images(folder)]

    @property
    def test_images(self) -> list[tuple[str, Path]]:
        """(split, path) of every test image: good, then logical, then structural."""
        return [(split, path) for split in SPLITS for path in self.test(split)]

    @cached_property
    def _tests(self) -> dict[str, list[Path]]:
        return self._layout.tests(self.root, self.logical_defects)

    @property
    def defect_folders(self) -> dict[str, list[str]]:
        """The defects by the split that they count as, in layouts with a folder for each; empty in others."""
        if not isinstance(self._layout, FolderPerDefect):
            return {}
        return {
            split: [folder.name for folder in self._tests.get(split, [])] for split in (LOGICAL, STRUCTURAL)
        }

    @cached_property
    def displayed_size(self) -> Callable[[Path], tuple[int, int]]:
        """See `csad.data.image_files.displayed_size`; each image is asked once, because a PNG may say how it lies after its pixels."""
        return cache(displayed_size)

    @property
    def defects_config(self) -> Path:
        return self.root / "defects_config.json"

    def region_masks(self, split: str, image: Path) -> list[Path]:
        """Ground truth of one test image: one mask per annotated region (one for all in MVTec AD's layout), none if it is good.

        Raises:
            UserError: another image of the folder may be the one that the masks belong to.
        """
        found = [] if split == GOOD else self._layout.masks(self.root, image)
        if found:
            if sum(image.with_name(image.stem + suffix).exists() for suffix in {*SUFFIXES, image.suffix}) > 1:
                raise UserError(
                    f"two images in {image.parent} are called '{image.stem}', and {found[0]} may belong to either; "
                    "give them different names"
                )
        return found

    def defect_of(self, split: str, image: Path) -> str | None:
        """The name of a test image's defect, several as 'a + b'; None for good images and where nothing tells it.

        Raises:
            UserError: defects_config.json or a mask cannot be read.
        """
        if split == GOOD:
            return None
        named = self._layout.defect(self.root, image)
        if named is not None:
            return named
        if self._defect_names:
            values = [
                pixel_value(path, read_mask(path), self._defect_names)
                for path in self.region_masks(split, image)
            ]
            if values and all(value in self._defect_names for value in values):
                return " + ".join(sorted({self._defect_names[value] for value in values}))
        found = self._rendered_defects.get(split, {}).get(image.stem)
        return str(found) if found else None

    @cached_property
    def _defect_names(self) -> dict[int, str]:
        """By the masks' values, from defects_config.json."""
        if not self.defects_config.exists():
            return {}
        try:
            return {
                int(entry["pixel_value"]): str(entry["defect_name"])
                for entry in files.read_json(self.defects_config, files.MEND)
            }
        except (KeyError, TypeError, ValueError):
            return {}  # localisation says what is wrong with it

    @cached_property
    def _rendered_defects(self) -> dict[str, dict[str, str]]:
        """By split and image, of the rendered data set."""
        data_set = Path(os.path.abspath(self.root)).parent
        described = data_set.with_name(f"{data_set.name}_components") / self.name / "classes.json"
        said = files.read_json(described, files.MEND) if described.exists() else None
        return said.get("anomalies", {}) if isinstance(said, dict) else {}

    # Names, region of interest, what is said of it

    def key(self, image: Path) -> str:
        """A name for files made from an image, unique within its list: the stem, after its folders' names if there are any."""
        if image not in self._keys:
            raise ValueError(f"{image} is no image of {self.root}")
        return self._keys[image]

    @cached_property
    def _keys(self) -> dict[Path, str]:
        return {
            path: key
            for folders, base in self._lists
            for path, key in unique_names(
                [path for folder in folders for path in self._walk(folder)[0]], base
            ).items()
        }

    @cached_property
    def _lists(self) -> list[tuple[list[Path], Path]]:
        """The folders of every list of images, and the one from which their names count."""
        training, validation = self._training_folder, self._folder("validation")
        lists = [([training], training)] + ([([validation], validation)] if validation else [])
        for split, folders in self._tests.items():
            if folders:
                by_defect = split != GOOD and isinstance(self._layout, FolderPerDefect)
                lists.append((folders, self.root / "test" if by_defect else folders[0]))
        return lists

    @property
    def roi_file(self) -> Path:
        """The region of interest, white = inspected (csad/data/roi.py); optional."""
        return self.root / "roi.png"

    @property
    def layout_line(self) -> str:
        """What the stages will see, in one line."""
        train, validation = self._train_and_validation
        parts = [count(len(train), "training image"), count(len(validation), "validation image")]
        if self.validation_is_held_out:
            parts[1] += (
                f" (set aside from {len(train) + len(validation)} training images, there are no others)"
            )
        tested = [
            f"{len(images)} {folder.name}" + (" (logical)" if folder.name in self.logical_defects else "")
            for split in SPLITS
            for folder in self._tests.get(split, [])
            if (images := self._some_images(folder))
        ]
        parts.append(
            f"test images: {', '.join(tested)}" if tested else "no test images, so nothing to measure"
        )
        if tested and not self.tested:
            parts.append("no good test images, so nothing to measure")
        if self.roi_file.exists():
            parts.append("only the white part of roi.png is inspected")
        unused = self.unused
        if unused:
            names = ", ".join(f"{path.relative_to(self.root)} ({why})" for path, why in unused[:2])
            parts.append(f"{len(unused)} not used: {names}{', ...' if len(unused) > 2 else ''}")
        return f"{self.name} ({self.layout}): {'; '.join(parts)}"

    @property
    def listed(self) -> dict[str, list[Path]]:
        """Folder -> its images, of all folders that are used, without a complaint about what is too few or empty."""
        return {
            str(folder.relative_to(self.root)): self._walk(folder)[0]
            for folders, _ in self._lists
            for folder in folders
        }

    @property
    def unused(self) -> Unused:
        """Everything in the category's folders that will not be used, and why; texts beside the folders are no part of it."""
        tests, training = self._tests, self._training_folder
        used = {folder for folders, _ in self._lists for folder in folders}
        found = [entry for folder in used for entry in self._walk(folder)[1]]
        parts = ["train", "validation", *(["test"] if tests else [])]
        for path in entries(self.root) if training != self.root else []:
            if reason := reason_to_skip(path.name):
                found.append((path, reason))
            elif path.is_dir() and path.name not in (*parts, "ground_truth"):
                images = count(len(self._walk(path)[0]), "image")
                found.append((path, f"a folder that the layout '{self.layout}' does not have, with {images}"))
            elif path.suffix.lower() in SUFFIXES and not path.is_dir() and path != self.roi_file:
                found.append((path, "an image beside the layout's folders"))
        for part in (self.root / name for name in parts):
            only = " and ".join(sorted(folder.name for folder in used if folder.parent == part))
            for path in entries(part) if part not in used else []:
                if reason := reason_to_skip(path.name):
                    found.append((path, reason))
                elif path not in used:
                    images = f"; it holds {count(len(self._walk(path)[0]), 'image')}" if path.is_dir() else ""
                    found.append((path, f"of {part.name}/ only {only or 'nothing'} is used{images}"))
        masks = {
            mask
            for split in (LOGICAL, STRUCTURAL)
            for folder in tests.get(split, [])
            for image in self._walk(folder)[0]
            for mask in self._layout.masks(self.root, image)
        }
        if (self.root / "ground_truth").is_dir():
            there, odd = self._walk(self.root / "ground_truth")
            found += odd + [
                (path, "a mask that belongs to no test image") for path in there if path not in masks
            ]
        return sorted(dict(found).items())


@dataclass(frozen=True)
class Dataset:
    """A folder of categories, each in any of the layouts, or a single category."""

    root: Path

    def select(
        self, names: Sequence[str] | None, logical_defects: Mapping[str, Sequence[str]] | None = None
    ) -> list[Category]:
        """The named categories in the given order, or all there are, sorted.

        Args:
            logical_defects: category -> the defects that are logical, where its layout has a folder for each.

        Raises:
            UserError: no data set at this place, or it has no such category.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"{self.root} is a file; name the folder of the data set with --dataset_root")
        if not self.root.is_dir():
            raise UserError(
                f"data set folder {self.root} does not exist; put MVTec LOCO AD there, name another with "
                "--dataset_root, or render the built-in one with make_synthetic_loco.py"
            )
        found = {
            path.name: path
            for path in entries(self.root)
            if not reason_to_skip(path.name) and _folder_is_category(path)
        }
        if not found and self._is_one_category:
            found = {Category(self.root).name: self.root}
        if not found:
            advice = next(filter(None, map(advice_on_other_layout, [self.root, *entries(self.root)])), None)
            raise UserError(
                f"no category in {self.root}: "
                + (advice or f"expected folders like {self.root}/screw_bag/train/good")
            )
        for name in names or []:
            if name not in found:
                raise UserError(
                    f"there is no category '{name}' in {self.root}; it has {', '.join(sorted(found))}"
                )
        chosen = dict.fromkeys(names or sorted(found))
        return [Category(found[name], tuple((logical_defects or {}).get(name, ()))) for name in chosen]

    @property
    def unused(self) -> Unused:
        """Folders that are no category, and hidden ones."""
        if self._is_one_category:
            return []
        return [
            (path, advice_on_other_layout(path) or "a folder without train/, so no category")
            for path in entries(self.root)
            if path.is_dir() and not _folder_is_category(path) and reason_to_skip(path.name) != CLUTTER
        ]

    @property
    def _is_one_category(self) -> bool:
        return _folder_is_category(self.root) or bool(walk(self.root, flat=True)[0])


def test_splits(category: Category) -> dict[str, list[Path]]:
    """The test images by split; empty where there are no good ones, because then nothing can be measured."""
    return {split: category.test(split) for split in SPLITS} if category.tested else {}


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


def _folder_is_category(path: Path) -> bool:
    return (path / "train").is_dir()


def _set_aside(images: int) -> int:
    """How many of the training images become validation images; ``images`` is at least `FEWEST_TRAINING_IMAGES`."""
    least = _OF_MANY if images >= _MANY else 1 if images < 10 else 2
    return max(least, int(VALIDATION_SHARE * images + 0.5))
