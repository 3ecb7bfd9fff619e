"""What a station is made of: its limits, its models at work, and what /metrics says of them. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from csad.evaluation.thresholds import threshold_of
from csad.inference.engines import Engine
from csad.inference.inspection import Picture, judge
from csad.inference.verdicts import VERDICTS, Verdict
from csad.station.batching import Batcher

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # seconds


@dataclass(frozen=True)
class Options:
    """How a station judges, and how much it takes.

    Attributes:
        threshold: call higher scores anomalous, whatever the model says.
        false_positive_rate: fraction of good images that may be called anomalous; None: what each model suggests.
        batch_size: pictures scored together at most; smaller than what comes at a time, so that some are decoded meanwhile.
        batch_wait_ms: for which an incomplete batch waits for pictures that are on their way.
        queue_length: pictures that may wait for each model.
        max_requests: in work at one time, their bodies in memory.
        max_body_bytes: of a request.
        max_pixels: of a picture.
        body_seconds: in which a request's body has to arrive, and its answer has to be read.
        token: that requests must bear, or None.
        max_connections: open at one time; fewer where the process may open too few files.
        header_seconds: in which a request's headers have to arrive.
        allowed_hosts: lower-case host names, beside the loopback ones, under which the station answers and whose
            pages may use it; None: any.
        any_address: it also answers under any IP address: unlike a name, nobody can point one here (DNS rebinding).
    """

    threshold: float | None = None
    false_positive_rate: float | None = None
    batch_size: int = 4
    batch_wait_ms: float = 5.0
    queue_length: int = 64
    max_requests: int = 64
    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    body_seconds: float = 30.0
    token: str | None = None
    max_connections: int = 256
    header_seconds: float = 10.0
    allowed_hosts: frozenset[str] | None = None
    any_address: bool = False


class Station:
    """A model that is served: its engine, threshold and thread; UserError if the model does not know its
    threshold."""

    def __init__(self, name: str, engine: Engine, options: Options, on_batch: Callable[[int], None]):
        self.name, self.engine = name, engine
        self.threshold, description = threshold_of(
            engine.metadata, options.threshold, options.false_positive_rate, name
        )
        self.threshold_words = description or "set when the station was started"
        self.batcher: Batcher[Picture, Verdict] = Batcher(
            lambda pictures: judge(pictures, engine, self.threshold),
            options.batch_size,
            options.batch_wait_ms / 1000,
            options.queue_length,
            on_batch,
        )

    def description(self) -> dict[str, Any]:
        """What the page needs to know; validation_scores show what another threshold would promise."""
        engine = self.engine
        return {
            "name": self.name,
            "threshold": self.threshold,
            "threshold_words": self.threshold_words,
            "validation_scores": sorted(map(float, engine.metadata.get("validation_scores", []))),
            "branches": engine.branches,
            "has_maps": engine.has_maps,
            "input_size": engine.size,
            "runtime": engine.runtime,
            "precision": getattr(engine, "precision", None),
            "device": getattr(engine, "device", None),
        }


class Metrics:
    """What /metrics says, one registry per app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.verdicts = Counter(
            "csad_verdicts", "Pictures by verdict", ("model", "verdict"), registry=self.registry
        )
        self.refusals = Counter(
            "csad_refusals", "Requests without a verdict by HTTP status", ("status",), registry=self.registry
        )
        self.latency = Histogram(
            "csad_request_seconds",
            "From a request's first byte to its verdict",
            ("model",),
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.batches = Histogram(
            "csad_batch_size",
            "Pictures scored together",
            ("model",),
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        self.waiting = Gauge("csad_queue_length", "Pictures that wait", ("model",), registry=self.registry)
        self.requests = Gauge("csad_requests_in_work", "Requests being answered", registry=self.registry)

    def watch(self, station: Station) -> None:
        self.waiting.labels(station.name).set_function(lambda: station.batcher.waiting)
        for verdict in VERDICTS:
            self.verdicts.labels(station.name, verdict)  # there from the start, as 0
