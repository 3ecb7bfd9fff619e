"""SAM-HQ from the package segment-anything-hq: masks at points, in boxes, and everywhere."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from csad.pseudo_labels.masks import PackedMasks
from csad.pseudo_labels.package_networks import load_weights, quietly, read_weights
from csad.settings import PseudoLabelSettings

import numpy as np
import torch
from torch import Tensor, nn

STABILITY_OFFSET, NMS_IOU, CROP_OVERLAP = 1.0, 0.7, 512 / 1500  # of automatic mask generation
# At most; larger pictures get fewer prompts at a time.
PROMPTS_PER_BATCH, PIXELS_PER_BATCH = 16, 16 * 1600 * 1280
INSET = 10  # pixels from the border: where four of the background's eight points lie


class SamHQ:
    """SAM-HQ, one image at a time, set by ``look_at``.

    Args:
        sam: the package's network, in eval mode and on its device.
        half: its image encoder multiplies in fp16.
    """

    def __init__(self, sam: Any, half: bool = False):
        with quietly():
            from segment_anything_hq import SamPredictor
        sam.image_encoder = _ImageEncoder(sam.image_encoder, half)
        self.predictor = SamPredictor(sam)
        self.image = np.zeros((1, 1, 3), np.uint8)

    def look_at(self, image: np.ndarray) -> None:
        """Encode an image (H, W, 3) uint8 RGB."""
        self.image = image
        with quietly():
            self.predictor.set_image(image)

    def background(self) -> np.ndarray:
        """The mask (H, W) bool at eight points: the four corners and four 10 pixels inside."""
        height, width = self.image.shape[:2]
        points = [
            (x, y) for inset in (INSET, 0) for x in (inset, width - inset) for y in (inset, height - inset)
        ]
        masks, _, _ = self.predictor.predict(np.array(points), np.ones(len(points)), multimask_output=False)
        return masks[0]

    def inside(self, boxes: np.ndarray) -> PackedMasks:
        """The mask in each of the boxes (N, 4), (x0, y0, x1, y1) in pixels."""
        size = self.image.shape[:2]
        corners = self.predictor.transform.apply_boxes_torch(torch.from_numpy(boxes).float(), size)
        batches = (
            self.predictor.predict_torch(None, None, batch, multimask_output=False)[0][:, 0].cpu().numpy()
            for batch in corners.to(self.predictor.device).split(self._prompts_per_batch())
            if len(batch)
        )
        return PackedMasks.pack((mask for batch in batches for mask in batch), size)

    def everything(self, settings: PseudoLabelSettings) -> PackedMasks:
        """Automatic masks."""
        with quietly():
            from segment_anything_hq.utils.amg import rle_to_mask
        generator = _mask_generator()(
            self.predictor.model,
            points_per_side=settings.points_per_side,
            points_per_batch=self._prompts_per_batch(),
            output_mode="uncompressed_rle",
            pred_iou_thresh=settings.pred_iou_thresh,
            stability_score_thresh=settings.stability_score_thresh,
            stability_score_offset=STABILITY_OFFSET,
            box_nms_thresh=NMS_IOU,
            crop_n_layers=settings.crop_n_layers,
            crop_nms_thresh=NMS_IOU,
            crop_overlap_ratio=CROP_OVERLAP,
            crop_n_points_downscale_factor=1,
            min_mask_region_area=settings.min_mask_region_area,
        )
        with quietly():
            masks = generator.generate(self.image)
        return PackedMasks.pack((rle_to_mask(mask["segmentation"]) for mask in masks), self.image.shape[:2])

    def _prompts_per_batch(self) -> int:
        height, width = self.image.shape[:2]
        return max(min(PROMPTS_PER_BATCH, PIXELS_PER_BATCH // (height * width)), 1)


class _ImageEncoder(nn.Module):
    """SAM's image encoder, which remembers its last image.

    The background's points, the boxes and the automatic masks all begin with the whole image.
    """

    def __init__(self, encoder: Any, half: bool):
        super().__init__()
        self.encoder, self.img_size, self.in_half_precision = encoder, encoder.img_size, half
        self.last: tuple[Tensor, tuple[Tensor, list[Tensor]]] | None = None

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.last is None or not torch.equal(self.last[0], image):
            with torch.autocast(image.device.type, torch.float16, enabled=self.in_half_precision):
                features, early = self.encoder(image)
            self.last = image, (features.float(), [level.float() for level in early])
        return self.last[1]


@functools.cache
def load_sam(size: str, path: Path, device: torch.device, half: bool = False) -> SamHQ:
    """SAM-HQ from its checkpoint, its image encoder in fp16 if ``half``; read once, however many categories
    there are. UserError if the file is damaged or holds another network."""
    network = build_sam(size)
    load_weights(
        network,
        read_weights(path),
        f"{path} does not hold the weights of SAM-HQ {size}; put the published {path.name} there, or "
        "name another size with --pseudo_labels.sam",
    )
    # Eval mode once more, now that the weights are in: TinyViT derives tables from them when it is entered.
    return SamHQ(network.to(device).eval(), half)


def build_sam(size: str) -> nn.Module:
    """The package's SAM-HQ with random weights: vit_h, vit_l, vit_b or vit_tiny."""
    with quietly():
        from segment_anything_hq import sam_model_registry

        return sam_model_registry[size]()


@functools.cache
def _mask_generator() -> type:
    """The package's automatic mask generator, fixed for images, sizes and devices on which it fails."""
    with quietly():
        from segment_anything_hq import SamAutomaticMaskGenerator
        from segment_anything_hq.utils import amg
        from segment_anything_hq.utils.transforms import ResizeLongestSide
        from torchvision.ops import nms

    class SinglePrecision(ResizeLongestSide):
        """Coordinates in float32: Apple's MPS knows no float64."""

        def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
            return super().apply_coords(coords, original_size).astype(np.float32)

    class MaskGenerator(SamAutomaticMaskGenerator):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.predictor.transform = SinglePrecision(self.predictor.transform.target_length)

        def _process_crop(self, *args: Any) -> amg.MaskData:
            masks = super()._process_crop(*args)
            # A crop without masks has no crop boxes either, which the package then cannot index.
            masks["crop_boxes"] = masks["crop_boxes"].reshape(-1, 4)
            return masks

        @staticmethod
        def postprocess_small_regions(
            mask_data: amg.MaskData, min_area: int, nms_thresh: float
        ) -> amg.MaskData:
            """Does what the package does with gigabytes for native pictures, with one unpacked mask at a time."""
            scores = torch.ones(len(mask_data["rles"]))
            for index, rle in enumerate(mask_data["rles"]):
                mask, filled = amg.remove_small_regions(amg.rle_to_mask(rle), min_area, mode="holes")
                mask, cleared = amg.remove_small_regions(mask, min_area, mode="islands")
                tensor = torch.from_numpy(np.ascontiguousarray(mask))
                mask_data["boxes"][index] = amg.batched_mask_to_box(tensor)
                if filled or cleared:  # an unchanged duplicate is preferred
                    scores[index] = 0
                    mask_data["rles"][index] = amg.mask_to_rle_pytorch(tensor[None])[0]
            if len(scores):
                mask_data.filter(nms(torch.as_tensor(mask_data["boxes"]).float(), scores, nms_thresh))
            return mask_data

    return MaskGenerator
