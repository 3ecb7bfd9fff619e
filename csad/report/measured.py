"""What the page is about: what stage 5 measured of a category, and its test images with what the stages found in them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from csad.branches import BRANCHES
from csad.data import files, images, layouts
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.localisation import read_maps
from csad.evaluation.scores import FUSED, Scores, by_split, digest_scores, fused_parts, normalised_scores
from csad.evaluation.thresholds import Threshold, choose_threshold
from csad.export.assembly import sources
from csad.report import page
from csad.settings import Settings

import numpy as np

from models.fused import metadata
from models.fusion import contribution


class Measured:
    """What stage 5 measured of a category (``metrics``), and the scores that it measured.

    Attributes:
        branches: whose scores there are; weights: of those that are added, with ``rule``.
        fused: their weighted sum, by `SCORE_PARTS`; threshold: of these.

    Raises:
        UserError: there are other scores or images now than those that were measured.
    """

    def __init__(
        self, category: layouts.Category, workspace: Workspace, cfg: Settings, metrics: dict[str, Any]
    ):
        self.category, self.workspace, self.metrics = category, workspace, metrics
        self.weights, self.rule = self.metrics["weights"], self.metrics["rule"]
        self.branches = [branch for branch in BRANCHES if branch in self.metrics["detection"]]
        self.scores: Scores = normalised_scores(category, workspace, self.branches, self.rule)
        if self.metrics["measured"] != digest_scores(category, workspace, self.branches):
            raise UserError(
                f"{workspace.metrics(category.name)} was measured on other scores than there are now; "
                "run benchmark_performance.py again"
            )
        self.fused = fused_parts(self.scores, self.weights, self.rule)
        self.threshold: Threshold = choose_threshold(self.fused["val"])
        self.names = cfg.names
        self.roi, self.white_level = read_roi(category, images.SIZE, cfg.roi), cfg.images.white_level

    def contributions(self) -> dict[str, dict[str, np.ndarray]]:
        """Per branch and, as "fused", their sum: scores by split of test images."""
        parts = {
            branch: {part: contribution(values, self.rule) for part, values in self.scores[branch].items()}
            for branch in self.branches
        }
        return {
            name: by_split(self.category, by_part) for name, by_part in ({FUSED: self.fused} | parts).items()
        }

    def outcome(self) -> page.Outcome:
        """What the threshold does to the test images."""
        by_kind = by_split(self.category, self.fused)
        over = {split: scores > self.threshold.value for split, scores in by_kind.items()}
        good, defects = over[layouts.GOOD], np.concatenate([over[layouts.LOGICAL], over[layouts.STRUCTURAL]])
        return page.Outcome(int(good.sum()), len(good), int((~defects).sum()), len(defects))

    @cached_property
    def histogram(self) -> tuple[dict[str, Any] | None, str]:
        """The histogram from which reasons are read, of the exported model, or why it is left out."""
        model = self.workspace.exported_model(self.category.name, "torch")
        if not model.exists():
            return None, "no reasons: there is no exported torch model; run export_model.py"
        about = metadata(files.read_state(model))
        try:
            weighed = about.get("weighed", about.get("branches", []))
            current = about.get("made_of") == sources(self.category.name, self.workspace, weighed)
        except UserError:
            current = False
        if not current:
            return (
                None,
                "reasons are left out: the exported model is older than the scores; run export_model.py again",
            )
        return about.get("histogram"), ""


class TestImage(NamedTuple):
    """One test image and what the stages found in it."""

    measured: Measured
    split: str
    path: Path
    contributions: dict[str, float]  # of the fused branches; the score is their sum
    anomaly_maps: dict[str, np.ndarray]  # (64, 64), scaled, of the fused branches

    @property
    def score(self) -> float:
        return sum(self.contributions.values())

    @property
    def anomalous(self) -> bool:
        return self.score > self.measured.threshold.value

    @property
    def error(self) -> str:
        if self.anomalous == (self.split != layouts.GOOD):
            return ""
        return "false alarm" if self.anomalous else "missed"


def test_images(measured: Measured) -> list[TestImage]:
    """All of a category, by split and in file order."""
    category, weights = measured.category, measured.weights
    files_of_maps = {branch: measured.workspace.anomaly_maps(category.name, branch) for branch in weights}
    maps = {branch: read_maps(path) for branch, path in files_of_maps.items() if path.exists()}
    contributions, tested = measured.contributions(), []
    for split in layouts.SPLITS:
        paths = category.test(split)
        of_split = {branch: by[split] for branch, by in maps.items() if len(by.get(split, ())) == len(paths)}
        for index, path in enumerate(paths):
            added = {
                branch: weights[branch] * float(contributions[branch][split][index]) for branch in weights
            }
            drawn = {branch: of_branch[index] for branch, of_branch in of_split.items()}
            tested.append(TestImage(measured, split, path, added, drawn))
    return tested
