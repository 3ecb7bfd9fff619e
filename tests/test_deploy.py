"""One model in every runtime: the same scores, for any batch, and a sentence for every mistake."""

from __future__ import annotations

import ctypes
import importlib
import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import benchmark_speed
import numpy as np
import onnx
import pytest
import torch
from conftest import make_discs

import export_model
from data import files, layouts
from data.images import load_images, normalise
from data.workspace import Workspace
from deploy import engines, exporters, quantisation
from deploy.engines import OnnxEngine, OpenVinoEngine, TorchEngine, open_model
from deploy.folded import FoldedModel
from errors import UserError, run_script
from models.backbone import build_backbone, fingerprint
from models.fused import FusedModel, attach_metadata, from_state, metadata
from models.patch_histogram import PatchHistogramDetector, area_statistics, fit_parameters, label_histograms
from models.segmentor import Segmentor

CPU = torch.device("cpu")
CLASSES = 4


def draw_model(backbone: str = "embedded") -> FusedModel:
    """A small fused model in which nothing is 0 or 1 by chance of its initialisation."""
    torch.manual_seed(3)
    built = build_backbone(backbone, None, Path())
    model = FusedModel(built.encoder, built.channels, Segmentor(built.channels, 16, CLASSES), PatchHistogramDetector(CLASSES),
                       16, 24, built.blind_to_light)
    model.start_fast()
    for name, buffer in model.named_buffers():
        if name.startswith("encoder"):
            continue
        if name.endswith("invcov"):
            factor = torch.randn(buffer.shape)
            buffer.copy_(factor @ factor.T / len(factor))
        elif name.endswith(("_mean", "_start")):
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith(("_std", "_var")):
            buffer.uniform_(0.5, 1.5)
    torch.nn.init.normal_(model.segmentor.fc2.conv3.weight, 0, 1)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def state():
    content = draw_model().state_dict()
    attach_metadata(content, {"category": "discs", "backbone": "embedded", "stand_ins": ["backbone embedded"]})
    return content


@pytest.fixture(scope="module")
def raw():
    """Eight images with edges, of which no two are alike, (8, 3, 256, 256) uint8."""
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (8, 3, 16, 16), dtype=np.uint8), np.ones((1, 1, 16, 16), np.uint8))


@pytest.fixture(scope="module")
def batch(raw):
    return normalise(torch.from_numpy(raw)).numpy()


@pytest.fixture(scope="module")
def expected(state, batch):
    """What the unfolded model finds."""
    with torch.no_grad():
        return from_state(state).analyse(torch.from_numpy(batch))


@pytest.fixture(scope="module")
def paths(state, tmp_path_factory):
    """The same model for three runtimes."""
    folder = tmp_path_factory.mktemp("models")
    files.write_state(folder / "discs.pth", state)
    files.write_bytes(folder / "discs.onnx", exporters.onnx_model(state, "discs", "fp32", with_map=True, raw_input=False))
    known = OnnxEngine((folder / "discs.onnx").read_bytes(), CPU).metadata
    exporters.write_openvino(engines.read_openvino(folder / "discs.onnx"), folder / "discs.xml", known)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".pth", ".onnx", ".xml"])
def test_every_runtime_finds_what_the_unfolded_model_finds(suffix, paths, batch, expected):
    engine = open_model(paths[suffix], CPU)
    assert engine.precision == "fp32"
    assert engine.metadata["category"] == "discs"
    assert engine.metadata["stand_ins"] == ["backbone embedded"]
    found = engine.findings(batch)
    # The label map decides the histograms; where two logits are equal but for rounding, it may differ.
    assert (found.label_map == expected.label_map.numpy()).mean() > 0.9999
    assert len(np.unique(found.label_map)) > 1
    np.testing.assert_allclose(found.score, expected.score, atol=1e-3)
    np.testing.assert_allclose(found.lgst_score + found.patch_histogram_score, found.score, atol=1e-5)
    assert found.anomaly_map.shape == (8, 256, 256)
    assert found.label_map.dtype == np.uint8
    assert found.score.dtype == found.anomaly_map.dtype == np.float32
    small = torch.nn.functional.interpolate(expected.anomaly_map[:, None], (256, 256), mode="bilinear")[:, 0]
    np.testing.assert_allclose(found.anomaly_map, small, atol=1e-4)


@pytest.mark.parametrize("suffix", [".pth", ".onnx", ".xml"])
def test_a_batch_of_eight_gives_the_eight_single_scores(suffix, paths, batch):
    engine = open_model(paths[suffix], CPU)
    singles = np.concatenate([engine.score(image[None]) for image in batch])
    assert singles.std() > 1e-3
    np.testing.assert_allclose(engine.score(batch), singles, atol=1e-4)
    np.testing.assert_allclose(engine.score(batch[:3]), singles[:3], atol=1e-4)


class SignalStack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    @classmethod
    def of_this_thread(cls) -> tuple[int | None, int, int]:
        found = cls()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.start, found.flags, found.size


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_runtimes_leave_the_main_thread_its_signal_stack(suffix, paths, batch):
    """OpenVINO's plugin would replace it by one that is freed later: the next Ctrl-C would be a segmentation fault."""
    before = SignalStack.of_this_thread()
    engine = open_model(paths[suffix], CPU)
    assert SignalStack.of_this_thread() == before
    engine.score(batch[:1])
    assert SignalStack.of_this_thread() == before


@pytest.mark.parametrize("backbone", ["resnet18", "squeezenet1_0"])
def test_folding_changes_no_score_with_other_encoders(backbone, batch, monkeypatch):
    monkeypatch.setattr("models.backbone._load", lambda *args: None)  # random weights will do
    model = draw_model(backbone)
    with torch.no_grad():
        images = torch.from_numpy(batch[:2])
        torch.testing.assert_close(FoldedModel(model)(images), model(images), atol=1e-4, rtol=1e-5)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in FoldedModel(model).modules())


def test_onnx_passes_the_checker_and_names_its_outputs(paths, state):
    model = onnx.load(paths[".onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output][:3] == ["score", "anomaly_map", "label_map"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    alone = onnx.load_from_string(exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=False))
    assert [output.name for output in alone.graph.output] == ["score"]


def test_raw_input_normalises_inside(state, raw, expected):
    engine = OnnxEngine(exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=True), CPU)
    np.testing.assert_allclose(engine.score(raw), expected.score, atol=1e-3)
    with pytest.raises(UserError, match="takes uint8 images"):
        engine.score(raw.astype(np.float32))


def test_half_precision_comes_close_and_says_what_ran(state, batch, expected, paths, tmp_path):
    tolerance = 0.15 * expected.score.std().item() + 0.05
    engine = OnnxEngine(exporters.onnx_model(state, "discs", "fp16", with_map=True, raw_input=False), CPU)
    assert engine.precision == "fp32 (weights in fp16)"
    np.testing.assert_allclose(engine.score(batch), expected.score, atol=tolerance)
    asked = from_state(state).state_dict()
    attach_metadata(asked, metadata(state) | {"precision": "bf16"})
    files.write_state(tmp_path / "discs.pth", asked)
    engine = open_model(tmp_path / "discs.pth", CPU)
    assert engine.precision == "bf16"
    # Labels near borders may change in bf16; the maps must not.
    found = engine.findings(batch)
    assert (found.label_map == expected.label_map.numpy()).mean() > 0.97
    share = (expected.lgst_score - state["lgst_mean"]) / state["lgst_std"]
    np.testing.assert_allclose(found.lgst_score, share, rtol=0.1, atol=0.1)


def test_openvinos_two_files_never_mix(paths, tmp_path, monkeypatch):
    model = exporters.openvino_model(paths[".onnx"].read_bytes(), "fp32")
    exporters.write_openvino(model, tmp_path / "model.xml", {})
    write_bytes = files.write_bytes

    def stop_before_the_second(path, data):
        if path.suffix == ".xml":
            raise KeyboardInterrupt
        write_bytes(path, data)

    monkeypatch.setattr(files, "write_bytes", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        exporters.write_openvino(model, tmp_path / "model.xml", {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_keeps_parts_until_the_scores_agree(runtime, state, paths, raw, batch, expected):
    """The ladder ends at a model whose scores agree, and what it kept is really not quantised."""
    content = exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=False)
    known = OnnxEngine(content, CPU).metadata | {"precision": "int8"}
    built = []

    def build(kept):
        if runtime == "onnxruntime":
            model = exporters.with_metadata(exporters.int8_onnx(content, batch[:3], kept), known)
            engine = OnnxEngine(model, CPU)
        else:
            model = exporters.int8_openvino(engines.read_openvino(paths[".onnx"]), batch[:3], kept)
            exporters.note_metadata(model, known)
            engine = OpenVinoEngine(model)
        assert engine.precision.startswith("int8")
        built.append((kept, model))
        return model, engine

    check = quantisation.Check(batch, expected.score.numpy(), np.arange(8) < 4)
    _, kept, agreement = quantisation.quantise(build, check, lambda line: None)
    assert len(kept) == len(built)
    assert agreement.suffices or len(built) == len(quantisation.LADDER)
    if runtime == "onnxruntime":
        for prefixes, model in built:
            quantised = {node.name for node in onnx.load_from_string(model).graph.node if node.op_type == "DequantizeLinear"}
            assert any(".trunk." in name for name in quantised)
            assert not any(name.startswith("segmentor.") for name in quantised) or "/segmentor/" not in prefixes


def test_agreement_sees_a_score_that_moved():
    scores = np.array([0.0, 1, 2, 10, 11, 12])
    check = quantisation.Check(np.zeros((6, 1)), scores, np.arange(6) < 3)

    class Fake:
        def __init__(self, values):
            self.values = iter(values)

        def score(self, image):
            return np.array([next(self.values)])

    assert check.agreement(Fake(scores)) == (0, 0)
    assert check.agreement(Fake(scores + 0.01)).suffices
    assert not check.agreement(Fake(scores + 1)).suffices
    assert not check.agreement(Fake([0, 1, 10.5, 10, 11, 12])).suffices


def test_area_statistics_are_those_of_the_training_images():
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 5, (30, 64, 64)).astype(np.uint8))
    labels[:, :20] = torch.from_numpy((rng.random((30, 20, 64)) < rng.random((30, 1, 1))).astype(np.uint8))
    labels = torch.nn.functional.interpolate(labels[:, None].float(), (256, 256))[:, 0].to(torch.uint8)
    found = area_statistics(fit_parameters(labels, labels[:5], 6), 6)
    whole, quarters = label_histograms(labels, 6, background=True)
    for name, expected in (("", whole), ("quarter_", quarters.view(30, 4, 6))):
        np.testing.assert_allclose(found[f"{name}mean"], expected.mean(0), atol=1e-5)
        np.testing.assert_allclose(found[f"{name}std"], expected.std(0), atol=1e-5)


def test_mistakes_get_a_sentence(paths, batch, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="expected a .pth, .onnx or .xml"):
        open_model(tmp_path / "model.tflite", CPU)
    with pytest.raises(UserError, match="is missing"):
        open_model(tmp_path / "model.onnx", CPU)
    for suffix in (".pth", ".onnx", ".xml"):
        (tmp_path / f"broken{suffix}").write_bytes(paths[suffix].read_bytes()[:500])
        with pytest.raises(UserError, match="broken"):
            open_model(tmp_path / f"broken{suffix}", CPU)
        with pytest.raises(UserError, match=r"exported for images of shape \(B, 3, 256, 256\), got \(1, 3, 128, 128\)"):
            open_model(paths[suffix], CPU).score(np.zeros((1, 3, 128, 128), np.float32))
    foreign = onnx.load(paths[".onnx"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(UserError, match="foreign.onnx.*not exported by export_model"):
        open_model(tmp_path / "foreign.onnx", CPU)
    for runtime, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
        monkeypatch.setitem(sys.modules, runtime, None)
        with pytest.raises(UserError, match=f"{runtime} is not installed"):
            open_model(paths[suffix], CPU)


def test_maps_have_to_be_exported(state, batch):
    engine = OnnxEngine(exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=False), CPU)
    with pytest.raises(UserError, match="--with_map"):
        engine.findings(batch[:1])


@pytest.fixture(scope="module")
def trained(state, tmp_path_factory):
    """(workspace, data set) as stages 2 and 3 leave them, with the small random model."""
    folder = tmp_path_factory.mktemp("trained")
    dataset = make_discs(folder / "data")
    category, workspace = layouts.Dataset(dataset).select(None)[0], Workspace(folder / "work")
    model = from_state(state)
    parts = {"encoder": {}, "segmentor": {}, "lgst": {}}
    for key, value in state.items():
        prefix, _, rest = key.partition(".")
        if prefix in ("encoder", "segmentor"):
            parts[prefix][rest] = value
        elif prefix != "patch_hist_detector" and key not in ("lgst_mean", "lgst_std", "patch_hist_mean", "patch_hist_std"):
            parts["lgst"][key] = value
    meta = {"backbone": "embedded", "backbone_fingerprint": fingerprint(model.encoder), "stand_ins": ["backbone embedded"],
            "settings": {"steps": 1}}
    with torch.no_grad():
        maps = [model.analyse(normalise(load_images(paths, 256, "read"))) for paths in (category.train, category.validation)]
    parameters = fit_parameters(*(found.label_map.to(torch.uint8) for found in maps), CLASSES)
    files.write_arrays(workspace.patch_histogram_parameters("discs"), **parameters)
    detector = PatchHistogramDetector(CLASSES)
    detector.load_parameters(parameters)
    files.write_array(workspace.scores("discs", "patchhist", "val"), detector(maps[1].label_map).double().numpy())
    files.write_array(workspace.scores("discs", "LGST", "val"), maps[1].lgst_score.double().numpy())
    files.write_state(workspace.segmentor("discs"), {"state": parts["segmentor"], "meta": meta})
    files.write_state(workspace.lgst("discs"), {"state": parts["lgst"], "encoder": parts["encoder"], "meta": meta})
    return workspace.root, dataset


@pytest.fixture
def export(trained, monkeypatch, capsys):
    """Run export_model.py; returns what it printed, or the one sentence it ended with."""
    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["export_model.py", "--workspace", str(trained[0]), "--dataset_root", str(trained[1]),
                                          "--preset", "quick", "--device", "cpu", *options])
        capsys.readouterr()
        try:
            run_script(importlib.import_module("export_model").main)
        except SystemExit as ended:
            assert ended.code == 2
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(said) == 1
            return said[0]
        return capsys.readouterr().out
    return run


def test_from_stages_to_every_format_and_the_report(export, trained):
    work, _ = trained
    assert "export_model.py --format torch" in export("--format", "onnx")
    export("--format", "torch")
    assert "export_model.py --format onnx" in export("--format", "openvino")
    export("--format", "onnx", "--raw_input")
    assert "--format onnx --with_map first" in export("--format", "openvino", "--with_map")
    export("--format", "openvino")
    said = export("--format", "openvino", "--precision", "int8")
    assert "in higher precision" in said
    said = export("--format", "onnx", "--inference_only")

    rows = files.read_json(work / "export_report.json")
    assert [(row["format"], row["precision"]) for row in rows] == [("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "int8"),
                                                                     ("torch", "fp32")]
    for row in rows:
        assert row["ms_per_image"] > 0
        assert 0 <= row["auroc_mean"] <= 100
        assert row["stand_ins"] == ["backbone embedded"]
        if row["precision"] == "fp32":
            # A pixel between two classes may fall to the other one in another runtime, and histograms of a few images
            # weigh a pixel heavily; a fixed model is held to less above.
            assert row["largest_difference"] < 1
    table = (work / "export_report.md").read_text()
    assert table.count("\n| discs ") == 4
    assert "made with stand-ins" in table
    for path in ("pytorch_models/discs.pth", "onnx_models/discs.onnx", "openvino_models/discs.xml",
                 "openvino_models/discs_int8.xml"):
        known = open_model(work / "ckpt" / path, CPU).metadata
        assert known["validation_scores"] == sorted(known["validation_scores"])
        assert known["threshold"] == pytest.approx(np.quantile(known["validation_scores"], 0.99))
        assert np.shape(known["histogram"]["quarter_std"]) == (4, CLASSES)
        assert known["training"]["lgst"]["settings"] == {"steps": 1}
        assert known["dataset"] == "data"
        assert known["versions"]["torch"]


def test_the_report_of_a_category_with_one_kind_of_anomaly(tmp_path):
    workspace = Workspace(tmp_path)
    for category, logical in (("discs", float("nan")), ("rings", 80.0)):  # the second reads what the first wrote
        export_model.write_report([{
            "category": category, "format": "torch", "precision": "fp32", "ran_in": "fp32", "auroc_logical": logical,
            "auroc_structural": float("nan"), "auroc_mean": logical, "ms_per_image": 1.0, "preprocessing_ms": 1.0,
            "largest_difference": 0.0, "kept_in_higher_precision": [], "stand_ins": []}], workspace)
    assert "NaN" not in workspace.export_report.read_text()
    average = next(line for line in (tmp_path / "export_report.md").read_text().splitlines() if "average" in line)
    assert [cell.strip() for cell in average.split("|")[5:8]] == ["80.000", "nan", "80.000"]


def test_without_test_images_a_model_is_exported_all_the_same(export, trained):
    work, dataset = trained
    for folder in ("ckpt", "anomaly_score"):
        shutil.copytree(work / folder, work / "seeds/0" / folder)
    (dataset / "discs/test/good").rename(dataset / "elsewhere")
    try:
        assert "nothing to evaluate" in export("--format", "torch")
        assert "nothing to evaluate" in export("--format", "torch", "--seeds", "0")
    finally:
        (dataset / "elsewhere").rename(dataset / "discs/test/good")
    assert (work / "seeds/0/ckpt/pytorch_models/discs.pth").exists()
    assert not (work / "seeds/0/export_report.json").exists()


def test_script_mistakes_get_a_sentence(export, trained):
    work, _ = trained
    assert "no format 'tflite'" in export("--format", "tflite")
    assert "int8" in export("--format", "torch", "--precision", "int8")
    assert "bf16" in export("--format", "onnx", "--precision", "bf16")
    assert "lgst.steps" in export("--lgst.steps", "banana")
    assert "is missing" in export("--format", "openvino", "--precision", "bf16", "--inference_only")
    export("--format", "torch")
    state = files.read_state(work / "ckpt/pytorch_models/discs.pth")
    attach_metadata(state, metadata(state) | {"category": "screws"})
    content = exporters.onnx_model(state, "screws", "fp32", False, False)
    files.write_bytes(work / "ckpt/onnx_models/discs.onnx", content)
    assert "is a model of screws, expected discs" in export("--format", "onnx", "--inference_only")
    assert "is a model of screws, expected discs" in export("--format", "openvino")
    files.write_state(work / "ckpt/pytorch_models/discs.pth", {"weight": torch.zeros(1)})
    assert "not a CSAD model" in export("--format", "torch", "--inference_only")


def test_benchmark_measures_every_variant_and_draws(state, tmp_path, monkeypatch, capsys):
    files.write_state(tmp_path / "discs.pth", state)
    reports = [{"category": category, "format": format_, "precision": precision, "auroc_mean": auroc,
                "kept_in_higher_precision": kept}
               for category, format_, precision, auroc, kept in (
                   ("discs", "torch", "fp32", 80.0, []), ("discs", "openvino", "int8", 79.9, ["segmentor"]),
                   ("discs", "openvino", "fp32", None, []), ("screws", "torch", "fp32", 60.0, []))]
    files.write_json(tmp_path / "export_report.json", reports)
    monkeypatch.setattr(sys, "argv", ["benchmark_speed.py", "--workspace", str(tmp_path), "--model", str(tmp_path / "discs.pth"),
                                      "--turns", "1", "--batches", "1", "2", "--device", "cpu", "--precisions", "fp32", "int8"])
    benchmark_speed.main()
    content = json.loads((tmp_path / "speed.json").read_text())
    found = {(row["graph"], row["runtime"], row["precision"]) for row in content["results"]}
    assert found == {(graph, *rest) for graph in ("published", "ours") for rest in (
        ("torch", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("openvino", "int8"))}
    assert {row["batch"] for row in content["results"]} == {1, 2}
    base = next(row for row in content["results"] if (row["graph"], row["runtime"], row["batch"]) == ("published", "torch", 1))
    assert base["speed_up"] == 1
    assert base["auroc_mean"] == 80  # of its own category
    drawn = ElementTree.parse(tmp_path / "benchmark_speed.svg").getroot()
    assert sum(part.tag.endswith("circle") for part in drawn.iter()) == 2 * 3  # two marks each: in the plot and in the key
    assert "/segmentor/" in benchmark_speed.kept_parts(reports, "openvino")
    assert benchmark_speed.kept_parts(reports, "onnx") == quantisation.LADDER[0][1]
    assert TorchEngine(tmp_path / "discs.pth", CPU).metadata["category"] == "discs"
