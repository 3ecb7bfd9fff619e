"""Which proposer: the one that the settings name, or the method's own as far as checkpoints are there, else the stand-in."""

from __future__ import annotations

from pathlib import Path

from csad.data import downloads
from csad.errors import UserError
from csad.pseudo_labels import checkpoints
from csad.pseudo_labels.component_labels import set_by_a_person
from csad.pseudo_labels.grounded_sam import GroundedSamProposer, SamProposer
from csad.pseudo_labels.proposers import Proposer
from csad.settings import PseudoLabelSettings
from csad.standins.classical import ClassicalProposer

import torch


def choose_proposer(
    category: str, settings: PseudoLabelSettings, folder: Path, device: torch.device, download: bool
) -> Proposer:
    """The proposer that the settings ask for; ``auto`` says what it takes, and how to get the method's own.

    Args:
        folder: where checkpoints lie.
        download: fetch those that are missing.

    Raises:
        UserError: a checkpoint is missing, or the prompt that Grounding DINO needs.
    """
    sam, grounding_dino = checkpoints.SAM[settings.sam], checkpoints.GROUNDING_DINO[settings.grounding_dino]
    kind = settings.proposer
    if kind == "auto":
        needed = [sam, grounding_dino] if settings.text_prompt else [sam]
        missing = [each for each in needed if not download and not (folder / each.file).exists()]
        if not missing:
            kind = "grounded_sam" if settings.text_prompt else "sam"
            print(f"{category}: proposals by {kind}")
        else:
            kind = "classical" if sam in missing else "sam"
            print(
                f"{category}: proposals by {'the classical stand-in' if kind == 'classical' else 'SAM-HQ alone'} instead "
                f"of {'SAM-HQ and Grounding DINO' if settings.text_prompt else 'SAM-HQ'}; to have those, put "
                f"{' and '.join(checkpoint.file for checkpoint in missing)} into {folder}, or let --download do it "
                f"({sum(checkpoint.megabytes for checkpoint in missing):g} MB)"
            )
    if kind != "grounded_sam":
        for name in set_by_a_person(category, settings, ("no_sam", "inside_grounding")):
            if getattr(settings, name):
                print(
                    f"{category}: --pseudo_labels.{name} has no effect, because it is about parts that a text prompt finds, "
                    "and here none does; leave it out, or take --proposer grounded_sam"
                )
    if kind == "classical":
        return ClassicalProposer(settings.container)
    if kind == "sam":
        weights = downloads.obtain(sam, folder, download)
        return SamProposer(settings, weights, device, bool(settings.text_prompt))
    if not settings.text_prompt:
        raise UserError(
            f"{category}: Grounding DINO has to be told what the parts are called; say so with "
            "--pseudo_labels.text_prompt 'screw . nut .' or in the category's file, or take --proposer sam"
        )
    return GroundedSamProposer(
        settings,
        downloads.obtain(sam, folder, download),
        downloads.obtain(grounding_dino, folder, download),
        checkpoints.obtain_text_encoder(folder, download),
        device,
    )
