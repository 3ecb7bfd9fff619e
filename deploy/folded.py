"""The fused model with the arithmetic that can go, gone: same images in, same scores out, in less time.

What is done differently from `models.fused.FusedModel` (METHOD.md sections 3 and 4), none of which changes a score by
more than rounding:

- The teacher's projection is a 1x1 convolution, so it commutes with bilinear resizing and with average pooling. Each encoder
  map is projected at its own size, by its own columns of the weight, and only then enlarged, added and pooled.
- The teacher's normalisation is folded into that projection. Its bias joins after the pooling: the pooling counts the zeros
  around the map, and a bias added before would fade at the border.
- Batch norms are folded into the convolutions before them.
- The student's two heads are one convolution, and both differences are taken at once.

Everything up to the feature maps can run in half precision; resizing of logits, label map, histograms, Mahalanobis
distances, differences and scores stay in fp32.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.backbone import TapEncoder, resize
from models.fused import FusedModel
from models.lgst import MAP_SIZE, Student
from models.segmentor import ConvBnRelu

IMAGE_SIZE = 256


class Maps(NamedTuple):
    """What a model exported with maps gives, in this order."""

    score: Tensor  # (B,) fused
    anomaly_map: Tensor  # (B, 256, 256) float32; its maximum at 64x64 is the LGST score before normalisation
    label_map: Tensor  # (B, 256, 256) uint8 component index
    lgst_score: Tensor  # (B,) normalised share of the score
    patch_histogram_score: Tensor  # (B,) normalised share of the score


class FoldedTeacher(nn.Module):
    """Two encoder maps -> normalised teacher features (B, channels, 64, 64)."""

    def __init__(self, projection: nn.Conv2d, mean: Tensor, std: Tensor, channels: tuple[int, int]):
        super().__init__()
        weight = projection.weight / std.view(-1, 1, 1, 1)
        self.eighth, self.sixteenth = (nn.Conv2d(inputs, weight.shape[0], 1, bias=False) for inputs in channels)
        self.eighth.weight.data, self.sixteenth.weight.data = (part.contiguous() for part in weight.split(channels, dim=1))
        self.bias = nn.Parameter(((projection.bias - mean.flatten()) / std.flatten()).view(1, -1, 1, 1))

    def forward(self, eighth: Tensor, sixteenth: Tensor) -> Tensor:
        size = (MAP_SIZE, MAP_SIZE)
        features = resize(self.eighth(eighth), size) + resize(self.sixteenth(sixteenth), size)
        return F.avg_pool2d(features, 3, stride=1, padding=1) + self.bias


class FoldedStudent(nn.Module):
    """Images -> local and global features one after the other, (B, 2 channels, 64, 64)."""

    def __init__(self, student: Student):
        super().__init__()
        self.heads = nn.Conv2d(student.conv_st.in_channels, 2 * student.conv_st.out_channels, 1)
        for name in ("weight", "bias"):
            getattr(self.heads, name).data = torch.cat([getattr(student.conv_st, name), getattr(student.conv_ae, name)])
        del student.conv_st, student.conv_ae
        self.trunk = student

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(self.trunk.trunk(images))


class FoldedModel(nn.Module):
    """Images in, score out; with maps, everything in `Maps`.

    Args:
        model: what to fold; it is not changed.
        with_map: return `Maps` instead of the score alone.
        raw_input: take (B, 3, 256, 256) uint8 RGB and normalise inside, instead of float32 ImageNet-normalised RGB.
        mean, std: of that normalisation, three numbers each.
        dtype: of the networks; float32, float16 or bfloat16.
    """

    def __init__(self, model: FusedModel, with_map: bool = False, raw_input: bool = False,
                 mean: tuple[float, ...] = (0, 0, 0), std: tuple[float, ...] = (1, 1, 1), dtype: torch.dtype = torch.float32):
        super().__init__()
        model = copy.deepcopy(model).eval().requires_grad_(False)
        channels = _eighth_and_sixteenth(model)
        self.with_map, self.raw_input, self.dtype = with_map, raw_input, dtype
        self.encoder = fold_encoder(model.encoder)
        self.teacher = FoldedTeacher(model.teacher.proj, model.teacher_mean, model.teacher_std, channels)
        self.colours = model.colours
        self.student, self.autoencoder = FoldedStudent(model.local_st), model.autoencoder
        self.segmentor = fold_blocks(model.segmentor)
        # The last resize of the logits is done here, in fp32.
        self.segmentor.output_size = MAP_SIZE
        for part in (self.encoder, self.teacher, self.student, self.autoencoder, self.segmentor):
            part.to(dtype)

        self.detector = model.patch_hist_detector
        starts, ends = (torch.stack([getattr(model, f"q_{branch}_{end}") for branch in ("st", "ae")])
                        for end in ("start", "end"))
        self.register_buffer("scale", 0.1 / (ends - starts))
        self.register_buffer("offset", -(self.scale * starts).sum())
        for name in ("lgst_mean", "lgst_std", "patch_hist_mean", "patch_hist_std"):
            self.register_buffer(name, getattr(model, name))
        self.register_buffer("image_mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("image_std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor | Maps:
        maps = self.analyse(images)
        return maps if self.with_map else maps.score

    def analyse(self, images: Tensor) -> Maps:
        """(B, 3, 256, 256) -> everything, whatever `forward` returns of it."""
        if self.raw_input:
            images = (images.float() - self.image_mean) / self.image_std
        seen = self.colours(images).to(self.dtype)
        features = self.encoder(images.to(self.dtype))

        wanted = torch.cat([self.teacher(*features[1:]), self.autoencoder(seen)], dim=1).float()
        given = self.student(seen).float()
        local, global_ = (part.mean(1) for part in (wanted - given).square().chunk(2, dim=1))
        anomaly_map = self.scale[0] * local + self.scale[1] * global_ + self.offset
        lgst_score = (anomaly_map.amax((1, 2)) - self.lgst_mean) / self.lgst_std

        logits = resize(self.segmentor(features).float(), (IMAGE_SIZE, IMAGE_SIZE))
        label_map = logits.argmax(1)
        patch_histogram_score = (self.detector(label_map) - self.patch_hist_mean) / self.patch_hist_std

        score = lgst_score + patch_histogram_score
        large = resize(anomaly_map[:, None], (IMAGE_SIZE, IMAGE_SIZE))[:, 0]
        return Maps(score, large, label_map.to(torch.uint8), lgst_score, patch_histogram_score)


def fold_encoder(encoder: nn.Module) -> nn.Module:
    """Fold the batch norms of an encoder; one that does not follow a convolution stays."""
    if isinstance(encoder, TapEncoder):
        encoder.network = _fold_graph(encoder.network)
        return encoder
    return _fold_graph(fx.symbolic_trace(encoder))


def fold_blocks(module: nn.Module) -> nn.Module:
    """Fold the batch norm of every `ConvBnRelu` in a module."""
    for block in module.modules():
        if isinstance(block, ConvBnRelu):
            block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return module


def _fold_graph(network: fx.GraphModule) -> fx.GraphModule:
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or not isinstance(modules[before.target], nn.Conv2d) or len(before.users) > 1:
            continue
        network.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target].eval(), modules[node.target].eval()))
        node.replace_all_uses_with(before)
        network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _eighth_and_sixteenth(model: FusedModel) -> tuple[int, int]:
    """Channels of the two encoder maps that the teacher projects."""
    with torch.no_grad():
        features = model.encoder(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=model.lgst_mean.device))
    return features[1].shape[1], features[2].shape[1]
