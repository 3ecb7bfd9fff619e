"""predict.py with an engine that knows the answers: verdicts, words, tables, unreadable files, watching, memory."""

from __future__ import annotations

import csv
import json
import ntpath
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from csad.commands import score_images as predict
from csad.data import files, label_colours
from csad.errors import UserError
from csad.evaluation.deviations import LIMIT, PLACES, WHOLE, Deviation, deviations, summarise
from csad.inference import inspection, overlays, predictions, verdicts, watching
from csad.inference.engines import Engine
from csad.inference.inspection import unlike_training
from csad.inference.verdicts import Verdict

import cv2
import numpy as np
import pytest
from conftest import exit_status
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.prediction import Prediction

HISTOGRAM = {
    "mean": [0.9, 0.08, 0.02],
    "std": [0.02, 0.01, 0.005],
    "quarter_mean": [[0.9, 0.08, 0.02]] * 3 + [[0.92, 0.08, 0.0]],
    "quarter_std": [[0.02, 0.02, 0.01]] * 4,
}


class BrightEngine(Engine):
    """Scores an image by its mean brightness; all of it is LGST's share; every label map is background."""

    runtime, precision, device = "fake", "fp32", "cpu"

    def __init__(self, **metadata):
        self.metadata = {
            "with_map": True,
            "raw_input": True,
            "validation_scores": list(range(101)),
            "histogram": HISTOGRAM,
        }
        self.metadata |= metadata
        self.batches = []

    def _run(self, images, maps):
        self.batches.append(len(images))
        score = images.reshape(len(images), -1).mean(1).astype(np.float32)
        anomaly_map = np.zeros((len(images), 64, 64), np.float32)
        anomaly_map[:, 12:20, 28:36] = 1
        anomaly_map[:, 16, 32] = 2
        return Prediction(
            score,
            np.stack([0 * score, score], 1),
            anomaly_map,
            np.stack([0 * anomaly_map, anomaly_map], 1),
            np.zeros((len(images), 256, 256), np.uint8),
        )


@pytest.fixture
def engine(monkeypatch):
    fake = BrightEngine()
    monkeypatch.setattr(predict, "open_model", lambda path, device: fake)
    return fake


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run predict.py; returns its exit status."""

    def run_it(*args) -> int:
        return exit_status(
            monkeypatch, predict.main, "predict.py", *args, "--model", "x.onnx", "--output", tmp_path / "out"
        )

    return run_it


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for name, value in (("a.png", 10), ("b/a.png", 120), ("b/c.jpg", 50)):
        write(folder / name, value)
    (folder / "notes.txt").write_text("no image")
    return folder


def write(path: Path, value: int, size=(60, 80)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size, 3), value, np.uint8))
    return path


def rows(tmp_path) -> list[dict[str, str]]:
    with open(tmp_path / "out/predictions.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def lines(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]


def test_folder_with_an_anomalous_image(engine, run, photos, tmp_path, capsys):
    assert run(photos) == 4
    found = rows(tmp_path)
    assert [Path(row["image"]).relative_to(photos).as_posix() for row in found] == [
        "a.png",
        "b/a.png",
        "b/c.jpg",
    ]
    assert [row["verdict"] for row in found] == ["normal", "anomalous", "normal"]
    assert float(found[1]["score"]) == pytest.approx(120)
    assert float(found[1]["threshold"]) == 100  # the 101st of 0..100: ceil(102 x 0.99)
    assert (found[1]["unusual_x"], found[1]["unusual_y"]) == ("40", "15")  # of 80x60 pixels
    detailed = lines(tmp_path)
    assert [one["verdict"] for one in detailed] == [row["verdict"] for row in found]
    assert sum(detailed[1]["contributions"].values()) == pytest.approx(detailed[1]["score"])
    assert detailed[1]["alarm"] == "LGST"
    assert "component 1 and component 2 are missing" in found[1]["findings"]
    said = capsys.readouterr().out
    assert "component 1 and component 2 are missing" in said
    assert "2 normal, 1 anomalous, 0 undecided, 0 unreadable" in said
    assert "1 file was left out because it is not an image: " in said and "notes.txt" in said


@pytest.mark.parametrize(
    ("size", "grey", "words"),
    [
        ((640, 480), False, ""),
        ((1280, 960), False, ""),
        ((600, 450), False, ""),  # the model sees 256 x 256 of either
        (
            (320, 240),
            False,
            "it is smaller than the training pictures (320 x 240 pixels, not 640 x 480) and so less sharp",
        ),
        (
            (480, 640),
            False,
            "its shape is not that of the training pictures (480 x 640 pixels, not like 640 x 480)",
        ),
        ((640, 480), True, "it is grey and the training pictures are in colour: the score may be too high"),
        ((512, 512), True, "stretched, and it is grey and the"),
    ],
)
def test_a_picture_unlike_the_training_pictures_is_told(size, grey, words):
    training = {"size": [640, 480], "grey": False}
    said = unlike_training(size, grey, training, 256)
    assert words in said and bool(said) == bool(words) and unlike_training(size, grey, None, 256) == ""
    verdict = Verdict("a.png", "normal", 1.0, 0.5, note=said)
    assert str(verdict).endswith(f"\n           {said}") == bool(words) and verdict.as_json()["note"] == (
        said or None
    )


def test_all_normal_is_status_0_and_thresholds_can_be_chosen(engine, run, photos, tmp_path):
    assert run(photos, "--threshold", 200) == 0
    assert run(photos, "--false_positive_rate", 0.5) == 4
    assert {row["threshold"] for row in rows(tmp_path)} == {"50"}  # the 51st


def test_unreadable_files_are_reported_and_skipped(engine, run, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "empty.png").write_bytes(b"")
    assert run(photos) == 3
    found = rows(tmp_path)
    assert [row["verdict"] for row in found] == ["normal", "anomalous", "normal", "unreadable", "unreadable"]
    assert found[3]["score"] == ""
    assert "broken.png cannot be read" in found[3]["findings"]
    assert lines(tmp_path)[3]["problem"]
    assert "cannot be read" in capsys.readouterr().out
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    (photos / "b/c.jpg").unlink()
    assert run(photos) == 3  # a batch without any readable image


def test_a_name_that_is_no_text_ends_nothing(engine, run, photos, tmp_path, capsys):
    odd = photos / os.fsdecode(b"\xff.png")
    try:
        odd.write_bytes((photos / "a.png").read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    assert run(photos, "--save_maps") == 4
    assert rows(tmp_path)[3]["image"].endswith(r"\udcff.png")
    assert lines(tmp_path)[3]["image"] == str(odd)
    assert r"\udcff.png" in capsys.readouterr().out


def test_ctrl_c_says_what_is_kept(engine, run, photos, tmp_path, capsys, monkeypatch):
    scored = []

    def score(images, maps):
        if scored:
            raise KeyboardInterrupt
        scored.append(images)
        return (np.zeros(len(images), np.float32),)

    engine.metadata["with_map"] = False
    monkeypatch.setattr(engine, "_run", score)
    assert run(photos, "--batch_size", 1) == 130
    assert len(rows(tmp_path)) == 1
    said = capsys.readouterr().err
    assert "predictions.csv" in said and "starts anew" in said and "continues" not in said


def test_maps_are_drawn_beside_each_other_and_never_collide(engine, run, photos, tmp_path):
    assert run(photos / "a.png", photos / "b/a.png", photos / "b/c.jpg", "--save_maps") == 4
    maps = tmp_path / "out/maps"
    assert sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.png")) == [
        "a.png.map.png",
        "b/a.png.map.png",
        "b/c.jpg.map.png",
    ]
    drawn = cv2.imread(str(maps / "b/a.png.map.png"))
    assert drawn.shape[0] > 60 and drawn.shape[1] > 3 * 80  # pictures, and what is said under them
    heat, plain = drawn[15, 2 * (80 + 4) + 40].astype(int), drawn[15, 40].astype(int)
    assert np.ptp(plain) == 0  # the image is grey
    assert np.ptp(heat) > 20  # where the map peaks it is coloured


def test_a_ring_lies_around_the_unusual_place_of_anomalous_pictures_alone(engine, run, photos, tmp_path):
    assert run(photos / "a.png", photos / "b/a.png", "--save_maps") == 4
    normal, anomalous = (
        cv2.imread(str(tmp_path / "out/maps" / name))[:60, :80]
        for name in ("a.png.map.png", "b/a.png.map.png")
    )
    assert np.ptp(normal) == 0 and np.ptp(anomalous) == 255
    rows_, columns = np.nonzero(anomalous[..., 0] != anomalous[15, 40, 0])
    assert (
        abs(rows_.mean() - 15) < 1
        and abs(columns.mean() - 40) < 1
        and np.hypot(rows_ - 15, columns - 40).min() > 3
    )


def test_where_no_map_says_anything_no_spot_is_pointed_at(engine, run, photos, tmp_path, monkeypatch):
    """As of a patch histogram whose model has no evidence: the corner is not unusual, it is merely the first of all places."""

    def without_maps(images, maps):
        score = images.reshape(len(images), -1).mean(1).astype(np.float32)
        empty = np.zeros((len(images), 64, 64), np.float32)
        whole = np.pad(np.ones((len(images), 20, 200), np.uint8), ((0, 0), (0, 236), (0, 56)))
        return Prediction(score, np.stack([score, 0 * score], 1), empty, np.stack([empty, empty], 1), whole)

    monkeypatch.setattr(engine, "_run", without_maps)
    assert run(photos / "b/a.png", "--save_maps") == 4
    assert lines(tmp_path)[0]["unusual"] is None and (
        rows(tmp_path)[0]["unusual_x"],
        rows(tmp_path)[0]["unusual_y"],
    ) == ("", "")
    assert lines(tmp_path)[0]["alarm"] == "patchhist" and not any(
        " at x " in text for text in lines(tmp_path)[0]["findings"]
    )
    assert lines(tmp_path)[0]["findings"][0] == "component 2 is missing"
    drawn = cv2.imread(str(tmp_path / "out/maps/a.png.map.png"))
    assert np.ptp(drawn[:60, :80]) == 0


def test_verdict_findings_and_the_components_colours_stand_under_saved_pictures(engine, monkeypatch):
    engine.metadata["names"] = {"2": "capacitor"}
    said = []
    monkeypatch.setattr(
        verdicts,
        "captioned",
        lambda picture, title, lines, legend, red: said.append((title, lines, legend, red)),
    )
    for value in (120, 10):
        shown = np.full((60, 80, 3), value, np.uint8)
        picture = inspection.Picture("a\nb.png", np.full((3, 256, 256), value, np.uint8), shown, (80, 60))
        inspection.judge([picture], engine, 100)[0].captioned_drawing  # noqa: B018
    (title, lines, legend, red), (calm_title, calm_lines, _, calm_red) = said
    assert title == "Anomalous: a\\nb.png" and red and calm_title.startswith("Normal: ") and not calm_red
    assert lines[0] == "Score 120.00 is over the threshold 100.00" and calm_lines[0].startswith(
        "Score 10.00 is not over"
    )
    assert "Unusual surface at x 40, y 15" in lines and len(calm_lines) == 2
    assert legend == [(1, "component 1"), (2, "capacitor")]


def test_a_legend_shows_each_colour_once_and_nothing_is_cut_off():
    legend = [(index, f"component {index}") for index in range(1, 25)]
    picture = np.zeros((60, 40, 3), np.uint8)
    drawn = overlays.captioned(picture, "Anomalous: " + "long " * 40, ["a sentence"], legend, red=True)
    assert (drawn[:60, :40] == 0).all() and (drawn[:, -1] == 255).all() and (drawn[-1] == 255).all()
    for index, _ in legend:
        assert (drawn[60:] == label_colours.colour_labels(np.array(index, np.uint8))).all(-1).sum() > 60


def test_what_is_normal_is_never_red():
    image, high = np.full((64, 64, 3), 90, np.uint8), np.pad(np.full((8, 8), 9.0), 28)
    for name, drawn in (
        ("anomalous", overlays.heat_overlay(image, high)),
        ("normal", overlays.heat_overlay(image, high, anomalous=False)),
    ):
        red, green, _ = drawn[32, 32].astype(int)
        assert (red > green) == (name == "anomalous")
        assert (drawn[0, 0] == 90).all()
    low = high / 12  # under the limit: the same colours for both, as one scale should have
    np.testing.assert_array_equal(
        overlays.heat_overlay(image, low), overlays.heat_overlay(image, low, anomalous=False)
    )


def test_of_the_map_of_components_only_what_explains_the_score_is_drawn():
    evidence = np.zeros((64, 64))
    evidence[4:20, 4:20], evidence[10:12, 20:24], evidence[40:60, 40:60] = 8, 9, 6
    memory = np.zeros((64, 64))
    memory[50, 10] = 3
    maps = {"patchhist": evidence, "memory": memory}
    drawn = overlays.explaining_map(maps, {"patchhist": 5.0, "memory": 1.0})
    assert drawn[11, 22] == 9 and drawn[5, 5] == 8 and drawn[50, 10] == 3
    assert (drawn[40:60, 40:60] == 0).all()  # unusual, too, but less, and elsewhere
    np.testing.assert_array_equal(overlays.explaining_map(maps, {"patchhist": 0.2, "memory": 5.0}), memory)
    np.testing.assert_array_equal(
        overlays.explaining_map({"patchhist": np.zeros((64, 64))}, {"patchhist": -1.0}), 0
    )


def test_own_pictures_are_not_scored_again(engine, run, tmp_path, monkeypatch):
    write(tmp_path / "a.png", 10)
    for _ in range(2):
        assert run(tmp_path, "--save_maps") == 0
    assert len(rows(tmp_path)) == 1


def test_output_into_the_watched_folder_does_not_feed_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)
    write(tmp_path / "a.png", 10)
    (tmp_path / "predictions.jsonl").touch()
    write(tmp_path / "maps/a.png", 10)
    write(tmp_path / "b/maps/c.png", 10)  # somebody else's
    rounds = watching.watch([tmp_path], tmp_path / "elsewhere", {})
    assert [next(rounds) for _ in range(2)] == [[], [tmp_path / "a.png", tmp_path / "b/maps/c.png"]]


@pytest.mark.parametrize(
    ("inputs", "drawn"),
    [
        (["x/good", "x/good"], ["1.png"]),
        (["x/good", "y/bad"], ["x/good/1.png", "y/bad/1.png"]),
        (["x/good/1.png", "y/bad/1.png"], ["x/good/1.png", "y/bad/1.png"]),
        (["x/good", "y/good"], ["x/good/1.png", "y/good/1.png"]),
        (["x", "x/good", "y/bad"], ["x/good/1.png", "y/bad/1.png"]),
        (["x/good", "y/x"], ["x/good/1.png", "y/x/good/1.png"]),
    ],
)
def test_maps_of_several_folders_are_under_their_paths_from_the_common_one(
    engine, run, tmp_path, capsys, inputs, drawn
):
    for name in ("x/good", "y/bad", "y/good", "y/x/good"):
        write(tmp_path / "far" / name / "1.png", 10)
    assert run(*(tmp_path / "far" / name for name in inputs), "--save_maps") == 0
    maps = tmp_path / "out/maps"
    assert sorted(path.relative_to(maps).as_posix() for path in maps.rglob("*.png")) == [
        f"{name}.map.png" for name in drawn
    ]
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" and the pictures in {maps}")


def test_images_on_several_drives_are_refused_with_a_sentence(monkeypatch):
    monkeypatch.setattr(predictions, "os", SimpleNamespace(path=ntpath))
    with pytest.raises(UserError, match="several drives"):
        predictions.common_folder([Path("C:/photos/a.png"), Path("D:/b.png")])


def test_a_note_is_in_the_table_and_on_the_map(engine, run, tmp_path, monkeypatch):
    engine.metadata["training_pictures"] = {"size": [80, 60], "grey": True}
    write(tmp_path / "a.png", 10), write(tmp_path / "b.png", 10, (60, 30))
    captions = []
    monkeypatch.setattr(
        verdicts, "captioned", lambda picture, *said, **_: captions.append(said[1]) or picture
    )
    assert run(tmp_path / "a.png", tmp_path / "b.png", "--save_maps") == 0
    plain, other = rows(tmp_path)
    assert list(other)[-2:] == ["findings", "note"] and plain["note"] == ""
    assert (
        other["note"] == lines(tmp_path)[1]["note"] and "(30 x 60 pixels, not like 80 x 60)" in other["note"]
    )
    assert not any(text in " ".join(captions[0]) for text in ("training", "too high"))
    assert other["note"][1:] in " ".join(captions[1])


def test_a_link_to_an_image_is_drawn_under_its_own_name(engine, run, tmp_path):
    original = write(tmp_path / "raw/a.png", 10)
    before = original.read_bytes()
    (tmp_path / "photos/b").mkdir(parents=True)
    (tmp_path / "photos/b/link.png").symlink_to(original)
    (tmp_path / "linked").symlink_to(tmp_path / "photos/b")
    for place, drawn in (("photos", {"b/link"}), ("linked", {"b/link", "link"})):
        assert run(tmp_path / place, "--save_maps") == 0
        assert set((tmp_path / "out").rglob("*.png")) == {
            tmp_path / f"out/maps/{name}.png.map.png" for name in drawn
        }
    assert original.read_bytes() == before


def test_a_picture_outside_of_the_output_is_refused(tmp_path):
    image = verdicts.Verdict(tmp_path / "raw/a.png", "normal", 1.0, drawing=np.zeros((4, 4, 3), np.uint8))
    with (
        predictions.Output(tmp_path / "out", tmp_path / "photos") as output,
        pytest.raises(ValueError, match="subpath"),
    ):
        output.write(image)
    assert not list(tmp_path.rglob("*.png"))


def test_model_without_maps_gives_scores_only(engine, run, photos, tmp_path, capsys):
    engine.metadata["with_map"] = False
    assert run(photos) == 4
    assert rows(tmp_path)[1]["LGST_contribution"] == rows(tmp_path)[1]["findings"] == ""
    assert run(photos, "--save_maps") == 2
    assert "--with_map" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "there is no nowhere"),
        (["EMPTY"], "no images"),
        (["PHOTOS", "--batch_size", "0"], "--batch_size"),
        (["PHOTOS", "--false_positive_rate", "2"], "--false_positive_rate"),
        (["PHOTOS", "--false_positive_rate", "0"], "--false_positive_rate"),
        (["PHOTOS/a.png", "--watch"], "--watch needs folders"),
    ],
)
def test_mistakes_get_a_sentence(engine, run, photos, tmp_path, capsys, arguments, said):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "PHOTOS": str(photos), "PHOTOS/a.png": str(photos / "a.png")}
    assert run(*(places.get(argument, argument) for argument in arguments)) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_knows_no_validation_scores_needs_a_threshold(engine, run, photos, capsys):
    engine.metadata.clear()  # as in published files
    engine.metadata["raw_input"] = True
    assert run(photos) == 2
    assert "--threshold" in capsys.readouterr().err
    assert run(photos, "--threshold", 60) == 4


def test_memory_does_not_grow_with_the_number_of_images(engine, tmp_path, monkeypatch):
    """No more images are decoded than the ones ahead of what is scored."""
    path = write(tmp_path / "a.png", 10)
    alive, most, lock = set(), [0], threading.Lock()
    real = inspection.read_picture

    def counting(path):
        picture = real(path, path, engine, None)
        with lock:
            alive.add(id(picture))
            most[0] = max(most[0], len(alive))
        return picture

    monkeypatch.setattr(
        inspection,
        "judge",
        lambda pictures, *rest: (
            [alive.discard(id(picture)) for picture in pictures],
            [verdicts.Verdict(picture.name, "normal", 1.0, 0.0) for picture in pictures],
        )[1],
    )
    found = list(inspection.verdicts_on((path for _ in range(200)), engine, 1.0, 4, counting))
    assert len(found) == 200
    assert most[0] <= (inspection.AHEAD + 2) * 4


def test_order_and_batches(engine, tmp_path):
    paths = [write(tmp_path / f"{value}.png", value) for value in (5, 3, 9, 1, 7)]
    found = list(
        inspection.verdicts_on(
            iter(paths), engine, 4.0, 2, lambda path: inspection.read_picture(path, path, engine, None)
        )
    )
    assert [round(one.score) for one in found] == [5, 3, 9, 1, 7]
    assert engine.batches == [2, 2, 1]


def test_watching_waits_for_files_to_be_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: None)
    folder = tmp_path / "in"
    write(folder / "old.png", 1)
    rounds = watching.watch([folder], tmp_path / "in/out", {})
    assert next(rounds) == []  # seen once: may still be growing
    assert next(rounds) == [folder / "old.png"]
    (folder / "new.png").write_bytes(b"half")
    (folder / "empty.png").touch()
    assert next(rounds) == []
    (folder / "new.png").write_bytes(b"half and more")
    assert next(rounds) == []
    assert next(rounds) == [folder / "new.png"]
    write(folder / "out/maps/old.png", 1)
    write(folder / ".part.png", 1)
    assert [next(rounds) for _ in range(3)] == [[], [], []]
    os.utime(folder / "old.png", ns=(1, 1))  # replaced by another picture
    assert [next(rounds) for _ in range(3)] == [[], [folder / "old.png"], []]
    (folder / "old.png").unlink()
    assert next(rounds) == []


def test_watch_ends_with_ctrl_c_and_a_summary(tmp_path):
    """In a process of its own, with files that appear while it runs."""
    script = (
        "import sys; sys.path[:0] = ['.', 'tests']; import test_predict\n"
        "from csad.errors import run_script; from csad.commands import score_images as predict\n"
        "from csad.inference import watching\n"
        "watching.POLL_SECONDS = 0.05\n"
        "predict.open_model = lambda path, device: test_predict.BrightEngine()\n"
        "run_script(predict.main)"
    )
    folder = tmp_path / "in"
    folder.mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            str(folder),
            "--model",
            "x",
            "--watch",
            "--output",
            str(tmp_path / "out"),
        ],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "threshold" in process.stdout.readline()
    write(folder / "first.png", 10)
    assert "first.png" in process.stdout.readline()
    write(folder / "second.png", 200)
    assert process.stdout.readline().startswith("anomalous")
    process.send_signal(signal.SIGINT)  # what is said is counted
    said, _ = process.communicate(timeout=30)
    assert "1 normal, 1 anomalous, 0 undecided, 0 unreadable" in said
    assert process.returncode == 4


@pytest.mark.parametrize("what", ["score", "anomaly map", "branch maps"])
def test_what_is_no_number_is_never_normal(what, engine, run, photos, tmp_path, monkeypatch):
    real = engine._run

    def broken(images, maps):
        found = real(images, maps)
        getattr(found, what.replace(" ", "_"))[0] = np.nan
        return found

    monkeypatch.setattr(engine, "_run", broken)
    assert run(photos, "--threshold", 200) == 3
    assert [row["verdict"] for row in rows(tmp_path)] == ["undecided", "normal", "normal"]
    first = lines(tmp_path)[0]
    assert "the model gives an anomaly map" in first["problem"] if "map" in what else first["score"] is None
    assert "not finite" in first["problem"]
    assert "NaN" not in (tmp_path / "out/predictions.jsonl").read_text()


def test_a_link_to_itself_is_unreadable(engine, run, photos, tmp_path):
    (photos / "loop.png").symlink_to("loop.png")
    assert run(photos) == 3
    assert [row["verdict"] for row in rows(tmp_path) if "loop" in row["image"]] == ["unreadable"]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_threshold_is_a_number(engine, run, photos, capsys, value):
    assert run(photos, f"--threshold={value}") == 2
    assert "finite" in capsys.readouterr().err


def test_one_folder_has_one_writer(engine, run, photos, tmp_path, capsys):
    with predictions.Output(tmp_path / "out", tmp_path):
        assert run(photos) == 2
    assert "another predict.py is writing" in capsys.readouterr().err


def test_watching_goes_on_where_it_was(tmp_path, engine):
    path = write(tmp_path / "in/a.png", 10)
    with predictions.Output(tmp_path / "out", tmp_path, go_on=True) as output:
        output.write(verdicts.Verdict(path, "normal", 1.0, 0.5))
    with open(tmp_path / "out/predictions.jsonl", "a") as handle:
        handle.write('{"image": "cut o')  # the power went
    with predictions.Output(tmp_path / "out", tmp_path, go_on=True) as output:
        assert output.scored == {str(path): (path.stat().st_size, path.stat().st_mtime_ns)}
    assert len(lines(tmp_path)) == len(rows(tmp_path)) == 1


@pytest.mark.parametrize("cut", ["b.png,anomal", '"b\n', '"b\nc"', ""])
def test_watching_goes_on_after_a_row_that_was_cut_off(tmp_path, cut):
    paths = [write(tmp_path / "in" / name, 10) for name in ("a.png", "b.png")]
    table = tmp_path / "out/predictions.csv"
    for path in paths:
        with predictions.Output(tmp_path / "out", tmp_path, go_on=True) as output:
            output.write(verdicts.Verdict(path, "anomalous", 1.0, 2.0))
        if path == paths[0]:
            table.write_text(table.read_text() + cut if cut else "")  # the disk was full
    expected = paths if cut else paths[1:]
    assert [(row["image"], row["verdict"]) for row in rows(tmp_path)] == [
        (str(path), "anomalous") for path in expected
    ]


def test_watching_started_again_scores_only_what_is_new(engine, run, tmp_path, monkeypatch):
    folder, polls = tmp_path / "in", []
    write(folder / "a.png", 10)
    write(folder / "b.png", 20)

    def sleep(seconds):
        polls.append(seconds)
        if len(polls) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(watching.time, "sleep", sleep)
    assert run(folder, "--watch") == 0 and len(rows(tmp_path)) == 2
    assert run(folder, "--watch") == 0 and len(rows(tmp_path)) == 2
    write(folder / "b.png", 200, size=(61, 80))  # another picture of the same name
    write(folder / "c.png", 30)
    assert run(folder, "--watch") == 4
    assert [Path(row["image"]).name for row in rows(tmp_path)] == ["a.png", "b.png", "b.png", "c.png"]
    assert len(lines(tmp_path)) == 4 and sum(engine.batches) == 4
    assert run(folder) == 4 and len(rows(tmp_path)) == 3  # without --watch it starts anew


def test_a_second_process_is_refused_and_harms_nothing(engine, run, photos, tmp_path, capsys):
    assert run(photos) == 4
    before = (tmp_path / "out/predictions.csv").read_bytes()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from csad.data.locks import FileLock\n"
            "with FileLock(Path(sys.argv[1])).acquire():\n print(flush=True); sys.stdin.read()",
            str(tmp_path / "out/.predict.lock"),
        ],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        assert run(photos) == 2
        assert "another predict.py is writing" in capsys.readouterr().err
        assert (tmp_path / "out/predictions.csv").read_bytes() == before
    finally:
        holder.communicate(b"")
    assert run(photos) == 4


def test_links_are_followed_once(engine, run, photos, tmp_path):
    (photos / "loop").symlink_to(photos)
    (photos / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more/d.png", 5)
    (photos / "linked").symlink_to(tmp_path / "more")
    assert run(photos) == 3
    found = {Path(row["image"]).relative_to(photos).as_posix(): row["verdict"] for row in rows(tmp_path)}
    assert found == {
        "a.png": "normal",
        "b/a.png": "anomalous",
        "b/c.jpg": "normal",
        "gone.png": "unreadable",
        "linked/d.png": "normal",
    }


def label_map(**boxes) -> np.ndarray:
    """Nothing but components 1 and 2 in the named boxes (rows and columns, in 256ths)."""
    found = np.zeros((256, 256), np.uint8)
    for name, (rows, columns) in boxes.items():
        found[rows, columns] = int(name[1:])
    return found


def test_a_normal_image_has_no_words():
    # 0.08 and 0.02 of three quarters, 0.08 and nothing of the fourth
    quarter = np.zeros(128 * 128, np.uint8)
    quarter[:1311] = 1
    last = quarter.reshape(128, 128).copy()
    quarter[1311 : 1311 + 328] = 2
    quarter = quarter.reshape(128, 128)
    assert deviations(np.block([[quarter, quarter], [quarter, last]]), HISTOGRAM) == []


def test_words_say_what_and_where():
    found = deviations(
        label_map(c1=(slice(0, 64), slice(0, 128)), c2=(slice(200, 256), slice(200, 256))), HISTOGRAM
    )
    words = [one.words for one in found]
    assert "component 1: 1.6 times the normal area, above all in the top-left quarter" in words
    assert "component 1 is missing from the bottom-right quarter" in words
    assert "component 2: 2.4 times the normal area, above all in the bottom-right quarter" in words
    assert all(abs(one.deviation) >= LIMIT for one in found)
    assert [abs(one.deviation) for one in found] == sorted(
        (abs(one.deviation) for one in found), reverse=True
    )


def test_words_of_a_part_that_is_hardly_ever_there():
    seldom = Deviation(2, "top-left quarter", area=0.4, normal_area=0.002, deviation=90.0)
    assert seldom.words == "component 2 in the top-left quarter, where there is normally hardly any"


def test_words_of_a_part_in_the_wrong_quarter():
    histogram = {
        "mean": [0.95, 0.05],
        "std": [0.01, 0.01],
        "quarter_mean": [[0.8, 0.2], [1, 0], [1, 0], [1, 0]],
        "quarter_std": [[0.01, 0.01], [0, 0], [0, 0], [0, 0]],
    }
    moved = np.zeros((256, 256), np.uint8)
    moved[:64, 128:180] = 1  # in all as much as always
    assert {one.words for one in deviations(moved, histogram)} == {
        "component 1 is missing from the top-left quarter",
        "component 1 in the top-right quarter, where there is normally none",
    }


def off(component: int, area: float, normal: float, place: str = WHOLE, **more) -> Deviation:
    return Deviation(component, place, area, normal, np.sign(area - normal) * 9.0, **more)


@pytest.mark.parametrize(
    ("unusual", "spot", "sentence"),
    [
        ([], "", ""),
        ([off(3, 0.3, 0.1), off(5, 0, 0.1)], "", "component 5 is missing"),
        ([off(5, 0, 0.1, name="capacitor")], "top-left quarter", "capacitor is missing"),
        (
            [off(5, 0, 0.1), off(2, 0, 0.2, name="coil"), off(1, 0, 0.1)],
            "",
            "component 5, coil and component 1 are missing",
        ),
        (
            [off(5, 0, 0.1), off(2, 0.3, 0.2)],
            "",
            "component 5 is missing",
        ),  # whether in the same place is not known
        (
            [off(5, 0, 0.1, above_all="top-left quarter"), off(2, 0.3, 0.2, above_all="top-left quarter")],
            "",
            "component 2 lies where component 5 should be",
        ),
        (
            [off(5, 0, 0.1, above_all="top-left quarter"), off(2, 0.8, 0.2, above_all="top-left quarter")],
            "",
            "component 5 is missing",
        ),
        (
            [off(2, 0.3, 0.2, "top-left quarter"), off(5, 0.1, 0.2, "top-left quarter")],
            "",
            "component 2 lies where component 5 should be",
        ),
        (
            [off(2, 0.1, 0.2, "top-left quarter")],
            "top-left quarter",
            "something lies where component 2 should be",
        ),
        (
            [off(2, 0.1, 0.2, above_all="top-left quarter")],
            "top-left quarter",
            "something lies where component 2 should be",
        ),
        ([off(2, 0.1, 0.2, "top-left quarter")], "top-right quarter", ""),
        (
            [off(2, 0, 0.2, "top-left quarter"), off(2, 0.2, 0, "top-right quarter")],
            "",
            "component 2 is not where it should be",
        ),
        ([off(2, 0, 0.2, "top-left quarter")], "", "component 2 is missing from the top-left quarter"),
        ([off(2, 0.1, 0.2)], "", "there is too little of component 2"),
        ([off(2, 0.2, 0.1)], "", "there is too much of component 2"),
        ([off(2, 0.2, 0)], "", "component 2 is where it should not be"),
    ],
)
def test_deviations_are_summed_up_in_one_sentence(unusual, spot, sentence):
    assert summarise(unusual, spot).sentence == sentence


def test_findings_are_one_sentence_and_few_details():
    unusual = [off(component, 0.4, 0.1) for component in range(1, 9)]
    verdict = verdicts.Verdict(
        "a.png", "anomalous", 1.0, 9.0, {"patchhist": 9.0}, "patchhist", (40, 15), unusual, (80, 60)
    )
    assert verdict.findings[:2] == [
        "there is too much of component 1 (4.0 times the normal area)",
        "most unusual at x 40, y 15",
    ]
    assert len(verdict.findings) == 4 and len(verdict.as_json()["components"]) == 8
    by_surface = replace(
        verdict, alarm="memory", components=unusual[:1]
    )  # in no quarter above all: it explains no surface
    assert by_surface.findings == ["unusual surface at x 40, y 15", "component 1: 4.0 times the normal area"]
    assert replace(verdict, components=()).findings == [
        "unusual arrangement of components, most of all at x 40, y 15"
    ]
    in_words = replace(by_surface, components=[off(2, 0.1, 0.2, "top-right quarter", name="lid")]).findings
    assert in_words == [
        "something lies where lid should be (lid: 50 % of the normal area in the top-right quarter)",
        "unusual surface at x 40, y 15",
    ]


@pytest.mark.parametrize(
    ("unusual", "findings"),
    [
        (
            [off(2, 0.1, 0.2, above_all="top-left quarter")],
            [
                "there is too little of component 2 (50 % of the normal area, above all in the top-left quarter)"
            ],
        ),
        (
            [off(2, 0.2, 0, "top-left quarter")],
            ["component 2 is where it should not be (normally none in the top-left quarter)"],
        ),
        (
            [off(2, 0.4, 0.002, "top-left quarter")],
            ["there is too much of component 2 (normally hardly any in the top-left quarter)"],
        ),
        (
            [off(2, 0, 0.2, "top-left quarter"), off(2, 0.2, 0, "top-right quarter")],
            [
                "component 2 is not where it should be (none in the top-left quarter, and normally none in the "
                "top-right quarter)"
            ],
        ),
        (
            [off(5, 0, 0.1, above_all="top-left quarter"), off(2, 0.3, 0.2, above_all="top-left quarter")],
            ["component 2 lies where component 5 should be, in the top-left quarter"],
        ),
        (
            [off(2, 0, 0.2, "top-left quarter"), off(2, 0, 0.2, "top-right quarter")],
            ["component 2: none in the top-left quarter, and none in the top-right quarter"],
        ),
        (
            [
                off(1, 0, 0.2),
                off(2, 0.1, 0.2, "top-left quarter"),
                off(3, 0.3, 0.2),
                off(2, 0.1, 0.2, "bottom-left quarter"),
                off(2, 0.1, 0.2, "bottom-right quarter"),
            ],
            [
                "component 1 is missing",
                "component 2: 50 % of the normal area in the top-left quarter, 50 % of the normal area in the "
                "bottom-left quarter, and 50 % of the normal area in the bottom-right quarter",
                "component 3: 1.5 times the normal area",
            ],
        ),
    ],
)
def test_of_one_component_there_is_one_sentence(unusual, findings):
    assert verdicts.findings_of(unusual) == findings


@given(arrays(np.uint8, (8, 8), elements=st.integers(0, 2)), st.sampled_from(["", *PLACES]))
def test_no_two_findings_are_about_the_same_component(cells, quarter):
    findings = verdicts.findings_of(deviations(cells.repeat(8, 0).repeat(8, 1), HISTOGRAM), quarter=quarter)
    if findings and "lies where component" not in findings[0]:  # of two, which may be unusual elsewhere, too
        for component in ("component 1", "component 2"):
            assert sum(component in finding for finding in findings) <= 1


def test_named_components_are_called_by_their_names(engine, run, photos, tmp_path):
    engine.metadata["names"] = {"1": "capacitor"}
    assert run(photos / "b/a.png") == 4
    assert lines(tmp_path)[0]["findings"][0] == "capacitor and component 2 are missing"
    assert [part["name"] for part in lines(tmp_path)[0]["components"]] == ["capacitor", ""]


# Names


@pytest.mark.parametrize("name", ["y" * 245 + ".png", "ä" * 120 + ".png", "y" * 238 + ".png"])
def test_a_long_name_ends_no_run(engine, run, photos, tmp_path, name):
    write(photos / "b/c.jpg", 50).rename(photos / "b" / name)
    (photos / "b" / name).with_name(name[:-5] + "z.png").write_bytes(
        (photos / "a.png").read_bytes()
    )  # as long, and alike
    assert run(photos, "--save_maps") == 4
    assert sum(Path(row["image"]).name == name for row in rows(tmp_path)) == 1 and len(rows(tmp_path)) == 4
    drawings = [path.name for path in (tmp_path / "out/maps/b").iterdir()]
    assert len(drawings) == 3 and all(drawing.endswith(".map.png") for drawing in drawings)
    assert (f"{name}.map.png" in drawings) == (len(name.encode()) <= 242)


def test_names_are_no_formulas_in_the_table(engine, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "+1.png", "-1.png", "@a.png", "'=1.png", "plain.png", "'quoted'.png", "\t=1.png"]
    for name in names:
        write(tmp_path / name, 10)
    assert run(*(f"./{name}" for name in names)) == 0
    cells = [row["image"] for row in rows(tmp_path)]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]
    assert [files.from_csv_text(cell) for cell in cells] == names
    assert [one["image"] for one in lines(tmp_path)] == names
    assert cells[5:7] == names[5:7]


def test_branches_contributions_are_called_so(engine, run, photos, tmp_path):
    """The files *_LGST_*_score.npy hold raw scores: that name is theirs."""
    assert run(photos) == 4
    assert not [column for column in rows(tmp_path)[0] if column.endswith("_score")]
    for row, line in zip(rows(tmp_path), lines(tmp_path)):
        assert float(row["LGST_contribution"]) == pytest.approx(line["contributions"]["LGST"], rel=1e-4)
        assert sum(line["contributions"].values()) == pytest.approx(line["score"])


def test_a_permission_that_lacks_names_no_option_of_others(engine, run, photos, capsys, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "out")

    monkeypatch.setattr(predictions, "only_writer", refuse)
    assert run(photos) == 2
    said = capsys.readouterr().err
    assert "no permission to write or read out" in said and "--workspace" not in said


# Folders that cannot be listed, or go away


def broken_listing(monkeypatch, folder: Path, number: int) -> None:
    real = os.scandir

    def scandir(path="."):
        if Path(path) == folder:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(engine, run, photos, tmp_path, monkeypatch):
    (photos / "b/a.png").unlink()
    broken_listing(monkeypatch, photos / "b", 5)
    assert run(photos) == 3
    assert [row["verdict"] for row in rows(tmp_path)] == ["normal", "unreadable"]
    assert "b cannot be listed, so what lies in it is not judged" in rows(tmp_path)[1]["findings"]


def poll(monkeypatch, *events) -> None:
    """Let something happen after each poll of --watch, then press Ctrl-C."""
    events = list(events)

    def sleep(_):
        if not events:
            raise KeyboardInterrupt
        event = events.pop(0)
        if event:
            event()

    monkeypatch.setattr(watching.time, "sleep", sleep)


@pytest.mark.parametrize("empty_mount_point", [False, True])
@pytest.mark.parametrize("part", ["", "b"])
def test_a_folder_that_goes_away_for_a_while(
    engine, run, photos, tmp_path, capsys, monkeypatch, part, empty_mount_point
):
    folder, away = photos / part, tmp_path / "away"

    def go():
        folder.rename(away)
        if empty_mount_point:
            folder.mkdir()

    def come():
        if empty_mount_point:
            folder.rmdir()
        away.rename(folder)
        write(folder / "new.png", 30)

    poll(monkeypatch, None, None, go, None, None, None, come, None, None, None)
    assert run(photos, "--watch") == 4
    names = [Path(row["image"]).name for row in rows(tmp_path)]
    assert sorted(names) == ["a.png", "a.png", "c.jpg", "new.png"]
    said = capsys.readouterr().err
    if not part and empty_mount_point:
        assert said.count("another folder") == 2
    elif not part:
        assert said.count("gone or cannot be listed") == said.count("is there again") == 1


def test_what_goes_away_while_it_is_read_is_scored_later(engine, run, photos, tmp_path, monkeypatch):
    away, real = tmp_path / "away", inspection.read_picture
    first = threading.Lock()  # several threads read

    def read(path, *rest):
        if first.acquire(blocking=False):
            photos.rename(away)
        return real(path, *rest)

    monkeypatch.setattr(predict, "read_picture", read)
    poll(monkeypatch, None, None, lambda: away.rename(photos), None, None)
    assert run(photos, "--watch") == 4
    assert [row["verdict"] for row in rows(tmp_path)] == ["normal", "anomalous", "normal"]


def test_a_file_that_grows_while_it_is_read_is_not_judged_yet(engine, run, photos, tmp_path, monkeypatch):
    real, reads = inspection.read_picture, []

    def read(path, *rest):
        picture = real(path, *rest)
        if path.name == "c.jpg" and not reads:
            reads.append(path)
            write(path, 210)
        return picture

    monkeypatch.setattr(predict, "read_picture", read)
    poll(monkeypatch, None, None, None, None)
    assert run(photos, "--watch") == 4
    assert [(Path(row["image"]).name, row["verdict"]) for row in rows(tmp_path)] == [
        ("a.png", "normal"),
        ("a.png", "anomalous"),
        ("c.jpg", "anomalous"),
    ]


def test_an_unreadable_file_is_tried_again_a_few_times(engine, run, tmp_path, monkeypatch):
    whole = write(tmp_path / "a.png", 10).read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "damaged.png").write_bytes(whole[:60])
    (folder / "stalled.png").write_bytes(whole[:60])  # its copying goes on after a pause
    real, reads = inspection.read_picture, []

    def read(path, *rest):
        reads.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(predict, "read_picture", read)
    poll(monkeypatch, None, None, lambda: (folder / "stalled.png").write_bytes(whole), *[None] * 8)
    assert run(folder, "--watch") == 3
    assert {Path(row["image"]).name: row["verdict"] for row in rows(tmp_path)} == {
        "damaged.png": "unreadable",
        "stalled.png": "normal",
    }
    assert len(rows(tmp_path)) == 2 and reads.count("damaged.png") == watching.READ_ATTEMPTS
    poll(monkeypatch, *[None] * 8)
    assert run(folder, "--watch") == 0 and len(rows(tmp_path)) == 2  # nor by the next run


def test_an_empty_file_is_named_after_a_while(engine, run, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.png").touch()
    poll(monkeypatch, *[None] * 5)
    assert run(folder, "--watch") == 0 and rows(tmp_path) == []
    os.utime(folder / "empty.png", (1000, 1000))
    poll(monkeypatch, *[None] * 6)
    assert run(folder, "--watch") == 3
    assert [row["verdict"] for row in rows(tmp_path)] == ["unreadable"]


def test_watch_remembers_a_bounded_number_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "MAX_REMEMBERED", 3)
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    folder, scored = tmp_path / "in", {}
    rounds = watching.watch([folder], tmp_path / "out", scored)
    for index in range(8):
        path = write(folder / f"{index}.png", index)
        assert [next(rounds) for _ in range(3)] == [[], [path], []]
        path.unlink()
        assert next(rounds) == []
    assert [Path(name).stem for name in scored] == ["4", "5", "6", "7"]


def test_a_name_is_one_line_without_a_terminals_commands(engine, run, photos, tmp_path, capsys):
    name = "a\nnormal     b.png\x1b[2J.png"
    write(photos / "a.png", 10).rename(photos / name)
    assert run(photos) == 4
    said = capsys.readouterr().out
    assert r"a\nnormal     b.png\x1b[2J.png" in said and "\x1b" not in said
    assert rows(tmp_path)[0]["image"] == str(photos / name)


def test_a_file_named_beside_its_folder_is_scored_once(engine, run, photos, tmp_path):
    assert run(photos / "b/a.png", photos) == 4
    assert [Path(row["image"]).relative_to(photos).as_posix() for row in rows(tmp_path)] == [
        "b/a.png",
        "a.png",
        "b/c.jpg",
    ]


@pytest.mark.parametrize(
    "arguments", [["", "--model", "x"], ["photos", "--model", ""], ["photos", "--model", "x", "--output", ""]]
)
def test_an_empty_path_is_not_the_current_folder(monkeypatch, capsys, arguments):
    assert exit_status(monkeypatch, predict.main, "predict.py", *arguments) == 2
    assert "an empty path" in capsys.readouterr().err


def test_a_drawing_that_cannot_be_written_costs_no_verdict(engine, run, photos, tmp_path, capsys):
    (tmp_path / "out/maps/a.png.map.png/x").mkdir(parents=True)
    assert run(photos, "--save_maps") == 4
    assert len(rows(tmp_path)) == 3 and "there is no drawing of" in capsys.readouterr().err
