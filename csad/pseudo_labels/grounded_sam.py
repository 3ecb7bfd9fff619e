"""The method's own proposers (docs/method.md, section 1): SAM-HQ, alone or with boxes that Grounding DINO finds by a text.

Both networks come from their packages, which are imported when they are needed: that takes seconds.
"""

from __future__ import annotations

from pathlib import Path

from csad.data import downloads
from csad.pseudo_labels.grounding_dino import GroundingDino, load_grounding_dino
from csad.pseudo_labels.proposers import Proposals
from csad.pseudo_labels.sam_hq import SamHQ, load_sam
from csad.settings import PseudoLabelSettings

import numpy as np
import torch

PUBLISHED_SAM, PUBLISHED_GROUNDING_DINO = "vit_h", "swint_ogc"


class SamProposer:
    """SAM-HQ alone: automatic masks, and the background from eight points.

    Args:
        settings: the stage's settings.
        sam: path of SAM-HQ's checkpoint, of the size that the settings name.
        is_stand_in: it takes the place of ``GroundedSamProposer``.
    """

    working_size: int | None = None

    def __init__(
        self, settings: PseudoLabelSettings, sam: Path, device: torch.device, is_stand_in: bool = False
    ):
        self.settings, self.sam, self.device = settings, sam, device
        self.half = settings.sam_precision == "fp16" and device.type == "cuda"
        self.name = ("sam" if settings.sam == PUBLISHED_SAM else f"sam {settings.sam}") + " fp16" * self.half
        self.is_stand_in = is_stand_in or settings.sam != PUBLISHED_SAM
        self.checkpoints = {sam.name: downloads.digest(sam)}

    def load(self) -> None:
        self._network()

    def _network(self) -> SamHQ:
        return load_sam(self.settings.sam, self.sam, self.device, self.half)

    def propose(self, image: np.ndarray) -> Proposals:
        sam = self._network()
        sam.look_at(image)
        return Proposals(masks=sam.everything(self.settings), background=sam.background())


class GroundedSamProposer(SamProposer):
    """Grounding DINO finds boxes by the category's text prompt, SAM-HQ turns them into instances.

    For a category that takes its refined masks from these instances (``no_sam``) automatic mask generation, by far the
    slowest step, does not run unless ``save_all_masks`` asks for its result.

    Args:
        settings: the stage's settings, with a text prompt.
        sam, grounding_dino: paths of the checkpoints, of the sizes that the settings name.
        text_encoder: folder of the BERT that Grounding DINO reads the prompt with.
    """

    def __init__(
        self,
        settings: PseudoLabelSettings,
        sam: Path,
        grounding_dino: Path,
        text_encoder: Path,
        device: torch.device,
    ):
        super().__init__(settings, sam, device)
        self.grounding_dino, self.text_encoder = grounding_dino, text_encoder
        sizes = settings.sam, settings.grounding_dino
        self.is_stand_in = sizes != (PUBLISHED_SAM, PUBLISHED_GROUNDING_DINO)
        self.name = " ".join(("grounded_sam", *sizes) if self.is_stand_in else ("grounded_sam",))
        self.name += " fp16" * self.half
        self.checkpoints |= {grounding_dino.name: downloads.digest(grounding_dino)}

    def load(self) -> None:
        self._networks()

    def _networks(self) -> tuple[SamHQ, GroundingDino]:
        sam, size = self._network(), self.settings.grounding_dino
        return sam, load_grounding_dino(size, self.grounding_dino, self.text_encoder, self.device)

    def propose(self, image: np.ndarray) -> Proposals:
        sam, grounding_dino = self._networks()
        settings = self.settings
        assert settings.text_prompt is not None
        thresholds = settings.box_threshold, settings.text_threshold
        boxes, phrases = grounding_dino.detect(image, settings.text_prompt, *thresholds)
        is_background = np.array(
            [names_background(phrase, settings.background_prompt) for phrase in phrases], bool
        )
        sam.look_at(image)
        instances = sam.inside(boxes)
        needed = not settings.no_sam or settings.save_all_masks
        return Proposals(
            masks=sam.everything(settings) if needed else None,
            background=sam.background(),
            grounding=instances[~is_background],
            grounding_background=instances[is_background].union(),
        )


def names_background(phrase: str, background_prompt: str | None) -> bool:
    """Whether the phrase of a box holds one of the background prompts, which dots separate.

    They are compared with the spaces around them, as published: " container ." is in "pin container pushpin" and not in
    "container".
    """
    # The tokenizer puts spaces around hyphens.
    phrase = phrase.replace(" - ", "-")
    return any(prompt in phrase for prompt in (background_prompt or "").lower().split(".") if prompt.strip())
