"""What `benchmarks.fault_table` does to a finished run before a script sees it, and what it takes from the script's process."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csad.data.locks import FileLock

import numpy as np
from PIL import Image

Prepare = Callable[[Path], Any]

# What is done to files; every function takes names below the folder, and returns what does it.


def write(name: str, content: bytes | str = b"") -> Prepare:
    def prepare(lab: Path) -> None:
        path = lab / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return prepare


def picture(name: str, image: np.ndarray | Image.Image, **options: Any) -> Prepare:
    """Save a picture; ``options`` are Pillow's."""
    def prepare(lab: Path) -> None:
        (lab / name).parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(lab / name, **options)
    return prepare


def cut(name: str) -> Prepare:
    """Keep the first half."""
    return lambda lab: os.truncate(lab / name, (lab / name).stat().st_size // 2)


def remove(name: str) -> Prepare:
    return lambda lab: shutil.rmtree(lab / name) if (lab / name).is_dir() else (lab / name).unlink()


def link(name: str, target: str) -> Prepare:
    return lambda lab: (lab / name).symlink_to(target)


def move(name: str, target: str) -> Prepare:
    def prepare(lab: Path) -> None:
        (lab / target).parent.mkdir(parents=True, exist_ok=True)
        (lab / name).rename(lab / target)
    return prepare


def take(name: str, target: str) -> Prepare:
    """Put a copy of a file in another one's place, with its time and, padded, its size."""
    def prepare(lab: Path) -> None:
        before = (lab / target).stat() if (lab / target).exists() else None
        (lab / target).write_bytes((lab / name).read_bytes())
        if before:
            os.utime(lab / target, ns=(before.st_atime_ns, before.st_mtime_ns))
    return prepare


def folder(name: str) -> Prepare:
    return lambda lab: (lab / name).mkdir(parents=True)


def keep_images(name: str, count: int) -> Prepare:
    def prepare(lab: Path) -> None:
        for path in sorted((lab / name).glob("*.png"))[count:]:
            path.unlink()
    return prepare


def nan_in(name: str) -> Prepare:
    """A number that is none in an array file, in all tensors of a checkpoint, or in a model."""
    def prepare(lab: Path) -> None:
        path = lab / name
        if path.suffix == ".npy":
            array = np.load(path)
            array[0] = np.nan
            np.save(path, array)
        elif path.suffix == ".npz":
            arrays = dict(np.load(path))
            np.savez(path, **{key: np.full_like(values, np.nan) if values.dtype.kind == "f" else values
                              for key, values in arrays.items()})
        elif path.suffix == ".pth":
            import torch
            saved = torch.load(path, weights_only=True)
            tensors = saved["state"] if "state" in saved else saved
            for values in tensors.values():
                if values.is_floating_point() and values.numel() > 1:
                    values.view(-1)[0] = torch.nan
            torch.save(saved, path)
        else:
            import onnx
            model = onnx.load(path)
            for tensor in model.graph.initializer:
                values = onnx.numpy_helper.to_array(tensor).copy()
                if values.dtype == np.float32 and values.size > 1:
                    values.flat[0] = np.nan
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            onnx.save(model, path)
    return prepare


def array(name: str, values: np.ndarray) -> Prepare:
    return lambda lab: np.save(lab / name, values) if name.endswith(".npy") else np.savez(lab / name, val=values, good=values)


def known(model: str, **changes: Any) -> Prepare:
    """Change what the torch model says of itself."""
    def prepare(lab: Path) -> None:
        import torch

        from models.fused import attach_metadata, metadata
        state = torch.load(lab / model, weights_only=True)
        attach_metadata(state, metadata(state) | changes)
        torch.save(state, lab / model)
    return prepare


# What is taken from the process; called in it, before the script.

_held = []


def hold(name: str) -> Callable[[], None]:
    """Another run holds a lock."""
    def inside() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        _held.append(FileLock(Path(name)).acquire())
    return inside


def full_disk() -> None:
    """No file can be finished."""
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync = refuse


def no_large_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def nobody() -> None:
    """Somebody who may read everything and write nothing."""
    for path in (".", *map(str, Path(".").rglob("*"))):
        if not os.path.islink(path):
            os.chmod(path, 0o755 if os.path.isdir(path) else 0o644)
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    else:
        for path in (".", *map(str, Path(".").rglob("*"))):
            if os.path.isdir(path) and not os.path.islink(path):
                os.chmod(path, 0o555)


def no_reader() -> None:
    """Whoever read the output is gone."""
    read, write_ = os.pipe()
    os.dup2(write_, 1)
    os.close(read)
