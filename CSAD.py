"""Stage 3: train LGST, the local-global student-teacher, on the good images of each category.

A teacher (random projections of a frozen encoder) is imitated by a student, locally, and by an autoencoder, globally;
a second head of the student imitates the autoencoder. Writes ckpt/best_{category}.pth and the LGST scores of
validation and test images, anomaly_score/{category}_LGST_{logi,struc,val}_score.npy, and the anomaly maps
({category}_LGST_maps.npz). Interrupted, it resumes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from csad.branches import BRANCHES
from csad.cli import select, training_options
from csad.data import files, layouts, records
from csad.data.downloads import obtain
from csad.errors import UserError, run_script
from csad.progress import ProgressBar
from csad.standins import penalty_pictures
from csad.standins.penalty_pictures import PenaltyPictures
from csad.training.best_on_test import (
    BEST_ON_TEST,
    BestOnTest,
    mean_auroc,
    read_scored,
    selection,
    with_checkpoint,
)
from csad.training.draws import shuffled_epochs
from csad.training.jobs import Task, run_jobs
from csad.training.lgst_step import (
    Batches,
    EncodedImages,
    Sample,
    draw_sample,
)
from csad.training.loop import TrainingLoop
from csad.training.schedules import step_decay, warm_cosine
from csad.training.stage import Job, adam, begin, on_cpu, training_jobs, write_scores

import numpy as np
import torch
from torch import Tensor

from models.device import autocast, describe_device, memory_format
from models.lgst import LGST, Differences, losses
from models.lgst_on_features import FeatureLGST

SCORING_BATCH = 8
EVALUATED_EVERY = 1000  # steps, where the test images choose the weights
SCORE_NAMES = BRANCHES["LGST"].score_names


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
        workspace, _, _, chosen = select(args)
        sources = (penalty_pictures.AUTO, penalty_pictures.TINY_IMAGENET)
        if any(
            one.lgst.student == "pixels" and one.lgst.penalty_images in sources for one in chosen.values()
        ):
            obtain(penalty_pictures.ARCHIVE, workspace.downloads, download=True)
    return training_jobs(train_category, args)


def train_category(job: Job) -> None:
    category, workspace, chosen = job.category, job.workspace, job.settings.lgst
    checkpoint = workspace.lgst(category.name)
    penalties = (
        PenaltyPictures(chosen.penalty_images, workspace.downloads) if chosen.student == "pixels" else None
    )
    used = {
        "lgst": chosen.model_dump(),
        "images": job.view.record,
        "precision": job.precision,
        **selection(job, chosen.checkpoint),
        **records.inputs(category.train, job.seed, job.backbone, penalties.stand_ins if penalties else []),
    }
    record, to_do = begin(job, SCORE_NAMES, used, "LGST is trained")
    if to_do == records.SKIP:
        return

    progress, noted = workspace.progress(category.name, "lgst"), {}
    if to_do == records.TRAIN:
        best = best_on_test(job) if chosen.checkpoint == BEST_ON_TEST else None
        model = (
            train(job, penalties, progress, record, best)
            if penalties
            else train_on_features(job, progress, record, best)
        ).eval()
        if best is not None:
            best.restore(model, category.name)
            noted = best.noted()
    else:
        model = (LGST if penalties else FeatureLGST)(
            job.backbone.channels, chosen.width, chosen.teacher_channels
        )
        meta = files.load_checkpoint(model, checkpoint)["meta"]
        noted = {key: meta[key] for key in ("selected_step", "evaluations") if key in meta}
        model.to(job.device).eval()
    found = differences(model, job, category.validation, "normalise maps")
    if not all(part.isfinite().all() for part in found):
        progress.unlink(missing_ok=True)  # nothing to go on from
        raise UserError(
            f"{category.name}: training diverged, LGST gives no finite scores; "
            f"lower --lgst.lr (it was {chosen.lr})"
        )
    model.fit_map_normalisation(found)
    # The encoder goes along, so that export and deployment never look for its weights again.
    files.write_state(
        checkpoint,
        {
            "state": on_cpu(model),
            "encoder": on_cpu(job.backbone.encoder),
            "meta": used
            | noted
            | {"category": category.name, "ran_on": describe_device(job.device, job.precision)},
        },
    )

    maps = {"val": model.anomaly_map(found).cpu().numpy()}
    for split, paths in layouts.test_splits(category).items():
        maps[split] = model.anomaly_map(differences(model, job, paths, f"score {split}")).cpu().numpy()
    write_scores(
        category,
        workspace,
        SCORE_NAMES,
        {split: one.max((1, 2), initial=-np.inf) for split, one in maps.items()},
        {split: model.scaled(one) for split, one in maps.items()},
    )
    progress.unlink(missing_ok=True)  # first: with a record nothing would look for it any more
    record.finish()


def best_on_test(job: Job) -> BestOnTest[LGST | FeatureLGST]:
    """What chooses the weights by the AUROC of LGST on the test images, which are read once."""
    chosen = job.settings.lgst
    read = job.view.read_small if chosen.student == "pixels" else job.view.read_middle
    pictures = {name: torch.from_numpy(images) for name, images in read_scored(job, read).items()}

    def measure(model: LGST | FeatureLGST) -> float:
        found = {name: differences(model, job, some, f"evaluate {name}") for name, some in pictures.items()}
        model.fit_map_normalisation(found.pop("val"))
        return mean_auroc(
            {split: model.anomaly_map(one).amax((1, 2)).cpu().numpy() for split, one in found.items()}
        )

    return BestOnTest(EVALUATED_EVERY, chosen.steps, measure)


def train(
    job: Job,
    penalties: PenaltyPictures,
    progress: Path,
    record: records.Record,
    best: BestOnTest | None = None,
) -> LGST:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way."""
    chosen, backbone, device = job.settings.lgst, job.backbone, job.device
    train_images = torch.from_numpy(
        job.view.read_small(job.category.train, f"{job.name}: read training images")
    )
    torch.manual_seed(job.seed)
    model = LGST(backbone.channels, chosen.width, chosen.teacher_channels)
    model.to(device, memory_format=memory_format(job.precision)).train()
    optimizer = adam(model, chosen, device)
    loop = TrainingLoop(
        chosen.steps,
        progress,
        record.used,
        f"{job.name}: train LGST",
        f"--lgst.lr (it was {chosen.lr})",
        record.superseded() if job.overwrite else None,
        model=model,
        optimizer=optimizer,
        **({"best": best} if best else {}),
    )
    batches = Batches(
        train_images, model, backbone.encoder, device, job.precision, f"{job.name}: teacher features"
    )
    if loop.done == 0:
        batches.fit_teacher_normalisation()

    def draw(step: int) -> Sample:
        return draw_sample(len(train_images), penalties, chosen, step, job.name, job.seed)

    for step, sample in loop.samples(draw):
        batch = batches.batch(sample)
        with autocast(device, job.precision):
            features = model.training_features(*batch)
        parts = losses(features, chosen.hard_quantile)
        optimizer.param_groups[0]["lr"] = chosen.lr * step_decay(step, chosen.steps)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        loop.report(parts)
        if best is not None:
            best.after(step + 1, model)
    return model.to(memory_format=torch.contiguous_format)


def train_on_features(
    job: Job, progress: Path, record: records.Record, best: BestOnTest | None = None
) -> FeatureLGST:
    """The same for short runs: no network but the three small ones runs in a step."""
    chosen, backbone, device = job.settings.lgst, job.backbone, job.device
    torch.manual_seed(job.seed)
    model = FeatureLGST(backbone.channels, chosen.width, chosen.teacher_channels)
    model.to(device, memory_format=memory_format(job.precision)).train()
    optimizer = adam(model, chosen, device)
    loop = TrainingLoop(
        chosen.steps,
        progress,
        record.used,
        f"{job.name}: train LGST",
        f"--lgst.lr (it was {chosen.lr})",
        record.superseded() if job.overwrite else None,
        model=model,
        optimizer=optimizer,
        **({"best": best} if best else {}),
    )
    maps = EncodedImages(
        job.category.train, job.view, backbone.encoder, device, f"{job.name}: encode training images"
    )
    if loop.done == 0:
        maps.fit(model)

    def draw(step: int) -> Tensor:
        return shuffled_epochs(len(job.category.train), chosen.batch_size, step, job.name, job.seed)

    for step, indices in loop.samples(draw):
        stride4, teacher, stride16 = maps.batch(indices, model)
        with autocast(device, job.precision):
            features = model.training_features(
                stride4, teacher, stride16 if step % chosen.global_every == 0 else None
            )
        parts = losses(features)
        optimizer.param_groups[0]["lr"] = chosen.lr * warm_cosine(step, chosen.steps)
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
        loop.report(parts)
        if best is not None:
            best.after(step + 1, model)
    return model.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def differences(
    model: LGST | FeatureLGST, job: Job, pictures: Tensor | Sequence[Path], what: str
) -> Differences:
    """Difference maps, two (N, 64, 64) tensors on the job's device, as the numbers that normalise them are.

    Args:
        pictures: loaded, (N, 3, S, S) uint8 as the model sees them, or on disk.
    """
    batches: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, 64, 64, device=job.device),) * 2]
    read = job.view.read_middle if model.on_features else job.view.read_small
    for first in ProgressBar(range(0, len(pictures), SCORING_BATCH), desc=f"{job.name}: {what}", leave=False):
        few = pictures[first : first + SCORING_BATCH]
        batch = (few if isinstance(few, Tensor) else torch.from_numpy(read(few))).to(job.device).float()
        maps = job.backbone.encoder(batch)
        batches.append(model.differences(maps) if model.on_features else model.differences(batch, maps))
    return Differences(*(torch.cat(maps) for maps in zip(*batches)))


if __name__ == "__main__":
    run_script(main)
