"""Trains the embedded backbone on formula-made pictures: no photograph, no download, two CPU cores, under an hour.

The story, in the order of the code:

1. `prepare_pictures` renders labelled pictures once and keeps them in one file.
2. `take_view` and `photograph` look at a batch of pictures through random crops, turns, flips, light, blur and noise.
   Each picture gives two views, A and B, and the place of every patch of one in the other is known.
3. `damage` changes something in view B, inside a mask the shape of some object of another picture: foreign content pasted
   in, the picture shifted, recoloured, blurred or painted over. This is what a structural anomaly looks like to a patch.
4. The network learns five things at once (`Lessons`):
   - *labels*: texture kind, shape kind, edge of every patch, read linearly from each stage;
   - *damage*: which patches of B were tampered with, seen from B alone;
   - *distance*: corresponding patches of A and B lie near each other if untouched, far apart if damaged, in the very
     distance in which patch features are compared afterwards;
   - *patches*: each patch of A knows its counterpart in B among all patches of the batch (InfoNCE);
   - *pictures*: the same for whole pictures.
   Saturation and hue are jittered only mildly, so that they stay in the features: components are told apart by them. Light
   of another strength or colour, over the whole view or unevenly, is to be overlooked.

5. `equalise` sets the gains of the returned channels, so that those of one stage count alike.

    python -m training.embedded_backbone --out models/embedded_backbone.pth --pictures 20000 --steps 1000 --seed 0
    python -m training.embedded_backbone --evaluate DATASET_ROOT/CATEGORY

The second form measures a trained backbone on any category in MVTec LOCO's layout by the nearest-neighbour distance of patch
features. An interrupted training continues from its checkpoint (`--cache`) when the same command is given again.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from errors import UserError, run_script
from models.embedded_backbone import EmbeddedBackbone, load_embedded_backbone
from training.formula_pictures import SHAPE_KINDS, TEXTURE_KINDS, render_labelled_picture

PICTURE_SIZE = 160  # pixels, as rendered
VIEW_SIZE = 128  # pixels, as seen by the network; a multiple of 32
LABEL_STRIDE = 8  # pixels of a view per labelled patch
EVALUATION_SIZE = 256
CHECKPOINT_EVERY = 250  # steps
EQUALISED_ON = 512  # pictures
# Standard deviation of the returned channels, stage by stage. LGST's student looks at 33 pixels at a time, the third stage at
# 183: the louder that stage is in the teacher, the more of it the student can only guess.
LOUDNESS = (1.0, 1.0, 0.5, 1.0)

BATCH = 64  # pictures per step, two views each
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.05  # share of the steps

EMBEDDING = 96  # length of the vectors that are contrasted
PATCH_TEMPERATURE = 0.15
PICTURE_TEMPERATURE = 0.2
ANCHORS = 12  # patches per picture and stage that look for their counterpart

DAMAGED_SHARE = 0.8  # of the B views
DAMAGE_AREA = (0.001, 0.1)  # of a view, smallest and largest
SCRATCH_SHARE = 0.3  # of the damages: only the outline of the mask, two or three pixels wide
VISIBLE_CHANGE = 0.05  # mean absolute change of a pixel (0..1) that counts as damage
CHANGED_PATCH = 0.12  # share of a patch that must be damaged to call the patch damaged

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
LUMINANCE = torch.tensor([0.299, 0.587, 0.114])

WEIGHTS = {"labels": 1.0, "damage": 1.0, "distance": 1.0, "patches": 0.5, "pictures": 0.25}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _render(seed_and_index: tuple[int, int]) -> np.ndarray:
    picture = render_labelled_picture(np.random.default_rng(seed_and_index), PICTURE_SIZE)
    labels = np.stack([picture.texture, picture.shape, picture.instance], -1)
    return np.concatenate([picture.image, labels], -1)


def prepare_pictures(folder: Path, count: int, seed: int, workers: int) -> np.ndarray:
    """Render `count` pictures, or find them rendered.

    Args:
        folder: where the file is kept; about 150 kB per picture.
        count, seed: picture i is drawn from the generator seeded with (seed, i), whatever the number of workers.
        workers: processes that draw.

    Returns:
        (count, PICTURE_SIZE, PICTURE_SIZE, 6) uint8: RGB, texture, shape, instance; in memory, where random access is quick.
    """
    path = folder / f"pictures_{PICTURE_SIZE}_{count}_{seed}.npy"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        store = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (count, PICTURE_SIZE, PICTURE_SIZE, 6))
        with get_context("spawn").Pool(workers, cv2.setNumThreads, (1,)) as pool:
            jobs = pool.imap(_render, ((seed, i) for i in range(count)), chunksize=64)
            for i, picture in enumerate(tqdm(jobs, "rendering", count, unit="picture")):
                store[i] = picture
        store.flush()
        os.replace(unfinished, path)
    return np.load(path)


# ---------------------------------------------------------------------------------------------------------------------
# Views


@dataclass
class View:
    """A batch of pictures looked at in one way.

    Attributes:
        image: (B, 3, VIEW_SIZE, VIEW_SIZE), RGB in 0..1, before light and colour are changed.
        labels: (B, 3, h, w) int64, texture, shape, instance at patch centres, LABEL_STRIDE apart.
        instance: (B, VIEW_SIZE, VIEW_SIZE) int64.
        frame: (B, 3, 3); takes homogeneous (x, y, 1) of the view to the picture, both in -1..1.
    """

    image: Tensor
    labels: Tensor
    instance: Tensor
    frame: Tensor


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _chance(generator: torch.Generator, count: int, probability: float) -> Tensor:
    return (torch.rand(count, generator=generator) < probability).float()


def random_frames(generator: torch.Generator, centre: Tensor) -> Tensor:
    """Frames (B, 3, 3) of random size, turn, aspect and mirroring near `centre` (B, 2)."""
    count = len(centre)
    size = torch.exp(_uniform(generator, count, math.log(0.45), 0.0))
    stretch = torch.exp(_uniform(generator, count, -0.15, 0.15))
    angle = _uniform(generator, count, -0.35, 0.35) + math.pi / 2 * torch.randint(0, 4, (count,), generator=generator)
    angle = angle + _chance(generator, count, 0.3) * _uniform(generator, count, 0, math.pi / 2)
    mirror = 1 - 2 * _chance(generator, count, 0.5)
    frame = torch.zeros(count, 3, 3)
    frame[:, 0, 0], frame[:, 0, 1] = angle.cos() * size * stretch * mirror, -angle.sin() * size / stretch
    frame[:, 1, 0], frame[:, 1, 1] = angle.sin() * size * stretch * mirror, angle.cos() * size / stretch
    shift = centre + 0.25 * size[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
    room = (1 - size).clamp(min=0)[:, None]
    frame[:, :2, 2] = torch.minimum(torch.maximum(shift, -room), room)
    frame[:, 2, 2] = 1
    return frame


def _look(values: Tensor, frame: Tensor, side: int, mode: str) -> Tensor:
    grid = F.affine_grid(frame[:, :2], [len(frame), 1, side, side], align_corners=False)
    return F.grid_sample(values, grid, mode, "reflection", align_corners=False)


def take_view(pictures: Tensor, frame: Tensor) -> View:
    """Look at `pictures` (B, 6, PICTURE_SIZE, PICTURE_SIZE), float 0..255, through `frame` (B, 3, 3)."""
    image = _look(pictures[:, :3], frame, VIEW_SIZE, "bilinear") / 255
    labels = _look(pictures[:, 3:], frame, VIEW_SIZE // LABEL_STRIDE, "nearest").long()
    instance = _look(pictures[:, 5:], frame, VIEW_SIZE, "nearest")[:, 0].long()
    return View(image, labels, instance, frame)


def damage(view: View, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Change something in most views of a batch.

    Returns:
        The changed images (B, 3, V, V) and the visibly changed pixels (B, 1, V, V), float 0 or 1.
    """
    image, count = view.image, len(view.image)
    # The mask: one object of the next picture, if it has one of a suitable size.
    shapes = view.instance.roll(1, 0).flatten(1)
    area = torch.zeros(count, 256).scatter_add_(1, shapes, torch.ones(shapes.shape)) / shapes.shape[1]
    suitable = (area > DAMAGE_AREA[0]) & (area < DAMAGE_AREA[1])
    suitable[:, 0] = False
    chosen = torch.where(suitable, torch.rand(count, 256, generator=generator), -1.0).argmax(1, keepdim=True)
    mask = (shapes == chosen).float() * suitable.any(1, keepdim=True) * _chance(generator, count, DAMAGED_SHARE)[:, None]
    mask = mask.view(count, 1, *image.shape[2:])
    outline = F.max_pool2d(mask, 3, 1, 1) + F.max_pool2d(-mask, 3, 1, 1)
    scratched = _chance(generator, count, SCRATCH_SHARE).view(-1, 1, 1, 1)
    mask = F.avg_pool2d(scratched * outline + (1 - scratched) * mask, 3, 1, 1)

    # What comes in its place, one of six per picture.
    near, far = (int(torch.randint(low, high, (1,), generator=generator)) for low, high in ((2, 7), (10, 40)))
    turned = torch.rand(count, generator=generator) < 0.5
    somewhere = torch.randint(0, image[0, 0].numel(), (count, 1, 1), generator=generator)
    flat = image.flatten(2).gather(2, somewhere.expand(-1, 3, -1))
    gain, offset = _uniform(generator, count, 0.4, 1.6), 0.4 * torch.rand(count, 3, generator=generator) - 0.2
    worn = F.interpolate(F.avg_pool2d(image, 8), image.shape[2:], mode="bilinear")
    options = (
        image.roll(2, 0),  # another picture
        torch.where(turned.view(-1, 1, 1, 1), image.roll(near, 2), image.roll(-near, 3)),  # moved a little: bent, broken
        torch.where(turned.view(-1, 1, 1, 1), image.roll(far, 2), image.roll(-far, 3)),  # moved far: misplaced, missing
        flat[..., None].expand_as(image),  # a stain in one of its own colours
        (image * gain.view(-1, 1, 1, 1) + offset.view(-1, 3, 1, 1)).clamp(0, 1),  # another colour
        worn,
    )
    kind, content = torch.randint(0, len(options), (count,), generator=generator), torch.empty_like(image)
    for number, option in enumerate(options):
        content[kind == number] = option[kind == number]
    changed = image + mask * (content - image)
    visible = ((changed - image).abs().mean(1, keepdim=True) > VISIBLE_CHANGE).float()
    return changed, visible


def photograph(image: Tensor, generator: torch.Generator) -> Tensor:
    """Light, colour, sharpness and noise of another day; ImageNet-normalised. (B, 3, V, V) in 0..1 -> the same shape."""
    count = len(image)
    # One colour matrix does contrast, saturation (sometimes down to grey) and a slight turn of hue.
    saturation = _uniform(generator, count, 0.6, 1.4) * (1 - _chance(generator, count, 0.08))
    grey = LUMINANCE.expand(3, 3)
    matrix = grey + saturation.view(-1, 1, 1) * (torch.eye(3) - grey)
    hue = _uniform(generator, count, -0.12, 0.12).view(-1, 1, 1)
    twist = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    matrix = (torch.eye(3) + hue * twist) @ matrix
    cast = (0.25 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)).exp()
    contrast = _uniform(generator, count, 0.65, 1.35).view(-1, 1, 1, 1)
    brightness = _uniform(generator, count, -0.12, 0.12).view(-1, 1, 1, 1)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = torch.einsum("bij,bjhw->bihw", matrix, image)
    image = ((image - mean) * contrast + mean + brightness) * cast
    # Uneven light: a smooth random field.
    field = torch.randn(count, 1, 3, 3, generator=generator) * _uniform(generator, count, 0, 0.35).view(-1, 1, 1, 1)
    image = image * F.interpolate(field, image.shape[2:], mode="bilinear").exp()
    # Blurred (positive) or sharpened (negative).
    sharpness = (_uniform(generator, count, -0.5, 1) * _chance(generator, count, 0.5)).view(-1, 1, 1, 1)
    image = image + sharpness * (F.avg_pool2d(image, 3, 1, 1, count_include_pad=False) - image)
    strength = (_uniform(generator, count, 0, 0.06) * _chance(generator, count, 0.6)).view(-1, 1, 1, 1)
    image = image + strength * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) - IMAGENET_MEAN) / IMAGENET_STD


# ---------------------------------------------------------------------------------------------------------------------
# Lessons


def _info_nce(queries: Tensor, keys: Tensor, temperature: float, ignored: Tensor | None = None) -> Tensor:
    """Cross-entropy of finding key i for query i, both ways; (N, D) each; pairs `ignored` (N, N) are no negatives."""
    logits = F.normalize(queries.float(), dim=1) @ F.normalize(keys.float(), dim=1).T / temperature
    if ignored is not None:
        logits = logits.masked_fill(ignored, -1e4)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Lessons(nn.Module):
    """The heads that exist only during training, and the losses computed with them."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.classes = (len(TEXTURE_KINDS), len(SHAPE_KINDS), 1, 1)  # texture, shape, edge, damage
        strides = (8, 16, 32)
        self.readers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, sum(self.classes) * (s // LABEL_STRIDE) ** 2, 1), nn.PixelShuffle(s // LABEL_STRIDE))
            for c, s in zip(channels[1:], strides, strict=True)
        )
        self.patch_projections = nn.ModuleList(nn.Conv2d(c, EMBEDDING, 1) for c in channels[1:])
        hidden = 2 * EMBEDDING
        self.picture_projection = nn.Sequential(nn.Linear(channels[3], hidden), nn.ReLU(), nn.Linear(hidden, EMBEDDING))
        self.distance_scale = nn.Parameter(torch.full((3,), 4.0))
        self.distance_threshold = nn.Parameter(torch.full((3,), 0.5))

    def labels_and_damage(self, stages: list[Tensor], labels: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """Read every stage linearly.

        Args:
            stages: features of both views at strides 8, 16, 32.
            labels: (2B, 3, h, w) texture, shape, instance. changed: (2B, h, w), 1 damaged, 0 untouched, between: neither.
        """
        instance = labels[:, 2]
        edge = torch.zeros(instance.shape)
        for axis in (1, 2):
            step = (instance != instance.roll(1, axis)).float()
            step.select(axis, 0).zero_()
            edge = torch.maximum(edge, torch.maximum(step, step.roll(-1, axis)))
        untouched = changed == 0
        texture = torch.where(untouched, labels[:, 0], -100)
        shape = torch.where(untouched, labels[:, 1], -100)
        decided = ((changed == 0) | (changed > CHANGED_PATCH)).float()
        label_loss = damage_loss = torch.zeros(())
        for reader, stage in zip(self.readers, stages, strict=True):
            read = reader(stage).float().split(self.classes, 1)
            label_loss = label_loss + F.cross_entropy(read[0], texture) + F.cross_entropy(read[1], shape)
            label_loss = label_loss + F.binary_cross_entropy_with_logits(read[2][:, 0], edge, untouched.float())
            hit = (changed > CHANGED_PATCH).float()
            damage_loss = damage_loss + F.binary_cross_entropy_with_logits(read[3][:, 0], hit, decided * (1 + 4 * hit))
        return label_loss / len(stages), damage_loss / len(stages)

    def correspondence(
        self,
        level: int,
        a: Tensor,
        b: Tensor,
        frames: tuple[Tensor, Tensor],
        labels: Tensor,
        changed: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Distance and patch losses between the two views at one stage.

        Args:
            level: 0, 1, 2 for the stages at stride 8, 16 and 32.
            a, b: features (B, C, h, w) of the views. frames: their frames.
            labels: (B, 3, H, W) of A. changed: (B, H, W) of B.
        """
        count, _, height, width = a.shape
        # Where the patches of A lie in B.
        way = torch.linalg.solve(frames[1], frames[0])
        grid = F.affine_grid(way[:, :2], [count, 1, height, width], align_corners=False)
        pick = torch.rand(count, height * width, generator=generator).argsort(1)[:, :ANCHORS]
        spots = grid.flatten(1, 2).gather(1, pick[..., None].expand(-1, -1, 2))[:, None]  # (B, 1, ANCHORS, 2)
        inside = (spots.abs() < 1 - 1 / height).all(-1).flatten()
        there = F.grid_sample(b, spots, align_corners=False)[:, :, 0].transpose(1, 2).flatten(0, 1)
        here = a.flatten(2).transpose(1, 2).gather(1, pick[..., None].expand(-1, -1, a.shape[1])).flatten(0, 1)
        hit = F.grid_sample(F.adaptive_avg_pool2d(changed[:, None], (height, width)), spots, align_corners=False).flatten()

        squared = (F.normalize(here, dim=1) - F.normalize(there, dim=1)).square().sum(1)
        logits = self.distance_scale[level] * (squared - self.distance_threshold[level])
        far, near = inside & (hit > CHANGED_PATCH), inside & (hit == 0)
        apart = F.softplus(-logits[far]).sum() / far.sum().clamp(min=1)
        together = F.softplus(logits[near]).sum() / near.sum().clamp(min=1)

        # Patches of one object of one picture are no negatives of each other: they may look alike.
        coarse = F.interpolate(labels[:, 2:].float(), (height, width)).flatten(1).gather(1, pick).flatten()
        owner = torch.arange(count).repeat_interleave(ANCHORS) * 256 + coarse
        owner = owner[near]
        alike = (owner[:, None] == owner[None]) & ~torch.eye(len(owner), dtype=torch.bool)
        projection = self.patch_projections[level]
        queries, keys = (projection(x[near, :, None, None])[:, :, 0, 0] for x in (here, there))
        return apart + together, _info_nce(queries, keys, PATCH_TEMPERATURE, alike)


def losses_of_step(
    backbone: EmbeddedBackbone, lessons: Lessons, pictures: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """The five losses on one batch of pictures (B, 6, PICTURE_SIZE, PICTURE_SIZE), float 0..255."""
    centre = 2 * torch.rand(len(pictures), 2, generator=generator) - 1
    a, b = (take_view(pictures, random_frames(generator, centre)) for _ in range(2))
    damaged, visible = damage(b, generator)
    images = torch.cat([photograph(a.image, generator), photograph(damaged, generator)])
    changed = F.avg_pool2d(visible, LABEL_STRIDE)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        stages = list(backbone(images.contiguous(memory_format=torch.channels_last)))[1:]
        label_loss, damage_loss = lessons.labels_and_damage(
            stages, torch.cat([a.labels, b.labels]), torch.cat([torch.zeros_like(changed), changed])
        )
        pooled = lessons.picture_projection(stages[2].mean((2, 3)))
    distance_loss = patch_loss = torch.zeros(())
    stages[2] = F.interpolate(stages[2], stages[1].shape[2:], mode="bilinear")  # on stage 3's grid, as it is compared later
    for level, stage in enumerate(stages):
        first, second = stage.float().chunk(2)
        distance, patch = lessons.correspondence(level, first, second, (a.frame, b.frame), a.labels, changed, generator)
        distance_loss, patch_loss = distance_loss + distance / len(stages), patch_loss + patch / len(stages)
    return {
        "labels": label_loss,
        "damage": damage_loss,
        "distance": distance_loss,
        "patches": patch_loss,
        "pictures": _info_nce(*pooled.chunk(2), PICTURE_TEMPERATURE),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write(temporary path)` make a file, then put it in place at once."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(unfinished)
    os.replace(unfinished, path)


def train(pictures: np.ndarray, steps: int, seed: int, checkpoint: Path) -> tuple[EmbeddedBackbone, dict[str, float]]:
    """Train a backbone; continue from `checkpoint` if it exists.

    Returns:
        The backbone in evaluation mode, and the losses averaged over the last hundred steps.
    """
    torch.manual_seed(seed)
    backbone = EmbeddedBackbone().to(memory_format=torch.channels_last).train()
    lessons = Lessons(backbone.channels)
    parameters = [*backbone.parameters(), *lessons.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    parts = {"backbone": backbone, "lessons": lessons, "optimizer": optimizer, "schedule": schedule}
    start, recent = 0, []
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        start, recent = saved["step"], saved["recent"]

    bar = tqdm(range(start, steps), "training", steps, initial=start, unit="step")
    for step in bar:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)  # a resumed run draws what an unbroken one draws
        rows = torch.randint(0, len(pictures), (BATCH,), generator=generator).sort().values.numpy()
        batch = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float()
        losses = losses_of_step(backbone, lessons, batch, generator)
        loss = sum(WEIGHTS[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()

        recent = [*recent[-99:], {name: value.item() for name, value in losses.items()}]
        if step % 20 == 0:
            bar.set_postfix({name: f"{value:.3f}" for name, value in recent[-1].items()})
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": step + 1, "recent": recent}
            _replace(checkpoint, lambda path: torch.save(state, path))
    equalise(backbone.eval(), pictures)
    return backbone, {name: sum(r[name] for r in recent) / len(recent) for name in WEIGHTS}


@torch.inference_mode()
def equalise(backbone: EmbeddedBackbone, pictures: np.ndarray) -> None:
    """Set the gains so that every returned channel has the standard deviation `LOUDNESS` on the first pictures."""
    images = torch.from_numpy(pictures[:EQUALISED_ON, ..., :3]).permute(0, 3, 1, 2).float() / 255
    features = [backbone(batch) for batch in ((images - IMAGENET_MEAN) / IMAGENET_STD).split(BATCH)]
    for gain, loudness, stage in zip(backbone.gains, LOUDNESS, zip(*features, strict=True), strict=True):
        spread = torch.cat([maps.transpose(0, 1).flatten(1) for maps in stage], 1).std(1)
        # A channel that never speaks stays silent.
        gain.factor.copy_(torch.where(spread > 1e-3, loudness / spread.clamp(min=1e-3), 0).view_as(gain.factor))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def patch_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """Patch features as measured here: the two deepest stages on the grid of the finer, each scaled to length 1.

    Args:
        images: (B, 3, H, W), ImageNet-normalised.

    Returns:
        (B, patches, channels).
    """
    *_, fine, coarse = backbone(images)
    coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear")
    return torch.cat([F.normalize(fine, dim=1), F.normalize(coarse, dim=1)], 1).flatten(2).transpose(1, 2)


def nearest_neighbour_scores(bank: Tensor, queries: Tensor) -> Tensor:
    """Largest distance of an image's patches to their nearest neighbours in `bank`: (N, D), (B, P, D) -> (B,)."""
    return torch.stack([torch.cdist(patches, bank).min(1).values.max() for patches in queries])


def _features_of(backbone: nn.Module, folder: Path) -> Tensor:
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp"})
    if not paths:
        raise UserError(f"no images in {folder}; --evaluate takes one category's folder in MVTec LOCO's layout")
    features = []
    for path in paths:
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((EVALUATION_SIZE, EVALUATION_SIZE), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            features.append(patch_features(backbone, (image - IMAGENET_MEAN) / IMAGENET_STD))
    return torch.cat(features)


def evaluate(backbone: nn.Module, category: Path) -> dict[str, float]:
    """Image AUROC (percent, to a tenth) of the nearest-neighbour distance, for each kind of anomaly in `category`."""
    bank = _features_of(backbone, category / "train" / "good").flatten(0, 1)
    good = nearest_neighbour_scores(bank, _features_of(backbone, category / "test" / "good"))
    result = {}
    for kind in ("logical_anomalies", "structural_anomalies"):
        bad = nearest_neighbour_scores(bank, _features_of(backbone, category / "test" / kind))
        truth = [0] * len(good) + [1] * len(bad)
        result[kind] = round(100 * float(roc_auc_score(truth, torch.cat([good, bad]).numpy())), 1)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The script


def save(backbone: EmbeddedBackbone, weights: Path, story: dict) -> None:
    """Write the weights in half precision, and beside them the provenance: `story` and the weights' sha256."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in backbone.state_dict().items()}
    weights.parent.mkdir(parents=True, exist_ok=True)
    _replace(weights, lambda path: torch.save(state, path))
    story = story | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    _replace(weights.with_suffix(".json"), lambda path: path.write_text(json.dumps(story, indent=2) + "\n"))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m training.embedded_backbone", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="train; write the weights here (.pth) and the provenance beside it (.json)")
    parser.add_argument("--pictures", type=int, default=20_000, help="pictures, 150 kB of memory each (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help=f"training steps of {BATCH} pictures (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("ckpt/embedded_backbone"), help="for pictures and checkpoint")
    parser.add_argument("--machine", default=platform.processor() or platform.machine(), help="noted in the provenance")
    parser.add_argument(
        "--evaluate", type=Path, nargs="+", default=[], metavar="CATEGORY",
        help="measure on these categories (LOCO layout): the backbone just trained, or else the shipped one",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.out and not options.evaluate:
        parser.error("nothing to do: give --out to train, --evaluate to measure, or both")
    if min(options.pictures, options.steps, options.threads) < 1:
        parser.error("--pictures, --steps and --threads must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    if not options.out:
        backbone = load_embedded_backbone()
        for category in options.evaluate:
            print(category.name, evaluate(backbone, category))
        return

    started = time.monotonic()
    pictures = prepare_pictures(options.cache, options.pictures, options.seed, options.threads)
    checkpoint = options.cache / f"checkpoint_{options.pictures}_{options.steps}_{options.seed}.pth"
    backbone, losses = train(pictures, options.steps, options.seed, checkpoint)
    torch.manual_seed(options.seed)
    untrained = EmbeddedBackbone().eval()
    story = {
        "script": "training/embedded_backbone.py",
        "command": f"python -m training.embedded_backbone --out {options.out.name} --pictures {options.pictures}"
        f" --steps {options.steps} --seed {options.seed} --threads {options.threads}",
        "seed": options.seed,
        "pictures": options.pictures,
        "steps": options.steps,
        "views_seen": 2 * BATCH * options.steps,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": options.machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "losses": {name: round(value, 4) for name, value in losses.items()},
        "auroc": {c.name: evaluate(backbone, c) for c in options.evaluate},
        "auroc_before_training": {c.name: evaluate(untrained, c) for c in options.evaluate},
    }
    save(backbone, options.out, story)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {options.out} and {options.out.with_suffix('.json')}; the pictures stay in {options.cache}")


if __name__ == "__main__":
    run_script(main)
