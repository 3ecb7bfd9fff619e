"""Concurrent requests, one model: what arrives together is scored together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFull(Exception):
    """No more items may wait."""


class Batcher(Generic[Item, Result]):
    """One thread that hands items of many callers to one function, several at once.

    While a batch runs, the next one gathers; what is there when the thread is free is taken at once, up to ``batch_size``, and
    an incomplete batch waits at most ``wait_seconds`` for items that are on their way.

    Args:
        run: items -> as many results, in order; what it raises goes to every caller of the batch.
        queue_length: items that may wait.
        on_batch: told the size of every batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        batch_size: int,
        wait_seconds: float,
        queue_length: int,
        on_batch: Callable[[int], None] = lambda size: None,
    ):
        self._run, self._on_batch = run, on_batch
        self._batch_size, self._wait_seconds, self._queue_length = batch_size, wait_seconds, queue_length
        self._queue: queue.Queue[tuple[Item, Future[Result]] | None] = queue.Queue()  # None: no more to come
        self._closing = threading.Lock()
        self._closed = False
        self._announced = 0
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of items that no batch has taken yet."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @contextmanager
    def announce(self) -> Iterator[None]:
        """An item will be submitted within this; called in one thread only."""
        self._announced += 1
        try:
            yield
        finally:
            self._announced -= 1

    def submit(self, item: Item) -> Future[Result]:
        """Raises QueueFull where too many wait, or after `close`."""
        with self._closing:
            if self._closed or self._queue.qsize() >= self._queue_length:
                raise QueueFull
            future: Future[Result] = Future()
            self._queue.put((item, future))
            return future

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        more = True
        while more:
            batch, more = self._gather()
            batch = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            if not batch:
                continue
            self._on_batch(len(batch))
            try:
                results = self._run([item for item, _ in batch])
            except Exception as problem:
                for _, future in batch:
                    future.set_exception(problem)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    future.set_result(result)

    def _gather(self) -> tuple[list[tuple[Item, Future[Result]]], bool]:
        """The next batch, and whether there is more to come."""
        batch: list[tuple[Item, Future[Result]]] = []
        until = None
        while len(batch) < self._batch_size:
            patience = until and max(0.0, until - time.monotonic())  # for the first item, as long as it takes
            if batch and not self._announced:
                patience = 0
            try:
                entry = self._queue.get(timeout=patience)
            except queue.Empty:
                break
            if entry is None:
                return batch, False
            batch.append(entry)
            until = until or time.monotonic() + self._wait_seconds
        return batch, True
