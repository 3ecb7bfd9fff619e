"""Stage 3b, beyond the paper: fit the two branches that nothing is trained for (docs/beyond.md).

The patch memory remembers what patches of good images look like: patches of a frozen encoder's maps, at a higher resolution than
the other branches see, are thinned out to a memory, and a patch's distance to the nearest remembered one is how unusual it is.
DFM, deep feature modelling, is a PCA of the maps of whole images, and what it cannot reconstruct is unusual.

Writes ckpt/memory_{category}.pth and ckpt/dfm_{category}.pth, the scores
anomaly_score/{category}_{memory,DFM}_{logi,struc,val}_score.npy, and the anomaly maps ({category}_{memory,DFM}_maps.npz).
Time and memory to fit do not grow with the number of images beyond reading each once.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from csad.data import files, layouts, records
from csad.errors import UserError, run_script
from csad.progress import ProgressBar
from csad.training.stage import Job, begin, on_cpu, run_stage, write_scores

import torch
from torch import Tensor

from models import dfm
from models.device import describe_device
from models.patch_memory import PatchMemory, apply_tiled, greedy_k_centre, patches
from models.statistics import ChannelMoments

BATCH = 4
DFM_BATCH = 16  # of views 256 wide
CANDIDATES = 100_000  # patches from which rows are chosen
USUAL_IMAGES = 34  # training images whose distances say what is usual


def main() -> None:
    run_stage(__doc__, fit_category)


def fit_category(job: Job) -> None:
    fit_memory(job)
    fit_dfm(job)


def fit_memory(job: Job) -> None:
    category, workspace, chosen = job.category, job.workspace, job.settings.memory
    checkpoint = workspace.memory(category.name)
    used = {
        "memory": chosen.model_dump(exclude={"tiles"}),
        "images": job.view.record,
        **records.inputs(category.train, job.seed, job.backbone),
    }
    record, to_do = begin(job, ["memory"], used, "the patch memory is fitted")
    if to_do == records.SKIP:
        return

    if to_do == records.TRAIN:
        memory = fit(job)
    else:
        memory = empty_memory(job)
        files.load_checkpoint(memory, checkpoint)
    memory.to(job.device).eval()
    found = anomaly_maps(memory, job, category.validation, "validation images")
    if not found.isfinite().all():
        raise UserError(
            f"{category.name}: the patch memory gives distances that are not finite; the backbone's weights may be "
            "damaged"
        )
    memory.fit_map_normalisation(found)
    files.write_state(
        checkpoint,
        {
            "state": on_cpu(memory),
            "encoder": on_cpu(job.backbone.encoder),
            "meta": used | {"category": category.name, "ran_on": describe_device(job.device, "fp32")},
        },
    )

    maps = {"val": found}
    for split, paths in layouts.test_splits(category).items():
        maps[split] = anomaly_maps(memory, job, paths, f"test images, {split}")
    memory.cpu()  # where the maps are
    write_scores(
        category,
        workspace,
        ["memory"],
        {split: memory.score(one).numpy() for split, one in maps.items()},
        {split: memory.scaled(one).numpy() for split, one in maps.items()},
    )
    record.finish()


def fit_dfm(job: Job) -> None:
    category, workspace = job.category, job.workspace
    checkpoint = workspace.dfm(category.name)
    used = {
        "dfm": {"pooling": dfm.POOLING, "variance": dfm.VARIANCE},
        "images": job.view.record,
        **records.inputs(category.train, job.seed, job.backbone),
    }
    record, to_do = begin(job, ["DFM"], used, "the deep feature model is fitted")
    if to_do == records.SKIP:
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
    files.write_state(
        checkpoint,
        {
            "state": on_cpu(model),
            "encoder": on_cpu(job.backbone.encoder),
            "meta": used | {"category": category.name, "ran_on": describe_device(job.device, "fp32")},
        },
    )
    for split, paths in layouts.test_splits(category).items():
        errors[split] = model(pooled_maps(job, paths, f"score test images, {split}"))
    write_scores(
        category,
        workspace,
        ["DFM"],
        {split: model.score(one).cpu().numpy() for split, one in errors.items()},
        {split: model.anomaly_map(one).cpu().numpy() for split, one in errors.items()},
    )
    record.finish()


@torch.no_grad()
def fit(job: Job) -> PatchMemory:
    """One pass over the training images, and a second over a few; the same seed gives the same memory.

    Raises:
        UserError: there are fewer patches than rows asked for.
    """
    chosen, paths, side = job.settings.memory, job.category.train, job.view.size // 8
    places, channels = side * side, sum(job.backbone.channels[1:])
    count = places * len(paths)
    if count < chosen.rows:
        raise UserError(
            f"{job.name}: {len(paths)} training images have {count} patches, fewer than the "
            f"{chosen.rows} rows asked for; lower --memory.rows"
        )
    generator = torch.Generator().manual_seed(job.seed + zlib.crc32(job.name.encode()))
    each = min(-(-max(CANDIDATES, chosen.rows) // len(paths)), places)  # of one image
    candidates = torch.empty(len(paths), each, channels)
    moments = ChannelMoments()
    images = iter(candidates)
    for views in read(job, paths, "read training images"):
        found = apply_tiled(lambda tile: patches(job.backbone.encoder(tile)), views, job.view.tiles)
        moments.add(found)
        for image in found.flatten(2).transpose(1, 2).cpu():  # (places, C)
            next(images).copy_(image[torch.randperm(places, generator=generator)[:each]])
    mean, std = moments.mean, torch.where(moments.std > 1e-6, moments.std, 1)

    memory = empty_memory(job)
    memory.mean.copy_(mean.view(1, -1, 1, 1))
    memory.std.copy_(std.view(1, -1, 1, 1))
    candidates = candidates.flatten(0, 1).sub_(mean.float()).div_(std.float())
    owners = torch.arange(len(paths)).repeat_interleave(each)
    with ProgressBar(total=chosen.rows, desc=f"{job.name}: choose patches", unit="patch", leave=False) as bar:
        rows = greedy_k_centre(candidates, chosen.rows, generator, bar.update)
    memory.rows.copy_(candidates[rows])
    memory.to(job.device)

    # How far good images lie from the others' patches, place by place.
    few = range(0, len(paths), -(-len(paths) // USUAL_IMAGES))
    distances = []
    for first, view in zip(few, read(job, [paths[index] for index in few], "usual distances", batch=1)):
        left_out = (owners[rows] == first).to(job.device)
        if not left_out.all():
            distances.append(memory.image_distances(job.backbone.encoder, view, left_out)[0])
    if distances:  # none where all rows are of the one training image
        memory.fit_usual(distances)
    return memory


def empty_memory(job: Job) -> PatchMemory:
    """A memory as the settings want it, still without numbers."""
    chosen = job.settings.memory
    return PatchMemory(
        sum(job.backbone.channels[1:]),
        chosen.rows,
        job.view.size // 8,
        chosen.score_share,
        job.view.tiles,
        chosen.border,
    )


def read(job: Job, paths: Sequence[Path], what: str, batch: int = BATCH) -> Iterator[Tensor]:
    """Images on disk as (B, 3, S, S) RGB in 0..255, batch by batch; large ones, seen in tiles, one by one."""
    batch = batch if job.view.tiles == 1 else 1
    for first in ProgressBar(
        range(0, len(paths), batch), desc=f"{job.name}: {what}", unit="batch", leave=False
    ):
        views = torch.from_numpy(job.view.read(paths[first : first + batch]))
        yield views.to(job.device).float()


@torch.no_grad()
def anomaly_maps(memory: PatchMemory, job: Job, paths: Sequence[Path], what: str) -> Tensor:
    """Anomaly maps (N, h, w) of images on disk, on the CPU."""
    side = job.view.size // 8
    return torch.cat(
        [
            torch.zeros(0, side, side),
            *(
                memory.anomaly_map(memory.image_distances(job.backbone.encoder, views)).cpu()
                for views in read(job, paths, f"score {what}")
            ),
        ]
    )


@torch.no_grad()
def pooled_maps(job: Job, paths: Sequence[Path], what: str) -> Tensor:
    """What DFM sees (N, C, 8, 8) of images on disk."""
    pooled = []
    for first in ProgressBar(
        range(0, len(paths), DFM_BATCH), desc=f"{job.name}: {what}", unit="batch", leave=False
    ):
        views = torch.from_numpy(job.view.read_small(paths[first : first + DFM_BATCH])).to(job.device).float()
        pooled.append(dfm.pool(job.backbone.encoder(views)))
    return torch.cat(pooled)


if __name__ == "__main__":
    run_script(main)
