"""The branches of the detector, in all tables' order: their names, their stages, and how files show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BranchName = Literal["patchhist", "LGST", "memory", "DFM"]


@dataclass(frozen=True)
class Branch:
    """One row of the table."""

    name: BranchName  # in settings, metadata and the names of score files
    title: str  # what people call it
    stage: str  # the script that trains or fits it
    checkpoint: str  # name of the file that this stage writes (csad.data.workspace knows where)
    state_key: str  # in that file's state dict; no other branch has it
    section: str  # of the settings, under which its provenance has them
    statistics: str  # how the exported model's buffers begin that normalise its score
    alias: str = ""  # a second name under which its scores are written
    # Of the rule softplus (docs/beyond.md, fusion): from how many stds a score counts, how sharply, and whether those of
    # held-out training images, of which a few lie far out, are among the scores of good ones.
    dead_zone: float = 1.5
    sharpness: float = 3
    held_out: bool = False

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names under which its scores are written."""
        return (self.name, self.alias) if self.alias else (self.name,)


BRANCHES: dict[str, Branch] = {
    branch.name: branch
    for branch in (
        Branch(
            "patchhist",
            "patch histogram",
            "train_segmentor.py",
            "segmentor_{category}_256.pth",
            "fc2.conv3.weight",
            "segmentor",
            "patch_hist",
            dead_zone=2.25,
            sharpness=6,
            held_out=True,
        ),
        # The alias is the published README's name.
        Branch(
            "LGST",
            "LGST",
            "CSAD.py",
            "best_{category}.pth",
            "local_st.conv_st.weight",
            "lgst",
            "lgst",
            alias="CSAD",
        ),
        Branch(
            "memory",
            "patch memory",
            "patch_memory.py",
            "memory_{category}.pth",
            "detail.rows",
            "memory",
            "memory",
        ),
        Branch("DFM", "DFM", "patch_memory.py", "dfm_{category}.pth", "components", "dfm", "dfm"),
    )
}
PAPER_BRANCHES: tuple[BranchName, ...] = ("patchhist", "LGST")
