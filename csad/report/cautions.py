"""What a reader of the page should know about a category's components before the figures: what is poor, and what to try."""

from __future__ import annotations

from csad.data import files
from csad.data.listing import count
from csad.evaluation.branch_weights import HISTOGRAM, parts_noticed
from csad.evaluation.deviations import SMALL, title_of
from csad.report.measured import Measured

import numpy as np

MIN_NOTICED = 85.0  # `parts_noticed`, from which nothing needs to be said
MANY_IMAGES = 0.25  # of the training images; so many without a component are not chance
ADVICE = 'docs/own_data.md says what to try under "Poor components"'


def component_caution(measured: Measured) -> str:
    """One sentence about the components of a category, "" where there is nothing to say against them."""
    workspace, name = measured.workspace, measured.category.name
    labelled, fitted = workspace.pseudo_labels(name), workspace.patch_histogram_parameters(name)
    noticed = parts_noticed(files.read_arrays(fitted)) if fitted.exists() else None
    return caution(
        files.read_array(labelled.histogram) if labelled.histogram.exists() else None,
        HISTOGRAM in measured.branches
        and HISTOGRAM not in measured.weights
        and workspace.branch_weights(name).exists(),
        noticed,
        measured.names,
    )


def caution(areas: np.ndarray | None, is_left_out: bool, noticed: float | None, names: dict[int, str]) -> str:
    """What is poor, what that means, and where to read on; the worst alone.

    Args:
        areas: (images, labels) area fraction of each label in each training image; None: pseudo-labels of others.
        is_left_out: whether the branch that counts components was given weight 0.
        noticed: `csad.evaluation.branch_weights.parts_noticed`, if it was measured.
        names: what people call components, of those that have a name.
    """
    if areas is not None and areas.shape[1] == 1:
        return (
            "only one component was found in the good pictures, so parts cannot be told apart: one that is exchanged for "
            "another is noticed by its surface alone; of products with many parts of a single kind, like pushpins, that is "
            f"right; {ADVICE}"
        )
    if is_left_out:
        return (
            "components do not count in the score, because here they helped to find no defect, so a part that is missing or "
            f"in the wrong place is noticed by the surface alone; {ADVICE}"
        )
    if noticed is not None and noticed < MIN_NOTICED:
        return (
            "components differ so much from one good picture to the next that a missing part may go unnoticed: in a "
            f"trial, pictures without a part looked more unusual than good ones {noticed:.0f} times in 100, and 50 is "
            f"chance; {ADVICE}"
        )
    # Where it was measured, differences between products are known to do no harm.
    if noticed is None and areas is not None and areas.size:
        absent = (areas < SMALL).sum(0).tolist()
        rare = [
            f"{title_of(index, names.get(index, ''))} in {images}"
            for index, images in enumerate(absent, 1)
            if images > MANY_IMAGES * len(areas)
        ]
        if rare:
            return (
                f"some components were not found in many of the {count(len(areas), 'good picture')} ({', '.join(rare)}), so "
                f"that one is missing may go unnoticed, unless the products themselves differ so; {ADVICE}"
            )
    return ""
