"""What the training stages have in common around a training: options, device, backbone, seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from csad import settings
from csad.branches import BRANCHES
from csad.cli import select, training_options
from csad.data import files, images, layouts, records
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.training.backbone_weights import build_backbone
from csad.training.jobs import Task, run_jobs

import numpy as np
import torch
from torch import Tensor

from models.backbone import Backbone
from models.device import choose_precision, choose_training_device

LARGEST_VIEW = 4096


@dataclass(frozen=True)
class Job:
    """One category and seed of a stage.

    Attributes:
        workspace: of this seed.
        backbone: on the device; None where jobs are only named.
        precision: fp32 or bf16, of training.
    """

    category: layouts.Category
    workspace: Workspace
    settings: settings.Settings
    view: images.View
    backbone: Backbone
    device: torch.device
    precision: str
    seed: int
    overwrite: bool

    @property
    def name(self) -> str:
        return self.category.name


def run_stage(story: str, train_category: Callable[[Job], None]) -> None:
    """Parse the options of a training stage and call it for every category and seed (`run_jobs`)."""
    run_jobs(training_options(story).parse_args(), partial(training_jobs, train_category))


def training_jobs(train_category: Callable[[Job], None], args: argparse.Namespace) -> dict[str, Task]:
    """A training stage's jobs by name."""
    workspace, _, categories, chosen = select(args)
    device = choose_training_device(args.device)
    precision = choose_precision(
        args.precision or ("fp32" if args.preset == settings.PAPER else "auto"), device
    )
    backbone = agreed_backbone(args, workspace, device)
    tasks = {}
    for seed, place in workspace.of_seeds(args.seeds).items():
        for category in categories:
            job = Job(
                category,
                place,
                chosen[category.name],
                view_of(category, chosen[category.name]),
                backbone,
                device,
                precision,
                args.seed if seed is None else seed,
                args.overwrite,
            )
            tasks[job_name(category, seed)] = Task(category, seed, partial(train_category, job))
    return tasks


def job_name(category: layouts.Category, seed: int | None) -> str:
    return category.name if seed is None else f"{category.name}, seed {seed}"


def view_of(category: layouts.Category, chosen: settings.Settings) -> images.View:
    """How a category's pictures are seen.

    Raises:
        UserError: its region of interest is empty, of another size, or given twice, or all tiles together are too large.
    """
    tiles = int(chosen.memory.tiles[0])
    size = chosen.images.size * tiles
    if size > LARGEST_VIEW:
        raise UserError(
            f"{category.name}: {chosen.memory.tiles} tiles of --images.size {chosen.images.size} are {size} pixels "
            f"wide; {LARGEST_VIEW} is the most"
        )
    return images.View(size, chosen.images.white_level, read_roi(category, size, chosen.roi), tiles)


def agreed_backbone(
    args: argparse.Namespace, workspace: Workspace, device: torch.device, with_deepest: bool = False
) -> Backbone | None:
    """The backbone that the command line names, on the device; for ``auto``, the one that the first stage took, whatever is at
    hand by now. None with ``--dry_run``: jobs are only named, and nothing is downloaded for that.

    Raises:
        UserError: it cannot be had.
    """
    if args.dry_run:
        return None
    name, weights = args.backbone, args.backbone_weights
    if name == "auto" and weights is None and workspace.backbone.exists():
        name = files.read_json(workspace.backbone, keys={"name": str})["name"]
    backbone = build_backbone(
        name, weights, workspace.downloads, with_deepest, getattr(args, "download", False)
    )
    agreed = {"name": backbone.name, "fingerprint": backbone.fingerprint}
    if not workspace.backbone.exists() or files.read_json(workspace.backbone) != agreed:
        files.write_json(workspace.backbone, agreed)
    return backbone.to(device)


def begin(
    job: Job,
    branches: Sequence[str],
    used: dict[str, Any],
    what: str,
    outputs: Sequence[Path] = (),
    with_maps: bool = True,
) -> tuple[records.Record, str]:
    """The record of a branch, and what there is to do; called before any training, which a missing split should not cost.

    Args:
        branches: the branch's name, and aliases under which the same scores are written.
        used: everything that decides the training, `records.inputs` among it.
        what: is done where nothing is left to do, for example "LGST is trained".
        outputs: files besides checkpoint, scores and maps.
        with_maps: the branch has anomaly maps.

    Raises:
        UserError: see `records.Record.begin` and `require_same_inputs`.
    """
    category, workspace, branch = job.category, job.workspace, branches[0]
    checkpoint, test = workspace.checkpoint(category.name, branch), layouts.test_splits(category)
    record = records.Record(
        workspace.record(category.name, branch),
        used,
        [checkpoint, *outputs, *workspace.branch_outputs(category.name, branches, bool(test), with_maps)],
        records.scored_images(category.validation, test),
        checkpoint,
    )
    to_do = record.begin(job.overwrite)
    if to_do == records.SKIP:
        print(f"{category.name}: {what} and scored already, skipped (--overwrite starts over)")
    else:
        require_same_inputs(job, branch, used)
    return record, to_do


def require_same_inputs(job: Job, branch: str, used: dict[str, Any]) -> None:
    """Notice before training that another branch of this category was trained on another backbone, or on other images.

    Raises:
        UserError: it was, and nothing says to start over.
    """
    for other, row in BRANCHES.items():
        record, script = job.workspace.record(job.category.name, other), row.stage
        if other == branch or job.overwrite or not record.exists():
            continue
        theirs = records.read_record(record)["used"]
        if theirs.get("backbone_fingerprint") != used["backbone_fingerprint"]:
            raise UserError(
                f"{job.name}: {script} worked on the backbone {theirs.get('backbone')}, this is "
                f"{used['backbone']}; name the same with --backbone, or run {script} --overwrite with this one first"
            )
        if theirs.get("train_images") != used["train_images"]:
            raise UserError(
                f"{job.name}: {script} saw other training images than there are now; run {script} --overwrite first"
            )


def adam(
    model: torch.nn.Module, chosen: settings.SegmentorSettings | settings.LgstSettings, device: torch.device
) -> torch.optim.Adam:
    """Over what of a model is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(
        trained, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=device.type != "mps"
    )


def on_cpu(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state, ready to be written."""
    return {key: value.cpu() for key, value in module.state_dict().items()}


def write_scores(
    category: layouts.Category,
    workspace: Workspace,
    branches: Sequence[str],
    scores: dict[str, np.ndarray],
    maps: dict[str, np.ndarray],
) -> None:
    """Write a branch's score files and, if there are any, its maps.

    Args:
        branches: the branch's name, and aliases under which the same scores are written.
        scores: by split of test images, and "val", in sorted file order.
        maps: the same way, (N, h, w) each.
    """
    parts = {"val": scores["val"]}
    if layouts.GOOD in scores:
        for part, split in (("logi", layouts.LOGICAL), ("struc", layouts.STRUCTURAL)):
            parts[part] = np.concatenate([scores[layouts.GOOD], scores[split]])
    else:
        print(f"{category.name}: there are no good test images, so no test scores")
    for branch in branches:
        for part, values in parts.items():
            files.write_array(workspace.scores(category.name, branch, part), values.astype(np.float64))
    if maps:
        files.write_arrays(workspace.anomaly_maps(category.name, branches[0]), **maps)
