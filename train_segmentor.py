"""Stage 2: train the component segmentor of each category on the pseudo-labels of stage 1.

A small network over a frozen encoder learns to label every pixel with its component, from the trusted pseudo-labels
(with logical synthesis, so that it knows components by their looks) and, later, also from the unlabelled images (which
should hold the usual amount of each component, and leave no doubt). How far the histogram of components, in the whole
image and in its four quarters, lies from those of the training images is the patch-histogram score.

Writes ckpt/segmentor_{category}_256.pth, the label maps of the test images (datasets/masks/{category}/test_seg_output),
the scores of validation and test images (anomaly_score/{category}_patchhist_*), and, with --segmentor.evidence, maps of where
components are too many or missing ({category}_patchhist_maps.npz). Interrupted, it resumes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from csad.cli import training_options
from csad.data import files, layouts, records
from csad.data.workspace import HELD_OUT
from csad.errors import run_script
from csad.training.best_on_test import BEST_ON_TEST, BestOnTest, selection, with_checkpoint
from csad.training.branch_run import BranchRun, branch_run
from csad.training.jobs import run_jobs
from csad.training.loop import drawing_workers
from csad.training.pseudo_label_files import (
    digest_of_label_maps,
    read_stage_1,
    require_own_pseudo_labels,
    stand_ins_of_stage_1,
    training_data,
)
from csad.training.schedules import cosine
from csad.training.segmentor_scores import (
    SCORING_BATCH,
    best_on_test,
    fit,
    held_out_scores,
    incomplete_maps,
    label_maps,
    score,
    written,
)
from csad.training.segmentor_step import Batches, Sample, TrainingData, draw_sample, step_losses
from csad.training.stage import Job, training_jobs

import torch

from models.segmentor import Segmentor


def main() -> None:
    args = with_checkpoint(training_options(__doc__), "segmentor").parse_args()
    run_jobs(args, partial(training_jobs, train_category))


def train_category(job: Job) -> None:
    category, workspace, settings = job.category, job.workspace, job.settings.segmentor
    trusted, classes = read_stage_1(category, workspace)
    labels = workspace.pseudo_labels(category.name)
    provenance = {
        "segmentor": settings.model_dump(),
        "images": job.view.record,
        "precision": job.precision,
        **selection(job, settings.checkpoint),
        "component_histogram": records.digest(labels.histogram),
        "trusted": records.digest(labels.trusted),
        "label_maps": digest_of_label_maps(category, workspace, trusted),
        **records.inputs(category.train, job.seed, job.backbone, stand_ins_of_stage_1(category, workspace)),
    }
    parameter_file = workspace.patch_histogram_parameters(category.name)
    evidence_file = workspace.evidence_parameters(category.name)
    held_out_file = workspace.scores(category.name, "patchhist", HELD_OUT)
    outputs = [parameter_file] + [evidence_file] * settings.evidence + [held_out_file] * settings.reliability
    # Without evidence the exported model has no component map either, and what it does not have is not measured.
    done = "segmentor is trained"
    with branch_run(job, "patchhist", provenance, done, outputs, with_maps=settings.evidence) as run:
        if run.action == records.SKIP:
            return
        require_own_pseudo_labels(category, labels, trusted, provenance["train_images"])
        read_images = job.view.read_256(category.train, f"{category.name}: read training images")
        train_images = torch.from_numpy(read_images)
        if run.action == records.TRAIN:
            data = training_data(category, workspace, train_images, trusted, classes, settings.fill_holes)
            best = None
            if settings.checkpoint == BEST_ON_TEST:
                best = best_on_test(job, train_images, classes, steps_per_epoch(data, settings.batch_size))
            segmentor, noted = train(run, data, classes, best)
            if not all(values.isfinite().all() for values in segmentor.state_dict().values()):
                raise run.diverged("the segmentor's weights are not finite")
            run.write_checkpoint(segmentor, job.precision, classes=classes, width=settings.width, **noted)
        else:
            segmentor = Segmentor(job.backbone.channels, settings.width, classes)
            run.load(segmentor)

        train_maps = torch.cat([*label_maps(segmentor, job, train_images, "segment training images")])
        segmented = label_maps(segmentor, job, category.validation, "segment validation images")
        validation_maps = torch.cat([train_maps[:0], *segmented])
        incomplete = incomplete_maps(train_maps, job.seed) if settings.reliability else None
        fitted = fit(segmentor, job, train_images, train_maps, validation_maps, classes, incomplete)
        detector, evidence = fitted.detector, fitted.evidence
        files.write_arrays(parameter_file, **fitted.parameters)
        if evidence is not None:
            files.write_arrays(evidence_file, **fitted.evidence_parameters)

        scores, maps = {}, {}
        scores["val"], maps["val"] = score(detector, evidence, validation_maps.split(SCORING_BATCH))
        for split, paths in layouts.test_splits(category).items():
            segmented = label_maps(segmentor, job, paths, f"segment test images, {split}")
            scores[split], maps[split] = score(detector, evidence, written(segmented, job, split))
        if settings.reliability:
            scores[HELD_OUT] = held_out_scores(fitted)
        else:  # those of an earlier run would be taken for this one's
            held_out_file.unlink(missing_ok=True)
        if evidence is None:  # those of an earlier run with evidence would be taken for this one's
            evidence_file.unlink(missing_ok=True)
            workspace.anomaly_maps(category.name, "patchhist").unlink(missing_ok=True)
        run.write_scores(scores, maps if evidence else {})


def steps_per_epoch(data: TrainingData, batch_size: int) -> int:
    return math.ceil(len(data.trusted) / batch_size)


def train(
    run: BranchRun, data: TrainingData, classes: int, best: BestOnTest[Segmentor] | None
) -> tuple[Segmentor, dict[str, Any]]:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way.

    Returns:
        The network, and what its checkpoint says of how the weights were chosen.
    """
    job, settings, encoder = run.job, run.job.settings.segmentor, run.job.backbone.encoder
    torch.manual_seed(job.seed)
    segmentor = Segmentor(job.backbone.channels, settings.width, classes)
    each = steps_per_epoch(data, settings.batch_size)
    schedule, workers = partial(cosine, final=settings.final_lr_share), drawing_workers(job.device)
    training = run.training(
        "train segmentor", settings.epochs * each, schedule, best, workers, segmentor=segmentor
    )
    batches = Batches(data, encoder, job.device, job.precision, f"{job.name}: encode")

    def draw(step: int) -> Sample:
        unsupervised = step // each >= settings.unsupervised_from_epoch
        return draw_sample(data, settings, step, unsupervised, job.name, job.seed)

    for _, sample in training.samples(draw):
        training.step(step_losses(segmentor, encoder, batches.batch(sample), settings, job.precision))
    return segmentor, training.finish()


if __name__ == "__main__":
    run_script(main)
