"""The threshold that travels with an exported model: in its metadata, by which all judge, and as JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from csad.data import files
from csad.errors import UserError
from csad.evaluation.thresholds import (
    FALSE_POSITIVE_RATE,
    Threshold,
    finite,
    fraction,
    threshold_for,
    threshold_image,
)
from csad.inference.engines import METADATA_KEY
from csad.inference.runtimes import open_model

import numpy as np


def require_finite(scores: np.ndarray, category: str, purpose: str) -> None:
    """UserError if one of PyTorch's scores is not finite: no comparison with NaN is ever true, so whatever is decided by it
    would only seem to hold.

    Args:
        purpose: what they are for, after "by which".
    """
    if not np.isfinite(scores).all():
        raise UserError(
            f"{category}: PyTorch's model gives scores that are not finite, by which {purpose}, so the model is not "
            "exported; train the stages again"
        )


def with_validation_scores(
    metadata: dict[str, Any], scores: np.ndarray, category: str, images: Sequence[str] = ()
) -> dict[str, Any]:
    """Metadata with the validation images' scores, by the exported model itself, and the threshold that
    follows; UserError if a score is not finite.

    Args:
        scores: (n,), in any order.
        images: what people call the images, in the same order.
    """
    if not np.isfinite(scores).all():
        raise UserError(
            f"{category}: the model gives scores that are not finite on validation images, so it is not exported; "
            "train the stages again, or take another format or precision"
        )
    order = np.argsort(scores, kind="stable").tolist()
    validation = {
        "validation_scores": [float(scores[index]) for index in order],
        "validation_images": [images[index] for index in order] if images else [],
    }
    return _with_threshold(metadata | validation, None, FALSE_POSITIVE_RATE, category)


def change(
    paths: Sequence[Path], value: float | None, rate: float | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Change the threshold of exported models, each file as a whole and nothing else in it; yields their new metadata.

    Args:
        value: a threshold, or None for the one that promises ``rate``.

    Raises:
        UserError: the number is not finite or out of range, a file is no exported model or lacks its validation scores;
            all of this before anything is changed.
    """
    engines = [(path, open_model(path, "cpu")) for path in paths]
    changed = [(path, _with_threshold(engine.metadata, value, rate, str(path))) for path, engine in engines]
    for path, metadata in changed:
        write_metadata(path, metadata)
        write_beside(path, metadata)
        yield path, metadata


def write_beside(path: Path, metadata: dict[str, Any]) -> None:
    """The threshold as NAME.threshold.json beside the model, for people and other programs; nothing here reads it."""
    files.write_json(
        path.with_name(f"{path.stem}.threshold.json"),
        {
            "model": path.name,
            "threshold": metadata.get("threshold"),
            "false_positive_rate": metadata.get("threshold_rate"),
            "words": metadata.get("threshold_words"),
            "validation_images": len(metadata.get("validation_scores", [])),
            "validation_image_of_the_threshold": threshold_image(metadata),
        },
    )


def _with_threshold(
    metadata: dict[str, Any], value: float | None, rate: float | None, model: str
) -> dict[str, Any]:
    scores = np.array(metadata.get("validation_scores", []))
    if value is None:
        assert rate is not None  # one of the two is given
        threshold = threshold_for(metadata, fraction(rate, "--set_false_positive_rate"), model)
        value, rate, description = threshold.value, threshold.guaranteed_fpr, threshold.description
    else:
        finite(value, "--set_threshold")
        rate, description = None, "set in the model"
        if len(scores):
            rate = 1 - int((scores <= value).sum()) / (len(scores) + 1)
            description = f"{description}: {Threshold(value, rate, rate, len(scores)).description}"
    return metadata | {"threshold": value, "threshold_rate": rate, "threshold_words": description}


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Change what an exported file says about itself, and nothing else in it."""
    if path.suffix == ".pth":
        from models.fused import attach_metadata

        state = files.read_state(path)
        attach_metadata(state, metadata)
        files.write_state(path, state)
    elif path.suffix == ".onnx":
        from csad.export.exporters import with_metadata

        files.write_bytes(path, with_metadata(path.read_bytes(), metadata))
    else:  # OpenVINO itself would write the weights anew, too, and two files are not replaced at once
        model = ElementTree.fromstring(path.read_bytes())
        next(model.iterfind(f"rt_info/{METADATA_KEY}")).set("value", json.dumps(metadata))
        files.write_bytes(path, b'<?xml version="1.0"?>\n' + ElementTree.tostring(model))
