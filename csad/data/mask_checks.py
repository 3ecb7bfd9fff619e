"""What can be wrong with ground truth."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from csad.data import files, image_files, images, layouts
from csad.data.defects import pixel_value
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
        values = findings.collect_errors(lambda: pixel_values(category))
    elif category.layout == layouts.Loco.name and len(without) < len(masks):
        findings.warnings.append(
            f"there are masks, but no {category.defects_config} that says what their values mean"
        )

    lossy: list[Path] = []

    def complaint(pair: tuple[Path, Path]) -> str | None:
        image, path = pair
        try:
            mask = images.read_mask(path)
            if image_files.is_lossy(path):
                lossy.append(path)
            value = pixel_value(path, mask, values or ())
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

    pairs = [(image, path) for image, of_image in masks.items() for path in of_image or []]
    findings.errors += [message for message in pool.map(complaint, pairs) if message]
    if lossy:
        findings.warnings.append(
            "masks in a lossy format, in which only what is brighter than half of the "
            "brightest pixel counts as defect; store masks as PNG: "
            + file_names(category.root, sorted(lossy))
        )


def pixel_values(category: layouts.Category) -> set[int]:
    """The pixel values that defects_config.json defines; UserError if it says something else, or a value
    twice with different saturations."""
    saturations: dict[int, tuple[object, object]] = {}
    try:
        for entry in files.read_json(category.defects_config, files.MEND):
            value = int(entry["pixel_value"])
            saturation = entry.get("saturation_threshold"), entry.get("relative_saturation")
            if saturations.setdefault(value, saturation) != saturation:
                raise UserError(
                    f"{category.defects_config}: pixel_value {value} occurs twice with "
                    "different saturations; keep one of them"
                )
        return set(saturations)
    except (KeyError, TypeError, ValueError) as problem:
        raise UserError(
            f"{category.defects_config} should be a list of entries with pixel_value and defect_name"
        ) from problem
