"""Where every file lies that the stages write (docs/method.md). This module alone knows the paths; all hang under one folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from csad.branches import BRANCHES
from csad.data.locks import FileLock, LockHeld
from csad.errors import UserError, did_you_mean

HELD_OUT = "held_out"  # training images, each by a fit to others
SCORE_PARTS = ("logi", "struc", "val")  # test good + logical, test good + structural, validation
EXPORTED = {
    "torch": ("pytorch_models", ".pth"),
    "onnx": ("onnx_models", ".onnx"),
    "openvino": ("openvino_models", ".xml"),
}
FORMATS = tuple(EXPORTED)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class PseudoLabels:
    """The folder of everything that stage 1 writes about one category."""

    root: Path

    def image(self, key: str) -> Path:
        """Folder of one training image's masks: grounding_mask.png, all_masks.png, filtered_cluster_map.png, ..."""
        return self.root / key

    @property
    def info(self) -> Path:
        """Folder of what stage 1 knows about the whole category."""
        return self.root / "info"

    @property
    def record(self) -> Path:
        return self.info / "pseudo_label.json"

    @property
    def trusted(self) -> Path:
        """Indices, in sorted file order, of the images whose pseudo-label is trusted."""
        return self.info / "filtered_histogram_indices.npy"

    @property
    def histogram(self) -> Path:
        """Area fraction of each label in each image; its width + 1 is the segmentor's number of classes."""
        return self.info / "filtered_component_histogram.npy"


@dataclass(frozen=True)
class Workspace:
    """Everything that the stages write, by docs/method.md's names."""

    root: Path
    # The workspace around the one of a single seed, whose data set, pseudo-labels and downloads it uses.
    shared: Workspace | None = None

    def of_seeds(self, seeds: Sequence[int] | None) -> dict[int | None, Workspace]:
        """A workspace in seeds/{seed} for each; without seeds, this one alone, under the key None."""
        if not seeds:
            return {None: self}
        return {seed: Workspace(self.root / "seeds" / str(seed), self) for seed in seeds}

    @property
    def default_dataset(self) -> Path:
        return self.root / "datasets" / "mvtec_loco_anomaly_detection"

    @property
    def downloads(self) -> Path:
        """Folder in which downloaded weights are looked for."""
        return (self.shared or self).root / "ckpt"

    @property
    def backbone(self) -> Path:
        """The record of the backbone that the stages agreed on, if none was named."""
        return self.downloads / "backbone.json"

    # Stage 1
    def pseudo_labels(self, category: str) -> PseudoLabels:
        return PseudoLabels((self.shared or self).root / "datasets" / "masks" / category)

    def unfinished_pseudo_labels(self, category: str) -> PseudoLabels:
        """The folder in which new pseudo-labels are made while finished ones are still there."""
        return PseudoLabels((self.shared or self).root / "datasets" / "masks" / f"{category}.unfinished")

    # Stage 2
    def segmentation_output(self, category: str, split: str, key: str) -> Path:
        """Label map of one test image."""
        return self.root / "datasets" / "masks" / category / "test_seg_output" / f"{split}_{key}.png"

    def patch_histogram_parameters(self, category: str) -> Path:
        return self.root / "anomaly_score" / f"{category}_patchhist_params.npz"

    def evidence_parameters(self, category: str) -> Path:
        """What draws the patch histogram's evidence (models.histogram_evidence)."""
        return self.root / "anomaly_score" / f"{category}_patchhist_evidence.npz"

    # Stages 2, 3 and 3b: branch is a name in csad.branches, or an alias of its scores
    def checkpoint(self, category: str, branch: str) -> Path:
        """What the branch's stage trained or fitted."""
        return self.root / "ckpt" / BRANCHES[branch].checkpoint.format(category=category)

    def record(self, category: str, branch: str) -> Path:
        """What the branch's stage noted (csad.data.records)."""
        return self.checkpoint(category, branch).with_suffix(".json")

    def scores(self, category: str, branch: str, part: str) -> Path:
        """``part`` is one of `SCORE_PARTS`, or `HELD_OUT`, which not every branch has."""
        return self.root / "anomaly_score" / f"{category}_{branch}_{part}_score.npy"

    def good_scores(self, category: str, branch: str) -> list[Path]:
        """By which a branch's scores are normalised: of validation images and, where there are any, `HELD_OUT` ones."""
        held_out = self.scores(category, branch, HELD_OUT)
        return [self.scores(category, branch, "val"), *([held_out] if held_out.exists() else [])]

    def anomaly_maps(self, category: str, branch: str) -> Path:
        """Per split of test images, in sorted file order, and for validation images, the anomaly maps of a branch, 64x64."""
        return self.root / "anomaly_score" / f"{category}_{branch}_maps.npz"

    def branch_outputs(
        self, category: str, branches: Sequence[str], tested: bool, with_maps: bool = True
    ) -> list[Path]:
        """All files with a branch's scores, under each of its names, and its maps; without test images, the validation scores."""
        parts = SCORE_PARTS if tested else ("val",)
        return [
            *(self.scores(category, branch, part) for branch in branches for part in parts),
            *([self.anomaly_maps(category, branches[0])] if with_maps else []),
        ]

    def progress(self, category: str, branch: str) -> Path:
        """An unfinished training of a branch, to resume from."""
        return self.root / "ckpt" / f"{category}_{branch}_progress.pth"

    # Stages 4 and 5
    def exported_model(self, category: str, runtime: str, precision: str = "fp32") -> Path:
        """fp32 has the published names; other precisions lie beside it as {category}_{precision}."""
        folder, suffix = EXPORTED[runtime]
        return self.root / "ckpt" / folder / f"{_with_precision(category, precision)}{suffix}"

    def exported_models(self, categories: Sequence[str] | None) -> list[Path]:
        """What there is of them, in every format and precision; of all categories where none is named.
        UserError if a category, or the workspace, has none."""
        folders = [(self.root / "ckpt" / folder, suffix) for folder, suffix in EXPORTED.values()]
        models = [path for folder, suffix in folders for path in sorted(folder.glob(f"*{suffix}"))]
        if not models and not categories:
            raise UserError(
                f"there are no exported models in {self.root / 'ckpt'}; run export_model.py first"
            )
        names = {path.stem for path in models}
        wanted: set[str] = set()
        for category in categories or ():
            stems = {_with_precision(category, precision) for precision in PRECISIONS}
            if stems.isdisjoint(names):
                advice = did_you_mean(category, names) or "; run export_model.py first"
                raise UserError(f"there is no exported model of {category} in {self.root / 'ckpt'}{advice}")
            wanted |= stems
        return [path for path in models if not categories or path.stem in wanted]

    def branch_weights(self, category: str) -> Path:
        """How much stage 4 decided that each branch counts, and by what (csad.evaluation.branch_weights)."""
        return self.root / "anomaly_score" / f"{category}_branches.json"

    def evaluation(self, category: str, runtime: str, precision: str = "fp32") -> Path:
        """Score of every test image; beside it, with suffix .json, the AUROCs and what made them."""
        return self.root / "anomaly_score" / f"{category}_{_with_precision(runtime, precision)}_scores.csv"

    @property
    def export_report(self) -> Path:
        """What every evaluated export came to; beside it, with suffix .md, the same as a table."""
        return self.root / "export_report.json"

    @property
    def combined_scores(self) -> Path:
        return self.root / "score_combine_result.txt"

    def over_seeds(self, what: str) -> Path:
        """A table over several seeds: mean and standard deviation."""
        return self.root / "seeds" / f"{what}.txt"

    def metrics(self, category: str) -> Path:
        """Everything that stage 5 measured on one category."""
        return self.root / "anomaly_score" / f"{category}_metrics.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def driver_files(self) -> Path:
        """Folder of what a run on a Ray cluster leaves for its tasks (csad.cluster.connection.Driver), while it runs."""
        return self.root / ".cluster"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the workspace while something is written to it; UserError if another run holds it."""
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.root / ".csad.lock").acquire()
        except LockHeld as problem:
            raise UserError(
                f"another run is working in {self.root.resolve()} ({problem.owner}); wait for it, or give this one "
                "another --workspace"
            ) from problem
        with lock:
            yield

    @contextmanager
    def lock_with(self, others: Iterable[Workspace]) -> Iterator[None]:
        """Hold this workspace and others, those of its seeds for example, each once."""
        with ExitStack() as locks:
            for held in {workspace.root: workspace for workspace in (self, *others)}.values():
                locks.enter_context(held.lock())
            yield


def _with_precision(name: str, precision: str) -> str:
    return name if precision == "fp32" else f"{name}_{precision}"
