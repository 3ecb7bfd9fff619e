"""The data set's layouts, recognised by themselves. A data set is only read.

    MVTec LOCO AD   train/good  validation/good  test/{good,logical_anomalies,structural_anomalies}
                                                 ground_truth/{logical_anomalies,structural_anomalies}/{image}/*.png
    MVTec AD        train/good                   test/{good,any defect}  ground_truth/{defect}/{image}_mask.png
    BTAD            train/ok                     test/{ok,ko}            ground_truth/ko/{image}.png
    plain folder    train/good, train/ or the images alone

Where there are no validation images, a share of the training images is set aside. Folders may hold folders, links are followed,
and what is left out is named (`Category.unused`). A new layout is one class and its place in `LAYOUTS`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data.images import SUFFIXES, read_mask
from errors import UserError

IMAGE_SUFFIXES = SUFFIXES
GOOD, LOGICAL, STRUCTURAL = "good", "logical_anomalies", "structural_anomalies"
SPLITS = (GOOD, LOGICAL, STRUCTURAL)

VALIDATION_SHARE = 0.15  # of the training images, where a data set has no validation images
FEWEST_TRAINING_IMAGES = 5  # to set some aside from
FEWEST_WITH_VALIDATION = 4  # where there are validation images of their own
_MANY, _OF_MANY = 40, 10  # from so many training images on, at least so many are set aside
RESERVED_KEYS = frozenset({"info", "test_seg_output"})  # folders beside those that carry images' names
_NOT_GOOD = frozenset({"bad", "defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "ng", "nok", "ko",
                       "not_good", LOGICAL, STRUCTURAL})

Unused = list[tuple[Path, str]]  # what is left out, and why


class Layout(Protocol):
    """Where one convention puts things. ``root`` is a category's folder."""

    name: str
    good: str  # what it calls a folder of good images

    def recognises(self, root: Path) -> bool:
        """Whether a category is laid out so; the first of `LAYOUTS` that says so is taken."""

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        """Split -> folders of its test images; splits without a folder may be left out."""

    def masks(self, root: Path, image: Path) -> list[Path]:
        """Ground truth of an anomalous test image."""

    def defect(self, root: Path, image: Path) -> str | None:
        """What the place of an anomalous test image says of its defect's name."""


class Loco:
    name, good = "MVTec LOCO AD", "good"

    def recognises(self, root: Path) -> bool:
        folders = set(_folders(root / "test"))
        return bool(folders & {LOGICAL, STRUCTURAL} or (root / "defects_config.json").exists()
                    or folders == {GOOD} and (root / "validation").is_dir())

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        foreign = [name for name in _folders(root / "test") if name not in SPLITS and _marked(root / "ground_truth" / name)]
        if foreign:
            raise UserError(f"{root} mixes two layouts: test/{foreign[0]} has masks like MVTec AD's, beside test folders of "
                            f"MVTec LOCO AD's layout; keep either {LOGICAL} and {STRUCTURAL}, or one folder for each defect")
        return {kind: [root / "test" / kind] for kind in SPLITS if (root / "test" / kind).is_dir()}

    def masks(self, root: Path, image: Path) -> list[Path]:
        inside = image.relative_to(root / "test")
        return _files(root / "ground_truth" / inside.parent / image.stem)

    def defect(self, root: Path, image: Path) -> str | None:
        return None  # the masks' values say it


@dataclass(frozen=True)
class FolderPerDefect:
    """MVTec AD's layout and those that differ from it in names only."""

    name: str = "MVTec AD"
    good: str = "good"

    def recognises(self, root: Path) -> bool:
        return bool(_folders(root / "test")) and (self.good == GOOD or (root / "train" / self.good).is_dir())

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        folders = {name: root / "test" / name for name in _folders(root / "test")}
        found = {GOOD: [folders.pop(self.good)] if self.good in folders else []}
        for name in logical:
            if name not in folders:
                raise UserError(f"there is no defect '{name}' in {root / 'test'} to count as logical; it has "
                                f"{', '.join(folders) or 'none'}")
        return found | {LOGICAL: [path for name, path in folders.items() if name in logical],
                        STRUCTURAL: [path for name, path in folders.items() if name not in logical]}

    def masks(self, root: Path, image: Path) -> list[Path]:
        folder = root / "ground_truth" / image.relative_to(root / "test").parent
        for stem in (f"{image.stem}_mask", image.stem):
            found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").exists()]
            if found:
                return found[:1]
        return []

    def defect(self, root: Path, image: Path) -> str | None:
        return image.relative_to(root / "test").parts[0]


class Plain:
    name, good = "plain folder", "good"

    def recognises(self, root: Path) -> bool:
        return True

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        return {}

    def masks(self, root: Path, image: Path) -> list[Path]:
        return []

    def defect(self, root: Path, image: Path) -> str | None:
        return None


LAYOUTS: tuple[Layout, ...] = (Loco(), FolderPerDefect("BTAD", "ok"), FolderPerDefect(), Plain())


@dataclass(frozen=True)
class Category:
    """The images of one category, every list in sorted order and as it is on the disk now.

    Args:
        root: the category's folder.
        logical_defects: in a layout with a folder for each defect, those that are logical anomalies; the others are structural.

    Raises:
        UserError: a split has no images, two layouts are mixed, a defect is not there, or there are too few images.
    """

    root: Path
    logical_defects: tuple[str, ...] = ()
    _known_keys: dict[Path, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.logical_defects:
            if not isinstance(self._layout, FolderPerDefect):
                raise UserError(f"{self.name} has the layout '{self.layout}', in which folders say what is logical; the setting "
                                f"logical ({', '.join(self.logical_defects)}) is for layouts with a folder for each defect")
            self._layout.tests(self.root, self.logical_defects)

    @property
    def name(self) -> str:
        return Path(os.path.abspath(self.root)).name  # "." has none, and a link keeps its own

    @property
    def layout(self) -> str:
        return self._layout.name

    @property
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

    @property
    def _train_and_validation(self) -> tuple[list[Path], list[Path]]:
        folder = self._training_folder
        images = _some_images(folder, flat=folder == self.root)
        bad = sorted({part for path in images for part in path.relative_to(folder).parts[:-1] if part.lower() in _NOT_GOOD})
        if bad:
            raise UserError(f"{folder} holds a folder {bad[0]}, but training images have to be good ones; put the good ones into "
                            f"{self.root / 'train' / self._layout.good}")
        own = self._folder("validation")
        if own is not None:
            if len(images) < FEWEST_WITH_VALIDATION:
                raise UserError(f"{self.name} has {_count(len(images), 'training image')}; at least {FEWEST_WITH_VALIDATION} are "
                                f"needed to learn what is usual, put more into {folder}")
            return images, _some_images(own)
        if len(images) < FEWEST_TRAINING_IMAGES:
            raise UserError(f"{self.name} has {_count(len(images), 'training image')} and none for validation; at least "
                            f"{FEWEST_TRAINING_IMAGES} are needed to set some aside, or put some into "
                            f"{self.root / 'validation' / GOOD}")
        keys = _keys(images, folder)
        # Ranked by hash: it depends on the names alone, on no library's version, and few change sides when images join.
        ranked = sorted(images, key=lambda path: hashlib.sha256(f"0 {keys[path]}".encode(errors="surrogateescape")).digest())
        aside = set(ranked[:_set_aside(len(images))])
        return [path for path in images if path not in aside], sorted(aside)

    @property
    def _training_folder(self) -> Path:
        folder = self._folder("train")
        if folder is not None:
            return folder
        if _walk(self.root, flat=True)[0]:
            return self.root
        raise UserError(f"folder {self.root / 'train' / GOOD} does not exist; every layout has its training images there "
                        "(or in train/ alone)")

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
        return [image for folder in self._tests.get(split, []) for image in _some_images(folder)]

    @property
    def test_images(self) -> list[tuple[str, Path]]:
        """(split, path) of every test image: good, then logical, then structural."""
        return [(split, path) for split in SPLITS for path in self.test(split)]

    @property
    def _tests(self) -> dict[str, list[Path]]:
        return self._layout.tests(self.root, self.logical_defects)

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
                raise UserError(f"two images in {image.parent} are called '{image.stem}', and {found[0]} may belong to either; "
                                "give them different names")
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
        if self.defects_config.exists():
            entries = read_json(self.defects_config)
            try:
                names = {int(entry["pixel_value"]): str(entry["defect_name"]) for entry in entries}
            except (KeyError, TypeError, ValueError):
                names = {}  # localisation says what is wrong with it
            values = [int(read_mask(path).max()) for path in self.region_masks(split, image)]
            if values and all(value in names for value in values):
                return " + ".join(sorted({names[value] for value in values}))
        data_set = Path(os.path.abspath(self.root)).parent
        described = data_set.with_name(f"{data_set.name}_components") / self.name / "classes.json"  # of the rendered data set
        if described.exists():
            anomalies = read_json(described)
            found = anomalies.get("anomalies", {}).get(split, {}).get(image.stem) if isinstance(anomalies, dict) else None
            return str(found) if found else None
        return None

    # Names, region of interest, what is said of it

    def key(self, image: Path) -> str:
        """A name for files made from an image, unique within its list: the stem, after its folders' names if there are any."""
        if image not in self._known_keys:
            self._known_keys.clear()
            for folders, base in self._lists:
                images = [path for folder in folders for path in _walk(folder, flat=folder == self.root)[0]]
                self._known_keys.update(_keys(images, base))
        if image not in self._known_keys:
            raise ValueError(f"{image} is no image of {self.root}")
        return self._known_keys[image]

    @property
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
        """The region of interest, white = inspected (data/roi.py); optional."""
        return self.root / "roi.png"

    @property
    def layout_line(self) -> str:
        """What the stages will see, in one line."""
        train, validation = self._train_and_validation
        parts = [_count(len(train), "training image"), _count(len(validation), "validation image")]
        if self.validation_is_held_out:
            parts[1] += f" (set aside from {len(train) + len(validation)} training images, there are no others)"
        tested = [f"{len(images)} {folder.name}" + (" (logical)" if folder.name in self.logical_defects else "")
                  for split in SPLITS for folder in self._tests.get(split, []) if (images := _some_images(folder))]
        parts.append(f"test images: {', '.join(tested)}" if tested else "no test images, so nothing to measure")
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
        return {str(folder.relative_to(self.root)): _walk(folder, flat=folder == self.root)[0]
                for folders, _ in self._lists for folder in folders}

    @property
    def unused(self) -> Unused:
        """Everything in the category's folders that will not be used, and why; texts beside the folders are no part of it."""
        tests, training = self._tests, self._training_folder
        used = {folder for folders, _ in self._lists for folder in folders}
        found = [entry for folder in used for entry in _walk(folder, flat=folder == self.root)[1]]
        parts = ["train", "validation", *(["test"] if tests else [])]
        for path in _entries(self.root) if training != self.root else []:
            if path.name.startswith("."):
                found.append((path, "hidden"))
            elif path.is_dir() and path.name not in (*parts, "ground_truth"):
                images = _count(len(_walk(path)[0]), "image")
                found.append((path, f"a folder that the layout '{self.layout}' does not have, with {images}"))
            elif path.suffix.lower() in SUFFIXES and not path.is_dir() and path != self.roi_file:
                found.append((path, "an image beside the layout's folders"))
        for part in (self.root / name for name in parts):
            only = " and ".join(sorted(folder.name for folder in used if folder.parent == part))
            for path in _entries(part) if part not in used else []:
                if path not in used:
                    images = f"; it holds {_count(len(_walk(path)[0]), 'image')}" if path.is_dir() else ""
                    found.append((path, f"of {part.name}/ only {only or 'nothing'} is used{images}"))
        masks = {mask for split in (LOGICAL, STRUCTURAL) for folder in tests.get(split, []) for image in _walk(folder)[0]
                 for mask in self._layout.masks(self.root, image)}
        if (self.root / "ground_truth").is_dir():
            there, odd = _walk(self.root / "ground_truth")
            found += odd + [(path, "a mask that belongs to no test image") for path in there if path not in masks]
        return sorted(dict(found).items())


@dataclass(frozen=True)
class Dataset:
    """A folder of categories, each in any of the layouts, or a single category."""

    root: Path

    def select(self, names: Sequence[str] | None, logical_defects: Mapping[str, Sequence[str]] | None = None) -> list[Category]:
        """The named categories in the given order, or all there are, sorted.

        Args:
            logical_defects: category -> the defects that are logical, where its layout has a folder for each.

        Raises:
            UserError: no data set at this place, or it has no such category.
        """
        if not self.root.is_dir():
            raise UserError(f"data set folder {self.root} does not exist; put MVTec LOCO AD there, name another with "
                            "--dataset_root, or render the built-in one with make_synthetic_loco.py")
        found = {path.name: path for path in _entries(self.root)
                 if not path.name.startswith(".") and _folder_is_category(path)}
        if not found and ((self.root / "train").is_dir() or _walk(self.root, flat=True)[0]):
            found = {Category(self.root).name: self.root}
        if not found:
            raise UserError(f"no category in {self.root}: expected folders like {self.root}/screw_bag/train/good")
        for name in names or []:
            if name not in found:
                raise UserError(f"there is no category '{name}' in {self.root}; it has {', '.join(sorted(found))}")
        chosen = dict.fromkeys(names or sorted(found))
        return [Category(found[name], tuple((logical_defects or {}).get(name, ()))) for name in chosen]

    @property
    def unused(self) -> Unused:
        """Folders that are no category, and hidden ones."""
        if (self.root / "train").is_dir() or _walk(self.root, flat=True)[0]:
            return []  # the data set is a category itself
        return [(path, "a folder without train/, so no category") for path in _entries(self.root)
                if path.is_dir() and not _folder_is_category(path)]


def test_splits(category: Category) -> dict[str, list[Path]]:
    """The test images by split; empty where there are no good ones, because then nothing can be measured."""
    return {split: category.test(split) for split in SPLITS} if category.tested else {}


def _folder_is_category(path: Path) -> bool:
    return (path / "train").is_dir()


def _set_aside(images: int) -> int:
    """How many of the training images become validation images; ``images`` is at least `FEWEST_TRAINING_IMAGES`."""
    least = _OF_MANY if images >= _MANY else 1 if images < 10 else 2
    return max(least, int(VALIDATION_SHARE * images + 0.5))


def _keys(images: Sequence[Path], base: Path) -> dict[Path, str]:
    """Names for the images of one list, unique and independent of their order."""
    places = {path: path.relative_to(base).parts for path in images}
    short = {path: "_".join((*parts[:-1], path.stem)) for path, parts in places.items()}
    whole = {path: "_".join(parts) for path, parts in places.items()}
    times = Counter(short.values())
    keys = {path: key for path, key in short.items() if times[key] == 1 and key not in RESERVED_KEYS}
    taken = Counter(keys.values())
    others = [path for path in images if path not in keys]
    taken.update(whole[path] for path in others)
    for path in others:
        digest = hashlib.sha256("/".join(places[path]).encode(errors="surrogateescape")).hexdigest()[:8]
        keys[path] = whole[path] if taken[whole[path]] == 1 and whole[path] not in RESERVED_KEYS else f"{whole[path]}-{digest}"
    return keys


def _some_images(folder: Path, flat: bool = False) -> list[Path]:
    images = _walk(folder, flat)[0]
    if not images:
        raise UserError(f"no images in {folder}; expected files ending in {', '.join(SUFFIXES)}")
    return images


def _walk(folder: Path, flat: bool = False) -> tuple[list[Path], Unused]:
    """The images in a folder and, unless ``flat``, in those within, sorted; and what there is besides. Links are followed."""
    images: list[Path] = []
    unused: Unused = []
    home = folder.resolve()
    seen = {place: place for place in (home, *home.parents)}
    pending = deque([folder])
    while pending:
        with os.scandir(pending.popleft()) as listing:
            entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            path, link = Path(entry.path), entry.is_symlink()
            is_folder = path.is_dir() if link else entry.is_dir()
            suffix = path.suffix.lower()
            if entry.name.startswith("."):
                unused.append((path, "hidden"))
            elif is_folder and flat:
                unused.append((path, "a folder beside the images"))
            elif is_folder:
                place = path.resolve()
                if place in seen:
                    unused.append((path, f"leads to {seen[place]} once more"))
                else:
                    seen[place] = path
                    # Links last: a folder that is also linked to counts under its own name.
                    pending.append(path) if link else pending.appendleft(path)
            elif link and not path.is_file():
                unused.append((path, "a link to a file that is not there"))
            elif suffix not in SUFFIXES:
                unused.append((path, f"no image format that is read here ({suffix or 'no suffix'})"))
            elif not (flat and entry.name == "roi.png"):
                images.append(path)
    return sorted(images), unused


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, links after the rest; nothing where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted((Path(folder, name) for name in os.listdir(folder)), key=lambda path: (path.is_symlink(), path.name))


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in _entries(folder) if path.is_dir() and not path.name.startswith("."))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in _entries(folder)
                  if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file())


def _marked(folder: Path) -> bool:
    """Whether a folder holds masks named as in MVTec AD."""
    return any(path.stem.endswith("_mask") for path in _files(folder))


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} cannot be read ({str(problem).splitlines()[0]}); mend it or delete it") from problem


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")
