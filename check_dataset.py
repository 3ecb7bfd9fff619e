"""What the stages will see in a data set, and what they will not, before it costs an hour.

Says for every category its layout, the images of every folder and how they are stored, and names whatever is odd: unreadable
files, copies between training and test, masks that fit no image, what is left out and why.

Exit status: 0 no errors and no warnings; 4 warnings alone: the stages run, but look at them first; 2 errors: the stages cannot
run on this data set, or an option is wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from csad.cli import common_options, select
from csad.data import files
from csad.data.checks import check
from csad.data.findings import Findings
from csad.data.listing import LONGEST_KEY, short_name
from csad.data.pictures import THUMBNAIL, ImageInfo
from csad.errors import UserError, run_script
from csad.evaluation.thresholds import fraction

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WARNED = 4
SHOWN = 400  # pictures on a contact sheet


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument(
        "--output",
        type=files.path_argument,
        metavar="FOLDER",
        help="write a contact sheet (PNG) of every folder there",
    )
    parser.add_argument(
        "--false_positive_rate",
        type=float,
        metavar="RATE",
        help="say whether there are enough validation images for a threshold with this rate, for example 0.05",
    )
    args = parser.parse_args()
    if args.false_positive_rate is not None:
        fraction(args.false_positive_rate, "--false_positive_rate")
    _, dataset, categories, settings_of = select(args)
    if args.output and args.output.resolve().is_relative_to(dataset.root.resolve()):
        raise UserError(
            f"--output {args.output} lies in the data set, where its pictures would be taken for images; "
            "name another folder"
        )
    odd = [] if args.categories else dataset.unused
    warnings, errors = len(odd), 0
    for path, why in odd:
        print(f"warning: {path} is not used: {why}")
    for category in categories:
        findings, pictures = check(category, settings_of[category.name], args.false_positive_rate)
        print_findings(findings)
        warnings, errors = warnings + len(findings.warnings), errors + len(findings.errors)
        if args.output:
            for folder, shown in pictures.items():
                name = short_name(f"{category.name}_{folder.replace(os.sep, '_')}", LONGEST_KEY)
                write_contact_sheet(args.output / f"{name}.png", shown)
    print(
        f"categories: {len(categories)}, errors: {errors}, warnings: {warnings}"
        + (f"; contact sheets in {args.output}" if args.output else "")
    )
    if errors:
        raise UserError("the stages cannot run on this data set as it is; fix the entries marked 'error'")
    if warnings:
        raise SystemExit(WARNED)


def print_findings(findings: Findings) -> None:
    for line in findings.lines:
        print(line)
    for kind in ("note", "warning", "error"):
        for message in getattr(findings, f"{kind}s"):
            print(f"  {kind}: {message}")
    print()


def write_contact_sheet(path: Path, pictures: Sequence[ImageInfo]) -> None:
    """The first `SHOWN` pictures of a folder with their names; red where one cannot be read."""
    shown = pictures[:SHOWN]
    columns = max(1, min(16, len(shown)))
    cell = THUMBNAIL + 4, THUMBNAIL + 16
    sheet = Image.new(
        "RGB", (columns * cell[0], max(1, math.ceil(len(shown) / columns)) * cell[1]), (255, 255, 255)
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for index, picture in enumerate(shown):
        corner = index % columns * cell[0] + 2, index // columns * cell[1] + 2
        tile = (
            Image.new("RGB", (THUMBNAIL, THUMBNAIL), (200, 0, 0))
            if picture.thumbnail is None
            else Image.fromarray(picture.thumbnail)
        )
        sheet.paste(tile, corner)
        name = picture.path.name if len(picture.path.name) <= 16 else f"{picture.path.name[:13]}..."
        draw.text(
            (corner[0], corner[1] + THUMBNAIL), name.encode("ascii", "replace").decode(), (0, 0, 0), font
        )
    files.write_image(path, np.asarray(sheet))


if __name__ == "__main__":
    run_script(main)
