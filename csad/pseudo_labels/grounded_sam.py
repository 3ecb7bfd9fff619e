"""The method's own proposers (docs/method.md, section 1): SAM-HQ, alone or with boxes that Grounding DINO finds by a text.

Both networks come from their packages, segment-anything-hq and groundingdino-py, which are imported when they are needed:
that takes seconds. Whatever the packages print or warn about while they are built is kept from the user, who can do
nothing about it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

from csad.data import downloads
from csad.errors import DAMAGED, UserError
from csad.pseudo_labels import checkpoints
from csad.pseudo_labels.masks import PackedMasks
from csad.pseudo_labels.proposers import Proposals
from csad.settings import PseudoLabelSettings

import numpy as np
import torch
from torch import Tensor, nn

PUBLISHED_SAM, PUBLISHED_GROUNDING_DINO = "vit_h", "swint_ogc"
STABILITY_OFFSET, NMS_IOU, CROP_OVERLAP = 1.0, 0.7, 512 / 1500  # of automatic mask generation
PROMPTS_PER_BATCH, PIXELS_PER_BATCH = (
    16,
    16 * 1600 * 1280,
)  # at most; larger pictures get fewer prompts at a time
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels of what Grounding DINO sees; at least, at most
INSET = 10  # pixels from the border: where four of the background's eight points lie


class SamProposer:
    """SAM-HQ alone: automatic masks, and the background from eight points.

    Args:
        chosen: the stage's settings.
        sam: path of SAM-HQ's checkpoint, of the size that the settings name.
        is_stand_in: it takes the place of ``GroundedSamProposer``.
    """

    working_size = None

    def __init__(
        self, chosen: PseudoLabelSettings, sam: Path, device: torch.device, is_stand_in: bool = False
    ):
        self.chosen, self.sam, self.device = chosen, sam, device
        self.half = in_half_precision(chosen, device)
        self.name = ("sam" if chosen.sam == PUBLISHED_SAM else f"sam {chosen.sam}") + " fp16" * self.half
        self.is_stand_in = is_stand_in or chosen.sam != PUBLISHED_SAM
        self.checkpoints = {sam.name: downloads.digest(sam)}

    def load(self) -> None:
        load_sam(self.chosen.sam, self.sam, self.device, self.half)

    def propose(self, image: np.ndarray) -> Proposals:
        sam = load_sam(self.chosen.sam, self.sam, self.device, self.half)
        sam.look_at(image)
        return Proposals(masks=sam.everything(self.chosen), background=sam.background())


class GroundedSamProposer:
    """Grounding DINO finds boxes by the category's text prompt, SAM-HQ turns them into instances.

    For a category that takes its refined masks from these instances (``no_sam``) automatic mask generation, by far the
    slowest step, does not run unless ``save_all_masks`` asks for its result.

    Args:
        chosen: the stage's settings, with a text prompt.
        sam, grounding_dino: paths of the checkpoints, of the sizes that the settings name.
        text_encoder: folder of the BERT that Grounding DINO reads the prompt with.
    """

    working_size = None

    def __init__(
        self,
        chosen: PseudoLabelSettings,
        sam: Path,
        grounding_dino: Path,
        text_encoder: Path,
        device: torch.device,
    ):
        self.chosen, self.sam, self.grounding_dino = chosen, sam, grounding_dino
        self.text_encoder, self.device, self.half = text_encoder, device, in_half_precision(chosen, device)
        self.is_stand_in = (chosen.sam, chosen.grounding_dino) != (PUBLISHED_SAM, PUBLISHED_GROUNDING_DINO)
        self.name = (
            f"grounded_sam {chosen.sam} {chosen.grounding_dino}" if self.is_stand_in else "grounded_sam"
        ) + " fp16" * self.half
        self.checkpoints = {path.name: downloads.digest(path) for path in (sam, grounding_dino)}

    def load(self) -> None:
        self._networks()

    def propose(self, image: np.ndarray) -> Proposals:
        sam, grounding_dino = self._networks()
        boxes, phrases = grounding_dino.detect(
            image, self.chosen.text_prompt, self.chosen.box_threshold, self.chosen.text_threshold
        )
        is_background = np.array(
            [names_background(phrase, self.chosen.background_prompt) for phrase in phrases], bool
        )
        sam.look_at(image)
        instances = sam.inside(boxes)
        wanted = not self.chosen.no_sam or self.chosen.save_all_masks
        return Proposals(
            masks=sam.everything(self.chosen) if wanted else None,
            background=sam.background(),
            grounding=instances[~is_background],
            grounding_background=instances[is_background].union(),
        )

    def _networks(self) -> tuple[SamHQ, GroundingDino]:
        return (
            load_sam(self.chosen.sam, self.sam, self.device, self.half),
            load_grounding_dino(
                self.chosen.grounding_dino, self.grounding_dino, self.text_encoder, self.device
            ),
        )


def in_half_precision(chosen: PseudoLabelSettings, device: torch.device) -> bool:
    """Whether SAM-HQ's image encoder runs in fp16: only where the settings ask for it, and on CUDA alone."""
    return chosen.sam_precision == "fp16" and device.type == "cuda"


def names_background(phrase: str, background_prompt: str | None) -> bool:
    """Whether the phrase of a box holds one of the background prompts, which dots separate.

    They are compared with the spaces around them, as published: " container ." is in "pin container pushpin" and not in
    "container".
    """
    # The tokenizer puts spaces around hyphens.
    phrase = phrase.replace(" - ", "-")
    return any(prompt in phrase for prompt in (background_prompt or "").lower().split(".") if prompt.strip())


class SamHQ:
    """SAM-HQ, one image at a time, set by ``look_at``.

    Args:
        sam: the package's network, in eval mode and on its device.
        half: its image encoder multiplies in fp16.
    """

    def __init__(self, sam: nn.Module, half: bool = False):
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
        boxes = torch.from_numpy(boxes).float()
        boxes = self.predictor.transform.apply_boxes_torch(boxes, size).to(self.predictor.device)
        batches = (
            self.predictor.predict_torch(None, None, some, multimask_output=False)[0][:, 0].cpu().numpy()
            for some in boxes.split(self._prompts_per_batch())
            if len(some)
        )
        return PackedMasks.pack((mask for batch in batches for mask in batch), size)

    def everything(self, chosen: PseudoLabelSettings) -> PackedMasks:
        """Automatic masks."""
        with quietly():
            from segment_anything_hq.utils.amg import rle_to_mask
        generator = _mask_generator()(
            self.predictor.model,
            points_per_side=chosen.points_per_side,
            points_per_batch=self._prompts_per_batch(),
            output_mode="uncompressed_rle",
            pred_iou_thresh=chosen.pred_iou_thresh,
            stability_score_thresh=chosen.stability_score_thresh,
            stability_score_offset=STABILITY_OFFSET,
            box_nms_thresh=NMS_IOU,
            crop_n_layers=chosen.crop_n_layers,
            crop_nms_thresh=NMS_IOU,
            crop_overlap_ratio=CROP_OVERLAP,
            crop_n_points_downscale_factor=1,
            min_mask_region_area=chosen.min_mask_region_area,
        )
        with quietly():
            found = generator.generate(self.image)
        return PackedMasks.pack((rle_to_mask(one["segmentation"]) for one in found), self.image.shape[:2])

    def _prompts_per_batch(self) -> int:
        height, width = self.image.shape[:2]
        return max(min(PROMPTS_PER_BATCH, PIXELS_PER_BATCH // (height * width)), 1)


class _ImageEncoder(nn.Module):
    """SAM's image encoder, which remembers its last image.

    The background's points, the boxes and the automatic masks all begin with the whole image.
    """

    def __init__(self, encoder: nn.Module, half: bool):
        super().__init__()
        self.encoder, self.img_size, self.half = encoder, encoder.img_size, half
        self.last: tuple[Tensor, tuple[Tensor, list[Tensor]]] | None = None

    def forward(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.last is None or not torch.equal(self.last[0], image):
            with torch.autocast(image.device.type, torch.float16, enabled=self.half):
                features, early = self.encoder(image)
            self.last = image, (features.float(), [one.float() for one in early])
        return self.last[1]


class GroundingDino:
    """Grounding DINO on one image at a time.

    Args:
        network: the package's network, in eval mode and on ``device``.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        with quietly():
            from groundingdino.datasets import transforms
        self.network, self.device = network, device
        self.prepare = transforms.Compose(
            [
                transforms.RandomResize([SHORT_SIDE], max_size=LONG_SIDE),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    @torch.inference_mode()
    def detect(
        self, image: np.ndarray, prompt: str, box_threshold: float, text_threshold: float
    ) -> tuple[np.ndarray, list[str]]:
        """Find what a text names.

        Args:
            image: (H, W, 3) uint8 RGB.
            prompt: names, each followed by a dot.
            box_threshold: a box is kept when its best token is over it, 0..1.
            text_threshold: the tokens over it make the box's phrase, 0..1.

        Returns:
            Boxes (N, 4), (x0, y0, x1, y1) in pixels, and their phrases.
        """
        from groundingdino.util.utils import get_phrases_from_posmap
        from PIL import Image

        caption = prompt.lower().strip()
        caption += "" if caption.endswith(".") else "."
        prepared, _ = self.prepare(Image.fromarray(image), None)
        with quietly():
            found = self.network(prepared[None].to(self.device), captions=[caption])
            tokens = self.network.tokenizer(caption)
        logits, boxes = found["pred_logits"][0].sigmoid().cpu(), found["pred_boxes"][0].cpu()
        kept = logits.max(1).values > box_threshold
        phrases = [
            get_phrases_from_posmap(one > text_threshold, tokens, self.network.tokenizer)
            for one in logits[kept]
        ]
        return to_pixels(boxes[kept], image.shape[:2]), phrases


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) as (cx, cy, w, h) in shares of an image of ``size`` (H, W) -> as (x0, y0, x1, y1) in its pixels."""
    centres, sides = boxes[:, :2].double(), boxes[:, 2:].double()
    scale = torch.tensor([size[1], size[0]])
    return torch.cat([(centres - sides / 2) * scale, (centres + sides / 2) * scale], 1).numpy()


@functools.cache
def load_sam(size: str, path: Path, device: torch.device, half: bool = False) -> SamHQ:
    """SAM-HQ from its checkpoint, its image encoder in fp16 if ``half``; read once, however many categories there are.

    Raises:
        UserError: the file is damaged or holds another network.
    """
    network = build_sam(size)
    _fill(
        network,
        _read(path),
        f"{path} does not hold the weights of SAM-HQ {size}; put the published {path.name} there, or "
        "name another size with --pseudo_labels.sam",
    )
    # Eval mode once more, now that the weights are in: TinyViT derives tables from them when it is entered.
    return SamHQ(network.to(device).eval(), half)


@functools.cache
def load_grounding_dino(size: str, path: Path, text_encoder: Path, device: torch.device) -> GroundingDino:
    """Grounding DINO from its checkpoint and the folder of its text encoder; read once.

    Raises:
        UserError: a file is damaged or holds another network, or the folder does not hold a BERT.
    """
    network = build_grounding_dino(size, text_encoder)
    other = (
        f"{path} does not hold the weights of Grounding DINO {size} with the text encoder {text_encoder}; put the "
        f"published {path.name} there, or name another size with --pseudo_labels.grounding_dino"
    )
    state = _read(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(other)
    prefix = "module."  # of a network saved while it was trained on several devices
    _fill(network, {name.removeprefix(prefix): values for name, values in state["model"].items()}, other)
    return GroundingDino(network.to(device).eval(), device)


def build_sam(size: str) -> nn.Module:
    """The package's SAM-HQ with random weights: vit_h, vit_l, vit_b or vit_tiny."""
    with quietly():
        from segment_anything_hq import sam_model_registry

        return sam_model_registry[size]()


def build_grounding_dino(size: str, text_encoder: Path) -> nn.Module:
    """The package's Grounding DINO with random weights but for the text encoder's: swint_ogc or swinb_cogcoor.

    Raises:
        UserError: the folder does not hold a BERT.
    """
    with quietly():
        from groundingdino import config
        from groundingdino.models import build_model
        from groundingdino.util.slconfig import SLConfig

        name = {"swint_ogc": "GroundingDINO_SwinT_OGC.py", "swinb_cogcoor": "GroundingDINO_SwinB_cfg.py"}[
            size
        ]
        arguments = SLConfig.fromfile(str(Path(config.__file__).parent / name))
        arguments.text_encoder_type = str(text_encoder)
        # Recomputing activations saves memory in training, which is not what happens here.
        arguments.use_checkpoint = arguments.use_transformer_ckpt = False
        try:
            return build_model(arguments)
        except (OSError, ValueError, TypeError, RuntimeError, pickle.UnpicklingError) as problem:
            raise UserError(
                f"{text_encoder} does not hold the text encoder {checkpoints.TEXT_ENCODER} "
                f"({str(problem).splitlines()[0]}); it needs config.json, vocab.txt and model.safetensors, "
                "which --download fetches"
            ) from problem


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *DAMAGED) as problem:
        raise UserError(
            f"checkpoint {path} is damaged ({str(problem).splitlines()[0] if str(problem) else 'empty'}); "
            "delete it and fetch it again, --download does so"
        ) from problem


def _fill(network: nn.Module, state: dict[str, Tensor], otherwise: str) -> None:
    """Load a state dict that has every parameter of the network; what else it holds does not matter.

    Raises:
        UserError: with the sentence ``otherwise``, when it has not.
    """
    try:
        missing = network.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise UserError(otherwise) from problem
    if {name for name, _ in network.named_parameters()} & set(missing):
        raise UserError(otherwise)


@functools.cache
def _mask_generator() -> type:
    """The package's automatic mask generator, mended for images, sizes and devices on which it fails."""
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
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.predictor.transform = SinglePrecision(self.predictor.transform.target_length)

        def _process_crop(self, *args):
            found = super()._process_crop(*args)
            # A crop without masks has no crop boxes either, which the package then cannot index.
            found["crop_boxes"] = found["crop_boxes"].reshape(-1, 4)
            return found

        @staticmethod
        def postprocess_small_regions(
            mask_data: amg.MaskData, min_area: int, nms_thresh: float
        ) -> amg.MaskData:
            """As in the package, which needs gigabytes for native pictures, but with one unpacked mask at a time."""
            scores = torch.ones(len(mask_data["rles"]))
            for index, rle in enumerate(mask_data["rles"]):
                mask, filled = amg.remove_small_regions(amg.rle_to_mask(rle), min_area, mode="holes")
                mask, cleared = amg.remove_small_regions(mask, min_area, mode="islands")
                tensor = torch.from_numpy(np.ascontiguousarray(mask))
                mask_data["boxes"][index] = amg.batched_mask_to_box(tensor)
                if filled or cleared:  # a duplicate that needed no mending is preferred
                    scores[index] = 0
                    mask_data["rles"][index] = amg.mask_to_rle_pytorch(tensor[None])[0]
            if len(scores):
                mask_data.filter(nms(torch.as_tensor(mask_data["boxes"]).float(), scores, nms_thresh))
            return mask_data

    return MaskGenerator


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep standard output, warnings and logged warnings from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
