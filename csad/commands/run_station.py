"""An inspection station: score pictures over HTTP with exported models, and a page for people. Needs no PyTorch.

    python serve.py --model ckpt/onnx_models/screw_bag.onnx
    curl --data-binary @photo.png http://127.0.0.1:8000/score

The page at / takes pictures that are dropped, pasted, chosen or taken by a camera. Models are called by their file names
without suffix: /score?model=screw_bag. /models says what there is, /health and /metrics (Prometheus) how it is going,
/openapi.json how it is called. Only this machine can connect unless --host says otherwise; then set a token. Web pages
of other sites are refused, as are host names that are not this machine's (--allowed_hosts adds some). --log keeps
every verdict. SIGTERM and Ctrl-C answer what is in flight, then end with status 0.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import socket
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import csad
from csad.errors import OptionParser, UserError, run_script
from csad.inference.engines import Engine
from csad.inference.runtimes import device_name, open_model
from csad.station.daily_log import DailyLog

import numpy as np

TOKEN_VARIABLE = "CSAD_TOKEN"


def main() -> None:
    try:
        from csad.station.connections import make_server
        from csad.station.gate import host_and_port, is_loopback
        from csad.station.server import create_app
        from csad.station.station import Options
    except ImportError as problem:
        raise UserError(
            f"{problem.name} is not installed; in the repository's folder, pip install '.[station]' installs what serving needs"
        ) from problem
    parser = OptionParser(
        path_option="--model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"CSAD {csad.__version__}")
    parser.add_argument(
        "--model", type=Path, nargs="+", required=True, help=".onnx, .xml or .pth written by export_model.py"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines connect"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        default=[],
        metavar="NAME",
        help="other host names to answer under, such as a proxy's; loopback names always work, and with "
        "a --host that others reach, any IP address and this machine's name",
    )
    parser.add_argument(
        "--token", help=f"that requests must bear (or the variable {TOKEN_VARIABLE}, which others cannot see)"
    )
    parser.add_argument(
        "--log", type=Path, metavar="NAME.jsonl", help="keep every verdict in NAME-YYYY-MM-DD.jsonl"
    )
    parser.add_argument(
        "--false_positive_rate",
        type=float,
        help="fraction of good images that may be called anomalous (default: what each model suggests)",
    )
    parser.add_argument("--threshold", type=float, help="call higher scores anomalous; for one model alone")
    defaults = asdict(Options())
    defaults["max_megabytes"] = defaults["max_body_bytes"] / 2**20
    defaults["max_megapixels"] = defaults["max_pixels"] / 1e6
    limits = {
        "batch_size": "pictures scored together at most",
        "batch_wait_ms": "for which an incomplete batch waits for pictures on their way",
        "queue_length": "pictures that may wait for each model",
        "max_requests": "in work at one time",
        "max_connections": "open at one time; fewer where this process may open too few files (ulimit -n)",
        "max_megabytes": "of a request",
        "max_megapixels": "of a picture",
        "header_seconds": "in which a request's headers have to arrive",
        "body_seconds": "in which a request's body has to arrive, and its answer has to be read",
    }
    for name, meaning in limits.items():
        parser.add_argument(f"--{name}", type=type(defaults[name]), default=defaults[name], help=meaning)
    parser.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1, mps; for .xml OpenVINO's GPU, NPU, AUTO, too",
    )
    args = parser.parse_args()
    for name in limits:
        if name != "batch_wait_ms" and not 0 < getattr(args, name) < math.inf:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be a number above 0")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is {args.port}; it must lie between 0 and 65535")
    if not 0 <= args.batch_wait_ms < math.inf:
        raise UserError(f"--batch_wait_ms is {args.batch_wait_ms}; it must be 0 or more")
    if args.threshold is not None and len(args.model) > 1:
        raise UserError("--threshold is for one model alone; the scores of several have different scales")
    allowed_hosts = set()
    for name in args.allowed_hosts:
        host = host_and_port(name)
        if host is None or host[1]:
            raise UserError(f"--allowed_hosts names {name}; it must be a host name without http:// and port")
        allowed_hosts.add(host[0])
    options = Options(
        threshold=args.threshold,
        false_positive_rate=args.false_positive_rate,
        max_body_bytes=int(args.max_megabytes * 2**20),
        max_pixels=int(args.max_megapixels * 1e6),
        token=token_of(args.token),
        **{name: getattr(args, name) for name in limits if not name.startswith("max_mega")},
    )

    engines = {
        name: warmed_up(open_model(path, device_name(args.device, path)))
        for name, path in named(args.model).items()
    }
    with ExitStack() as stack:
        log = stack.enter_context(closing(DailyLog(args.log.expanduser()))) if args.log else None
        listening = stack.enter_context(listen(args.host, args.port))
        local = is_loopback(listening.getsockname()[0])
        own_names = set() if local else {args.host.lower(), socket.gethostname().lower()}
        options = replace(options, any_address=not local, allowed_hosts=frozenset(own_names | allowed_hosts))
        app = create_app(engines, options, log)
        server = make_server(app, options)
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn takes both over, and after it has ended raises again what it got, which then does no harm.
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        models = ", ".join(
            f"{name} ({engine.runtime} on {engine.device}, {engine.precision})"
            for name, engine in engines.items()
        )
        print(f"{models} at {address(listening)}", flush=True)
        if not local and options.token is None:
            print("other machines can connect without a token; set --token", file=sys.stderr, flush=True)
        server.run(sockets=[listening])


def named(paths: list[Path]) -> dict[str, Path]:
    """Models by their file names without suffix; UserError if two are of one name."""
    models: dict[str, Path] = {}
    for path in paths:
        path = path.expanduser()
        if path.stem in models:
            raise UserError(f"{models[path.stem]} and {path} would both be called {path.stem}; rename one")
        models[path.stem] = path
    return models


def token_of(option: str | None) -> str | None:
    """Raises UserError for a token that no header can carry; an empty one would let nobody in, or everybody."""
    token = os.environ.get(TOKEN_VARIABLE) if option is None else option
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            f"the token (--token or {TOKEN_VARIABLE}) must be one or more ASCII letters, digits and signs, "
            "without spaces"
        )
    return token


def warmed_up(engine: Engine) -> Engine:
    """The engine after its first picture, which takes longer than all others."""
    blank = np.zeros((1, 3, engine.size, engine.size), np.uint8)
    engine.predict(blank) if engine.has_maps else engine.score(blank)
    return engine


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address is not this machine's, or the port is taken."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=2048)
        # What connects takes it over: an answer's headers and body go out in two writes, and the second would wait for 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return listening
    except socket.gaierror as problem:
        raise UserError(
            f"there is no address called {host}; choose another --host, such as 127.0.0.1"
        ) from problem
    except OSError as problem:
        why = {
            errno.EADDRINUSE: "another program uses it; end that, or choose another --port",
            errno.EADDRNOTAVAIL: "this machine has no such address; choose another --host",
            errno.EACCES: "no permission; choose a --port above 1023",
        }.get(problem.errno or 0, f"{os.strerror(problem.errno or 0)}; choose another --port or --host")
        raise UserError(f"cannot listen on {host} port {port}: {why}") from problem


def address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def run() -> None:
    """The installed command."""
    run_script(main)
