"""Draw the next step's batch while this step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Drawn = TypeVar("Drawn")


def draw_ahead(draw: Callable[[int], Drawn], first: int, last: int) -> Iterator[Drawn]:
    """Yield ``draw(first)`` ... ``draw(last - 1)``, each drawn in a thread of its own one step early.

    Reading, rendering and pasting pictures so hide behind the networks' work. A draw may depend on its step only: then
    it matters not when it happens, and a resumed run sees what an uninterrupted one would have.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="draw") as drawer:
        waiting = drawer.submit(draw, first) if first < last else None
        for step in range(first, last):
            drawn = waiting.result()
            if step + 1 < last:
                waiting = drawer.submit(draw, step + 1)
            yield drawn
