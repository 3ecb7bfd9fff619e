"""Networks that come from packages, filled with published weights.

Whatever the packages print or warn about while they are built is kept from the user, who can do nothing about it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from csad.errors import DAMAGED, UserError

import torch
from torch import Tensor, nn


def read_weights(path: Path) -> Any:
    """What a checkpoint holds; UserError if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, *DAMAGED) as problem:
        raise UserError(
            f"checkpoint {path} is damaged ({str(problem).splitlines()[0] if str(problem) else 'empty'}); "
            "delete it and fetch it again, --download does so"
        ) from problem


def load_weights(network: nn.Module, state: dict[str, Tensor], otherwise: str) -> None:
    """Load a state dict that has every parameter of the network, else UserError with the sentence
    ``otherwise``; what else it holds does not matter."""
    try:
        missing = network.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise UserError(otherwise) from problem
    if {name for name, _ in network.named_parameters()} & set(missing):
        raise UserError(otherwise)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep standard output, warnings and logged warnings from the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
