"""The one owner of training loops: resuming, prefetching, Ctrl-C, the progress bar, and stopping where a loss is not finite.

A stage writes the losses of its step in plain sight, asks the loop for the samples, and leaves the rest of the step to it.

    training = NetworkTraining(steps, progress_file, provenance, "cup: train LGST", ...)
    for step, sample in training.samples(draw):
        training.step({"name": ...})
    noted = training.finish()
"""

from __future__ import annotations

import math
import operator
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

from csad.data import files, records
from csad.errors import UserError, defer_interrupts
from csad.processes import cores
from csad.progress import ProgressBar
from csad.training.best_on_test import BestOnTest

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

SAVE_EVERY_SECONDS = 60
MAX_WORKERS = 8  # processes that draw ahead of the step
LOOK_EVERY_STEPS = 10  # at the losses, which makes a GPU wait

Sample = TypeVar("Sample")


class TrainingLoop:
    """Steps from the last saved one, or from the start, to the end.

    Args:
        steps: of the whole training.
        progress_file: an unfinished training; made anew every minute and on Ctrl-C.
        provenance: everything that decides the result; a progress file made with something else is refused.
        description: of the progress bar, beginning with the category.
        lower: what to lower where training diverges, for example "--lgst.lr".
        workers: processes that draw samples ahead of the step; 0: a thread does, one step ahead.
        overwrites: of a run with ``--overwrite``, which result it replaces (`records.Record.superseded`): it goes on from its own
            progress, and starts over from any other.
        parts: networks and optimizers, whose states are saved and restored.

    Attributes:
        done: steps that are finished.

    Raises:
        UserError: the progress file is damaged, or was made with other settings or data, and nothing says to start over.
    """

    def __init__(
        self,
        steps: int,
        progress_file: Path,
        provenance: dict[str, Any],
        description: str,
        lower: str,
        overwrites: str | None = None,
        workers: int = 0,
        **parts: Any,
    ):
        self.overwrites, self.workers = overwrites, workers
        self.steps, self.progress_file, self.provenance, self.parts = steps, progress_file, provenance, parts
        self.description, self.lower = description, lower
        self.done = 0
        self._losses: Mapping[str, Tensor] = {}
        if progress_file.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            saved = files.read_state(self.progress_file)
        except UserError:
            if self.overwrites is None:
                raise
            saved = None
        content = saved if isinstance(saved, dict) else {}
        changes = records.changes_since(content, self.provenance, self.overwrites)
        if changes and self.overwrites is None:
            records.refuse(changes, f"{self.progress_file} is a training")
        if changes:
            self.progress_file.unlink()
            return
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.done = saved["done"]

    def _save(self) -> None:
        content = {"used": self.provenance, "overwrites": self.overwrites, "done": self.done}
        states = {name: part.state_dict() for name, part in self.parts.items()}
        files.write_state(self.progress_file, content | states)

    def samples(self, draw: Callable[[int], Sample]) -> Iterator[tuple[int, Sample]]:
        """Yield (step, ``draw(step)``) for every step that is left.

        Draws happen ahead of the step, so that reading and pasting pictures hide behind the networks' work. They may depend
        on their step only: then a resumed run, and any number of workers, see what an uninterrupted one would have.

        Raises:
            UserError: a loss is not finite.
            KeyboardInterrupt: Ctrl-C or SIGTERM; progress is saved.
        """
        last_saved = time.monotonic()
        with (
            defer_interrupts() as interrupted,
            ProgressBar(total=self.steps, initial=self.done, desc=self.description, unit="step") as bar,
        ):
            steps = range(self.done, self.steps)
            drawn = _by_processes(draw, steps, self.workers) if self.workers else _by_a_thread(draw, steps)
            for step, sample in zip(steps, drawn, strict=True):
                yield step, sample
                self.done = step + 1
                bar.update()
                if self.done % LOOK_EVERY_STEPS == 0 or self.done == self.steps:
                    bar.set_postfix(self._look())
                # The end, too, where the finished training can be told from the one that it replaces by its progress alone.
                complete = self.done == self.steps and self.overwrites is not None
                if interrupted() or complete or time.monotonic() - last_saved > SAVE_EVERY_SECONDS:
                    self._look()
                    self._save()
                    last_saved = time.monotonic()
                if interrupted():
                    raise KeyboardInterrupt

    def report(self, losses: Mapping[str, Tensor]) -> None:
        """Hand over the losses of a step, to be shown and looked at now and then."""
        self._losses = losses

    def _look(self) -> dict[str, str]:
        values = {name: loss.item() for name, loss in self._losses.items()}
        if not all(map(math.isfinite, values.values())):
            self.progress_file.unlink(missing_ok=True)  # nothing to go on from
            raise UserError(
                f"{self.description}: diverged at step {self.done}, a loss is not finite "
                f"({', '.join(f'{name} {value:.3g}' for name, value in values.items())}); lower {self.lower}"
            )
        return {name: f"{value:.3f}" for name, value in values.items()}


def _by_a_thread(draw: Callable[[int], Sample], steps: range) -> Iterator[Sample]:
    """One step early."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as prefetch:
        waiting = prefetch.submit(draw, steps.start)
        for step in steps:
            sample = waiting.result()
            if step + 1 in steps:
                waiting = prefetch.submit(draw, step + 1)
            yield sample


def _by_processes(draw: Callable[[int], Sample], steps: range, workers: int) -> Iterator[Sample]:
    """In order, whichever process is first."""
    loader = DataLoader(
        _Draws(draw),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_interrupts_to_the_loop,
        multiprocessing_context="fork",  # pictures and labels are shared, not copied
    )
    for sample in loader:
        if isinstance(sample, UserError):
            raise sample
        yield sample


class _Draws(Dataset):
    def __init__(self, draw: Callable[[int], Any]):
        self.draw = draw

    def __getitem__(self, step: int) -> Any:
        try:
            return self.draw(step)
        except UserError as problem:  # the loader would wrap it in a traceback
            return problem


def _unchanged(sample: Any) -> Any:
    return sample


def _leave_interrupts_to_the_loop(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def drawing_workers(device: torch.device) -> int:
    """How many processes should draw ahead: a GPU waits for pasted pictures, CPU networks need the cores.

    Jobs side by side share the cores; one with a single core draws by a thread.
    """
    return min(MAX_WORKERS, cores() - 1) if device.type == "cuda" and os.name == "posix" else 0


class NetworkTraining(TrainingLoop):
    """The training of one network, whose steps differ in their losses alone.

    Args:
        category: name of the category.
        network: by the name that it has in the progress file; on its device, in training mode.
        schedule: (step, steps) -> fraction of the optimizer's first learning rate.
        best: what chooses the weights; without it the last step's are kept.
        loop: the arguments of `TrainingLoop` but for its parts.
    """

    def __init__(
        self,
        category: str,
        network: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int, int], float],
        best: BestOnTest | None,
        **loop: Any,
    ):
        self.category, self.optimizer, self.schedule, self.best = category, optimizer, schedule, best
        (self.network,) = network.values()
        self.learning_rate = optimizer.param_groups[0]["lr"]
        parts: dict[str, Any] = {**network, "optimizer": optimizer} | ({} if best is None else {"best": best})
        super().__init__(**loop, **parts)

    def step(self, losses: Mapping[str, Tensor]) -> None:
        """Change the network by the gradient of the sum of a step's losses."""
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * self.schedule(self.done, self.steps)
        self.optimizer.zero_grad()
        reduce(operator.add, losses.values()).backward()
        self.optimizer.step()
        self.report(losses)
        if self.best is not None:
            self.best.after(self.done + 1, self.network)

    def finish(self) -> dict[str, Any]:
        """Put the network in eval mode, with the weights that are kept; returns what the checkpoint says of their choice."""
        self.network.to(memory_format=torch.contiguous_format).eval()
        if self.best is None:
            return {}
        self.best.restore(self.network, self.category)
        return self.best.noted()
