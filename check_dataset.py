"""What the stages will see in a data set, and what they will not: looked at before it costs an hour.

Says for every category its layout, the images of every folder and how they are stored, and names whatever is odd: unreadable
files, copies between training and test, masks that fit no image, what is left out and why.

Exit status: 0 nothing to say against it, 4 with warnings, 2 where the stages could not run.
"""

from __future__ import annotations

import argparse
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from data import images, layouts, records
from data.roi import read_roi
from errors import UserError, run_script

WARNED = 4
THUMBNAIL = 96
CONFIDENCE = 0.95
NAMED = 5  # files named in one message; the others are counted
SHOWN = 400  # pictures on a contact sheet
# Near copies: recompressed or resized ones differ in up to 36 of 256 bits, but by less than a grey level; different good pictures
# of one kind by 4 grey levels and more (measured on the rendered categories and on real parts).
HASH_SIDE, HASH_DISTANCE, MEAN_DIFFERENCE, LOCAL_DIFFERENCE = 16, 40, 1.5, 10
ASPECT_TOLERANCE = 0.02


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


@dataclass(frozen=True)
class Picture:
    """One image file as it was found."""

    path: Path
    split: str  # train, validation or test
    problem: str | None = None  # a sentence, where it cannot be read; nothing below holds then
    size: tuple[int, int] = (0, 0)  # (W, H), the right way up
    format: str = ""
    bits: int = 8
    colour: bool = True
    turned: bool = False  # by an EXIF orientation
    transparent: bool = False
    values: tuple[int, int] = (0, 255)  # darkest and brightest, in 8 bits
    digest: str = ""
    thumbnail: np.ndarray | None = None  # (THUMBNAIL, THUMBNAIL, 3) uint8
    hash: np.ndarray | None = None  # (HASH_SIDE**2,) bool

    @property
    def stored(self) -> str:
        return f"{self.bits}-bit {'colour' if self.colour else 'grey'}"


def main() -> None:
    args = parse_arguments()
    dataset = layouts.Dataset(args.dataset_root)
    categories = dataset.select(args.categories)
    if args.output and args.output.resolve().is_relative_to(args.dataset_root.resolve()):
        raise UserError(f"--output {args.output} lies in the data set, where its pictures would be taken for images; "
                        "name another folder")
    odd = {} if args.categories else {path: why for path, why in dataset.unused}
    warnings, errors = len(odd), 0
    for path, why in odd.items():
        print(f"warning: {path} is not used: {why}")
    for category in categories:
        findings, pictures = check(category, args.false_positive_rate, args.white_level)
        print_findings(findings)
        warnings, errors = warnings + len(findings.warnings), errors + len(findings.errors)
        if args.output:
            for folder, shown in pictures.items():
                write_contact_sheet(args.output / f"{category.name}_{folder.replace(os.sep, '_')}.png", shown)
    print(f"categories: {len(categories)}, errors: {errors}, warnings: {warnings}"
          + (f"; contact sheets in {args.output}" if args.output else ""))
    if errors:
        raise UserError("the stages cannot run on this data set as it is; mend what is marked 'error'")
    if warnings:
        raise SystemExit(WARNED)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_root", type=Path, default=Path("datasets/mvtec_loco_anomaly_detection"),
                        help="data set (default: %(default)s)")
    parser.add_argument("--categories", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write a contact sheet (PNG) of every folder there")
    parser.add_argument("--false_positive_rate", type=float, metavar="RATE",
                        help="say whether there are enough validation images for a threshold with this rate, for example 0.05")
    parser.add_argument("--images.white_level", type=float, dest="white_level", metavar="VALUE",
                        help="the stored value that is white in files of more than 8 bits")
    args = parser.parse_args()
    if args.false_positive_rate is not None and not 0 < args.false_positive_rate < 1:
        raise UserError(f"--false_positive_rate is {args.false_positive_rate}; it must lie between 0 and 1")
    return args


# One category

def check(category: layouts.Category, false_positive_rate: float | None = None,
          white_level: float | None = None) -> tuple[Findings, dict[str, list[Picture]]]:
    """Read every image and mask of a category.

    Returns:
        What there is to say, and the pictures by folder.
    """
    findings = Findings()
    line = findings.attempt(lambda: category.layout_line)
    findings.lines.append(str(line or f"{category.name}: the stages cannot run on it"))
    listed = findings.attempt(lambda: category.listed) or {}
    about_unused(category, findings)
    validation = set(findings.attempt(lambda: category.validation) or [])
    todo = [(folder, path, split_of(folder, path in validation)) for folder, paths in listed.items() for path in paths]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        found = list(tqdm(pool.map(lambda one: examine(one[1], one[2], white_level), todo), total=len(todo), unit="image",
                          desc=f"{category.name}: read images", leave=False))
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
    findings.attempt(lambda: read_roi(category, images.SIZE))
    about_rate(len(validation), false_positive_rate, findings)
    return findings, pictures


def quick_check(category: layouts.Category, false_positive_rate: float | None = None) -> list[str]:
    """Warnings that need no pixels: what is left out, files that differ in kind, copies byte for byte, too few images.

    Raises:
        UserError: the stages could not run on the category.
    """
    findings = Findings()
    about_unused(category, findings)
    validation = set(category.validation)
    looked = [look(path, split_of(folder, path in validation)) for folder, paths in category.listed.items() for path in paths]
    findings.warnings += [picture.problem for picture in looked if picture.problem]
    readable = [picture for picture in looked if not picture.problem]
    about_storage(category.root, readable, findings)
    about_copies(category.root, with_digests_where_alike(readable), findings)
    about_rate(len(validation), false_positive_rate, findings)
    return findings.warnings


def split_of(folder: str, in_validation: bool) -> str:
    return "validation" if in_validation else "test" if Path(folder).parts[:1] == ("test",) else "train"


def look(path: Path, split: str) -> Picture:
    """What a file's header says."""
    try:
        with images.opened(path) as image:
            return Picture(path, split, **header(image))
    except UserError as problem:
        return Picture(path, split, str(problem))


def examine(path: Path, split: str, white_level: float | None) -> Picture:
    """Read an image as the stages do, JPEG at a reduced size."""
    try:
        with images.opened(path) as image:
            said = header(image)
            if image.format == "JPEG":
                image.draft(image.mode, (2 * THUMBNAIL, 2 * THUMBNAIL))
            layered = image.has_transparency_data
            pixels = images.as_rgb(image, path, white_level)
            transparent = layered and said["bits"] == 8 and image.convert("RGBA").getextrema()[3][0] < 255
        thumbnail = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return Picture(path, split, **said, transparent=transparent, values=(int(pixels.min()), int(pixels.max())),
                       digest=records.digest(path), thumbnail=np.asarray(thumbnail), hash=perceptual_hash(thumbnail))
    except UserError as problem:
        return Picture(path, split, str(problem))


def header(image: Image.Image) -> dict:
    """What `Picture` notes of an image whose pixels are not read yet."""
    tile = str(image.tile[0].args) if image.tile else ""
    bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if ";16" in image.mode + tile else 8)
    # A PNG's orientation may come after its pixels; that rare one is still turned, but not counted here.
    asked = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(images.ORIENTATION_TAG, 1) if asked else 1
    across = orientation in (5, 6, 7, 8) and image.format != "TIFF"
    return {"size": image.size[::-1] if across else image.size, "format": "JPEG" if image.format == "MPO" else image.format,
            "bits": bits, "colour": image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"),
            "turned": orientation in range(2, 9)}


def perceptual_hash(picture: Image.Image) -> np.ndarray | None:
    """Bits that survive recompression and resizing; None without the library."""
    try:
        import imagehash
    except ImportError:
        return None
    return imagehash.phash(picture, hash_size=HASH_SIDE).hash.ravel()


# What is said

def describe(pictures: dict[str, list[Picture]]) -> list[str]:
    """One line per folder: how many images there are, and how they are stored."""
    rows = [("folder", "images", "sizes", "formats", "stored as", "values")]
    for folder, found in pictures.items():
        readable = [picture for picture in found if not picture.problem]
        if readable:
            values = f"{min(one.values[0] for one in readable)}..{max(one.values[1] for one in readable)}"
            rows.append((folder, str(len(found)), counted(f"{one.size[0]}x{one.size[1]}" for one in readable),
                         counted(one.format for one in readable), counted(one.stored for one in readable), values))
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
        litter = why == "hidden" and not any(path.suffix.lower() in images.SUFFIXES for path in paths)
        (findings.notes if litter else findings.warnings).append(f"not used: {names(category.root, paths)}: {why}")


def about_storage(root: Path, pictures: Sequence[Picture], findings: Findings) -> None:
    """Sizes, formats, bit depths, colour, orientation and transparency: what differs from most of the images is named."""
    def named(chosen: Sequence[Picture]) -> str:
        return "all" if len(chosen) == len(pictures) > 1 else names(root, [picture.path for picture in chosen])

    if not pictures:
        return
    usual = Counter(picture.size for picture in pictures).most_common(1)[0][0]
    aspect = usual[0] / usual[1]
    other = [one for one in pictures if abs(one.size[0] / one.size[1] / aspect - 1) > ASPECT_TOLERANCE]
    if other:
        findings.warnings.append(f"most images are {usual[0]}x{usual[1]}, but of another shape, and so stretched otherwise: "
                                 f"{named(other)}")
    resized = [one for one in pictures if one.size != usual and one not in other]
    if resized:
        findings.notes.append(f"most images are {usual[0]}x{usual[1]}, of the same shape but another size: {named(resized)}")
    small = [one for one in pictures if min(one.size) < images.SIZE]
    if small:
        findings.notes.append(f"smaller than the {images.SIZE} pixels that the networks see: {named(small)}")
    for of, what in ((lambda one: one.bits, "of {} bits"), (lambda one: "in colour" if one.colour else "grey", "{}")):
        common = Counter(map(of, pictures)).most_common()
        if len(common) > 1:
            odd = [one for one in pictures if of(one) != common[0][0]]
            kinds = " and ".join(what.format(kind) for kind, _ in common[1:])
            findings.warnings.append(f"most images are {what.format(common[0][0])}, but {kinds}: {named(odd)}")
    training = {one.format for one in pictures if one.split == "train"}
    odd = [one for one in pictures if one.split != "train" and one.format not in training]
    if training and odd:
        findings.warnings.append(f"training images are stored as {', '.join(sorted(training))}, but in another format, whose "
                                 f"traces alone may tell them apart: {named(odd)}")
    dark = [one for one in pictures if one.bits == 16 and one.thumbnail is not None and one.values[1] < 64]
    if dark:
        findings.warnings.append("16-bit images that use less than a quarter of their range (14 bits? then set "
                                 f"--images.white_level 16383): {named(dark)}")
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
    pairs += [(first, other, "nearly the same") for first, other in near_copies([group[0] for group in groups.values()])]
    if pictures and pictures[0].thumbnail is not None and pictures[0].hash is None:
        findings.notes.append("near copies were not looked for; pip install ImageHash does")
    kinds = defaultdict(list)
    for first, other, how in pairs:
        between = f"within {first.split}" if first.split == other.split else f"in {first.split} and {other.split}"
        kinds[how, between].append(f"{first.path.relative_to(root)} = {other.path.relative_to(root)}")
    for (how, between), equal in kinds.items():
        more = f" and {len(equal) - NAMED} more" if len(equal) > NAMED else ""
        findings.warnings.append(f"{how} {between}: {', '.join(equal[:NAMED])}{more}")


def near_copies(pictures: Sequence[Picture]) -> list[tuple[Picture, Picture]]:
    """Pairs that look the same: hashes nearly alike, and no part of the thumbnails differs once brightness is taken off."""
    hashed = [picture for picture in pictures if picture.hash is not None]
    if len(hashed) < 2:
        return []
    signs = np.stack([picture.hash for picture in hashed]).astype(np.float32) * 2 - 1
    small = np.stack([np.asarray(Image.fromarray(picture.thumbnail).convert("L"), np.int16) for picture in hashed])
    small = small - small.mean((1, 2), keepdims=True, dtype=np.float32).round().astype(np.int16)
    found = []
    for start in range(0, len(hashed), 500):  # rows at a time: memory grows with the number of images, not with its square
        distances = (signs.shape[1] - signs[start:start + 500] @ signs.T) / 2
        for row, column in zip(*np.nonzero(distances <= HASH_DISTANCE)):
            first = start + row
            if first < column:
                difference = np.abs(small[first] - small[column])
                if difference.mean() <= MEAN_DIFFERENCE and np.percentile(difference, 99) <= LOCAL_DIFFERENCE:
                    found.append((hashed[first], hashed[column]))
    return found


def with_digests_where_alike(pictures: Sequence[Picture]) -> list[Picture]:
    """Digests of those files only of which another has the same length, beginning and middle: few files are read whole."""
    def fingerprint(path: Path) -> tuple[int, bytes]:
        length = path.stat().st_size
        with open(path, "rb") as handle:
            start = handle.read(4096)
            handle.seek(length // 2)
            return length, start + handle.read(4096)

    groups = defaultdict(list)
    for picture in pictures:
        groups[fingerprint(picture.path)].append(picture)
    return [Picture(one.path, one.split, digest=records.digest(one.path))
            for group in groups.values() if len(group) > 1 for one in group]


def about_masks(category: layouts.Category, sizes: dict[Path, tuple[int, int]], findings: Findings,
                pool: ThreadPoolExecutor) -> None:
    """Ground truth that is missing, unreadable, empty, of another size, or names no defect."""
    anomalous = [(split, path) for split in (layouts.LOGICAL, layouts.STRUCTURAL)
                 for path in findings.attempt(lambda split=split: category.test(split)) or []]
    masks = {path: findings.attempt(lambda split=split, path=path: category.region_masks(split, path))
             for split, path in anomalous}
    without = [path for path, found in masks.items() if found == []]
    if without and len(without) < len(masks):
        findings.warnings.append(f"anomalous, but without a ground-truth mask: {names(category.root, without)}")
    elif without:
        findings.notes.append("no ground-truth masks, so localisation is not measured")
    values = None
    if category.defects_config.exists():
        values = findings.attempt(lambda: pixel_values(category))
    elif category.layout == layouts.Loco.name and len(without) < len(masks):
        findings.warnings.append(f"there are masks, but no {category.defects_config} that says what their values mean")

    def complaint(one: tuple[Path, Path]) -> str | None:
        image, path = one
        try:
            mask = images.read_mask(path)
        except UserError as problem:
            return str(problem)
        size = sizes.get(image)
        if size is not None and mask.shape != size[::-1]:
            return f"{path} is {mask.shape[1]}x{mask.shape[0]}, but its image {size[0]}x{size[1]}"
        if not mask.any():
            return f"{path} is empty: it marks no region"
        if values is not None and int(mask.max()) not in values:
            return f"{path} has value {mask.max()}, which is not in {category.defects_config}"
        return None

    pairs = [(image, path) for image, found in masks.items() for path in found or []]
    findings.errors += [said for said in pool.map(complaint, pairs) if said]


def pixel_values(category: layouts.Category) -> set[int]:
    try:
        return {int(entry["pixel_value"]) for entry in layouts.read_json(category.defects_config)}
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(f"{category.defects_config} should be a list of entries with pixel_value and defect_name") from problem


def about_rate(validation: int, rate: float | None, findings: Findings) -> None:
    """What a threshold from so many validation images can promise (split conformal prediction)."""
    if not validation:
        return
    mean, sure = 1 / (validation + 1), 1 - (1 - CONFIDENCE) ** (1 / validation)
    findings.notes.append(f"a threshold from {validation} validation image{'s' * (validation > 1)} can promise "
                          f"{100 * mean:.1f} % false positives on average, {100 * sure:.1f} % with 95 % confidence")
    if rate is not None:
        on_average = math.ceil(round(1 / rate - 1, 6))
        for_sure = math.ceil(round(math.log(1 - CONFIDENCE) / math.log(1 - rate), 6))
        if validation < on_average:
            findings.warnings.append(f"a false-positive rate of {rate:g} needs {on_average} validation images on average and "
                                     f"{for_sure} for 95 % confidence; there {'is' if validation == 1 else 'are'} {validation}")


def names(root: Path, paths: Sequence[Path]) -> str:
    shown = ", ".join(str(path.relative_to(root)) for path in paths[:NAMED])
    return shown + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")


def print_findings(findings: Findings) -> None:
    for line in findings.lines:
        print(line)
    for kind in ("note", "warning", "error"):
        for said in getattr(findings, f"{kind}s"):
            print(f"  {kind}: {said}")
    print()


def write_contact_sheet(path: Path, pictures: Sequence[Picture]) -> None:
    """The first `SHOWN` pictures of a folder with their names; red where one cannot be read."""
    from data import files  # needs PyTorch, which the rest does not

    shown = pictures[:SHOWN]
    columns = max(1, min(16, len(shown)))
    cell = THUMBNAIL + 4, THUMBNAIL + 16
    sheet = Image.new("RGB", (columns * cell[0], max(1, math.ceil(len(shown) / columns)) * cell[1]), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, picture in enumerate(shown):
        place = index % columns * cell[0] + 2, index // columns * cell[1] + 2
        tile = Image.new("RGB", (THUMBNAIL, THUMBNAIL), (200, 0, 0)) if picture.thumbnail is None else (
            Image.fromarray(picture.thumbnail))
        sheet.paste(tile, place)
        name = picture.path.name if len(picture.path.name) <= 16 else f"{picture.path.name[:13]}..."
        draw.text((place[0], place[1] + THUMBNAIL), name.encode("ascii", "replace").decode(), (0, 0, 0), font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    files.write_bytes(path, buffer.getvalue())


if __name__ == "__main__":
    run_script(main)
