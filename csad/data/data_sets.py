"""Folders of categories, or a single category: which of them a command is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csad.data.conventions import GOOD_NAMES, advice_on_other_layout
from csad.data.findings import some_of
from csad.data.image_files import SUFFIXES
from csad.data.layouts import Category
from csad.data.listing import CLUTTER, Unused, count, entries, image_files, reason_to_skip, subfolders, walk
from csad.errors import UserError, did_you_mean

PARTS = ("train", "validation", "test", "ground_truth")  # of a category
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".7z", ".rar")
MAX_DEPTH = 3  # folders down from the one that was named, in which categories are looked for


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
        if not self.root.is_dir():
            raise UserError(_advice_on_no_folder(self.root))
        folders = [path for path in entries(self.root) if not reason_to_skip(path.name)]
        roots = {path.name: path for path in folders if _folder_is_category(path)}
        category = _category_around(self.root)
        if category is not None and not roots and not _folder_is_category(self.root):
            raise UserError(
                f"{self.root} is a folder inside the category {category.name}; name --dataset_root {category} for this "
                f"category, or --dataset_root {category.parent} for all that lie beside it"
            )
        if not roots and self._is_one_category:
            roots = {Category(self.root).name: self.root}
        if not roots:
            advice = next(filter(None, map(advice_on_other_layout, [self.root, *entries(self.root)])), None)
            raise UserError(f"no category in {self.root}: {advice or _advice_on_no_category(self.root)}")
        for name in names or []:
            if name not in roots:
                raise UserError(
                    f"there is no category '{name}' in {self.root}; it has {', '.join(sorted(roots))}"
                    f"{did_you_mean(name, roots)}"
                )
        selected = dict.fromkeys(names or sorted(roots))
        return [Category(roots[name], tuple((logical_defects or {}).get(name, ()))) for name in selected]

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


def _advice_on_no_folder(root: Path) -> str:
    """What to do where the data set's folder is a file, or is not there."""
    if not root.exists():
        return f"data set folder {root} does not exist" + (
            did_you_mean(root.name, subfolders(root.parent))
            or "; put MVTec LOCO AD there, name another with --dataset_root, or render the built-in one with "
            "make_synthetic_loco.py"
        )
    if root.name.lower().endswith(ARCHIVES):
        return (
            f"{root} is an archive; unpack it, and name the folder that comes out of it with --dataset_root"
        )
    if root.suffix.lower() in SUFFIXES:
        return f"{root} is a single picture; name the folder in which the pictures lie: --dataset_root {root.parent}"
    return f"{root} is a file; name the folder of the data set with --dataset_root"


def _category_around(root: Path) -> Path | None:
    """The category whose train/, validation/, test/ or ground_truth/ a folder is, or whose good or defective pictures."""
    folder = root.resolve()
    if folder.name not in PARTS and (folder.parent.name != "train" or folder.name.lower() in GOOD_NAMES):
        folder = folder.parent
    return folder.parent if folder.name in PARTS and (folder.parent / "train").is_dir() else None


def _advice_on_no_category(root: Path) -> str:
    """What a folder without categories holds instead, and what to name."""
    contents = [path for path in entries(root) if not reason_to_skip(path.name)]
    if not contents:
        return "the folder is empty; name the folder with the categories, or the one with the pictures"
    folders = [root / name for name in subfolders(root)]
    level = folders
    for _ in range(MAX_DEPTH):
        below = [folder / name for folder in level for name in subfolders(folder)]
        if categories := [path for path in below if _folder_is_category(path)]:
            folder = categories[0].parent
            names = some_of([path.name for path in categories if path.parent == folder])
            return f"they lie in {folder} ({names}); name --dataset_root {folder}"
        level = below
    for folder in folders:
        pictures = len(image_files(folder))
        if pictures:
            return (
                f"{folder} has {count(pictures, 'picture')} and no train; where all of them are good ones, name "
                f"--dataset_root {folder}, or move them to {folder}/train/good"
            )
    archives = [path.name for path in contents if path.name.lower().endswith(ARCHIVES)]
    if archives:
        return f"it holds the archive {archives[0]}; unpack it there"
    held = some_of([path.name for path in contents])
    return f"it holds {held}, and folders like {root}/screw_bag/train/good were expected"


def _folder_is_category(path: Path) -> bool:
    return (path / "train").is_dir()
