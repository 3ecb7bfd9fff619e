"""What can be wrong with a data set: unreadable files, copies between training and test, masks that fit no image."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from csad import settings
from csad.data import conventions, layouts, listing
from csad.data.findings import Findings, file_names
from csad.data.image_files import SUFFIXES
from csad.data.listing import count
from csad.data.mask_checks import check_masks
from csad.data.overview import layout_line, unused
from csad.data.picture_checks import check_copies, check_storage, describe
from csad.data.pictures import ImageInfo, examine
from csad.data.roi import read_roi
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
    check_names(category, listed, findings)
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


def quick_check(category: layouts.Category) -> list[str]:
    """Warnings that need no look into a file: what is left out, too few images."""
    findings = Findings()
    check_unused(category, findings)
    check_number_of_images(category, findings)
    return findings.warnings


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


def check_names(category: layouts.Category, listed: dict[str, list[Path]], findings: Findings) -> None:
    """Names of images that are shortened in the files made from them, and a category's that is too long."""
    if len(os.fsencode(category.name)) > MAX_CATEGORY_NAME:
        findings.errors.append(
            f"the category's folder {category.name} has a name of more than {MAX_CATEGORY_NAME} "
            "bytes, too long for the files that bear it; rename it"
        )
    paths = [path for paths in listed.values() for path in paths]
    keys = findings.collect_errors(lambda: {path: category.key(path) for path in paths}) or {}
    # What is cut off has up to 4 bytes.
    longest = [path for path, key in keys.items() if len(os.fsencode(key)) > listing.LONGEST_KEY - 4]
    long = [path for path in longest if not path.stem.endswith(keys[path][-13:])]
    if long:
        findings.notes.append(
            "long names, of which files made from the images bear the beginning and a hash, "
            f"like {keys[long[0]]}: {file_names(category.root, long)}"
        )


def check_defect_folders(category: layouts.Category, findings: Findings) -> None:
    """Say which defects count as logical and which as structural, in layouts that do not tell."""
    by_split = findings.collect_errors(lambda: category.defect_folders) or {}
    logical, structural = (by_split.get(split, []) for split in (layouts.LOGICAL, layouts.STRUCTURAL))
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
