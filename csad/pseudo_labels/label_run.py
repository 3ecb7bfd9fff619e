"""One run of stage 1 on one category: what there is to do, resuming and overwriting, its folders, and the record that ends it.

As `csad.training.branch_run`, by the same records; but several processes may share the run, so it hands on nothing but files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from csad.data import files, images, layouts, records
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.pseudo_labels.proposers import Proposer
from csad.settings import PseudoLabelSettings

from models.backbone import PUBLISHED, Backbone, fingerprint


class LabelRun:
    """Stage 1 at work on one category.

    Attributes:
        unfinished: beside what is there, so that nothing finished is harmed before the new is complete.
        folders: of each training image's files, in there.
    """

    def __init__(self, category: layouts.Category, workspace: Workspace):
        self.category = category.name
        self.finished = workspace.pseudo_labels(category.name)
        self.unfinished = workspace.unfinished_pseudo_labels(category.name)
        self.folders = [self.unfinished.image(category.key(path)) for path in category.train]
        self.in_progress = self.unfinished.root / "begun.json"

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the run in progress."""
        return self._read()["used"]

    def begin(self, provenance: dict[str, Any], proposer: Proposer, overwrite: bool) -> bool:
        """Decide what there is to do, and note by what; False where nothing is.

        Args:
            proposer: its weights are read, once they are needed.

        Raises:
            UserError: see `records.Record.plan`; or the unfinished work is of another run, or files are of unknown origin.
        """
        record = self._record(provenance)
        superseded = record.superseded() if overwrite else None
        changes = []
        if resumes := self.in_progress.exists():
            changes = records.changes_since(self._read(), records.as_json(provenance), superseded)
        if changes or not resumes or record.path.exists():
            self._refuse_unknown_files(record, overwrite)
            if record.plan(overwrite) == records.SKIP:
                print(f"{self.category}: pseudo-labels are there already, skipped (--overwrite starts over)")
                return False
        if changes:
            if not overwrite:
                records.refuse(changes, f"{self.unfinished.root} was made")
            shutil.rmtree(self.unfinished.root)
        proposer.load()  # a bad checkpoint leaves everything as it was
        files.write_json(self.in_progress, {"used": provenance, "overwrites": superseded})
        return True

    @contextmanager
    def completing(self) -> Iterator[dict[str, Any]]:
        """Gives the provenance; leaving the block without an error puts everything in its place and writes the record."""
        provenance = self.provenance
        yield provenance
        # Label maps of test images, which stage 2 made, stay.
        self.finished.root.mkdir(parents=True, exist_ok=True)
        for folder in [*self.folders, self.unfinished.info]:
            target = self.finished.root / folder.name
            if target.exists():
                shutil.rmtree(target)
            folder.rename(target)
        self._record(provenance).finish()
        shutil.rmtree(self.unfinished.root)

    def _read(self) -> dict[str, Any]:
        return files.read_json(self.in_progress, keys={"used": dict, "overwrites": (str, type(None))})

    def _finished_folders(self) -> list[Path]:
        return [self.finished.image(folder.name) for folder in self.folders]

    def _record(self, provenance: dict[str, Any]) -> records.Record:
        label_maps = [folder / "filtered_cluster_map.png" for folder in self._finished_folders()]
        outputs = [*label_maps, self.finished.histogram, self.finished.trusted]
        return records.Record(self.finished.record, provenance, outputs)

    def _refuse_unknown_files(self, record: records.Record, overwrite: bool) -> None:
        """Do not mix with files of unknown origin that are too few to be used as they are."""
        missing = [path for path in record.outputs if not path.exists()]
        if overwrite or record.path.exists() or not missing:
            return
        unknown = [path for folder in self._finished_folders() for path in folder.glob("*.png")]
        if unknown:
            raise UserError(
                f"{unknown[0]} was made by something else, and {missing[0]} is missing; complete those "
                "pseudo-labels, or make new ones with --overwrite"
            )


def provenance_of(
    train: Sequence[Path],
    view: images.View,
    proposer: Proposer,
    settings: PseudoLabelSettings,
    backbone: Backbone,
    seed: int,
) -> dict[str, Any]:
    """Everything that decides the pseudo-labels of a category."""
    return {
        "pseudo_labels": settings.model_dump(),
        "images": view.record,
        "proposer": proposer.name,
        "picture_size": proposer.working_size,
        "checkpoints": proposer.checkpoints | crop_weights(settings, backbone),
        **records.inputs(train, seed, backbone, stand_ins(proposer, settings, backbone)),
    }


def crop_weights(settings: PseudoLabelSettings, backbone: Backbone) -> dict[str, str]:
    """Origin and fingerprint of the published network's weights for cnn_image, which are not those of the encoder."""
    if "cnn_image" not in settings.features or backbone.deepest is None or backbone.name != PUBLISHED:
        return {}
    return {backbone.deepest_origin: fingerprint(backbone.deepest)}


def stand_ins(proposer: Proposer, settings: PseudoLabelSettings, backbone: Backbone) -> list[str]:
    """What, besides the backbone, stands in for the published thing."""
    crops = {} if backbone.has_published_crops else crop_weights(settings, backbone)
    proposers = [f"proposer {proposer.name}"] if proposer.is_stand_in else []
    return [f"cnn_image by {origin}" for origin in crops] + proposers
