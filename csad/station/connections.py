"""HTTP connections with time limits, fewer of them than files may be open, and a log that cannot fill the disk.

uvicorn only limits the time between two requests of a connection. Here the headers and the body of a request have to
arrive in time, and the client has to read its answer in time. If there are too many connections, a new one closes the
one that has been silent longest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from functools import partial
from typing import Any

from csad.errors import UserError
from csad.station.station import Options

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

ACCEPTED_TOGETHER = 16  # connections per turn of the event loop; a few turns pass before they are counted
OWN_FILES = 32 + 6 * ACCEPTED_TOGETHER  # libraries, log, and connections that are not counted yet
BODY_GRACE_SECONDS = 5.0  # after the app's own limit, so that the sender gets its answer first
LOG_SECONDS = 60.0  # between two lines of the same kind
logger = logging.getLogger("uvicorn.error")


def make_server(app: ASGIApp, options: Options) -> uvicorn.Server:
    """A server for `app` within the limits of `options`; UserError if this process may open too few files."""
    protocol: Any = partial(TimedProtocol, options=options, max_connections=connection_limit(options))
    # A client that is still sending is waited for as long as it may take, and its verdict as long again.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=protocol,
        ws="none",
        lifespan="on",
        proxy_headers=False,
        backlog=ACCEPTED_TOGETHER,
        timeout_graceful_shutdown=int(2 * options.body_seconds) + 1,
    )
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(_once_per_minute)
    return uvicorn.Server(config)


def connection_limit(options: Options) -> int:
    """Connections that may be open at a time, each request's upload perhaps in a temporary file of its own;
    UserError if the limit on open files leaves no room."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return options.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return options.max_connections
    room = files - OWN_FILES
    if room < 2:
        raise UserError(
            f"this process may open only {files} files, too few for a station; allow more (ulimit -n 1024)"
        )
    return min(options.max_connections, max(room - options.max_requests, room // 2))


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection with time limits.

    Args:
        max_connections: open at a time, of the whole server.
    """

    def __init__(self, *args: Any, options: Options, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._options, self._max_connections = options, max_connections
        self._timed_state: Any = None  # the sender's state that _arrival_timer belongs to
        self._arrival_timer: asyncio.TimerHandle | None = None
        self._departure_timer: asyncio.TimerHandle | None = None
        self._surplus = False  # opened when all others were at work
        self.silent_since = 0.0
        self.aborted = False

    @property
    def answers(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def abort(self) -> None:
        """Close at once, whatever has not been sent yet."""
        self.aborted = True
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # pause_writing tells of every answer that is not taken at once
        self.silent_since = self.loop.time()
        self._time_arrival()
        if len(self.connections) > self._max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if self._surplus and len(self.connections) > self._max_connections:
            # Not before: closed with its request unread, the connection would be reset, and the answer lost.
            self._refuse()
            return
        self._surplus = False
        super().data_received(data)
        self._time_arrival()

    def on_response_complete(self) -> None:
        self.silent_since = self.loop.time()
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE:  # until the next request begins, uvicorn's own limit holds
            self._stop_arrival_timer()
        self._time_arrival()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._departure_timer = self.loop.call_later(self._options.body_seconds, self.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_departure_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_arrival_timer()
        self._stop_departure_timer()
        super().connection_lost(exc)

    def _time_arrival(self) -> None:
        """Restart the timer if something else has to arrive now."""
        state = self.conn.their_state
        between_requests = state is h11.IDLE and self.timeout_keep_alive_task is not None
        if state is self._timed_state or between_requests:
            return
        self._stop_arrival_timer()
        self._timed_state = state
        seconds = {
            h11.IDLE: self._options.header_seconds,
            h11.SEND_BODY: self._options.body_seconds + BODY_GRACE_SECONDS,
        }.get(state)
        if seconds is not None and not self.transport.is_closing():
            self._arrival_timer = self.loop.call_later(seconds, self._arrival_timeout)

    def _arrival_timeout(self) -> None:
        # Browsers connect in advance and send nothing, which is nothing to log.
        if self._timed_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            logger.warning("connections were closed whose requests did not arrive in time")
        self.abort()

    def _make_room(self) -> None:
        connections: list[Any] = list(self.connections)
        open_connections = [other for other in connections if not other.aborted]
        if len(open_connections) <= self._max_connections:
            return
        logger.warning(
            "more than %d connections: those that have been silent longest are closed", self._max_connections
        )
        silent = [other for other in open_connections if other is not self and not other.answers]
        if silent:
            min(silent, key=lambda other: other.silent_since).abort()
        else:
            self._surplus = True

    def _refuse(self) -> None:
        """Answer with 503, without the app, and close."""
        body = json.dumps({"error": "too many connections; try again in a second"})
        lines = [
            "HTTP/1.1 503 Service Unavailable",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Retry-After: 1",
            "Connection: close",
            "",
            body,
        ]
        self.transport.write("\r\n".join(lines).encode())
        self.transport.close()

    def _stop_arrival_timer(self) -> None:
        if self._arrival_timer is not None:
            self._arrival_timer.cancel()
        self._arrival_timer = self._timed_state = None

    def _stop_departure_timer(self) -> None:
        if self._departure_timer is not None:
            self._departure_timer.cancel()
            self._departure_timer = None


class OncePerMinute(logging.Filter):
    """Passes one record of a kind per `LOG_SECONDS`, with the number of those held back before it.

    The traceback of an OSError (too many open files, ...) becomes one line; those of programming errors stay.
    """

    def __init__(self) -> None:
        super().__init__()
        # kind -> time of the last record that passed, number held back since
        self._passed: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        problem = record.exc_info[1] if record.exc_info else None
        kind = (record.name, record.pathname, record.lineno, type(problem), str(record.msg)[:20])
        now = time.monotonic()
        passed, held_back = self._passed.get(kind, (-LOG_SECONDS, 0))
        if now - passed < LOG_SECONDS:
            self._passed[kind] = (passed, held_back + 1)
            return False
        self._passed[kind] = (now, 0)
        message = record.getMessage()
        if isinstance(problem, OSError):
            message, record.exc_info, record.exc_text = f"{message.splitlines()[0]} ({problem})", None, None
        record.msg, record.args = message + (f" ({held_back} more like this before)" if held_back else ""), ()
        return True


_once_per_minute = OncePerMinute()
