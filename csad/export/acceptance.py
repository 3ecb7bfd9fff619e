"""Whether a new export may take the place of an earlier one."""

from __future__ import annotations

from pathlib import Path

from csad.data import layouts
from csad.errors import UserError
from csad.export import agreement, exported_thresholds, fresh_process
from csad.inference.runtimes import TorchEngine


def accept(path: Path, reference: TorchEngine, category: layouts.Category, device: str) -> None:
    """Compare a written export with PyTorch on validation images, and note in it the threshold that follows
    from its own scores; UserError if it gives other scores than PyTorch, or some that are not finite."""
    paths = category.validation
    compared = agreement.spread_evenly(len(paths))
    scored = fresh_process.score(path, paths, compared, device, f"{category.name}: score validation images")
    metadata = {"networks": scored.networks} | scored.metadata
    # First, as it is the stages that are to be trained again where PyTorch's scores are not finite, either.
    names = [path.relative_to(category.root).as_posix() for path in paths]
    metadata = exported_thresholds.with_validation_scores(metadata, scored.scores, category.name, names)
    exactly = metadata.get("precision", "fp32") == "fp32" and scored.device.startswith("cpu")
    if problem := agreement.disagreement(reference, [paths[index] for index in compared], scored, exactly):
        raise UserError(
            f"{category.name}: the new {path.name} does not give PyTorch's scores of {len(compared)} validation "
            f"images, so it is not kept and an earlier one stays as it is: {problem}"
        )
    exported_thresholds.write_metadata(path, metadata)
