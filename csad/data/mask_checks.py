"""What can be wrong with ground truth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from csad.data import image_files, layouts
from csad.data.defects import read_region_mask, read_saturations
from csad.data.findings import Findings, file_names
from csad.errors import UserError


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
        values = findings.collect_errors(lambda: read_saturations(category))
    elif category.layout == layouts.Loco.name and len(without) < len(masks):
        findings.warnings.append(
            f"there are masks, but no {category.defects_config} that says what their values mean"
        )

    lossy: list[Path] = []

    def complaint(pair: tuple[Path, Path]) -> str | None:
        image, path = pair
        try:
            read_region_mask(category, path, sizes.get(image), values)
            if image_files.is_lossy(path):
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
