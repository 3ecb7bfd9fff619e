"""What each step of stage 1 costs: seconds per image and per component, as one table.

Weights are random, since speed does not depend on them; no checkpoint is needed. On a CPU these are processor seconds of
all threads, which other work on the machine hardly changes; elsewhere they are wall-clock seconds.

Steps whose way of computing differs from the published one are measured both ways: rotations sampled in batches instead of
turned by PIL one by one, and MeanShift's seeds climbing together instead of one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from csad import settings
from csad.errors import run_script
from csad.pseudo_labels import beyond_clustering, clustering, components, crop_embedding, masks
from csad.pseudo_labels.grounding_dino import GroundingDino, build_grounding_dino
from csad.pseudo_labels.sam_hq import PROMPTS_PER_BATCH, SamHQ, build_sam
from csad.standins.classical import ClassicalProposer

import cv2
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.cluster import MeanShift
from transformers import BertConfig, BertModel, BertTokenizerFast

from models.backbone import PUBLISHED, TIMM_NAMES, Encoder
from models.constants import IMAGENET_MEAN, IMAGENET_STD
from models.device import choose_device

PARTS = 8  # components per image
ROTATIONS = 60
# Of the vectors to cluster; standard deviation in a part, whose centres lie some 6 apart.
VALUES, SPREAD = 512, 0.02


@dataclass(frozen=True)
class Cost:
    step: str
    seconds: float
    of: str  # image, component, box, point


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--sam", nargs="*", default=["vit_tiny"], choices=["vit_h", "vit_l", "vit_b", "vit_tiny"]
    )
    parser.add_argument(
        "--grounding_dino", nargs="*", default=["swint_ogc"], choices=["swint_ogc", "swinb_cogcoor"]
    )
    parser.add_argument("--components", type=int, default=10000, help="to cluster")
    parser.add_argument("--scikit_learn", action="store_true", help="also its MeanShift, which takes long")
    parser.add_argument("--skip_features", action="store_true", help="leave the component features out")
    args = parser.parse_args()
    device = choose_device(args.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    image, label_map = draw_parts()

    def seconds(work: Callable[[], object], times: int = 1) -> float:
        """Mean duration, after one run that does not count (where more than one is asked for)."""
        if times > 1:
            work()
        start = clock()
        for _ in range(times):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - start) / times

    costs = [Cost("proposals: classical", seconds(lambda: ClassicalProposer().propose(image), 3), "image")]
    for size in args.sam:
        costs += cost_of_sam(size, image, device, seconds)
    for size in args.grounding_dino:
        costs.append(cost_of_grounding_dino(size, image, device, seconds))
    if not args.skip_features:
        costs += cost_of_features(image, masks.label_masks(label_map), device, seconds)
    costs += cost_of_clustering(args.components, seconds, args.scikit_learn)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device}, {torch.get_num_threads()} threads"
    )
    print(f"Seconds per step on {name}\n")
    print(f"| {'step':<58} | {'seconds':>9} | per       |\n|{'-' * 60}|{'-' * 11}|-----------|")
    for cost in costs:
        print(f"| {cost.step:<58} | {cost.seconds:>9.4f} | {cost.of:<9} |")


def draw_parts() -> tuple[np.ndarray, np.ndarray]:
    """A picture of eight discs: image (256, 256, 3) uint8 and label map (256, 256) uint8."""
    rng = np.random.default_rng(0)
    image = rng.normal(120, 4, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    labels = np.zeros((256, 256), np.uint8)
    for part in range(PARTS):
        centre = (32 + part % 4 * 64, 64 + part // 4 * 128)
        cv2.circle(image, centre, 12 + part * 2, rng.integers(0, 255, 3).tolist(), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(labels, centre, 12 + part * 2, part + 1, cv2.FILLED)
    return image, labels


def cost_of_sam(
    size: str, image: np.ndarray, device: torch.device, seconds: Callable[..., float]
) -> Sequence[Cost]:
    sam = SamHQ(build_sam(size).to(device).eval())
    rng = np.random.default_rng(0)
    # Never the same twice: it remembers the last.
    pictures = iter([rng.permuted(image, axis=0) for _ in range(3)])
    boxes = np.tile([[60.0, 60, 180, 200]], (PROMPTS_PER_BATCH, 1))
    yield Cost(
        f"SAM-HQ {size}: encode an image or a crop", seconds(lambda: sam.look_at(next(pictures)), 2), "image"
    )
    yield Cost(f"SAM-HQ {size}: eight points of the background", seconds(sam.background, 2), "image")
    yield Cost(f"SAM-HQ {size}: box -> mask", seconds(lambda: sam.inside(boxes), 2) / len(boxes), "box")
    grid = settings.load(
        "", "paper", {"pseudo_labels.points_per_side": 8, "pseudo_labels.crop_n_layers": 0}
    ).pseudo_labels
    sam.everything(grid)
    yield Cost(
        f"SAM-HQ {size}: automatic masks (published: 5 crops x 1024)",
        seconds(lambda: sam.everything(grid)) / 64,
        "point",
    )


def cost_of_grounding_dino(
    size: str, image: np.ndarray, device: torch.device, seconds: Callable[..., float]
) -> Cost:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] . ? screw nut washer bag".split()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        BertTokenizerFast(str(Path(folder, "vocab.txt"))).save_pretrained(folder)
        BertModel(BertConfig(vocab_size=len(words))).save_pretrained(folder)
        network = GroundingDino(build_grounding_dino(size, Path(folder)).to(device).eval(), device)
    return Cost(
        f"Grounding DINO {size}",
        seconds(lambda: network.detect(image, "screw . nut .", 0.5, 0.3), 2),
        "image",
    )


def cost_of_features(
    image: np.ndarray, parts: np.ndarray, device: torch.device, seconds: Callable[..., float]
) -> Sequence[Cost]:
    network = timm.create_model(TIMM_NAMES[PUBLISHED], features_only=True, out_indices=(4,)).eval()
    last_stage = Encoder(network, IMAGENET_MEAN, IMAGENET_STD, (32,)).to(device)
    yield Cost(
        "features: all but cnn_image",
        seconds(lambda: components.shallow_features(image, parts), 3) / PARTS,
        "component",
    )
    _, crops = components.shallow_features(image, parts)
    tensor = torch.from_numpy(crops).permute(0, 3, 1, 2)
    embedding = crop_embedding.CropEmbedding(last_stage, ROTATIONS).to(device)

    @torch.inference_mode()
    def published() -> None:
        for crop in crops:
            turned = [
                np.array(Image.fromarray(crop).rotate(angle, Image.Resampling.BILINEAR))
                for angle in np.linspace(0, 360, ROTATIONS)
            ]
            batch = torch.from_numpy(np.stack(turned)).permute(0, 3, 1, 2).to(device)
            last_stage(batch)[0].mean((0, 2, 3)).cpu()

    embedding(tensor[:1])  # the first call prepares the network
    yield Cost(
        "features: cnn_image, a PIL call per rotation (before)", seconds(published) / PARTS, "component"
    )
    yield Cost(
        "features: cnn_image, rotations sampled in batches",
        seconds(lambda: embedding(tensor).cpu()) / PARTS,
        "component",
    )


def cost_of_clustering(count: int, seconds: Callable[..., float], scikit_learn: bool) -> Sequence[Cost]:
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 0.2, (PARTS, VALUES))
    vectors = centres[rng.integers(0, PARTS, count)] + rng.normal(0, SPREAD, (count, VALUES))
    if scikit_learn:
        yield Cost(
            f"MeanShift of {count} x {VALUES}: scikit-learn's (before)",
            seconds(lambda: MeanShift(bandwidth=1.0).fit(vectors)) / count,
            "component",
        )
    yield Cost(
        f"MeanShift of {count} x {VALUES}",
        seconds(lambda: clustering.mean_shift(vectors, 1.0)) / count,
        "component",
    )
    yield Cost(
        f"bandwidth estimate of {count} x {VALUES}",
        seconds(lambda: beyond_clustering.estimate_bandwidth(vectors, count // PARTS)) / count,
        "component",
    )


if __name__ == "__main__":
    run_script(main)
