"""Stage 3: train LGST, the local-global student-teacher, on the good images of each category.

A teacher (random projections of a frozen encoder) is imitated by a student, locally, and by an autoencoder, globally;
a second head of the student imitates the autoencoder. Writes ckpt/best_{category}.pth and the LGST scores of
validation and test images, anomaly_score/{category}_LGST_{logi,struc,val}_score.npy, and the anomaly maps
({category}_LGST_maps.npz). Interrupted, it resumes.
"""

from __future__ import annotations

import threads  # noqa: F401

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import files, layouts, records
from errors import UserError, run_script
from models.device import autocast, describe_device, memory_format
from models.lgst import LGST, Differences
from models.lgst_on_features import FeatureLGST
from models.lgst_on_features import losses as feature_losses
from standins.penalty_pictures import PenaltyPictures
from training.lgst_step import (
    Batches,
    EncodedImages,
    Sample,
    draw_indices,
    draw_sample,
    fast_losses,
    learning_rate,
    warm_cosine,
)
from training.loop import TrainingLoop
from training.stage import Job, adam, begin, on_cpu, run_stage, write_scores

SCORING_BATCH = 8
BRANCHES = ("LGST", "CSAD")  # the second is the published README's name for the same scores


def main() -> None:
    run_stage(__doc__, train_category)


def train_category(job: Job) -> None:
    category, workspace, chosen = job.category, job.workspace, job.settings.lgst
    checkpoint = workspace.lgst(category.name)
    penalties = PenaltyPictures(chosen.penalty_images) if chosen.student == "pixels" else None
    used = {"settings": chosen.model_dump(), "images": job.view.record, "precision": job.precision,
            **records.inputs(category.train, job.seed, job.backbone, penalties.stand_ins if penalties else [])}
    record, to_do = begin(job, BRANCHES, used, "LGST is trained")
    if to_do == records.SKIP:
        return

    progress = workspace.progress(category.name, "lgst")
    if job.overwrite:
        progress.unlink(missing_ok=True)
    if to_do == records.TRAIN:
        model = (train(job, penalties, progress, used) if penalties else train_on_features(job, progress, used)).eval()
    else:
        model = (LGST if penalties else FeatureLGST)(job.backbone.channels, chosen.width, chosen.teacher_channels)
        files.load_checkpoint(model, checkpoint)
        model.to(job.device).eval()
    found = differences(model, job, category.validation, "normalise maps")
    if not all(part.isfinite().all() for part in found):
        progress.unlink(missing_ok=True)  # nothing to go on from
        raise UserError(f"{category.name}: training diverged, LGST gives no finite scores; "
                        f"lower --lgst.lr (it was {chosen.lr})")
    model.fit_map_normalisation(found)
    # The encoder goes along, so that export and deployment never look for its weights again.
    files.write_state(checkpoint, {
        "state": on_cpu(model), "encoder": on_cpu(job.backbone.encoder),
        "meta": used | {"category": category.name, "ran_on": describe_device(job.device, job.precision)}})

    maps = {"val": model.anomaly_map(found).cpu().numpy()}
    for split, paths in layouts.test_splits(category).items():
        maps[split] = model.anomaly_map(differences(model, job, paths, f"score {split}")).cpu().numpy()
    write_scores(category, workspace, BRANCHES, {split: one.max((1, 2), initial=-np.inf) for split, one in maps.items()},
                 {split: model.scaled(one) for split, one in maps.items()})
    record.finish()
    progress.unlink(missing_ok=True)


def train(job: Job, penalties: PenaltyPictures, progress: Path, used: dict) -> LGST:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way."""
    chosen, backbone, device = job.settings.lgst, job.backbone, job.device
    train_images = torch.from_numpy(job.view.read_small(job.category.train, f"{job.name}: read training images"))
    torch.manual_seed(job.seed)
    model = LGST(backbone.channels, chosen.width, chosen.teacher_channels)
    if chosen.he_initialisation:
        model.initialise_for_short_runs()
    model.to(device, memory_format=memory_format(job.precision)).train()
    optimizer = adam(model, chosen, device)
    loop = TrainingLoop(chosen.steps, progress, used, f"{job.name}: train LGST", f"--lgst.lr (it was {chosen.lr})",
                        model=model, optimizer=optimizer)
    batches = Batches(train_images, model, backbone.encoder, device, f"{job.name}: teacher features")
    if loop.done == 0:
        batches.fit_teacher_normalisation()

    def draw(step: int) -> Sample:
        return draw_sample(len(train_images), penalties, chosen, step, job.name, job.seed)

    for step, sample in loop.samples(draw):
        losses = fast_losses(model, backbone.encoder, batches.batch(sample), chosen.hard_quantile, job.precision)
        optimizer.param_groups[0]["lr"] = learning_rate(chosen, step)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        loop.report(losses)
    return model.to(memory_format=torch.contiguous_format)


def train_on_features(job: Job, progress: Path, used: dict) -> FeatureLGST:
    """The same for short runs: no network but the three small ones runs in a step."""
    chosen, backbone, device = job.settings.lgst, job.backbone, job.device
    torch.manual_seed(job.seed)
    model = FeatureLGST(backbone.channels, chosen.width, chosen.teacher_channels)
    model.to(device, memory_format=memory_format(job.precision)).train()
    optimizer = adam(model, chosen, device)
    loop = TrainingLoop(chosen.steps, progress, used, f"{job.name}: train LGST", f"--lgst.lr (it was {chosen.lr})",
                        model=model, optimizer=optimizer)
    maps = EncodedImages(job.category.train, job.view, backbone.encoder, device, f"{job.name}: encode training images")
    if loop.done == 0:
        maps.fit(model)

    def draw(step: int) -> Tensor:
        return draw_indices(len(job.category.train), chosen.batch_size, step, job.name, job.seed)

    for step, indices in loop.samples(draw):
        fourth, teacher, sixteenth = maps.batch(indices, model)
        with autocast(device, job.precision):
            parts = feature_losses(model, teacher, fourth, sixteenth if step % chosen.global_every == 0 else None)
        optimizer.param_groups[0]["lr"] = warm_cosine(chosen, step)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        loop.report(parts)
    return model.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def differences(model: LGST | FeatureLGST, job: Job, paths: Sequence[Path], what: str) -> Differences:
    """Difference maps of images on disk, two (N, 64, 64) tensors on the job's device, as the numbers that normalise them are."""
    batches: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, 64, 64, device=job.device),) * 2]
    read = job.view.read_middle if model.on_features else job.view.read_small
    for first in tqdm(range(0, len(paths), SCORING_BATCH), desc=f"{job.name}: {what}", leave=False):
        batch = torch.from_numpy(read(paths[first:first + SCORING_BATCH])).to(job.device).float()
        maps = job.backbone.encoder(batch)
        batches.append(model.differences(maps) if model.on_features else model.differences(batch, maps))
    return Differences(*(torch.cat(maps) for maps in zip(*batches)))


if __name__ == "__main__":
    run_script(main)
