"""What ran: the version of this code, of Python and of the packages beside it."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import csad

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "openvino", "nncf")


def versions() -> dict[str, str]:
    """Of this code, of Python, and of the packages that make or run exported models, those that are installed."""
    by_name = {"csad": csad.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            by_name[package] = version(package)
    return by_name
