"""Stage 2: train the component segmentor of each category on the pseudo-labels of stage 1.

A small network over a frozen encoder learns to label every pixel with its component, from the trusted pseudo-labels
(with logical synthesis, so that it knows components by their looks) and, later, also from the other images (which
should hold the usual amount of each component, and leave no doubt). How far the histogram of components, in the whole
image and in its four quarters, lies from those of the training images is the patch-histogram score.

Writes ckpt/segmentor_{category}_256.pth, the label maps of the test images (datasets/masks/{category}/test_seg_output),
and the scores of validation and test images (anomaly_score/{category}_patchhist_*). Interrupted, it resumes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from training.fleet import run_all

import settings
from data import files, images, layouts, records
from data.workspace import Workspace
from errors import UserError, run_script
from models.backbone import Backbone, build_backbone
from models.device import all_devices, choose_precision, memory_format
from models.patch_histogram import fit_parameters, fitted_detector
from models.segmentor import Segmentor
from training.loop import draw_ahead, interrupts_wait
from training.pseudo_label_files import read_stage_1, stand_ins_of_stage_1, training_data
from training.segmentor_batches import Draw, Lessons, TrainingData, draw, learning_rate, weighted_losses

SAVE_EVERY_SECONDS = 60
SHOW_EVERY_STEPS = 10
SCORING_BATCH = 8


def main() -> None:
    args = settings.training_command_line(__doc__).parse_args()
    workspace = Workspace(args.workspace)
    dataset = layouts.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories)
    devices = all_devices(args.device)
    precision = choose_precision(args.precision, devices[0])
    backbone = build_backbone(args.backbone, args.backbone_weights, workspace.checkpoints)
    jobs = {}
    for seed, home in workspace.of_seeds(args.seeds).items():
        for category in categories:
            chosen = settings.load(category.name, args.preset, settings.overrides(args)).segmentor
            name = category.name if seed is None else f"{category.name}, seed {seed}"
            jobs[name] = partial(train_category, category, home, chosen, backbone, precision=precision,
                                 seed=args.seed if seed is None else seed, overwrite=args.overwrite)
    with workspace.lock():
        run_all(jobs, devices)


def train_category(category: layouts.Category, workspace: Workspace, chosen: settings.SegmentorSettings,
                   backbone: Backbone, device: torch.device, precision: str, seed: int, overwrite: bool) -> None:
    backbone.to(device)
    checkpoint, progress = workspace.segmentor(category.name), workspace.segmentor_progress(category.name)
    parameter_file = workspace.patch_histogram_parameters(category.name)
    parts = ("logi", "struc", "val") if category.tested else ("val",)
    outputs = [checkpoint, parameter_file, *(workspace.scores(category.name, "patchhist", part) for part in parts)]
    trusted, classes = read_stage_1(category, workspace)
    used = {"settings": chosen.model_dump(), "precision": precision,
            "pseudo_labels": records.digest(workspace.info(category.name) / "filtered_component_histogram.npy"),
            "trusted": records.digest(workspace.info(category.name) / "filtered_histogram_indices.npy"),
            **records.inputs(category.train, seed, backbone, stand_ins_of_stage_1(category, workspace))}
    # Asked for first: a missing split should not cost an hour of training.
    validation = category.validation
    test = {kind: category.test(kind) for kind in layouts.SPLITS} if category.tested else {}
    record = checkpoint.with_suffix(".json")
    if not records.begin(record, used, outputs, overwrite, [progress], checkpoint, records.scored(validation, test)):
        print(f"{category.name}: segmentor is trained and scored already, skipped (--overwrite starts over)")
        return

    train_images = images.load_images(category.train, settings.IMAGE_SIZE, f"{category.name}: read training images")

    if checkpoint.exists():
        segmentor = Segmentor(backbone.channels, chosen.width, classes)
        files.load_checkpoint(segmentor, checkpoint)
        segmentor.to(device).eval()
    else:
        data = training_data(category, workspace, train_images, trusted, classes)
        segmentor = train(category.name, data, classes, chosen, backbone, progress, device, precision, seed).eval()
        state = {key: value.cpu() for key, value in segmentor.state_dict().items()}
        if not all(value.isfinite().all() for value in state.values()):
            for path in (progress, record):  # nothing to go on from; without the record the next run may have other settings
                path.unlink(missing_ok=True)
            raise UserError(f"{category.name}: training diverged, the segmentor's weights are not finite; "
                            f"lower --segmentor.lr (it was {chosen.lr})")
        meta = used | {"category": category.name, "classes": classes, "width": chosen.width}
        files.write_state(checkpoint, {"state": state, "meta": meta})
    progress.unlink(missing_ok=True)

    train_maps = label_maps(segmentor, backbone, train_images, device, f"{category.name}: segment training images")
    validation_maps = label_maps(segmentor, backbone, validation, device, f"{category.name}: segment validation images")
    parameters = fit_parameters(train_maps, validation_maps, classes)
    files.write_arrays(parameter_file, **parameters)
    detector = fitted_detector(parameters, classes)
    files.write_array(workspace.scores(category.name, "patchhist", "val"), detector(validation_maps).numpy())

    if not test:
        print(f"{category.name}: there is no folder {category.root / 'test' / layouts.GOOD}, so no test scores")
        return
    found = {}
    for kind, paths in test.items():
        maps = label_maps(segmentor, backbone, paths, device, f"{category.name}: segment test images, {kind}")
        for path, label_map in zip(paths, maps):
            files.write_image(workspace.segmentation_output(category.name, kind, path), label_map.numpy())
        found[kind] = detector(maps).numpy()
    for part, kind in (("logi", layouts.LOGICAL), ("struc", layouts.STRUCTURAL)):
        files.write_array(workspace.scores(category.name, "patchhist", part),
                          np.concatenate([found[layouts.GOOD], found[kind]]))


def train(category: str, data: TrainingData, classes: int, chosen: settings.SegmentorSettings, backbone: Backbone,
          progress_file: Path, device: torch.device, precision: str, seed: int) -> Segmentor:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way."""
    torch.manual_seed(seed)
    segmentor = Segmentor(backbone.channels, chosen.width, classes).train()
    segmentor.to(device, memory_format=memory_format(precision))
    optimizer = torch.optim.Adam(segmentor.parameters(), lr=chosen.lr, weight_decay=chosen.weight_decay,
                                 fused=device.type != "mps")
    steps_per_epoch = math.ceil(len(data.trusted) / chosen.batch_size)
    steps = chosen.epochs * steps_per_epoch

    done = 0
    if progress_file.exists():
        saved = files.read_state(progress_file)
        segmentor.load_state_dict(saved["segmentor"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    lessons = Lessons(data, backbone.encoder, device, precision, f"{category}: encode")

    def save_progress() -> None:
        files.write_state(progress_file, {"segmentor": segmentor.state_dict(), "optimizer": optimizer.state_dict(),
                                          "done": done})

    def draw_step(step: int) -> Draw:
        unsupervised = step // steps_per_epoch >= chosen.unsupervised_from_epoch
        return draw(data, chosen, step, unsupervised, category, seed)

    last_saved = time.monotonic()
    with (interrupts_wait() as interrupted,
          tqdm(total=steps, initial=done, desc=f"{category}: train segmentor", unit="step") as bar):
        for drawn in draw_ahead(draw_step, done, steps):
            parts = weighted_losses(segmentor, backbone.encoder, lessons.batch(drawn), chosen, precision)
            loss = sum(parts.values())
            optimizer.param_groups[0]["lr"] = learning_rate(chosen, done, steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            bar.update()
            if done % SHOW_EVERY_STEPS == 0:
                bar.set_postfix({name: f"{part.item():.3f}" for name, part in parts.items()})
            if interrupted() or time.monotonic() - last_saved > SAVE_EVERY_SECONDS:
                save_progress()
                last_saved = time.monotonic()
            if interrupted():
                raise KeyboardInterrupt
    return segmentor.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def label_maps(segmentor: Segmentor, backbone: Backbone, pictures: Tensor | Sequence[Path], device: torch.device,
               description: str) -> Tensor:
    """Label maps (N, 256, 256) uint8 of images, loaded (N, 3, 256, 256) or on disk."""
    if not isinstance(pictures, Tensor):
        pictures = images.load_images(pictures, settings.IMAGE_SIZE, description)
    maps = torch.zeros(len(pictures), *pictures.shape[2:], dtype=torch.uint8)
    for first in tqdm(range(0, len(pictures), SCORING_BATCH), desc=description, unit="batch", leave=False):
        batch = images.normalise(pictures[first:first + SCORING_BATCH].to(device))
        maps[first:first + SCORING_BATCH] = segmentor(backbone.encoder(batch)).argmax(1).byte().cpu()
    return maps


if __name__ == "__main__":
    run_script(main)
