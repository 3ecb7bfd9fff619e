"""OpenVINO models: read, compiled in the precision that they were exported in, and run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from csad.errors import UserError
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

import numpy as np

from models.prediction import Prediction

_OPENVINO_THREAD = ThreadPoolExecutor(1, thread_name_prefix="openvino")

Result = TypeVar("Result")


class OpenVinoEngine(Engine):
    """An exported OpenVINO model.

    On the CPU the precision is requested by name: left alone, OpenVINO takes bf16 where the CPU has it.

    Args:
        model: an `openvino.Model`.
        device: a name of OpenVINO's (CPU, GPU, GPU.1, NPU, AUTO).

    Raises:
        UserError: OpenVINO is not installed, it has no such device, or this is no CSAD model.
    """

    runtime = "openvino"

    def __init__(self, model: Any, device: str = "CPU"):
        openvino = require_package("openvino")
        self.metadata = decoded_metadata(
            model.get_rt_info(METADATA_KEY).astype(str) if METADATA_KEY in model.rt_info else None, "OpenVINO"
        )
        stored = self.metadata.get("precision", "fp32")
        try:
            self.compiled = in_openvino_thread(_compile, openvino, model, stored, device)
        except RuntimeError as problem:
            has = ", ".join(in_openvino_thread(lambda: openvino.Core().available_devices))
            raise UserError(
                f"OpenVINO cannot run this model on {device} ({first_line(problem)}); it has {has}"
            ) from problem
        self.device = ", ".join(self.compiled.get_property("EXECUTION_DEVICES")).lower()
        self.networks = _precisions(self.compiled)
        own = f"its own precision (weights in {stored})"
        self.precision = in_words(self.networks) if self.networks else own
        if stored == "fp16" and self.precision == "fp32":
            self.precision = "fp32 (weights in fp16)"
        self.request = self.compiled.create_infer_request()

    def _run(self, images: np.ndarray, maps: bool) -> tuple[np.ndarray, ...]:
        outputs = in_openvino_thread(self.request.infer, {"images": images})
        return tuple(outputs[name].copy() for name in Prediction._fields[: None if maps else 1])


def _compile(openvino: ModuleType, model: Any, stored: str, device: str) -> Any:
    core = openvino.Core()
    if device != "CPU":
        return core.compile_model(model, device, {"PERFORMANCE_HINT": "LATENCY"})
    threads = {"INFERENCE_NUM_THREADS": requested_threads()} if requested_threads() else {}
    hint = {"bf16": openvino.Type.bf16, "fp16": openvino.Type.f16}.get(stored, openvino.Type.f32)
    if stored == "int8" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        # For what is not int8; `csad.export.int8` checks the scores with it.
        hint = openvino.Type.bf16
    return core.compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"} | threads
    )


def _precisions(compiled: Any) -> dict[str, str]:
    """The precision in which each network of a compiled OpenVINO model runs; empty if the device does not tell."""
    names = {"f32": "fp32", "f16": "fp16", "i8": "int8", "u8": "int8"}
    try:
        layers = compiled.get_runtime_model().get_ordered_ops()
    except RuntimeError:
        return {}
    keys = ("layerType", "originalLayersNames", "runtimePrecision")
    infos = (layer.rt_info for layer in layers if all(key in layer.rt_info for key in keys))
    described = ([info[key].astype(str) for key in keys] for info in infos)
    return precisions_of(
        (layer, names.get(precision, precision))
        for kind, layer, precision in described
        if kind in ("Convolution", "Deconvolution")
    )


def read_openvino(path: Path) -> Any:
    """Read an ``.xml`` with its ``.bin``, or an ``.onnx``, as an `openvino.Model`."""
    openvino = require_package("openvino")
    try:
        return openvino.Core().read_model(path)
    except RuntimeError as problem:
        raise UserError(f"OpenVINO cannot read {path} ({first_line(problem)}); export it again") from problem


def in_openvino_thread(function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Call a function that makes OpenVINO load its CPU plugin, compile or infer, in the one thread that does so.

    Loading the plugin gives the calling thread a signal stack that may be freed later. Had it been the main thread, to which
    signals come, a Ctrl-C or SIGTERM after that would end in a segmentation fault.
    """
    return _OPENVINO_THREAD.submit(function, *arguments, **options).result()
