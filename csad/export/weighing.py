"""What each branch contributes to the fused score: decided on synthetic defects where the settings say so (docs/beyond.md)."""

from __future__ import annotations

import contextlib
import math

from csad import settings
from csad.data import images, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation import branch_weights
from csad.export.assembly import fused_state
from csad.export.exported_thresholds import require_finite
from csad.inference.engines import Engine, read_for
from csad.inference.runtimes import TorchEngine
from csad.progress import batches
from csad.training.synthetic_defects import LOGICAL, STRUCTURAL, synthesise_defect

import numpy as np

GOOD_IMAGES, SYNTHETIC_DEFECTS = 64, 48  # the latter of each kind, structural and logical
BATCH = 8  # images scored at a time


def decide(
    category: layouts.Category,
    workspace: Workspace,
    fusion: settings.FusionSettings,
    view: images.View,
    seed: int,
    device: str,
) -> tuple[dict[str, float], list[str] | None]:
    """The weight of each branch that is fused, and the branches among which it was decided, None where nothing was.

    What is decided is written beside the scores (`branch_weights.write`) and printed.
    """
    candidates = branch_weights.candidates(category.name, workspace, fusion)
    if fusion.weights == "equal" or len(candidates) < 2:
        return branch_weights.equal(fusion.branches), None
    state, weighed = with_optional_branches(category, workspace, fusion, view)
    engine = TorchEngine(state, device)
    good, defects = contributions_on_defects(engine, category, seed)
    for contributions in (good, *(of_kind.contributions for of_kind in defects.values())):
        require_finite(contributions, category.name, "branches cannot be weighed")
    decision = branch_weights.choose(good, defects, engine.branches, fusion.branches)
    branch_weights.write(category.name, workspace, fusion, decision)
    print(f"{category.name}: {decision.description}")
    return decision.weights, weighed


def with_optional_branches(
    category: layouts.Category, workspace: Workspace, fusion: settings.FusionSettings, view: images.View
) -> tuple[dict, list[str]]:
    """State of a model with every optional branch whose files fit to those of the settings' branches; says which do not.

    Returns:
        The state, in which each branch has weight 1, and its branches.

    Raises:
        UserError: the settings' own branches do not fit together, or cannot be read.
    """
    candidates = branch_weights.candidates(category.name, workspace, fusion)
    with contextlib.suppress(UserError):  # one of them does not fit, and one by one they say which
        return fused_state(category, workspace, fusion, view, branch_weights.equal(candidates)), candidates
    weights = branch_weights.equal(fusion.branches)
    state = fused_state(category, workspace, fusion, view, weights)
    for branch in candidates:
        if branch in weights:
            continue
        more = branch_weights.equal([*weights, branch])
        try:
            state, weights = fused_state(category, workspace, fusion, view, more), more
        except UserError as problem:
            print(f"{category.name}: {branch} is left out: {problem}")
    return state, list(weights)


def contributions_on_defects(
    engine: Engine, category: layouts.Category, seed: int
) -> tuple[np.ndarray, dict[str, branch_weights.Defects]]:
    """What each branch adds to the score of validation images, as they are (n, K) and with synthetic defects of each kind."""
    paths = category.validation[:: math.ceil(len(category.validation) / GOOD_IMAGES)]
    batch = 1 if engine.metadata.get("tiles", 1) > 1 else BATCH
    good, label_maps = [], []
    for few in batches(len(paths), batch, f"{category.name}: score good images"):
        prediction = engine.predict(read_for(engine, paths[few]))
        good.append(prediction.branch_scores)
        label_maps += list(prediction.label_map)
    rng, defects = np.random.default_rng(seed), {}
    for name, kinds in {"structural": [*STRUCTURAL], "logical": [*LOGICAL]}.items():
        # Each kind at all strengths, on images spread over the list.
        order = rng.permutation(SYNTHETIC_DEFECTS)
        strengths = (order + rng.random(SYNTHETIC_DEFECTS)) / SYNTHETIC_DEFECTS
        contributions, visible = [], []
        for few in batches(SYNTHETIC_DEFECTS, batch, f"{category.name}: {name} defects"):
            defective = []
            for index in range(SYNTHETIC_DEFECTS)[few]:
                position, kind = int(rng.integers(len(paths))), kinds[index % len(kinds)]
                image = read_for(engine, [paths[position]])[0].transpose(1, 2, 0)
                changed = synthesise_defect(image, label_maps[position], kind, strengths[index], rng)
                if not np.array_equal(changed, image):  # a defect too faint for whole numbers is none
                    defective.append(changed.transpose(2, 0, 1))
                    visible.append(index)
            if defective:
                contributions.append(engine.predict(np.stack(defective)).branch_scores)
        defects[name] = branch_weights.Defects(np.concatenate(contributions), strengths[visible])
    return np.concatenate(good), defects
