"""Where every file lies that the stages write (docs/METHOD.md). This module alone knows the paths; all of them hang under one folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from errors import UserError


@dataclass(frozen=True)
class Workspace:
    """Everything that the stages write, by METHOD.md's names.

    Attributes:
        shared: the workspace around the one of a single seed, whose data set, pseudo-labels and downloads it uses.
    """

    root: Path
    shared: Workspace | None = None

    def of_seeds(self, seeds: Sequence[int] | None) -> dict[int | None, Workspace]:
        """A workspace in seeds/{seed} for each; without seeds, this one alone, under the key None."""
        return {seed: Workspace(self.root / "seeds" / str(seed), self) for seed in seeds} if seeds else {None: self}

    @property
    def default_dataset(self) -> Path:
        return self.root / "datasets" / "mvtec_loco_anomaly_detection"

    # Stage 1
    def masks(self, category: str) -> Path:
        return (self.shared or self).root / "datasets" / "masks" / category

    def image_masks(self, category: str, image: Path) -> Path:
        """Folder of one training image's masks: grounding_mask.png, all_masks.png, filtered_cluster_map.png, ..."""
        return self.masks(category) / image.stem

    def info(self, category: str) -> Path:
        """Folder of what stage 1 knows about the whole category."""
        return self.masks(category) / "info"

    # Stage 2
    def segmentor(self, category: str) -> Path:
        return self.root / "ckpt" / f"segmentor_{category}_256.pth"

    def segmentor_progress(self, category: str) -> Path:
        """An unfinished stage 2, to resume from."""
        return self.root / "ckpt" / f"{category}_segmentor_progress.pth"

    def segmentation_output(self, category: str, kind: str, image: Path) -> Path:
        return self.root / "datasets" / "masks" / category / "test_seg_output" / f"{kind}_{image.stem}.png"

    def patch_histogram_parameters(self, category: str) -> Path:
        return self.root / "anomaly_score" / f"{category}_patchhist_params.npz"

    # Stage 3
    def lgst(self, category: str) -> Path:
        return self.root / "ckpt" / f"best_{category}.pth"

    def lgst_progress(self, category: str) -> Path:
        """An unfinished stage 3, to resume from."""
        return self.root / "ckpt" / f"{category}_lgst_progress.pth"

    def anomaly_maps(self, category: str) -> Path:
        """Per kind of test image, in sorted file order, the 64x64 maps whose maxima are the LGST scores."""
        return self.root / "anomaly_score" / f"{category}_LGST_maps.npz"

    # Stages 2 and 3: branch is "patchhist", "LGST" or its published twin name "CSAD"; part is logi, struc or val
    def scores(self, category: str, branch: str, part: str) -> Path:
        return self.root / "anomaly_score" / f"{category}_{branch}_{part}_score.npy"

    # Stages 4 and 5
    def exported_model(self, category: str, runtime: str, precision: str = "fp32") -> Path:
        """fp32 has the published names; other precisions lie beside it as {category}_{precision}."""
        folder, suffix = {"torch": ("pytorch_models", ".pth"), "onnx": ("onnx_models", ".onnx"),
                          "openvino": ("openvino_models", ".xml")}[runtime]
        return self.root / "ckpt" / folder / f"{_with_precision(category, precision)}{suffix}"

    def evaluation(self, category: str, runtime: str, precision: str = "fp32") -> Path:
        """Score of every test image; its twin with suffix .json holds the AUROCs and what made them."""
        return self.root / "anomaly_score" / f"{category}_{_with_precision(runtime, precision)}_scores.csv"

    @property
    def export_report(self) -> Path:
        """What every evaluated export came to; its twin with suffix .md is the same as a table."""
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
    def checkpoints(self) -> Path:
        """Folder in which downloaded weights are looked for."""
        return (self.shared or self).root / "ckpt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the workspace while a stage writes to it.

        Raises:
            UserError: another run holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".csad.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise UserError(f"another run is working in {self.root.resolve()}; wait for it, or give this one "
                            "a --workspace of its own") from problem
        try:
            yield
        finally:
            lock.release()


def _with_precision(name: str, precision: str) -> str:
    return name if precision == "fp32" else f"{name}_{precision}"
