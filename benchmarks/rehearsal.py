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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csad.data import files, layouts
from csad.errors import run_script
from csad.pseudo_labels import checkpoints, crop_embedding, grounded_sam, one_picture

import numpy as np
import timm
import torch
from tabulate import tabulate

from benchmarks.processes import measured
from models.device import choose_device

ROOT = Path(__file__).resolve().parent.parent
CATEGORY = "breakfast_box"
SIZE = (1280, 1600)  # height and width of its pictures in MVTec LOCO AD
PICTURES = 2
BOXES, BORDER = 8, 10
STAGES = ("pseudo_label", "train_segmentor", "CSAD", "export_model", "benchmark_performance")
TRAINING, WEIGHTS = STAGES[:3], "weights"
SPECIAL_TOKENS = {
    0: "[PAD]",
    100: "[UNK]",
    101: "[CLS]",
    102: "[SEP]",
    103: "[MASK]",
    1012: ".",
    1029: "?",
    1011: "-",
    1010: ",",
}
VOCABULARY = 30522


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=files.place, default=Path("rehearsal"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sam", default="vit_h", choices=sorted(checkpoints.SAM))
    parser.add_argument(
        "--points_per_side", type=int, default=4, help="of the automatic masks (published: 32)"
    )
    parser.add_argument("--crop_n_layers", type=int, default=0, help="of the automatic masks (published: 1)")
    parser.add_argument(
        "--rotations", type=int, default=2, help="over which cnn_image is averaged (published: 60)"
    )
    parser.add_argument(
        "--epochs", type=int, default=2, help="of the segmentor; from the second one on all losses"
    )
    parser.add_argument("--lgst_steps", type=int, default=3)
    parser.add_argument(
        "--side_share", type=float, default=1, help="smaller pictures, to try the script itself"
    )
    parser.add_argument(
        "--stage", choices=[WEIGHTS, *STAGES], help=argparse.SUPPRESS
    )  # one of them, in this process
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
    workspace, rows = args.workspace, []
    write_pictures(workspace / "data", tuple(int(side * args.side_share) for side in SIZE))
    itself = [sys.executable, "-m", "benchmarks.rehearsal", "--workspace", workspace, "--device", args.device]
    usage = measured([*itself, "--sam", args.sam, "--stage", WEIGHTS], workspace / f"{WEIGHTS}.log")
    rows.append(("make and save all weights", "", 1, usage.seconds, usage.peak_mb, None))
    own = {
        "pseudo_label": [
            "--pseudo_labels.proposer",
            "grounded_sam",
            "--pseudo_labels.sam",
            args.sam,
            "--pseudo_labels.points_per_side",
            args.points_per_side,
            "--pseudo_labels.crop_n_layers",
            args.crop_n_layers,
            "--pseudo_labels.rotations",
            args.rotations,
            "--pseudo_labels.pred_iou_thresh",
            0,
            "--pseudo_labels.stability_score_thresh",
            0,
            "--pseudo_labels.box_threshold",
            0,
            "--pseudo_labels.text_threshold",
            0,
            "--pseudo_labels.background_prompt",
            "null",
            "--pseudo_labels.no_sam",
            "true",
            "--pseudo_labels.save_all_masks",
            "true",
            "--pseudo_labels.inside_grounding",
            "false",
            "--pseudo_labels.bandwidth",
            "auto",
        ],
        "train_segmentor": [
            "--segmentor.epochs",
            args.epochs,
            "--segmentor.unsupervised_from_epoch",
            min(1, args.epochs - 1),
        ],
        "CSAD": ["--lgst.steps", args.lgst_steps],
    }
    for stage in STAGES:
        common = [
            "--dataset_root",
            workspace / "data",
            "--categories",
            CATEGORY,
            "--backbone",
            "wide_resnet50_2",
            "--overwrite",
        ]
        usage = measured(
            [*itself, "--stage", stage, *common, *own.get(stage, ())], workspace / f"{stage}.log"
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
    options = {key: str(value) for key, value in vars(args).items()}
    files.write_json(workspace / "rehearsal.json", {"rows": rows, "options": options})
    print("\n" + table)


def write_pictures(root: Path, size: tuple[int, int]) -> None:
    """Discs and bars on a textured ground, two of every split."""
    height, width = size
    y, x = np.mgrid[:height, :width] / min(size)
    rng = np.random.default_rng(0)
    for folder in (
        "train/good",
        "validation/good",
        "test/good",
        "test/logical_anomalies",
        "test/structural_anomalies",
    ):
        for index in range(PICTURES):
            picture = rng.normal(120, 6, (height, width, 3))
            for _ in range(8):
                centre, radius, colour = (
                    rng.uniform(0.1, 0.9, 2),
                    rng.uniform(0.04, 0.12),
                    rng.uniform(0, 255, 3),
                )
                picture[(y - centre[0]) ** 2 + (x - centre[1] * width / height) ** 2 < radius**2] = colour
            files.write_image(
                root / CATEGORY / folder / f"{index:03d}.png", picture.clip(0, 255).astype(np.uint8)
            )


def write_sam(size: str, folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(grounded_sam.build_sam(size).state_dict(), folder / checkpoints.SAM[size].file)


def write_grounding_dino(folder: Path) -> None:
    """Both together: Grounding DINO's file holds BERT's weights, too, and is built from BERT's folder."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(1)
    encoder = folder / checkpoints.TEXT_ENCODER
    encoder.mkdir(parents=True, exist_ok=True)
    BertModel(BertConfig()).save_pretrained(encoder)
    words = [SPECIAL_TOKENS.get(index, f"[unused{index}]") for index in range(VOCABULARY)]
    words[2000:2026] = [f"##{chr(letter)}" for letter in range(ord("a"), ord("z") + 1)]
    words[2100:2126] = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    (encoder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    BertTokenizerFast(str(encoder / "vocab.txt")).save_pretrained(encoder)
    state = grounded_sam.build_grounding_dino("swint_ogc", encoder).state_dict()
    torch.save(
        {"model": {f"module.{key}": values for key, values in state.items()}},
        folder / checkpoints.GROUNDING_DINO["swint_ogc"].file,
    )


def write_wide_resnets(folder: Path) -> None:
    for seed, name in enumerate(("wide_resnet50_2", "wide_resnet50_2.racm_in1k")):
        torch.manual_seed(seed)
        torch.save(timm.create_model("wide_resnet50_2").state_dict(), folder / f"{name}.pth")


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
        files.write_json(
            workspace / f"{stage}.rehearsal.json",
            {
                # What is loaded is kept: later calls take no time.
                "steps": {
                    name: (len(seconds), sum(seconds))
                    for name, seconds in (
                        (name, seconds[:1] if name.startswith("load") else seconds)
                        for name, seconds in steps.items()
                    )
                },
                "gpu_peak_mb": peak,
            },
        )


def time_steps(stage: str, steps: dict[str, list[float]], on_gpu: bool) -> None:
    """Put a clock round what takes time in a stage."""

    def timed(
        owner: Any, name: str, title: str, change: Callable[[Any], Any] = lambda result: result
    ) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def clocked(*arguments, **options):
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
            grounded_sam.GroundingDino,
            "detect",
            "Grounding DINO, a picture",
            lambda found: (found[0][:BOXES], found[1][:BOXES]),
        )
        timed(grounded_sam.SamHQ, "look_at", "SAM-HQ's image encoder, a picture")
        timed(grounded_sam.SamHQ, "inside", f"SAM-HQ, {BOXES} boxes")
        timed(grounded_sam.SamHQ, "background", "SAM-HQ, the background's eight points", only_border)
        timed(grounded_sam.SamHQ, "everything", "SAM-HQ, automatic masks of a picture")
        timed(one_picture, "refine", "mask algebra, a picture")
        timed(crop_embedding.CropEmbedding, "forward", "cnn_image, all components of a call")
        return
    if stage in TRAINING:
        from csad.training.loop import TrainingLoop

        # Once a step: the time since the one before.
        last, real = [0.0], TrainingLoop.report

        def report(self, losses):
            real(self, losses)
            sum(losses.values()).item()
            now = time.perf_counter()
            if last[0]:
                steps.setdefault("a training step (all but the first)", []).append(now - last[0])
            last[0] = now

        TrainingLoop.report = report


def only_border(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool without its inside."""
    kept = mask.copy()
    kept[BORDER:-BORDER, BORDER:-BORDER] = False
    return kept


if __name__ == "__main__":
    run_script(main)
