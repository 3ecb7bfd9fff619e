"""Stage 3: train LGST, the local-global student-teacher, on the good images of each category.

A teacher (random projections of a frozen encoder) is imitated by a student, locally, and by an autoencoder, globally;
a second head of the student imitates the autoencoder. Writes ckpt/best_{category}.pth and the LGST scores of
validation and test images, anomaly_score/{category}_LGST_{logi,struc,val}_score.npy, and the anomaly maps
({category}_LGST_maps.npz). Interrupted, it resumes.
"""

from __future__ import annotations

import argparse
from typing import Any

from csad.cli import select, training_options
from csad.data import layouts, records
from csad.data.downloads import obtain
from csad.errors import run_script
from csad.standins import penalty_pictures
from csad.standins.penalty_pictures import PenaltyPictures
from csad.training.best_on_test import BEST_ON_TEST, BestOnTest, selection, with_checkpoint
from csad.training.branch_run import BranchRun, branch_run
from csad.training.draws import shuffled_epochs
from csad.training.jobs import Task, run_jobs
from csad.training.lgst_scores import best_on_test, differences
from csad.training.lgst_step import Batches, EncodedImages, Sample, draw_sample
from csad.training.loop import drawing_workers
from csad.training.schedules import step_decay, warm_cosine
from csad.training.stage import Job, training_jobs

import numpy as np
import torch
from torch import Tensor

from models.device import autocast
from models.lgst import LGST, losses
from models.lgst_on_features import FeatureLGST


def main() -> None:
    parser = with_checkpoint(training_options(__doc__), "lgst")
    own = parser.add_argument_group("options of this stage")
    own.add_argument(
        "--download",
        action="store_true",
        help=f"fetch the penalty pictures, {penalty_pictures.ARCHIVE.file}, into WORKSPACE/ckpt if they are missing",
    )
    run_jobs(parser.parse_args(), jobs)


def jobs(args: argparse.Namespace) -> dict[str, Task]:
    """The categories and seeds by name; what is to be downloaded is there before any of them begins."""
    if args.download and not args.dry_run:
        workspace, _, _, settings_of = select(args)
        sources = (penalty_pictures.AUTO, penalty_pictures.TINY_IMAGENET)
        on_pixels = [cfg.lgst for cfg in settings_of.values() if cfg.lgst.student == "pixels"]
        if any(lgst.penalty_images in sources for lgst in on_pixels):
            obtain(penalty_pictures.ARCHIVE, workspace.downloads, download=True)
    return training_jobs(train_category, args)


def train_category(job: Job) -> None:
    category, settings = job.category, job.settings.lgst
    penalties = None
    if settings.student == "pixels":
        penalties = PenaltyPictures(settings.penalty_images, job.workspace.downloads)
    provenance = {
        "lgst": settings.model_dump(),
        "images": job.view.record,
        "precision": job.precision,
        **selection(job, settings.checkpoint),
        **records.inputs(category.train, job.seed, job.backbone, penalties.stand_ins if penalties else []),
    }
    with branch_run(job, "LGST", provenance, "LGST is trained") as run:
        if run.action == records.SKIP:
            return
        if run.action == records.TRAIN:
            best = best_on_test(job) if settings.checkpoint == BEST_ON_TEST else None
            model, noted = train(run, penalties, best) if penalties else train_on_features(run, best)
        else:
            network = LGST if penalties else FeatureLGST
            model = network(job.backbone.channels, settings.width, settings.teacher_channels)
            meta = run.load(model)
            noted = {key: meta[key] for key in ("selected_step", "evaluations") if key in meta}

        validation = differences(model, job, category.validation, "normalise maps")
        if not all(part.isfinite().all() for part in validation):
            raise run.diverged("LGST gives no finite scores")
        model.fit_map_normalisation(validation)
        run.write_checkpoint(model, job.precision, job.backbone.encoder, **noted)

        maps = {"val": model.anomaly_map(validation).cpu().numpy()}
        for split, paths in layouts.test_splits(category).items():
            maps[split] = model.anomaly_map(differences(model, job, paths, f"score {split}")).cpu().numpy()
        run.write_scores(
            {split: values.max((1, 2), initial=-np.inf) for split, values in maps.items()},
            {split: model.scaled(values) for split, values in maps.items()},
        )


def train(run: BranchRun, penalties: PenaltyPictures, best: BestOnTest | None) -> tuple[LGST, dict[str, Any]]:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way.

    Returns:
        The network, and what its checkpoint says of how the weights were chosen.
    """
    job, settings = run.job, run.job.settings.lgst
    read_images = job.view.read_256(job.category.train, f"{job.name}: read training images")
    train_images = torch.from_numpy(read_images)
    torch.manual_seed(job.seed)
    model = LGST(job.backbone.channels, settings.width, settings.teacher_channels)
    workers, what = drawing_workers(job.device), f"{job.name}: teacher features"
    training = run.training("train LGST", settings.steps, step_decay, best, workers, model=model)
    batches = Batches(train_images, model, job.backbone.encoder, job.device, job.precision, what)
    if training.done == 0:
        batches.fit_teacher_normalisation()

    def draw(step: int) -> Sample:
        return draw_sample(len(train_images), penalties, settings, step, job.name, job.seed)

    for _, sample in training.samples(draw):
        batch = batches.batch(sample)
        with autocast(job.device, job.precision):
            features = model.training_features(*batch)
        training.step(losses(features, settings.hard_quantile))
    return model, training.finish()


def train_on_features(run: BranchRun, best: BestOnTest | None) -> tuple[FeatureLGST, dict[str, Any]]:
    """The same for short runs: no network but the three small ones runs in a step."""
    job, settings = run.job, run.job.settings.lgst
    torch.manual_seed(job.seed)
    model = FeatureLGST(job.backbone.channels, settings.width, settings.teacher_channels)
    training = run.training("train LGST", settings.steps, warm_cosine, best, model=model)
    what = f"{job.name}: encode training images"
    maps = EncodedImages(job.category.train, job.view, job.backbone.encoder, job.device, what)
    if training.done == 0:
        maps.fit(model)

    def draw(step: int) -> Tensor:
        return shuffled_epochs(len(job.category.train), settings.batch_size, step, job.name, job.seed)

    for step, indices in training.samples(draw):
        stride4, teacher, stride16 = maps.batch(indices, model)
        is_global = step % settings.global_every == 0
        with autocast(job.device, job.precision):
            features = model.training_features(stride4, teacher, stride16 if is_global else None)
        training.step(losses(features))
    return model, training.finish()


if __name__ == "__main__":
    run_script(main)
