"""What can be wrong with a data set: unreadable files, copies between training and test, masks that fit no image."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from csad import settings
from csad.data import conventions, files, image_files, images, layouts, listing
from csad.data.listing import count
from csad.data.pictures import Picture, examine, look, near_copies, with_digests_where_alike
from csad.data.roi import read_roi
from csad.errors import UserError
from csad.processes import cores
from csad.progress import ProgressBar

CONFIDENCE = 0.95
NAMED = 5  # files named in one message; the others are counted
ASPECT_TOLERANCE = 0.02
MIN_TRAINING_IMAGES, MIN_VALIDATION_IMAGES = 30, 10  # with fewer, verdicts on good images are chance
MAX_CATEGORY_NAME = 200  # bytes, of at most 255 in a file's name
VALIDATION_FOR_1_PERCENT = 99  # images, so that 1 % false positives can be promised on average


@dataclass
class Findings:
    """What there is to say of one category, in the order of printing."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def attempt(self, look: Callable[[], object]) -> object:
        """What ``look`` returns; None, and an error noted once, where it ends in a sentence."""
        try:
            return look()
        except UserError as problem:
            if str(problem) not in self.errors:
                self.errors.append(str(problem))
            return None


# One category


def check(
    category: layouts.Category, chosen: settings.Settings, false_positive_rate: float | None = None
) -> tuple[Findings, dict[str, list[Picture]]]:
    """Read every image and mask of a category.

    Returns:
        What there is to say, and the pictures by folder.
    """
    findings = Findings()
    line = findings.attempt(lambda: category.layout_line)
    findings.lines.append(str(line or f"{category.name}: the stages cannot run on it"))
    listed = findings.attempt(lambda: category.listed) or {}
    about_unused(category, findings)
    about_names(category, listed, findings)
    about_defect_folders(category, findings)
    about_number_of_images(category, findings)
    validation = set(findings.attempt(lambda: category.validation) or [])
    todo = [
        (folder, path, split_of(folder, path in validation))
        for folder, paths in listed.items()
        for path in paths
    ]
    with ThreadPoolExecutor(cores()) as pool:  # decoding and hashing release Python's lock
        found = list(
            ProgressBar(
                pool.map(lambda one: examine(one[1], one[2], chosen.images.white_level), todo),
                total=len(todo),
                unit="image",
                desc=f"{category.name}: read images",
                leave=False,
            )
        )
        pictures = {folder: [] for folder in listed}
        for (folder, _, _), picture in zip(todo, found):
            pictures[folder].append(picture)
        findings.errors += [picture.problem for picture in found if picture.problem]
        readable = [picture for picture in found if not picture.problem]
        findings.lines += describe(pictures)
        about_storage(category.root, readable, findings)
        about_copies(category.root, readable, findings)
        sizes = {picture.path: picture.size for picture in readable}
        about_masks(category, sizes, findings, pool)
    findings.attempt(lambda: read_roi(category, chosen.images.size, chosen.roi))
    about_rate(len(validation), false_positive_rate, findings)
    return findings, pictures


def quick_check(category: layouts.Category) -> list[str]:
    """Warnings that need no pixels: what is left out, too few images, files that differ in kind, exact copies.

    Raises:
        UserError: the stages could not run on the category.
    """
    findings = Findings()
    about_unused(category, findings)
    about_number_of_images(category, findings)
    validation = set(category.validation)
    looked = [
        look(path, split_of(folder, path in validation))
        for folder, paths in category.listed.items()
        for path in paths
    ]
    findings.warnings += [picture.problem for picture in looked if picture.problem]
    readable = [picture for picture in looked if not picture.problem]
    about_storage(category.root, readable, findings)
    about_copies(category.root, with_digests_where_alike(readable), findings)
    return findings.warnings


def split_of(folder: str, in_validation: bool) -> str:
    return "validation" if in_validation else "test" if Path(folder).parts[:1] == ("test",) else "train"


# What is said


def describe(pictures: dict[str, list[Picture]]) -> list[str]:
    """One line per folder: how many images there are, and how they are stored."""
    rows = [("folder", "images", "sizes", "formats", "stored as", "values")]
    for folder, found in pictures.items():
        readable = [picture for picture in found if not picture.problem]
        if readable:
            values = f"{min(one.values[0] for one in readable)}..{max(one.values[1] for one in readable)}"
            rows.append(
                (
                    folder,
                    str(len(found)),
                    counted(f"{one.size[0]}x{one.size[1]}" for one in readable),
                    counted(one.format for one in readable),
                    counted(one.stored for one in readable),
                    values,
                )
            )
        else:
            rows.append((folder, str(len(found)), "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def counted(kinds: Iterable[str]) -> str:
    """The kinds, the most frequent first, with their numbers where there are several."""
    counts = Counter(kinds).most_common()
    shown = ", ".join(kind if len(counts) == 1 else f"{number} {kind}" for kind, number in counts[:3])
    return shown + (f", {len(counts) - 3} others" if len(counts) > 3 else "")


def about_unused(category: layouts.Category, findings: Findings) -> None:
    unused = findings.attempt(lambda: category.unused) or []
    reasons = defaultdict(list)
    for path, why in unused:
        reasons[why].append(path)
    for why, paths in reasons.items():
        litter = why == listing.CLUTTER or (
            why == "hidden" and not any(path.suffix.lower() in image_files.SUFFIXES for path in paths)
        )
        (findings.notes if litter else findings.warnings).append(
            f"not used: {names(category.root, paths)}: {why}"
        )


def about_names(category: layouts.Category, listed: dict[str, list[Path]], findings: Findings) -> None:
    """Names of images that are shortened in the files made from them, and a category's that is too long."""
    if len(os.fsencode(category.name)) > MAX_CATEGORY_NAME:
        findings.errors.append(
            f"the category's folder {category.name} has a name of more than {MAX_CATEGORY_NAME} "
            "bytes, too long for the files that bear it; rename it"
        )
    paths = [path for paths in listed.values() for path in paths]
    keys = findings.attempt(lambda: {path: category.key(path) for path in paths}) or {}
    long = [
        path
        for path in paths
        if path in keys
        and not path.stem.endswith(keys[path][-13:])
        and len(os.fsencode(keys[path])) > listing.LONGEST_KEY - 4
    ]  # what is cut off has up to 4 bytes
    if long:
        findings.notes.append(
            "long names, of which files made from the images bear the beginning and a hash, "
            f"like {keys[long[0]]}: {names(category.root, long)}"
        )


def about_defect_folders(category: layouts.Category, findings: Findings) -> None:
    """Which defects count as logical and which as structural, where the layout does not say it."""
    by_split = findings.attempt(lambda: category.defect_folders) or {}
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


def about_number_of_images(category: layouts.Category, findings: Findings) -> None:
    """Too few images to learn from or to set a threshold by, and what to expect then."""
    training, validation = (
        len(findings.attempt(lambda split=split: getattr(category, split)) or [])
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


def about_storage(root: Path, pictures: Sequence[Picture], findings: Findings) -> None:
    """Sizes, formats, bit depths, colour, orientation and transparency: what differs from most of the images is named."""

    def named(chosen: Sequence[Picture]) -> str:
        return (
            "all" if len(chosen) == len(pictures) > 1 else names(root, [picture.path for picture in chosen])
        )

    if not pictures:
        return
    usual = Counter(picture.size for picture in pictures).most_common(1)[0][0]
    aspect = usual[0] / usual[1]
    other = [one for one in pictures if abs(one.size[0] / one.size[1] / aspect - 1) > ASPECT_TOLERANCE]
    if other:
        findings.warnings.append(
            f"most images are {usual[0]}x{usual[1]}, but of another shape, and so stretched otherwise: "
            f"{named(other)}"
        )
    resized = [one for one in pictures if one.size != usual and one not in other]
    if resized:
        findings.notes.append(
            f"most images are {usual[0]}x{usual[1]}, of the same shape but another size: {named(resized)}"
        )
    small = [one for one in pictures if min(one.size) < images.SIZE]
    if small:
        findings.notes.append(f"smaller than the {images.SIZE} pixels that the networks see: {named(small)}")
    for of, what in (
        (lambda one: one.bits, "of {} bits"),
        (lambda one: "in colour" if one.colour else "grey", "{}"),
    ):
        common = Counter(map(of, pictures)).most_common()
        if len(common) > 1:
            odd = [one for one in pictures if of(one) != common[0][0]]
            kinds = " and ".join(what.format(kind) for kind, _ in common[1:])
            findings.warnings.append(
                f"most images are {what.format(common[0][0])}, but {kinds}: {named(odd)}"
            )
    training = {one.format for one in pictures if one.split == "train"}
    odd = [one for one in pictures if one.split != "train" and one.format not in training]
    if training and odd:
        findings.warnings.append(
            f"training images are stored as {', '.join(sorted(training))}, but in another format, whose "
            f"traces alone may tell them apart: {named(odd)}"
        )
    dark = [one for one in pictures if one.bits == 16 and one.thumbnail is not None and one.values[1] < 64]
    if dark:
        findings.warnings.append(
            "16-bit images that use less than a quarter of their range (14 bits? then set "
            f"--images.white_level 16383): {named(dark)}"
        )
    flat = [one for one in pictures if one.thumbnail is not None and one.values[0] == one.values[1]]
    if flat:
        findings.warnings.append(f"of one colour all over: {named(flat)}")
    turned = [one for one in pictures if one.turned]
    if turned:
        findings.notes.append(f"turned upright as their EXIF orientation says: {named(turned)}")
    clear = [one for one in pictures if one.transparent]
    if clear:
        said = findings.notes if len(clear) == len(pictures) else findings.warnings
        said.append(f"with transparent pixels, which are seen as white: {named(clear)}")


def about_copies(root: Path, pictures: Sequence[Picture], findings: Findings) -> None:
    """Images that are there twice, byte for byte or nearly, within and between training, validation and test."""
    groups = defaultdict(list)
    for picture in pictures:
        if picture.digest:
            groups[picture.digest].append(picture)
    pairs = [(first, other, "the same file") for first, *others in groups.values() for other in others]
    pairs += [
        (first, other, "nearly the same")
        for first, other in near_copies([group[0] for group in groups.values()])
    ]
    if pictures and pictures[0].thumbnail is not None and pictures[0].hash is None:
        findings.notes.append("near copies were not looked for; pip install ImageHash does")
    kinds = defaultdict(list)
    for first, other, how in pairs:
        between = (
            f"within {first.split}" if first.split == other.split else f"in {first.split} and {other.split}"
        )
        kinds[how, between].append(f"{first.path.relative_to(root)} = {other.path.relative_to(root)}")
    for (how, between), equal in kinds.items():
        more = f" and {len(equal) - NAMED} more" if len(equal) > NAMED else ""
        findings.warnings.append(f"{how} {between}: {', '.join(equal[:NAMED])}{more}")


def about_masks(
    category: layouts.Category,
    sizes: dict[Path, tuple[int, int]],
    findings: Findings,
    pool: ThreadPoolExecutor,
) -> None:
    """Ground truth that is missing, unreadable, empty, of another size, or names no defect."""
    anomalous = [
        (split, path)
        for split in (layouts.LOGICAL, layouts.STRUCTURAL)
        for path in findings.attempt(lambda split=split: category.test(split)) or []
    ]
    masks = {
        path: findings.attempt(lambda split=split, path=path: category.region_masks(split, path))
        for split, path in anomalous
    }
    without = [path for path, found in masks.items() if found == []]
    if without and len(without) < len(masks):
        findings.warnings.append(
            f"anomalous, but without a ground-truth mask: {names(category.root, without)}"
        )
    elif without:
        findings.notes.append("no ground-truth masks, so localisation is not measured")
    values = None
    if category.defects_config.exists():
        values = findings.attempt(lambda: pixel_values(category))
    elif category.layout == layouts.Loco.name and len(without) < len(masks):
        findings.warnings.append(
            f"there are masks, but no {category.defects_config} that says what their values mean"
        )

    lossy: list[Path] = []

    def complaint(one: tuple[Path, Path]) -> str | None:
        image, path = one
        try:
            mask = images.read_mask(path)
            if image_files.is_lossy(path):
                lossy.append(path)
            value = layouts.pixel_value(path, mask, values or ())
        except UserError as problem:
            return str(problem)
        size = sizes.get(image)
        if size is not None and mask.shape != size[::-1]:
            return f"{path} is {mask.shape[1]}x{mask.shape[0]}, but its image {size[0]}x{size[1]}"
        if not mask.any():
            return f"{path} is empty: it marks no region"
        if values is not None and value not in values:
            return f"{path} has value {value}, which is not in {category.defects_config}"
        return None

    pairs = [(image, path) for image, found in masks.items() for path in found or []]
    findings.errors += [said for said in pool.map(complaint, pairs) if said]
    if lossy:
        findings.warnings.append(
            "masks in a lossy format, in which only what is brighter than half of the "
            "brightest pixel counts as defect; store masks as PNG: " + names(category.root, sorted(lossy))
        )


def pixel_values(category: layouts.Category) -> set[int]:
    saturations: dict[int, tuple[object, object]] = {}
    try:
        for entry in files.read_json(category.defects_config, files.MEND):
            value = int(entry["pixel_value"])
            saturation = entry.get("saturation_threshold"), entry.get("relative_saturation")
            if saturations.setdefault(value, saturation) != saturation:
                raise UserError(
                    f"{category.defects_config}: pixel_value {value} stands there twice with "
                    "different saturations; keep one of them"
                )
        return set(saturations)
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(
            f"{category.defects_config} should be a list of entries with pixel_value and defect_name"
        ) from problem


def about_rate(validation: int, rate: float | None, findings: Findings) -> None:
    """What a threshold from so many validation images can promise (split conformal prediction)."""
    if not validation:
        return
    mean, sure = 1 / (validation + 1), 1 - (1 - CONFIDENCE) ** (1 / validation)
    findings.notes.append(
        f"a threshold from {validation} validation image{'s' * (validation > 1)} can promise "
        f"{100 * mean:.1f} % false positives on average, {100 * sure:.1f} % with 95 % confidence"
    )
    if rate is not None:
        on_average = math.ceil(round(1 / rate - 1, 6))
        for_sure = math.ceil(round(math.log(1 - CONFIDENCE) / math.log(1 - rate), 6))
        if validation < on_average:
            findings.warnings.append(
                f"a false-positive rate of {rate:g} needs {on_average} validation images on average and "
                f"{for_sure} for 95 % confidence; there {'is' if validation == 1 else 'are'} {validation}"
            )


def names(root: Path, paths: Sequence[Path]) -> str:
    shown = ", ".join(str(path.relative_to(root)) for path in paths[:NAMED])
    return shown + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")
