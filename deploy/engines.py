"""Exported models behind one interface: give them images, get scores.

    engine = open_model(Path("ckpt/onnx_models/screw_bag.onnx"), torch.device("cpu"))
    engine.score(images)

A new runtime is one class that fills in `Engine`, and a line in ``open_model``.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from data import files
from deploy.folded import FoldedModel, Maps
from errors import UserError
from models.fused import from_state, metadata

Result = TypeVar("Result")
METADATA_KEY = "csad"  # under which ONNX and OpenVINO files carry their metadata, as JSON
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INPUT_SIZE = 256
_OPENVINO_THREAD = ThreadPoolExecutor(1, thread_name_prefix="openvino")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


class Findings(NamedTuple):
    """What a model says about a batch; score = lgst_score + patch_histogram_score."""

    score: np.ndarray  # (B,) float32, higher = more anomalous
    lgst_score: np.ndarray  # (B,) float32 normalised share of the score
    patch_histogram_score: np.ndarray  # (B,) float32 normalised share of the score
    anomaly_map: np.ndarray  # (B, 256, 256) float32
    label_map: np.ndarray  # (B, 256, 256) uint8 component index


class Engine(ABC):
    """A model in its runtime.

    Attributes:
        runtime: torch, onnxruntime or openvino.
        precision: in which the networks really run; sensitive parts (label map, distances, score) run in fp32 always.
        metadata: what the file says about itself (see `deploy.assembly.fused_state`); empty for published files.
    """

    runtime: str
    precision: str
    metadata: dict[str, Any]

    def score(self, images: np.ndarray) -> np.ndarray:
        """Score a batch.

        Args:
            images: (B, 3, 256, 256) RGB, float32 and ImageNet-normalised, or uint8 for a model with raw input.

        Returns:
            (B,) float32, higher = more anomalous.

        Raises:
            UserError: the images are of another size or type than the model was exported for.
        """
        return self._run(self._checked(images), maps=False)[0]

    def findings(self, images: np.ndarray) -> Findings:
        """Score a batch and say where and why; arguments and errors as in `score`.

        Raises:
            UserError: the model was exported without maps.
        """
        if not self.metadata.get("with_map", True):
            raise UserError(f"this {self.runtime} model was exported without maps; export it again with --with_map")
        maps = Maps(*self._run(self._checked(images), maps=True))
        return Findings(maps.score, maps.lgst_score, maps.patch_histogram_score, maps.anomaly_map, maps.label_map)

    @abstractmethod
    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        """The score alone, or all of `Maps`, in that order."""

    def _checked(self, images: np.ndarray) -> np.ndarray:
        size = self.metadata.get("input_size", INPUT_SIZE)
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UserError(f"this model was exported for images of shape (B, 3, {size}, {size}), got {images.shape}")
        wanted = np.uint8 if self.metadata.get("raw_input", False) else np.float32
        if images.dtype != wanted:
            raise UserError(f"this model takes {np.dtype(wanted).name} images "
                            f"({'0..255 RGB' if wanted is np.uint8 else 'ImageNet-normalised RGB'}), got {images.dtype.name}")
        return np.ascontiguousarray(images)


class TorchEngine(Engine):
    """A fused state dict, published or ours, folded and run by PyTorch.

    Raises:
        UserError: the file is missing, damaged, or no CSAD model.
    """

    runtime = "torch"

    def __init__(self, path: Path, device: torch.device):
        state = files.read_state(path)
        self.metadata = metadata(state)
        self.device = device
        wanted = self.metadata.get("precision", "fp32")
        # PyTorch's CPU kernels for fp16 are slower than those for fp32 by orders of magnitude on most machines.
        self.precision = "fp32" if wanted == "fp16" and device.type == "cpu" else wanted
        model = FoldedModel(from_state(state), dtype=DTYPES[self.precision])
        self.model = model.to(device, memory_format=torch.channels_last)
        if device.type == "cpu":
            keep_freed_memory()

    @torch.inference_mode()
    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        batch = torch.from_numpy(images).to(self.device, memory_format=torch.channels_last)
        found = self.model.analyse(batch)
        return tuple(values.cpu().numpy() for values in (found if maps else found[:1]))


class OnnxEngine(Engine):
    """An exported ONNX model, run by onnxruntime.

    Args:
        model: the file's content.
        device: its CUDA provider is taken for a CUDA device where onnxruntime has one.

    Raises:
        UserError: onnxruntime is not installed, or this is no CSAD model that it can run.
    """

    runtime = "onnxruntime"

    def __init__(self, model: bytes, device: torch.device):
        onnxruntime = require_package("onnxruntime")
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers)
        except Exception as problem:  # onnxruntime's own exceptions share no public base
            raise UserError(f"onnxruntime cannot run this model ({_first_line(problem)}); export it again with "
                            "export_model.py --format onnx") from problem
        self.metadata = _decoded(self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), "ONNX")
        self.precision = self.metadata.get("precision", "fp32")
        if self.precision == "fp16" and self.session.get_providers()[0] == "CPUExecutionProvider":
            self.precision = "fp32 (weights in fp16)"  # its CPU kernels cast

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        return tuple(self.session.run(list(Maps._fields if maps else Maps._fields[:1]), {"images": images}))


class OpenVinoEngine(Engine):
    """An exported OpenVINO model, run on the CPU.

    The precision is asked for by name: left alone, OpenVINO takes bf16 where the CPU has it.

    Args:
        model: an `openvino.Model`.

    Raises:
        UserError: OpenVINO is not installed, or this is no CSAD model.
    """

    runtime = "openvino"

    def __init__(self, model: Any):
        openvino = require_package("openvino")
        self.metadata = _decoded(model.get_rt_info(METADATA_KEY).astype(str) if METADATA_KEY in model.rt_info else None,
                                 "OpenVINO")
        wanted = self.metadata.get("precision", "fp32")
        self.compiled = in_openvino_thread(_compile, openvino, model, wanted)
        real = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        real = {"f32": "fp32", "f16": "fp16"}.get(real, real)
        if wanted == "int8":
            self.precision = f"int8, the rest in {real}"
        else:
            self.precision = real if real == wanted else f"{real} (weights in {wanted})"
        self.request = self.compiled.create_infer_request()

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        found = in_openvino_thread(self.request.infer, {"images": images})
        return tuple(found[name].copy() for name in (Maps._fields if maps else Maps._fields[:1]))


def open_model(path: Path, device: torch.device) -> Engine:
    """Open an exported model with the runtime that its suffix tells.

    Args:
        path: ``.pth`` (torch), ``.onnx`` (onnxruntime) or ``.xml`` (openvino).
        device: for torch, and for onnxruntime where it is built for it; OpenVINO runs on the CPU.

    Raises:
        UserError: no such file, another suffix, no CSAD model, or a runtime that is not installed.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".onnx", ".xml"):
        raise UserError(f"{path} is no exported model; expected a .pth, .onnx or .xml file")
    if not path.is_file():
        raise UserError(f"{path} is missing; export_model.py makes it")
    try:
        if path.suffix == ".pth":
            return TorchEngine(path, device)
        if path.suffix == ".onnx":
            return OnnxEngine(path.read_bytes(), device)
        return OpenVinoEngine(read_openvino(path))
    except UserError as problem:
        raise problem if str(path) in str(problem) else UserError(f"{path}: {problem}") from problem


def _compile(openvino: ModuleType, model: Any, wanted: str) -> Any:
    core = openvino.Core()
    hint = {"bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}.get(wanted, openvino.Type.f32)
    if wanted == "int8" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        hint = openvino.Type.bf16  # for what is not int8; `deploy.quantisation` checks the scores with it
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"})


def read_openvino(path: Path) -> Any:
    """Read an ``.xml`` with its ``.bin``, or an ``.onnx``, as an `openvino.Model`."""
    openvino = require_package("openvino")
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as problem:
        raise UserError(f"OpenVINO cannot read {path} ({_first_line(problem)}); export it again") from problem


def require_package(name: str) -> ModuleType:
    """Import a runtime.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as problem:
        raise UserError(f"{name} is not installed; install it with: pip install {name}") from problem


def in_openvino_thread(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a function that makes OpenVINO load its CPU plugin, compile or infer, in the one thread that does so.

    Loading the plugin gives the calling thread a signal stack that may be freed later. Had it been the main thread, to which
    signals come, a Ctrl-C or SIGTERM after that would end in a segmentation fault.
    """
    return _OPENVINO_THREAD.submit(function, *arguments, **options).result()


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, where it is glibc.

    By default it gives large blocks back to the system at once, and every layer of every batch pays again for having
    its pages handed out one by one and zeroed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _decoded(text: str | None, kind: str) -> dict[str, Any]:
    if text is None:
        raise UserError(f"this {kind} model was not exported by export_model.py")
    return json.loads(text)


def _first_line(problem: Exception) -> str:
    return re.sub(r"\s+", " ", str(problem)).strip()[:160]
