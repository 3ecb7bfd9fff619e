"""Where each layout puts things.

    MVTec LOCO AD   train/good  validation/good  test/{good,logical_anomalies,structural_anomalies}
                                                 ground_truth/{logical_anomalies,structural_anomalies}/{image}/*.png
    MVTec AD        train/good                   test/{good,any defect}  ground_truth/{defect}/{image}_mask.png
    BTAD            train/ok                     test/{ok,ko}            ground_truth/ko/{image}.png
    plain folder    train/good, train/ or the images alone

A new layout is one class and its place in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csad.data.image_files import SUFFIXES
from csad.data.listing import image_files, subfolders
from csad.errors import UserError, did_you_mean

GOOD, LOGICAL, STRUCTURAL = "good", "logical_anomalies", "structural_anomalies"
SPLITS = (GOOD, LOGICAL, STRUCTURAL)

# What people call folders of good and of other images, in lower case.
GOOD_NAMES = frozenset({"good", "ok", "normal", "pass", "io"})
BAD_NAMES = frozenset(
    "bad defect defects defective anomaly anomalies anomalous abnormal fail ng nok ko nio not_good".split()
) | {LOGICAL, STRUCTURAL}


@dataclass(frozen=True)
class Layout:
    """Where one convention puts things: here a plain folder, without test images. ``root`` is a category's folder."""

    name: str = "plain folder"
    good: str = "good"  # what it calls a folder of good images

    def recognises(self, root: Path) -> bool:
        """Whether a category is laid out so; the first of `LAYOUTS` that says so is taken."""
        return True

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        """Split -> folders of its test images; splits without a folder may be left out."""
        return {}

    def masks(self, root: Path, image: Path) -> list[Path]:
        """Ground truth of an anomalous test image."""
        return []

    def defect(self, root: Path, image: Path) -> str | None:
        """What the place of an anomalous test image says of its defect's name."""
        return None


@dataclass(frozen=True)
class Loco(Layout):
    name: str = "MVTec LOCO AD"

    def recognises(self, root: Path) -> bool:
        folders = set(subfolders(root / "test"))
        return bool(
            folders & {LOGICAL, STRUCTURAL}
            or (root / "defects_config.json").exists()
            or folders == {GOOD}
            and (root / "validation").is_dir()
        )

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        others = [name for name in subfolders(root / "test") if name not in SPLITS]
        masks = {name: image_files(root / "ground_truth" / name) for name in others}
        foreign = [name for name in others if any(path.stem.endswith("_mask") for path in masks[name])]
        if foreign:
            raise UserError(
                f"{root} mixes two layouts: test/{foreign[0]} has masks like MVTec AD's, beside test folders of "
                f"MVTec LOCO AD's layout; keep either {LOGICAL} and {STRUCTURAL}, or one folder for each defect"
            )
        return {split: [root / "test" / split] for split in SPLITS if (root / "test" / split).is_dir()}

    def masks(self, root: Path, image: Path) -> list[Path]:
        inside = image.relative_to(root / "test")
        return image_files(root / "ground_truth" / inside.parent / image.stem)  # whose values tell defects


@dataclass(frozen=True)
class FolderPerDefect(Layout):
    """MVTec AD's layout and those that differ from it in names only."""

    name: str = "MVTec AD"

    def recognises(self, root: Path) -> bool:
        return bool(subfolders(root / "test")) and (
            self.good == GOOD or (root / "train" / self.good).is_dir()
        )

    def tests(self, root: Path, logical: Sequence[str]) -> dict[str, list[Path]]:
        folders = {name: root / "test" / name for name in subfolders(root / "test")}
        tests = {GOOD: [folders.pop(self.good)] if self.good in folders else []}
        for name in logical:
            if name not in folders:
                raise UserError(
                    f"there is no defect '{name}' in {root / 'test'} to count as logical; it has "
                    f"{', '.join(folders) or 'none'}{did_you_mean(name, folders)}"
                )
        return tests | {
            LOGICAL: [path for name, path in folders.items() if name in logical],
            STRUCTURAL: [path for name, path in folders.items() if name not in logical],
        }

    def masks(self, root: Path, image: Path) -> list[Path]:
        folder = root / "ground_truth" / image.relative_to(root / "test").parent
        for stem in (f"{image.stem}_mask", image.stem):
            masks = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").exists()]
            if masks:
                return masks[:1]
        return []

    def defect(self, root: Path, image: Path) -> str | None:
        return image.relative_to(root / "test").parts[0]


def advice_on_other_layout(root: Path) -> str | None:
    """What to move where in a folder without train/ that has a known other layout, or good and bad images."""
    folders = subfolders(root)
    if (root / "Data" / "Images" / "Normal").is_dir():
        return (
            f"{root} has VisA's layout; move the training images of Data/Images/Normal to train/good and the "
            "others to test/good (split_csv/1cls.csv says which), Data/Images/Anomaly to test/anomaly, and "
            "Data/Masks/Anomaly to ground_truth/anomaly"
        )
    misspelt = next((name for name in folders if name.lower() == "train"), None)
    if misspelt:
        return f"{root} has a folder {misspelt}; layouts have it as train, in small letters, like validation and test"
    good = [name for name in folders if name.lower() in GOOD_NAMES]
    bad = [name for name in folders if name.lower() in BAD_NAMES]
    if not good:
        return None
    to_train = f"move the good images for training from {good[0]} to train/good and some others to test/good"
    defects = root / "NG"
    if {"OK", "NG"} <= set(folders) and any(subfolders(defects / name) for name in subfolders(defects)):
        return (
            f"{root} has Real-IAD's layout; {to_train} (its JSON files say which), each NG/DEFECT to "
            "test/DEFECT, and the masks in it (*.png) to ground_truth/DEFECT"
        )
    if bad:
        return (
            f"{root} has the folders {', '.join([*good, *bad])}, and no train; {to_train}, "
            + " and ".join(f"{name} to test/{name}" for name in bad)
        )
    return f"{root} has the folder {good[0]}, and no train; {to_train}"


LAYOUTS = (Loco(), FolderPerDefect("BTAD", "ok"), FolderPerDefect(), Layout())
