"""Where masks come from. A proposer looks at one image and proposes masks of parts, knowing nothing of other images.

The method's own are in ``grounded_sam`` (docs/method.md, section 1), their stand-in without any network in ``classical``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from csad.pseudo_labels.masks import PackedMasks

import numpy as np


@dataclass(frozen=True)
class Proposals:
    """What a proposer finds in one image (H, W)."""

    masks: PackedMasks | None  # may overlap and nest; None where nobody asked for them
    background: np.ndarray  # (H, W) bool, what lies behind all parts
    # Instances of the prompted parts, or None from a proposer that takes no prompts.
    grounding: PackedMasks | None = None
    grounding_background: np.ndarray | None = None  # (H, W) bool, what the background prompt found, or None


class Proposer(Protocol):
    """Anything that proposes masks."""

    name: str  # goes into records
    is_stand_in: bool  # whether results made with it have to be labelled so
    checkpoints: dict[str, str]  # name and digest of each file of weights it uses, for records
    # Side in pixels of the squeezed pictures it is made for; None: pictures at their native size.
    working_size: int | None

    def load(self) -> None:
        """Read the weights; ``propose`` does so itself where they have not been read. UserError if a
        checkpoint is damaged or belongs to another network."""
        ...

    def propose(self, image: np.ndarray) -> Proposals:
        """Propose masks for one image (H, W, 3) uint8 RGB, at its size. The same image gives the same masks."""
        ...
