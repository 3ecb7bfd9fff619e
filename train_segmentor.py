"""Stage 2: train the component segmentor of each category on the pseudo-labels of stage 1.

A small network over a frozen encoder learns to label every pixel with its component, from the trusted pseudo-labels
(with logical synthesis, so that it knows components by their looks) and, later, also from the unlabelled images (which
should hold the usual amount of each component, and leave no doubt). How far the histogram of components, in the whole
image and in its four quarters, lies from those of the training images is the patch-histogram score.

Writes ckpt/segmentor_{category}_256.pth, the label maps of the test images (datasets/masks/{category}/test_seg_output),
the scores of validation and test images (anomaly_score/{category}_patchhist_*), and maps of where components are too many or
missing ({category}_patchhist_maps.npz). Interrupted, it resumes.
"""

from __future__ import annotations

import threads  # noqa: F401

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import files, layouts, records
from errors import UserError, run_script
from models.device import describe_device, memory_format
from models.histogram_evidence import HistogramEvidence, fit_evidence
from models.patch_histogram import PatchHistogramDetector, fit_parameters, fitted_detector
from models.segmentor import Segmentor
from training.loop import TrainingLoop
from training.pseudo_label_files import read_stage_1, require_own_pseudo_labels, stand_ins_of_stage_1, training_data
from training.segmentor_step import Batches, Sample, TrainingData, draw_sample, learning_rate, step_losses
from training.stage import Job, adam, begin, on_cpu, run_stage, write_scores

SCORING_BATCH = 8
# By what training images are changed to see how reliably they are segmented: pixels of 256, share, grey levels.
MAX_SHIFT, LIGHT, NOISE = 2, 0.03, 2.0
RELIABILITY_IMAGES = 64


def main() -> None:
    run_stage(__doc__, train_category)


def train_category(job: Job) -> None:
    category, workspace, chosen = job.category, job.workspace, job.settings.segmentor
    checkpoint, parameter_file = workspace.segmentor(category.name), workspace.patch_histogram_parameters(category.name)
    trusted, classes = read_stage_1(category, workspace)
    labels = workspace.pseudo_labels(category.name)
    used = {"settings": chosen.model_dump(), "images": job.view.record, "precision": job.precision,
            "pseudo_labels": records.digest(labels.histogram), "trusted": records.digest(labels.trusted),
            **records.inputs(category.train, job.seed, job.backbone, stand_ins_of_stage_1(category, workspace))}
    record, to_do = begin(job, ["patchhist"], used, "segmentor is trained",
                          [parameter_file, workspace.evidence_parameters(category.name)])
    if to_do == records.SKIP:
        return

    require_own_pseudo_labels(category, labels, trusted, used["train_images"])
    train_images = torch.from_numpy(job.view.read_small(category.train, f"{category.name}: read training images"))
    progress = workspace.progress(category.name, "segmentor")
    if to_do == records.TRAIN:
        data = training_data(category, workspace, train_images, trusted, classes)
        segmentor = train(job, data, classes, progress, used).eval()
        state = on_cpu(segmentor)
        if not all(values.isfinite().all() for values in state.values()):
            progress.unlink(missing_ok=True)  # nothing to go on from
            raise UserError(f"{category.name}: training diverged, the segmentor's weights are not finite; "
                            f"lower --segmentor.lr (it was {chosen.lr})")
        files.write_state(checkpoint, {"state": state, "meta": used | {
            "category": category.name, "classes": classes, "width": chosen.width,
            "ran_on": describe_device(job.device, job.precision)}})
    else:
        segmentor = Segmentor(job.backbone.channels, chosen.width, classes)
        files.load_checkpoint(segmentor, checkpoint)
        segmentor.to(job.device).eval()

    train_maps = label_maps(segmentor, job, train_images, "segment training images")
    validation_maps = label_maps(segmentor, job, category.validation, "segment validation images")
    twice = segment_twice(segmentor, job, train_images, train_maps) if chosen.reliability else None
    parameters = fit_parameters(train_maps, validation_maps, classes, chosen.histogram_floor, twice)
    files.write_arrays(parameter_file, **parameters)
    detector = fitted_detector(parameters, classes, trimmed=not chosen.evidence)
    evidence = HistogramEvidence(classes)
    evidence_parameters = fit_evidence(train_maps, validation_maps, classes, twice)
    evidence.load_parameters(evidence_parameters)
    files.write_arrays(workspace.evidence_parameters(category.name), **evidence_parameters)
    scores, drawn = {}, {}
    scores["val"], drawn["val"] = score(detector, evidence, validation_maps, chosen.evidence)
    for split, paths in layouts.test_splits(category).items():
        maps = label_maps(segmentor, job, paths, f"segment test images, {split}")
        for path, label_map in zip(paths, maps):
            files.write_image(workspace.segmentation_output(category.name, split, category.key(path)), label_map.numpy())
        scores[split], drawn[split] = score(detector, evidence, maps, chosen.evidence)
    write_scores(category, workspace, ["patchhist"], scores, drawn)
    record.finish()
    progress.unlink(missing_ok=True)


def train(job: Job, data: TrainingData, classes: int, progress: Path, used: dict) -> Segmentor:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way."""
    chosen, backbone, device = job.settings.segmentor, job.backbone, job.device
    torch.manual_seed(job.seed)
    segmentor = Segmentor(backbone.channels, chosen.width, classes).train()
    segmentor.to(device, memory_format=memory_format(job.precision))
    optimizer = adam(segmentor, chosen, device)
    steps_per_epoch = math.ceil(len(data.trusted) / chosen.batch_size)
    steps = chosen.epochs * steps_per_epoch
    if job.overwrite:
        progress.unlink(missing_ok=True)
    loop = TrainingLoop(steps, progress, used, f"{job.name}: train segmentor", f"--segmentor.lr (it was {chosen.lr})",
                        segmentor=segmentor, optimizer=optimizer)
    batches = Batches(data, backbone.encoder, device, job.precision, f"{job.name}: encode")

    def draw(step: int) -> Sample:
        unsupervised = step // steps_per_epoch >= chosen.unsupervised_from_epoch
        return draw_sample(data, chosen, step, unsupervised, job.name, job.seed)

    for step, sample in loop.samples(draw):
        losses = step_losses(segmentor, backbone.encoder, batches.batch(sample), chosen, job.precision)
        optimizer.param_groups[0]["lr"] = learning_rate(chosen, step, steps)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        loop.report(losses)
    return segmentor.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def label_maps(segmentor: Segmentor, job: Job, pictures: Tensor | Sequence[Path], what: str) -> Tensor:
    """Label maps (N, 256, 256) uint8 of images, loaded (N, 3, 256, 256) or on disk."""
    if not isinstance(pictures, Tensor):
        pictures = torch.from_numpy(job.view.read_small(pictures, f"{job.name}: {what}"))
    maps = torch.zeros(len(pictures), *pictures.shape[2:], dtype=torch.uint8)
    for first in tqdm(range(0, len(pictures), SCORING_BATCH), desc=f"{job.name}: {what}", unit="batch", leave=False):
        batch = pictures[first:first + SCORING_BATCH].to(job.device).float()
        maps[first:first + SCORING_BATCH] = segmentor(job.backbone.encoder(batch)).argmax(1).byte().cpu()
    return maps


def segment_twice(segmentor: Segmentor, job: Job, pictures: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Label maps of some training images (N, 3, 256, 256) as they are, and of the same slightly changed.

    The changes say nothing about components: a shift by up to two pixels, which is undone in the label map, light, and noise.
    """
    some = torch.arange(0, len(pictures), -(-len(pictures) // RELIABILITY_IMAGES))
    generator = torch.Generator().manual_seed(job.seed)
    shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (len(some), 2), generator=generator).tolist()
    light = 1 + LIGHT * (2 * torch.rand(len(some), 1, 1, 1, generator=generator) - 1)
    changed = torch.stack([torch.roll(picture, shift, (1, 2)) for picture, shift in zip(pictures[some], shifts)])
    changed = changed * light + NOISE * torch.randn(changed.shape, generator=generator)
    segmented = label_maps(segmentor, job, changed.clamp(0, 255).round().byte(), "segment changed training images")
    undone = torch.stack([torch.roll(label_map, (-shift[0], -shift[1]), (0, 1)) for label_map, shift in zip(segmented, shifts)])
    return maps[some], undone


def score(detector: PatchHistogramDetector, evidence: HistogramEvidence, maps: Tensor, with_evidence: bool
          ) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,), those of the evidence among them if so asked, and evidence (N, 64, 64) of label maps (N, 256, 256)."""
    drawn = torch.cat([torch.zeros(0, 64, 64), *(evidence(few) for few in maps.split(SCORING_BATCH))])
    return (detector(maps) + (evidence.score(drawn) if with_evidence else 0)).numpy(), drawn.numpy()


if __name__ == "__main__":
    run_script(main)
