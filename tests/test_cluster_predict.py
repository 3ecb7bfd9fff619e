"""predict.py --ray on simulated nodes: the same lines as without, each image once whatever dies, lists, URLs, mistakes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exit_status
from PIL import Image

ray = pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")

from csad.cluster import scoring, sources  # noqa: E402
from csad.cluster.connection import Driver  # noqa: E402
from csad.cluster.shards import shards_of  # noqa: E402
from csad.cluster.sources import ClusterInputs  # noqa: E402
from csad.cluster.sources import Image as Listed  # noqa: E402
from csad.commands import score_images as predict  # noqa: E402
from csad.data import files  # noqa: E402
from csad.export.exporters import to_onnx  # noqa: E402

from models.constants import SIZE  # noqa: E402
from models.prediction import Prediction  # noqa: E402

HISTOGRAM = {
    "mean": [0.9, 0.1],
    "std": [0.02, 0.01],
    "quarter_mean": [[0.9, 0.1]] * 4,
    "quarter_std": [[0.02, 0.01]] * 4,
}
STORE_BYTES = 80 * 2**20


class Brightness(torch.nn.Module):
    """Scores an image by its mean brightness, times 100 / 255, all of it contributed by LGST.

    That of a black one is not a number.
    """

    def forward(self, images: torch.Tensor) -> Prediction:
        values = images.float()
        percent = values * (100 / 255)
        mean = percent.mean((1, 2, 3))
        score = mean * mean / mean
        contribution = score[:, None]
        map_of_lgst = torch.nn.functional.avg_pool2d(percent, 4).mean(1, keepdim=True)
        return Prediction(
            score,
            torch.cat([0 * contribution, contribution], 1),
            map_of_lgst[:, 0],
            torch.cat([0 * map_of_lgst, map_of_lgst], 1),
            (values.mean(1) > 128).to(torch.uint8),
        )


def tiny_model() -> bytes:
    """`Brightness` as an ONNX model with all outputs."""
    metadata = {
        "with_map": True,
        "raw_input": True,
        "input_size": SIZE,
        "validation_scores": list(range(101)),
        "histogram": HISTOGRAM,
    }
    return to_onnx(Brightness(), metadata, Prediction._fields)


@pytest.fixture(scope="module")
def nodes():
    """A head without workers, and two nodes with one each."""
    from ray.cluster_utils import Cluster

    started = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES}
    )
    try:
        for _ in range(2):
            started.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield started
    finally:
        started.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    path.write_bytes(tiny_model())
    return path


@pytest.fixture
def run(monkeypatch, tmp_path, model):
    """Run predict.py; returns its exit status."""

    def run_it(*args, output="out") -> int:
        return exit_status(
            monkeypatch,
            predict.main,
            "predict.py",
            *args,
            "--model",
            model,
            "--threshold",
            50,
            "--output",
            tmp_path / output,
        )

    return run_it


@pytest.fixture
def photos(tmp_path):
    """Ten grey pictures, a black one, which the model cannot judge, a damaged one, and a file that is no picture."""
    folder = tmp_path / "photos"
    for index in range(10):
        write(folder / f"{index % 2}/{index}.png", 20 * index + 10)
    write(folder / "black.png", 0)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").touch()
    return folder


def write(path: Path, value: int, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(path)
    return path


def many(folder: Path, count: int) -> Path:
    """Pictures that take a while to decode."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), np.uint8)).save(
        folder / "000.png", compress_level=1
    )
    for index in range(1, count):
        os.link(folder / "000.png", folder / f"{index:03d}.png")
    return folder


def parts(tmp_path, output="out") -> list[Path]:
    return sorted((tmp_path / output / "parts").glob("part-*"))


def content(tmp_path, output="out") -> str:
    return "".join(path.read_text() for path in parts(tmp_path, output))


def names(tmp_path) -> list[str]:
    return [Path(json.loads(line)["image"]).name for line in content(tmp_path).splitlines()]


def test_the_same_lines_as_without(nodes, run, photos, tmp_path, capsys):
    assert run(photos, "--batch_size", 2, output="plain") == 3
    plain = (tmp_path / "plain/predictions.jsonl").read_text()
    counted = capsys.readouterr().out.splitlines()[-2].partition(";")[0]
    command = photos, "--batch_size", 2, "--shard_size", 4, "--ray", nodes.address
    assert run(*command) == 3
    assert content(tmp_path) == plain and len(parts(tmp_path)) == 3
    said = capsys.readouterr().out
    assert counted in said and "1 undecided, 1 unreadable" in said
    assert "1 file was left out because it is not an image: " in said and "notes.txt" in said
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["found"] == 13 and summary["images"] == 12 and summary["undecided"] == 1

    nothing_to_do = [path.stat().st_mtime_ns for path in parts(tmp_path)]
    assert run(*command[:-1], "127.0.0.1:1") == 3  # where no cluster is
    assert counted in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in parts(tmp_path)] == nothing_to_do


def test_lists_and_urls_as_tables(nodes, run, photos, tmp_path):
    from pyarrow import parquet

    with open(tmp_path / "list.csv", "w", newline="") as handle:
        csv.writer(handle).writerows(
            [
                ["number", "image"],
                [1, photos / "0/2.png"],
                [2, photos / "gone.png"],
                [3, ""],
                [4, photos / "0/2.png"],
            ]
        )
    parquet.write_table(
        pyarrow.table(
            {
                "image": [
                    str(photos / "black.png"),
                    None,
                    (photos / "broken.png").as_uri(),
                    (photos / "none.png").as_uri(),
                ]
            }
        ),
        tmp_path / "list.parquet",
    )
    (photos / "1/9 ü.png").write_bytes((photos / "1/9.png").read_bytes())
    assert (
        run(
            tmp_path / "list.csv",
            (tmp_path / "list.parquet").as_uri(),
            (photos / "1").as_uri(),
            "--format",
            "parquet",
            "--unordered",
            "--batch_size",
            3,
            "--shard_size",
            3,
            "--ray",
            nodes.address,
        )
        == 3
    )
    rows = [row for path in parts(tmp_path) for row in parquet.read_table(path).to_pylist()]
    assert [(Path(row["image"]).name, row["verdict"]) for row in rows] == [
        ("2.png", "normal"),
        ("gone.png", "unreadable"),
        ("black.png", "undecided"),
        ("broken.png", "unreadable"),
        ("none.png", "unreadable"),
        ("1.png", "normal"),
        ("3.png", "normal"),
        ("5.png", "normal"),
        ("7.png", "anomalous"),
        ("9%20%C3%BC.png", "anomalous"),
        ("9.png", "anomalous"),
    ]
    assert rows[1]["problem"] == f"image {photos / 'gone.png'} is missing"
    assert rows[4]["problem"] == f"image {(photos / 'none.png').as_uri()} is missing"
    for text in (rows[-1]["components"][0]["words"], rows[-1]["findings"][0]):  # as columns of the table, too
        assert "component 1" in text
    assert len({tuple(parquet.read_schema(path).names) for path in parts(tmp_path)}) == 1
    left_out = json.loads((tmp_path / "out/summary.json").read_text())["left_out"]
    assert left_out == {
        "they are named more than once": [str(photos / "0/2.png")],
        "their row in the list is empty": [
            f"row 3 of {tmp_path / 'list.csv'}",
            f"row 2 of {(tmp_path / 'list.parquet').as_uri()}",
        ],
    }


def test_a_killed_driver_is_followed_by_one_that_goes_on(nodes, run, tmp_path, model):
    folder = many(tmp_path / "photos", 48)
    command = [folder, "--batch_size", 2, "--shard_size", 2, "--ray", nodes.address]
    driver = subprocess.Popen(
        [
            sys.executable,
            "predict.py",
            *map(str, command),
            "--model",
            model,
            "--threshold",
            "50",
            "--output",
            tmp_path / "out",
        ],
        cwd=Path(__file__).parents[1],
    )
    try:
        wait_for(lambda: len(parts(tmp_path)) >= 2)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert 2 <= len(before) < 24
    assert run(*command) in (0, 4)
    assert names(tmp_path) == [f"{index:03d}.png" for index in range(48)]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in parts(tmp_path)}.items()


def workers_of(nodes) -> list[int]:
    """Process ids of a simulated cluster's workers that score."""
    raylets = {
        str(info.process.pid)
        for node in nodes.list_all_nodes()
        for info in node.all_processes.get("raylet", [])
    }
    workers = []
    for folder in Path("/proc").iterdir():
        try:
            if (folder / "cmdline").read_text().startswith("ray::Map") and (
                folder / "stat"
            ).read_text().split()[3] in raylets:
                workers.append(int(folder.name))
        except (OSError, ValueError, IndexError):  # ended since, or no process
            continue
    return workers


def test_a_killed_worker_loses_nothing(nodes, run, tmp_path, model):
    folder = many(tmp_path / "photos", 48)
    driver = subprocess.Popen(
        [
            sys.executable,
            "predict.py",
            folder,
            "--batch_size",
            "2",
            "--shard_size",
            "2",
            "--ray",
            nodes.address,
            "--model",
            model,
            "--threshold",
            "50",
            "--output",
            tmp_path / "out",
        ],
        cwd=Path(__file__).parents[1],
    )
    try:
        wait_for(lambda: len(parts(tmp_path)) >= 2)
        os.kill(workers_of(nodes)[0], signal.SIGKILL)
        assert len(parts(tmp_path)) < 24
        assert driver.wait(timeout=60) in (0, 4)
    finally:
        driver.kill()
    assert names(tmp_path) == [f"{index:03d}.png" for index in range(48)]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_shard_is_known_by_all_that_its_lines_depend_on():
    images = [Listed(f"{index}.png", 1, 2) for index in range(10)]
    before = list(shards_of(images, 2, ["model", 1.0], 4))
    assert [shard.count for shard in before] == [4, 4, 2]
    changed = list(shards_of([*images[:5], Listed("5.png", 1, 3), *images[6:]], 2, ["model", 1.0], 4))
    assert [one == other for one, other in zip(before, changed)] == [True, False, True]
    assert not {shard.digest for shard in before} & {
        shard.digest for shard in shards_of(images, 2, ["model", 2.0], 4)
    }
    assert [shard.count for shard in shards_of(images, 4, [], 3)] == [4, 4, 2]  # whole batches
    assert len(list(shards_of(images * 100_000, 8, []))) == 1000


def test_images_of_all_places_once(photos, tmp_path):
    found = ClusterInputs([photos / "0", photos], "image", tmp_path / "out")
    assert found.count == 13 + 5 and len(found.images) == 12
    assert {reason: len(names) for reason, names in found.left_out.items()} == {
        "they are not images": 1,
        "they are named more than once": 5,
    }
    by_url = ClusterInputs([photos.as_uri()], "image", tmp_path / "out")
    assert {(Path(one.name).name, one.bytes, one.changed_ns) for one in by_url.images} == {
        (Path(one.name).name, one.bytes, one.changed_ns) for one in found.images
    }


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["list.csv"], "has no column 'image', but path, other"),
        (["list.csv", "--column", "other"], "no images in"),
        (["nowhere.csv"], "is missing"),
        (["nowhere"], "there is no nowhere"),
        (["file:///nowhere/at/all"], "there is no file://"),
        (["gopher://x/y.png"], "cannot be read"),
        (["s3://key:secret@bucket/x"], "in the environment"),
        (["text.parquet"], "cannot be read"),
        (["photos", "--ray", "127.0.0.1:1"], "no Ray cluster answers at"),
        (["photos", "--watch"], "--watch does not go with --ray"),
        (["photos", "--shard_size", "0"], "--shard_size is 0"),
    ],
)
def test_mistakes_get_a_sentence(run, photos, tmp_path, monkeypatch, capsys, arguments, said):
    (tmp_path / "list.csv").write_text("path,other\na.png,\n")
    (tmp_path / "text.parquet").write_text("no table")
    monkeypatch.chdir(tmp_path)
    assert run(*(arguments if "--ray" in arguments else [*arguments, "--ray", "local"])) == 2
    assert said in capsys.readouterr().err


def test_without_ray(run, photos, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "find_spec", lambda name: None if name == "ray" else name)
    assert run(photos, "--ray", "local") == 2
    assert "pip install '.[cluster]'" in capsys.readouterr().err
    assert run(photos, "--format", "parquet") == 2
    assert "--format is for --ray" in capsys.readouterr().err
    assert run("s3://bucket/photos") == 2
    assert "--ray local" in capsys.readouterr().err


@pytest.fixture
def worker(model, tmp_path):
    """A worker in this process."""

    def made(digest: str = scoring.model_digest(model)) -> scoring.Worker:
        driver = Driver(tmp_path, "token", Path.cwd())
        driver.marker.write_text("token")
        return scoring.Worker(scoring.Work(model, digest, "cpu", 50.0, 2), driver)

    return made


def test_a_worker_with_another_model_is_refused(worker, photos):
    """Where the nodes do not see the same file."""
    result = worker("another")({"shard": 0, "images": json.dumps([[str(photos / "black.png"), 1, 2]])})
    assert "not the same file on all nodes" in result["sentence"] and not result["lines"]


@pytest.mark.parametrize(
    "problem, unreadable",
    [
        (FileNotFoundError("Path does not exist"), True),
        (OSError("AWS Error ACCESS_DENIED during HeadObject"), True),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), False),
    ],
)
def test_a_store_that_does_not_answer_is_no_damaged_picture(worker, monkeypatch, problem, unreadable):
    def no_file_system(url):
        raise problem

    monkeypatch.setattr(sources, "file_system", no_file_system)
    result = worker()({"shard": 0, "images": json.dumps([["s3://bucket/a.png", None, None]])})
    assert (
        json.loads(result["lines"])["verdict"] == "unreadable"
        if unreadable
        else "continues" in result["sentence"]
    )


def test_pictures_that_kill_workers_are_given_up(worker, photos, monkeypatch):
    row = {"shard": 0, "images": json.dumps([[str(photos / "black.png"), 1, 2]])}
    monkeypatch.setattr(scoring, "read_picture", lambda *_: 1 / 0)
    crashed = [worker()(row) for _ in range(scoring.TRIES)]
    assert all("ZeroDivisionError" in result["traceback"] for result in crashed)
    given_up = worker()(row)
    assert not any(given_up[name] for name in ("lines", "sentence", "traceback"))
    monkeypatch.undo()
    assert worker()(row | {"shard": 1})["lines"] and worker()(row | {"shard": 1})["lines"]


def test_a_table_of_predictions_is_a_list_of_their_images(tmp_path):
    names = ["=1+1.png", "'=1.png", "a.png", "'quoted'.png"]
    with open(tmp_path / "list.csv", "w", newline="") as handle:
        csv.writer(handle).writerows([["image"], *([files.to_csv_text(name)] for name in names)])
    assert list(sources._csv(tmp_path / "list.csv", "image")) == names
