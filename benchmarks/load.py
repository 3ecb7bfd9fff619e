"""A running station under load, from this machine: throughput, latencies, errors and memory, beside the bare engine's speed.

    python serve.py --model ckpt/onnx_models/screw_bag.onnx &
    python -m benchmarks.load --model ckpt/onnx_models/screw_bag.onnx --images photos/ --requests 2000

``--clients`` send one picture after the other and wait for each answer. With ``--disturb`` two more connect: one that sends its
picture byte by byte, and one that sends garbage. The same pictures then go through the bare engine at several
batch sizes; the station must be idle meanwhile. Only loopback addresses are loaded, and not for longer than
``--seconds``. Exit status 1: something that a station should reach is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import itertools
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

from csad.data.image_files import SUFFIXES
from csad.errors import UserError, run_script
from csad.inference.engines import Engine
from csad.inference.inspection import InMemory, read_picture
from csad.inference.runtimes import device_name, open_model

import httpx
import numpy as np

from benchmarks.measuring import memory_mb, options_of, tell_missed

BATCH_SIZES = (1, 2, 4, 8)
BARE_PICTURES = 48  # scored for each batch size
SLOWEST = 10  # p99 in single latencies
GROWTH, FRACTION = 0.05, 0.9  # of memory; of the bare engine's throughput


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the station, on this machine")
    parser.add_argument(
        "--model", type=Path, required=True, help="the file that the station was started with"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures to send")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600, help="after which it ends in any case")
    parser.add_argument("--pid", type=int, help="of the station, for its memory (Linux)")
    parser.add_argument("--token")
    parser.add_argument("--disturb", action="store_true", help="add a slow client and one that sends garbage")
    args = parser.parse_args()
    require_loopback(args.url)
    paths = [path for path in sorted(args.images.iterdir()) if path.suffix.lower() in SUFFIXES]
    pictures = [path.read_bytes() for path in paths]
    if not pictures:
        raise UserError(f"no images in {args.images}")

    headers = {"Authorization": f"Bearer {args.token}"} if args.token else {}
    single, latencies, errors, seconds, (early, late) = asyncio.run(load(args, pictures, headers))
    rate = len(latencies) / seconds
    missed = [] if len(latencies) == args.requests and not errors else ["an answer to every request"]
    print(
        f"{args.clients} clients, {len(latencies)} answers in {seconds:.1f} s: {rate:.2f} pictures/s; "
        f"errors: {dict(errors) or 'none'}"
    )
    if latencies:
        p50, p99 = (1000 * float(np.quantile(latencies, fraction)) for fraction in (0.5, 0.99))
        print(
            f"latency p50 {p50:.0f} ms, p99 {p99:.0f} ms; one client alone {1000 * single:.0f} ms; "
            f"p99 is {p99 / 1000 / single:.1f} times that"
        )
        if p99 / 1000 >= SLOWEST * single:
            missed.append(f"p99 under {SLOWEST} times the latency of one client")
    if early and late:
        print(
            f"the station's memory {early:.0f} MB after a tenth, {late:.0f} MB at the end "
            f"({100 * (late / early - 1):+.1f} %)"
        )
        if late / early - 1 > GROWTH:
            missed.append(f"memory that grows by {GROWTH:.0%} at most")

    speeds = bare(open_model(args.model, device_name("auto", args.model)), pictures)
    of_batches = [
        f"batch {size} {alone:.2f} ({both:.2f} with decoding)" for size, (alone, both) in speeds.items()
    ]
    print(f"bare engine, pictures/s: {', '.join(of_batches)}")
    best = [max(column) for column in zip(*speeds.values())]
    print(
        f"the station reaches {rate / best[0]:.2f} of the best, {rate / best[1]:.2f} of the best with decoding"
    )
    missed += [] if rate >= FRACTION * best[0] else [f"{FRACTION} of the bare engine's best"]
    tell_missed(missed)


def require_loopback(url: str) -> None:
    host = urlsplit(url).hostname or ""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UserError(f"{url} is not on this machine; only a station of one's own may be loaded")


async def load(
    args: argparse.Namespace, pictures: list[bytes], headers: dict[str, str]
) -> tuple[float, list[float], Counter[str], float, tuple[float | None, float | None]]:
    """Median seconds of one client alone; latencies, errors and seconds under load; memory in MB early and at the end."""
    url, latencies, errors = f"{args.url.rstrip('/')}/score?model={args.model.stem}", [], Counter[str]()
    limits = httpx.Limits(max_connections=args.clients + 4)
    async with httpx.AsyncClient(headers=headers, timeout=60, trust_env=False, limits=limits) as client:
        alone = []
        for picture in itertools.islice(itertools.cycle(pictures), 12):
            begun = time.perf_counter()
            (await client.post(url, content=picture)).raise_for_status()
            alone.append(time.perf_counter() - begun)
        numbers, end, early = iter(range(args.requests)), time.perf_counter() + args.seconds, None

        async def one_client() -> None:
            nonlocal early
            for number in numbers:
                if time.perf_counter() > end:
                    return
                begun = time.perf_counter()
                try:
                    answer = await client.post(url, content=pictures[number % len(pictures)])
                except httpx.HTTPError as problem:
                    errors[type(problem).__name__] += 1
                    continue
                if answer.status_code == 200:
                    latencies.append(time.perf_counter() - begun)
                else:
                    errors[str(answer.status_code)] += 1
                if number == args.requests // 10:
                    early = memory_mb(pid=args.pid)

        disturbing = (slow, garbage) if args.disturb else ()
        disturbers = [asyncio.create_task(disturb(url, client, pictures[0])) for disturb in disturbing]
        begun = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(args.clients)))
        seconds = time.perf_counter() - begun
        for task in disturbers:
            if task.done():
                raise RuntimeError("a disturber gave up") from task.exception()
            task.cancel()
        return statistics.median(alone), latencies, errors, seconds, (early, memory_mb(pid=args.pid))


async def slow(url: str, client: httpx.AsyncClient, picture: bytes) -> None:
    async def drip() -> AsyncIterator[bytes]:
        for byte in picture:
            yield bytes([byte])
            await asyncio.sleep(0.2)

    while True:
        try:
            await client.post(url, content=drip())
        except httpx.HTTPError:
            await asyncio.sleep(0.2)


async def garbage(url: str, client: httpx.AsyncClient, picture: bytes) -> None:
    rng = np.random.default_rng(0)
    while True:
        answer = await client.post(url, content=picture[:100] + rng.bytes(10_000))
        if not 400 <= answer.status_code < 500 and answer.status_code != 503:
            raise RuntimeError(f"garbage got a {answer.status_code}: {answer.text}")
        await asyncio.sleep(0.05)


def view_of(picture: bytes, engine: Engine) -> np.ndarray:
    """As the model takes it; UserError if it cannot be judged."""
    decoded = read_picture(InMemory(picture, "to send"), "to send", engine, None)
    if decoded.view is None:
        raise UserError(decoded.problem)
    return decoded.view


def bare(engine: Engine, pictures: list[bytes]) -> dict[int, tuple[float, float]]:
    """Pictures a second by batch size: the engine alone, and with one thread that decodes and scores in turns."""
    sent, rates = list(itertools.islice(itertools.cycle(pictures), BARE_PICTURES)), {}
    for size in BATCH_SIZES:
        decoding = scoring = 0.0
        for start in range(-size, len(sent), size):  # the first batch warms up
            begun = time.perf_counter()
            batch = sent[max(start, 0) : max(start, 0) + size]
            views = np.stack([view_of(picture, engine) for picture in batch])
            decoded = time.perf_counter()
            (engine.predict if engine.has_maps else engine.score)(views)
            if start >= 0:
                decoding, scoring = decoding + decoded - begun, scoring + time.perf_counter() - decoded
        rates[size] = len(sent) / scoring, len(sent) / (decoding + scoring)
    return rates


if __name__ == "__main__":
    run_script(main)
