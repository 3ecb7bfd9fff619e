"""What the stages will see of a category, in one line, and what they will not."""

from __future__ import annotations

from csad.data.conventions import LOGICAL, SPLITS, STRUCTURAL
from csad.data.image_files import SUFFIXES
from csad.data.layouts import Category
from csad.data.listing import Unused, count, entries, reason_to_skip


def layout_line(category: Category) -> str:
    """What the stages will see, in one line; UserError if they could not run on the category."""
    train, validation = category.train, category.validation
    parts = [count(len(train), "training image"), count(len(validation), "validation image")]
    if category.validation_is_held_out:
        together = count(len(train) + len(validation), "training image")
        parts[1] += f" (set aside from {together}, there are no others)"
    test_images = []
    for folder in (folder for split in SPLITS for folder in category.test_folders.get(split, [])):
        logical = " (logical)" if folder.name in category.logical_defects else ""
        test_images.append(f"{len(category.images_in(folder))} {folder.name}{logical}")
    counts = ", ".join(test_images)
    parts.append(f"test images: {counts}" if test_images else "no test images, so nothing to measure")
    if test_images and not category.tested:
        parts.append("no good test images, so nothing to measure")
    if category.roi_file.exists():
        parts.append("only the white part of roi.png is inspected")
    return f"{category.name} ({category.layout}): {'; '.join(parts)}"


def unused(category: Category) -> Unused:
    """What in the category's folders will not be used, and why; texts beside the folders do not count."""
    image_folders = {folder for folders, _ in category.folder_lists for folder in folders}
    reasons = dict(entry for folder in image_folders for entry in category.walk(folder)[1])
    parts = ["train", "validation", *(["test"] if category.test_folders else [])]
    for path in entries(category.root) if category.training_folder != category.root else []:
        if reason := reason_to_skip(path.name):
            reasons[path] = reason
        elif path.is_dir() and path.name not in (*parts, "ground_truth"):
            images = count(len(category.walk(path)[0]), "image")
            reasons[path] = f"a folder that the layout '{category.layout}' does not have, with {images}"
        elif path.suffix.lower() in SUFFIXES and not path.is_dir() and path != category.roi_file:
            reasons[path] = "an image beside the layout's folders"
    for part in (category.root / name for name in parts):
        only = " and ".join(sorted(folder.name for folder in image_folders if folder.parent == part))
        for path in entries(part) if part not in image_folders else []:
            if reason := reason_to_skip(path.name):
                reasons[path] = reason
            elif path not in image_folders:
                images = f"; it holds {count(len(category.walk(path)[0]), 'image')}" if path.is_dir() else ""
                reasons[path] = f"of {part.name}/ only {only or 'nothing'} is used{images}"
    masks = {
        mask
        for split in (LOGICAL, STRUCTURAL)
        for folder in category.test_folders.get(split, [])
        for image in category.walk(folder)[0]
        for mask in category.convention.masks(category.root, image)
    }
    if (category.root / "ground_truth").is_dir():
        mask_files, not_masks = category.walk(category.root / "ground_truth")
        reasons.update(not_masks)
        reasons |= {path: "a mask that belongs to no test image" for path in mask_files if path not in masks}
    return sorted(reasons.items())
