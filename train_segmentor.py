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
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from csad.cli import training_options
from csad.data import files, layouts, records
from csad.data.workspace import Workspace
from csad.errors import UserError, run_script
from csad.progress import ProgressBar
from csad.settings import SegmentorSettings
from csad.training.best_on_test import (
    BEST_ON_TEST,
    BestOnTest,
    mean_auroc,
    read_scored,
    selection,
    with_checkpoint,
)
from csad.training.jobs import run_jobs
from csad.training.loop import TrainingLoop
from csad.training.pseudo_label_files import (
    digest_of_label_maps,
    read_stage_1,
    require_own_pseudo_labels,
    stand_ins_of_stage_1,
    training_data,
)
from csad.training.schedules import cosine
from csad.training.segmentor_step import (
    Batches,
    Sample,
    TrainingData,
    draw_sample,
    step_losses,
)
from csad.training.stage import Job, adam, begin, on_cpu, training_jobs, write_scores

import numpy as np
import torch
from torch import Tensor

from models.device import describe_device, memory_format
from models.histogram_evidence import HistogramEvidence, fit_evidence
from models.patch_histogram import PatchHistogramDetector, fit_parameters, fitted_detector
from models.segmentor import Segmentor

SCORING_BATCH = 8
EVALUATED_EVERY = 2  # epochs, where the test images choose the weights
# By what training images are changed to see how reliably they are segmented: pixels of 256, share, grey levels.
MAX_SHIFT, LIGHT, NOISE = 2, 0.03, 2.0
RELIABILITY_IMAGES = 64


def main() -> None:
    run_jobs(
        with_checkpoint(training_options(__doc__), "segmentor").parse_args(),
        partial(training_jobs, train_category),
    )


def train_category(job: Job) -> None:
    category, workspace, chosen = job.category, job.workspace, job.settings.segmentor
    checkpoint, parameter_file = (
        workspace.segmentor(category.name),
        workspace.patch_histogram_parameters(category.name),
    )
    trusted, classes = read_stage_1(category, workspace)
    labels = workspace.pseudo_labels(category.name)
    used = {
        "segmentor": chosen.model_dump(),
        "images": job.view.record,
        "precision": job.precision,
        **selection(job, chosen.checkpoint),
        "component_histogram": records.digest(labels.histogram),
        "trusted": records.digest(labels.trusted),
        "label_maps": digest_of_label_maps(category, workspace, trusted),
        **records.inputs(category.train, job.seed, job.backbone, stand_ins_of_stage_1(category, workspace)),
    }
    # Without evidence the exported model has no component map either, and what it does not have is not measured.
    record, to_do = begin(
        job,
        ["patchhist"],
        used,
        "segmentor is trained",
        [parameter_file, *([workspace.evidence_parameters(category.name)] if chosen.evidence else [])],
        with_maps=chosen.evidence,
    )
    if to_do == records.SKIP:
        return

    require_own_pseudo_labels(category, labels, trusted, used["train_images"])
    train_images = torch.from_numpy(
        job.view.read_small(category.train, f"{category.name}: read training images")
    )
    progress = workspace.progress(category.name, "segmentor")
    if to_do == records.TRAIN:
        data = training_data(category, workspace, train_images, trusted, classes, chosen.fill_holes)
        best = (
            best_on_test(job, train_images, trusted, classes) if chosen.checkpoint == BEST_ON_TEST else None
        )
        segmentor = train(job, data, classes, progress, record, best).eval()
        if best is not None:
            best.restore(segmentor, category.name)
        state = on_cpu(segmentor)
        if not all(values.isfinite().all() for values in state.values()):
            progress.unlink(missing_ok=True)  # nothing to go on from
            raise UserError(
                f"{category.name}: training diverged, the segmentor's weights are not finite; "
                f"lower --segmentor.lr (it was {chosen.lr})"
            )
        files.write_state(
            checkpoint,
            {
                "state": state,
                "meta": used
                | {
                    "category": category.name,
                    "classes": classes,
                    "width": chosen.width,
                    "ran_on": describe_device(job.device, job.precision),
                }
                | (best.noted() if best else {}),
            },
        )
    else:
        segmentor = Segmentor(job.backbone.channels, chosen.width, classes)
        files.load_checkpoint(segmentor, checkpoint)
        segmentor.to(job.device).eval()

    train_maps = torch.cat([*label_maps(segmentor, job, train_images, "segment training images")])
    validation_maps = torch.cat(
        [train_maps[:0], *label_maps(segmentor, job, category.validation, "segment validation images")]
    )
    twice = segment_twice(segmentor, job, train_images, train_maps) if chosen.reliability else None
    parameters = fit_parameters(train_maps, validation_maps, classes, chosen.histogram_floor, twice)
    files.write_arrays(parameter_file, **parameters)
    detector = fitted_detector(parameters, classes, trimmed=not chosen.evidence)
    evidence = None
    if chosen.evidence:
        evidence, evidence_parameters = (
            HistogramEvidence(classes),
            fit_evidence(train_maps, validation_maps, classes, twice),
        )
        evidence.load_parameters(evidence_parameters)
        files.write_arrays(workspace.evidence_parameters(category.name), **evidence_parameters)
    scores, drawn = {}, {}
    scores["val"], drawn["val"] = score(detector, evidence, validation_maps.split(SCORING_BATCH))
    for split, paths in layouts.test_splits(category).items():
        maps = label_maps(segmentor, job, paths, f"segment test images, {split}")
        scores[split], drawn[split] = score(detector, evidence, written(maps, category, workspace, split))
    if evidence is None:  # those of an earlier run with evidence would be taken for this one's
        for path in (
            workspace.evidence_parameters(category.name),
            workspace.anomaly_maps(category.name, "patchhist"),
        ):
            path.unlink(missing_ok=True)
    write_scores(category, workspace, ["patchhist"], scores, drawn if evidence else {})
    progress.unlink(missing_ok=True)  # first: with a record nothing would look for it any more
    record.finish()


def best_on_test(job: Job, train_images: Tensor, trusted: np.ndarray, classes: int) -> BestOnTest[Segmentor]:
    """What chooses the weights by the AUROC of the patch histogram on the test images, which are read once."""
    chosen = job.settings.segmentor
    pictures = {
        name: torch.from_numpy(images) for name, images in read_scored(job, job.view.read_small).items()
    }

    def measure(segmentor: Segmentor) -> float:
        train_maps = torch.cat([*label_maps(segmentor, job, train_images, "segment training images")])
        maps = {
            name: torch.cat([*label_maps(segmentor, job, images, f"evaluate {name}")])
            for name, images in pictures.items()
        }
        validation_maps = maps.pop("val")
        parameters = fit_parameters(train_maps, validation_maps, classes, chosen.histogram_floor)
        detector = fitted_detector(parameters, classes, trimmed=not chosen.evidence)
        evidence = None
        if chosen.evidence:
            evidence = HistogramEvidence(classes)
            evidence.load_parameters(fit_evidence(train_maps, validation_maps, classes))
        return mean_auroc(
            {
                split: score(detector, evidence, label_map.split(SCORING_BATCH))[0]
                for split, label_map in maps.items()
            }
        )

    each = steps_per_epoch(trusted, chosen)
    return BestOnTest(EVALUATED_EVERY * each, chosen.epochs * each, measure)


def steps_per_epoch(trusted: np.ndarray, chosen: SegmentorSettings) -> int:
    return math.ceil(len(trusted) / chosen.batch_size)


def train(
    job: Job,
    data: TrainingData,
    classes: int,
    progress: Path,
    record: records.Record,
    best: BestOnTest | None = None,
) -> Segmentor:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way."""
    chosen, backbone, device = job.settings.segmentor, job.backbone, job.device
    torch.manual_seed(job.seed)
    segmentor = Segmentor(backbone.channels, chosen.width, classes).train()
    segmentor.to(device, memory_format=memory_format(job.precision))
    optimizer = adam(segmentor, chosen, device)
    each = steps_per_epoch(data.trusted, chosen)
    steps = chosen.epochs * each
    loop = TrainingLoop(
        steps,
        progress,
        record.used,
        f"{job.name}: train segmentor",
        f"--segmentor.lr (it was {chosen.lr})",
        record.superseded() if job.overwrite else None,
        segmentor=segmentor,
        optimizer=optimizer,
        **({"best": best} if best else {}),
    )
    batches = Batches(data, backbone.encoder, device, job.precision, f"{job.name}: encode")

    def draw(step: int) -> Sample:
        unsupervised = step // each >= chosen.unsupervised_from_epoch
        return draw_sample(data, chosen, step, unsupervised, job.name, job.seed)

    for step, sample in loop.samples(draw):
        losses = step_losses(segmentor, backbone.encoder, batches.batch(sample), chosen, job.precision)
        optimizer.param_groups[0]["lr"] = chosen.lr * cosine(step, steps, chosen.final_lr_share)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        loop.report(losses)
        if best is not None:
            best.after(step + 1, segmentor)
    return segmentor.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def label_maps(
    segmentor: Segmentor, job: Job, pictures: Tensor | Sequence[Path], what: str
) -> Iterator[Tensor]:
    """Label maps (B, 256, 256) uint8 of images, loaded (N, 3, 256, 256) or on disk, batch by batch."""
    for first in ProgressBar(
        range(0, len(pictures), SCORING_BATCH), desc=f"{job.name}: {what}", unit="batch", leave=False
    ):
        batch = pictures[first : first + SCORING_BATCH]
        if not isinstance(batch, Tensor):
            batch = torch.from_numpy(job.view.read_small(batch))
        yield segmentor(job.backbone.encoder(batch.to(job.device).float())).argmax(1).byte().cpu()


def segment_twice(segmentor: Segmentor, job: Job, pictures: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Label maps of some training images (N, 3, 256, 256) as they are, and of the same slightly changed.

    The changes say nothing about components: a shift by up to two pixels, which is undone in the label map, light, and noise.
    """
    some = torch.arange(0, len(pictures), -(-len(pictures) // RELIABILITY_IMAGES))
    generator = torch.Generator().manual_seed(job.seed)
    shifts = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (len(some), 2), generator=generator).tolist()
    light = 1 + LIGHT * (2 * torch.rand(len(some), 1, 1, 1, generator=generator) - 1)
    changed = torch.stack(
        [torch.roll(picture, shift, (1, 2)) for picture, shift in zip(pictures[some], shifts)]
    )
    changed = changed * light + NOISE * torch.randn(changed.shape, generator=generator)
    segmented = torch.cat(
        [*label_maps(segmentor, job, changed.clamp(0, 255).round().byte(), "segment changed training images")]
    )
    undone = torch.stack(
        [torch.roll(label_map, (-shift[0], -shift[1]), (0, 1)) for label_map, shift in zip(segmented, shifts)]
    )
    return maps[some], undone


def written(
    batches: Iterable[Tensor], category: layouts.Category, workspace: Workspace, split: str
) -> Iterator[Tensor]:
    """The same label maps of a split's test images, each written on its way."""
    paths = iter(category.test(split))
    for maps in batches:
        for label_map, path in zip(maps, paths):
            files.write_image(
                workspace.segmentation_output(category.name, split, category.key(path)), label_map.numpy()
            )
        yield maps


def score(
    detector: PatchHistogramDetector, evidence: HistogramEvidence | None, batches: Iterable[Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N,), those of the evidence among them if there is one, and evidence (N, 64, 64), else (0, 64, 64).

    Args:
        batches: label maps (B, 256, 256) uint8; none is kept, so that memory does not grow with their number.
    """
    scores, drawn = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, 64, 64)]
    for maps in batches:
        scores.append(detector(maps))
        if evidence is not None:
            drawn.append(evidence(maps))
            scores[-1] = scores[-1] + evidence.score(drawn[-1])
    return torch.cat(scores).numpy(), torch.cat(drawn).numpy()


if __name__ == "__main__":
    run_script(main)
