"""Every setting of every stage, in one place: name, default, range and meaning. Defaults are the numbers of docs/method.md.

A run's settings are merged, later over earlier, from

1. the defaults below, which are the preset ``paper``,
2. ``configs/presets/{preset}.yaml``       what another preset says differently,
3. ``configs/categories/{category}.yaml``  what is tuned for one category, if there is such a file,
4. the command line                        ``--segmentor.lr 0.001`` and the like.

An unknown key or a value out of range is an error that names it. What a run used is saved beside what it made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from csad.branches import PAPER_BRANCHES, BranchName
from csad.errors import UserError
from csad.yaml_layers import merge, nested, read_layer, refusal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

CONFIGS = Path(__file__).parents[1] / "configs"
PAPER = "paper"
Fraction = Annotated[float, Field(ge=0, le=1)]
# Text without control characters that neither begins nor ends with a space.
ComponentName = Annotated[str, Field(max_length=40, pattern=r"^[^\s\pC]([^\pC]*[^\s\pC])?$")]
Point = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Polygon = Annotated[list[Point], Field(min_length=3)]


class Section(BaseModel):
    # Strict: neither true nor "3" is a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Checkpoint = Literal["last", "best_on_test"]


def kept_checkpoint(interval: str) -> Any:
    """The setting of which weights a stage keeps, its test scores measured every ``interval``."""
    return Field(
        "last",
        description="which weights are kept: the last step's, or those with the best AUROC on the test images, measured "
        f"every {interval}, as published; what these score is no estimate of performance",
    )


class ImageSettings(Section):
    """How pictures are read, in every stage and by the exported model."""

    size: int = Field(
        256,
        ge=256,
        le=2048,
        multiple_of=256,
        description="side in pixels of the view that the patch memory sees; "
        "LGST on features sees it, too, all else its mean over blocks, 256 wide (the paper: 256)",
    )
    white_level: float | None = Field(
        None,
        gt=0,
        description="value that is white in images of more than 8 bits, for example "
        "4095 where a camera writes 12 bits into 16; none: full range",
    )


class PseudoLabelSettings(Section):
    """Stage 1 (docs/method.md section 1)."""

    proposer: Literal["auto", "grounded_sam", "sam", "classical"] = Field(
        "auto",
        description="where masks come from; auto: the first of the three for which everything is there",
    )
    inside_grounding: bool = Field(False, description="keep only masks inside the grounding mask")
    no_sam: bool = Field(False, description="cluster the grounding mask's instances instead of SAM's masks")
    container: bool = Field(False, description="classical proposer: the parts lie in a tray or bag")
    features: list[Literal["cnn_image", "area", "color", "position", "shape_hu", "lab"]] = Field(
        ["cnn_image"], min_length=1, description="component features to cluster on"
    )
    rotations: int = Field(60, ge=1, description="rotations over which cnn_image is averaged")
    bandwidth: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto",
        description="MeanShift bandwidth; a number holds only for the weights it was tuned for, racm_in1k",
    )
    variants: bool = Field(
        False,
        description="parts that only some kinds of images have get labels, too, and all kinds are "
        "trusted, whatever one_histogram_cluster says (published: no)",
    )
    lookalikes: bool = Field(
        False,
        description="parts that differ in one feature only, like a long and a short bolt, side by "
        "side in most images, get labels of their own (published: no)",
    )
    one_histogram_cluster: bool = Field(False, description="trust the largest histogram cluster only")
    sam: Literal["vit_h", "vit_l", "vit_b", "vit_tiny"] = Field("vit_h", description="size of SAM-HQ")
    sam_precision: Literal["fp32", "fp16"] = Field(
        "fp32",
        description="of SAM-HQ's image encoder; fp16 is for CUDA, where it is faster (published: fp32)",
    )
    grounding_dino: Literal["swint_ogc", "swinb_cogcoor"] = Field(
        "swint_ogc", description="size of Grounding DINO"
    )
    text_prompt: str | None = Field(
        None, description="the parts' names, a dot after each; none: SAM-HQ alone"
    )
    background_prompt: str | None = Field(None, description="of these, the background's; spaces count")
    box_threshold: Fraction = Field(0.3, description="Grounding DINO: minimum score of a box's best word")
    text_threshold: Fraction = Field(0.3, description="Grounding DINO: minimum score of a phrase's words")
    points_per_side: int = Field(32, ge=1, description="SAM-HQ's automatic masks: grid of points")
    crop_n_layers: int = Field(
        1, ge=0, le=3, description="SAM-HQ's automatic masks: also on crops of half the side, ..."
    )
    pred_iou_thresh: Fraction = Field(0.88, description="SAM-HQ's automatic masks: minimum predicted quality")
    stability_score_thresh: Fraction = Field(0.96, description="SAM-HQ's automatic masks: minimum stability")
    min_mask_region_area: int = Field(
        500, ge=0, description="SAM-HQ's automatic masks: smaller holes and islands go, pixels"
    )
    save_all_masks: bool = Field(False, description="automatic masks even if no_sam does not need them")


class SegmentorSettings(Section):
    """Stage 2 (docs/method.md section 2)."""

    width: int = Field(256, ge=8, description="channels of ASPP and decoder")
    epochs: int = Field(120, ge=1, description="passes over the trusted images")
    unsupervised_from_epoch: int = Field(50, ge=0, description="epoch in which the unsupervised losses join")
    batch_size: int = Field(4, ge=2, description="trusted images per step; as many unlabelled ones join them")
    lr: float = Field(0.01, gt=0, description="Adam's learning rate")
    final_lr_share: Fraction = Field(
        1.0, description="of lr, reached along a cosine (the paper: 1, constant)"
    )
    weight_decay: float = Field(1e-5, ge=0, description="Adam's weight decay")
    joint_pass: bool = Field(
        False,
        description="trusted and unlabelled images pass the segmentor in one batch, once the unsupervised "
        "losses join (published: one after the other, from the first epoch)",
    )
    weight_ce: float = Field(0.5, ge=0, description="of the cross-entropy in the loss")
    weight_focal: float = Field(10.0, ge=0, description="of the focal loss")
    weight_dice: float = Field(1.0, ge=0, description="of the class-balanced dice loss")
    weight_histogram: float = Field(10.0, ge=0, description="of the histogram loss on unlabelled images")
    weight_entropy: float = Field(1.0, ge=0, description="of the entropy loss")
    checkpoint: Checkpoint = kept_checkpoint("two epochs")
    softmax_twice: bool = Field(True, description="cross-entropy on probabilities, as published")
    paste_distance: Fraction = Field(0.2, description="logical synthesis: minimum move, in image sides")
    paste_trials: int = Field(
        500, ge=1, description="logical synthesis: rotations and positions that are tried for a component"
    )
    fill_holes: bool = Field(False, description="fill the holes of each label in the pseudo-label maps")
    histogram_floor: float = Field(
        0.0,
        ge=0,
        description="minimum standard deviation of an area fraction in the patch histogram's "
        "covariance (published: 0, where a fraction that never varies does not count)",
    )
    reliability: bool = Field(
        False,
        description="the patch histogram takes into account by how much components' areas vary when "
        "good images change a little, and shrinks covariances of few images (published: no)",
    )
    evidence: bool = Field(
        False,
        description="the patch histogram also scores finer grids, and the exported model says where "
        "components are too many or missing (the paper: no; the state dict has the published keys only)",
    )


class LgstSettings(Section):
    """Stage 3 (docs/method.md section 3)."""

    student: Literal["pixels", "features"] = Field(
        "pixels",
        description="what the student sees: the image (the paper), or the encoder's first map of the larger "
        "view, for short runs; then only width, teacher_channels, steps, batch_size, lr, weight_decay, "
        "global_every and checkpoint count",
    )
    checkpoint: Checkpoint = kept_checkpoint("1,000 steps")
    width: int = Field(512, ge=8, description="channels of the student")
    teacher_channels: int = Field(512, ge=8, description="channels of teacher, heads and autoencoder")
    steps: int = Field(60000, ge=1, description="training steps")
    batch_size: int = Field(2, ge=1, description="training images per step")
    lr: float = Field(2e-4, gt=0, description="Adam's learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="Adam's weight decay")
    hard_quantile: float = Field(0.999, ge=0, lt=1, description="quantile over which the local loss averages")
    penalty_images: str = Field(
        "auto",
        description="tiny-imagenet (published), a folder of ImageNet-like pictures, or bundled: "
        "crops of photographs that scikit-image and scikit-learn bring along; auto takes the first "
        "where its archive is in ckpt/, else the last",
    )
    global_every: int = Field(
        1,
        ge=1,
        description="steps from one that trains the autoencoder and the student's global head "
        "to the next; the others train the local head alone",
    )


class MemorySettings(Section):
    """Stage 3b, beyond the paper (docs/beyond.md)."""

    rows: int = Field(2000, ge=1, description="patches that are remembered")
    score_share: float = Field(
        0.003, gt=0, le=1, description="of a map's values (of a tile's), the largest, whose mean is the score"
    )
    border: Literal["zeros", "replicate"] = Field(
        "zeros",
        description="what the Gaussian over a map finds beyond the picture: "
        "with zeros its border, where good pictures vary most, counts less",
    )
    tiles: Literal["1x1", "2x2", "3x3", "4x4"] = Field(
        "1x1",
        description="the memory sees each picture in so many tiles, each "
        "as large as images.size: for small defects; in all stages alike",
    )


class FusionSettings(Section):
    """Which branches' scores are added (docs/method.md section 4)."""

    branches: list[BranchName] = Field([*PAPER_BRANCHES], min_length=1, description="whose scores are added")
    optional: list[BranchName] = Field(
        [],
        description="further branches, weighted with the others if their stage was run; none "
        "where branches are named and these are not",
    )
    weights: Literal["equal", "synthetic_defects"] = Field(
        "equal",
        description="of the branches in the sum: 1 each (the paper), or for each category what finds synthetic defects "
        "in validation images best, 0 among the values (csad.evaluation.branch_weights)",
    )
    rule: Literal["sum", "softplus"] = Field(
        "sum",
        description="of the branches' scores z: sum (the paper), or softplus, the sum of log(1 + exp(3 (z - 1.5))), of the "
        "patch histogram log(1 + exp(6 (z - 2.25))), in which a very normal score of one branch cannot cancel an anomalous "
        "score of another",
    )


class Settings(Section):
    """All sections, and what only a category's file can say."""

    images: ImageSettings = ImageSettings()
    pseudo_labels: PseudoLabelSettings = PseudoLabelSettings()
    segmentor: SegmentorSettings = SegmentorSettings()
    lgst: LgstSettings = LgstSettings()
    memory: MemorySettings = MemorySettings()
    fusion: FusionSettings = FusionSettings()
    # MVTec AD's layout: the defects that are logical anomalies; the others count as structural.
    logical: list[str] = []
    # Polygons, lists of [x, y] in 0..1, outside of which nothing counts; none: the whole image, or roi.png.
    roi: list[Polygon] = []
    # What people call components, by their numbers in the report's legend; findings then say "capacitor is
    # missing".
    names: dict[Annotated[int, Field(ge=1, le=255)], ComponentName] = {}


SECTIONS: dict[str, Any] = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if name not in ("logical", "roi", "names")
}


def load(category: str, preset: str = PAPER, overrides: dict[str, Any] | None = None) -> Settings:
    """Merge the settings for one category.

    Args:
        category: its file in configs/categories/ is used if there is one.
        preset: paper, or the name of a file in configs/presets/.
        overrides: dotted names and values from the command line, e.g. {"lgst.steps": 100}.

    Raises:
        UserError: a file is no YAML mapping, a key is unknown or occurs twice, or a value is out of range.
    """
    paths = (CONFIGS / "presets" / f"{preset}.yaml", CONFIGS / "categories" / f"{category}.yaml")
    layers = [read_layer(path, SECTIONS) for path in paths if path.exists()]
    merged: dict[str, Any] = {}
    for layer in (*layers, nested(overrides or {})):
        if "branches" in layer.get("fusion", {}):
            layer["fusion"].setdefault("optional", [])
        merged = merge(merged, layer)
    try:
        settings = Settings(**merged)
    except ValidationError as problem:
        of_sections = [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]
        raise UserError(refusal(problem, [*of_sections, *Settings.model_fields])) from problem
    first, epochs = settings.segmentor.unsupervised_from_epoch, settings.segmentor.epochs
    if first >= epochs:
        raise UserError(
            f"setting segmentor.unsupervised_from_epoch: {first} is after the last epoch (segmentor.epochs: {epochs}, "
            "numbered from 0)"
        )
    return settings
