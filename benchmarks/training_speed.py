"""Time one training step of LGST or of the segmentor: as plainly as docs/method.md says it, and as the stages do it.

The plain step is in fp32 and sends every image through the encoder anew. Steps of all variants take turns in
one run, so that whatever else the machine does strikes them alike; the median counts. Pictures are noise and
the encoder has random weights, because neither changes the time: nothing is downloaded. Prints a table and
writes benchmark_training_{stage}.json into the workspace: milliseconds per step (by the clock, and of all
processor cores together, which other work on the machine stretches less), hours for all steps of the preset,
the memory that a step takes on top of what is held between steps, and the floor: the step's multiply-adds at
the rate of this machine's large matrix products.
"""

from __future__ import annotations

import copy
import itertools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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

from benchmarks.measuring import in_turns, memory_mb
from models.backbone import PUBLISHED, Encoder, empty_encoder
from models.constants import SIZE
from models.device import autocast, choose_device, choose_precision, forbid_tf32, memory_format
from models.lgst import LGST, losses
from models.segmentor import Segmentor

IMAGES = 16  # training images; how many there are does not change the time of a step
CLASSES = 8  # of the segmentor
PLAIN = "plain fp32"
MATRIX = {"cpu": 2048}  # side of the matrix product whose rate is the floor; elsewhere
LARGE_MATRIX = 8192

Step = Callable[[], None]


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
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
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
        "matrix_multiply_adds_per_second": rates,
        "variants": {},
    }
    for name, of_variant in costs.items():
        seconds, processor_seconds, memory = zip(*of_variant)
        middle = float(np.median(seconds))
        report["variants"][name] = {
            "ms_per_step": 1000 * middle,
            "ms_fastest": 1000 * min(seconds),
            "ms_all": [1000 * duration for duration in seconds],
            "processor_ms": 1000 * float(np.median(processor_seconds)),
            "times_plain": plain / middle,
            "hours_of_preset": middle * steps / 3600,
            "step_memory_mib": None if None in memory else max(memory),
            "multiply_adds": multiply_adds[name],
            "floor_ms": 1000 * multiply_adds[name] / rates[name.split()[-1]],
        }
    target = workspace.root / f"benchmark_training_{args.stage}.json"
    with workspace.lock():
        files.write_json(target, report)
    print(
        f"one training step of {args.stage}, preset {args.preset}, {device}, {torch.get_num_threads()} threads; hours: "
        f"all {steps} steps; floor: the multiply-adds at the rate of a large matrix product"
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


def lgst_variants(
    cfg: settings.LgstSettings, encoder: Encoder, precisions: list[str], device: torch.device
) -> dict[str, Step]:
    """Name -> a function that trains one step, plain and in each precision."""
    cfg = cfg.model_copy(update={"global_every": 1})  # whole steps, whatever the preset leaves out
    pictures = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    penalties = PenaltyPictures(cfg.penalty_images)
    first = LGST(encoder.channels, cfg.width, cfg.teacher_channels).train()

    def variant(precision: str, plain: bool = False) -> Step:
        model = copy.deepcopy(first).to(device, memory_format=memory_format(precision))
        batches = lgst_step.Batches(pictures, model, encoder, device, precision, "teacher features")
        optimizer = adam(model, cfg, plain, device)
        numbers = itertools.count()

        def step() -> None:
            batch = batches.batch(lgst_step.draw_sample(IMAGES, penalties, cfg, next(numbers), "", 0))
            if plain:
                with torch.no_grad():
                    batch = batch._replace(teacher=model.teacher_features(encoder(batch.images)))
            with autocast(device, precision):
                features = model.training_features(*batch)
            descend(losses(features, cfg.hard_quantile), optimizer)

        return step

    return {PLAIN: variant("fp32", plain=True)} | {f"fast {name}": variant(name) for name in precisions}


def segmentor_variants(
    cfg: settings.SegmentorSettings, encoder: Encoder, precisions: list[str], device: torch.device
) -> dict[str, Step]:
    """Variants of stage 2's step with all losses, as after the epoch in which the unsupervised ones join; plain has no cache."""
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8))
    labels = np.kron(rng.integers(0, CLASSES, (IMAGES, 8, 8)), np.ones((SIZE // 8, SIZE // 8))).astype(
        np.uint8
    )
    indices = np.arange(IMAGES)
    data = segmentor_step.TrainingData(
        pictures, labels, labels.astype(np.uint16), np.zeros(labels.shape, bool), indices[::2], indices[1::2]
    )
    first = Segmentor(encoder.channels, cfg.width, CLASSES).train()

    def variant(precision: str, plain: bool = False) -> Step:
        model = copy.deepcopy(first).to(device, memory_format=memory_format(precision))
        batches = segmentor_step.Batches(data, encoder, device, precision, "encode")
        optimizer = adam(model, cfg, plain, device)
        numbers = itertools.count()

        def step() -> None:
            sample = segmentor_step.draw_sample(data, cfg, next(numbers), True, "", 0)
            batch = batches.batch(sample)
            if plain:
                unlabelled = pictures[sample.unlabelled].to(device)
                batch = batch._replace(unlabelled=segmentor_step.encode(encoder, unlabelled, precision))
            descend(segmentor_step.step_losses(model, encoder, batch, cfg, precision), optimizer)

        return step

    return {PLAIN: variant("fp32", plain=True)} | {f"fast {name}": variant(name) for name in precisions}


def adam(
    model: torch.nn.Module,
    cfg: settings.LgstSettings | settings.SegmentorSettings,
    plain: bool,
    device: torch.device,
) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = not plain and device.type != "mps"
    return torch.optim.Adam(parameters, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=fused)


def descend(parts: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(parts.values()).backward()
    optimizer.step()


def count_multiply_adds(step: Step) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2


def measured_step(step: Step, device: torch.device) -> Cost:
    held = start_memory(device)
    start, processor_start = time.perf_counter(), time.process_time()
    step()
    synchronise(device)
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    return Cost(seconds, processor_seconds, None if held is None else peak_memory(device) - held)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def peak_memory(device: torch.device) -> float:
    """Most MiB held since `start_memory`."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else memory_mb("VmHWM")


def matrix_rate(device: torch.device, precision: str) -> float:
    """Multiply-adds per second of a large matrix product, best of five."""
    side = MATRIX.get(device.type, LARGE_MATRIX)
    matrix = torch.randn(
        side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    seconds = []
    for _ in range(6):
        synchronise(device)
        start = time.perf_counter()
        matrix @ matrix
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return side**3 / min(seconds[1:])


if __name__ == "__main__":
    run_script(main)
