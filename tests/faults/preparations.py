"""What is done to files of a finished run before a script sees them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from PIL import Image

from benchmarks.faults import run
from models.fused import METADATA_KEY

Prepare = Callable[[Path], Any]  # is given the run's folder


def preparation(do: Callable[..., Any]) -> Callable[..., Prepare]:
    """A function of a path, and more, becomes one of a name in the run's folder that returns a `Prepare`."""

    @wraps(do)
    def named(name: str, *arguments: Any, **options: Any) -> Prepare:
        return lambda lab: do(lab / name, *arguments, **options)

    return named


@preparation
def write(path: Path, content: bytes | str = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@preparation
def save(path: Path, picture: np.ndarray | Image.Image, **options: Any) -> None:
    """Save a picture; ``options`` are Pillow's."""
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)


@preparation
def resize(path: Path, width: int, height: int) -> None:
    with Image.open(path) as picture:
        picture.resize((width, height), Image.Resampling.NEAREST).save(path)


@preparation
def roll(path: Path) -> None:
    """Move a picture down by one pixel; what falls out below comes in above."""
    with Image.open(path) as picture:
        Image.fromarray(np.roll(np.asarray(picture), 1, 0)).save(path)


@preparation
def as_jpeg(path: Path) -> None:
    """Store a mask as a JPEG instead."""
    with Image.open(path) as mask:
        mask.convert("L").save(path.with_suffix(".jpg"), quality=80)
    path.unlink()


@preparation
def cut(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


@preparation
def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@preparation
def link(path: Path, target: str) -> None:
    path.symlink_to(target)


@preparation
def rename(path: Path, target: str) -> None:
    """``target`` is relative to the file's folder."""
    (path.parent / target).parent.mkdir(exist_ok=True)
    path.rename(path.parent / target)


@preparation
def take(path: Path, source: str) -> None:
    """Put a copy of another file, named relative to this file's folder, in its place, with its time."""
    times = path.stat() if path.exists() else (path.parent / source).stat()
    path.write_bytes((path.parent / source).read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@preparation
def copy_tree(path: Path, source: Path | str) -> None:
    """``source`` is relative to the folder's."""
    shutil.copytree(path.parent / source, path)


@preparation
def folder(path: Path) -> None:
    path.mkdir(parents=True)


@preparation
def keep_images(path: Path, count: int) -> None:
    for image in sorted(path.glob("*.png"))[count:]:
        image.unlink()


@preparation
def array(path: Path, values: np.ndarray) -> None:
    np.save(path, values) if path.suffix == ".npy" else np.savez(path, val=values, good=values)


@preparation
def state(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what torch.save wrote."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def old_checkpoint(name: str) -> Prepare:
    """As another version of the code would have written it."""
    return state(name, lambda saved: saved["meta"].update(format_version=0))


def metadata(model: str, **changes: Any) -> Prepare:
    """Change what the torch model says of itself."""
    return state(model, lambda saved: saved._metadata[METADATA_KEY].update(changes))


@preparation
def version_0(path: Path) -> None:
    """Make a record or an exported model look as if another version of the code had written it."""
    content = path.read_bytes()
    assert b"format_version" in content
    path.write_bytes(re.sub(rb'(format_version("|&quot;): )\d+', rb"\g<1>0", content))


@preparation
def nan(path: Path) -> None:
    """Put a number that is none into an array file, all tensors of a checkpoint, or a model."""
    if path.suffix == ".npy":
        values = np.load(path)
        values[0] = np.nan
        np.save(path, values)
    elif path.suffix == ".npz":
        arrays = dict(np.load(path))
        np.savez(
            path,
            **{
                key: values * np.nan if values.dtype.kind == "f" else values for key, values in arrays.items()
            },
        )
    elif path.suffix == ".pth":
        saved = torch.load(path, weights_only=True)
        for values in (saved["state"] if "state" in saved else saved).values():
            if values.is_floating_point() and values.numel() > 1:
                values.view(-1)[0] = torch.nan
        torch.save(saved, path)
    else:
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor).copy()
            if values.dtype == np.float32 and values.size > 1:
                values.flat[0] = np.nan
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, path)


@preparation
def weights_of_v1(path: Path) -> None:
    """Weights of the published network as torchvision's first version has them: in half precision."""
    weights = timm.create_model("wide_resnet50_2").state_dict()
    torch.save({key: values.half().to(values.dtype) for key, values in weights.items()}, path)


def ran(command: str, status: int, said: str, inside: Callable[[], None] | None = None) -> Prepare:
    """Run a command, which has to end so."""

    def prepare(lab: Path) -> None:
        ended = run(command, lab, inside)
        assert ended.status == status and said in ended.err and "Traceback" not in ended.err, ended

    return prepare
