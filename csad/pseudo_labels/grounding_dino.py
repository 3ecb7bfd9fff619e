"""Grounding DINO from the package groundingdino-py: boxes of what a text names."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

from csad.errors import UserError
from csad.pseudo_labels import checkpoints
from csad.pseudo_labels.package_networks import load_weights, quietly, read_weights

import numpy as np
import torch
from torch import Tensor, nn

from models.constants import IMAGENET_MEAN, IMAGENET_STD

SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels of what Grounding DINO sees; at least, at most


class GroundingDino:
    """Grounding DINO on one image at a time.

    Args:
        network: the package's network, in eval mode and on ``device``.
    """

    def __init__(self, network: Any, device: torch.device):
        with quietly():
            from groundingdino.datasets import transforms
        self.network, self.device = network, device
        resize = transforms.RandomResize([SHORT_SIDE], max_size=LONG_SIDE)
        normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.prepare = transforms.Compose([resize, transforms.ToTensor(), normalise])

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
            output = self.network(prepared[None].to(self.device), captions=[caption])
            tokens = self.network.tokenizer(caption)
        logits, boxes = output["pred_logits"][0].sigmoid().cpu(), output["pred_boxes"][0].cpu()
        over = logits.max(1).values > box_threshold
        phrases = [
            get_phrases_from_posmap(box_logits > text_threshold, tokens, self.network.tokenizer)
            for box_logits in logits[over]
        ]
        return to_pixels(boxes[over], image.shape[:2]), phrases


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Boxes (N, 4) as (cx, cy, w, h) in fractions of an image of ``size`` (H, W) -> as (x0, y0, x1, y1) in its pixels."""
    centres, sides = boxes[:, :2].double(), boxes[:, 2:].double()
    scale = torch.tensor([size[1], size[0]])
    return torch.cat([(centres - sides / 2) * scale, (centres + sides / 2) * scale], 1).numpy()


@functools.cache
def load_grounding_dino(size: str, path: Path, text_encoder: Path, device: torch.device) -> GroundingDino:
    """Grounding DINO from its checkpoint and the folder of its text encoder; read once. UserError if a file
    is damaged or holds another network, or the folder does not hold a BERT."""
    network = build_grounding_dino(size, text_encoder)
    mismatch = (
        f"{path} does not hold the weights of Grounding DINO {size} with the text encoder {text_encoder}; put the "
        f"published {path.name} there, or name another size with --pseudo_labels.grounding_dino"
    )
    state = read_weights(path)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(mismatch)
    # "module." is of a network saved while it was trained on several devices.
    weights = {name.removeprefix("module."): values for name, values in state["model"].items()}
    load_weights(network, weights, mismatch)
    return GroundingDino(network.to(device).eval(), device)


def build_grounding_dino(size: str, text_encoder: Path) -> nn.Module:
    """The package's Grounding DINO with random weights but for the text encoder's: swint_ogc or
    swinb_cogcoor; UserError if the folder does not hold a BERT."""
    with quietly():
        from groundingdino import config
        from groundingdino.models import build_model
        from groundingdino.util.slconfig import SLConfig

        names = {"swint_ogc": "GroundingDINO_SwinT_OGC.py", "swinb_cogcoor": "GroundingDINO_SwinB_cfg.py"}
        name = names[size]
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
