"""The published method from stage 1 to the export with everything real but the numbers.

    python -m benchmarks.rehearsal --workspace rehearsal
    python -m benchmarks.rehearsal --workspace rehearsal --device cuda --points_per_side 32 --crop_n_layers 1 --rotations 60 \\
        --lgst_steps 100

SAM-HQ, Grounding DINO, its text encoder BERT and both Wide-ResNets get random weights of the published shapes, which are saved
under the published names and loaded by the stages themselves; the data set is two training pictures of 1600x1280 pixels
and two of every other kind. Every stage runs in a process of its own with the preset paper, so that its peak memory is its
own. What is in the results means nothing; that they come out, how long each step takes and what memory it needs, does.

Some things are not as in the stages alone, because random weights find random things: these ask for four training images and
are given two; of the 900 boxes that Grounding DINO finds the first eight are kept, and of the background that SAM-HQ
finds, most of the picture, ten pixels along its border; components are what the boxes hold, and the automatic masks, which may
be none, are made beside them (no_sam, save_all_masks). On a CPU the automatic masks are asked for at few points
and without crops, and crops of components are turned to few sides, or a picture would take hours.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from csad.data import files, layouts
from csad.errors import run_script
from csad.pseudo_labels import checkpoints, crop_embedding, grounded_sam, grounding_dino, one_picture, sam_hq
from csad.pseudo_labels.grounding_dino import build_grounding_dino
from csad.pseudo_labels.sam_hq import build_sam

import numpy as np
import timm
import torch
from tabulate import tabulate

from benchmarks.measuring import measured, options_of
from models.device import choose_device

CATEGORY = "breakfast_box"
SIZE = (1280, 1600)  # height and width of its pictures in MVTec LOCO AD
PICTURES = 2
BOXES, BORDER = 8, 10
STAGES = ("pseudo_label", "train_segmentor", "CSAD", "export_model", "benchmark_performance")
TRAINING, WEIGHTS = STAGES[:3], "weights"
# fmt: off
SPECIAL_TOKENS = {
    0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?", 1011: "-", 1010: ",",
}
# fmt: on
VOCABULARY = 30522


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--workspace", type=files.path_argument, default=Path("rehearsal"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sam", default="vit_h", choices=sorted(checkpoints.SAM))
    for name, default, meaning in (
        ("points_per_side", 4, "of the automatic masks (published: 32)"),
        ("crop_n_layers", 0, "of the automatic masks (published: 1)"),
        ("rotations", 2, "over which cnn_image is averaged (published: 60)"),
        ("epochs", 2, "of the segmentor; from the second one on all losses"),
        ("lgst_steps", 3, "of stage 3"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    # One of them, in this process.
    parser.add_argument("--stage", choices=[WEIGHTS, *STAGES], help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.stage == WEIGHTS:
        write_sam(args.sam, args.workspace / "ckpt")
        write_grounding_dino(args.workspace / "ckpt")
        return write_wide_resnets(args.workspace / "ckpt")
    if args.stage:
        return perform(args.stage, args.workspace, args.device, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is not under ckpt/ is an error
    rehearse(args)


def rehearse(args: argparse.Namespace) -> None:
    workspace = args.workspace
    rows: list[tuple[Any, ...]] = []
    write_pictures(workspace / "data")
    itself = [sys.executable, "-m", "benchmarks.rehearsal", "--workspace", workspace, "--device", args.device]
    usage = measured([*itself, "--sam", args.sam, "--stage", WEIGHTS], workspace / f"{WEIGHTS}.log")
    rows.append(("make and save all weights", "", 1, usage.seconds, usage.peak_mb, None))
    own = {
        "pseudo_label": f"--pseudo_labels.proposer grounded_sam --pseudo_labels.sam {args.sam} "
        f"--pseudo_labels.points_per_side {args.points_per_side} "
        f"--pseudo_labels.crop_n_layers {args.crop_n_layers} --pseudo_labels.rotations {args.rotations} "
        "--pseudo_labels.pred_iou_thresh 0 --pseudo_labels.stability_score_thresh 0 "
        "--pseudo_labels.box_threshold 0 --pseudo_labels.text_threshold 0 "
        "--pseudo_labels.background_prompt null --pseudo_labels.no_sam true "
        "--pseudo_labels.save_all_masks true --pseudo_labels.inside_grounding false "
        "--pseudo_labels.bandwidth auto",
        "train_segmentor": f"--segmentor.epochs {args.epochs} "
        f"--segmentor.unsupervised_from_epoch {min(1, args.epochs - 1)}",
        "CSAD": f"--lgst.steps {args.lgst_steps}",
    }
    common = ["--dataset_root", workspace / "data"]
    common += f"--categories {CATEGORY} --backbone wide_resnet50_2 --overwrite".split()
    for stage in STAGES:
        usage = measured(
            [*itself, "--stage", stage, *common, *own.get(stage, "").split()], workspace / f"{stage}.log"
        )
        noted = files.read_json(workspace / f"{stage}.rehearsal.json", keys=("steps", "gpu_peak_mb"))
        rows.append((f"{stage}.py", "whole", 1, usage.seconds, usage.peak_mb, noted["gpu_peak_mb"]))
        rows += [
            ("", step, calls, seconds / calls, None, None)
            for step, (calls, seconds) in noted["steps"].items()
        ]
        print(f"{stage}.py: {usage.seconds:.0f} s, {usage.peak_mb:.0f} MB", flush=True)
    table = tabulate(
        rows,
        ("stage", "step", "calls", "seconds each", "peak MB", "peak MB, GPU"),
        tablefmt="github",
        floatfmt=(".0f", ".0f", ".0f", ".2f", ".0f", ".0f"),
    )
    files.write_text(workspace / "rehearsal.md", table + "\n")
    print("\n" + table)


def write_pictures(root: Path) -> None:
    """Discs on a textured ground, two of every split."""
    height, width = SIZE
    y, x = np.mgrid[:height, :width] / height
    rng = np.random.default_rng(0)
    for folder in ("train/good", "validation/good", *(f"test/{split}" for split in layouts.SPLITS)):
        for index in range(PICTURES):
            picture = rng.normal(120, 6, (height, width, 3))
            for _ in range(8):
                centre, radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.04, 0.12)
                inside = (y - centre[0]) ** 2 + (x - centre[1] * width / height) ** 2 < radius**2
                picture[inside] = rng.uniform(0, 255, 3)
            path = root / CATEGORY / folder / f"{index:03d}.png"
            files.write_image(path, picture.clip(0, 255).astype(np.uint8))


def perform(stage: str, workspace: Path, device: str, rest: list[str]) -> None:
    """One stage in this process, its steps timed."""
    layouts.MIN_WITH_VALIDATION = PICTURES
    steps: dict[str, list[float]] = {}
    on_gpu = choose_device(device).type == "cuda"
    time_steps(stage, steps, on_gpu)
    sys.argv = [f"{stage}.py", "--workspace", str(workspace), "--device", device, *rest]
    try:
        run_script(importlib.import_module(stage).main)
    finally:
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
        # What is loaded is kept: later calls take no time.
        kept = {name: seconds[: 1 if name.startswith("load") else None] for name, seconds in steps.items()}
        content = {
            "steps": {name: (len(seconds), sum(seconds)) for name, seconds in kept.items()},
            "gpu_peak_mb": peak,
        }
        files.write_json(workspace / f"{stage}.rehearsal.json", content)


def time_steps(stage: str, steps: dict[str, list[float]], on_gpu: bool) -> None:
    """Put a clock round what takes time in a stage."""

    def timed(
        owner: Any, name: str, title: str, change: Callable[[Any], Any] = lambda result: result
    ) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def clocked(*arguments: Any, **options: Any) -> Any:
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = real(*arguments, **options)
            if on_gpu:
                torch.cuda.synchronize()
            steps.setdefault(title, []).append(time.perf_counter() - start)
            return change(result)

        setattr(owner, name, clocked)

    if stage == "pseudo_label":
        timed(grounded_sam, "load_sam", "load SAM-HQ")
        timed(grounded_sam, "load_grounding_dino", "load Grounding DINO")
        timed(
            grounding_dino.GroundingDino,
            "detect",
            "Grounding DINO, a picture",
            lambda detected: (detected[0][:BOXES], detected[1][:BOXES]),
        )
        timed(sam_hq.SamHQ, "look_at", "SAM-HQ's image encoder, a picture")
        timed(sam_hq.SamHQ, "inside", f"SAM-HQ, {BOXES} boxes")
        timed(sam_hq.SamHQ, "background", "SAM-HQ, the background's eight points", only_border)
        timed(sam_hq.SamHQ, "everything", "SAM-HQ, automatic masks of a picture")
        timed(one_picture, "refine", "mask algebra, a picture")
        timed(crop_embedding.CropEmbedding, "forward", "cnn_image, all components of a call")
        return
    if stage in TRAINING:
        from csad.training.loop import TrainingLoop

        # Once a step: the time since the one before.
        last, real = [0.0], TrainingLoop.report

        def report(self: TrainingLoop, losses: Mapping[str, torch.Tensor]) -> None:
            real(self, losses)
            if on_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            if last[0]:
                steps.setdefault("a training step (all but the first)", []).append(now - last[0])
            last[0] = now

        owner: Any = TrainingLoop  # whose method is replaced
        owner.report = report


def only_border(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool without its inside."""
    border = mask.copy()
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return border


# Random weights of the published shapes, under the published names


def write_sam(size: str, folder: Path) -> None:
    """SAM-HQ of a size: vit_h, vit_l, vit_b or vit_tiny."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(build_sam(size).state_dict(), folder / checkpoints.SAM[size].file)


def write_grounding_dino(folder: Path) -> None:
    """Grounding DINO and its text encoder: its file holds BERT's weights, too, and it is built from BERT's folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(1)
    encoder = folder / checkpoints.TEXT_ENCODER
    encoder.mkdir(parents=True, exist_ok=True)
    BertModel(BertConfig()).save_pretrained(encoder)
    vocabulary = [SPECIAL_TOKENS.get(index, f"[unused{index}]") for index in range(VOCABULARY)]
    vocabulary[2000:2026] = [f"##{chr(letter)}" for letter in range(ord("a"), ord("z") + 1)]
    vocabulary[2100:2126] = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    (encoder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizerFast(str(encoder / "vocab.txt")).save_pretrained(encoder)
    state = build_grounding_dino("swint_ogc", encoder).state_dict()
    torch.save(
        {"model": {f"module.{key}": values for key, values in state.items()}},
        folder / checkpoints.GROUNDING_DINO["swint_ogc"].file,
    )


def write_wide_resnets(folder: Path) -> None:
    """The encoder, and the network of cnn_image."""
    for seed, name in enumerate(("wide_resnet50_2", "wide_resnet50_2.racm_in1k")):
        torch.manual_seed(seed)
        torch.save(timm.create_model("wide_resnet50_2").state_dict(), folder / f"{name}.pth")


if __name__ == "__main__":
    run_script(main)
