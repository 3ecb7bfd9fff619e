"""What the training stages have in common around a category's training: options, device, backbone, seeds, one after another."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import settings
from data import files, images, layouts, records
from data.roi import read_roi
from data.workspace import Workspace
from errors import UserError, disk_is_full, in_a_sentence
from models.backbone import Backbone, build_backbone
from models.device import choose_device, choose_precision


@dataclass(frozen=True)
class Job:
    """One category and seed of a stage.

    Attributes:
        workspace: of this seed.
        backbone: on the device.
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
    """Parse the options of a training stage and call it for every category and seed; one that fails does not stop the others.

    Args:
        story: for ``--help``.

    Raises:
        UserError: some failed; names them, with their reasons. A single job's own error comes through as it is.
        OSError: the disk is full, which ends the whole run.
    """
    args = settings.training_command_line(story).parse_args()
    workspace = Workspace(args.workspace)
    dataset = layouts.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories, settings.logical_defects(args.preset))
    chosen = {category.name: settings.load(category.name, args.preset, settings.overrides(args)) for category in categories}
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    seeds = workspace.of_seeds(args.seeds)
    with ExitStack() as locks:
        for place in {one.root: one for one in (workspace, *seeds.values())}.values():
            locks.enter_context(place.lock())
        backbone = agreed_backbone(args, workspace).to(device)
        jobs = {}
        for seed, place in seeds.items():
            for category in categories:
                name = category.name if seed is None else f"{category.name}, seed {seed}"
                jobs[name] = partial(train_category, Job(
                    category, place, chosen[category.name], view_of(category, chosen[category.name]), backbone, device, precision,
                    args.seed if seed is None else seed, args.overwrite))
        run_jobs(jobs)


def view_of(category: layouts.Category, chosen: settings.Settings) -> images.View:
    """How a category's pictures are seen.

    Raises:
        UserError: its region of interest is empty, of another size, or given twice.
    """
    size = chosen.images.size
    return images.View(size, chosen.images.white_level, read_roi(category, size, chosen.roi))


def agreed_backbone(args: argparse.Namespace, workspace: Workspace, with_deepest: bool = False) -> Backbone:
    """The backbone that the command line names; for ``auto``, the one that the first stage took, whatever is at hand by now.

    Raises:
        UserError: it cannot be had.
    """
    name, weights = args.backbone, args.backbone_weights
    if name == "auto" and weights is None and workspace.backbone.exists():
        name = files.read_json(workspace.backbone)["name"]
    backbone = build_backbone(name, weights, workspace.downloads, with_deepest)
    files.write_json(workspace.backbone, {"name": backbone.name, "fingerprint": backbone.fingerprint})
    return backbone


def require_same_backbone(job: Job, *others: tuple[Path, str]) -> None:
    """Notice before training that another branch of this category was trained on another backbone, or on other images.

    Args:
        others: (a branch's checkpoint, its script).

    Raises:
        UserError: it was, and nothing says to start over.
    """
    for checkpoint, script in others:
        record = checkpoint.with_suffix(".json")
        if job.overwrite or not record.exists():
            continue
        used = files.read_json(record)["used"]
        if used["backbone_fingerprint"] != job.backbone.fingerprint:
            raise UserError(f"{job.name}: {script} worked on the backbone {used['backbone']}, this is {job.backbone.name}; name "
                            f"the same with --backbone, or run {script} --overwrite with this one first")
        if used["train_images"] != records.digest_images(job.category.train):
            raise UserError(f"{job.name}: {script} saw other training images than there are now; run {script} --overwrite first")


def on_cpu(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state, ready to be written."""
    return {key: value.cpu() for key, value in module.state_dict().items()}


def write_scores(category: layouts.Category, workspace: Workspace, branches: Sequence[str], scores: dict[str, np.ndarray],
                 maps: dict[str, np.ndarray]) -> None:
    """Write a branch's score files and its maps.

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
    files.write_arrays(workspace.anomaly_maps(category.name, branches[0]), **maps)


def run_jobs(jobs: dict[str, Callable[[], None]]) -> None:
    """Call every job, one after another; see `run_stage`."""
    if len(jobs) == 1:
        next(iter(jobs.values()))()
        return
    failures = {}
    for name, job in jobs.items():
        try:
            job()
        except Exception as problem:
            if disk_is_full(problem):
                raise
            sentence = in_a_sentence(problem)
            if sentence is None:
                traceback.print_exc()
            failures[name] = sentence or f"{type(problem).__name__}: {problem}".splitlines()[0]
            tqdm.write(f"{name} failed: {failures[name]}", file=sys.stderr)
    if failures:
        told = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(jobs)} failed, the others are finished; {told}")
