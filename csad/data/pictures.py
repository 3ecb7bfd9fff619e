"""Image files of a data set: how they are stored, what differs from most of a category, and which are copies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csad.data import image_files, images, records
from csad.data.findings import Findings, file_names, some_of
from csad.errors import UserError

import imagehash
import numpy as np
from PIL import Image, ImageFile

from models.constants import SIZE

THUMBNAIL = 96
# Near copies: recompressed or resized ones differ in up to 36 of 256 bits, but by less than a grey level; different good pictures
# of one kind by 4 grey levels and more (measured on the rendered categories and on real parts).
HASH_SIDE, HASH_DISTANCE, MEAN_DIFFERENCE, LOCAL_DIFFERENCE = 16, 40, 1.5, 10


@dataclass(frozen=True)
class ImageInfo:
    """What is known of one image file."""

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
    hash: np.ndarray | None = None  # (HASH_SIDE**2,) bool, which recompression and resizing hardly change

    @property
    def stored(self) -> str:
        return f"{self.bits}-bit {'colour' if self.colour else 'grey'}"


def examine(path: Path, split: str, white_level: float | None) -> ImageInfo:
    """Read an image as the stages do, JPEG at a reduced size."""
    try:
        with image_files.opened(path) as image:
            fields = header_fields(image)
            if image.format == "JPEG":
                image.draft(image.mode, (2 * THUMBNAIL, 2 * THUMBNAIL))
            layered = image.has_transparency_data
            pixels = images.as_rgb(image, path, white_level)
            transparent = layered and fields["bits"] == 8 and images.is_see_through(image.convert("RGBA"))
        thumbnail = Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return ImageInfo(
            path,
            split,
            **fields,
            transparent=transparent,
            values=(int(pixels.min()), int(pixels.max())),
            digest=records.digest(path),
            thumbnail=np.asarray(thumbnail),
            hash=imagehash.phash(thumbnail, hash_size=HASH_SIDE).hash.ravel(),
        )
    except UserError as problem:
        return ImageInfo(path, split, str(problem))


def header_fields(image: ImageFile.ImageFile) -> dict[str, Any]:
    """What `ImageInfo` notes of an image whose pixels are not read yet."""
    raw_mode = image_files.raw_mode_of(image)
    deep = ";16" in image.mode + raw_mode and raw_mode not in image_files.PACKED
    bits = {"1": 1, "I": 32, "F": 32}.get(image.mode, 16 if deep else 8)
    orientation = image_files.orientation_of(image)
    across = orientation in (5, 6, 7, 8) and image.format != "TIFF"
    return {
        "size": image.size[::-1] if across else image.size,
        "format": "JPEG" if image.format == "MPO" else image.format,
        "bits": bits,
        "colour": image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"),
        "turned": orientation in range(2, 9),
    }


def near_copies(pictures: Sequence[ImageInfo]) -> list[tuple[ImageInfo, ImageInfo]]:
    """Pairs that look the same: hashes nearly alike, and no part of the thumbnails differs once brightness is taken off."""
    seen = [
        (picture, picture.hash, picture.thumbnail)
        for picture in pictures
        if picture.hash is not None and picture.thumbnail is not None
    ]
    if not seen:
        return []
    signs = np.stack([bits for _, bits, _ in seen]).astype(np.float32) * 2 - 1
    grey = [Image.fromarray(thumbnail).convert("L") for *_, thumbnail in seen]
    small = np.stack([np.asarray(thumbnail, np.int16) for thumbnail in grey])
    small = small - small.mean((1, 2), keepdims=True, dtype=np.float32).round().astype(np.int16)
    copies = []
    # Rows at a time: memory grows with the number of images, not with its square.
    for start in range(0, len(seen), 500):
        distances = (signs.shape[1] - signs[start : start + 500] @ signs.T) / 2
        for row, column in zip(*np.nonzero(distances <= HASH_DISTANCE)):
            first = start + row
            if first < column:
                difference = np.abs(small[first] - small[column])
                if difference.mean() <= MEAN_DIFFERENCE and np.percentile(difference, 99) <= LOCAL_DIFFERENCE:
                    copies.append((seen[first][0], seen[column][0]))
    return copies


def describe(pictures: Mapping[str, Sequence[ImageInfo]]) -> list[str]:
    """One line per folder: how many images there are, and how they are stored."""
    rows = [("folder", "images", "sizes", "formats", "stored as", "values")]
    for folder, in_folder in pictures.items():
        readable = [picture for picture in in_folder if not picture.problem]
        stored = ("", "", "", "")
        if readable:
            darkest, brightest = zip(*(picture.values for picture in readable))
            stored = (
                with_counts(f"{picture.size[0]}x{picture.size[1]}" for picture in readable),
                with_counts(picture.format for picture in readable),
                with_counts(picture.stored for picture in readable),
                f"{min(darkest)}..{max(brightest)}",
            )
        rows.append((folder, str(len(in_folder)), *stored))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def with_counts(values: Iterable[str]) -> str:
    """The different values, the most frequent first, with their numbers where there are several."""
    counts = Counter(values).most_common()
    listed = ", ".join(value if len(counts) == 1 else f"{number} {value}" for value, number in counts[:3])
    return listed + (f", {len(counts) - 3} others" if len(counts) > 3 else "")


def check_storage(root: Path, pictures: Sequence[ImageInfo], findings: Findings) -> None:
    """Sizes, formats, bit depths, colour, orientation and transparency: what differs from most of the images is named."""
    if not pictures:
        return

    def add(messages: list[str], sentence: str, odd: Sequence[ImageInfo]) -> None:
        if odd:
            paths = [picture.path for picture in odd]
            messages.append(
                f"{sentence}: {'all' if len(odd) == len(pictures) > 1 else file_names(root, paths)}"
            )

    (width, height), _ = Counter(picture.size for picture in pictures).most_common(1)[0]
    most = f"most images are {width}x{height}"
    stretched, resized = [], []
    for picture in pictures:
        if abs(picture.size[0] / picture.size[1] / (width / height) - 1) > images.ASPECT_TOLERANCE:
            stretched.append(picture)
        elif picture.size != (width, height):
            resized.append(picture)
    add(findings.warnings, f"{most}, but of another shape, and so stretched otherwise", stretched)
    add(findings.notes, f"{most}, of the same shape but another size", resized)
    small = [picture for picture in pictures if min(picture.size) < SIZE]
    add(findings.notes, f"smaller than the {SIZE} pixels that the networks see", small)
    for describe_one in (
        lambda picture: f"of {picture.bits} bits",
        lambda picture: "in colour" if picture.colour else "grey",
    ):
        common, *rare = [value for value, _ in Counter(map(describe_one, pictures)).most_common()]
        others = [picture for picture in pictures if describe_one(picture) != common]
        add(findings.warnings, f"most images are {common}, but {' and '.join(rare)}", others)
    training_formats = {picture.format for picture in pictures if picture.split == "train"}
    if training_formats:
        add(
            findings.warnings,
            f"training images are stored as {', '.join(sorted(training_formats))}, but in another format, whose "
            "traces alone may tell them apart",
            [p for p in pictures if p.split != "train" and p.format not in training_formats],
        )
    add(
        findings.warnings,
        "16-bit images that use less than a quarter of their range (14 bits? then set --images.white_level 16383)",
        [picture for picture in pictures if picture.bits == 16 and picture.values[1] < 64],
    )
    blank = [picture for picture in pictures if picture.values[0] == picture.values[1]]
    add(findings.warnings, "of one colour all over", blank)
    turned = [picture for picture in pictures if picture.turned]
    add(findings.notes, "turned upright as their EXIF orientation says", turned)
    transparent = [picture for picture in pictures if picture.transparent]
    messages = findings.notes if len(transparent) == len(pictures) else findings.warnings
    add(messages, "with transparent pixels, which are seen as white", transparent)


def check_copies(root: Path, pictures: Sequence[ImageInfo], findings: Findings) -> None:
    """Images that are there twice, byte for byte or nearly, within and between training, validation and test."""
    by_digest = defaultdict(list)
    for picture in pictures:
        by_digest[picture.digest].append(picture)
    pairs = [(first, copy, "the same file") for first, *copies in by_digest.values() for copy in copies]
    near = near_copies([group[0] for group in by_digest.values()])
    pairs += [(first, copy, "nearly the same") for first, copy in near]
    equations = defaultdict(list)
    for first, copy, how in pairs:
        same_split = first.split == copy.split
        where = f"within {first.split}" if same_split else f"in {first.split} and {copy.split}"
        equations[f"{how} {where}"].append(f"{first.path.relative_to(root)} = {copy.path.relative_to(root)}")
    findings.warnings += [f"{title}: {some_of(copies)}" for title, copies in equations.items()]
