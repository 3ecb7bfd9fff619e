"""One model in every runtime: the same scores, for any batch, and a sentence for every mistake."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from csad.data import files
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation import export_tables
from csad.evaluation.areas import area_statistics
from csad.export import exporters, int8, onnx_graphs
from csad.export.assembly import require_finite
from csad.inference.engines import as_input
from csad.inference.folded import FoldedModel
from csad.inference.openvino_engine import OpenVinoEngine
from csad.inference.runtimes import OnnxEngine, TorchEngine, open_model
from csad.training.backbone_weights import build_backbone

import numpy as np
import onnx
import pytest
import torch
from conftest import initialise_by_he

from models import dfm as deep_features
from models.backbone import empty_encoder
from models.fused import FusedModel, attach_metadata, from_state, metadata, published_state
from models.histogram_evidence import HistogramEvidence, fit_evidence
from models.lgst import LGST
from models.lgst_on_features import FeatureLGST
from models.patch_histogram import PatchHistogramDetector, fit_parameters, label_histograms
from models.patch_memory import PatchMemory, patches
from models.segmentor import Segmentor

WEIGHTS = {"patchhist": 0.5, "LGST": 0.25, "memory": 1.0, "DFM": 0.5}
ROOT = Path(__file__).parents[1]
CLASSES, SIZES = 4, {"paper": 256, "all": 512, "tiles": 512}


def draw_model(kind: str, backbone: str = "efficientnet_lite0") -> FusedModel:
    """A small fused model in which nothing is 0 or 1 by chance of its initialisation: the paper's branches, or all there are."""
    tiles = 2 if kind == "tiles" else 1
    torch.manual_seed(3)
    encoder = (
        build_backbone(backbone, None, Path()).encoder
        if backbone == "efficientnet_lite0"
        else empty_encoder(backbone)
    )
    segmentor, detector = Segmentor(encoder.channels, 16, CLASSES), PatchHistogramDetector(CLASSES)
    if kind == "paper":
        lgst = LGST(encoder.channels, 16, 24)
        initialise_by_he(lgst.local_st, lgst.autoencoder)
        model = FusedModel(encoder, segmentor, detector, lgst)
    else:
        rng = np.random.default_rng(0)
        labels = torch.from_numpy(
            np.kron(rng.integers(0, CLASSES, (6, 8, 8)), np.ones((32, 32))).astype(np.uint8)
        )
        evidence = HistogramEvidence(CLASSES)
        evidence.load_parameters(fit_evidence(labels, labels[:3], CLASSES))
        memory = PatchMemory(encoder.channels[1:], 50, 25, 64, 0.005, tiles)
        memory.detail.rows.normal_()
        memory.context.rows.normal_()
        memory.context_scale.fill_(0.5)
        roi = torch.ones(512, 512, dtype=torch.bool)
        roi[:, 480:] = False
        drawn = torch.rand(8, encoder.channels[2], 8, 8, generator=torch.Generator().manual_seed(0))
        model = FusedModel(
            encoder,
            segmentor,
            detector,
            FeatureLGST(encoder.channels, 16, 24),
            memory,
            512,
            roi,
            evidence,
            "softplus",
            tiles,
            deep_features.fit(drawn, encoder.channels[2]),
            WEIGHTS,
        )
    for name, buffer in model.named_buffers():
        if (
            name.startswith(("encoder", "evidence", "memory", "dfm.", "image_", "roi"))
            or not buffer.is_floating_point()
        ):
            continue
        if name.endswith("invcov"):
            factor = torch.randn(buffer.shape)
            buffer.copy_(factor @ factor.T / len(factor))
        elif name.endswith(("_mean", "_start")) and "normalise" not in name:
            buffer.uniform_(-0.2, 0.2)
        elif name.endswith(("_std", "_var")):
            buffer.uniform_(0.5, 1.5)
    torch.nn.init.normal_(model.segmentor.fc2.conv3.weight, 0, 1)
    return model.eval().requires_grad_(False)


def state_of(kind: str) -> dict:
    content = published_state(draw_model(kind))
    attach_metadata(
        content,
        {
            "category": "discs",
            "backbone": "efficientnet_lite0",
            "stand_ins": ["backbone efficientnet_lite0"],
            "input_size": SIZES[kind],
            "branches": ["patchhist", "LGST"] if kind == "paper" else list(WEIGHTS),
            "branch_weights": {"patchhist": 1.0, "LGST": 1.0} if kind == "paper" else WEIGHTS,
            "memory_score_share": 0.005,
            "memory_border": "zeros",
            "tiles": 1 + (kind == "tiles"),
            "fusion_rule": "sum" if kind == "paper" else "softplus",
        },
    )
    return content


@pytest.fixture(scope="module", params=["paper", "all", "tiles"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def state(kind):
    return state_of(kind)


@pytest.fixture(scope="module")
def raw(kind):
    return with_edges(SIZES[kind])


def with_edges(size: int) -> np.ndarray:
    """Images with edges, of which no two are alike, (3, 3, size, size) uint8."""
    cells = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    return np.kron(cells, np.ones((1, 1, size // 16, size // 16), np.uint8))


@pytest.fixture(scope="module")
def expected(state, raw):
    """What the unfolded model finds."""
    with torch.no_grad():
        return from_state(state).analyse(torch.from_numpy(raw).float())


@pytest.fixture(scope="module")
def paths(state, tmp_path_factory):
    """The same model for three runtimes, by suffix."""
    folder = tmp_path_factory.mktemp("models")
    files.write_state(folder / "discs.pth", state)
    files.write_bytes(
        folder / "discs.onnx", exporters.onnx_model(state, "discs", "fp32", with_map=True, raw_input=False)
    )
    known = OnnxEngine((folder / "discs.onnx").read_bytes(), "cpu").metadata
    exporters.write_openvino(
        exporters.openvino_model((folder / "discs.onnx").read_bytes(), "fp32"), folder / "discs.xml", known
    )
    return {path.suffix: path for path in folder.iterdir()}


def test_graphs_have_the_form_that_their_runtime_is_fast_at(paths, kind):
    """Scores are the same either way, so nothing else would notice: it costs a third of the time."""
    graph = onnx.load(paths[".onnx"]).graph
    nodes, weights = list(graph.node), {one.name for one in graph.initializer}
    biases = Counter(
        name for node in nodes if node.op_type == "Conv" for name in node.input[2:] if name in weights
    )
    assert biases and max(biases.values()) == 1  # OpenVINO fuses no bias that two convolutions share
    made_by = {name: node.op_type for node in nodes for name in node.output}

    def minima(nodes):
        return sum(node.op_type == "ReduceMin" and made_by[node.input[0]] == "ReduceMin" for node in nodes)

    has_memory = kind in ("all", "tiles")
    assert bool(minima(nodes)) == has_memory
    undone = onnx.load_from_string(onnx_graphs.with_whole_minima(paths[".onnx"].read_bytes()))
    onnx.checker.check_model(undone, full_check=True)
    assert not minima(undone.graph.node)


@pytest.mark.parametrize("suffix", [".pth", ".onnx", ".xml"])
def test_every_runtime_finds_what_the_unfolded_model_finds(suffix, paths, raw, expected, kind):
    engine = open_model(paths[suffix], "cpu")
    assert engine.precision == "fp32"
    assert engine.metadata["category"] == "discs" and engine.size == SIZES[kind]
    found = engine.predict(raw)
    # The label map decides the histograms; where two logits are equal but for rounding, it may differ.
    assert (found.label_map == expected.label_map.numpy()).mean() > 0.9999
    assert len(np.unique(found.label_map)) > 1
    np.testing.assert_allclose(found.score, expected.score, atol=2e-3, rtol=1e-4)
    np.testing.assert_allclose(found.branch_scores.sum(1), found.score, atol=1e-4)
    assert found.branch_scores.shape == (3, len(engine.branches))
    assert found.anomaly_map.shape == (3, 64, 64) and found.branch_maps.shape == (
        3,
        len(engine.branches),
        64,
        64,
    )
    assert found.label_map.dtype == np.uint8
    assert found.score.dtype == found.anomaly_map.dtype == np.float32
    np.testing.assert_allclose(found.branch_maps, expected.branch_maps, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("suffix", [".pth", ".onnx", ".xml"])
def test_a_batch_gives_the_single_scores(suffix, paths, raw):
    engine = open_model(paths[suffix], "cpu")
    singles = np.concatenate([engine.score(image[None]) for image in raw])
    assert singles.std() > 1e-3
    np.testing.assert_allclose(engine.score(raw), singles, atol=1e-3, rtol=1e-5)


def test_further_branches_add_keys_and_leave_the_published_ones_alone(tmp_path):
    paper, everything = state_of("paper"), state_of("all")
    further = ("memory", "dfm", "evidence", "roi")
    lgst = ("teacher", "local_st", "autoencoder", "q_", "fourth_", "sixteenth_")  # its networks may be others
    assert not [key for key in paper if key.startswith(further)]
    assert {key for key in everything if not key.startswith((*further, *lgst))} == {
        key for key in paper if not key.startswith(lgst)
    }
    files.write_state(tmp_path / "all.pth", everything)
    read = files.read_state(tmp_path / "all.pth")
    again = published_state(from_state(read))
    assert list(again) == list(everything) and all(
        torch.equal(again[key], everything[key]) for key in everything
    )
    assert metadata(read) == metadata(everything)
    for border in ("zeros", "replicate"):
        attach_metadata(again, metadata(everything) | {"memory_border": border})
        restored = from_state(again).memory
        assert restored.detail.border == restored.context.border == border
    lacking = {key: value for key, value in read.items() if key != "memory.detail.usual"}
    with pytest.raises(UserError, match="not a CSAD model.*memory.detail.usual"):
        from_state(lacking)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, tolerance", [("fp32", 0.02), ("fp16", 0.3), ("bf16", 0.5)])
def test_a_gpu_gives_nearly_the_same_shares(state, kind, raw, expected, precision, tolerance):
    asked = published_state(from_state(state))
    attach_metadata(asked, metadata(state) | {"precision": precision})
    engine = TorchEngine(asked, "cuda")
    assert engine.networks["encoder"] == precision
    found = engine.predict(raw)
    assert np.isfinite(found.score).all()
    # The label map decides the patch histogram, and borders move: the other branches are compared.
    np.testing.assert_allclose(
        found.branch_scores[:, 1:], expected.branch_scores[:, 1:], rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("suffix", [".pth", ".onnx", ".xml"])
def test_what_lies_outside_the_region_of_interest_changes_no_branch(suffix, kind, paths, raw):
    if kind == "paper":
        pytest.skip("this model has no region of interest")
    outside, inside = raw[:1].copy(), raw[:1].copy()
    outside[:, :, 100:300, 480:] = 255
    inside[:, :, 20:500, 20:460] = 255
    engine = open_model(paths[suffix], "cpu")
    plain, outside, inside = (engine.predict(one) for one in (raw[:1], outside, inside))
    assert plain.branch_scores.shape == (1, 4)
    for found, expected in zip(outside, plain):
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    assert (abs(inside.branch_scores - plain.branch_scores) > 1e-3).all()


def test_a_tile_sees_a_little_of_the_others_and_keeps_what_it_finds_in_its_own_place():
    model = draw_model("tiles")
    memory, pictures = model.memory, torch.from_numpy(with_edges(512)).float()
    assert memory.tiles == 2 and memory.detail.usual.shape == (1, 64, 64)
    with torch.no_grad():
        features = patches(model.encoder(pictures[..., 192:, :320]))
        corner = memory.detail.distances(memory.detail.embed(features))[:, 8:, :32]
        torch.testing.assert_close(memory.distances(model.encoder, pictures)[:, 32:, :32], corner)


class SignalStack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    @classmethod
    def of_this_thread(cls) -> tuple[int | None, int, int]:
        found = cls()
        assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
        return found.start, found.flags, found.size


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_runtimes_leave_the_main_thread_its_signal_stack(suffix, paths, raw):
    """OpenVINO's plugin would replace it by one that is freed later: the next Ctrl-C would be a segmentation fault."""
    before = SignalStack.of_this_thread()
    engine = open_model(paths[suffix], "cpu")
    assert SignalStack.of_this_thread() == before
    engine.score(raw[:1])
    assert SignalStack.of_this_thread() == before


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_100"])
def test_folding_changes_no_score_with_other_encoders(backbone):
    torch.manual_seed(0)
    try:
        model = draw_model("paper", backbone)
    except UserError:
        pytest.skip("this network has no such maps")
    images = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(FoldedModel(model)(images), model(images), atol=1e-3, rtol=1e-4)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in FoldedModel(model).encoder.modules())


def test_onnx_passes_the_checker_and_names_its_outputs(paths, state):
    model = onnx.load(paths[".onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == [
        "score",
        "branch_scores",
        "anomaly_map",
        "branch_maps",
        "label_map",
    ]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    alone = onnx.load_from_string(
        exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=False)
    )
    assert [output.name for output in alone.graph.output] == ["score"]


def test_raw_input_normalises_inside_and_maps_have_to_be_exported(state, raw, expected):
    engine = OnnxEngine(exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=True), "cpu")
    np.testing.assert_allclose(engine.score(raw), expected.score, atol=2e-3, rtol=1e-4)
    with pytest.raises(UserError, match="takes uint8 RGB images"):
        engine.score(raw.astype(np.float32))
    with pytest.raises(UserError, match="--with_map"):
        engine.predict(raw)


def test_half_precision_comes_close_and_says_what_ran():
    state, image = state_of("paper"), with_edges(SIZES["paper"])
    expected = TorchEngine(state, "cpu").predict(image)
    engine = OnnxEngine(exporters.onnx_model(state, "discs", "fp16", with_map=True, raw_input=False), "cpu")
    assert engine.precision == "fp32 (weights in fp16)"
    found = engine.predict(image)
    assert (found.label_map == expected.label_map).mean() > 0.95  # labels near borders may change
    np.testing.assert_allclose(found.branch_scores[:, 1], expected.branch_scores[:, 1], rtol=0.1, atol=0.1)
    attach_metadata(asked := published_state(from_state(state)), metadata(state) | {"precision": "bf16"})
    engine = TorchEngine(asked, "cpu")
    assert engine.precision == "bf16"
    found = engine.predict(image)
    assert (found.label_map == expected.label_map).mean() > 0.95  # labels near borders may change
    np.testing.assert_allclose(found.branch_scores[:, 1], expected.branch_scores[:, 1], rtol=0.1, atol=0.1)


def test_openvinos_two_files_never_mix(paths, tmp_path, monkeypatch):
    model = exporters.openvino_model(paths[".onnx"].read_bytes(), "fp32")
    exporters.write_openvino(model, tmp_path / "model.xml", {})
    replace = Path.replace

    def stop_before_the_second(path, target):
        if target.suffix == ".xml":
            raise KeyboardInterrupt
        replace(path, target)

    monkeypatch.setattr(Path, "replace", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        exporters.write_openvino(model, tmp_path / "model.xml", {})
    assert [path.name for path in tmp_path.glob("model*")] == ["model.bin"]


def test_a_full_disk_leaves_openvinos_old_files(paths, tmp_path, monkeypatch):
    model = exporters.openvino_model(paths[".onnx"].read_bytes(), "fp32")
    exporters.write_openvino(model, tmp_path / "model.xml", {})

    def full(path, data):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(OSError, match="full"):
        exporters.write_openvino(model, tmp_path / "model.xml", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_runtimes_report_to_nobody(tmp_path):
    """Their telemetry keeps identifiers in the home folder; here nothing that it sends leaves the machine."""
    silencing = ("CI", "NNCF_CI", "NNCF_DEV", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in silencing}
    environment |= {
        "HOME": str(tmp_path),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    script = (
        "from csad.inference.engines import require_package\n"
        "for name in ('onnxruntime', 'openvino', 'nncf'):\n"
        "    require_package(name)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_keeps_parts_until_the_scores_agree(runtime):
    """It ends at a model whose scores agree, and what it kept is really not quantised."""
    state, image = state_of("paper"), with_edges(SIZES["paper"]).repeat(2, axis=0)
    image[3:] = 255 - image[3:]
    content = exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=False)
    known = OnnxEngine(content, "cpu").metadata | {"precision": "int8"}
    batch, built = as_input(image, known), []

    def build(kept):
        if runtime == "onnxruntime":
            model = exporters.int8_onnx(content, batch[:3], kept)
            model = exporters.with_metadata(model, known | {"networks": exporters.networks_of(model)})
            engine = OnnxEngine(model, "cpu")
        else:
            model = exporters.int8_openvino(exporters.openvino_model(content, "fp32"), batch[:3], kept)
            exporters.note_metadata(model, known)
            engine = OpenVinoEngine(model)
        assert "int8" in engine.precision
        built.append((kept, model))
        return model, engine

    check = int8.Check(image, TorchEngine(state, "cpu").score(image), np.arange(6) < 3)
    _, kept, agreement = int8.quantise(build, check, "discs")
    assert len(kept) == len(built)
    assert agreement.suffices or len(built) == len(int8.FALLBACK_ORDER)
    if runtime == "onnxruntime":
        for prefixes, model in built:
            quantised = {
                node.name
                for node in onnx.load_from_string(model).graph.node
                if node.op_type == "DequantizeLinear"
            }
            assert any(".trunk." in name for name in quantised)
            assert (
                not any(name.startswith("segmentor.") for name in quantised) or "/segmentor/" not in prefixes
            )


def test_devices_are_chosen_by_what_there_is_and_said(paths, raw, monkeypatch):
    import onnxruntime

    assert open_model(paths[".xml"], "auto").device == "cpu"
    engine = open_model(paths[".xml"], "AUTO")
    assert "cpu" in engine.device
    assert np.isfinite(engine.score(raw)).all()
    with pytest.raises(UserError, match="cannot run this model on GPU.9.*it has CPU"):
        open_model(paths[".xml"], "GPU.9")
    asked, session = [], onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CPUExecutionProvider", "CoreMLExecutionProvider", "CUDAExecutionProvider"],
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda model, options, providers: (
            asked.append(providers),
            session(model, options, ["CPUExecutionProvider"]),
        )[1],
    )
    for device in ("auto", "cpu", "cuda:1"):
        assert open_model(paths[".onnx"], device).device == "cpu"  # what it runs on, whatever was asked for
    assert asked == [
        ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"],
        ["CPUExecutionProvider"],
        [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"],
    ]


def test_agreement_sees_a_score_that_moved():
    scores = np.array([0.0, 1, 2, 10, 11, 12])
    check = int8.Check(np.zeros((6, 1)), scores, np.arange(6) < 3)

    class Fake:
        def __init__(self, values):
            self.values = iter(values)

        def score(self, image):
            return np.array([next(self.values)])

    assert check.agreement(Fake(scores)) == (0, 0)
    assert check.agreement(Fake(scores + 0.01)).suffices
    assert not check.agreement(Fake(scores + 1)).suffices
    assert not check.agreement(Fake([0, 1, 10.5, 10, 11, 12])).suffices
    for wrong in (np.nan, np.inf):
        agreement = check.agreement(Fake([0, 1, 2, 10, wrong, 12]))
        assert agreement == (np.inf, np.inf) and not agreement.suffices and "inf" in str(agreement)
    good_alone = int8.Check(np.zeros((3, 1)), scores[:3], np.ones(3, bool))  # where nothing could be pasted
    assert (
        good_alone.agreement(Fake(scores[:3])).suffices
        and not good_alone.agreement(Fake(scores[:3] + 1)).suffices
    )


@pytest.mark.parametrize("agrees_at", [1, 3, None])
def test_parts_go_back_into_higher_precision_until_the_scores_agree(agrees_at):
    """The guard itself, with attempts of which it is known how far off they are."""
    scores, attempts = np.array([0.0, 1, 2, 10, 11, 12]), []

    class Fake:
        def __init__(self, attempt):
            self.values = iter(scores + (0.01 if attempt == agrees_at else 1))

        def score(self, image):
            return np.array([next(self.values)])

    def build(prefixes):
        attempts.append(prefixes)
        return len(attempts), Fake(len(attempts))

    check = int8.Check(np.zeros((6, 1)), scores, np.arange(6) < 3)
    model, kept, agreement = int8.quantise(build, check, "discs")
    order = int8.FALLBACK_ORDER
    assert model == len(attempts) == (agrees_at or len(order))
    assert kept == [name for name, _ in order[:model]]
    assert attempts[-1] == sum((prefixes for _, prefixes in order[:model]), ())
    assert agreement.suffices == (agrees_at is not None)


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


def test_mistakes_get_a_sentence(paths, kind, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="expected a .pth, .onnx or .xml"):
        open_model(tmp_path / "model.tflite", "cpu")
    with pytest.raises(UserError, match="is missing"):
        open_model(tmp_path / "model.onnx", "cpu")
    for suffix in (".pth", ".onnx", ".xml"):
        (tmp_path / f"broken{suffix}").write_bytes(paths[suffix].read_bytes()[:500])
        with pytest.raises(UserError, match="broken"):
            open_model(tmp_path / f"broken{suffix}", "cpu")
        with pytest.raises(UserError, match=rf"of shape \(B, 3, {SIZES[kind]}, {SIZES[kind]}\), got"):
            open_model(paths[suffix], "cpu").score(np.zeros((1, 3, 128, 128), np.uint8))
    foreign = onnx.load(paths[".onnx"])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.ONNX")
    with pytest.raises(UserError, match="foreign.ONNX.*not exported by export_model"):
        open_model(tmp_path / "foreign.ONNX", "cpu")
    for runtime, suffix in (("onnxruntime", ".onnx"), ("openvino", ".xml")):
        monkeypatch.setitem(sys.modules, runtime, None)
        with pytest.raises(UserError, match=f"{runtime} is not installed"):
            open_model(paths[suffix], "cpu")


def test_models_with_numbers_that_are_none_are_not_exported():
    with pytest.raises(UserError, match="lgst.weight holds numbers that are not finite"):
        require_finite({"a": torch.zeros(2), "lgst.weight": torch.tensor([1.0, float("nan")])}, "discs")


def evaluated(category: str, logical: float) -> dict:
    return {
        "category": category,
        "format": "torch",
        "precision": "fp32",
        "ran_in": "fp32",
        "auroc_logical": logical,
        "auroc_structural": float("nan"),
        "auroc_mean": logical,
        "ms_per_image": 1.0,
        "preprocessing_ms": 1.0,
        "largest_difference": 0.0,
        "kept_in_higher_precision": [],
        "networks": {},
        "stand_ins": [],
    }


def test_the_report_says_of_int8_what_is_left_in_higher_precision():
    networks = {"encoder": "int8", "segmentor": "bf16/int8", "LGST student": "fp32"}
    told = export_tables.table_of([evaluated("discs", 80.0) | {"precision": "int8", "networks": networks}])
    assert told.endswith("besides label map and score: segmentor (bf16/int8), LGST student (fp32)\n")


def test_the_report_of_a_category_with_one_kind_of_anomaly(tmp_path):
    workspace = Workspace(tmp_path)
    for category, logical in (
        ("discs", float("nan")),
        ("rings", 80.0),
    ):  # the second reads what the first wrote
        export_tables.write([evaluated(category, logical)], workspace)
    assert "NaN" not in workspace.export_report.read_text()
    average = next(
        line for line in (tmp_path / "export_report.md").read_text().splitlines() if "average" in line
    )
    assert [cell.strip() for cell in average.split("|")[5:8]] == ["80.000", "nan", "80.000"]


def test_of_many_categories_the_terminal_has_the_average_and_the_file_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_tables, "MANY", 2)
    for again in (70.0, 80.0):  # replaces what was there
        export_tables.write(
            [evaluated(f"category_{index}", again) for index in range(3)], Workspace(tmp_path)
        )
    said, written = capsys.readouterr().out, (tmp_path / "export_report.md").read_text()
    assert "category_1" not in said and said.count("| average") == 2
    assert written.count("category_") == 3 and written.count("80.000") == 8 and "70.000" not in written
