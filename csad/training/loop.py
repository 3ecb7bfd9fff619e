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
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar

from csad.data import files, records
from csad.errors import UserError, interrupts_wait
from csad.progress import ProgressBar

import torch
from torch import Tensor, nn

SAVE_EVERY_SECONDS = 60
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
        **parts: Any,
    ):
        self.overwrites = overwrites
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
        changes = records.changes_since(
            saved if isinstance(saved, dict) else {}, self.provenance, self.overwrites
        )
        if changes and self.overwrites is None:
            records.refuse(changes, f"{self.progress_file} is a training")
        if changes:
            self.progress_file.unlink()
            return
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.done = saved["done"]

    def _save(self) -> None:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        files.write_state(
            self.progress_file,
            {"used": self.provenance, "overwrites": self.overwrites, "done": self.done} | states,
        )

    def samples(self, draw: Callable[[int], Sample]) -> Iterator[tuple[int, Sample]]:
        """Yield (step, ``draw(step)``) for every step that is left.

        A draw happens in a thread of its own one step early, so that reading and pasting pictures hide behind the networks'
        work. It may depend on its step only: then a resumed run sees what an uninterrupted one would have.

        Raises:
            UserError: a loss is not finite.
            KeyboardInterrupt: Ctrl-C or SIGTERM; progress is saved.
        """
        last_saved = time.monotonic()
        with (
            interrupts_wait() as interrupted,
            ThreadPoolExecutor(1, thread_name_prefix="prefetch") as prefetch,
            ProgressBar(total=self.steps, initial=self.done, desc=self.description, unit="step") as bar,
        ):
            if self.done >= self.steps:
                return
            waiting = prefetch.submit(draw, self.done)
            for step in range(self.done, self.steps):
                sample = waiting.result()
                if step + 1 < self.steps:
                    waiting = prefetch.submit(draw, step + 1)
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


class WeightSelection(Protocol):
    """What chooses the weights of a training (csad.training.best_on_test.BestOnTest)."""

    def after(self, step: int, network: Any) -> None: ...

    def restore(self, network: Any, name: str) -> None: ...

    def noted(self) -> dict[str, Any]: ...


class NetworkTraining(TrainingLoop):
    """The training of one network, whose steps differ in their losses alone.

    Args:
        category: name of the category.
        title: of the progress bar, behind the category.
        network: by the name that it has in the progress file; on its device, in training mode.
        schedule: (step, steps) -> fraction of the optimizer's first learning rate.
        best: what chooses the weights; without it the last step's are kept.

    The others are those of `TrainingLoop`.
    """

    def __init__(
        self,
        steps: int,
        progress_file: Path,
        provenance: dict[str, Any],
        category: str,
        title: str,
        lower: str,
        overwrites: str | None,
        network: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int, int], float],
        best: WeightSelection | None = None,
    ):
        self.category, self.optimizer, self.schedule, self.best = category, optimizer, schedule, best
        (self.network,) = network.values()
        self.learning_rate = optimizer.param_groups[0]["lr"]
        super().__init__(
            steps,
            progress_file,
            provenance,
            f"{category}: {title}",
            lower,
            overwrites,
            **network,
            optimizer=optimizer,
            **({"best": best} if best is not None else {}),
        )

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
