"""Exported models over HTTP: POST a picture, get predict.py's line about it; GET / is a page for people. Needs no PyTorch.

Every answer that is no picture's verdict is {"error": one sentence}; none names a file of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import io
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from PIL import Image, UnidentifiedImageError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from data import images
from deploy.batching import Batcher, QueueFull
from deploy.daily_log import DailyLog
from deploy.engines import Engine
from deploy.inspection import ANOMALOUS, UNREADABLE, VERDICTS, Picture, Verdict, judge, read_picture, threshold_of
from errors import UserError

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": ("index.html", "text/html"), "/style.css": ("style.css", "text/css"), "/app.js": ("app.js", "text/javascript")}
OPEN_PATHS = (*PAGE_FILES, "/health")  # that need no token: the page asks for it
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()", "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff", "cache-control": "no-store",
}
OVERLAY_SIDE = 512  # longer side in pixels of each of the three pictures in an overlay
DECODERS = min(4, os.cpu_count() or 1)
LONGEST_NAME = 200  # characters of a picture's name
DISCARD_SECONDS = 2.0  # for which the rest of a refused body is read, so that its sender sees the answer
LATENCIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # seconds


@dataclass(frozen=True)
class Options:
    """How a station judges, and how much it takes.

    Attributes:
        threshold: call higher scores anomalous, whatever the model says.
        false_positive_rate: share of good images that may be called anomalous; None: what each model suggests.
        batch_size: pictures scored together at most.
        batch_wait_ms: for which an incomplete batch waits for more.
        queue_length: pictures that may wait for each model.
        max_requests: in work at one time, their bodies in memory.
        max_body_bytes: of a request.
        max_pixels: of a picture.
        body_seconds: in which a request has to arrive.
        token: that requests must bear, or None.
    """

    threshold: float | None = None
    false_positive_rate: float | None = None
    batch_size: int = 8
    batch_wait_ms: float = 5.0
    queue_length: int = 64
    max_requests: int = 64
    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    body_seconds: float = 30.0
    token: str | None = None


class Refusal(HTTPException):
    """A request that gets no verdict: status and a sentence."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(status, sentence, headers or None)


class Upload(io.BytesIO):
    """A picture in memory that is called in sentences by its name."""

    def __init__(self, content: bytes, name: Path):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return str(self.name)


class Station:
    """A model at work: its engine, threshold and thread.

    Raises:
        UserError: the model does not know its threshold.
    """

    def __init__(self, name: str, engine: Engine, options: Options, on_batch: Callable[[int], None]):
        self.name, self.engine = name, engine
        self.threshold, promise = threshold_of(engine.metadata, options.threshold, options.false_positive_rate, name)
        self.threshold_words = promise.words if promise else (
            "set in the model" if options.threshold is None else "set by whoever started the station")
        self.batcher: Batcher[Picture, Verdict] = Batcher(
            lambda pictures: judge(pictures, engine, self.threshold), options.batch_size, options.batch_wait_ms / 1000,
            options.queue_length, on_batch)

    def description(self) -> dict[str, Any]:
        """What the page needs to know; validation_scores show what another threshold would promise."""
        engine = self.engine
        return {"name": self.name, "threshold": self.threshold, "threshold_words": self.threshold_words,
                "validation_scores": sorted(map(float, engine.metadata.get("validation_scores", []))),
                "branches": engine.branches, "has_maps": engine.has_maps, "input_size": engine.size,
                "runtime": engine.runtime, "precision": getattr(engine, "precision", None),
                "device": getattr(engine, "device", None)}


class Metrics:
    """What /metrics tells, one registry an app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.verdicts = Counter("csad_verdicts", "Pictures by verdict", ("model", "verdict"), registry=self.registry)
        self.refusals = Counter("csad_refusals", "Requests without a verdict by HTTP status", ("status",), registry=self.registry)
        self.latency = Histogram("csad_request_seconds", "From a request's first byte to its verdict", ("model",),
                                 buckets=LATENCIES, registry=self.registry)
        self.batches = Histogram("csad_batch_size", "Pictures scored together", ("model",), buckets=(1, 2, 4, 8, 16, 32),
                                 registry=self.registry)
        self.waiting = Gauge("csad_queue_length", "Pictures that wait", ("model",), registry=self.registry)
        self.requests = Gauge("csad_requests_in_work", "Requests being answered", registry=self.registry)

    def watch(self, station: Station) -> None:
        self.waiting.labels(station.name).set_function(lambda: station.batcher.waiting)
        for verdict in VERDICTS:
            self.verdicts.labels(station.name, verdict)  # there from the start, as 0


class Gate:
    """ASGI middleware: token, number of requests and size of bodies, before any of it is read; headers of every answer."""

    def __init__(self, app: ASGIApp, options: Options, metrics: Metrics):
        self.app, self.options, self.metrics = app, options, metrics
        self.in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items()
                                                             if name.encode() not in present)]
                if message["status"] >= 400:
                    self.metrics.refusals.labels(str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await _discard(receive)
            await _answer(refusal)(scope, receive, send_with_headers)
            return
        self.in_work += 1
        self.metrics.requests.set(self.in_work)
        try:
            await self.app(scope, self._limited(receive), send_with_headers)
        finally:
            self.in_work -= 1
            self.metrics.requests.set(self.in_work)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        token = self.options.token
        if token is not None and path not in OPEN_PATHS and not hmac.compare_digest(
                headers.get(b"authorization", b""), b"Bearer " + token.encode()):
            return Refusal(401, "this station wants a token: send the header Authorization: Bearer TOKEN",
                           **{"WWW-Authenticate": "Bearer"})
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit():
            return Refusal(400, "Content-Length is no number")
        if int(declared[:20]) > self.options.max_body_bytes:
            return self._too_large()
        if path == "/score" and self.in_work >= self.options.max_requests:
            return _busy(f"{self.in_work} requests are in work already")
        return None

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.options.max_body_bytes:
                if message.get("more_body"):
                    await _discard(receive)
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> Refusal:
        return Refusal(413, f"the body is larger than {self.options.max_body_bytes} bytes; send a smaller file")


def create_app(engines: dict[str, Engine], options: Options | None = None, log: DailyLog | None = None) -> FastAPI:
    """The station as an ASGI app.

    Args:
        engines: by the names that requests call them.
        log: where every verdict goes before it is answered.

    Raises:
        UserError: a model does not know its threshold.
    """
    options = options or Options()
    metrics = Metrics()
    stations = {name: Station(name, engine, options, metrics.batches.labels(name).observe) for name, engine in engines.items()}
    for station in stations.values():
        metrics.watch(station)
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        yield
        for station in stations.values():
            await asyncio.to_thread(station.batcher.close)
        decoders.shutdown()

    # The usual pages for OpenAPI load scripts from a CDN; this one must work offline.
    app = FastAPI(title="CSAD inspection station", docs_url=None, redoc_url=None, lifespan=lifespan,
                  description="Scores pictures with exported models.")
    app.add_middleware(Gate, options=options, metrics=metrics)
    app.add_exception_handler(HTTPException, lambda _, problem: _answer(problem))
    app.add_exception_handler(RequestValidationError, lambda _, problem: _answer(Refusal(422, _in_words(problem))))
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=400))  # nobody is there to read it
    app.add_exception_handler(Exception, lambda *_: _answer(Refusal(
        500, "something is wrong with this station; what it is stands in its own output")))

    for path, (file, kind) in PAGE_FILES.items():
        app.add_api_route(path, _fixed((PAGE / file).read_bytes(), kind), include_in_schema=False)

    @app.get("/health", summary="Whether the models' threads live")
    async def health() -> JSONResponse:
        dead = [name for name, station in stations.items() if not station.batcher.alive]
        return JSONResponse({"status": "ok" if not dead else "failed", "models": len(stations)}, 503 if dead else 200)

    @app.get("/models", summary="The models, their thresholds and what these promise")
    async def models() -> JSONResponse:
        return JSONResponse({"models": [station.description() for station in stations.values()]})

    @app.get("/metrics", summary="Prometheus metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> RedirectResponse:
        return RedirectResponse("/openapi.json")

    @app.post("/score", summary="Score one picture", openapi_extra=_SCORE_BODY, responses=_SCORE_ANSWERS)
    async def score(request: Request, model: str | None = None, name: str = "", overlay: bool = False) -> JSONResponse:
        """The picture is the body itself, or the one file of a form. `name` names it in the answer; `overlay=1` adds a PNG."""
        begun = time.perf_counter()
        station = _named(stations, model)
        loop = asyncio.get_running_loop()
        try:
            content, file_name = await asyncio.wait_for(_received(request), options.body_seconds)
        except TimeoutError:
            raise Refusal(408, f"the picture did not arrive within {options.body_seconds:g} seconds") from None
        called = plain_name(name or file_name)
        shown_side = OVERLAY_SIDE if overlay and station.engine.has_maps else None

        def finish(verdict: Verdict) -> dict[str, Any]:
            answer = verdict.as_json() | {"model": station.name, "threshold_words": station.threshold_words}
            if log is not None:
                log.write(answer | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
            metrics.verdicts.labels(station.name, verdict.verdict).inc()
            if overlay:
                answer |= {"overlay": None if verdict.drawing is None else png_uri(verdict.drawing),
                           "findings_if_anomalous": _findings_if_anomalous(verdict)}
            return answer

        try:
            picture = await loop.run_in_executor(decoders, _read, content, called, station.engine, shown_side, options.max_pixels)
        except Refusal as refusal:
            await loop.run_in_executor(decoders, finish, Verdict(called, UNREADABLE, station.threshold, problem=refusal.detail))
            raise
        try:
            verdict = await asyncio.wrap_future(station.batcher.submit(picture))
        except QueueFull:
            raise _busy(f"{options.queue_length} pictures wait for {station.name} already") from None
        answer = await loop.run_in_executor(decoders, finish, verdict)
        metrics.latency.labels(station.name).observe(time.perf_counter() - begun)
        return JSONResponse(answer)

    return app


def plain_name(text: str) -> Path:
    """What a sender calls a picture, without folders and whatever does not print."""
    last = text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(letter for letter in last if letter.isprintable())[-LONGEST_NAME:].strip()
    return Path(name if name not in ("", ".", "..") else "unnamed")


def png_uri(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 as PNG inside an address that needs no file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def _received(request: Request) -> tuple[bytes, str]:
    """The picture's bytes and the file name that comes with them."""
    name = ""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data":
        try:
            form = await request.form(max_files=1, max_fields=10)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception as problem:  # a character set that is none, a header that the parser did not expect
            raise Refusal(400, "the form cannot be read; send one file as multipart/form-data") from problem
        try:
            file = next((value for value in form.values() if isinstance(value, UploadFile)), None)
            if file is None:
                raise Refusal(422, "there is no file in the form; send the picture as a file")
            content, name = await file.read(), file.filename or ""
        finally:
            await form.close()
    else:
        content = await request.body()
    if not content:
        raise Refusal(422, "there is no picture: the body is empty")
    return content, name


def _read(content: bytes, name: Path, engine: Engine, shown_side: int | None, max_pixels: int) -> Picture:
    """Decode a picture.

    Raises:
        Refusal: it has too many pixels, or it is no picture or a damaged one.
    """
    try:
        with images.opened(Upload(content, name), "picture", "send another one") as image:
            width, height = image.size
    except UserError as problem:
        status = {UnidentifiedImageError: 415, Image.DecompressionBombError: 413}.get(type(problem.__cause__), 422)
        raise Refusal(status, str(problem)) from problem
    if width * height > max_pixels:
        raise Refusal(413, f"picture {name} has {width} x {height} pixels, more than {max_pixels}; make it smaller")
    picture = read_picture(Upload(content, name), name, engine, shown_side)
    if picture.view is None:
        raise Refusal(422, picture.problem)
    return picture


def _findings_if_anomalous(verdict: Verdict) -> list[str]:
    """What is to be said should a person choose a threshold under this score."""
    if not verdict.branch_scores or verdict.problem:
        return verdict.findings
    return replace(verdict, verdict=ANOMALOUS, alarm=max(verdict.branch_scores, key=verdict.branch_scores.get)).findings


def _named(stations: dict[str, Station], name: str | None) -> Station:
    if name is None and len(stations) == 1:
        return next(iter(stations.values()))
    if name is None:
        raise Refusal(422, f"say which model: ?model= one of {', '.join(stations)}")
    if name not in stations:
        raise Refusal(404, f"there is no model of that name; there are {', '.join(stations)}")
    return stations[name]


def _busy(why: str) -> Refusal:
    return Refusal(503, f"{why}; try again in a second", **{"Retry-After": "1"})


def _answer(problem: HTTPException) -> JSONResponse:
    sentence = problem.detail if isinstance(problem, Refusal) else {
        404: "there is nothing at this address; the page is at /, pictures are scored at /score",
        405: "this address is asked in another way; /openapi.json says how"}.get(problem.status_code, problem.detail)
    return JSONResponse({"error": sentence}, problem.status_code, problem.headers)


def _in_words(problem: RequestValidationError) -> str:
    first = problem.errors()[0]
    return f"{first['loc'][-1]}: {first['msg']}"


async def _discard(receive: Receive) -> None:
    """Read what is still being sent, for a while: its sender reads no answer before."""
    async def rest() -> None:
        while (await receive()).get("more_body"):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), DISCARD_SECONDS)


def _fixed(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)
    return answer


_PICTURE = {"type": "string", "format": "binary"}
_SCORE_BODY = {"requestBody": {"required": True, "content": {
    "multipart/form-data": {"schema": {"type": "object", "properties": {"file": _PICTURE}, "required": ["file"]}},
    "application/octet-stream": {"schema": _PICTURE}, "image/*": {"schema": _PICTURE}}}}
_ERROR = {"content": {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}}
_SCORE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "predict.py's line about it; undecided where the model failed"},
    400: _ERROR | {"description": "The request cannot be understood"},
    401: _ERROR | {"description": "The token is missing or wrong"},
    404: _ERROR | {"description": "There is no such model"},
    408: _ERROR | {"description": "The picture did not arrive in time"},
    413: _ERROR | {"description": "Too many bytes or pixels"},
    415: _ERROR | {"description": "No picture, or in no format that is read here"},
    422: _ERROR | {"description": "No picture, a damaged one, or no model named where there are several"},
    503: _ERROR | {"description": "Too much to do; try again after Retry-After seconds"},
}
