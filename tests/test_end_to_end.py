"""The five stages in order on a tiny data set, interrupted, repeated and misused as people do."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from csad.data import files, records
from csad.errors import run_script
from csad.training.loop import TrainingLoop

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
TINY = ("--preset", "quick", "--backbone", "efficientnet_lite0", "--device", "cpu", "--images.size", "256")
TINY_OF = {
    "pseudo_label": ("--pseudo_labels.rotations", "2"),
    "train_segmentor": (
        "--segmentor.epochs",
        "3",
        "--segmentor.unsupervised_from_epoch",
        "1",
        "--segmentor.width",
        "16",
    ),
    "CSAD": ("--lgst.steps", "6", "--lgst.width", "16", "--lgst.teacher_channels", "16"),
    "patch_memory": ("--memory.rows", "50"),
}
STAGES = ("pseudo_label", "train_segmentor", "CSAD", "patch_memory", "export_model", "benchmark_performance")
TRAINING = STAGES[:4]


def arguments(stage: str, workspace: Path, dataset: Path, *extra: str) -> list[str]:
    return [
        "--workspace",
        str(workspace),
        "--dataset_root",
        str(dataset),
        *TINY,
        *TINY_OF.get(stage, ()),
        *extra,
    ]


@pytest.fixture
def run(monkeypatch):
    """Run a stage in this process."""

    def run_stage(stage: str, workspace: Path, dataset: Path, *extra: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", *arguments(stage, workspace, dataset, *extra)])
        run_script(importlib.import_module(stage).main)

    return run_stage


@pytest.fixture
def fails(run, capsys):
    """Run a stage that must end with status 2 and one sentence, or as interrupted; returns the sentence."""

    def run_wrong(stage: str, workspace: Path, dataset: Path, *extra: str, interrupted: bool = False) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(stage, workspace, dataset, *extra)
        assert ended.value.code == (130 if interrupted else 2)
        begins = "interrupted; " if interrupted else "error: "
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(begins)]
        assert len(said) == 1
        return said[0]

    return run_wrong


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workspace, data set) after all five stages, run once for the tests that only look."""
    folder = tmp_path_factory.mktemp("finished")
    dataset = folder / "data"
    from conftest import make_discs

    make_discs(dataset)
    for stage in STAGES:
        done = subprocess.run(
            [sys.executable, f"{stage}.py", *arguments(stage, folder / "work", dataset)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder / "work", dataset


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "work")
    return tmp_path / "work", finished[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".csad.lock"
    }


def test_every_file_of_the_contract_is_there(finished):
    work, _ = finished
    masks = work / "datasets/masks/discs"
    for name in (
        "000/all_masks.png",
        "000/background.jpg",
        "000/refined_masks.png",
        "000/cluster_map.png",
        "000/filtered_cluster_map.png",
        "000/filtered_cluster_map_color.png",
        "info/filtered_histogram_indices.npy",
        "info/filtered_component_histogram.npy",
        "info/raw_component_histogram.npy",
        "info/all_component_feats.npz",
        "info/component_num_mode.npy",
        "info/feature.png",
        "info/info.txt",
        "test_seg_output/good_000.png",
        "test_seg_output/logical_anomalies_003.png",
    ):
        assert (masks / name).exists(), name
    for name in (
        "ckpt/segmentor_discs_256.pth",
        "ckpt/best_discs.pth",
        "ckpt/pytorch_models/discs.pth",
        "anomaly_score/discs_patchhist_params.npz",
        "anomaly_score/discs_patchhist_maps.npz",
        "anomaly_score/discs_memory_maps.npz",
        "ckpt/memory_discs.pth",
        "anomaly_score/discs_DFM_maps.npz",
        "ckpt/dfm_discs.pth",
        "anomaly_score/discs_torch_scores.csv",
        "score_combine_result.txt",
    ):
        assert (work / name).exists(), name
    for branch in ("patchhist", "LGST", "CSAD", "memory", "DFM"):
        for part, count in (("logi", 8), ("struc", 8), ("val", 6)):
            scores = np.load(work / f"anomaly_score/discs_{branch}_{part}_score.npy")
            assert scores.shape == (count,)
            assert np.isfinite(scores).all()
    assert not list(work.rglob("*progress*"))
    assert not list(work.rglob("*.tmp"))


def test_result_file_reads_as_peoples_scripts_expect(finished):
    lines = (finished[0] / "score_combine_result.txt").read_text().splitlines()
    assert lines[0] == "DISCS:"
    for line, branches in zip(
        lines[1:],
        (
            "('patchhist',)",
            "('LGST',)",
            "('patchhist', 'LGST')",
            "('memory',)",
            "('DFM',)",
            "('patchhist', 'LGST', 'memory', 'DFM')",
            "('fused',)",
        ),
    ):
        assert re.fullmatch(re.escape(branches) + r" AUC: \d+\.\d{3} \d+\.\d{3}", line)
    assert any("stand-ins" in line and "efficientnet_lite0" in line for line in lines)


def decided(work: Path) -> dict[str, float]:
    """The weights that stage 4 decided on."""
    return json.loads((work / "anomaly_score/discs_branches.json").read_text())["weights"]


def test_stages_4_and_5_fuse_the_same_branches(finished):
    work, _ = finished
    exported = json.loads((work / "anomaly_score/discs_torch_scores.json").read_text())
    assert exported["branches"] == list(decided(work)) and exported["model"]["branch_weights"] == decided(
        work
    )
    metrics = json.loads((work / "anomaly_score/discs_metrics.json").read_text())
    assert metrics["weights"] == decided(work) and metrics["fused"] == list(decided(work))
    lines = (work / "score_combine_result.txt").read_text().splitlines()
    weights = ", ".join(f"{branch} {weight:g}" for branch, weight in decided(work).items())
    assert f"fused: {weights} (softplus)" in lines
    exported = json.loads((work / "export_report.json").read_text())[0]
    measured = metrics["detection"]["fused"]
    assert [exported[f"auroc_{kind}"] for kind in ("logical", "structural")] == pytest.approx(
        [measured[kind]["auroc"] for kind in ("logical", "structural")], abs=7
    )  # of 4 by 4 pairs one may change


def test_exported_model_gives_the_fused_score_of_the_stages(finished):
    work, _ = finished
    with open(work / "anomaly_score/discs_torch_scores.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows[0].keys() == {"image", "split", "score"}
    from models.fusion import EXPORTED_STD_FLOOR, apply_z, contribution, fit_normalisation

    fused = 0
    for branch, weight in decided(work).items():
        scores = {
            part: np.load(path)
            for part in ("logi", "val", "held_out")
            if (path := work / f"anomaly_score/discs_{branch}_{part}_score.npy").exists()
        }
        assert ("held_out" in scores) == (branch == "patchhist")
        good = np.concatenate([scores["val"], scores.get("held_out", [])])
        z = apply_z(scores["logi"], *fit_normalisation(good, branch, "softplus", EXPORTED_STD_FLOOR))
        fused = fused + weight * contribution(z, "softplus")
    exported = [float(row["score"]) for row in rows if row["split"] in ("good", "logical_anomalies")]
    np.testing.assert_allclose(exported, fused, rtol=1e-3, atol=1e-2)
    report = json.loads((work / "anomaly_score/discs_torch_scores.json").read_text())
    assert report["stand_ins"]


def test_everything_is_skipped_the_second_time(copy_of_finished, run):
    work, dataset = copy_of_finished
    before = contents(work)
    for stage in TRAINING:
        run(stage, work, dataset)
    assert contents(work) == before


def test_another_setting_is_noticed_and_harms_nothing(copy_of_finished, fails):
    work, dataset = copy_of_finished
    before = contents(work)
    assert "lr" in fails("CSAD", work, dataset, "--lgst.lr", "0.1")
    assert "epochs" in fails("train_segmentor", work, dataset, "--segmentor.epochs", "9")
    assert "seed" in fails("pseudo_label", work, dataset, "--seed", "5")
    assert contents(work) == before


def test_same_seed_same_files(finished, run, tmp_path):
    work, dataset = finished
    for stage in TRAINING:
        run(stage, tmp_path / "again", dataset)
    before, after = contents(work), contents(tmp_path / "again")
    different = [name for name in after if before[name] != after[name]]
    assert not different


@pytest.mark.parametrize("option", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("stage", "owner", "called", "times"),
    [
        ("pseudo_label", files, "write_image", 30),
        ("train_segmentor", TrainingLoop, "report", 2),
        ("CSAD", TrainingLoop, "report", 3),
    ],
)
def test_interrupted_and_resumed_gives_the_same_files(
    stage, owner, called, times, option, finished, run, fails, monkeypatch, tmp_path
):
    """Ctrl-C in the middle of the work; then the same command again, which goes on, also with --overwrite."""
    work, dataset = finished
    if option:
        shutil.copytree(work, tmp_path / "work")
    else:
        for earlier in STAGES[: STAGES.index(stage)]:
            run(earlier, tmp_path / "work", dataset)
    real, calls = getattr(owner, called), itertools.count(1)

    def interrupting(*arguments, **options):
        if next(calls) == times:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, called, interrupting)
    fails(stage, tmp_path / "work", dataset, *option, interrupted=True)
    calls = itertools.count(1)
    monkeypatch.setattr(
        owner, called, lambda *arguments, **options: (next(calls), real(*arguments, **options))[1]
    )
    run(stage, tmp_path / "work", dataset, *option)
    rest, calls = next(calls), itertools.count(1)
    run(stage, tmp_path / "work", dataset, "--overwrite")  # complete by now, so from the start
    assert rest < next(calls)
    expected, found = contents(work), contents(tmp_path / "work")
    assert [name for name in found if expected[name] != found[name]] == []


def test_training_resumes_from_a_saved_step(finished, run, tmp_path, monkeypatch):
    """Killed outright after the progress file was written: the weights end up the same, bit for bit."""
    from csad.training import loop

    import CSAD

    work, dataset = finished
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)
    real, calls = CSAD.losses, []

    def killed_at_the_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(CSAD, "losses", killed_at_the_fourth)
    with pytest.raises(ZeroDivisionError):
        run("CSAD", tmp_path, dataset)
    assert (tmp_path / "ckpt/discs_lgst_progress.pth").exists()
    monkeypatch.setattr(CSAD, "losses", lambda *args: (calls.append(1), real(*args))[1])
    run("CSAD", tmp_path, dataset)
    assert len(calls) == 4 + 3  # steps 1 to 3 were not trained again
    first, second = (files.read_state(folder / "ckpt/best_discs.pth")["state"] for folder in (work, tmp_path))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_progress_file_of_other_settings_is_refused(finished, run, fails, tmp_path, monkeypatch):
    from csad.training import loop

    import CSAD

    _, dataset = finished
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)
    real = CSAD.losses
    calls = []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(CSAD, "losses", killed)
    with pytest.raises(ZeroDivisionError):
        run("CSAD", tmp_path, dataset)
    assert "lr: 0.003 -> 0.1" in fails("CSAD", tmp_path, dataset, "--lgst.lr", "0.1")


def test_a_loss_that_is_no_number_ends_within_twenty_steps(finished, fails, tmp_path, monkeypatch):
    import CSAD

    real, calls = CSAD.losses, []

    def broken(*args):
        calls.append(1)
        return {name: loss * float("nan") for name, loss in real(*args).items()}

    monkeypatch.setattr(CSAD, "losses", broken)
    assert "diverged" in fails("CSAD", tmp_path, finished[1], "--lgst.steps", "200")
    assert len(calls) <= 20 and not list(tmp_path.rglob("*progress*"))


def test_overwriting_harms_nothing_where_an_image_cannot_be_read(copy_of_finished, fails, tmp_path):
    work, dataset = copy_of_finished
    shutil.copytree(dataset, tmp_path / "data")
    broken = tmp_path / "data/discs/train/good/001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    before = contents(work)
    for stage in TRAINING:
        named = "pseudo_label.py" if stage == "train_segmentor" else "001.png"
        assert named in fails(stage, work, tmp_path / "data", "--overwrite")
        after = contents(work)
        assert {name: content for name, content in after.items() if "unfinished" not in name} == before
        shutil.rmtree(work / "datasets/masks/discs.unfinished", ignore_errors=True)


def test_exports_know_what_they_were_made_of(copy_of_finished, run, fails, capsys):
    work, dataset = copy_of_finished
    run("export_model", work, dataset, "--format", "onnx", "--with_map")
    run("export_model", work, dataset, "--format", "openvino", "--with_map")
    rows = json.loads((work / "export_report.json").read_text())
    assert [row["format"] for row in rows] == ["onnx", "openvino", "torch"]
    scores = {}
    for row in rows:
        with open(work / f"anomaly_score/discs_{row['format']}_scores.csv", newline="") as handle:
            scores[row["format"]] = list(csv.DictReader(handle))
    for format_ in ("onnx", "openvino"):
        np.testing.assert_allclose(
            [float(row["score"]) for row in scores[format_]],
            [float(row["score"]) for row in scores["torch"]],
            rtol=1e-3,
            atol=1e-2,
        )
    assert "without --raw_input" in fails(
        "export_model", work, dataset, "--format", "openvino", "--raw_input"
    )
    run("patch_memory", work, dataset, "--memory.rows", "60", "--overwrite")
    for format_ in ("onnx", "openvino"):
        assert "was made before the stages ran again" in fails(
            "export_model", work, dataset, "--format", format_
        )
    assert "int8" in fails("export_model", work, dataset, "--precision", "int8")


def test_a_patch_histogram_alone_takes_the_encoder_from_the_stages_beside_it(copy_of_finished, run, fails):
    work, dataset = copy_of_finished
    alone = ("--branches", "patchhist", "--fusion.optional", "[]")
    run("export_model", work, dataset, *alone)
    assert files.read_json(work / "anomaly_score/discs_torch_scores.json")["branches"] == ["patchhist"]
    for name in ("best_discs", "memory_discs", "dfm_discs"):
        (work / f"ckpt/{name}.pth").unlink()
    assert "run patch_memory.py" in fails("export_model", work, dataset, *alone)


def test_an_optional_branch_whose_files_do_not_fit_is_left_out(copy_of_finished, run, capsys):
    work, dataset = copy_of_finished
    checkpoint = work / "ckpt/best_discs.pth"
    saved = files.read_state(checkpoint)
    saved["meta"]["backbone_fingerprint"] = "another"
    files.write_state(checkpoint, saved)
    record = work / "ckpt/best_discs.json"
    noted = files.read_json(record)
    noted["outputs"]["ckpt/best_discs.pth"] = records.digest(checkpoint)
    files.write_json(record, noted)
    run("export_model", work, dataset)
    assert (
        "discs: LGST is left out: discs: train_segmentor.py and CSAD.py were run on different backbones"
        in (capsys.readouterr().out)
    )
    run("benchmark_performance", work, dataset)
    fused = re.search(
        r"^fused: (.*) \(softplus\)$", (work / "score_combine_result.txt").read_text(), re.MULTILINE
    )
    assert fused and "memory" in fused[1] and "LGST" not in fused[1]
    assert "run export_model.py again" not in (work / "score_combine_result.txt").read_text()
    (work / "anomaly_score/discs_branches.json").unlink()
    run("benchmark_performance", work, dataset)
    assert (
        "discs: export_model.py has not weighed the branches yet"
        in (work / "score_combine_result.txt").read_text()
    )


@pytest.mark.parametrize("tested", [True, False])
@pytest.mark.parametrize("format_", ["onnx", "openvino"])
def test_an_export_that_gives_other_scores_is_refused_and_the_old_one_kept(
    format_, tested, copy_of_finished, run, fails, monkeypatch, tmp_path
):
    from csad.export import exporters

    import onnx

    work, dataset = copy_of_finished
    if not tested:
        shutil.copytree(dataset, tmp_path / "data")
        shutil.rmtree(tmp_path / "data/discs/test")
        dataset = tmp_path / "data"
    run("export_model", work, dataset, "--format", "onnx", "--with_map")
    if format_ == "openvino":
        run("export_model", work, dataset, "--format", "openvino", "--with_map")
    before, real = contents(work / "ckpt"), getattr(exporters, f"{format_}_model")

    def damaged(*args):
        """The encoder's first layer is 1 % off."""
        model = onnx.load_from_string(real(*args) if format_ == "onnx" else args[0])
        weight = next(one for one in model.graph.initializer if len(one.dims) == 4 and one.dims[1] == 3)
        weight.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(weight), weight.name))
        return model.SerializeToString() if format_ == "onnx" else real(model.SerializeToString(), *args[1:])

    monkeypatch.setattr(exporters, f"{format_}_model", damaged)
    said = fails("export_model", work, dataset, "--format", format_, "--with_map")
    assert (
        "does not give PyTorch's results for 6 validation images, so it is not kept and an earlier one stays as it is"
        in said
    )
    assert contents(work / "ckpt") == before


def test_the_threshold_is_from_the_written_file_in_a_process_of_its_own(finished):
    from csad.inference.runtimes import open_model

    from models.fused import metadata

    work, dataset = finished
    path = work / "ckpt/pytorch_models/discs.pth"
    known = metadata(files.read_state(path))
    assert known["networks"] == dict.fromkeys(known["networks"], "fp32") and "memory" in known["networks"]
    from csad.data import images

    engine = open_model(path, "cpu")
    scores = [
        float(engine.score(images.View(engine.size, known["white_level"]).read([one]))[0])
        for one in sorted((dataset / "discs/validation/good").iterdir())
    ]
    np.testing.assert_allclose(known["validation_scores"], sorted(scores), rtol=1e-4, atol=1e-4)
    row = json.loads((work / "export_report.json").read_text())[0]
    # The picture that sets the threshold can be looked at.
    name = sorted((dataset / "discs/validation/good").iterdir())[int(np.argmax(scores))].name
    assert row["threshold_image"] == f"validation/good/{name}" and known["threshold"] == max(
        known["validation_scores"]
    )
    assert row["ran_in"] == "fp32" and row["networks"] == known["networks"]


def test_saved_maps_are_those_of_the_exported_model(finished):
    from csad.data import images
    from csad.inference.runtimes import open_model

    work, dataset = finished
    engine = open_model(work / "ckpt/pytorch_models/discs.pth", "cpu")
    picture = sorted((dataset / "discs/test/structural_anomalies").iterdir())[0]
    found = engine.predict(images.View(engine.size, engine.metadata["white_level"]).read([picture]))
    for branch, given in zip(engine.branches, found.branch_maps[0]):
        with np.load(work / f"anomaly_score/discs_{branch}_maps.npz") as saved:
            np.testing.assert_allclose(saved["structural_anomalies"][0], given, atol=2e-2, rtol=1e-2)


def test_scores_of_other_images_are_not_measured(copy_of_finished, fails, tmp_path):
    work, dataset = copy_of_finished
    shutil.copytree(dataset, tmp_path / "data")
    good = sorted((tmp_path / "data/discs/test/good").iterdir())
    one, other = good[0].read_bytes(), good[1].read_bytes()
    good[0].write_bytes(other)
    good[1].write_bytes(one)  # as many, called the same
    assert "good images are not those that train_segmentor.py saw" in fails(
        "benchmark_performance", work, tmp_path / "data"
    )


def test_another_backbone_is_noticed_before_training(copy_of_finished, fails, tmp_path):
    import timm

    work, dataset = copy_of_finished
    torch.save(timm.create_model("resnet18").state_dict(), work / "ckpt/resnet18.pth")
    for path in (work / "ckpt").glob("best_discs*"):
        path.unlink()
    for path in (work / "anomaly_score").glob("discs_LGST*"):
        path.unlink()
    said = fails("CSAD", work, dataset, "--backbone", "resnet18")
    assert "worked on the backbone efficientnet_lite0, this is resnet18" in said


def test_stages_out_of_order_name_the_one_to_run(run, fails, make_dataset, tmp_path):
    dataset = make_dataset()
    assert "pseudo_label.py" in fails("train_segmentor", tmp_path / "w", dataset)
    assert "train_segmentor.py" in fails("export_model", tmp_path / "w", dataset)
    assert "export_model.py" in fails("export_model", tmp_path / "w", dataset, "--inference_only")
    assert "train_segmentor.py" in fails("benchmark_performance", tmp_path / "w", dataset)


def test_mistakes_in_the_data_set(fails, make_dataset, tmp_path):
    dataset = make_dataset()
    for stage in STAGES:
        assert "does not exist" in fails(stage, tmp_path / "w", tmp_path / "nowhere")
        assert "'disks'" in fails(stage, tmp_path / "w", dataset, "--categories", "disks")
    broken = dataset / "discs/train/good/001.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert "001.png" in fails("pseudo_label", tmp_path / "w", dataset)
    assert "001.png" in fails("CSAD", tmp_path / "w", dataset)
    for path in (dataset / "discs/train/good").iterdir():
        path.unlink()
    assert "no images" in fails("CSAD", tmp_path / "w", dataset)


def test_mistakes_in_the_workspace(copy_of_finished, fails, run):
    work, dataset = copy_of_finished
    masks = work / "datasets/masks/discs"
    for folder in masks.glob("0*"):  # whichever of them are trusted
        shutil.copy(folder / "filtered_cluster_map_color.png", folder / "filtered_cluster_map.png")
    (work / "ckpt/segmentor_discs_256.pth").unlink()
    # Those that the record speaks of are others.
    assert "label_maps: contents differ" in fails("train_segmentor", work, dataset)
    assert "filtered_cluster_map.png" in fails("train_segmentor", work, dataset, "--overwrite")

    shutil.copy(work / "ckpt/best_discs.pth", work / "ckpt/segmentor_discs_256.pth")
    assert "segmentor_discs_256.pth" in fails("export_model", work, dataset)


def test_class_counts_that_differ_are_refused(copy_of_finished, fails):
    work, dataset = copy_of_finished
    path = work / "ckpt/segmentor_discs_256.pth"
    saved = files.read_state(path)
    for key in ("fc2.conv3.weight", "fc2.conv3.bias"):
        saved["state"][key] = saved["state"][key][:-1]
    files.write_state(path, saved)
    assert "is not the file that train_segmentor.py wrote" in fails("export_model", work, dataset)


def test_scores_of_another_data_set_are_refused(copy_of_finished, fails):
    work, dataset = copy_of_finished
    files.write_array(work / "anomaly_score/discs_LGST_logi_score.npy", np.zeros(3))
    before = (work / "score_combine_result.txt").read_text()
    assert "holds 3 scores" in fails("benchmark_performance", work, dataset)
    assert (work / "score_combine_result.txt").read_text() == before


def test_foreign_backbone_weights_and_devices(fails, make_dataset, tmp_path):
    dataset = make_dataset()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    assert "state dict" in fails(
        "CSAD",
        tmp_path / "w",
        dataset,
        "--backbone",
        "resnet18",
        "--backbone_weights",
        str(tmp_path / "other.pth"),
    )
    assert "does not exist" in fails(
        "CSAD", tmp_path / "w", dataset, "--backbone", "resnet18", "--backbone_weights", "no.pth"
    )
    assert "backbone 'resnet17'" in fails("CSAD", tmp_path / "w", dataset, "--backbone", "resnet17")
    assert "device 'gpu'" in fails("CSAD", tmp_path / "w", dataset, "--device", "gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["paper", "quick"])
def test_all_stages_run_on_a_gpu_and_their_model_scores_alike_without(preset, run, make_dataset, tmp_path):
    work, dataset, found = tmp_path / "work", make_dataset(), []
    fused = ("--branches", "LGST", "memory")  # borders of components move a little, and so do histograms
    for stage in STAGES:
        run(
            stage,
            work,
            dataset,
            "--preset",
            preset,
            "--device",
            "cuda",
            *fused[: 0 if stage in TRAINING else None],
        )
    for device in ("cuda", "cpu"):
        run("export_model", work, dataset, "--preset", preset, "--device", device, *fused, "--inference_only")
        with open(work / "anomaly_score/discs_torch_scores.csv", newline="") as handle:
            found.append([float(row["score"]) for row in csv.DictReader(handle)])
    assert len(found[0]) == 12
    np.testing.assert_allclose(*found, rtol=0.05, atol=0.2)  # TF32 may multiply


@pytest.mark.gpu
def test_on_a_gpu_the_same_seed_gives_the_same_files(run, make_dataset, tmp_path):
    dataset = make_dataset()
    for name in ("first", "second"):
        for stage in TRAINING:
            run(stage, tmp_path / name, dataset, "--device", "cuda")
    before, after = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert [name for name in before if before[name] != after.get(name)] == []


@pytest.mark.parametrize(
    "script", sorted(path.name for path in ROOT.glob("*.py") if "run_script(main)" in path.read_text())
)
def test_outside_of_the_environment_a_sentence_says_what_to_do(script):
    done = subprocess.run([sys.executable, "-S", ROOT / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    sentence, activate, install = done.stderr.splitlines()
    assert re.fullmatch(
        r"error: the package '\w+' is not installed for .*; activate an environment .*:", sentence
    )
    assert "bin/activate" in activate and "pip install " in install
    assert install.endswith("'.[station]'" if script in ("predict.py", "serve.py") else "requirements.txt")


@pytest.mark.parametrize(
    "script, given, expected",
    [
        *(
            (script, {}, "1000")
            for script in (
                "pseudo_label",
                "train_segmentor",
                "CSAD",
                "patch_memory",
                "export_model",
                "report",
            )
        ),
        ("CSAD", {"GOMP_SPINCOUNT": "5"}, "5"),
        ("CSAD", {"OMP_WAIT_POLICY": "passive"}, "None"),
    ],
)
def test_how_threads_wait_is_decided_before_pytorch_is_loaded(script, given, expected, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os; print(os.environ.get('GOMP_SPINCOUNT'), flush=True); os._exit(0)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {
        "PYTHONPATH": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"],
        env=environment | given,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [expected], done.stderr


def test_predict_and_report_take_what_the_stages_left(copy_of_finished, tmp_path):
    work, dataset = copy_of_finished
    model = work / "ckpt/pytorch_models/discs.pth"
    done = subprocess.run(
        [
            sys.executable,
            "predict.py",
            str(dataset / "discs/test"),
            "--model",
            str(model),
            "--output",
            str(tmp_path / "out"),
            "--device",
            "cpu",
            "--save_maps",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 4), done.stderr
    with open(work / "anomaly_score/discs_torch_scores.csv", newline="") as handle:
        expected = {row["image"]: float(row["score"]) for row in csv.DictReader(handle)}
    with open(tmp_path / "out/predictions.csv", newline="") as handle:
        found = {
            Path(row["image"]).relative_to(dataset / "discs").as_posix(): row
            for row in csv.DictReader(handle)
        }
    assert found.keys() == expected.keys()
    for image, row in found.items():
        assert float(row["score"]) == pytest.approx(expected[image], rel=1e-3, abs=1e-2)
        contributions = [float(row[f"{branch}_contribution"]) for branch in decided(work)]
        assert sum(contributions) == pytest.approx(float(row["score"]), abs=1e-2)
    assert len(list((tmp_path / "out/maps").rglob("*.png"))) == 12

    done = subprocess.run(
        [
            sys.executable,
            "report.py",
            "--workspace",
            str(work),
            "--dataset_root",
            str(dataset),
            "--preset",
            "quick",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (work / "report.html").read_text().count("<article") == 12
