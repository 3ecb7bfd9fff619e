"""Exported models behind one interface. A new runtime is one class that fills in `Engine`, and a line in ``open_model``."""

from __future__ import annotations

import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from csad.branches import PAPER_BRANCHES
from csad.data.images import View
from csad.errors import UserError, require_version

import numpy as np

from models.constants import IMAGENET_MEAN, IMAGENET_STD, SIZE
from models.prediction import Prediction

# How the names of each network's nodes begin in exported graphs.
NODES = {
    "encoder": ("/encoder/",),
    "segmentor": ("/segmentor/",),
    "LGST teacher": ("/lgst/teacher/",),
    "LGST student": ("/lgst/student/", "/lgst/local_st/"),
    "LGST autoencoder": ("/lgst/autoencoder/",),
    "memory": ("/memory/", "/Conv"),
}
METADATA_KEY = "csad"  # under which ONNX and OpenVINO files carry their metadata, as JSON


class Engine(ABC):
    """A model in its runtime."""

    runtime: str  # torch, onnxruntime or openvino
    precision: str  # the same in a few words
    # In which precision each network of `NODES` really runs, by its name; empty where the file does not say.
    # Label map, histograms and score are fp32 always, the memory's distances everywhere but in OpenVINO's
    # bf16.
    networks: dict[str, str]
    device: str  # where it really runs
    # What the file says about itself (see `csad.export.assembly.fused_state`); empty for published files.
    metadata: dict[str, Any]

    @property
    def size(self) -> int:
        """Side in pixels of the images that the model takes."""
        return self.metadata.get("input_size", SIZE)

    @property
    def branches(self) -> list[str]:
        """Names of the fused branches, in the order of the predictions."""
        return self.metadata.get("branches", [*PAPER_BRANCHES])  # published files do not say

    @property
    def has_maps(self) -> bool:
        """Whether `predict` can be called; a model exported without maps gives scores only."""
        return self.metadata.get("with_map", True)

    def score(self, images: np.ndarray) -> np.ndarray:
        """Score a batch.

        Args:
            images: (B, 3, size, size) uint8 RGB.

        Returns:
            (B,) float32, higher = more anomalous. Not finite where the model failed: that is for the caller to judge.

        Raises:
            UserError: the images are of another size or type than the model was exported for.
        """
        return self._run(self._prepared(images), maps=False)[0]

    def predict(self, images: np.ndarray) -> Prediction:
        """Score a batch and say where and why; arguments and errors as in `score`. UserError if the model was
        exported without maps."""
        if not self.has_maps:
            raise UserError(
                f"this {self.runtime} model was exported without maps; export it again with --with_map"
            )
        return Prediction(*self._run(self._prepared(images), maps=True))

    @abstractmethod
    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        """The score alone, or all of `Prediction`, in that order."""

    def _prepared(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size) or images.dtype != np.uint8:
            raise UserError(
                f"this model takes uint8 RGB images of shape (B, 3, {self.size}, {self.size}), got "
                f"{images.dtype.name} {images.shape}"
            )
        return np.ascontiguousarray(as_input(images, self.metadata))


def precisions_of(layers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The precision of each network, from its layers' names and precisions; all where they differ (fp32/int8)."""
    precisions: dict[str, set[str]] = {}
    for layer, precision in layers:
        network = next((name for name, starts in NODES.items() if layer.startswith(starts)), None)
        if network is not None:
            precisions.setdefault(network, set()).add(precision)
    return {name: "/".join(sorted(precisions[name])) for name in NODES if name in precisions}


def in_words(networks: dict[str, str]) -> str:
    """The precisions of networks, by their names, in a few words: a single one if all agree, else which run in which."""
    precisions = dict.fromkeys(networks.values())
    if len(precisions) == 1:
        return next(iter(precisions))
    return "; ".join(
        f"{precision}: {', '.join(name for name, own in networks.items() if own == precision)}"
        for precision in precisions
    )


def read_for(engine: Engine, paths: Sequence[Path], description: str = "") -> np.ndarray:
    """Images on disk as an engine takes them, (B, 3, size, size) uint8 RGB; with a progress bar where there is a description."""
    return View(engine.size, engine.metadata.get("white_level")).read(paths, description)


def as_input(images: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """uint8 RGB (B, 3, size, size) as a model's graph takes it: as it is, or float32 and ImageNet-normalised."""
    if metadata.get("raw_input", False):
        return images
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.astype(np.float32) / 255 - mean) / std


def requested_threads() -> int:
    """How many threads OMP_NUM_THREADS asks for, by which PyTorch goes without being told; 0: as many as there are cores."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    return int(requested) if requested.isdecimal() else 0


def require_package(name: str) -> ModuleType:
    """Import a runtime, its telemetry switched off; UserError if it is not installed.

    Left alone, onnxruntime (from 1.29) and OpenVINO report their use to their makers, the one with hashes of
    the model, and keep an identifier in the home folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read by the import of onnxruntime, not on Windows
    # OpenVINO's own switch is a file in the home folder, for all of a user's programs. Without this package,
    # which NNCF takes, too, both send and write nothing.
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))
    try:
        runtime = import_module(name)
        if name == "onnxruntime":
            runtime.disable_telemetry_events()  # for Windows
        return runtime
    except ImportError as problem:
        package = name.partition(".")[0]
        raise UserError(f"{package} is not installed; install it with: pip install {package}") from problem


def decoded_metadata(text: str | None, file_format: str) -> dict[str, Any]:
    """Metadata from the JSON in an exported file; None where the file has none. UserError if it has none, or
    is of another format version."""
    if text is None:
        raise UserError(f"this {file_format} model was not exported by export_model.py")
    metadata = json.loads(text)
    advice = f"export it again with export_model.py --format {file_format.lower()}"
    require_version(metadata, f"this {file_format} model", advice)
    return metadata


def first_line(problem: Exception) -> str:
    """The first 160 characters of an error in one line."""
    return re.sub(r"\s+", " ", str(problem)).strip()[:160]
