"""Stage 3: train LGST, the local-global student-teacher, on the good images of each category.

A teacher (random projections of a frozen encoder) is imitated by a student, locally, and by an autoencoder, globally;
a second head of the student imitates the autoencoder. Writes ckpt/best_{category}.pth and the LGST scores of
validation and test images, anomaly_score/{category}_LGST_{logi,struc,val}_score.npy, and the test images' anomaly maps
({category}_LGST_maps.npz). Interrupted, it resumes.
"""

from __future__ import annotations

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
from models.lgst import LGST, MAP_SIZE, Differences
from training.lgst_batches import Draw, Lessons, PenaltyImages, draw, learning_rate, losses
from training.loop import draw_ahead, interrupts_wait

SAVE_EVERY_SECONDS = 60
SHOW_EVERY_STEPS = 20
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
            chosen = settings.load(category.name, args.preset, settings.overrides(args)).lgst
            name = category.name if seed is None else f"{category.name}, seed {seed}"
            jobs[name] = partial(train_category, category, home, chosen, backbone, precision=precision,
                                 seed=args.seed if seed is None else seed, overwrite=args.overwrite)
    with workspace.lock():
        run_all(jobs, devices)


def train_category(category: layouts.Category, workspace: Workspace, chosen: settings.LgstSettings,
                   backbone: Backbone, device: torch.device, precision: str, seed: int, overwrite: bool) -> None:
    backbone.to(device)
    checkpoint, progress = workspace.lgst(category.name), workspace.lgst_progress(category.name)
    parts = ("logi", "struc", "val") if category.tested else ("val",)
    scores = [workspace.scores(category.name, branch, part) for part in parts for branch in ("LGST", "CSAD")]
    if category.tested:
        scores.append(workspace.anomaly_maps(category.name))
    penalties = PenaltyImages(chosen.penalty_images)
    used = {"settings": chosen.model_dump(), "precision": precision,
            **records.inputs(category.train, seed, backbone, [] if penalties.paths else ["rendered penalty images"])}
    # Asked for first: a missing split should not cost an hour of training.
    validation = category.validation
    test = {kind: category.test(kind) for kind in layouts.SPLITS} if category.tested else {}
    scored, record = records.scored(validation, test), checkpoint.with_suffix(".json")
    if not records.begin(record, used, [checkpoint, *scores], overwrite, [progress], checkpoint, scored):
        print(f"{category.name}: LGST is trained and scored already, skipped (--overwrite starts over)")
        return

    if checkpoint.exists():
        model = LGST(backbone.channels, chosen.width, chosen.teacher_channels, backbone.blind_to_light)
        normalised_on = files.load_checkpoint(model, checkpoint)["meta"].get("validation_images")
        model.to(device).eval()
    else:
        train_images = images.load_images(category.train, settings.IMAGE_SIZE, f"{category.name}: read training images")
        model = train(category.name, train_images, chosen, backbone, penalties, progress, device, precision,
                      seed)
        model.eval()
        normalised_on = None
    if normalised_on != scored["validation"]:  # just trained, or the validation images have changed since
        maps = differences(model, backbone, validation, device, f"{category.name}: normalise maps")
        if not all(part.isfinite().all() for part in maps):
            for path in (progress, record):  # nothing to go on from; without the record the next run may have other settings
                path.unlink(missing_ok=True)
            raise UserError(f"{category.name}: training diverged, LGST gives no finite scores; "
                            f"lower --lgst.lr (it was {chosen.lr})")
        model.fit_map_normalisation(maps)
        # The encoder goes along, so that export and deployment never look for its weights again.
        files.write_state(checkpoint, {
            "state": on_cpu(model), "encoder": on_cpu(backbone.encoder),
            "meta": used | {"category": category.name, "validation_images": scored["validation"]}})
    progress.unlink(missing_ok=True)

    score_files(model, category, validation, test, workspace, backbone, device)


def train(category: str, train_images: Tensor, chosen: settings.LgstSettings, backbone: Backbone,
          penalties: PenaltyImages, progress_file: Path, device: torch.device, precision: str, seed: int) -> LGST:
    """Train from the last saved step, or from the start; the same seed gives the same weights either way."""
    torch.manual_seed(seed)
    model = LGST(backbone.channels, chosen.width, chosen.teacher_channels, backbone.blind_to_light)
    if chosen.he_initialisation:
        model.start_fast()
    model.to(device, memory_format=memory_format(precision)).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=chosen.lr, weight_decay=chosen.weight_decay, fused=device.type != "mps")

    done = 0
    if progress_file.exists():
        saved = files.read_state(progress_file)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    lessons = Lessons(train_images, model, backbone.encoder, device, f"{category}: teach")
    if done == 0:
        lessons.fit_teacher_normalisation()

    def save_progress() -> None:
        files.write_state(progress_file, {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                          "done": done})

    def draw_step(step: int) -> Draw:
        return draw(len(train_images), penalties, chosen, step, category, seed)

    last_saved = time.monotonic()
    with (interrupts_wait() as interrupted,
          tqdm(total=chosen.steps, initial=done, desc=f"{category}: train LGST", unit="step") as bar):
        for drawn in draw_ahead(draw_step, done, chosen.steps):
            parts = losses(model, backbone.encoder, lessons.batch(drawn), chosen.hard_quantile, precision)
            loss = sum(parts.values())
            optimizer.param_groups[0]["lr"] = learning_rate(chosen, done)
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
    return model.to(memory_format=torch.contiguous_format)


def on_cpu(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in module.state_dict().items()}


@torch.no_grad()
def differences(model: LGST, backbone: Backbone, paths: Sequence[Path], device: torch.device,
                description: str) -> Differences:
    """Difference maps of images on disk, two (N, 64, 64) tensors on the CPU."""
    batches = []
    loaded = images.load_images(paths, settings.IMAGE_SIZE, description)
    for batch in tqdm(loaded.split(SCORING_BATCH), desc=description, leave=False):
        batch = images.normalise(batch.to(device))
        batches.append(model.differences(batch, backbone.encoder(batch)))
    return Differences(*(torch.cat(maps).cpu() for maps in zip(*batches)))


def score_files(model: LGST, category: layouts.Category, validation: Sequence[Path], test: dict[str, Sequence[Path]],
                workspace: Workspace, backbone: Backbone, device: torch.device) -> None:
    """Score validation and test images; write the six files (LGST and its published twin name CSAD) and the test maps."""
    def anomaly_maps(paths: Sequence[Path], what: str) -> np.ndarray:
        if not paths:
            return np.zeros((0, MAP_SIZE, MAP_SIZE), np.float32)
        maps = differences(model, backbone, paths, device, f"{category.name}: score {what}")
        return model.anomaly_map(Differences(*(part.to(device) for part in maps))).cpu().numpy()

    def write(part: str, values: np.ndarray) -> None:
        for branch in ("LGST", "CSAD"):
            files.write_array(workspace.scores(category.name, branch, part), values)

    write("val", anomaly_maps(validation, "validation").max((1, 2)).astype(np.float64))
    if not test:
        print(f"{category.name}: there is no folder {category.root / 'test' / layouts.GOOD}, so no test scores")
        return
    maps = {kind: anomaly_maps(paths, kind) for kind, paths in test.items()}
    files.write_arrays(workspace.anomaly_maps(category.name), **maps)
    scores = {kind: found.max((1, 2)).astype(np.float64) for kind, found in maps.items()}
    write("logi", np.concatenate([scores[layouts.GOOD], scores[layouts.LOGICAL]]))
    write("struc", np.concatenate([scores[layouts.GOOD], scores[layouts.STRUCTURAL]]))


if __name__ == "__main__":
    run_script(main)
