"""The published protocol, on request: of a training, the weights with the best AUROC on the test images are kept.

What they score is no estimate of performance, since the images that measure them have chosen them; ``--checkpoint last``, the
default, keeps the last step's. This protocol is for comparing with the published figures, and for measuring what the
choice is worth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from csad.data import layouts, records
from csad.errors import UserError
from csad.evaluation.metrics import auroc, mean_known
from csad.training.stage import Job

import numpy as np
from torch import Tensor, nn

LAST, BEST_ON_TEST = "last", "best_on_test"
CHOSEN_ON_TEST = "chosen on test images, as published; not an estimate of performance"

Network = TypeVar("Network", bound=nn.Module)


def with_checkpoint(parser: argparse.ArgumentParser, section: str) -> argparse.ArgumentParser:
    """Add ``--checkpoint``, another name for the setting ``{section}.checkpoint``."""
    parser.add_argument(
        "--checkpoint",
        dest=f"{section}.checkpoint",
        default=argparse.SUPPRESS,
        choices=[LAST, BEST_ON_TEST],
        help=f"which weights are kept: the last step's (default), or those {CHOSEN_ON_TEST}; the same as "
        f"--{section}.checkpoint",
    )
    return parser


def selection(job: Job, checkpoint: str) -> dict[str, Any]:
    """What records and checkpoints say of how the weights were chosen, and by which images; nothing of the
    last step's. UserError if there is nothing to choose by."""
    if checkpoint == LAST:
        return {}
    test = layouts.test_splits(job.category)
    if not any(test.get(split) for split in (layouts.LOGICAL, layouts.STRUCTURAL)):
        raise UserError(
            f"{job.name}: --checkpoint {BEST_ON_TEST} chooses by good and anomalous test images, and there are none; "
            f"add them, or keep the last step with --checkpoint {LAST}"
        )
    return {"selection": CHOSEN_ON_TEST, "selected_on": records.scored_images(job.category.validation, test)}


def read_scored(job: Job, read: Callable[[Any], np.ndarray]) -> dict[str, np.ndarray]:
    """Validation and test images, which are looked at again and again, by "val" and by split; uint8, as ``read`` reads them."""
    return {
        "val": read(job.category.validation),
        **{split: read(paths) for split, paths in layouts.test_splits(job.category).items() if paths},
    }


def mean_auroc(scores: Mapping[str, np.ndarray]) -> float:
    """Mean of the logical and the structural image AUROC in percent, of those there are; NaN where a score is no number.

    Args:
        scores: of the test images, by split.
    """
    if not all(np.isfinite(values).all() for values in scores.values()):
        return math.nan
    present = [split for split in (layouts.LOGICAL, layouts.STRUCTURAL) if split in scores]
    return mean_known(auroc(scores[layouts.GOOD], scores[split]) for split in present)


class BestOnTest(Generic[Network]):
    """The best weights so far; saved with an unfinished training, as one of its parts (csad.training.loop.TrainingLoop).

    Args:
        every: steps from one evaluation to the next; the last step is evaluated, too.
        steps: of the whole training.
        measure: AUROC of a network in eval mode on the test images, in percent.

    Attributes:
        evaluations: (step, AUROC) of each, in order.
    """

    def __init__(self, every: int, steps: int, measure: Callable[[Network], float]):
        self.every, self.steps, self.measure = every, steps, measure
        self.evaluations: list[list[float]] = []
        self.step = 0
        self.weights: dict[str, Tensor] = {}

    def after(self, step: int, network: Network) -> None:
        """Evaluate a network after so many steps of training, if it is time to; of equals the earliest is kept."""
        if step % self.every and step != self.steps:
            return
        best = max((value for _, value in self.evaluations if not math.isnan(value)), default=-math.inf)
        value = self.measure(network.eval())
        network.train()
        self.evaluations.append([step, value])
        if value > best:
            state = network.state_dict()
            self.step, self.weights = (
                step,
                {key: values.detach().cpu().clone() for key, values in state.items()},
            )

    def restore(self, network: Network, name: str) -> None:
        """Give a network its best weights back, and say which they are; as it is where no evaluation gave a number."""
        if not self.weights:
            return
        network.load_state_dict(self.weights)
        best = next(value for step, value in self.evaluations if step == self.step)
        print(
            f"{name}: the best of {len(self.evaluations)} evaluations on test images, after step {self.step} (mean AUROC "
            f"{best:.3f}; after the last step {self.evaluations[-1][1]:.3f}); {CHOSEN_ON_TEST}"
        )

    def noted(self) -> dict[str, Any]:
        """For the checkpoint: the step whose weights were kept, and every evaluation."""
        return {"selected_step": self.step, "evaluations": [*map(list, self.evaluations)]}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "evaluations": self.evaluations, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.evaluations, self.weights = state["step"], state["evaluations"], state["weights"]
