"""Stage 3b, beyond the paper: fit the two branches that nothing is trained for (docs/beyond.md).

The patch memory remembers what patches of good images look like: patches of a frozen encoder's maps, at a higher resolution than
the other branches see, are thinned out to a memory, and a patch's distance to the nearest remembered one is how unusual it is.
Larger patches of the view that all branches see, their context, are remembered beside them.
DFM, deep feature modelling, is a PCA of the maps of whole images, and what it cannot reconstruct is unusual.

Writes ckpt/memory_{category}.pth and ckpt/dfm_{category}.pth, the scores
anomaly_score/{category}_{memory,DFM}_{logi,struc,val}_score.npy, and the anomaly maps ({category}_{memory,DFM}_maps.npz).
Time and memory to fit do not grow with the number of images beyond reading each once.
"""

from __future__ import annotations

import zlib
from functools import partial

from csad.cli import training_options
from csad.data import layouts, records
from csad.errors import UserError, run_script
from csad.training.branch_run import branch_run
from csad.training.frozen_maps import Candidates, anomaly_maps, pooled_maps, read_views
from csad.training.jobs import run_jobs
from csad.training.stage import Job, training_jobs

import torch

from models import dfm
from models.constants import SIZE
from models.fused import block_means
from models.patch_memory import CONTEXT_WEIGHT, PatchMemory, apply_tiled, patches

BASELINE_IMAGES = 34  # training images whose distances are the baseline


def main() -> None:
    args = training_options(__doc__).parse_args()
    run_jobs(args, partial(training_jobs, fit_category))


def fit_category(job: Job) -> None:
    fit_memory(job)
    fit_dfm(job)


def fit_memory(job: Job) -> None:
    category, settings = job.category, job.settings.memory
    provenance = {
        "memory": settings.model_dump(exclude={"tiles"}) | {"context_weight": CONTEXT_WEIGHT},
        "images": job.view.record,
        **records.inputs(category.train, job.seed, job.backbone),
    }
    with branch_run(job, "memory", provenance, "the patch memory is fitted") as run:
        if run.action == records.SKIP:
            return
        if run.action == records.TRAIN:
            memory = fit(job).to(job.device).eval()
        else:
            memory = empty_memory(job)
            run.load(memory)
        maps = {"val": anomaly_maps(memory, job, category.validation, "validation images")}
        if not maps["val"].isfinite().all():
            raise UserError(
                f"{category.name}: the patch memory gives distances that are not finite; the backbone's weights may be "
                "damaged"
            )
        memory.fit_map_normalisation(maps["val"])
        run.write_checkpoint(memory, encoder=job.backbone.encoder)

        for split, paths in layouts.test_splits(category).items():
            maps[split] = anomaly_maps(memory, job, paths, f"test images, {split}")
        memory.cpu()  # where the maps are
        run.write_scores(
            {split: memory.score(values).numpy() for split, values in maps.items()},
            {split: memory.scaled(values).numpy() for split, values in maps.items()},
        )


def fit_dfm(job: Job) -> None:
    category = job.category
    provenance = {
        "dfm": {"pooling": dfm.POOLING, "variance": dfm.VARIANCE},
        "images": job.view.record,
        **records.inputs(category.train, job.seed, job.backbone),
    }
    with branch_run(job, "DFM", provenance, "the deep feature model is fitted") as run:
        if run.action == records.SKIP:
            return
        # Fitted in seconds, so also where only the scores are missing.
        paths = category.train[:: -(-len(category.train) // dfm.MAX_IMAGES)]
        model = dfm.fit(pooled_maps(job, paths, "read training images"), job.backbone.channels[2])
        errors = {"val": model(pooled_maps(job, category.validation, "score validation images"))}
        if not errors["val"].isfinite().all():
            raise UserError(
                f"{category.name}: DFM gives errors that are not finite; the backbone's weights may be damaged"
            )
        model.fit_map_normalisation(errors["val"])
        run.write_checkpoint(model, encoder=job.backbone.encoder)

        for split, paths in layouts.test_splits(category).items():
            errors[split] = model(pooled_maps(job, paths, f"score test images, {split}"))
        run.write_scores(
            {split: model.score(values).cpu().numpy() for split, values in errors.items()},
            {split: model.scaled(values).cpu().numpy() for split, values in errors.items()},
        )


@torch.no_grad()
def fit(job: Job) -> PatchMemory:
    """One pass over the training images, and a second over a few; the same seed gives the same memory.
    UserError if there are fewer patches than rows asked for."""
    paths, encoder, memory = job.category.train, job.backbone.encoder, empty_memory(job)
    seed = job.seed + zlib.crc32(job.name.encode())
    details = Candidates(memory.detail, len(paths), seed)
    contexts = Candidates(memory.context, len(paths), seed)
    for views in read_views(job, paths, "read training images"):
        details.add(apply_tiled(lambda tile: patches(encoder(tile)), views, job.view.tiles))
        contexts.add(encoder(block_means(views))[2])
    detail_owners = details.choose(f"{job.name}: choose patches")
    context_owners = contexts.choose(f"{job.name}: choose context")
    memory.to(job.device)

    # How far good images lie from the others' patches, place by place.
    few = range(0, len(paths), -(-len(paths) // BASELINE_IMAGES))
    distances, context_distances = [], []
    for index, view in zip(
        few, read_views(job, [paths[index] for index in few], "baseline distances", batch=1)
    ):
        own, own_context = ((owners == index).to(job.device) for owners in (detail_owners, context_owners))
        if not (own.all() or own_context.all()):
            distances.append(memory.distances(encoder, view, own)[0])
            embedded = memory.context.embed(encoder(block_means(view))[2])
            context_distances.append(memory.context.distances(embedded, own_context)[0])
    if distances:  # none where all rows are of the one training image
        memory.detail.fit_baseline(distances)
        memory.context.fit_baseline(context_distances)
        memory.fit_context_scale(torch.stack(distances), torch.stack(context_distances))
    return memory


def empty_memory(job: Job) -> PatchMemory:
    """A memory as the settings want it, still without numbers; errors as of `fit`."""
    settings, side, images = job.settings.memory, job.view.size // 8, len(job.category.train)
    if side * side * images < settings.rows:
        raise UserError(
            f"{job.name}: {images} training images have {side * side * images} patches, fewer than the "
            f"{settings.rows} rows asked for; lower --memory.rows"
        )
    return PatchMemory(
        job.backbone.channels[1:],
        settings.rows,
        min(-(-settings.rows // 2), images * (SIZE // 16) ** 2),
        side,
        settings.score_share,
        job.view.tiles,
        settings.border,
    )


if __name__ == "__main__":
    run_script(main)
