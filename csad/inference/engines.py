"""Exported models behind one interface: give them images, get predictions.

    engine = open_model(Path("ckpt/onnx_models/screw_bag.onnx"), "cpu")
    engine.predict(images)

Each engine imports its runtime when it is made: ONNX and OpenVINO models need no PyTorch. A new runtime is one class that fills
in `Engine`, and a line in ``open_model``.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from csad.branches import PAPER_BRANCHES
from csad.data import files
from csad.data.images import read_views
from csad.errors import UserError, require_version

import numpy as np

from models.constants import IMAGENET_MEAN, IMAGENET_STD, SIZE
from models.prediction import Prediction

Result = TypeVar("Result")
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
ACCELERATORS = tuple(
    f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CoreML", "Dml", "OpenVINO")
)  # onnxruntime's
_OPENVINO_THREAD = ThreadPoolExecutor(1, thread_name_prefix="openvino")


class Engine(ABC):
    """A model in its runtime.

    Attributes:
        runtime: torch, onnxruntime or openvino.
        networks: in which precision each network of `NODES` really runs, by its name; empty where the file does not say.
            Label map, histograms and score are fp32 always, the memory's distances everywhere but in OpenVINO's bf16.
        precision: the same in a few words.
        device: where it really runs.
        metadata: what the file says about itself (see `csad.export.assembly.fused_state`); empty for published files.
    """

    runtime: str
    precision: str
    networks: dict[str, str]
    device: str
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
        """Score a batch and say where and why; arguments and errors as in `score`.

        Raises:
            UserError: the model was exported without maps.
        """
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


def in_words(networks: dict[str, str]) -> str:
    """In which precision networks run, by their names: one word where it is the same of all, else which run in which."""
    kinds = dict.fromkeys(networks.values())
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(
        f"{kind}: {', '.join(name for name, ran in networks.items() if ran == kind)}" for kind in kinds
    )


def read_for(engine: Engine, paths: Sequence[Path], description: str = "") -> np.ndarray:
    """Images on disk as an engine takes them, (B, 3, size, size) uint8 RGB; with a progress bar where there is a description."""
    return read_views(paths, engine.size, description, engine.metadata.get("white_level"))


def as_input(images: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """uint8 RGB (B, 3, size, size) as a model's graph takes it: as it is, or float32 and ImageNet-normalised."""
    if metadata.get("raw_input", False):
        return images
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.astype(np.float32) / 255 - mean) / std


class TorchEngine(Engine):
    """A fused state dict, published or ours, folded and run by PyTorch.

    Args:
        state: what `files.read_state` gives.
        device: a name of PyTorch's.
        precision: of the networks; None: what the file asks for.

    Raises:
        UserError: it is no CSAD model.
    """

    runtime = "torch"

    def __init__(self, state: dict, device: str, precision: str | None = None):
        torch = require_package("torch")
        from csad.inference.folded import FoldedModel

        from models.device import keep_freed_memory
        from models.fused import from_state, metadata

        self.metadata = metadata(state)
        self.torch, self.device = torch, device
        asked = precision or self.metadata.get("precision", "fp32")
        # PyTorch's CPU kernels for fp16 are slower than those for fp32 by orders of magnitude on most machines.
        ran = "fp32" if asked == "fp16" and device.startswith("cpu") else asked
        model = FoldedModel(
            from_state(state),
            with_map=True,
            raw_input=self.metadata.get("raw_input", False),
            dtype={"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[ran],
        )
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        self.networks = {name: names[dtype] for name, dtype in model.dtypes().items()}
        self.precision = in_words(self.networks)
        self.model = model.to(device, memory_format=torch.channels_last)
        if device.startswith("cpu"):
            keep_freed_memory()

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        with self.torch.inference_mode():
            batch = self.torch.from_numpy(images).to(self.device, memory_format=self.torch.channels_last)
            found = self.model(batch)
            return tuple(
                values.float().cpu().numpy() if values.dtype != self.torch.uint8 else values.cpu().numpy()
                for values in (found if maps else found[:1])
            )

    def arrangement_scores(self, label_map: np.ndarray) -> np.ndarray:
        """Label maps (B, 256, 256) uint8 -> what the patch histogram adds to the scores, (B,)."""
        with self.torch.inference_mode():
            score, _ = self.model.arrangement(self.torch.from_numpy(label_map).long().to(self.device))
            return self.model.contribution("patchhist", score).cpu().numpy()


class OnnxEngine(Engine):
    """An exported ONNX model, run by onnxruntime.

    Args:
        model: the file's content.
        device: cpu; cuda or cuda:1 for the CUDA provider where onnxruntime has it; auto for every accelerator that it has, those
            first that are fastest, and the CPU for what they cannot do.

    Raises:
        UserError: onnxruntime is not installed, or this is no CSAD model that it can run.
    """

    runtime = "onnxruntime"

    def __init__(self, model: bytes, device: str):
        onnxruntime = require_package("onnxruntime")
        providers, available = ["CPUExecutionProvider"], onnxruntime.get_available_providers()
        if device == "auto":
            providers = [name for name in ACCELERATORS if name in available] + providers
        elif device.startswith("cuda") and "CUDAExecutionProvider" in available:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = asked_threads()
        # Its threads spin while they wait for work; once it has answered they leave the cores to the process's other models.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers)
        except Exception as problem:  # onnxruntime's own exceptions share no public base
            raise UserError(
                f"onnxruntime cannot run this model ({_first_line(problem)}); export it again with "
                "export_model.py --format onnx"
            ) from problem
        self.metadata = _decoded(self.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), "ONNX")
        self.device = self.session.get_providers()[0].removesuffix("ExecutionProvider").lower()
        cast = {"fp16": "fp32 (weights in fp16)"} if self.device == "cpu" else {}  # by its CPU kernels
        self.networks = {
            name: cast.get(kind, kind) for name, kind in self.metadata.get("networks", {}).items()
        }
        asked = self.metadata.get("precision", "fp32")
        self.precision = in_words(self.networks) if self.networks else cast.get(asked, asked)

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        return tuple(
            self.session.run(list(Prediction._fields if maps else Prediction._fields[:1]), {"images": images})
        )


class OpenVinoEngine(Engine):
    """An exported OpenVINO model.

    On the CPU the precision is asked for by name: left alone, OpenVINO takes bf16 where the CPU has it.

    Args:
        model: an `openvino.Model`.
        device: a name of OpenVINO's (CPU, GPU, GPU.1, NPU, AUTO).

    Raises:
        UserError: OpenVINO is not installed, it has no such device, or this is no CSAD model.
    """

    runtime = "openvino"

    def __init__(self, model: Any, device: str = "CPU"):
        openvino = require_package("openvino")
        self.metadata = _decoded(
            model.get_rt_info(METADATA_KEY).astype(str) if METADATA_KEY in model.rt_info else None, "OpenVINO"
        )
        wanted = self.metadata.get("precision", "fp32")
        try:
            self.compiled = in_openvino_thread(_compile, openvino, model, wanted, device)
        except RuntimeError as problem:
            has = ", ".join(in_openvino_thread(lambda: openvino.Core().available_devices))
            raise UserError(
                f"OpenVINO cannot run this model on {device} ({_first_line(problem)}); it has {has}"
            ) from problem
        self.device = ", ".join(self.compiled.get_property("EXECUTION_DEVICES")).lower()
        self.networks = _precisions(self.compiled)
        self.precision = (
            in_words(self.networks) if self.networks else f"its own precision (weights in {wanted})"
        )
        if wanted == "fp16" and self.precision == "fp32":
            self.precision = "fp32 (weights in fp16)"
        self.request = self.compiled.create_infer_request()

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        found = in_openvino_thread(self.request.infer, {"images": images})
        return tuple(found[name].copy() for name in (Prediction._fields if maps else Prediction._fields[:1]))


def open_model(path: Path, device: str) -> Engine:
    """Open an exported model with the runtime that its suffix tells.

    Args:
        path: ``.pth`` (torch), ``.onnx`` (onnxruntime) or ``.xml`` (openvino).
        device: cpu, cuda, cuda:1 or mps, for torch, and for onnxruntime where it is built for it; names of OpenVINO's, which
            takes its CPU for all others.

    Raises:
        UserError: no such file, another suffix, no CSAD model, or a runtime that is not installed.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".pth", ".onnx", ".xml"):
        raise UserError(f"{path} is no exported model; expected a .pth, .onnx or .xml file")
    if not path.is_file():
        raise UserError(f"{path} is missing; export_model.py makes it")
    try:
        if suffix == ".pth":
            return TorchEngine(files.read_state(path), device)
        if suffix == ".onnx":
            return OnnxEngine(path.read_bytes(), device)
        return OpenVinoEngine(read_openvino(path), "CPU" if device.islower() else device)
    except UserError as problem:
        raise problem if str(path) in str(problem) else UserError(f"{path}: {problem}") from problem


def device_name(name: str, model: Path) -> str:
    """The device as PyTorch calls it; models for other runtimes do not need PyTorch to say so, and choose by themselves."""
    if model.suffix.lower() != ".pth":
        of_openvino = model.suffix.lower() == ".xml" and name.isupper()
        if not (of_openvino or re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name)):
            raise UserError(f"device '{name}' is not available; use --device auto")
        return name
    from models.device import choose_device

    return str(choose_device(name))


def _compile(openvino: ModuleType, model: Any, wanted: str, device: str) -> Any:
    core = openvino.Core()
    if device != "CPU":
        return core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY"})
    threads = {"INFERENCE_NUM_THREADS": asked_threads()} if asked_threads() else {}
    hint = {"bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}.get(wanted, openvino.Type.f32)
    if wanted == "int8" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        hint = (
            openvino.Type.bf16
        )  # for what is not int8; `csad.export.quantisation` checks the scores with it
    return core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"} | threads
    )


def _precisions(compiled: Any) -> dict[str, str]:
    """In which precision the networks' layers of a compiled OpenVINO model run; nothing of a device that does not say."""
    names = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}
    found: dict[str, set[str]] = {}
    try:
        layers = compiled.get_runtime_model().get_ordered_ops()
    except RuntimeError:
        return {}
    for layer in layers:
        told = {
            key: layer.rt_info[key].astype(str)
            for key in ("layerType", "originalLayersNames", "runtimePrecision")
            if key in layer.rt_info
        }
        if len(told) < 3 or told["layerType"] not in ("Convolution", "Deconvolution"):
            continue
        network = next(
            (name for name, starts in NODES.items() if told["originalLayersNames"].startswith(starts)), None
        )
        if network is not None:
            found.setdefault(network, set()).add(
                names.get(told["runtimePrecision"], told["runtimePrecision"])
            )
    return {name: "/".join(sorted(found[name])) for name in NODES if name in found}


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


def asked_threads() -> int:
    """How many threads OMP_NUM_THREADS asks for, by which PyTorch goes without being told; 0: as many as there are cores."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else 0


def _decoded(text: str | None, kind: str) -> dict[str, Any]:
    if text is None:
        raise UserError(f"this {kind} model was not exported by export_model.py")
    metadata = json.loads(text)
    require_version(
        metadata, f"this {kind} model", f"export it again with export_model.py --format {kind.lower()}"
    )
    return metadata


def _first_line(problem: Exception) -> str:
    return re.sub(r"\s+", " ", str(problem)).strip()[:160]
