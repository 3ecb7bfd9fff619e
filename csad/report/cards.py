"""The cards of the page, one for each test image: its pictures, verdict and findings; as many and as large as fit."""

from __future__ import annotations

from typing import Any

from csad.data import images
from csad.errors import UserError
from csad.evaluation.deviations import deviations
from csad.inference import inspection, overlays, verdicts
from csad.report.measured import TestImage

import numpy as np

PICTURES_LIMIT = 10_500_000  # bytes of test pictures; with base64's third and the text beside them the page stays under 20 MB
# Of the test pictures: the largest with which they stay within the limit.
SIDES = (256, 208, 160, 128, 96, 64)
QUALITY = 70
SAMPLE = 12  # images by whose size the side is chosen


def choose_side(tested: list[TestImage]) -> tuple[int, list[TestImage], int]:
    """The side of pictures with which all fit into `PICTURES_LIMIT`, judged by a few; where none does, the smallest, the most
    telling images alone, errors first, and how many are left out."""
    sample = [
        tested[index]
        for index in np.unique(np.linspace(0, len(tested) - 1, min(SAMPLE, len(tested))).astype(int))
    ]
    for side in SIDES:
        letters = [sum(len(uri) for _, uri in card(image, side)["pictures"]) for image in sample]
        size = 1.15 * np.mean(letters) * 0.75
        if size * len(tested) <= PICTURES_LIMIT:
            return side, tested, 0
    most_telling = sorted(tested, key=lambda image: (not image.error, -image.score))[
        : int(PICTURES_LIMIT / size)
    ]
    return side, most_telling, len(tested) - len(most_telling)


def card(tested: TestImage, side: int) -> dict[str, Any]:
    """What the page shows of one test image."""
    measured, category = tested.measured, tested.measured.category
    image = images.read_rgb(tested.path, white_level=measured.white_level)
    size = image.shape[1::-1]
    image = overlays.shrink(image, side)
    deciding_branch = max(tested.contributions, key=tested.contributions.__getitem__)
    spot = None
    if tested.anomaly_maps:
        at_once = np.max(list(tested.anomaly_maps.values()), axis=0)
        deciding_map = tested.anomaly_maps.get(deciding_branch, at_once)
        spot = inspection.maximum_of(deciding_map if deciding_map.any() else at_once, size)
    if measured.roi is not None:
        image = overlays.outline(image, measured.roi)

    def marked(picture: np.ndarray) -> np.ndarray:
        return overlays.ring(picture, spot, size) if tested.anomalous and spot is not None else picture

    drawn = [("image", marked(image))]
    try:
        masks = [images.read_mask(path) > 0 for path in category.region_masks(tested.split, tested.path)]
        if masks:
            drawn = [("image, annotated region outlined", marked(overlays.outline(image, *masks)))]
    except UserError:  # stage 5 says what is wrong with it; the page is worth having without
        drawn = [("image, annotated region unreadable", marked(image))]
    reasons, legend = [], []
    label_file = measured.workspace.segmentation_output(
        category.name, tested.split, category.key(tested.path)
    )
    if label_file.exists():
        label_map = images.read_mask(label_file)
        drawn.append(("components", overlays.label_overlay(image, label_map)))
        histogram, _ = measured.histogram
        reasons = deviations(label_map, histogram, measured.names) if histogram else []
        components = (
            range(1, len(histogram["mean"])) if histogram else np.unique(label_map[label_map > 0]).tolist()
        )
        legend = [(component, measured.names.get(component, "")) for component in components]
    if tested.anomaly_maps:
        explaining = overlays.explaining_map(tested.anomaly_maps, tested.contributions)
        drawn.append(
            ("how unusual each place is", marked(overlays.heat_overlay(image, explaining, tested.anomalous)))
        )
    verdict = verdicts.Verdict(
        tested.path,
        verdicts.ANOMALOUS if tested.anomalous else verdicts.NORMAL,
        measured.threshold.value,
        tested.score,
        tested.contributions,
        deciding_branch,
        spot,
        reasons,
        size,
    )
    return {
        "category": category.name,
        "split": tested.split.removesuffix("_anomalies"),
        "name": tested.path.name,
        "score": tested.score,
        "threshold": measured.threshold.value,
        "branches": tested.contributions,
        "anomalous": tested.anomalous,
        "error": tested.error,
        "findings": verdict.findings,
        "legend": legend,
        "pictures": [(title, overlays.data_uri(picture, QUALITY)) for title, picture in drawn],
    }
