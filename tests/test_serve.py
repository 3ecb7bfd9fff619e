"""The inspection station with an engine that knows the answers: verdicts, limits, hostile bodies, batches, log, ending."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

testclient = pytest.importorskip("fastapi.testclient", reason="serving needs fastapi (extra [station])")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

import csad  # noqa: E402
from csad.commands import run_station as serve  # noqa: E402
from csad.commands import score_images as predict  # noqa: E402
from csad.data import image_files  # noqa: E402
from csad.errors import UserError  # noqa: E402
from csad.inference.engines import METADATA_KEY  # noqa: E402
from csad.inference.inspection import judge, read_picture  # noqa: E402
from csad.inference.runtimes import open_model  # noqa: E402
from csad.station import connections, daily_log, server  # noqa: E402
from csad.station.batching import Batcher, QueueFull  # noqa: E402
from csad.station.daily_log import DailyLog  # noqa: E402
from csad.station.server import create_app  # noqa: E402
from csad.station.station import Options  # noqa: E402
from csad.station.upload import plain_name  # noqa: E402

from models.constants import MAP_SIZE, SIZE  # noqa: E402
from models.prediction import Prediction  # noqa: E402

ROOT = Path(__file__).parents[1]
FLAT = [0.6, 0.4]


class BrightEngine:
    """Scores a picture by its mean brightness, all of it LGST's share; black ones get NaN."""

    runtime, precision, device = "fake", "fp32", "cpu"
    branches, size = ["patchhist", "LGST"], SIZE

    def __init__(self, seconds: float = 0.0, **metadata):
        self.metadata = {
            "validation_scores": [float(value) for value in range(1, 101)],
            "histogram": {
                "mean": FLAT,
                "std": [0.1] * 2,
                "quarter_mean": [FLAT] * 4,
                "quarter_std": [[0.1] * 2] * 4,
            },
        } | metadata
        self.seconds, self.batches = seconds, []
        self.has_maps = self.metadata.get("with_map", True)

    def score(self, batch):
        assert batch.dtype == np.uint8 and batch.shape[1:] == (3, SIZE, SIZE)
        self.batches.append(len(batch))
        time.sleep(self.seconds)
        score = batch.reshape(len(batch), -1).mean(1, dtype=np.float64).astype(np.float32)
        return np.where(score == 0, np.nan, score)

    def predict(self, batch):
        score = self.score(batch)
        maps = np.zeros((len(batch), 2, MAP_SIZE, MAP_SIZE), np.float32)
        maps[:, 1, 16, 32] = 2
        return Prediction(
            score,
            np.stack([0 * score, score], 1),
            maps.max(1),
            maps,
            np.zeros((len(batch), SIZE, SIZE), np.uint8),
        )


def picture(value: int | np.ndarray = 50, kind: str = "PNG", size=(80, 60), **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(value) if isinstance(value, np.ndarray) else Image.new("RGB", size, (value,) * 3)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def station():
    """Start a station; returns its client."""
    clients = []

    def start(engines=None, log=None, **options):
        app = create_app(
            engines or {"bright": BrightEngine()}, Options(**{"batch_wait_ms": 0} | options), log
        )
        clients.append(testclient.TestClient(app, raise_server_exceptions=False).__enter__())
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def test_answers_are_predicts_lines(station):
    engine, content = (
        BrightEngine(),
        picture(np.random.default_rng(0).integers(90, 255, (60, 80, 3), dtype=np.uint8)),
    )
    client = station({"bright": engine})
    raw = client.post("/score?name=a.png", content=content)
    form = client.post("/score", files={"anything": ("C:\\lines\\a.png", content, "image/png")})
    assert raw.status_code == form.status_code == 200 and raw.json() == form.json()
    read = read_picture(io.BytesIO(content), Path("a.png"), engine, None)
    line = json.loads(json.dumps(judge([read], engine, 100.0)[0].as_json()))
    answer = raw.json()
    assert answer == line | {"model": "bright", "threshold_words": answer["threshold_words"]}
    assert (
        answer["verdict"] == "anomalous"
        and answer["threshold"] == 100
        and "1 good part in 101" in answer["threshold_words"]
    )
    assert answer["findings"] == ["component 1 is missing", "unusual surface at x 40, y 15"]


def test_scores_of_an_onnx_file_equal_predicts(station, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    graph = make.make_graph(
        [
            make.make_node("Cast", ["images"], ["float"], to=kinds.FLOAT),
            make.make_node("ReduceMean", ["float", "axes"], ["score"], keepdims=0),
        ],
        "mean",
        [make.make_tensor_value_info("images", kinds.UINT8, ["B", 3, SIZE, SIZE])],
        [make.make_tensor_value_info("score", kinds.FLOAT, ["B"])],
        [make.make_tensor("axes", kinds.INT64, [3], [1, 2, 3])],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    known = {
        "format_version": csad.FORMAT_VERSION,
        "raw_input": True,
        "with_map": False,
        "validation_scores": [float(value) for value in range(1, 101)],
    }
    make.set_model_props(model, {METADATA_KEY: json.dumps(known)})
    onnx.save(model, tmp_path / "mean.onnx")
    rng = np.random.default_rng(3)
    for index, kind in enumerate(("PNG", "JPEG", "BMP", "PNG", "TIFF")):
        pixels = rng.integers(40 * index, 255, (60 + index, 80, 3), dtype=np.uint8)
        (tmp_path / f"{index}.{kind.lower()}").write_bytes(picture(pixels, kind))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "predict.py",
            str(tmp_path),
            "--model",
            str(tmp_path / "mean.onnx"),
            "--output",
            str(tmp_path / "out"),
        ],
    )
    with pytest.raises(SystemExit):
        predict.main()
    client = station({"mean": open_model(tmp_path / "mean.onnx", "cpu")})
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and {line["verdict"] for line in lines} == {"anomalous"}
    for line in lines:
        answer = client.post("/score", content=Path(line["image"]).read_bytes()).json()
        assert (
            answer["score"] == pytest.approx(line["score"], abs=1e-6)
            and answer["threshold"] == line["threshold"]
        )


def test_an_overlay_shows_three_pictures_and_what_another_threshold_would_find(station):
    answer = station().post("/score?overlay=1", content=picture(50)).json()
    assert answer["verdict"] == "normal" and not answer["findings"]
    assert answer["findings_if_anomalous"] == ["component 1 is missing", "unusual surface at x 40, y 15"]
    assert answer["legend"] == [{"component": 1, "title": "component 1", "colour": "#e69f00"}]
    kind, _, data = answer["overlay"].partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and shown.size == (3 * 80 + 2 * 4, 60)
    scores_only = (
        station({"flat": BrightEngine(with_map=False)}).post("/score?overlay=1", content=picture(50)).json()
    )
    assert scores_only["overlay"] is None and scores_only["score"] == 50


def test_several_models_by_name(station):
    client = station({"a": BrightEngine(), "b": BrightEngine(threshold=10.0)})
    assert client.post("/score?model=a", content=picture()).json()["verdict"] == "normal"
    answer = client.post("/score?model=b", content=picture()).json()
    assert (answer["verdict"], answer["threshold_words"]) == ("anomalous", "set in the model")
    for query, status in (
        ("", 422),
        ("?model=c", 404),
        ("?model=../a", 404),
        ("?overlay=perhaps&model=a", 422),
    ):
        answer = client.post(f"/score{query}", content=picture())
        assert answer.status_code == status and answer.json()["error"]
    described = client.get("/models").json()["models"]
    assert [one["name"] for one in described] == ["a", "b"] and described[0]["validation_scores"][-1] == 100


def test_a_score_that_is_not_finite_is_undecided(station):
    client = station()
    answer = client.post("/score?overlay=1", content=picture(0))
    assert answer.status_code == 200
    assert (
        answer.json()["verdict"] == "undecided"
        and answer.json()["score"] is None
        and answer.json()["problem"]
    )
    assert 'csad_verdicts_total{model="bright",verdict="undecided"} 1.0' in client.get("/metrics").text


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10000)))
        + chunk(b"IEND", b"")
    )


def hostile() -> dict[str, bytes]:
    good, jpeg, tiff = picture(), picture(kind="JPEG"), picture(kind="TIFF")
    rng = np.random.default_rng(1)
    frames = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (10, 90)]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    kinds = {}
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000"):
        buffer = io.BytesIO()
        noise.save(buffer, kind)
        kinds[f"half a {kind}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    return kinds | {
        "empty": b"",
        "one byte": b"\x00",
        "zeros": bytes(5000),
        "noise": rng.bytes(5000),
        "text": b"hello",
        "path": b"/etc/passwd",
        "url": b"http://127.0.0.1/x.png",
        "html": b"<html><script>alert(1)</script>",
        "json": b'{"image": "/etc/passwd"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "pdf": b"%PDF-1.7\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "zip": b"PK\x03\x04" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00cos\nsystem\n.",
        "elf": b"\x7fELF" + bytes(60),
        "only magic": good[:8],
        "header alone": good[:33],
        "wrong checksum": good[:29] + b"\0\0\0\0" + good[33:],
        "twice cut": good[:40] + good[50:],
        "jpeg magic": jpeg[:3],
        "jpeg noise": jpeg[:20] + rng.bytes(500),
        "tiff offset": tiff[:4] + b"\xff" * 4,
        "bomb": png_bomb(30000, 30000),
        "small bomb": png_bomb(9000, 9000),
        "long bomb": png_bomb(2**31 - 1, 1),
        "no pixels": png_bomb(0, 0),
        "bmp sizes": b"BM" + b"\xff" * 60,
        "gif frames": animated.getvalue(),
        "ppm bomb": b"P6 99999 99999 255\n",
        "ppm word": b"P6 a b c\n",
        "pfm nan": b"Pf\n2 2\n-1\n" + struct.pack("<4f", *[float("nan")] * 4),
        "webp riff": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(30),
        "icon": b"\0\0\1\0" + bytes(60),
        "qoi bomb": b"qoif" + struct.pack(">II", 60000, 60000) + b"\3\0",
        "psd": b"8BPS" + bytes(60),
    }


def test_hostile_bodies_get_a_sentence_and_the_station_lives(station, caplog):
    client = station(max_body_bytes=200_000)
    bodies = hostile()
    assert len(bodies) >= 40
    for name, body in bodies.items():
        for answer in (
            client.post("/score", content=body),
            client.post("/score?overlay=1", files={"file": ("x.png", body)}),
        ):
            assert answer.status_code in (413, 415, 422), (name, answer.status_code, answer.text)
            assert set(answer.json()) == {"error"}, name
            assert not re.search(r"Traceback|0x[0-9a-f]{6}|/tmp|\.py|<_io", answer.text), answer.text
    assert client.post("/score", content=picture(1, size=(1, 1))).json()["verdict"] == "normal"
    assert client.post("/score", content=picture()).json()["score"] == 50
    assert not [record for record in caplog.records if record.exc_info]


FORM = "multipart/form-data; boundary=a"
TEXT_PART = b'--a\r\ncontent-disposition: form-data; name="f"\r\n\r\ntext\r\n--a--\r\n'


@pytest.mark.parametrize(
    "headers, body, status",
    [
        ({"content-type": "multipart/form-data"}, b"x", 400),
        ({"content-type": "multipart/form-data; boundary="}, b"x", 400),
        ({"content-type": FORM}, b"no boundary here", 400),
        ({"content-type": FORM}, TEXT_PART, 422),
        ({"content-type": FORM + "; charset=base64"}, TEXT_PART, (400, 422)),
        ({"content-type": FORM}, b"--a\r\n" + b"x" * 60_000 + b"\r\n", 400),
        ({"content-type": "multipart/form-data; boundary=" + "a" * 9000}, b"--a", 400),
        ({"content-type": "\xff\xfe"}, b"x", 415),
        ({"x-large": "a" * 50_000}, b"x", 415),
        ({}, b"a" * 200_001, 413),
        ({"transfer-encoding": "chunked"}, "chunks", 413),
    ],
)
def test_hostile_requests_get_a_sentence(station, headers, body, status):
    client = station(max_body_bytes=200_000)
    content = (bytes(1000) for _ in range(300)) if body == "chunks" else body
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = client.post("/score", content=content, headers=headers)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert set(answer.json()) == {"error"}
    assert client.get("/health").json() == {"status": "ok", "models": 1}


@pytest.mark.parametrize(
    "given, name",
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\a\\b.png", "b.png"),
        ("a/", "a"),
        ("a\r\nSet-Cookie: x\0.png", "aSet-Cookie: x.png"),
        ("\u202egnp.exe", "gnp.exe"),
        ("x" * 500, "x" * 200),
        ("\ud800.png", ".png"),
        ("Schraube ü.png", "Schraube ü.png"),
    ],
)
def test_names_of_pictures_are_names_alone(given, name):
    assert str(plain_name(given)) == name


@pytest.mark.parametrize("given", ["", "..", "\n"])
def test_pictures_without_a_name_are_called_by_their_time(given):
    names = [str(plain_name(given)) for _ in range(2)]
    assert all(re.fullmatch(r"picture-\d{8}-\d{6}-\d{6}", name) for name in names) and names == sorted(names)


def test_an_unreadable_picture_is_told_its_sender_in_one_way(station):
    client = station()
    for body in (b"no picture", hostile()["half a PNG"], hostile()["pfm nan"]):
        said = client.post("/score?name=cut.png", content=body).json()["error"]
        assert said.startswith("picture cut.png ") and said.endswith("; send another one")


def test_what_is_said_to_a_sender_leaves_the_name_as_it_is(station):
    client, several = station(), io.BytesIO()
    Image.new("L", (8, 8)).save(several, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8))])
    name = "image ; replace it or leave it out.png"
    for body, reason in (
        (b"no picture", "cannot be read (its format is not supported); send another one"),
        (several.getvalue(), "has 2 pages or frames, expected one; send each as a file of its own"),
    ):
        assert (
            client.post("/score", params={"name": name}, content=body).json()["error"]
            == f"picture {name} {reason}"
        )


def test_other_addresses_and_methods_get_a_sentence(station):
    client = station()
    for method, path, status in (
        ("GET", "/score", 405),
        ("POST", "/", 405),
        ("GET", "/../serve.py", 404),
        ("GET", "/app.js/..%2f", 404),
        ("GET", "/page/index.html", 404),
        ("DELETE", "/models", 405),
        ("GET", "/docs/x", 404),
    ):
        answer = client.request(method, path)
        assert (answer.status_code, set(answer.json())) == (status, {"error"}), path
        if path == "/score":
            assert answer.json()["error"].startswith("this address takes POST, not GET;")
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    everything = page.text + client.get("/app.js").text + client.get("/style.css").text
    assert not re.search(r"https?://", re.sub(r"http://www\.w3\.org/\S+", "", everything))
    assert "/score" in client.get("/docs").json()["paths"]


def test_an_engine_that_fails_is_a_500_without_a_traceback(station):
    engine = BrightEngine()
    client = station({"bright": engine})
    works, engine.predict = engine.predict, lambda batch: 1 / 0
    answer = client.post("/score", content=picture())
    assert answer.status_code == 500 and set(answer.json()) == {"error"} and "division" not in answer.text
    engine.predict = works
    assert client.post("/score", content=picture()).status_code == 200


def test_the_token_is_wanted_everywhere_but_for_page_and_health(station):
    client = station(token="secret")
    for path in ("/", "/app.js", "/style.css", "/health"):
        assert client.get(path).status_code == 200
    for headers in (
        {},
        {"Authorization": "secret"},
        {"Authorization": "Bearer secre"},
        {"Authorization": b"Bearer secr\xe9t"},
        {"Authorization": "Basic secret"},
    ):
        for answer in (
            client.post("/score", content=picture(), headers=headers),
            client.get("/models", headers=headers),
            client.get("/metrics", headers=headers),
            client.get("/openapi.json", headers=headers),
        ):
            assert (
                answer.status_code == 401
                and answer.headers["www-authenticate"] == "Bearer"
                and "secret" not in answer.text
            )
    assert (
        client.post("/score", content=picture(), headers={"Authorization": "Bearer secret"}).status_code
        == 200
    )


def test_requests_that_come_together_are_scored_together(station):
    engine = BrightEngine(seconds=0.1)
    client = station({"bright": engine}, batch_size=4)
    with ThreadPoolExecutor(8) as clients:
        values = [*range(60, 76)]
        answers = list(
            clients.map(lambda value: client.post("/score", content=picture(value)).json(), values)
        )
    assert [answer["score"] for answer in answers] == values
    assert max(engine.batches) == 4 and len(engine.batches) < 12


def test_a_full_queue_is_a_503_with_a_sentence(station):
    client = station({"bright": BrightEngine(seconds=0.3)}, batch_size=1, queue_length=1)
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: client.post("/score", content=picture()), range(6)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and len(refused) < 6
    assert (
        refused[0].headers["retry-after"] == "1"
        and "1 picture waits for bright" in refused[0].json()["error"]
    )
    client = station({"bright": BrightEngine(seconds=0.3)}, max_requests=2)
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: client.post("/score", content=picture()), range(6)))
    assert {answer.status_code for answer in answers} == {200, 503}


def test_a_body_that_does_not_arrive_is_a_408():
    async def slow() -> list[dict]:
        async def receive():
            await asyncio.sleep(5)

        sent = []

        async def send(message):
            sent.append(message)

        app = create_app({"bright": BrightEngine()}, Options(body_seconds=0.1))
        await app(
            {
                "type": "http",
                "method": "POST",
                "path": "/score",
                "raw_path": b"/score",
                "query_string": b"",
                "headers": [],
                "http_version": "1.1",
                "scheme": "http",
                "root_path": "",
            },
            receive,
            send,
        )
        return sent

    begin, body, *_ = asyncio.run(slow())
    assert begin["status"] == 408 and "did not arrive" in json.loads(body["body"])["error"]


@pytest.fixture
def listening_station():
    """Serve the bright engine as serve.py does; returns its port."""
    started = []

    def start(engine=None, **options):
        options = Options(**{"header_seconds": 0.5, "body_seconds": 0.5} | options)
        running = connections.make_server(create_app({"bright": engine or BrightEngine()}, options), options)
        listening = serve.listen("127.0.0.1", 0)
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        started.append((running, thread, listening))
        return listening.getsockname()[1]

    yield start
    for running, thread, listening in started:
        running.should_exit = True
        thread.join(10)
        listening.close()


def sent_to(port: int, content: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(content)
    return client


def trickle(client: socket.socket, content: bytes, seconds: float = 20.0) -> float:
    """Send a byte now and then until the other side hangs up; returns the seconds until then."""
    begun = time.monotonic()
    with suppress(OSError):
        while time.monotonic() - begun < seconds:
            client.sendall(content)
            time.sleep(0.05)
            client.setblocking(False)
            try:
                if client.recv(4096) == b"":
                    break
            except BlockingIOError:
                pass
            client.setblocking(True)
    return time.monotonic() - begun


def health_of(port: int) -> bytes:
    with sent_to(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as client:
        answer = b""
        while part := client.recv(4096):
            answer += part
        return answer


HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "sent, answer", [(b"", b""), (b"G", b""), (HEAD, b""), (HEAD + b"\r\n" + HEAD, b"HTTP/1.1 200 ")]
)
def test_headers_that_do_not_arrive_end_the_connection(listening_station, sent, answer):
    port = listening_station()
    with sent_to(port, sent) as client:
        received = b""
        while part := client.recv(4096):
            received += part
    assert received.startswith(answer) and bool(received) == bool(answer)
    assert health_of(port).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "begin, more",
    [
        (HEAD, b"x: y\r\n"),
        (HEAD + b"\r\n" + HEAD, b"x: y\r\n"),
        (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n", b"x"),
    ],
)
def test_what_trickles_for_ever_ends(listening_station, monkeypatch, begin, more):
    monkeypatch.setattr(connections, "BODY_GRACE_SECONDS", 0.5)
    port = listening_station()
    with sent_to(port, begin) as client:
        assert 0.3 < trickle(client, more) < 8
    assert health_of(port).startswith(b"HTTP/1.1 200")


def test_a_request_in_several_parts_and_several_on_one_connection_are_answered(listening_station):
    port = listening_station(header_seconds=3.0)
    with sent_to(port) as client:
        for _ in range(3):
            for part in (HEAD[:9], HEAD[9:], b"\r\n"):
                client.sendall(part)
                time.sleep(0.05)
            assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_an_answer_that_nobody_takes_ends_the_connection(listening_station):
    port = listening_station(body_seconds=1.0)
    noise = picture(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(20)
        client.connect(("127.0.0.1", port))
        request = (
            b"POST /score?overlay=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(noise)
            + noise
        )
        with pytest.raises(ConnectionError):  # it asks and never reads until the other side hangs up
            for _ in range(100):
                client.sendall(request)
    assert health_of(port).startswith(b"HTTP/1.1 200")


def test_silent_connections_make_room_for_new_ones(listening_station, caplog):
    port = listening_station(max_connections=8, header_seconds=60.0, body_seconds=60.0)
    half_sent = (b"", HEAD, b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
    silent = [sent_to(port, half_sent[index % 3]) for index in range(40)]
    begun = time.monotonic()
    for _ in range(5):
        assert health_of(port).startswith(b"HTTP/1.1 200")
    assert time.monotonic() - begun < 10
    for client in silent:
        client.close()
    assert len([record for record in caplog.records if "silent longest" in record.getMessage()]) <= 1


def test_where_every_connection_is_at_work_a_new_one_gets_a_503(listening_station):
    port = listening_station(BrightEngine(seconds=1.0), max_connections=2, body_seconds=20.0)
    body = picture()
    request = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    busy = [sent_to(port, request) for _ in range(2)]
    time.sleep(0.3)
    answer = health_of(port)
    assert answer.startswith(b"HTTP/1.1 503") and b"Retry-After: 1\r\n" in answer and b'"error"' in answer
    for client in busy:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of open files")
@pytest.mark.parametrize("files, limit", [(1 << 16, 256), (256, 64), (400, 208), (130, 1)])
def test_connections_stay_below_the_limit_of_open_files(monkeypatch, files, limit):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections.connection_limit(Options()) == limit
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    with pytest.raises(UserError, match="100 files"):
        connections.connection_limit(Options())


@pytest.mark.skipif(sys.platform == "win32", reason="limits of open files")
def test_more_connections_than_files_leave_the_station_answering_and_its_log_short(started):
    import resource

    process, url = started(files=160)
    port = int(url.rstrip("/").rpartition(":")[2])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    silent = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
        for _ in range(300):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            silent.append(client)
        time.sleep(0.5)
        for client in silent:
            with suppress(OSError):
                client.send(HEAD)
        assert health_of(port).startswith(b"HTTP/1.1 200")
    finally:
        for client in silent:
            client.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    process.terminate()
    assert process.wait(40) == 0
    lines = process.stderr.read().splitlines()
    assert len(lines) <= 3 and not any("Traceback" in line for line in lines)


def test_a_log_line_of_a_kind_comes_once_a_minute(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: clock[0])
    quiet = connections.OncePerMinute()
    try:
        raise OSError(24, "Too many open files")
    except OSError:
        trouble = sys.exc_info()

    def record():
        return logging.LogRecord(
            "asyncio", logging.ERROR, "x.py", 1, "socket.accept() failed\nsocket: 3", (), trouble
        )

    first = record()
    assert quiet.filter(first) and first.exc_info is None
    assert first.getMessage() == "socket.accept() failed ([Errno 24] Too many open files)"
    clock[0] += 59
    assert not any(quiet.filter(record()) for _ in range(5))
    clock[0] += 1
    again = record()
    assert quiet.filter(again) and "5 more" in again.getMessage()


def test_head_is_get_without_a_body(station, listening_station):
    client = station()
    for path, status in (("/health", 200), ("/", 200), ("/metrics", 200), ("/score", 405), ("/nothing", 404)):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
    with sent_to(
        listening_station(), HEAD.replace(b"GET", b"HEAD") + b"Connection: close\r\n\r\n"
    ) as socket_client:
        answer = socket_client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")


LOOPBACK_ONLY = {"allowed_hosts": frozenset()}
ELSEWHERE = {"allowed_hosts": frozenset({"station.example", "line-4"}), "any_address": True}


@pytest.mark.parametrize(
    "options, host, status",
    [
        (LOOPBACK_ONLY, "localhost", 200),
        (LOOPBACK_ONLY, "LOCALHOST:8000", 200),
        (LOOPBACK_ONLY, "localhost.:8000", 200),
        (LOOPBACK_ONLY, "127.0.0.1:8000", 200),
        (LOOPBACK_ONLY, "127.8.9.1", 200),
        (LOOPBACK_ONLY, "[::1]:8000", 200),
        (LOOPBACK_ONLY, "evil.example", 403),
        (LOOPBACK_ONLY, "127.0.0.1.evil.example:8000", 403),
        (LOOPBACK_ONLY, "localhost.evil.example", 403),
        (LOOPBACK_ONLY, "0.0.0.0:8000", 403),
        (LOOPBACK_ONLY, "192.0.2.7", 403),
        (LOOPBACK_ONLY, "a@localhost", 403),
        (LOOPBACK_ONLY, "", 403),
        (LOOPBACK_ONLY, "localhost:8000:1", 403),
        (ELSEWHERE, "192.0.2.7:8000", 200),
        (ELSEWHERE, "[2001:db8::1]:8000", 200),
        (ELSEWHERE, "localhost", 200),
        (ELSEWHERE, "Station.Example:443", 200),
        (ELSEWHERE, "line-4", 200),
        (ELSEWHERE, "evil.example", 403),
    ],
)
def test_only_this_machines_names_are_answered(station, options, host, status):
    client = station(**options)
    for answer in (
        client.get("/", headers={"Host": host}),
        client.get("/health", headers={"Host": host}),
        client.post("/score", content=picture(), headers={"Host": host}),
    ):
        assert answer.status_code == status, answer.text
        if status == 403:
            assert set(answer.json()) == {"error"} and "--allowed_hosts" in answer.text


@pytest.mark.parametrize(
    "host, origin, status",
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
        ("localhost", "http://localhost", 200),
        ("localhost:80", "http://localhost", 200),
        ("LOCALHOST:8000", "http://localhost:8000", 200),
        ("[::1]:8000", "http://[::1]:8000", 200),
        ("127.0.0.1:8000", "https://station.example", 200),
        ("station.example", "https://station.example", 200),
        ("127.0.0.1:8000", "http://127.0.0.1:9000", 403),
        ("127.0.0.1:8000", "http://evil.example", 403),
        ("127.0.0.1:8000", "null", 403),
        ("127.0.0.1:8000", "", 403),
        ("127.0.0.1:8000", "http://evil.example:8000", 403),
        ("127.0.0.1:8000", "http://127.0.0.1:8000.evil.example", 403),
        ("127.0.0.1:8000", "file://", 403),
        ("127.0.0.1:8000", "chrome-extension://127.0.0.1:8000", 403),
        ("127.0.0.1:8000", "http://evil.example#@127.0.0.1:8000", 403),
    ],
)
def test_pages_of_other_sites_can_neither_ask_nor_write_the_log(station, tmp_path, host, origin, status):
    log = DailyLog(tmp_path / "line.jsonl")
    client = station(log=log, allowed_hosts=frozenset({"station.example"}))
    answer = client.post("/score", content=picture(), headers={"Host": host, "Origin": origin})
    assert answer.status_code == status, answer.text
    assert client.get("/models", headers={"Host": host, "Origin": origin}).status_code == status
    assert len(list(tmp_path.glob("line-*.jsonl"))) == (status == 200)
    log.close()


def test_pages_under_the_stations_own_name_may_ask_where_any_name_is_allowed(station):
    client = station()
    assert (
        client.post("/score", content=picture(), headers={"Origin": "http://testserver"}).status_code == 200
    )
    assert (
        client.post("/score", content=picture(), headers={"Origin": "http://evil.example"}).status_code == 403
    )


def test_the_started_station_refuses_other_names(started):
    import httpx

    _, url = started()
    with httpx.Client(trust_env=False) as client:
        assert client.get(url + "health").status_code == 200
        assert client.get(url + "health", headers={"Host": "evil.example"}).status_code == 403
        assert (
            client.post(
                url + "score", content=picture(), headers={"Origin": "http://evil.example"}
            ).status_code
            == 403
        )
    _, url = started(args=["--allowed_hosts", "station.example", "--port", "0"], log="m.jsonl")
    with httpx.Client(trust_env=False) as client:
        assert client.get(url + "health", headers={"Host": "Station.example:443"}).status_code == 200
        assert client.get(url + "health", headers={"Host": "evil.example"}).status_code == 403
    _, url = started(args=["--host", "0.0.0.0", "--port", "0"], log="n.jsonl")
    url = url.replace("0.0.0.0", "127.0.0.1")
    with httpx.Client(trust_env=False) as client:
        for name, status in ((socket.gethostname(), 200), ("192.0.2.7:80", 200), ("evil.example", 403)):
            assert client.get(url + "health", headers={"Host": name}).status_code == status


def equal_pixels(
    width: int, height: int, depth: int, colour_type: int, channels: int, value: bytes = b"\xf0"
) -> bytes:
    """A PNG of one value, small however many pixels it has."""
    compressor = zlib.compressobj(9)
    row = b"\0" + value * (width * channels * depth // 8 // len(value))
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_bytes_after_decoding_are_bounded_before_it(station, monkeypatch):
    client = station(max_pixels=10_000)
    read = []
    monkeypatch.setattr("csad.station.upload.read_picture", lambda *args: read.append(args))
    deep = np.full((100, 100), 40_000, np.uint16)
    for name, body in {
        "RGBA 16": equal_pixels(100, 100, 16, 6, 4),
        "grey and alpha 16": equal_pixels(100, 100, 16, 4, 2),
        "RGB 16": equal_pixels(100, 100, 16, 2, 3),
    }.items():
        answer = client.post("/score?name=a.png", content=body)
        assert answer.status_code == 413 and "100 x 100 pixels" in answer.json()["error"], name
    assert client.post("/score", content=picture(deep[:, :99].repeat(2, 1))).status_code == 413
    assert not read
    monkeypatch.undo()
    for body in (
        picture(np.full((100, 100, 4), 200, np.uint8)),
        picture(deep),
        picture(200, size=(100, 100)),
        equal_pixels(70, 70, 16, 6, 4),
    ):
        assert client.post("/score", content=body).status_code == 200


def test_the_small_file_of_very_many_deep_pixels_is_refused(station):
    answer = station().post("/score?name=a.png", content=equal_pixels(7000, 7000, 16, 6, 4))
    assert answer.status_code == 413
    assert "7000 x 7000 pixels and takes 392 MB when decoded, more than 200" in answer.json()["error"]


@pytest.mark.parametrize(
    "kind, dtype, channels, expected",
    [
        ("PNG", np.uint16, 1, 3),
        ("PNG", np.uint8, 1, 3),
        ("PNG", np.uint8, 4, 4),
        ("TIFF", np.uint16, 1, 3),
        ("TIFF", np.float32, 1, 4),
        ("TIFF", np.int32, 1, 4),
        ("PPM", np.uint16, 1, 4),
        ("JPEG", np.uint8, 3, 3),
        ("WEBP", np.uint8, 4, 4),
        ("JPEG2000", np.uint16, 1, 3),
        ("BMP", bool, 1, 3),
    ],
)
def test_bytes_after_decoding_by_format(kind, dtype, channels, expected):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((10, 20, channels), dtype).squeeze()).save(buffer, kind)
    with image_files.opened(buffer) as image:
        assert image_files.decoded_bytes(image) == 200 * expected


def test_large_pictures_are_decoded_one_at_a_time_and_small_ones_beside_them(station, monkeypatch):
    monkeypatch.setattr(server, "LARGE_BYTES", 20_000)
    at_once, most = [0], [0]

    def slowly(*args):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.2)
        at_once[0] -= 1
        return read_picture(*args)

    client = station()
    with ThreadPoolExecutor(5) as clients:
        with monkeypatch.context() as patched:
            patched.setattr("csad.station.upload.read_picture", slowly)
            answers = list(
                clients.map(lambda _: client.post("/score", content=picture(size=(100, 100))), range(4))
            )
        assert most == [1] and {answer.status_code for answer in answers} == {200}
        begun, release = threading.Event(), threading.Event()

        def wait_if_large(source, name, *rest):
            if name.name == "large.png":
                begun.set()
                release.wait(20)
            return read_picture(source, name, *rest)

        with monkeypatch.context() as patched:
            patched.setattr("csad.station.upload.read_picture", wait_if_large)
            large = [
                clients.submit(client.post, "/score?name=large.png", content=picture(size=(100, 100)))
                for _ in range(4)
            ]
            assert begun.wait(20) and client.post("/score", content=picture()).status_code == 200
            release.set()
            assert {one.result().status_code for one in large} == {200}


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process as Linux tells it")
def test_the_memory_of_large_pictures_goes_back(started):
    import httpx

    process, url = started()

    def megabytes(line: str) -> int:
        return (
            int(re.search(line + r":\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) // 1024
        )

    with httpx.Client(timeout=120, trust_env=False) as client:
        assert client.post(url + "score", content=picture()).status_code == 200
        before = megabytes("VmRSS")
        for body, status in (
            (equal_pixels(3500, 3500, 16, 6, 4), 200),
            (equal_pixels(3500, 3500, 16, 6, 4, b"\0\1"), 422),
        ):
            answer = client.post(url + "score?name=a.png", content=body)
            assert answer.status_code == status, answer.text
            assert megabytes("VmRSS") < before + 60
    assert megabytes("VmHWM") < before + 450
    assert (
        "--" not in answer.json()["error"] and "the model does not know it either" in answer.json()["error"]
    )


def test_the_batcher_finishes_what_waits_and_then_takes_no_more():
    begun, gate = threading.Event(), threading.Event()

    def run(items):
        begun.set()
        gate.wait()
        if 3 in items:
            raise ValueError("three")
        return [2 * item for item in items]

    batcher = Batcher(run, batch_size=2, wait_seconds=0, queue_length=3)
    futures = [batcher.submit(1)]
    begun.wait(5)
    futures += [batcher.submit(item) for item in (2, 4, 3)]
    with pytest.raises(QueueFull):
        batcher.submit(5)
    gate.set()
    batcher.close()
    assert [one.result(0) for one in futures[:3]] == [2, 4, 8]
    with pytest.raises(ValueError, match="three"):
        futures[3].result(0)
    with pytest.raises(QueueFull):
        batcher.submit(6)
    assert not batcher.alive


def test_answers_leave_at_once():
    """uvicorn writes headers, then the body, which else waits 40 ms for the headers to be acknowledged."""
    with serve.listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()[:2]):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_batch_waits_only_for_what_is_on_its_way():
    sizes = []
    batcher = Batcher(
        lambda items: items, batch_size=2, wait_seconds=60, queue_length=3, on_batch=sizes.append
    )
    assert batcher.submit(1).result(5) == 1
    with batcher.announce():
        first = batcher.submit(2)
        time.sleep(0.2)
        assert not first.done()
        batcher.submit(3)
        assert first.result(5) == 2
    assert sizes == [1, 2]
    batcher.close()


def test_every_verdict_is_in_the_days_log_before_it_is_answered(station, tmp_path, monkeypatch):
    log = DailyLog(tmp_path / "line.jsonl")
    with pytest.raises(UserError, match="another process"):
        DailyLog(tmp_path / "line.jsonl")
    client = station(log=log)
    client.post("/score?name=a.png&overlay=1", content=picture(200))
    client.post("/score?name=b.png", content=b"text")
    (path,) = tmp_path.glob("line-*.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["image"], one["verdict"], one["model"]) for one in entries] == [
        ("a.png", "anomalous", "bright"),
        ("b.png", "unreadable", "bright"),
    ]
    assert "overlay" not in entries[0] and entries[0]["bytes"] == len(picture(200))

    class Later(daily_log.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz).replace(year=2099)

    monkeypatch.setattr(daily_log, "datetime", Later)
    client.post("/score?name=c.png", content=picture(200))
    assert len(path.read_text().splitlines()) == 2 and len(list(tmp_path.glob("line-2099-*.jsonl"))) == 1
    log.close()


def test_a_restarted_log_goes_on_after_the_last_whole_line(tmp_path):
    log = DailyLog(tmp_path / "line.jsonl")
    log.write({"image": "a" * 100_000})
    log.close()
    (path,) = tmp_path.glob("line-*.jsonl")
    with open(path, "ab") as file:
        file.write(b'{"image": "' + b"b" * 200_000)
    log = DailyLog(tmp_path / "line.jsonl")
    log.write({"image": "c"})
    log.close()
    assert [json.loads(line)["image"][0] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_verdict_that_cannot_be_logged_is_not_given(station, tmp_path):
    class FullDisk(DailyLog):
        def write(self, entry):
            raise OSError(28, "No space left on device", "/secret/place")

    answer = station(log=FullDisk(tmp_path / "x.jsonl")).post("/score", content=picture())
    assert answer.status_code == 500 and "secret" not in answer.text and "verdict" not in answer.json()


START = """
import sys
from csad import errors
from csad.commands import run_station as serve
sys.path.insert(0, "tests")
from test_serve import BrightEngine
serve.open_model = lambda path, device: BrightEngine(seconds={seconds})
errors.run_script(serve.main)
"""


@pytest.fixture
def started(tmp_path):
    """Start serve.py with the bright engine and a log; returns the process and its address."""
    processes = []

    def start(seconds: float = 0.0, files: int = 0, args=(), log: str = "l.jsonl"):
        code = (
            f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))"
            if files
            else ""
        )
        command = [
            sys.executable,
            "-c",
            code + START.format(seconds=seconds),
            "--model",
            "bright.onnx",
            "--port",
            "0",
            "--log",
            str(tmp_path / log),
            *args,
        ]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1], processes[-1].stdout.readline().split()[-1]

    yield start
    for process in processes:
        process.kill()


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in next(folder.glob("l-*.jsonl")).read_text().splitlines()]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_answers_what_is_in_flight_and_ends_with_status_0(started, tmp_path, number):
    import httpx

    process, url = started(seconds=1.0)
    with ThreadPoolExecutor(2) as clients, httpx.Client(timeout=30, trust_env=False) as idle:
        assert idle.get(url + "health").status_code == 200  # its connection stays open
        answers = [
            clients.submit(httpx.post, url + "score", content=picture(), timeout=30, trust_env=False)
            for _ in range(2)
        ]
        for _ in range(100):  # on a busy machine clients take a while to connect
            if "csad_requests_in_work 3.0" in idle.get(url + "metrics").text:  # with this one
                break
            time.sleep(0.02)
        process.send_signal(number)
        assert [one.result().json()["verdict"] for one in answers] == ["normal"] * 2
        with pytest.raises(httpx.TransportError):
            for _ in range(50):
                httpx.get(url + "health", trust_env=False)
                time.sleep(0.1)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    assert len(logged(tmp_path)) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_kill_9_loses_only_what_is_in_flight(started, tmp_path):
    import httpx

    process, url = started(seconds=0.05)
    answered = []

    def send() -> None:
        with httpx.Client(timeout=30, trust_env=False) as client:
            for number in range(1000):
                answered.append(client.post(f"{url}score?name={number}", content=picture()).json()["image"])

    with ThreadPoolExecutor(1) as clients:
        sending = clients.submit(send)
        while len(answered) < 5:
            time.sleep(0.01)
        process.kill()
        with pytest.raises(httpx.TransportError):
            sending.result()
    before = [one["image"] for one in logged(tmp_path)]
    assert before[: len(answered)] == answered and len(before) <= len(answered) + 1
    _, url = started()
    assert httpx.post(url + "score?name=again", content=picture(), trust_env=False).status_code == 200
    assert [one["image"] for one in logged(tmp_path)] == [*before, "again"]


def test_hostile_senders_get_a_4xx_over_a_socket(started):
    import httpx

    process, url = started()
    port = httpx.URL(url).port
    post = b"POST /score HTTP/1.1\r\nHost: x\r\n"
    for sent in (
        b"no http at all\r\n\r\n",
        b"\x16\x03\x01" + bytes(200) + b"\r\n\r\n",
        post + b"X-Large: " + b"a" * 200_000 + b"\r\n\r\n",
        post + b"X: y\r\n" * 20_000 + b"\r\n",
        post + b"Content-Length: -1\r\n\r\n",
        post + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        post + b"Content-Length: 99999999999\r\n\r\n",
        post.replace(b"POST /score", b"GET /../../etc/passwd") + b"\r\n",
        post.replace(b"POST /score", b"GET //etc/passwd") + b"\r\n",
        post.replace(b"POST /score", b"GET /%2e%2e/serve.py") + b"\r\n",
        post.replace(b"/score", b"/score?model=../bright") + b"Content-Length: 1\r\n\r\na",
        post.replace(b"/score", b"/score?name=/etc/passwd") + b"Content-Length: 1\r\n\r\na",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            with suppress(OSError):  # it may hang up before it has read everything
                client.sendall(sent)
            assert re.match(rb"HTTP/1.1 4\d\d ", client.recv(4096)), sent[:80]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(post + b"Content-Length: 1000\r\n\r\ncut off")
    with httpx.Client(timeout=30, trust_env=False) as client:
        for name, body in hostile().items():
            assert client.post(url + "score", content=body).status_code in (413, 415, 422), name
        assert client.post(url + "score", content=picture()).json()["score"] == 50
    process.terminate()
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    "args, words",
    [
        (["--model", "a.onnx", "b/a.onnx"], "would both be called a"),
        (["--model", "a.onnx", "--batch_size", "0"], "--batch_size is 0"),
        (["--model", "a.onnx", "b.onnx", "--threshold", "1"], "one model alone"),
        (["--model", "a.onnx", "--token", ""], "the token"),
        (["--model", "a.onnx", "--batch_wait_ms", "nan"], "--batch_wait_ms is nan"),
        (["--model", "a.onnx", "--port", "99999999"], "--port is 99999999"),
        (["--model", "a.onnx", "--allowed_hosts", "http://x"], "host name without"),
        (["--model", "a.onnx", "--allowed_hosts", "x", "y:80"], "names y:80"),
        (["--model", "a.onnx", "--max_connections", "0"], "--max_connections is 0"),
        (["--model", "a.onnx", "--header_seconds", "inf"], "--header_seconds is inf"),
        (["--model", "a.onnx", "--host", "203.0.113.7"], "cannot listen"),
    ],
)
def test_mistakes_get_a_sentence(monkeypatch, args, words):
    monkeypatch.setattr(sys, "argv", ["serve.py", *args])
    monkeypatch.setattr(serve, "open_model", lambda path, device: BrightEngine())
    with pytest.raises(UserError, match=words):
        serve.main()


def test_a_port_in_use_is_told_without_numbers_of_the_system():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError) as problem:
            serve.listen("127.0.0.1", taken.getsockname()[1])
    said = str(problem.value)
    assert "another program uses it; end that, or choose another --port" in said and "Errno" not in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("pytorch_models/pushpin.pth", "export_model.py makes it; did you mean pushpins.pth?"),
        ("pytorch_models/zebra.pth", "export_model.py makes it"),
        ("pytorch_models/pushpins.onnx", "pytorch_models/pushpins.pth, which needs PyTorch"),
        ("onnx_models/pushpins.onnx", "pytorch_models/pushpins.pth, which needs PyTorch"),
        ("onnx_models/screw-bag.onnx", "--format onnx makes it; did you mean screw_bag.onnx?"),
        ("openvino_models/screw_bag.xml", "export_model.py --format openvino makes it"),
    ],
)
def test_a_missing_model_is_told_with_what_may_be_meant(tmp_path, asked, said):
    for name in ("pytorch_models/pushpins.pth", "onnx_models/screw_bag.onnx"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    with pytest.raises(UserError) as problem:
        open_model(tmp_path / asked, "cpu")
    assert str(problem.value).startswith(f"{tmp_path / asked} is missing; ")
    assert str(problem.value).endswith(said)


def test_without_pytorch_a_pth_is_told_what_it_needs(tmp_path):
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['predict.py', '.', '--model', 'x.pth']\n"
    code += "from csad.commands import score_images; score_images.run()"
    (tmp_path / "a.png").write_bytes(picture())
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install -r requirements.txt" in done.stderr and "--format onnx" in done.stderr
    assert "[station]" not in done.stderr


def test_nothing_here_imports_torch():
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from csad.commands import score_images; from csad.commands import run_station\n"
    code += "from csad.station import server"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
