"""What the training stages have in common around a training: options, device, backbone, seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from csad import settings
from csad.cli import select
from csad.data import files, images, layouts
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.training.backbone_weights import build_backbone
from csad.training.jobs import Task

import torch

from models.backbone import Backbone
from models.device import choose_precision, choose_training_device

LARGEST_VIEW = 4096


@dataclass(frozen=True)
class Job:
    """One category and seed of a stage."""

    category: layouts.Category
    workspace: Workspace  # of this seed
    settings: settings.Settings
    view: images.View
    backbone: Backbone  # on the device; with ``--dry_run``, where jobs are only named, there is none
    device: torch.device
    precision: str  # fp32 or bf16, of training
    seed: int
    overwrite: bool

    @property
    def name(self) -> str:
        return self.category.name


def training_jobs(train_category: Callable[[Job], None], args: argparse.Namespace) -> dict[str, Task]:
    """A training stage's jobs by name."""
    workspace, _, categories, settings_of = select(args)
    device = choose_training_device(args.device)
    default = "fp32" if args.preset == settings.PAPER else "auto"
    precision = choose_precision(args.precision or default, device)
    backbone = agreed_backbone(args, workspace, device)
    tasks = {}
    for seed, seed_workspace in workspace.of_seeds(args.seeds).items():
        own_seed = args.seed if seed is None else seed
        for category in categories:
            cfg = settings_of[category.name]
            view = view_of(category, cfg)
            job = Job(
                category, seed_workspace, cfg, view, backbone, device, precision, own_seed, args.overwrite
            )
            tasks[job_name(category, seed)] = Task(category, seed, partial(train_category, job))
    return tasks


def job_name(category: layouts.Category, seed: int | None) -> str:
    return category.name if seed is None else f"{category.name}, seed {seed}"


def view_of(category: layouts.Category, cfg: settings.Settings) -> images.View:
    """How a category's pictures are seen; UserError if its region of interest is empty, of another size, or
    given twice, or all tiles together are too large."""
    tiles = int(cfg.memory.tiles[0])
    size = cfg.images.size * tiles
    if size > LARGEST_VIEW:
        raise UserError(
            f"{category.name}: {cfg.memory.tiles} tiles of --images.size {cfg.images.size} are {size} pixels "
            f"wide; {LARGEST_VIEW} is the most"
        )
    return images.View(size, cfg.images.white_level, read_roi(category, size, cfg.roi), tiles)


def agreed_backbone(
    args: argparse.Namespace, workspace: Workspace, device: torch.device, with_deepest: bool = False
) -> Any:
    """The `Backbone` that the command line names, on the device; for ``auto``, the one that the first stage took, whatever is
    at hand by now. None with ``--dry_run``: jobs are only named, and nothing is downloaded for that.

    Raises:
        UserError: it cannot be had.
    """
    if args.dry_run:
        return None
    name, weights = args.backbone, args.backbone_weights
    if name == "auto" and weights is None and workspace.backbone.exists():
        name = files.read_json(workspace.backbone, keys={"name": str})["name"]
    download = getattr(args, "download", False)
    backbone = build_backbone(name, weights, workspace.downloads, with_deepest, download)
    agreed = {"name": backbone.name, "fingerprint": backbone.fingerprint}
    if not workspace.backbone.exists() or files.read_json(workspace.backbone) != agreed:
        files.write_json(workspace.backbone, agreed)
    return backbone.to(device)
