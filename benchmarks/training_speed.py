"""Time one training step of LGST or of the segmentor: as plainly as docs/method.md says it, and as the stages do it.

The plain step is in fp32 and sends every image through the encoder anew. Steps of all variants take turns in
one run, so that whatever else the machine does strikes them alike; the median counts. Pictures are noise and
the encoder has random weights, because neither changes the time: nothing is downloaded. Prints a table and
writes benchmark_training_{stage}.json into the workspace: milliseconds per step (by the clock, and of all
processor cores together, which other work on the machine stretches less), hours for all steps of the preset,
the memory that a step takes on top of what is held between steps, and its multiply-adds.
"""

from __future__ import annotations

import copy
import itertools
import operator
import platform
import time
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from csad import settings
from csad.cli import common_options, overrides
from csad.data import files
from csad.data.workspace import Workspace
from csad.errors import run_script
from csad.standins.penalty_pictures import PenaltyPictures
from csad.training import lgst_step, segmentor_step

import numpy as np
import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import in_turns
from benchmarks.peers_worker import memory_mb
from models.backbone import PUBLISHED, Encoder, empty_encoder
from models.constants import SIZE
from models.device import autocast, choose_device, choose_precision, forbid_tf32, memory_format
from models.lgst import LGST, losses
from models.segmentor import Segmentor

IMAGES = 16  # training images; how many there are does not change the time of a step
CLASSES = 8  # of the segmentor
PLAIN = "plain fp32"

Step = Callable[[], None]
Losses = dict[str, torch.Tensor]
LossesOfStep = Callable[[int], Losses]  # by its number
LossesOf = Callable[[Any, str, bool], LossesOfStep]  # of a model, in a precision, plain or not


def main() -> None:
    parser = common_options(__doc__)
    parser.add_argument("--stage", default="lgst", choices=["lgst", "segmentor"])
    parser.add_argument("--timed_steps", type=int, default=5, help="of each variant, after one to warm up")
    args = parser.parse_args()
    workspace, device = Workspace(args.workspace), choose_device(args.device)
    cfg = settings.load("", args.preset, overrides(args))
    precisions = ["fp32"] + ["bf16"] * (choose_precision("auto", device) == "bf16")
    forbid_tf32()  # what is called fp32 below is that
    encoder = empty_encoder(PUBLISHED if args.backbone == "auto" else args.backbone)
    encoder.to(device)

    torch.manual_seed(args.seed)
    if args.stage == "lgst":
        variants, steps = lgst_variants(cfg.lgst, encoder, precisions, device), cfg.lgst.steps
    else:
        variants = segmentor_variants(cfg.segmentor, encoder, precisions, device)
        # Of MVTec LOCO AD's categories the average one has 354 training images, of which half are trusted.
        steps = cfg.segmentor.epochs * 177 // cfg.segmentor.batch_size

    multiply_adds = {name: count_multiply_adds(step) for name, step in variants.items()}  # and warm up
    runs = [lambda step=step: measured_step(step, device) for step in variants.values()]
    costs = dict(zip(variants, in_turns(runs, args.timed_steps, "time", warm_ups=0)))
    plain = float(np.median([cost.seconds for cost in costs[PLAIN]]))
    report = {
        "stage": args.stage,
        "preset": args.preset,
        "steps_of_preset": steps,
        "device": str(device),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": getattr(cfg, args.stage).model_dump(),
        "variants": {},
    }
    for name, of_variant in costs.items():
        seconds, processor_seconds, memory = zip(*of_variant)
        middle = float(np.median(seconds))
        report["variants"][name] = {
            "ms_per_step": 1000 * middle,
            "ms_all": [1000 * duration for duration in seconds],
            "processor_ms": 1000 * float(np.median(processor_seconds)),
            "times_plain": plain / middle,
            "hours_of_preset": middle * steps / 3600,
            "step_memory_mib": None if None in memory else max(memory),
            "multiply_adds": multiply_adds[name],
        }
    target = workspace.root / f"benchmark_training_{args.stage}.json"
    with workspace.lock():
        files.write_json(target, report)
    print(
        f"one training step of {args.stage}, preset {args.preset}, {device}, {torch.get_num_threads()} threads; hours of "
        f"all {steps} steps"
    )
    rows = [
        {"step": name} | {key: value for key, value in row.items() if key != "ms_all"}
        for name, row in report["variants"].items()
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4g", missingval="?"))
    print(f"\nwrote {target}")


class Cost(NamedTuple):
    """Of one step: seconds by the clock and of the processor, and MiB on top of what is held; None where it is not known."""

    seconds: float
    processor_seconds: float
    memory_mib: float | None


def variants_of(
    first: torch.nn.Module, losses_of: LossesOf, cfg: Any, precisions: list[str], device: torch.device
) -> dict[str, Step]:
    """Name -> a function that trains a copy of a network for one step, plain and in each precision."""

    def variant(precision: str, plain: bool) -> Step:
        model = copy.deepcopy(first).to(device).to(memory_format=memory_format(precision))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = not plain and device.type != "mps"
        optimizer = torch.optim.Adam(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)
        losses_of_step, numbers = losses_of(model, precision, plain), itertools.count()

        def step() -> None:
            parts = losses_of_step(next(numbers))
            optimizer.zero_grad()
            reduce(operator.add, parts.values()).backward()
            optimizer.step()

        return step

    fast = {f"fast {precision}": variant(precision, plain=False) for precision in precisions}
    return {PLAIN: variant("fp32", plain=True)} | fast


def lgst_variants(
    cfg: settings.LgstSettings, encoder: Encoder, precisions: list[str], device: torch.device
) -> dict[str, Step]:
    """Variants of stage 3's step."""
    cfg = cfg.model_copy(update={"global_every": 1})  # whole steps, whatever the preset leaves out
    pictures = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    penalties = PenaltyPictures(cfg.penalty_images)

    def losses_of(model: LGST, precision: str, plain: bool) -> LossesOfStep:
        batches = lgst_step.Batches(pictures, model, encoder, device, precision, "teacher features")

        def losses_of_step(number: int) -> Losses:
            batch = batches.batch(lgst_step.draw_sample(IMAGES, penalties, cfg, number, "", 0))
            if plain:
                with torch.no_grad():
                    batch = batch._replace(teacher=model.teacher_features(encoder(batch.images)))
            with autocast(device, precision):
                features = model.training_features(*batch)
            return losses(features, cfg.hard_quantile)

        return losses_of_step

    first = LGST(encoder.channels, cfg.width, cfg.teacher_channels).train()
    return variants_of(first, losses_of, cfg, precisions, device)


def segmentor_variants(
    cfg: settings.SegmentorSettings, encoder: Encoder, precisions: list[str], device: torch.device
) -> dict[str, Step]:
    """Variants of stage 2's step with all losses, as after the epoch in which the unsupervised ones join; plain has no cache."""
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8))
    labels = (
        rng.integers(0, CLASSES, (IMAGES, 8, 8), dtype=np.uint8).repeat(SIZE // 8, 1).repeat(SIZE // 8, 2)
    )
    indices = np.arange(IMAGES)
    data = segmentor_step.TrainingData(
        pictures, labels, labels.astype(np.uint16), np.zeros(labels.shape, bool), indices[::2], indices[1::2]
    )

    def losses_of(model: Segmentor, precision: str, plain: bool) -> LossesOfStep:
        batches = segmentor_step.Batches(data, encoder, device, precision, "encode")

        def losses_of_step(number: int) -> Losses:
            sample = segmentor_step.draw_sample(data, cfg, number, True, "", 0)
            batch = batches.batch(sample)
            if plain:
                unlabelled = pictures[sample.unlabelled].to(device)
                batch = batch._replace(unlabelled=segmentor_step.encode(encoder, unlabelled, precision))
            return segmentor_step.step_losses(model, encoder, batch, cfg, precision)

        return losses_of_step

    first = Segmentor(encoder.channels, cfg.width, CLASSES).train()
    return variants_of(first, losses_of, cfg, precisions, device)


def count_multiply_adds(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2


def measured_step(step: Step, device: torch.device) -> Cost:
    held = start_memory(device)
    start, processor_start = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    peak = peak_memory(device)
    return Cost(seconds, processor_seconds, None if held is None or peak is None else peak - held)


def start_memory(device: torch.device) -> float | None:
    """MiB held now; from here on the peak counts. None where there is no way to know."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory_mb("VmRSS")


def peak_memory(device: torch.device) -> float | None:
    """Most MiB held since `start_memory`; None where there is no way to know."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else memory_mb("VmHWM")


if __name__ == "__main__":
    run_script(main)
