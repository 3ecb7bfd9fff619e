"""Who gets no verdict, and in which words: refusals, and what is refused before a body is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from contextlib import suppress

from csad.station.station import Metrics, Options

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/style.css", "/app.js", "/health")  # that need no token: the page asks for it
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]]+)(?::(\d+))?", re.IGNORECASE)
_ORIGIN = re.compile(r"(https?)://(.+)", re.IGNORECASE)
NOTHING_HERE = "there is nothing at this address; the page is at /, pictures are scored at /score"
DISCARD_SECONDS = 2.0  # for which the rest of a refused body is read, so that its sender sees the answer


class RequestError(HTTPException):
    """A request that gets no verdict: status and a sentence."""

    def __init__(self, status: int, sentence: str, **headers: str):
        super().__init__(status, sentence, headers or None)


def overloaded(why: str) -> RequestError:
    return RequestError(503, f"{why}; try again in a second", **{"Retry-After": "1"})


def answer_of(problem: HTTPException, method: str = "") -> JSONResponse:
    sentence = problem.detail
    allowed = sorted((problem.headers or {}).get("Allow", "").replace(",", " ").split())
    if problem.status_code == 405 and allowed:
        sentence = f"this address takes {' or '.join(allowed)}, not {method}; /openapi.json says more"
    elif problem.status_code == 404 and not isinstance(problem, RequestError):
        sentence = NOTHING_HERE
    return JSONResponse({"error": sentence}, problem.status_code, problem.headers)


def host_and_port(text: str) -> tuple[str, str] | None:
    """A Host header's name or address, lower case and without brackets, and port or ""; None if malformed."""
    match = _HOST.fullmatch(text)
    return (match[1].strip("[]").rstrip(".").lower(), match[2] or "") if match else None


def is_loopback(host: str) -> bool:
    """Whether a name or address always means the machine itself."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


class RequestLimits:
    """ASGI middleware: host, origin, token, number of requests and size of bodies, before any body is read; headers
    of every answer. HEAD is handled as GET; the server sends only the headers of its answer."""

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
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                added = [header for header in ours if header[0] not in present]
                message["headers"] = [*message["headers"], *added]
                if message["status"] >= 400:
                    self.metrics.refusals.labels(str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await discard(receive)
            await answer_of(refusal)(scope, receive, send_with_headers)
            return
        self.in_work += 1
        self.metrics.requests.set(self.in_work)
        try:
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}
            await self.app(scope, self._limited(receive), send_with_headers)
        finally:
            self.in_work -= 1
            self.metrics.requests.set(self.in_work)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> RequestError | None:
        refusal = self._foreign(headers)
        if refusal is not None:
            return refusal
        token = self.options.token
        if (
            token is not None
            and path not in OPEN_PATHS
            and not hmac.compare_digest(headers.get(b"authorization", b""), b"Bearer " + token.encode())
        ):
            return RequestError(
                401,
                "this station needs a token: send the header Authorization: Bearer TOKEN",
                **{"WWW-Authenticate": "Bearer"},
            )
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit():
            return RequestError(400, "Content-Length is not a number")
        if int(declared[:20]) > self.options.max_body_bytes:
            return self._too_large()
        if path == "/score" and self.in_work >= self.options.max_requests:
            return overloaded(f"{self.in_work} requests are in work already")
        return None

    def _foreign(self, headers: dict[bytes, bytes]) -> RequestError | None:
        """Refuse what a browser sends for a page of another site: under a host name that its owner points to this
        machine (DNS rebinding), or from another origin. Programs other than browsers may omit both headers."""
        if b"host" not in headers:
            return None
        host = host_and_port(headers[b"host"].decode("latin-1"))
        if host is None or not self._is_allowed(host[0]):
            return RequestError(
                403,
                "this station does not answer under this name; "
                "its operator can allow it with --allowed_hosts NAME",
            )
        if b"origin" not in headers:
            return None
        origin = _ORIGIN.fullmatch(headers[b"origin"].decode("latin-1"))
        sender = host_and_port(origin[2]) if origin else None
        if origin and sender:
            default = {"http": "80", "https": "443"}[origin[1].lower()]
            same = (sender[0], sender[1] or default) == (host[0], host[1] or default)
            if same or sender[0] in (self.options.allowed_hosts or ()):  # a proxy may have replaced Host
                return None
        return RequestError(403, "pages of other sites may not use this station")

    def _is_allowed(self, host: str) -> bool:
        allowed = self.options.allowed_hosts
        return (
            allowed is None
            or host in allowed
            or is_loopback(host)
            or (self.options.any_address and _address(host) is not None)
        )

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.options.max_body_bytes:
                if message.get("more_body"):
                    await discard(receive)
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> RequestError:
        return RequestError(
            413, f"the body is larger than {self.options.max_body_bytes} bytes; send a smaller file"
        )


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


async def discard(receive: Receive) -> None:
    """Read what is still being sent, for a while: its sender reads no answer before."""

    async def rest() -> None:
        while (await receive()).get("more_body"):
            pass

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(rest(), DISCARD_SECONDS)
