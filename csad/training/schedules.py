"""Learning-rate schedules: the fraction of the first learning rate that a step trains with.

Stage 2 follows `cosine` (with its final fraction of 1, the paper's, it is constant), stage 3 `step_decay` (the paper), and
`warm_cosine` where its student sees features.
"""

from __future__ import annotations

import math

LAST_PHASE = 0.95  # fraction of the steps after which the rate drops
WARM_UP = 50  # steps


def step_decay(step: int, steps: int) -> float:
    """1, and a tenth in the last phase."""
    return 0.1 if step >= max(1, int(LAST_PHASE * steps)) else 1.0


def cosine(step: int, steps: int, final: float = 0.0) -> float:
    """From 1 to the final fraction along half a cosine."""
    return final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2


def warm_cosine(step: int, steps: int) -> float:
    """Rising over the first steps, then falling to 0 along half a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * cosine(step, steps)
