"""The whole detector as one module: image in, score out (docs/method.md section 4).

State dicts on disk have the keys and shapes of the published export, so published ``.pth`` files load and score; a model with
branches beyond the paper has further keys, one without LGST has fewer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import csad
from csad.branches import BRANCHES
from csad.errors import UserError, require_version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import PUBLISHED, empty_encoder
from models.constants import IMAGENET_MEAN, IMAGENET_STD, MAP_SIZE, OUTSIDE, SIZE
from models.dfm import DeepFeatureModel, pool
from models.fusion import MAXIMUM_EXPONENT, STRENGTH_EXPONENT
from models.histogram_evidence import HistogramEvidence
from models.lgst import LGST, LgstMap
from models.lgst_on_features import FeatureLGST
from models.patch_histogram import PatchHistogramDetector
from models.patch_memory import PatchMemory
from models.prediction import Prediction
from models.segmentor import Segmentor

METADATA_KEY = "csad"
_LGST_KEYS = ("teacher", "local_st", "autoencoder", "q_st_", "q_ae_", "fourth_", "sixteenth_")


class FusedModel(nn.Module):
    """Branches over one shared encoder; a branch that is None is not fused.

    Args:
        encoder: `models.backbone.Encoder`, or what gives the same maps.
        segmentor, detector: the patch histogram, both or neither; `models.segmentor.Segmentor`, or what gives its logits.
        lgst, memory, dfm: the other branches.
        size: side of the images in pixels; the memory sees them so, too, all else only their means over blocks, 256 wide.
        tiles: the memory sees tiles x tiles of them, LGST on features the whole image as large as one.
        roi: (size, size) bool, what is inspected (csad.data.images.View); None: everything.
        evidence: the patch histogram's map, and a part of its score; None: it has neither.
        rule: how scores are added, see `models.fusion.contribution`.
        weights: of the branches in the sum, by their names; None: 1 each.

    Attributes:
        branches: names of the fused branches, in the order of `Prediction`'s K.
    """

    roi: Tensor | None
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        segmentor: nn.Module | None = None,
        detector: PatchHistogramDetector | None = None,
        lgst: LgstMap | None = None,
        memory: PatchMemory | None = None,
        size: int = SIZE,
        roi: Tensor | None = None,
        evidence: HistogramEvidence | None = None,
        rule: str = "sum",
        tiles: int = 1,
        dfm: DeepFeatureModel | None = None,
        weights: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.register_buffer("roi", roi)  # in no published state dict, nor in ours where there is none
        self.size, self.rule, self.tiles = size, rule, tiles
        self.encoder, self.segmentor, self.patch_hist_detector = encoder, segmentor, detector
        self.lgst, self.memory, self.dfm, self.evidence = lgst, memory, dfm, evidence
        self.sees_large = (memory is not None and tiles == 1) or (lgst is not None and lgst.on_features)
        present = {"patchhist": detector, "LGST": lgst, "memory": memory, "DFM": dfm}
        self.branches = [branch for branch, module in present.items() if module is not None]
        for branch in self.branches:
            self.register_buffer(f"{BRANCHES[branch].statistics}_mean", torch.tensor(0.0))
            self.register_buffer(f"{BRANCHES[branch].statistics}_std", torch.tensor(1.0))
        self.weights = {branch: 1.0 if weights is None else weights[branch] for branch in self.branches}
        for name, values in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) RGB, ImageNet-normalised -> score (B,)."""
        return self.analyse(to_rgb(images, self.image_mean, self.image_std, self.size)).score

    def analyse(self, rgb: Tensor) -> Prediction:
        """(B, 3, size, size) RGB in 0..255 -> everything there is to know."""
        if self.roi is not None:
            rgb = torch.where(self.roi, rgb, OUTSIDE)
        small = block_means(rgb)
        maps = self.encoder(small)
        large_maps = maps
        if self.sees_large and self.size // self.tiles > SIZE:
            large_maps = self.encoder(block_means(rgb, self.size // self.tiles))
        scores, branch_maps = [], []
        if self.segmentor is not None:
            logits = self.segmentor(maps)
            label_map = logits.argmax(1)
            score, evidence = self.arrangement(label_map)
            scores.append(finite_with(score, logits))
            branch_maps.append(evidence)
        else:
            label_map = torch.zeros_like(small[:, 0]).long()
        if self.lgst is not None:
            anomaly_map = self.lgst(small, maps, large_maps)
            scores.append(finite_with(anomaly_map.amax((1, 2)), anomaly_map))
            branch_maps.append(self.lgst.scaled(anomaly_map))
        if self.memory is not None:
            if self.tiles == 1:
                anomaly_map = self.memory(large_maps, maps)
            else:
                anomaly_map = self.memory.anomaly_map(self.encoder, rgb, maps)
            scores.append(finite_with(self.memory.score(anomaly_map), anomaly_map))
            branch_maps.append(self.memory.scaled(anomaly_map))
        if self.dfm is not None:
            errors = self.dfm(pool(maps))
            scores.append(self.dfm.score(errors))
            branch_maps.append(self.dfm.scaled(errors))
        branch_scores = torch.stack([self.contribution(*each) for each in zip(self.branches, scores)], 1)
        stacked = torch.stack(branch_maps, 1)
        return Prediction(
            branch_scores.sum(1),
            branch_scores,
            fused_map(stacked, branch_scores, self.rule),
            stacked,
            label_map.to(torch.uint8),
        )

    def arrangement(self, label_map: Tensor) -> tuple[Tensor, Tensor]:
        """Label maps (B, 256, 256) -> the patch histogram's score (B,), not normalised, and its map (B, 64, 64)."""
        assert self.patch_hist_detector is not None  # label maps come with it
        score = self.patch_hist_detector(label_map)
        if self.evidence is None:
            return score, torch.zeros_like(label_map[:, :MAP_SIZE, :MAP_SIZE], dtype=torch.float32)
        evidence = self.evidence(label_map)
        return score + self.evidence.score(evidence), evidence

    def contribution(self, branch: str, score: Tensor) -> Tensor:
        """A branch's scores (B,) -> what it adds to the fused ones, (B,)."""
        mean, std = (getattr(self, f"{BRANCHES[branch].statistics}_{end}") for end in ("mean", "std"))
        z = (score - mean) / std
        return self.weights[branch] * (softplus(z) if self.rule == "softplus" else z)


def finite_with(scores: Tensor, values: Tensor) -> Tensor:
    """Scores (B,), no numbers where one of the values (B, ...) that they come from is not finite.

    Of NaN an argmax makes a label in every runtime, and maxima of OpenVINO and onnxruntime pass over some: a
    picture that could not be judged would be a normal one.
    """
    return scores + (values * 0).flatten(1).sum(1)  # multiplied first: a sum may overflow where it is in fp16


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp z), positive whatever runs it: of z below -10 OpenVINO's Softplus is off by 2e-6 to either side of 0,
    which has no root, while exp z is the same there to four digits."""
    return torch.where(z < -10, z.exp(), F.softplus(z))


def fused_map(branch_maps: Tensor, contributions: Tensor, rule: str) -> Tensor:
    """As `models.fusion.fused_map`: branch maps (B, K, h, w), contributions (B, K) -> (B, h, w)."""
    positive = branch_maps.clamp(min=0)
    strengths = contributions if rule == "softplus" else softplus(contributions)
    heights = strengths**STRENGTH_EXPONENT / positive.amax((2, 3)).clamp(min=1) ** MAXIMUM_EXPONENT
    return (positive * heights[:, :, None, None]).sum(1)


def to_rgb(normalised: Tensor, mean: Tensor, std: Tensor, size: int) -> Tensor:
    """(B, 3, size, size) with mean and std taken off -> RGB in 0..255."""
    rgb = normalised * std + mean
    # The small view is rounded, and rounding has to start from the image's own whole numbers.
    return rgb if size == SIZE else rgb.round()


def block_means(rgb: Tensor, size: int = SIZE) -> Tensor:
    """(B, 3, S, S) RGB in 0..255, whole numbers -> (B, 3, size, size): as `csad.data.images.small_views`."""
    factor = rgb.shape[-1] // size
    return rgb if factor == 1 else torch.floor(F.avg_pool2d(rgb, factor) + 0.5)


def published_state(model: FusedModel) -> OrderedDict[str, Tensor]:
    """A model's state dict with the published keys."""
    return OrderedDict(
        (key.replace("encoder.network.", "encoder.").removeprefix("lgst."), value)
        for key, value in model.state_dict().items()
    )


def from_state(state: Mapping[str, Tensor]) -> FusedModel:
    """Build the model that a state dict describes, published or ours, in eval mode.

    Branches, widths and class count are read off keys and shapes; the backbone's name and the view's size are in our metadata,
    and a file without metadata is a published one.

    Raises:
        UserError: a key is missing, unknown, or has another shape than its neighbours imply, or another version of this code
            wrote the metadata.
    """
    if content := metadata(state):
        require_version(content, "this model", "export it again with export_model.py --format torch")
    try:
        encoder = empty_encoder(content.get("backbone", PUBLISHED))
        segmentor = detector = lgst = memory = dfm = evidence = None
        if "segmentor.fc2.conv3.weight" in state:
            classes, width = state["segmentor.fc2.conv3.weight"].shape[:2]
            segmentor = Segmentor(encoder.channels, width, classes)
            detector = PatchHistogramDetector(classes)
            evidence = HistogramEvidence(classes) if "evidence.frequency" in state else None
        if "local_st.conv_st.weight" in state:
            channels, width = state["local_st.conv_st.weight"].shape[:2]
            lgst = (FeatureLGST if "fourth_mean" in state else LGST)(encoder.channels, width, channels)
        if "memory.detail.rows" in state:
            rows, context_rows = (len(state[f"memory.{part}.rows"]) for part in ("detail", "context"))
            sizes = rows, context_rows, state["memory.detail.usual"].shape[-1]
            options = content["memory_score_share"], content["tiles"], content["memory_border"]
            memory = PatchMemory(encoder.channels[1:], *sizes, *options)
        if "dfm.components" in state:
            dfm = DeepFeatureModel(encoder.channels[2], len(state["dfm.components"]))
        model = FusedModel(
            encoder,
            segmentor,
            detector,
            lgst,
            memory,
            content.get("input_size", SIZE),
            torch.zeros_like(state["roi"]) if "roi" in state else None,
            evidence,
            content.get("fusion_rule", "sum"),
            content.get("tiles", 1),
            dfm,
            content.get("branch_weights"),
        )
        if not model.branches:
            raise KeyError("it has no branch")
        model.load_state_dict({_own_key(key): value for key, value in state.items()})
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise UserError(
            f"this is not a CSAD model's state dict ({reason}); make one with export_model.py --format torch"
        ) from problem
    return model.eval().requires_grad_(False)


def _own_key(key: str) -> str:
    if key.startswith("encoder."):
        return key.replace("encoder.", "encoder.network.", 1)
    return f"lgst.{key}" if key.startswith(_LGST_KEYS) else key


def metadata(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What is known about a fused state dict; empty for published files."""
    return getattr(state, "_metadata", {}).get(METADATA_KEY, {})


def attach_metadata(state: OrderedDict[str, Tensor], content: dict[str, Any]) -> None:
    """Keep plain values with a state dict, and the format version that they are of.

    They go beside the version numbers that PyTorch itself keeps in ``_metadata``: saved and loaded with the file,
    while the keys stay the published ones.
    """
    kept = vars(state).setdefault("_metadata", OrderedDict())
    kept[METADATA_KEY] = content | {"format_version": csad.FORMAT_VERSION}
