"""An engine for each runtime that exported models run in.

Each engine imports its runtime when it is made: ONNX and OpenVINO models need no PyTorch.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from csad.data import files
from csad.errors import UserError, similar_names
from csad.inference.engines import (
    METADATA_KEY,
    Engine,
    decoded_metadata,
    first_line,
    in_words,
    precisions_of,
    requested_threads,
    require_package,
)
from csad.inference.openvino_engine import OpenVinoEngine, read_openvino

import numpy as np

from models.prediction import Prediction

# onnxruntime's.
ACCELERATORS = tuple(f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CoreML", "Dml", "OpenVINO"))


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
        torch = require_torch()
        from csad.inference.folded import FoldedModel

        from models.device import keep_freed_memory
        from models.fused import from_state, metadata

        self.metadata = metadata(state)
        self.torch, self.device = torch, device
        requested = precision or self.metadata.get("precision", "fp32")
        # PyTorch's CPU kernels for fp16 are slower than those for fp32 by orders of magnitude on most machines.
        runs = "fp32" if requested == "fp16" and device.startswith("cpu") else requested
        dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        model = FoldedModel(from_state(state), with_map=True, dtype=dtypes[runs])
        self.networks = precisions_of(
            (f"/{key.replace('.', '/')}", name)
            for key, tensor in model.state_dict().items()
            for name, dtype in dtypes.items()
            if tensor.dtype == dtype
        )
        self.precision = in_words(self.networks)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        if device.startswith("cpu"):
            keep_freed_memory()

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        with self.torch.inference_mode():
            batch = self.torch.from_numpy(images).to(self.device, memory_format=self.torch.channels_last)
            outputs = self.model(batch)
            outputs = [values if values.dtype == self.torch.uint8 else values.float() for values in outputs]
            return tuple(values.cpu().numpy() for values in outputs[: None if maps else 1])

    def arrangement(self, label_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Label maps (B, 256, 256) uint8 -> what the patch histogram adds to the scores, (B,), and its map, (B, 64, 64)."""
        with self.torch.inference_mode():
            score, branch_map = self.model.arrangement(
                self.torch.from_numpy(label_map).long().to(self.device)
            )
            return self.model.contribution("patchhist", score).cpu().numpy(), branch_map.cpu().numpy()


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
        providers: list[str | tuple[str, dict[str, int]]] = ["CPUExecutionProvider"]
        available = onnxruntime.get_available_providers()
        if device == "auto":
            providers = [*(name for name in ACCELERATORS if name in available), *providers]
        elif device.startswith("cuda") and "CUDAExecutionProvider" in available:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = requested_threads()
        # Its threads spin while they wait for work; once it has answered they leave the cores to the process's other models.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(model, options, providers)
        except Exception as problem:  # onnxruntime's own exceptions share no public base
            raise UserError(
                f"onnxruntime cannot run this model ({first_line(problem)}); export it again with "
                "export_model.py --format onnx"
            ) from problem
        stated = self.session.get_modelmeta().custom_metadata_map
        self.metadata = decoded_metadata(stated.get(METADATA_KEY), "ONNX")
        self.device = self.session.get_providers()[0].removesuffix("ExecutionProvider").lower()
        cast = {"fp16": "fp32 (weights in fp16)"} if self.device == "cpu" else {}  # by its CPU kernels
        networks = self.metadata.get("networks", {})
        self.networks = {name: cast.get(precision, precision) for name, precision in networks.items()}
        stored = self.metadata.get("precision", "fp32")
        self.precision = in_words(self.networks) if self.networks else cast.get(stored, stored)

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        outputs = list(Prediction._fields[: None if maps else 1])
        return tuple(self.session.run(outputs, {"images": images}))


def open_model(path: Path, device: str) -> Engine:
    """Open an exported model with the runtime that its suffix tells.

    Args:
        path: ``.pth`` (torch), ``.onnx`` (onnxruntime) or ``.xml`` (openvino).
        device: cpu, cuda, cuda:1 or mps, for torch, and for onnxruntime where it is built for it; names of OpenVINO's, which
            takes its CPU for all others.

    Raises:
        UserError: no such file, another suffix, no CSAD model, or a runtime that is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (".pth", ".onnx", ".xml"):
        raise UserError(f"{path} is not an exported model; expected a .pth, .onnx or .xml file")
    if not path.is_file():
        raise UserError(missing(path))
    try:
        if suffix == ".pth":
            return TorchEngine(files.read_state(path), device)
        if suffix == ".onnx":
            return OnnxEngine(path.read_bytes(), device)
        return OpenVinoEngine(read_openvino(path), "CPU" if device.islower() else device)
    except UserError as problem:
        raise problem if str(path) in str(problem) else UserError(f"{path}: {problem}") from problem


def missing(path: Path) -> str:
    """What to say of a model that is not there: what makes it, the .pth of its name, and what may have been meant."""
    folder, suffix = path.parent, path.suffix.lower()
    made_by = {".onnx": " --format onnx", ".xml": " --format openvino"}.get(suffix, "")
    sentence = f"{path} is missing; export_model.py{made_by} makes it"
    for of_torch in dict.fromkeys((folder, folder.parent / "pytorch_models")) if made_by else ():
        if (model := of_torch / f"{path.stem}.pth").is_file():
            sentence += f"; there is {model}, which needs PyTorch"
            break
    others = [other for other in folder.glob("*") if other.suffix.lower() == suffix and other.is_file()]
    names = [f"{name}{path.suffix}" for name in similar_names(path.stem, [other.stem for other in others])]
    return sentence + (f"; did you mean {' or '.join(names)}?" if names else "")


def require_torch() -> ModuleType:
    """PyTorch; UserError if it is not installed, with what does without it."""
    try:
        return import_module("torch")
    except ImportError as problem:
        raise UserError(
            "models that end in .pth need PyTorch, which is not installed; install it with: pip install -r "
            "requirements.txt, or export the model with export_model.py --format onnx where it is"
        ) from problem


def device_name(name: str, model: Path) -> str:
    """The device as PyTorch calls it; models for other runtimes do not need PyTorch to say so, and choose by themselves."""
    if model.suffix.lower() != ".pth":
        of_openvino = model.suffix.lower() == ".xml" and name.isupper()
        if not (of_openvino or re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", name)):
            raise UserError(f"device '{name}' is not available; use --device auto")
        return name
    require_torch()
    from models.device import choose_device

    return str(choose_device(name))
