"""What differs from most images of a category, and which of them are copies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from csad.data.findings import Findings, file_names, some_of
from csad.data.images import ASPECT_TOLERANCE
from csad.data.pictures import ImageInfo, near_copies

from models.constants import SIZE


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
        if abs(picture.size[0] / picture.size[1] / (width / height) - 1) > ASPECT_TOLERANCE:
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
    seen = [picture for picture in pictures if picture.thumbnail is not None]
    add(
        findings.warnings,
        "16-bit images that use less than a quarter of their range (14 bits? then set --images.white_level 16383)",
        [picture for picture in seen if picture.bits == 16 and picture.values[1] < 64],
    )
    blank = [picture for picture in seen if picture.values[0] == picture.values[1]]
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
        if picture.digest:
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
