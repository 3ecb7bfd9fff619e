"""The fused model with the arithmetic that can go, gone: same images in, same scores out, in less time.

What is done differently from `models.fused.FusedModel` (docs/method.md sections 3 and 4), none of which changes a score by
more than rounding:

- The teacher's projection is a 1x1 convolution, so it commutes with bilinear resizing and with average pooling. Each encoder
  map is projected at its own size, by its own columns of the weight, and only then enlarged, added and pooled.
- The teacher's normalisation is folded into that projection. Its bias joins after the pooling: the pooling counts the zeros
  around the map, and a bias added before would fade at the border.
- Batch norms are folded into the convolutions before them.
- The student's two heads are one convolution, and both differences are taken at once.
- Mahalanobis distances are norms of whitened differences.

Everything up to the feature maps can run in half precision; resizing of logits, label map, histograms, distances, differences
and scores stay in fp32.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.backbone import Encoder, resize, to_grids
from models.constants import MAP_SIZE, SIZE
from models.fused import FusedModel, to_rgb
from models.lgst import LGST, LgstMap, Student
from models.prediction import Prediction
from models.segmentor import ConvBnRelu, Segmentor


class FoldedEncoder(nn.Module):
    """RGB in 0..255 -> the encoder's maps in fp32, its network in any precision."""

    def __init__(self, encoder: Encoder, dtype: torch.dtype):
        super().__init__()
        self.normalise, self.dtype, self.reductions = encoder.normalise, dtype, encoder.reductions
        network = encoder.network
        self.network = _fold_graph(fx.GraphModule(network, _Tracer().trace(network))).to(dtype)

    def forward(self, rgb: Tensor) -> tuple[Tensor, ...]:
        maps = self.network(self.normalise(rgb).to(self.dtype))
        return tuple(level.float() for level in to_grids(maps, self.reductions, tuple(rgb.shape[-2:])))


class FoldedTeacher(nn.Module):
    """Two encoder maps -> normalised teacher features (B, channels, 64, 64)."""

    def __init__(self, projection: nn.Conv2d, mean: Tensor, std: Tensor, channels: tuple[int, ...]):
        super().__init__()
        weight = projection.weight / std.view(-1, 1, 1, 1)
        parts = [part.contiguous() for part in weight.split(channels, dim=1)]
        self.eighth, self.sixteenth = (
            nn.Conv2d(inputs, weight.shape[0], 1, bias=False) for inputs in channels
        )
        self.eighth.weight.data, self.sixteenth.weight.data = parts
        bias = (projection.get_parameter("bias") - mean.flatten()) / std.flatten()
        self.bias = nn.Parameter(bias.view(1, -1, 1, 1))

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
            both = [getattr(head, name) for head in (student.conv_st, student.conv_ae)]
            getattr(self.heads, name).data = torch.cat(both)
        del student.conv_st, student.conv_ae
        self.trunk = student

    def forward(self, images: Tensor) -> Tensor:
        return self.heads(self.trunk.trunk(images))


class FoldedLgst(LgstMap):
    """The anomaly map of LGST; its networks in any precision, its output in fp32."""

    scale: Tensor
    offset: Tensor

    def __init__(self, lgst: LGST, channels: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.normalise, self.dtype = lgst.normalise, dtype
        teacher = FoldedTeacher(lgst.teacher.proj, lgst.teacher_mean, lgst.teacher_std, channels)
        self.teacher = teacher.to(dtype)
        self.student, self.autoencoder = FoldedStudent(lgst.local_st).to(dtype), lgst.autoencoder.to(dtype)
        starts, ends = (
            torch.stack([getattr(lgst, f"q_{branch}_{end}") for branch in ("st", "ae")])
            for end in ("start", "end")
        )
        self.register_buffer("scale", 0.1 / (ends - starts))
        self.register_buffer("offset", -(self.scale * starts).sum())

    def forward(self, images: Tensor, maps: tuple[Tensor, ...], _: tuple[Tensor, ...]) -> Tensor:
        """The anomaly map, see `models.lgst.LGST.forward`."""
        normalised = self.normalise(images).to(self.dtype)
        teacher = self.teacher(*(level.to(self.dtype) for level in maps[1:]))
        expected = torch.cat([teacher, self.autoencoder(normalised)], dim=1).float()
        student = self.student(normalised).float()
        local, global_ = (part.mean(1) for part in (expected - student).square().chunk(2, dim=1))
        return self.scale[0] * local + self.scale[1] * global_ + self.offset


class FoldedSegmentor(nn.Module):
    """The encoder's maps -> logits (B, classes, 256, 256) in fp32, its network in any precision."""

    def __init__(self, segmentor: Segmentor, dtype: torch.dtype):
        super().__init__()
        for block in segmentor.modules():
            if isinstance(block, ConvBnRelu):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.set_submodule("bn", nn.Identity())
        self.network, self.dtype = segmentor.to(dtype), dtype
        self.network.output_size = MAP_SIZE  # the last resize of the logits is done here, in fp32

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        return resize(self.network(tuple(level.to(self.dtype) for level in maps)).float(), (SIZE, SIZE))


class FoldedModel(FusedModel):
    """Images in, score out; with maps, everything in `Prediction`.

    Args:
        model: what to fold; it is not changed.
        with_map: return a `Prediction` instead of the score alone.
        raw_input: take (B, 3, size, size) uint8 RGB, instead of float32 ImageNet-normalised RGB.
        dtype: of the networks; float32, float16 or bfloat16.
    """

    def __init__(
        self,
        model: FusedModel,
        with_map: bool = False,
        raw_input: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        nn.Module.__init__(self)
        vars(self).update(vars(copy.deepcopy(model).eval().requires_grad_(False)))
        encoder, segmentor, lgst = self.encoder, self.segmentor, self.lgst
        assert isinstance(encoder, Encoder) and isinstance(segmentor, Segmentor | None)  # not folded yet
        self.encoder = FoldedEncoder(encoder, dtype)
        if segmentor is not None:
            self.segmentor = FoldedSegmentor(segmentor, dtype)
        if isinstance(lgst, LGST):
            self.lgst = FoldedLgst(lgst, encoder.channels[1:], dtype)
        if self.patch_hist_detector is not None:
            self.patch_hist_detector.whiten()
        self.with_map, self.raw_input = with_map, raw_input
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor | Prediction:  # type: ignore[override]  # a whole Prediction on request
        rgb = images.float() if self.raw_input else to_rgb(images, self.image_mean, self.image_std, self.size)
        prediction = self.analyse(rgb)
        return prediction if self.with_map else prediction.score


class _Tracer(fx.Tracer):
    """timm's own layers stay whole: batch norms with their activation, convolutions that pad as TensorFlow does."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return module.__module__.startswith("timm.layers") or super().is_leaf_module(module, qualified_name)


def _fold_graph(network: fx.GraphModule) -> fx.GraphModule:
    from timm.layers import BatchNormAct2d, Conv2dSame  # takes two seconds, and only exports need it

    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before, norm = node.args[0], modules[node.target]
        after_conv = before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d)
        if not after_conv or len(before.users) > 1:
            continue
        network.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target].eval(), norm.eval()))
        if isinstance(norm, BatchNormAct2d):
            network.set_submodule(node.target, norm.act)
        else:
            node.replace_all_uses_with(before)
            network.graph.erase_node(node)
    for name, module in list(network.named_modules()):
        if isinstance(module, Conv2dSame):
            network.set_submodule(name, _with_fixed_padding(module))
    network.delete_all_unused_submodules()
    network.recompile()
    return network


def _with_fixed_padding(conv: nn.Conv2d) -> nn.Sequential:
    """The same convolution for sides that its stride divides, as ours are: then its padding does not depend on them."""
    totals = (max(kernel - stride, 0) for kernel, stride in zip(conv.kernel_size, conv.stride))
    (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
    size, stride, dilation = ((each[0], each[1]) for each in (conv.kernel_size, conv.stride, conv.dilation))
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, size, stride, 0, dilation, conv.groups)
    plain.weight, plain.bias = conv.weight, conv.bias
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain)
