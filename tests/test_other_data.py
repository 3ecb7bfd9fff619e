"""From pictures to verdicts on data sets that are not laid out like MVTec LOCO AD."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

from csad import settings
from csad.commands import score_images as predict
from csad.data import layouts
from csad.errors import UserError
from csad.evaluation import localisation
from csad.inference.runtimes import open_model
from csad.inference.verdicts import legend_of

import numpy as np
import pytest
from conftest import draw_parts, status_of
from PIL import Image
from test_end_to_end import ROOT, STAGES, arguments

CASES = Path(__file__).parent / "cases"
FOUR_STEPS = {"CSAD": ("--lgst.steps", "4")}


def run(stage: str, workspace: Path, dataset: Path, *extra: str) -> int:
    """Run a stage in this process; returns its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            [f"{stage}.py", *arguments(stage, workspace, dataset, *FOUR_STEPS.get(stage, ()), *extra)],
        )
        return status_of(lambda: runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__"))


def predicted(model: Path, pictures: Path, output: Path) -> list[dict]:
    """What predict.py says of a folder of pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            ["predict.py", str(pictures), "--model", str(model), "--output", str(output), "--device", "cpu"],
        )
        assert status_of(predict.main) in (0, 4)
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def draw(folder: Path, count: int, seed: int = 7) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(draw_parts(rng, 4, 256)[0]).save(folder / f"{index:03d}.png")


# MVTec AD's layout


@pytest.fixture(scope="module")
def mvtec_ad(tmp_path_factory):
    """(workspace, data set) after all stages; a pin that is missing counts as logical."""
    folder = tmp_path_factory.mktemp("mvtec_ad")
    shutil.copytree(CASES / "mini_mvtec_ad", folder / "data")
    shutil.copytree(settings.CONFIGS, folder / "configs")
    (folder / "configs/categories/cup.yaml").write_text("logical: [missing_pin]\nnames: {1: cup of tea}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "CONFIGS", folder / "configs")
        for stage in (*STAGES, "report"):
            assert run(stage, folder / "work", folder / "data") == 0, stage
        yield folder / "work", folder / "data"


def test_every_defect_of_mvtec_ad_is_measured(mvtec_ad):
    work, _ = mvtec_ad
    measured = json.loads((work / "anomaly_score/cup_metrics.json").read_text())
    assert {name: (entry["kind"], entry["images"]) for name, entry in measured["defects"].items()} == {
        "crack": ("structural", 1),
        "missing_pin": ("logical", 1),
    }
    sums = ("patchhist", "LGST", "patchhist+LGST", "memory", "DFM", "patchhist+LGST+memory+DFM", "fused")
    for entry in measured["defects"].values():
        assert set(entry["auroc"]) == set(sums) and all(
            0 <= value <= 100 for value in entry["auroc"].values()
        )
    for kind in ("logical", "structural"):
        found = measured["localisation"]["fused"][kind]
        assert 0 <= found["pixel_auroc"] <= 100 and len(found["spro"]) == 5
    said = (work / "score_combine_result.txt").read_text()
    assert "missing_pin" in said and "not measured" not in said
    assert {path.name for path in (work / "datasets/masks/cup/test_seg_output").iterdir()} == {
        "good_000.png",
        "logical_anomalies_missing_pin_000.png",
        "structural_anomalies_crack_000.png",
    }
    assert "missing_pin" in (work / "report.html").read_text()


def test_names_of_components_travel_with_the_exported_model(mvtec_ad, tmp_path, monkeypatch, capsys):
    work, dataset = mvtec_ad
    known = open_model(work / "ckpt/pytorch_models/cup.pth", "cpu").metadata
    assert known["names"] == {"1": "cup of tea"} and legend_of(known)[0] == (1, "cup of tea")
    assert "1 cup of tea</span>" in (work / "report.html").read_text()
    shutil.copytree(settings.CONFIGS, tmp_path / "configs")
    (tmp_path / "configs/categories/cup.yaml").write_text("logical: [missing_pin]\nnames: {99: saucer}\n")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path / "configs")
    before = (work / "ckpt/pytorch_models/cup.pth").read_bytes()
    assert run("export_model", work, dataset) == 2
    assert "cup.yaml names component 99, but cup has components 1 to" in capsys.readouterr().err
    assert (work / "ckpt/pytorch_models/cup.pth").read_bytes() == before


def test_localisation_is_measured_for_whichever_kind_has_masks(mvtec_ad, tmp_path):
    work, dataset = (shutil.copytree(folder, tmp_path / folder.name) for folder in mvtec_ad)
    shutil.rmtree(dataset / "cup/ground_truth/missing_pin")
    assert run("benchmark_performance", work, dataset) == 0
    measured = json.loads((work / "anomaly_score/cup_metrics.json").read_text())["localisation"]["fused"]
    assert "spro" in measured["structural"]
    assert measured["logical"] == {"missing": "cup: test/missing_pin/000.png has no ground-truth mask"}


def test_a_defect_without_masks_is_left_out_and_named(tmp_path):
    """Of one kind, others have masks: they are measured as if the one were not there."""
    shutil.copytree(CASES / "mini_mvtec_ad", tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "cup/ground_truth/missing_pin")
    category, rng = layouts.Category(tmp_path / "cup"), np.random.default_rng(0)
    maps = {
        "good": rng.random((1, 64, 64), np.float32),
        "structural_anomalies": rng.random((2, 64, 64), np.float32),
    }
    assert localisation.without_masks(category, "structural_anomalies") == {"missing_pin"}
    found = localisation.measure(category, maps, "structural_anomalies")
    shutil.rmtree(tmp_path / "cup/test/missing_pin")
    alone = localisation.measure(
        layouts.Category(tmp_path / "cup"),
        maps | {"structural_anomalies": maps["structural_anomalies"][:1]},
        "structural_anomalies",
    )
    assert found == alone
    shutil.rmtree(tmp_path / "cup/ground_truth")
    with pytest.raises(UserError, match="test/crack/000.png has no ground-truth mask"):
        localisation.measure(
            layouts.Category(tmp_path / "cup"),
            maps | {"structural_anomalies": maps["structural_anomalies"][:1]},
            "structural_anomalies",
        )


# Good pictures in one folder, and nothing else


def test_a_folder_of_good_pictures_is_enough_for_verdicts(tmp_path, capsys):
    pictures, work = tmp_path / "my pictures", tmp_path / "work"
    draw(pictures, 12)
    for stage in STAGES[:-1]:
        assert run(stage, work, pictures) == 0, stage
    said = capsys.readouterr().out
    assert "my pictures (plain folder): 10 training images; 2 validation images (set aside" in said
    assert "no good test images, so nothing to evaluate" in said
    found = predicted(work / "ckpt/pytorch_models/my pictures.pth", pictures, tmp_path / "out")
    assert len(found) == 12 and all(np.isfinite([one["score"], one["threshold"]]).all() for one in found)
    assert {one["verdict"] for one in found} <= {"normal", "anomalous"}
    capsys.readouterr()
    assert run("benchmark_performance", work, pictures) == 2
    assert (
        "nothing to measure, there are no good test images; export_model.py and predict.py"
        in capsys.readouterr().err
    )
    assert run("report", work, pictures) == 2
    assert "no good test images" in capsys.readouterr().err


# A region of interest, and folders within folders


def test_nothing_outside_of_the_region_of_interest_changes_a_score(tmp_path):
    root, work, photos = tmp_path / "data/parts", tmp_path / "work", tmp_path / "photos"
    for number, camera in enumerate(("left", "right")):
        draw(root / "train/good" / camera, 6, number)  # both called 000.png to 005.png
    region = np.zeros((256, 256), np.uint8)
    region[:, :160] = 255
    Image.fromarray(region).save(root / "roi.png")
    for stage in ("pseudo_label", "train_segmentor", "patch_memory", "export_model"):
        assert run(stage, work, root.parent) == 0, stage
    assert run("export_model", work, root.parent, "--format", "onnx") == 0
    made = {path.name for path in (work / "datasets/masks/parts").iterdir() if path.is_dir()} - {"info"}
    keys = {f"{camera}_{index:03d}" for camera in ("left", "right") for index in range(6)}
    assert made < keys and len(made) == 10

    draw(photos, 1, 5)
    plain = np.asarray(Image.open(photos / "000.png"))
    for name, columns in (("inside", slice(40, 100)), ("outside", slice(176, 236))):
        changed = plain.copy()
        changed[100:160, columns] = (255, 0, 255)
        Image.fromarray(changed).save(photos / f"{name}.png")
    for model in ("pytorch_models/parts.pth", "onnx_models/parts.onnx"):
        found = predicted(work / "ckpt" / model, photos, tmp_path / Path(model).suffix)
        scores = {Path(one["image"]).stem: one["score"] for one in found}
        assert abs(scores["outside"] - scores["000"]) <= 1e-6, model
        assert abs(scores["inside"] - scores["000"]) > 1e-3, model
