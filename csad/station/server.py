"""Exported models over HTTP: POST a picture, get predict.py's line about it; GET / is a page for people. Needs no PyTorch.

Every answer that is no picture's verdict is {"error": one sentence}; none names a file of this machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from csad.data.label_colours import label_colour
from csad.data.listing import count
from csad.inference.engines import Engine
from csad.inference.overlays import data_uri
from csad.inference.verdicts import ANOMALOUS, UNREADABLE, Verdict
from csad.station.batching import QueueFull
from csad.station.daily_log import DailyLog
from csad.station.gate import RequestError, RequestLimits, answer_of, overloaded
from csad.station.station import Metrics, Options, Station
from csad.station.upload import decoded, decoded_alone, decoded_bytes, plain_name, received_from

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
}
OVERLAY_SIDE = 512  # longer side in pixels of each of the three pictures in an overlay
DECODERS = min(4, os.cpu_count() or 1)
LARGE_BYTES = 64 * 2**20  # decoded; larger pictures are decoded one at a time


def create_app(
    engines: dict[str, Engine], options: Options | None = None, log: DailyLog | None = None
) -> FastAPI:
    """The station as an ASGI app.

    Args:
        engines: by the names that requests call them.
        log: where every verdict goes before it is answered.

    Raises:
        UserError: a model does not know its threshold.
    """
    options = options or Options()
    metrics = Metrics()
    stations = {
        name: Station(name, engine, options, metrics.batches.labels(name).observe)
        for name, engine in engines.items()
    }
    for station in stations.values():
        metrics.watch(station)
    decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decoder")
    large_decoder = ThreadPoolExecutor(1, thread_name_prefix="large decoder")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for station in stations.values():
            await asyncio.to_thread(station.batcher.close)
        decoders.shutdown()
        large_decoder.shutdown()

    # The usual pages for OpenAPI load scripts from a CDN; this one must work offline.
    app = FastAPI(
        title="CSAD inspection station",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        description="Scores pictures with exported models.",
    )
    app.add_middleware(RequestLimits, options=options, metrics=metrics)
    app.add_exception_handler(HTTPException, lambda request, problem: answer_of(problem, request.method))
    app.add_exception_handler(
        RequestValidationError, lambda _, problem: answer_of(RequestError(422, _in_words(problem)))
    )
    # Nobody is there to read it.
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=400))
    bug = RequestError(500, "something is wrong with this station; what it is stands in its own output")
    app.add_exception_handler(Exception, lambda *_: answer_of(bug))

    fixed: dict[str, Response] = {"/docs": RedirectResponse("/openapi.json")}
    for path, (file, content_type) in PAGE_FILES.items():
        fixed[path] = Response((PAGE / file).read_bytes(), media_type=content_type)
    for path, response in fixed.items():  # each is an ASGI app that sends itself
        app.router.routes.append(Route(path, response, methods=["GET"]))

    @app.get("/health", summary="Whether the models' threads live")
    async def health() -> JSONResponse:
        dead = [name for name, station in stations.items() if not station.batcher.alive]
        return JSONResponse(
            {"status": "ok" if not dead else "failed", "models": len(stations)}, 503 if dead else 200
        )

    @app.get("/models", summary="The models, their thresholds and what these promise")
    async def models() -> JSONResponse:
        return JSONResponse({"models": [station.description() for station in stations.values()]})

    @app.get("/metrics", summary="Prometheus metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/score", summary="Score one picture", openapi_extra=_SCORE_BODY, responses=_SCORE_ANSWERS)
    async def score(
        request: Request, model: str | None = None, name: str = "", overlay: bool = False
    ) -> JSONResponse:
        """The picture is the body itself, or the one file of a form. `name` names it in the answer; `overlay=1` adds a PNG."""
        begun = time.perf_counter()
        station = _named(stations, model)
        loop = asyncio.get_running_loop()
        shown_side = OVERLAY_SIDE if overlay and station.engine.has_maps else None

        def finish(verdict: Verdict) -> dict[str, Any]:
            answer = verdict.as_json() | {"model": station.name, "threshold_words": station.threshold_words}
            if log is not None:
                log.write(answer | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
            metrics.verdicts.labels(station.name, verdict.verdict).inc()
            if overlay:
                answer |= {
                    "overlay": None if verdict.drawing is None else data_uri(verdict.drawing),
                    "legend": [
                        {"component": component, "title": title, "colour": label_colour(component)}
                        for component, title in verdict.legend
                    ],
                    "findings_if_anomalous": findings_if_anomalous(verdict),
                }
            return answer

        with station.batcher.announce():
            try:
                content, file_name = await asyncio.wait_for(received_from(request), options.body_seconds)
            except TimeoutError:
                raise RequestError(
                    408, f"the picture did not arrive within {options.body_seconds:g} seconds"
                ) from None
            called = plain_name(name or file_name)
            try:
                size = await loop.run_in_executor(
                    decoders, decoded_bytes, content, called, options.max_pixels
                )
                pool, decode = (large_decoder, decoded_alone) if size > LARGE_BYTES else (decoders, decoded)
                picture = await loop.run_in_executor(
                    pool, decode, content, called, station.engine, shown_side
                )
            except RequestError as refusal:
                unreadable = Verdict(called, UNREADABLE, station.threshold, problem=refusal.detail)
                await loop.run_in_executor(decoders, finish, unreadable)
                raise
            try:
                future = station.batcher.submit(picture)
            except QueueFull:
                raise overloaded(
                    f"{count(options.queue_length, 'picture')} wait{'s' * (options.queue_length == 1)} for {station.name} already"
                ) from None
        verdict = await asyncio.wrap_future(future)
        answer = await loop.run_in_executor(decoders, finish, verdict)
        metrics.latency.labels(station.name).observe(time.perf_counter() - begun)
        return JSONResponse(answer)

    return app


def findings_if_anomalous(verdict: Verdict) -> list[str]:
    """What is to be said should a person choose a threshold under this score."""
    contributions = verdict.contributions
    if not contributions or verdict.problem:
        return verdict.findings
    largest = max(contributions, key=lambda branch: contributions[branch])
    return replace(verdict, verdict=ANOMALOUS, alarm=largest).findings


def _named(stations: dict[str, Station], name: str | None) -> Station:
    if name is None and len(stations) == 1:
        return next(iter(stations.values()))
    if name is None:
        raise RequestError(422, f"say which model: ?model= one of {', '.join(stations)}")
    if name not in stations:
        raise RequestError(404, f"there is no model '{name}'; this station has {', '.join(stations)}")
    return stations[name]


def _in_words(problem: RequestValidationError) -> str:
    first = problem.errors()[0]
    return f"{first['loc'][-1]}: {first['msg']}"


def _of_schema(schema: dict[str, Any], *content_types: str) -> dict[str, Any]:
    return {"content": {content_type: {"schema": schema} for content_type in content_types}}


_PICTURE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"file": _PICTURE}, "required": ["file"]}
_SCORE_BODY = {
    "requestBody": {"required": True} | _of_schema(_PICTURE, "application/octet-stream", "image/*")
}
_SCORE_BODY["requestBody"]["content"] |= _of_schema(_FORM, "multipart/form-data")["content"]
_ERROR = _of_schema({"type": "object", "properties": {"error": {"type": "string"}}}, "application/json")
_REFUSALS = {
    400: "The request cannot be understood",
    401: "The token is missing or wrong",
    403: "Asked under a foreign host name, or by a page of another site",
    404: "There is no such model",
    408: "The picture did not arrive in time",
    413: "Too many bytes or pixels",
    415: "Not a picture, or its format is not supported",
    422: "No picture, a damaged one, or no model named where there are several",
    503: "Too much to do; try again after Retry-After seconds",
}
_SCORE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "predict.py's line about it; undecided where the model failed"},
    **{status: _ERROR | {"description": meaning} for status, meaning in _REFUSALS.items()},
}
