"""The one owner of training loops: resuming, prefetching, Ctrl-C, the progress bar, and stopping where a loss is not finite.

It knows nothing of networks: a stage writes its step in plain sight and asks the loop for the samples.

    loop = TrainingLoop(steps, progress_file, used, "cup: train LGST", model=model, optimizer=optimizer)
    for step, sample in loop.samples(draw):
        losses = ...
        loop.report(losses)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from csad.data import files, records
from csad.errors import UserError, defer_interrupts
from csad.progress import ProgressBar

from torch import Tensor

SAVE_EVERY_SECONDS = 60
LOOK_EVERY_STEPS = 10  # at the losses, which makes a GPU wait

Sample = TypeVar("Sample")


class TrainingLoop:
    """Steps from the last saved one, or from the start, to the end.

    Args:
        steps: of the whole training.
        progress_file: an unfinished training; made anew every minute and on Ctrl-C.
        used: everything that decides the result; a progress file made with something else is refused.
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
        used: dict[str, Any],
        description: str,
        lower: str,
        overwrites: str | None = None,
        **parts: Any,
    ):
        self.overwrites = overwrites
        self.steps, self.progress_file, self.used, self.parts = steps, progress_file, used, parts
        self.description, self.lower = description, lower
        self.done = 0
        self._losses: Mapping[str, Tensor] = {}
        if progress_file.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            saved = files.read_state(self.progress_file)
            changes = records.difference(saved.get("used", {}) if isinstance(saved, dict) else {}, self.used)
            if changes:
                raise UserError(
                    f"{self.progress_file} is a training with different settings or images ({'; '.join(changes[:4])}); "
                    "--overwrite starts over, another --workspace keeps both"
                )
            other = self.overwrites is not None and saved["overwrites"] != self.overwrites
        except UserError:
            if self.overwrites is None:
                raise
            other = True
        if other:
            self.progress_file.unlink()
            return
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.done = saved["done"]

    def _save(self) -> None:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        files.write_state(
            self.progress_file, {"used": self.used, "overwrites": self.overwrites, "done": self.done} | states
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
            defer_interrupts() as interrupted,
            ThreadPoolExecutor(1, thread_name_prefix="prefetch") as prefetch,
            ProgressBar(total=self.steps, initial=self.done, desc=self.description, unit="step") as bar,
        ):
            waiting = prefetch.submit(draw, self.done) if self.done < self.steps else None
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
