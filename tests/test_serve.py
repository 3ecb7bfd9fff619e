"""The inspection station with an engine that knows the answers: verdicts, limits, hostile bodies, batches, log, ending."""

from __future__ import annotations

import asyncio
import base64
import io
import json
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

testclient = pytest.importorskip("fastapi.testclient", reason="serving needs fastapi (requirements-predict.txt)")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")

import predict  # noqa: E402
import serve  # noqa: E402
from data import records  # noqa: E402
from data.images import SIZE  # noqa: E402
from deploy import daily_log  # noqa: E402
from deploy.batching import Batcher, QueueFull  # noqa: E402
from deploy.daily_log import DailyLog  # noqa: E402
from deploy.engines import METADATA_KEY, open_model  # noqa: E402
from deploy.inspection import judge, read_picture  # noqa: E402
from deploy.server import create_app  # noqa: E402
from deploy.station import Options  # noqa: E402
from deploy.upload import plain_name  # noqa: E402
from errors import UserError  # noqa: E402
from models.prediction import MAP_SIZE, Prediction  # noqa: E402

ROOT = Path(__file__).parents[1]
FLAT = [0.6, 0.4]


class BrightEngine:
    """Scores a picture by its mean brightness, all of it LGST's share; black ones get NaN."""

    runtime, precision, device = "fake", "fp32", "cpu"
    branches, size = ["patchhist", "LGST"], SIZE

    def __init__(self, seconds: float = 0.0, **metadata):
        self.metadata = {"validation_scores": [float(value) for value in range(1, 101)], "histogram": {
            "mean": FLAT, "std": [0.1] * 2, "quarter_mean": [FLAT] * 4, "quarter_std": [[0.1] * 2] * 4}} | metadata
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
        return Prediction(score, np.stack([0 * score, score], 1), maps.max(1), maps, np.zeros((len(batch), SIZE, SIZE), np.uint8))


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
        app = create_app(engines or {"bright": BrightEngine()}, Options(**{"batch_wait_ms": 0} | options), log)
        clients.append(testclient.TestClient(app, raise_server_exceptions=False).__enter__())
        return clients[-1]

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def test_answers_are_predicts_lines(station):
    engine, content = BrightEngine(), picture(np.random.default_rng(0).integers(90, 255, (60, 80, 3), dtype=np.uint8))
    client = station({"bright": engine})
    raw = client.post("/score?name=a.png", content=content)
    form = client.post("/score", files={"anything": ("C:\\lines\\a.png", content, "image/png")})
    assert raw.status_code == form.status_code == 200 and raw.json() == form.json()
    read = read_picture(io.BytesIO(content), Path("a.png"), engine, None)
    line = json.loads(json.dumps(judge([read], engine, 100.0)[0].as_json()))
    answer = raw.json()
    assert answer == line | {"model": "bright", "threshold_words": answer["threshold_words"]}
    assert answer["verdict"] == "anomalous" and answer["threshold"] == 100 and "0.99 %" in answer["threshold_words"]
    assert answer["findings"][0] == "unusual surface at x 40, y 15"


def test_scores_of_an_onnx_file_equal_predicts(station, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    make, kinds = onnx.helper, onnx.TensorProto
    graph = make.make_graph([
        make.make_node("Cast", ["images"], ["float"], to=kinds.FLOAT),
        make.make_node("ReduceMean", ["float", "axes"], ["score"], keepdims=0)],
        "mean", [make.make_tensor_value_info("images", kinds.UINT8, ["B", 3, SIZE, SIZE])],
        [make.make_tensor_value_info("score", kinds.FLOAT, ["B"])], [make.make_tensor("axes", kinds.INT64, [3], [1, 2, 3])])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    known = {"format_version": records.FORMAT_VERSION, "raw_input": True, "with_map": False,
             "validation_scores": [float(value) for value in range(1, 101)]}
    make.set_model_props(model, {METADATA_KEY: json.dumps(known)})
    onnx.save(model, tmp_path / "mean.onnx")
    rng = np.random.default_rng(3)
    for index, kind in enumerate(("PNG", "JPEG", "BMP", "PNG", "TIFF")):
        pixels = rng.integers(40 * index, 255, (60 + index, 80, 3), dtype=np.uint8)
        (tmp_path / f"{index}.{kind.lower()}").write_bytes(picture(pixels, kind))
    monkeypatch.setattr(sys, "argv", ["predict.py", str(tmp_path), "--model", str(tmp_path / "mean.onnx"),
                                      "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        predict.main()
    client = station({"mean": open_model(tmp_path / "mean.onnx", "cpu")})
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and {line["verdict"] for line in lines} == {"anomalous"}
    for line in lines:
        answer = client.post("/score", content=Path(line["image"]).read_bytes()).json()
        assert answer["score"] == pytest.approx(line["score"], abs=1e-6) and answer["threshold"] == line["threshold"]


def test_an_overlay_shows_three_pictures_and_what_another_threshold_would_find(station):
    answer = station().post("/score?overlay=1", content=picture(50)).json()
    assert answer["verdict"] == "normal" and not answer["findings"]
    assert answer["findings_if_anomalous"][0].startswith("unusual surface")
    kind, _, data = answer["overlay"].partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and shown.size == (3 * 80 + 2 * 4, 60)
    scores_only = station({"flat": BrightEngine(with_map=False)}).post("/score?overlay=1", content=picture(50)).json()
    assert scores_only["overlay"] is None and scores_only["score"] == 50


def test_several_models_by_name(station):
    client = station({"a": BrightEngine(), "b": BrightEngine(threshold=10.0)})
    assert client.post("/score?model=a", content=picture()).json()["verdict"] == "normal"
    answer = client.post("/score?model=b", content=picture()).json()
    assert (answer["verdict"], answer["threshold_words"]) == ("anomalous", "set in the model")
    for query, status in (("", 422), ("?model=c", 404), ("?model=../a", 404), ("?overlay=perhaps&model=a", 422)):
        answer = client.post(f"/score{query}", content=picture())
        assert answer.status_code == status and answer.json()["error"]
    described = client.get("/models").json()["models"]
    assert [one["name"] for one in described] == ["a", "b"] and described[0]["validation_scores"][-1] == 100


def test_a_score_that_is_not_finite_is_undecided(station):
    client = station()
    answer = client.post("/score?overlay=1", content=picture(0))
    assert answer.status_code == 200
    assert answer.json()["verdict"] == "undecided" and answer.json()["score"] is None and answer.json()["problem"]
    assert 'csad_verdicts_total{model="bright",verdict="undecided"} 1.0' in client.get("/metrics").text


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10000))) + chunk(b"IEND", b"")


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
        kinds[f"half a {kind}"] = buffer.getvalue()[:len(buffer.getvalue()) // 2]
    return kinds | {
        "empty": b"", "one byte": b"\x00", "zeros": bytes(5000), "noise": rng.bytes(5000), "text": b"hello",
        "path": b"/etc/passwd",
        "url": b"http://127.0.0.1/x.png", "html": b"<html><script>alert(1)</script>", "json": b'{"image": "/etc/passwd"}',
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "pdf": b"%PDF-1.7\n",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "zip": b"PK\x03\x04" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "pickle": b"\x80\x04\x95\x10\x00\x00\x00cos\nsystem\n.", "elf": b"\x7fELF" + bytes(60), "only magic": good[:8],
        "header alone": good[:33], "wrong checksum": good[:29] + b"\0\0\0\0" + good[33:], "twice cut": good[:40] + good[50:],
        "jpeg magic": jpeg[:3], "jpeg noise": jpeg[:20] + rng.bytes(500), "tiff offset": tiff[:4] + b"\xff" * 4,
        "bomb": png_bomb(30000, 30000), "small bomb": png_bomb(9000, 9000), "long bomb": png_bomb(2**31 - 1, 1),
        "no pixels": png_bomb(0, 0), "bmp sizes": b"BM" + b"\xff" * 60, "gif frames": animated.getvalue(),
        "ppm bomb": b"P6 99999 99999 255\n", "ppm word": b"P6 a b c\n",
        "pfm nan": b"Pf\n2 2\n-1\n" + struct.pack("<4f", *[float("nan")] * 4),
        "webp riff": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(30), "icon": b"\0\0\1\0" + bytes(60),
        "qoi bomb": b"qoif" + struct.pack(">II", 60000, 60000) + b"\3\0", "psd": b"8BPS" + bytes(60)}


def test_hostile_bodies_get_a_sentence_and_the_station_lives(station, caplog):
    client = station(max_body_bytes=200_000)
    bodies = hostile()
    assert len(bodies) >= 40
    for name, body in bodies.items():
        for answer in (client.post("/score", content=body), client.post("/score?overlay=1", files={"file": ("x.png", body)})):
            assert answer.status_code in (413, 415, 422), (name, answer.status_code, answer.text)
            assert set(answer.json()) == {"error"}, name
            assert not re.search(r"Traceback|0x[0-9a-f]{6}|/tmp|\.py|<_io", answer.text), answer.text
    assert client.post("/score", content=picture(1, size=(1, 1))).json()["verdict"] == "normal"
    assert client.post("/score", content=picture()).json()["score"] == 50
    assert not [record for record in caplog.records if record.exc_info]


FORM = "multipart/form-data; boundary=a"
TEXT_PART = b'--a\r\ncontent-disposition: form-data; name="f"\r\n\r\ntext\r\n--a--\r\n'


@pytest.mark.parametrize("headers, body, status", [
    ({"content-type": "multipart/form-data"}, b"x", 400), ({"content-type": "multipart/form-data; boundary="}, b"x", 400),
    ({"content-type": FORM}, b"no boundary here", 400), ({"content-type": FORM}, TEXT_PART, 422),
    ({"content-type": FORM + "; charset=base64"}, TEXT_PART, (400, 422)),
    ({"content-type": FORM}, b"--a\r\n" + b"x" * 60_000 + b"\r\n", 400),
    ({"content-type": "multipart/form-data; boundary=" + "a" * 9000}, b"--a", 400),
    ({"content-type": "\xff\xfe"}, b"x", 415), ({"x-large": "a" * 50_000}, b"x", 415), ({}, b"a" * 200_001, 413),
    ({"transfer-encoding": "chunked"}, "chunks", 413),
])
def test_hostile_requests_get_a_sentence(station, headers, body, status):
    client = station(max_body_bytes=200_000)
    content = (bytes(1000) for _ in range(300)) if body == "chunks" else body
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = client.post("/score", content=content, headers=headers)
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert set(answer.json()) == {"error"}
    assert client.get("/health").json() == {"status": "ok", "models": 1}


@pytest.mark.parametrize("given, name", [
    ("../../etc/passwd", "passwd"), ("C:\\a\\b.png", "b.png"), ("", "unnamed"), ("..", "unnamed"), ("a/", "a"),
    ("a\r\nSet-Cookie: x\0.png", "aSet-Cookie: x.png"), ("\u202egnp.exe", "gnp.exe"), ("x" * 500, "x" * 200),
    ("\ud800.png", ".png"),
    ("Schraube ü.png", "Schraube ü.png")])
def test_names_of_pictures_are_names_alone(given, name):
    assert str(plain_name(given)) == name


def test_other_addresses_and_methods_get_a_sentence(station):
    client = station()
    for method, path, status in (("GET", "/score", 405), ("POST", "/", 405), ("GET", "/../serve.py", 404),
                                 ("GET", "/app.js/..%2f", 404), ("GET", "/page/index.html", 404), ("DELETE", "/models", 405),
                                 ("GET", "/docs/x", 404)):
        answer = client.request(method, path)
        assert (answer.status_code, set(answer.json())) == (status, {"error"}), path
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
    for headers in ({}, {"Authorization": "secret"}, {"Authorization": "Bearer secre"}, {"Authorization": b"Bearer secr\xe9t"},
                    {"Authorization": "Basic secret"}):
        for answer in (client.post("/score", content=picture(), headers=headers), client.get("/models", headers=headers),
                       client.get("/metrics", headers=headers), client.get("/openapi.json", headers=headers)):
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer" and "secret" not in answer.text
    assert client.post("/score", content=picture(), headers={"Authorization": "Bearer secret"}).status_code == 200


def test_requests_that_come_together_are_scored_together(station):
    engine = BrightEngine(seconds=0.1)
    client = station({"bright": engine}, batch_size=4)
    with ThreadPoolExecutor(8) as clients:
        values = [*range(60, 76)]
        answers = list(clients.map(lambda value: client.post("/score", content=picture(value)).json(), values))
    assert [answer["score"] for answer in answers] == values
    assert max(engine.batches) == 4 and len(engine.batches) < 12


def test_a_full_queue_is_a_503_with_a_sentence(station):
    client = station({"bright": BrightEngine(seconds=0.3)}, batch_size=1, queue_length=1)
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda _: client.post("/score", content=picture()), range(6)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and len(refused) < 6
    assert refused[0].headers["retry-after"] == "1" and "wait for bright" in refused[0].json()["error"]
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
        await app({"type": "http", "method": "POST", "path": "/score", "raw_path": b"/score", "query_string": b"", "headers": [],
                   "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)
        return sent

    begin, body, *_ = asyncio.run(slow())
    assert begin["status"] == 408 and "did not arrive" in json.loads(body["body"])["error"]


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
    batcher = Batcher(lambda items: items, batch_size=2, wait_seconds=60, queue_length=3, on_batch=sizes.append)
    assert batcher.submit(1).result(5) == 1
    with batcher.expecting():
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
        ("a.png", "anomalous", "bright"), ("b.png", "unreadable", "bright")]
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
import sys, serve, errors
sys.path.insert(0, "tests")
from test_serve import BrightEngine
serve.open_model = lambda path, device: BrightEngine(seconds={seconds})
errors.run_script(serve.main)
"""


@pytest.fixture
def started(tmp_path):
    """Start serve.py with the bright engine and a log; returns the process and its address."""
    processes = []

    def start(seconds: float = 0.0):
        command = [sys.executable, "-c", START.format(seconds=seconds), "--model", "bright.onnx", "--port", "0",
                   "--log", str(tmp_path / "l.jsonl")]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
                                          stderr=subprocess.PIPE, text=True))
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
        answers = [clients.submit(httpx.post, url + "score", content=picture(), timeout=30, trust_env=False)
                   for _ in range(2)]
        time.sleep(0.5)
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
    assert before[:len(answered)] == answered and len(before) <= len(answered) + 1
    _, url = started()
    assert httpx.post(url + "score?name=again", content=picture(), trust_env=False).status_code == 200
    assert [one["image"] for one in logged(tmp_path)] == [*before, "again"]


def test_hostile_senders_get_a_4xx_over_a_socket(started):
    import httpx
    process, url = started()
    port = httpx.URL(url).port
    post = b"POST /score HTTP/1.1\r\nHost: x\r\n"
    for sent in (b"no http at all\r\n\r\n", b"\x16\x03\x01" + bytes(200) + b"\r\n\r\n",
                 post + b"X-Large: " + b"a" * 200_000 + b"\r\n\r\n",
                 post + b"X: y\r\n" * 20_000 + b"\r\n", post + b"Content-Length: -1\r\n\r\n",
                 post + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                 post + b"Content-Length: 99999999999\r\n\r\n", post.replace(b"POST /score", b"GET /../../etc/passwd") + b"\r\n",
                 post.replace(b"POST /score", b"GET //etc/passwd") + b"\r\n",
                 post.replace(b"POST /score", b"GET /%2e%2e/serve.py") + b"\r\n",
                 post.replace(b"/score", b"/score?model=../bright") + b"Content-Length: 1\r\n\r\na",
                 post.replace(b"/score", b"/score?name=/etc/passwd") + b"Content-Length: 1\r\n\r\na"):
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


@pytest.mark.parametrize("args, words", [
    (["--model", "a.onnx", "b/a.onnx"], "would both be called a"),
    (["--model", "a.onnx", "--batch_size", "0"], "--batch_size is 0"),
    (["--model", "a.onnx", "b.onnx", "--threshold", "1"], "one model alone"), (["--model", "a.onnx", "--token", ""], "the token"),
    (["--model", "a.onnx", "--batch_wait_ms", "nan"], "--batch_wait_ms is nan"),
    (["--model", "a.onnx", "--port", "99999999"], "--port is 99999999"),
    (["--model", "a.onnx", "--host", "203.0.113.7"], "cannot listen")])
def test_mistakes_get_a_sentence(monkeypatch, args, words):
    monkeypatch.setattr(sys, "argv", ["serve.py", *args])
    monkeypatch.setattr(serve, "open_model", lambda path, device: BrightEngine())
    with pytest.raises(UserError, match=words):
        serve.main()


def test_nothing_here_imports_torch():
    code = "import sys; sys.modules['torch'] = None; import serve, predict, deploy.server"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
