"""Writing the built-in data set, in MVTec LOCO AD's layout, and the true component label maps beside it.

    {root}/{category}/{train,validation}/good/NNN.png
    {root}/{category}/test/{good,logical_anomalies,structural_anomalies}/NNN.png
    {root}/{category}/ground_truth/{kind}/NNN/MMM.png        one mask per region, value = the defect's pixel_value
    {root}/{category}/defects_config.json
    {root}_components/{category}/{split}/{kind}/NNN.png      component classes, 0 = background
    {root}_components/{category}/classes.json                {"classes": [names], "anomalies": {kind: {"NNN": name}}}
    {root}_components/dataset.json                           {"settings": what made it, "categories": [names]}

Every picture has a generator of its own, seeded by (seed, category, split and kind, index): the bytes depend neither on
the number of workers nor on what was rendered before. A picture's image is written
last, so an image that exists is complete.
"""

import shutil
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from csad.data.files import read_json, write_image, write_json
from csad.data.layouts import GOOD, LOGICAL, STRUCTURAL
from csad.data.workspace import Workspace
from csad.errors import UserError, did_you_mean
from csad.processes import map_pictures
from csad.progress import ProgressBar
from csad.synthetic import CATEGORIES
from csad.synthetic.kit import Category, Defect, render

import cv2
import numpy as np

GENERATOR_VERSION = 1
SMALLEST_SIZE = 64
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Settings:
    """What a data set is made of: everything that decides its bytes.

    Args:
        image_size: side of the pictures in pixels, at least 64.
        train, validation, test_good, test_logical, test_structural: pictures per category.
        seed: a whole number, 0 or more.

    Raises:
        UserError: a value is out of range.
    """

    image_size: int = 512
    train: int = 200
    validation: int = 40
    test_good: int = 40
    test_logical: int = 40
    test_structural: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if self.image_size < SMALLEST_SIZE:
            raise UserError(
                f"--image_size is {self.image_size}; choose {SMALLEST_SIZE} or more, smaller pictures show nothing"
            )
        for name, value in asdict(self).items():
            if value < 0:
                raise UserError(f"--{name} is {value}; it must be 0 or more")

    def groups(self) -> list[tuple[str, str, int]]:
        """(split, kind, number of pictures) for every folder of a category."""
        return [
            ("train", GOOD, self.train),
            ("validation", GOOD, self.validation),
            ("test", GOOD, self.test_good),
            ("test", LOGICAL, self.test_logical),
            ("test", STRUCTURAL, self.test_structural),
        ]


@dataclass(frozen=True)
class Task:
    """One picture to render."""

    root: Path
    category: str
    split: str
    kind: str
    index: int
    settings: Settings

    @property
    def stem(self) -> str:
        return f"{self.index:03d}"

    @property
    def image_path(self) -> Path:
        return self.root / self.category / self.split / self.kind / f"{self.stem}.png"

    @property
    def labels_path(self) -> Path:
        return components_root(self.root) / self.category / self.split / self.kind / f"{self.stem}.png"

    @property
    def masks_folder(self) -> Path:
        return self.root / self.category / "ground_truth" / self.kind / self.stem


def components_root(root: Path) -> Path:
    """The folder of the true component label maps, beside the data set."""
    return root.with_name(f"{root.name}_components")


def anomaly_of(category: Category, kind: str, index: int) -> Defect | None:
    """The anomaly shown by the picture `index` of a kind: they take turns; None for good pictures."""
    defects = category.defects_of(kind)
    return defects[index % len(defects)] if defects else None


def picture_rng(seed: int, category: str, split: str, kind: str, index: int) -> np.random.Generator:
    """The generator of one picture, independent of every other's."""
    return np.random.default_rng(
        [seed, zlib.crc32(category.encode()), zlib.crc32(f"{split}/{kind}".encode()), index]
    )


def write_picture(task: Task) -> None:
    """Render one picture and write its masks, its label map and, last, its image."""
    cv2.setNumThreads(1)
    category = CATEGORIES[task.category]
    defect = anomaly_of(category, task.kind, task.index)
    rng = picture_rng(task.settings.seed, task.category, task.split, task.kind, task.index)
    picture = render(category, task.settings.image_size, rng, defect.name if defect else None)
    for number, (name, region) in enumerate(picture.regions):
        mask = np.where(region, np.uint8(category.pixel_value(name)), np.uint8(0))
        write_image(task.masks_folder / f"{number:03d}.png", mask)
    write_image(task.labels_path, picture.labels)
    write_image(task.image_path, picture.image)


def write_dataset(
    root: Path, names: Iterable[str], settings: Settings, workers: int = 1, overwrite: bool = False
) -> int:
    """Render the named categories into `root`, skipping pictures that are there already.

    Args:
        workers: processes to render with; the result does not depend on it.
        overwrite: throw away what an earlier run of this function left in `root`, instead of continuing it.

    Returns:
        The number of pictures rendered now.

    Raises:
        UserError: unknown category; `root` holds other people's data, or pictures made with other settings, or another
            run writes there.
    """
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in CATEGORIES:
            raise UserError(
                f"there is no category '{name}' to render; choose from {', '.join(CATEGORIES)}"
                f"{did_you_mean(name, CATEGORIES)}"
            )
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be 1 or more")
    with Workspace(components_root(root)).lock():
        return _write_dataset(root, names, settings, workers, overwrite)


def _write_dataset(root: Path, names: list[str], settings: Settings, workers: int, overwrite: bool) -> int:
    present = _prepare(root, names, settings, overwrite)
    write_json(
        components_root(root) / "dataset.json",
        {"settings": _described(settings), "categories": sorted({*present, *names})},
    )
    for name in names:
        _write_descriptions(root, CATEGORIES[name], settings)
    tasks = [
        Task(root, name, split, kind, index, settings)
        for name in names
        for split, kind, count in settings.groups()
        for index in range(count)
    ]
    missing = [task for task in tasks if not task.image_path.exists()]
    with ProgressBar(
        total=len(tasks), initial=len(tasks) - len(missing), unit="image", desc=str(root)
    ) as bar:
        map_pictures(write_picture, missing, workers, bar)
    return len(missing)


def _described(settings: Settings) -> dict:
    return {"generator_version": GENERATOR_VERSION, **asdict(settings)}


def _prepare(root: Path, names: list[str], settings: Settings, overwrite: bool) -> list[str]:
    """Make sure that writing into `root` harms nobody; returns the categories already there and staying."""
    record = components_root(root) / "dataset.json"
    if not record.exists():
        foreign = [name for name in names if (root / name).exists()]
        if foreign:
            raise UserError(
                f"{root / foreign[0]} exists and was not made by this script ({record} is missing); "
                "choose another --dataset_root"
            )
        return []
    found = read_json(record, keys=("settings",))
    same = found.get("settings") == _described(settings)
    if not same and not overwrite:
        changed = [
            f"{key} {found.get('settings', {}).get(key)} there, {value} asked for"
            for key, value in _described(settings).items()
            if found.get("settings", {}).get(key) != value
        ]
        raise UserError(
            f"{root} was rendered with other settings ({'; '.join(changed)}); "
            "choose another --dataset_root, or render it anew with --overwrite"
        )
    present = list(found.get("categories", []))
    if overwrite:
        for name in [name for name in present if not same or name in names]:
            for folder in (root / name, components_root(root) / name):
                shutil.rmtree(folder, ignore_errors=True)
            present.remove(name)
    return present


def _write_descriptions(root: Path, category: Category, settings: Settings) -> None:
    """Write a category's defects_config.json and classes.json."""
    config = []
    for defect in category.defects:
        threshold = (
            defect.saturation
            if defect.relative
            else max(1, round(defect.saturation * settings.image_size**2))
        )
        config.append(
            {
                "defect_name": defect.name,
                "pixel_value": category.pixel_value(defect.name),
                "saturation_threshold": threshold,
                "relative_saturation": defect.relative,
            }
        )
    write_json(root / category.name / "defects_config.json", config)
    anomalies = {
        kind: {
            f"{index:03d}": anomaly.name
            for index in range(count)
            if (anomaly := anomaly_of(category, kind, index))
        }
        for split, kind, count in settings.groups()
        if category.defects_of(kind)
    }
    write_json(
        components_root(root) / category.name / "classes.json",
        {"classes": category.classes, "anomalies": anomalies},
    )
