"""Folders of categories, or a single category: which of them a command is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csad.data.conventions import advice_on_other_layout
from csad.data.layouts import Category
from csad.data.listing import CLUTTER, Unused, entries, reason_to_skip, walk
from csad.errors import UserError


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
        folders = [path for path in entries(self.root) if not reason_to_skip(path.name)]
        roots = {path.name: path for path in folders if _folder_is_category(path)}
        if not roots and self._is_one_category:
            roots = {Category(self.root).name: self.root}
        if not roots:
            advice = next(filter(None, map(advice_on_other_layout, [self.root, *entries(self.root)])), None)
            raise UserError(
                f"no category in {self.root}: "
                + (advice or f"expected folders like {self.root}/screw_bag/train/good")
            )
        for name in names or []:
            if name not in roots:
                raise UserError(
                    f"there is no category '{name}' in {self.root}; it has {', '.join(sorted(roots))}"
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


def _folder_is_category(path: Path) -> bool:
    return (path / "train").is_dir()
