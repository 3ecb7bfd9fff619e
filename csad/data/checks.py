"""What the stages will see of a category and what they will not, and what can be wrong with it."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from csad import settings
from csad.data import conventions, layouts, listing
from csad.data.defects import read_region_mask, read_saturations
from csad.data.findings import Findings, file_names
from csad.data.image_files import SUFFIXES, is_lossy
from csad.data.listing import count
from csad.data.pictures import ImageInfo, check_copies, check_storage, describe, examine
from csad.data.roi import read_roi
from csad.errors import UserError
from csad.processes import cores
from csad.progress import ProgressBar

CONFIDENCE = 0.95
MIN_TRAINING_IMAGES, MIN_VALIDATION_IMAGES = 30, 10  # with fewer, verdicts on good images are chance
MAX_CATEGORY_NAME = 200  # bytes, of at most 255 in a file's name
VALIDATION_FOR_1_PERCENT = 99  # images, so that 1 % false positives can be promised on average


def check(
    category: layouts.Category, cfg: settings.Settings, false_positive_rate: float | None = None
) -> tuple[Findings, dict[str, list[ImageInfo]]]:
    """Read every image and mask of a category.

    Returns:
        What there is to say, and the pictures by folder.
    """
    findings = Findings()
    line = findings.collect_errors(lambda: layout_line(category))
    findings.lines.append(str(line or f"{category.name}: the stages cannot run on it"))
    listed = findings.collect_errors(lambda: category.listed) or {}
    check_unused(category, findings)
    if len(os.fsencode(category.name)) > MAX_CATEGORY_NAME:
        findings.errors.append(
            f"the category's folder {category.name} has a name of more than {MAX_CATEGORY_NAME} "
            "bytes, too long for the files that bear it; rename it"
        )
    check_defect_folders(category, findings)
    check_number_of_images(category, findings)
    validation = set(findings.collect_errors(lambda: category.validation) or [])
    entries = [(folder, path) for folder, paths in listed.items() for path in paths]
    pictures: dict[str, list[ImageInfo]] = {folder: [] for folder in listed}

    def look(entry: tuple[str, Path]) -> ImageInfo:
        folder, path = entry
        part = "test" if Path(folder).parts[:1] == ("test",) else "train"
        return examine(path, "validation" if path in validation else part, cfg.images.white_level)

    with ThreadPoolExecutor(cores()) as pool:  # decoding and hashing release Python's lock
        what = f"{category.name}: read images"
        bar = ProgressBar(pool.map(look, entries), what, len(entries), unit="image", leave=False)
        examined = list(bar)
        for (folder, _), picture in zip(entries, examined):
            pictures[folder].append(picture)
        findings.errors += [picture.problem for picture in examined if picture.problem]
        readable = [picture for picture in examined if not picture.problem]
        findings.lines += describe(pictures)
        check_storage(category.root, readable, findings)
        check_copies(category.root, readable, findings)
        sizes = {picture.path: picture.size for picture in readable}
        check_masks(category, sizes, findings, pool)
    findings.collect_errors(lambda: read_roi(category, cfg.images.size, cfg.roi))
    check_rate(len(validation), false_positive_rate, findings)
    return findings, pictures


def layout_line(category: layouts.Category) -> str:
    """What the stages will see, in one line; UserError if they could not run on the category."""
    train, validation = category.train, category.validation
    parts = [count(len(train), "training image"), count(len(validation), "validation image")]
    if category.validation_is_held_out:
        together = count(len(train) + len(validation), "training image")
        parts[1] += f" (set aside from {together}, there are no others)"
    test_images = []
    for folder in (folder for split in layouts.SPLITS for folder in category.test_folders.get(split, [])):
        logical = " (logical)" if folder.name in category.logical_defects else ""
        test_images.append(f"{len(category.images_in(folder))} {folder.name}{logical}")
    counts = ", ".join(test_images)
    parts.append(f"test images: {counts}" if test_images else "no test images, so nothing to measure")
    if test_images and not category.tested:
        parts.append("no good test images, so nothing to measure")
    if category.roi_file.exists():
        parts.append("only the white part of roi.png is inspected")
    return f"{category.name} ({category.layout}): {'; '.join(parts)}"


def quick_check(category: layouts.Category) -> list[str]:
    """Warnings that need no look into a file: what is left out, too few images."""
    findings = Findings()
    check_unused(category, findings)
    check_number_of_images(category, findings)
    return findings.warnings


def unused(category: layouts.Category) -> listing.Unused:
    """What in the category's folders will not be used, and why; texts beside the folders do not count."""
    image_folders = {folder for folders, _ in category.folder_lists for folder in folders}
    reasons = dict(entry for folder in image_folders for entry in category.walk(folder)[1])
    parts = ["train", "validation", *(["test"] if category.test_folders else [])]
    for path in listing.entries(category.root) if category.training_folder != category.root else []:
        if reason := listing.reason_to_skip(path.name):
            reasons[path] = reason
        elif path.is_dir() and path.name not in (*parts, "ground_truth"):
            images = count(len(category.walk(path)[0]), "image")
            reasons[path] = f"a folder that the layout '{category.layout}' does not have, with {images}"
        elif path.suffix.lower() in SUFFIXES and not path.is_dir() and path != category.roi_file:
            reasons[path] = "an image beside the layout's folders"
    for part in (category.root / name for name in parts):
        only = " and ".join(sorted(folder.name for folder in image_folders if folder.parent == part))
        for path in listing.entries(part) if part not in image_folders else []:
            if reason := listing.reason_to_skip(path.name):
                reasons[path] = reason
            elif path not in image_folders:
                images = f"; it holds {count(len(category.walk(path)[0]), 'image')}" if path.is_dir() else ""
                reasons[path] = f"of {part.name}/ only {only or 'nothing'} is used{images}"
    masks = {
        mask
        for split in (layouts.LOGICAL, layouts.STRUCTURAL)
        for folder in category.test_folders.get(split, [])
        for image in category.walk(folder)[0]
        for mask in category.convention.masks(category.root, image)
    }
    if (category.root / "ground_truth").is_dir():
        mask_files, not_masks = category.walk(category.root / "ground_truth")
        reasons.update(not_masks)
        reasons |= {path: "a mask that belongs to no test image" for path in mask_files if path not in masks}
    return sorted(reasons.items())


def check_unused(category: layouts.Category, findings: Findings) -> None:
    """Files and folders that the stages will not use, and why."""
    by_reason = defaultdict(list)
    for path, reason in findings.collect_errors(lambda: unused(category)) or []:
        by_reason[reason].append(path)
    for reason, paths in by_reason.items():
        litter = reason == listing.CLUTTER or (
            reason == "hidden" and not any(path.suffix.lower() in SUFFIXES for path in paths)
        )
        (findings.notes if litter else findings.warnings).append(
            f"not used: {file_names(category.root, paths)}: {reason}"
        )


def check_defect_folders(category: layouts.Category, findings: Findings) -> None:
    """Say which defects count as logical and which as structural, in layouts that do not tell."""
    if not isinstance(category.convention, conventions.FolderPerDefect):
        return
    folders = findings.collect_errors(lambda: category.test_folders) or {}
    logical, structural = (
        [folder.name for folder in folders.get(split, [])] for split in (layouts.LOGICAL, layouts.STRUCTURAL)
    )
    if not logical and not structural:
        return
    example = ", ".join(logical or structural[:1])
    findings.notes.append(
        f"test folders that count as logical anomalies: {', '.join(logical) or 'none'}; "
        f"as structural: {', '.join(structural) or 'none'}; a line like 'logical: [{example}]' "
        f"in configs/categories/{category.name}.yaml changes it"
    )
    good = [name for name in (*logical, *structural) if name.lower() in conventions.GOOD_NAMES]
    if good:
        findings.warnings.append(
            f"test/{good[0]} sounds like good images but counts as a defect; rename it to test/{layouts.GOOD}"
        )


def check_number_of_images(category: layouts.Category, findings: Findings) -> None:
    """Too few images to learn from or to set a threshold by, and what to expect then."""
    training, validation = (
        len(findings.collect_errors(partial(getattr, category, split)) or [])
        for split in ("train", "validation")
    )
    if 0 < training < MIN_TRAINING_IMAGES:
        aside = f" (and {validation} set aside for validation)" if category.validation_is_held_out else ""
        findings.warnings.append(
            f"only {count(training, 'training image')}{aside}: expect that many new good images, maybe most of "
            "them, are called anomalous, because what is normal in them was never seen; "
            f"{MIN_TRAINING_IMAGES} are few, a hundred or more are better"
        )
    if 0 < validation < MIN_VALIDATION_IMAGES:
        findings.warnings.append(
            f"only {count(validation, 'validation image')}, which set the threshold: expect that at least 1 in "
            f"{validation + 1} new good images is called anomalous, and by chance far more; "
            f"{MIN_VALIDATION_IMAGES} are few, {VALIDATION_FOR_1_PERCENT} are needed for 1 %"
        )


def check_masks(
    category: layouts.Category,
    sizes: dict[Path, tuple[int, int]],
    findings: Findings,
    pool: ThreadPoolExecutor,
) -> None:
    """Ground truth that is missing, unreadable, empty, of another size, or names no defect."""
    anomalous = [
        (split, path)
        for split in (layouts.LOGICAL, layouts.STRUCTURAL)
        for path in findings.collect_errors(partial(category.test, split)) or []
    ]
    collect = findings.collect_errors
    masks = {path: collect(partial(category.region_masks, split, path)) for split, path in anomalous}
    without = [path for path, of_image in masks.items() if of_image == []]
    if without and len(without) < len(masks):
        names = file_names(category.root, without)
        findings.warnings.append(f"anomalous, but without a ground-truth mask: {names}")
    elif without:
        findings.notes.append("no ground-truth masks, so localisation is not measured")
    values = None
    if category.defects_config.exists():
        values = findings.collect_errors(partial(read_saturations, category))
    elif category.layout == layouts.Loco.name and len(without) < len(masks):
        findings.warnings.append(
            f"there are masks, but no {category.defects_config} that says what their values mean"
        )

    lossy: list[Path] = []

    def complaint(pair: tuple[Path, Path]) -> str | None:
        image, path = pair
        try:
            read_region_mask(category, path, sizes.get(image), values)
            if is_lossy(path):
                lossy.append(path)
        except UserError as problem:
            return str(problem)
        return None

    pairs = [(image, path) for image, of_image in masks.items() for path in of_image or []]
    findings.errors += [message for message in pool.map(complaint, pairs) if message]
    if lossy:
        findings.warnings.append(
            "masks in a lossy format, in which only what is brighter than half of the "
            "brightest pixel counts as defect; store masks as PNG: "
            + file_names(category.root, sorted(lossy))
        )


def check_rate(validation: int, rate: float | None, findings: Findings) -> None:
    """What a threshold from so many validation images can promise (split conformal prediction)."""
    if not validation:
        return
    mean, sure = 1 / (validation + 1), 1 - (1 - CONFIDENCE) ** (1 / validation)
    findings.notes.append(
        f"a threshold from {count(validation, 'validation image')} can promise "
        f"{100 * mean:.1f} % false positives on average, {100 * sure:.1f} % with 95 % confidence"
    )
    if rate is not None:
        on_average = math.ceil(round(1 / rate - 1, 6))
        for_sure = math.ceil(round(math.log(1 - CONFIDENCE) / math.log(1 - rate), 6))
        if validation < on_average:
            findings.warnings.append(
                f"a false-positive rate of {rate:g} needs {count(on_average, 'validation image')} on average and "
                f"{for_sure} for 95 % confidence; there {'is' if validation == 1 else 'are'} {validation}"
            )
