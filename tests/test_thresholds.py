"""The threshold that travels with exported models: changed in every format at once, and judged by wherever they are used."""

from __future__ import annotations

import json
import sys

from csad.commands import score_images as predict
from csad.data import files
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.export_tables import FIELDS, table_of, threshold_line
from csad.evaluation.thresholds import threshold_image, threshold_of
from csad.export import exported_thresholds, exporters
from csad.inference import openvino_engine
from csad.inference.runtimes import OnnxEngine, open_model
from csad.station.station import Options, Station

import numpy as np
import pytest

import export_model
from models.fused import attach_metadata, metadata
from tests.test_deploy import state_of

SCORES = [float(score) for score in range(1, 100)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workspace with one model in three formats, and int8 by name."""
    workspace = Workspace(tmp_path_factory.mktemp("exported"))
    state = state_of("paper")
    attach_metadata(
        state, exported_thresholds.with_validation_scores(metadata(state), np.array(SCORES), "discs")
    )
    files.write_state(workspace.exported_model("discs", "torch"), state)
    content = exporters.onnx_model(state, "discs", "fp32", with_map=True, raw_input=False)
    for precision in ("fp32", "int8"):
        files.write_bytes(workspace.exported_model("discs", "onnx", precision), content)
    path = workspace.exported_model("discs", "openvino")
    path.parent.mkdir()
    exporters.write_openvino(
        openvino_engine.read_openvino(workspace.exported_model("discs", "onnx")),
        path,
        OnnxEngine(content, "cpu").metadata,
    )
    return workspace


@pytest.fixture
def run(monkeypatch):
    def run_it(main, *args):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
        main()

    return run_it


def test_what_an_export_suggests():
    # Of 99 scores the largest promises 1 %.
    assert exported_thresholds.with_validation_scores({}, np.arange(99.0), "discs")["threshold"] == 98
    with pytest.raises(UserError, match="not finite on validation images"):
        exported_thresholds.with_validation_scores({}, np.array([1.0, np.nan]), "discs")


def test_the_picture_whose_score_is_the_threshold_is_named():
    scores, images = np.array([3.0, 7.0, 5.0]), [f"validation/good/{name}.png" for name in "abc"]
    known = exported_thresholds.with_validation_scores({}, scores, "discs", images)
    assert threshold_image(known) == "validation/good/b.png"
    assert "threshold 7, " in threshold_line(known)
    assert "the score of validation/good/b.png: look at that picture" in threshold_line(known)
    assert known["validation_images"] == [images[0], images[2], images[1]]  # as the scores are sorted
    # Neither a threshold of somebody's own nor an older model has one.
    assert threshold_image(known | {"threshold": 6.0}) is None
    assert threshold_image(exported_thresholds.with_validation_scores({}, scores, "discs")) is None
    report = dict.fromkeys(FIELDS, 1.0) | {"category": "discs", "format": "torch", "precision": "fp32"}
    report |= {
        "ran_in": "fp32",
        "stand_ins": [],
        "threshold": 7.0,
        "threshold_image": "validation/good/b.png",
    }
    assert "discs, torch fp32: threshold 7, the score of the good picture validation/good/b.png" in table_of(
        [report]
    )


def test_a_threshold_is_changed_in_every_format_and_judged_by(exported, run, capsys):
    paths, image = exported.exported_models(None), np.full((1, 3, 256, 256), 90, np.uint8)
    assert [path.name for path in paths] == ["discs.pth", "discs.onnx", "discs_int8.onnx", "discs.xml"]
    weights = paths[-1].with_suffix(".bin").read_bytes()
    before = [open_model(path, "cpu").score(image) for path in paths]
    run(export_model.main, "--workspace", exported.root, "--categories", "discs", "--set_threshold", -12.5)
    assert capsys.readouterr().out.count("threshold -12.5") == 4
    for path, score in zip(paths, before):
        engine = open_model(path, "cpu")
        assert engine.score(image) == score and engine.metadata["category"] == "discs"
        threshold, words = threshold_of(engine.metadata, None, None, "")
        assert threshold == -12.5 and words == "set in the model: every good part may be rejected"
        assert Station("discs", engine, Options(), print).threshold == -12.5
        assert threshold_of(engine.metadata, None, 0.01, "")[0] == 99  # asked for here, this is what counts
        beside = json.loads(path.with_name(f"{path.stem}.threshold.json").read_text())
        assert (beside["threshold"], beside["false_positive_rate"], beside["validation_images"]) == (
            -12.5,
            1.0,
            99,
        )
    assert paths[-1].with_suffix(".bin").read_bytes() == weights
    files.write_image(exported.root / "photo.png", image[0].transpose(1, 2, 0))
    for threshold, status in ((float(before[1][0]) - 1, 4), (float(before[1][0]) + 1, None)):
        run(
            export_model.main,
            "--workspace",
            exported.root,
            "--categories",
            "discs",
            "--set_threshold",
            threshold,
        )
        with pytest.raises(SystemExit) as ended:
            run(
                predict.main,
                exported.root / "photo.png",
                "--model",
                paths[1],
                "--output",
                exported.root / "out",
            )
        assert ended.value.code == (status or 0)
    run(export_model.main, "--workspace", exported.root, "--set_false_positive_rate", 0.05)
    for path in paths:
        known = open_model(path, "cpu").metadata
        assert known["threshold"] == 95 and known["threshold_rate"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--categories", "discs", "--set_threshold", "nan"], "--set_threshold is nan"),
        (["--categories", "discs", "--set_threshold", "inf"], "--set_threshold is inf"),
        (["--set_threshold", "1"], "for one category"),
        (["--categories", "a", "b", "--set_threshold", "1"], "for one category"),
        (["--categories", "cups", "--set_threshold", "1"], "no exported model of cups"),
        (["--set_false_positive_rate", "1.5"], "rate is 1.5"),
        (["--set_false_positive_rate", "nan"], "rate is nan"),
    ],
)
def test_mistakes_change_nothing(exported, run, args, words):
    paths = exported.exported_models(None)
    before = [path.read_bytes() for path in paths]
    with pytest.raises(UserError, match=words):
        run(export_model.main, "--workspace", exported.root, *args)
    assert [path.read_bytes() for path in paths] == before


def test_one_damaged_file_keeps_all_others_as_they_are(exported, run, tmp_path):
    good, bad = (Workspace(tmp_path).exported_model("discs", kind) for kind in ("torch", "onnx"))
    files.write_bytes(good, exported.exported_model("discs", "torch").read_bytes())
    files.write_bytes(bad, b"no model")
    before = good.read_bytes()
    with pytest.raises(UserError, match=r"discs\.onnx"):
        run(export_model.main, "--workspace", tmp_path, "--categories", "discs", "--set_threshold", 1)
    assert good.read_bytes() == before


def test_a_published_file_gets_its_threshold(run, tmp_path):
    workspace, state = Workspace(tmp_path), state_of("paper")
    del state._metadata["csad"]["input_size"]
    path = workspace.exported_model("discs", "torch")
    files.write_state(path, state)
    with pytest.raises(UserError, match="does not know the scores of validation images"):
        run(export_model.main, "--workspace", tmp_path, "--set_false_positive_rate", 0.1)
    run(export_model.main, "--workspace", tmp_path, "--categories", "discs", "--set_threshold", 3)
    assert threshold_of(open_model(path, "cpu").metadata, None, None, "") == (3, "set in the model")
    with pytest.raises(UserError, match="finite"):
        threshold_of({"threshold": float("nan")}, None, None, "discs.pth")
