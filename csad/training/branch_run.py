"""One run of a branch's stage: what there is to do, resuming and overwriting, its files, and the record that ends it.

with branch_run(job, "LGST", provenance, "LGST is trained") as run:
    if run.action == records.SKIP:
        return
    ...train, or load...
    run.write_checkpoint(model)
    run.write_scores(scores, maps)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csad.branches import BRANCHES, Branch
from csad.data import files, layouts, records
from csad.data.workspace import HELD_OUT
from csad.errors import UserError
from csad.training.best_on_test import BestOnTest
from csad.training.loop import NetworkTraining
from csad.training.stage import Job

import numpy as np
import torch
from torch import Tensor, nn

from models.device import describe_device, memory_format


@dataclass(frozen=True)
class BranchRun:
    """A branch's stage at work on one category and seed; see `branch_run`."""

    job: Job
    branch: Branch
    record: records.Record
    action: str  # `records.SKIP`, `records.SCORE` (from the checkpoint, without training) or `records.TRAIN`

    @property
    def checkpoint(self) -> Path:
        return self.job.workspace.checkpoint(self.job.category.name, self.branch.name)

    @property
    def progress_file(self) -> Path:
        """An unfinished training, to resume from."""
        return self.job.workspace.progress(self.job.category.name, self.branch.section)

    @property
    def settings(self) -> Any:
        """The section of the branch."""
        return getattr(self.job.settings, self.branch.section)

    @property
    def _lower(self) -> str:
        return f"--{self.branch.section}.lr (it was {self.settings.lr})"

    def training(
        self,
        title: str,
        steps: int,
        schedule: Callable[[int, int], float],
        best: BestOnTest | None = None,
        workers: int = 0,
        **network: nn.Module,
    ) -> NetworkTraining:
        """The training of a network on the job's device, from the last saved step if there is one.

        Args:
            title: of the progress bar, behind the category.
            schedule: (step, steps) -> fraction of the first learning rate.
            best: what chooses the weights; without it the last step's are kept.
            workers: processes that draw samples ahead of the step.
            network: the one, by the name that it has in the progress file.
        """
        job = self.job
        (trained,) = network.values()
        trained.to(job.device).to(memory_format=memory_format(job.precision)).train()
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(
            parameters,
            self.settings.lr,
            weight_decay=self.settings.weight_decay,
            fused=job.device.type != "mps",
        )
        return NetworkTraining(
            job.name,
            network,
            optimizer,
            schedule,
            best,
            steps=steps,
            progress_file=self.progress_file,
            provenance=self.record.provenance,
            description=f"{job.name}: {title}",
            lower=self._lower,
            overwrites=self.record.superseded() if job.overwrite else None,
            workers=workers,
        )

    def diverged(self, symptom: str) -> UserError:
        """The error to raise where what was trained is not finite; takes away the progress, from which nothing can go on."""
        self.progress_file.unlink(missing_ok=True)
        return UserError(f"{self.job.name}: training diverged, {symptom}; lower {self._lower}")

    def load(self, network: nn.Module) -> dict[str, Any]:
        """Give a network what the checkpoint holds, on the job's device and in eval mode; returns the checkpoint's "meta"."""
        meta = files.load_checkpoint(network, self.checkpoint)["meta"]
        network.to(self.job.device).eval()
        return meta

    def write_checkpoint(
        self, network: nn.Module, precision: str = "fp32", encoder: nn.Module | None = None, **more: Any
    ) -> None:
        """Write what was trained or fitted, with what it was made from.

        Args:
            precision: in which it was trained.
            encoder: goes along, so that export and deployment never look for its weights again.
            more: that its "meta" should say.
        """
        state = {"state": on_cpu(network)} | ({} if encoder is None else {"encoder": on_cpu(encoder)})
        ran_on = {"ran_on": describe_device(self.job.device, precision)}
        meta = self.record.provenance | {"category": self.job.category.name} | more | ran_on
        files.write_state(self.checkpoint, state | {"meta": meta})

    def write_scores(self, scores: dict[str, np.ndarray], maps: dict[str, np.ndarray]) -> None:
        """Write the branch's score files, under each of its names, and its maps if there are any.

        Args:
            scores: by split of test images, "val" and, of branches that have it, `HELD_OUT`; in sorted file order.
            maps: the same way, (N, h, w) each.
        """
        category, workspace = self.job.category, self.job.workspace
        parts = {part: scores[part] for part in ("val", HELD_OUT) if part in scores}
        if layouts.GOOD in scores:
            for part, split in (("logi", layouts.LOGICAL), ("struc", layouts.STRUCTURAL)):
                parts[part] = np.concatenate([scores[layouts.GOOD], scores[split]])
        else:
            print(f"{category.name}: there are no good test images, so no test scores")
        for name in self.branch.score_names:
            for part, values in parts.items():
                files.write_array(workspace.scores(category.name, name, part), values.astype(np.float64))
        if maps:
            files.write_arrays(workspace.anomaly_maps(category.name, self.branch.name), **maps)


@contextmanager
def branch_run(
    job: Job,
    branch: str,
    provenance: dict[str, Any],
    done: str,
    outputs: Sequence[Path] = (),
    with_maps: bool = True,
) -> Iterator[BranchRun]:
    """Decide what there is to do for a branch; leaving the block without an error writes the record, and the run is complete.

    To be entered before any training, which a missing split should not cost.

    Args:
        provenance: everything that decides the training, `records.inputs` among it.
        done: is done where nothing is left to do, for example "LGST is trained".
        outputs: files besides checkpoint, scores and maps.
        with_maps: the branch has anomaly maps.

    Raises:
        UserError: see `records.Record.plan` and `require_same_inputs`.
    """
    category, workspace, row = job.category, job.workspace, BRANCHES[branch]
    checkpoint, test = workspace.checkpoint(category.name, branch), layouts.test_splits(category)
    scores = workspace.branch_outputs(category.name, row.score_names, bool(test), with_maps)
    record = records.Record(
        workspace.record(category.name, branch),
        provenance,
        [checkpoint, *outputs, *scores],
        records.scored_images(category.validation, test),
        checkpoint,
    )
    run = BranchRun(job, row, record, record.plan(job.overwrite))
    if run.action == records.SKIP:
        print(f"{category.name}: {done} and scored already, skipped (--overwrite starts over)")
        yield run
        return
    require_same_inputs(job, branch, provenance)
    yield run
    run.progress_file.unlink(missing_ok=True)  # first: with a record nothing would look for it any more
    record.finish()


def require_same_inputs(job: Job, branch: str, provenance: dict[str, Any]) -> None:
    """UserError where another branch of this category was trained on another backbone, or on other images,
    and nothing says to start over."""
    for other, row in BRANCHES.items():
        record, script = job.workspace.record(job.category.name, other), row.stage
        if other == branch or job.overwrite or not record.exists():
            continue
        theirs = records.read_record(record)["used"]
        if theirs.get("backbone_fingerprint") != provenance["backbone_fingerprint"]:
            raise UserError(
                f"{job.name}: {script} worked on the backbone {theirs.get('backbone')}, this is "
                f"{provenance['backbone']}; name the same with --backbone, or run {script} --overwrite with this one first"
            )
        if theirs.get("train_images") != provenance["train_images"]:
            raise UserError(
                f"{job.name}: {script} saw other training images than there are now; run {script} --overwrite first"
            )


def on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """A module's state, ready to be written."""
    return {key: value.cpu() for key, value in module.state_dict().items()}
