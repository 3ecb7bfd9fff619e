"""Every setting of every stage, in one place.

A run's settings are merged, later over earlier, from

1. ``configs/default.yaml``               the numbers of METHOD.md,
2. ``configs/categories/{category}.yaml``  what is tuned for one category, if there is such a file,
3. ``configs/presets/{preset}.yaml``       ``paper`` or ``quick``,
4. the command line                        ``--segmentor.lr 0.001`` and the like.

An unknown key or a value out of range is an error that names it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from errors import UserError

CONFIGS = Path(__file__).parent / "configs"
IMAGE_SIZE = 256  # METHOD.md: every network sees 256x256, and file names carry the number


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PseudoLabelSettings(Section):
    """Stage 1 (METHOD.md section 1)."""

    proposer: Literal["auto", "grounded_sam", "sam", "classical"] = Field(
        description="where masks come from; auto takes the first of the three for which everything is there")
    sam: Literal["vit_h", "vit_l", "vit_b", "vit_tiny"] = Field(description="size of SAM-HQ (the paper: vit_h)")
    grounding_dino: Literal["swint_ogc", "swinb_cogcoor"] = Field(description="Grounding DINO (the paper: swint_ogc)")
    text_prompt: str | None = Field(description="names of the parts, each with a dot after it; none: SAM-HQ alone")
    background_prompt: str | None = Field(description="of these names, those that are no part")
    box_threshold: float = Field(ge=0, le=1, description="Grounding DINO: least score of a box's best word")
    text_threshold: float = Field(ge=0, le=1, description="Grounding DINO: least score of the words of a box's phrase")
    points_per_side: int = Field(ge=1, description="SAM-HQ's automatic masks: grid of points")
    crop_n_layers: int = Field(ge=0, le=3, description="SAM-HQ's automatic masks: also on crops of half the side, ...")
    pred_iou_thresh: float = Field(ge=0, le=1, description="SAM-HQ's automatic masks: least predicted quality")
    stability_score_thresh: float = Field(ge=0, le=1, description="SAM-HQ's automatic masks: least stability")
    min_mask_region_area: int = Field(ge=0, description="SAM-HQ's automatic masks: smaller holes and islands go, pixels")
    save_all_masks: bool = Field(description="run automatic mask generation even where no_sam does not need it")
    inside_grounding: bool = Field(description="keep only masks inside the grounding mask")
    no_sam: bool = Field(description="take the grounding mask's instances as refined masks")
    container: bool = Field(description="classical proposer: the parts lie in something (tray, bag) that is no part")
    features: list[Literal["cnn_image", "area", "color", "position", "shape_hu", "lab"]] = Field(
        min_length=1, description="component features to cluster on")
    rotations: int = Field(ge=1, description="rotations over which cnn_image is averaged")
    bandwidth: Literal["auto"] | float = Field(description="MeanShift bandwidth; a number is only used with "
                                                     "the backbone it was tuned for, wide_resnet50_2")
    variants: bool = Field(description="parts that only some kinds of images have get labels, too (published: no)")
    twins: bool = Field(description="parts that differ in one feature only, like a long and a short bolt, side by side in "
                                    "most images, get labels of their own (published: no)")
    one_histogram_cluster: bool = Field(description="trust images of the largest histogram cluster only")


class SegmentorSettings(Section):
    """Stage 2 (METHOD.md section 2)."""

    width: int = Field(ge=8, description="channels of ASPP and decoder (the paper: 256)")
    epochs: int = Field(ge=1)
    unsupervised_from_epoch: int = Field(ge=0, description="epoch in which the unsupervised losses join")
    batch_size: int = Field(ge=2, description="trusted images per step; as many others join them")
    lr: float = Field(gt=0)
    final_lr_share: float = Field(ge=0, le=1, description="of lr, reached along a cosine (the paper: 1, constant)")
    weight_decay: float = Field(ge=0)
    weight_ce: float = Field(ge=0)
    weight_focal: float = Field(ge=0)
    weight_dice: float = Field(ge=0)
    weight_histogram: float = Field(ge=0)
    weight_entropy: float = Field(ge=0)
    softmax_twice: bool = Field(description="cross-entropy on probabilities, as published")
    paste_distance: float = Field(ge=0, le=1, description="logical synthesis: least move, in image sides")
    fill_holes: bool = Field(description="logical synthesis: fill the holes of pasted components")


class LgstSettings(Section):
    """Stage 3 (METHOD.md section 3)."""

    width: int = Field(ge=8, description="channels of the student (the paper: 512)")
    teacher_channels: int = Field(ge=8, description="channels of teacher, heads and autoencoder (the paper: 512)")
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    hard_quantile: float = Field(ge=0, lt=1, description="the local loss averages differences at or over it")
    he_initialisation: bool = Field(description="He's initial weights instead of PyTorch's: for short runs")
    penalty_images: str = Field(description="folder of ImageNet-like pictures, or 'rendered'")
    penalty_every: int = Field(ge=1, description="steps from one penalty image to the next (the paper: 1)")
    global_every: int = Field(ge=1, description="steps from one that trains the autoencoder and the student's global head "
                                                "to the next; the others train the local head alone (the paper: 1)")
    cosine: bool = Field(description="the learning rate falls to nothing along half a cosine, instead of to a tenth after "
                                     "95 % of the steps: for short runs")


class Settings(Section):
    pseudo_labels: PseudoLabelSettings
    segmentor: SegmentorSettings
    lgst: LgstSettings


def load(category: str, preset: str = "paper", overrides: dict[str, Any] | None = None) -> Settings:
    """Merge the settings for one category.

    Args:
        category: its file in configs/categories/ is used if there is one.
        preset: name of a file in configs/presets/.
        overrides: dotted names and values from the command line, e.g. {"lgst.steps": "100"}.

    Raises:
        UserError: a file is no YAML mapping, a key is unknown, or a value is out of range.
    """
    merged = _read_yaml(CONFIGS / "default.yaml")
    for path in (CONFIGS / "categories" / f"{category}.yaml", CONFIGS / "presets" / f"{preset}.yaml"):
        if path.exists():
            merged = _merge(merged, _read_yaml(path))
    for dotted, value in (overrides or {}).items():
        section, key = dotted.split(".")
        merged = _merge(merged, {section: {key: value}})
    try:
        return Settings(**merged)
    except ValidationError as problem:
        first = problem.errors()[0]
        name = ".".join(str(part) for part in first["loc"][:2])  # what follows names a branch of a union
        if first["type"] == "extra_forbidden":
            raise UserError(f"there is no setting {name}; configs/default.yaml lists them all") from problem
        raise UserError(f"setting {name}: {first['msg']} (got {first['input']!r})") from problem


def check(categories: Iterable[str], arguments: argparse.Namespace) -> None:
    """Refuse wrong single settings in a script that uses none, but takes the options of all stages like the others."""
    for category in categories:
        load(category, arguments.preset, overrides(arguments))


def command_line(story: str) -> argparse.ArgumentParser:
    """The options that all stages share, with every single setting as an option of its own."""
    parser = argparse.ArgumentParser(description=story, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = parser.add_argument_group("common options")
    common.add_argument("--workspace", type=Path, default=Path("."),
                        help="folder under which everything is written (default: the current one)")
    common.add_argument("--dataset_root", type=Path,
                        help="data set (default: WORKSPACE/datasets/mvtec_loco_anomaly_detection)")
    common.add_argument("--categories", nargs="+", metavar="NAME", help="default: every category of the data set")
    common.add_argument("--preset", default="paper", choices=sorted(p.stem for p in (CONFIGS / "presets").glob("*.yaml")))
    common.add_argument("--backbone", default="auto",
                        help="auto, wide_resnet50_2, embedded, or a torchvision classification network")
    common.add_argument("--backbone_weights", type=Path, help="state dict of that backbone")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    common.add_argument("--seed", type=seed, default=0)
    common.add_argument("--overwrite", action="store_true", help="start over instead of skipping what is done")
    single = parser.add_argument_group("single settings", "defaults: configs/default.yaml, category file, preset")
    for section, model in Settings.model_fields.items():
        for key, field in model.annotation.model_fields.items():
            single.add_argument(f"--{section}.{key}", dest=f"{section}.{key}", default=argparse.SUPPRESS,
                                metavar="VALUE", help=field.description)
    return parser


def training_command_line(story: str) -> argparse.ArgumentParser:
    """The options of the stages that train networks."""
    parser = command_line(story)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"],
                        help="of training: bf16 convolutions where the hardware is made for them (auto), or plain fp32")
    return with_seeds(parser)


def with_seeds(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--seeds``, for the stages after the first."""
    parser.add_argument("--seeds", type=seed, nargs="+", metavar="SEED",
                        help="several seeds at once, instead of --seed: each in WORKSPACE/seeds/SEED, all with the "
                             "pseudo-labels of WORKSPACE; tables give mean and standard deviation")
    return parser


def seed(text: str) -> int:
    """A seed from the command line; NumPy takes no negative ones, PyTorch none of more than 64 bits."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"'{text}' is no seed; it must be a whole number from 0 to {2**63 - 1}")
    return int(text)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The single settings given on the command line, parsed as YAML.

    Raises:
        UserError: a value is no YAML.
    """
    found = {}
    for name, value in vars(arguments).items():
        if "." in name:
            try:
                found[name] = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError) as problem:  # ValueError: a date that no calendar has
                raise UserError(f"--{name} {value} is not valid YAML ({' '.join(str(problem).split())}); "
                                f"plain text may need quotes of its own: --{name} '\"{value}\"'") from problem
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from problem
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise UserError(f"{path} should hold sections of settings like configs/default.yaml")
    return content


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    return below | {section: below.get(section, {}) | values for section, values in above.items()}
