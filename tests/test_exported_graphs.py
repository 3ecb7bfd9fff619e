"""Exported files in a process of their own: PyTorch's scores whatever memory held before, and a word where they are others."""

from __future__ import annotations

from pathlib import Path

from csad.branches import BRANCHES
from csad.data import files
from csad.data.layouts import Category
from csad.errors import UserError
from csad.export import agreement, exporters, fresh_process
from csad.export.int8 import choose_int8
from csad.inference.engines import in_words
from csad.inference.runtimes import OnnxEngine, TorchEngine

import numpy as np
import onnx
import openvino
import pytest
import torch
from PIL import Image

from models import fusion
from models.backbone import resize
from models.dfm import DeepFeatureModel
from models.fused import FusedModel, attach_metadata, fused_map, metadata, softplus
from models.fusion import STRENGTH_EXPONENT
from models.lgst import LgstMap
from models.patch_histogram import PatchHistogramDetector
from models.patch_memory import PatchMemory
from tests.test_deploy import SIZES, state_of, with_edges

KINDS = ("paper", "all", "tiles", "replicate")


def drawn(kind: str) -> tuple[dict, int]:
    """A fused state and its pictures' side: the paper's branches, all, the memory in tiles, or with its other border."""
    state = state_of("all" if kind == "replicate" else kind)
    border = "replicate" if kind == "replicate" else "zeros"
    attach_metadata(state, metadata(state) | {"memory_border": border})
    return state, SIZES.get(kind, SIZES["all"])


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """(fp32 reference, pictures, {name: file}) of one kind of model in every format."""
    kind, folder = request.param, tmp_path_factory.mktemp("graphs")
    state, side = drawn(kind)
    pictures = []
    for index, picture in enumerate(with_edges(side)[:2]):
        pictures.append(folder / f"{index}.png")
        Image.fromarray(picture.transpose(1, 2, 0)).save(pictures[-1])
    files.write_state(folder / "model.pth", state)
    content = exporters.onnx_model(state, "discs", "fp32", with_map=True, raw_input=False)
    files.write_bytes(folder / "model.onnx", content)
    files.write_bytes(
        folder / "raw.onnx", exporters.onnx_model(state, "discs", "fp32", with_map=False, raw_input=True)
    )
    known = {name: value for name, value in OnnxEngine(content, "cpu").metadata.items() if name != "networks"}
    precisions = ("fp32", "bf16", "int8") if kind == "all" else ("fp32",)
    for precision in precisions:
        model = exporters.openvino_model(content, "fp32")
        if precision == "int8":
            model = exporters.int8_openvino(
                model,
                np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32),
                ("/segmentor/", "/encoder/"),
            )
        exporters.write_openvino(model, folder / f"model_{precision}.xml", known | {"precision": precision})
    return TorchEngine(state, "cpu"), pictures, {path.name: path for path in folder.iterdir()}


def test_every_convolution_pads_by_itself_and_by_less_than_its_size(exported):
    """What OpenVINO makes of anything else may read memory that was never written."""
    for name in ("model.onnx", "raw.onnx"):
        graph = onnx.load(exported[2][name]).graph
        made_by = {output: node.op_type for node in graph.node for output in node.output}
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        assert convolutions and not [
            node.name for node in convolutions if made_by.get(node.input[0]) == "Pad"
        ]
        for node in convolutions:
            of = {attribute.name: list(attribute.ints) for attribute in node.attribute}
            extent = [1 + rate * (size - 1) for rate, size in zip(of["dilations"], of["kernel_shape"])]
            assert max(np.array(of["pads"]) - np.array(extent * 2)) < 0, node.name


@pytest.mark.parametrize(
    "file", ["model.pth", "model.onnx", "raw.onnx", "model_fp32.xml", "model_bf16.xml", "model_int8.xml"]
)
def test_memory_that_was_never_written_changes_no_score(file, exported, monkeypatch):
    """OpenVINO and glibc are told to be what they are elsewhere: a processor without AVX-512, memory that is not zero."""
    reference, pictures, paths = exported
    if file not in paths:
        pytest.skip("of this kind there is none")
    monkeypatch.setenv("MALLOC_PERTURB_", "170")
    exactly = "bf16" not in file and "int8" not in file
    if exactly:  # without AVX-512 there is no bf16, in which all runs that is not int8, either
        monkeypatch.setenv("OV_CPU_MAX_ISA", "AVX2")
    found = fresh_process.score(paths[file], pictures, range(len(pictures)), "cpu", "score")
    assert np.array_equal(found.scores, found.score) and found.device == "cpu"
    if exactly:
        assert agreement.disagreement(reference, pictures, found, exactly) is None
        assert set(found.networks.values()) == {"fp32"} and "encoder" in found.networks
    else:  # of networks with random weights; the memory, which has none, is the part that was wrong
        expected = np.concatenate(
            [reference.predict(with_edges(512)[index : index + 1]).branch_scores for index in range(2)]
        )
        np.testing.assert_allclose(found.branch_scores[:, 2], expected[:, 2], rtol=0.1)
    if "int8" in file:  # what stayed in fp32 is said
        assert "int8" not in found.networks["LGST student"] and "int8" not in found.networks["memory"]
        assert "int8" in found.networks["LGST autoencoder"] and "int8" not in found.networks["encoder"]


def test_what_ran_is_what_is_said():
    """LGST on features is left in fp32 by PyTorch, and so is the memory; by ONNX all that is not converted."""
    state, _ = drawn("all")
    attach_metadata(state, metadata(state) | {"precision": "bf16"})
    engine = TorchEngine(state, "cpu")
    assert engine.networks == {
        "encoder": "bf16",
        "segmentor": "bf16",
        "LGST teacher": "fp32",
        "LGST student": "fp32",
        "LGST autoencoder": "fp32",
        "memory": "fp32",
    }
    assert (
        engine.precision
        == "bf16: encoder, segmentor; fp32: LGST teacher, LGST student, LGST autoencoder, memory"
    )
    assert set(TorchEngine(state, "cpu", "fp32").networks.values()) == {"fp32"}
    half = OnnxEngine(exporters.onnx_model(state, "discs", "fp16", with_map=False, raw_input=False), "cpu")
    assert half.metadata["networks"]["encoder"] == "fp16" and half.metadata["networks"]["memory"] == "fp32"
    assert half.networks["encoder"] == "fp32 (weights in fp16)" and half.networks["LGST student"] == "fp32"
    assert in_words({"encoder": "int8", "memory": "int8"}) == "int8"


def test_zeros_around_are_moved_into_the_convolution_and_nothing_else_is():
    class Padded(torch.nn.Module):
        def __init__(self, amounts, mode, value):
            super().__init__()
            self.amounts, self.mode, self.value = amounts, mode, value
            self.conv = torch.nn.Conv2d(3, 2, 3, stride=2)

        def forward(self, images):
            return self.conv(torch.nn.functional.pad(images, self.amounts, self.mode, self.value)).amax(
                (1, 2, 3)
            )

    known = {"raw_input": False, "input_size": 16}
    for amounts, mode, value, moved in (
        ((0, 1, 0, 1), "constant", 0, [0, 0, 1, 1]),
        ((2, 1, 0, 2), "constant", 0, [0, 2, 2, 1]),
        ((1, 1, 1, 1), "constant", 1, None),
        ((1, 1, 1, 1), "reflect", None, None),
    ):
        torch.manual_seed(0)
        model = Padded(amounts, mode, value).eval()
        content = exporters.to_onnx(model, known, ("score",))
        nodes = onnx.load_from_string(content).graph.node
        pads = next(
            list(attribute.ints)
            for node in nodes
            if node.op_type == "Conv"
            for attribute in node.attribute
            if attribute.name == "pads"
        )
        assert pads == (moved or [0, 0, 0, 0]) and any(node.op_type == "Pad" for node in nodes) == (
            moved is None
        )
        images = torch.randn(2, 3, 16, 16)
        found = OnnxEngine(content, "cpu").session.run(None, {"images": images.numpy()})[0]
        np.testing.assert_allclose(found, model(images).detach(), atol=1e-5)


class Views(torch.nn.Module):
    """Instead of an encoder: pixels, coarser and coarser."""

    def forward(self, rgb):
        return tuple(rgb[:, :, ::step, ::step] for step in (4, 8, 16))


class Logits(torch.nn.Module):
    def forward(self, maps):
        return resize(maps[0], (256, 256))


class Map(LgstMap):
    def forward(self, images, maps, _):
        return maps[0].mean(1)


def with_one_branch(branch: str) -> FusedModel:
    torch.manual_seed(0)
    memory, dfm = PatchMemory((3, 3), 8, 8, 32, 0.005), DeepFeatureModel(3, 2)
    for rows in (memory.detail.rows, memory.context.rows):
        rows.normal_()
    memory.context_scale.fill_(0.5)
    parts = {
        "patchhist": {"segmentor": Logits(), "detector": PatchHistogramDetector(3)},
        "LGST": {"lgst": Map()},
        "memory": {"memory": memory},
        "DFM": {"dfm": dfm},
    }
    return FusedModel(Views(), **parts[branch], rule="softplus").eval()


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_single_number_that_is_not_finite_has_no_finite_score_in_any_runtime(branch):
    """Argmax makes a label of NaN; OpenVINO's ReLU makes it 0, and its maxima, like onnxruntime's, pass over some."""
    model, known = with_one_branch(branch), {"raw_input": False, "input_size": 256}
    content = exporters.to_onnx(model, known, ("score",))
    session = OnnxEngine(exporters.with_metadata(content, known), "cpu").session
    compiled = openvino.compile_model(exporters.openvino_model(content, "fp32"), "CPU")
    images = np.random.default_rng(0).normal(size=(5, 3, 256, 256)).astype(np.float32)
    images[1, 0, 96, 112] = np.nan
    images[2, 1, 0, 0] = images[3, 1, 128, 240] = np.inf
    with torch.inference_mode():
        answers = model(torch.from_numpy(images)).numpy(), *session.run(None, {"images": images})
    for scores in (*answers, compiled({"images": images})[0]):
        assert np.isfinite(scores).tolist() == [True, False, False, False, True]


# Whether two models agree


class Reference:
    """PyTorch's answers, made up; a label map of label 1 adds nothing to the first branch, one of label 2 adds 1, also
    to its map."""

    size, metadata, branches = 256, {}, ["patchhist", "memory"]

    def __init__(self, shares, maps=None):
        maps = BRANCH_MAPS[: len(shares)] if maps is None else maps
        self.answers = iter(zip(shares, maps, fusion.fused_map(maps, shares, "sum"), strict=True))

    def predict(self, picture):
        from models.prediction import Prediction

        share, maps, fused = next(self.answers)
        label_map = np.ones((1, 256, 256), np.uint8)
        return Prediction(share.sum(keepdims=True), share[None], fused[None], maps[None], label_map)

    def score(self, picture):
        return np.ones(1)

    def arrangement(self, label_map):
        moved = (label_map == 2).any((1, 2))
        return self.all[:, 0] + moved, BRANCH_MAPS[:, 0] + moved[:, None, None]


SHARES = np.random.default_rng(5).normal(size=(16, 2)) * (1, 4)
BRANCH_MAPS = np.full((16, 2, 64, 64), 0.1, np.float32)  # of all pictures the same
MAPS = fusion.fused_map(BRANCH_MAPS, SHARES, "sum")


def judged(
    tmp_path: Path, given, with_branches=True, labels=None, exactly=True, maps=MAPS, reference=None
) -> str | None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    reference = reference or Reference(SHARES)
    reference.all = SHARES
    labels = np.ones((16, 256, 256), np.uint8) if labels is None else labels
    given = np.asarray(given, dtype=float)
    found = fresh_process.Scored(
        given.sum(1), given.sum(1), *((given, maps, labels) if with_branches else (None,) * 3), {}, {}, "cpu"
    )
    return agreement.disagreement(reference, [picture] * 16, found, exactly)


def with_one(value: float) -> np.ndarray:
    changed = SHARES.copy()
    changed[7, 1] = value
    return changed


def test_the_same_scores_agree_and_a_little_is_rounding(tmp_path):
    assert judged(tmp_path, SHARES) is None
    assert judged(tmp_path, SHARES + 3e-4) is None
    assert judged(tmp_path, SHARES, with_branches=False) is None
    assert judged(tmp_path, SHARES + 0.05, exactly=False) is None


@pytest.mark.parametrize("with_branches", [True, False])
@pytest.mark.parametrize("exactly", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 9.7e3])
def test_one_wild_score_is_enough(value, exactly, with_branches, tmp_path):
    assert judged(tmp_path, with_one(value), with_branches, exactly=exactly)


def test_a_drift_of_all_scores_or_of_one_branch_alone_is_seen(tmp_path):
    assert "the score is off" in judged(tmp_path, SHARES + 0.02)
    assert "the score is off" in judged(tmp_path, SHARES + 0.02, with_branches=False)
    assert "the patchhist score is off" in judged(tmp_path, SHARES + (0.01, -0.01))  # their sum is the same
    assert judged(tmp_path, SHARES + (-1.5, 1.5), exactly=False)


def test_a_pixel_that_two_classes_tie_for_moves_the_histogram_with_reason(tmp_path):
    labels, moved = np.ones((16, 256, 256), np.uint8), SHARES.copy()
    labels[3, 10, 20], moved[3, 0] = 2, SHARES[3, 0] + 1
    branch_maps = BRANCH_MAPS.copy()
    branch_maps[3, 0] += 1
    maps = fusion.fused_map(branch_maps, moved, "sum")
    assert judged(tmp_path, moved, labels=labels, maps=maps) is None
    assert "the anomaly map is off" in judged(tmp_path, moved, labels=labels)  # that of another label map
    assert "the score is off" in judged(tmp_path, moved)  # on the same label map
    labels[3, :, :20] = 2
    assert "of a label map differ" in judged(tmp_path, moved, labels=labels)
    small = SHARES.copy()
    small[3, 0] += 0.1
    assert judged(tmp_path, small, with_branches=False) is None  # nobody can tell
    assert judged(tmp_path, moved, with_branches=False)


def test_a_map_that_is_not_finite_or_looks_otherwise_is_seen(tmp_path):
    for exactly in (True, False):
        assert judged(tmp_path, SHARES, maps=MAPS * 1.001, exactly=exactly) is None
        for value in (np.nan, np.inf, 9.7e3):
            wild = MAPS.copy()
            wild[7, 10, 20] = value
            assert judged(tmp_path, SHARES, maps=wild, exactly=exactly)
        assert "the anomaly map is off" in judged(tmp_path, SHARES, maps=0 * MAPS, exactly=exactly)
    missing = MAPS.copy()
    missing[3] = 0
    assert "the anomaly map is off by up to 1" in judged(tmp_path, SHARES, maps=missing)
    assert judged(tmp_path, SHARES, maps=MAPS * 1.1, exactly=False) is None


def test_a_branch_that_is_off_where_it_adds_nothing_is_seen(tmp_path):
    """Softplus is flat below 0, where good images lie: a histogram off by a standard deviation adds 1e-6 as before."""
    weights = {"patchhist": 0.5, "memory": 1.0}
    z = np.random.default_rng(3).normal(size=(16, 2)) * (4, 3) - (25, 20)

    def added(normalised):
        return np.logaddexp(0, normalised) * list(weights.values())

    def said(given):
        reference = Reference(added(z))
        reference.metadata = {"fusion_rule": "softplus", "branch_weights": weights}
        reference.arrangement = lambda _: (added(z)[:, 0], BRANCH_MAPS[:, 0])
        maps = fusion.fused_map(BRANCH_MAPS, added(z), "softplus")
        return judged(tmp_path, added(given), maps=maps, reference=reference)

    np.testing.assert_allclose(fusion.before_softplus(np.logaddexp(0, z)), z, rtol=1e-9)
    assert said(z) is None and said(z + 0.02) is None
    for column, branch in enumerate(weights):
        moved = z.copy()
        moved[7, column] += 0.5
        assert f"the {branch} score is off by up to 0.5 before softplus" in said(moved)


@pytest.mark.parametrize("with_branches", [True, False])
@pytest.mark.parametrize("exactly", [True, False])
def test_nothing_agrees_with_what_is_no_number(exactly, with_branches, tmp_path):
    """OpenVINO's clamp makes 0 of NaN: PyTorch's own answer is the one that is not finite."""
    maps = BRANCH_MAPS.copy()
    maps[7, 1, 10, 20] = np.nan
    for reference in (Reference(with_one(np.nan)), Reference(with_one(np.inf)), Reference(SHARES, maps)):
        said = judged(tmp_path, SHARES, with_branches, exactly=exactly, reference=reference)
        assert said == "PyTorch itself gives numbers that are not finite"


def test_int8_is_not_measured_by_what_is_no_number(make_dataset):
    category = Category(make_dataset(train=4, validation=8, test=1) / "discs")
    reference = Reference(with_one(np.nan)[:8])
    with pytest.raises(UserError, match="scores that are not finite.*train the stages again"):
        choose_int8(lambda prefixes: pytest.fail("it was quantised"), category, reference, 0.2, 0)


def test_what_very_normal_scores_add_is_positive_in_every_runtime():
    """OpenVINO's own Softplus is below 0 there by up to 2e-6, and the root of that is no number: a map of NaN."""

    class Fusion(torch.nn.Module):
        def forward(self, z, maps):
            added = softplus(z)
            return added, fused_map(maps, added, "softplus"), fused_map(maps, z, "sum")

    z = torch.arange(-80, 20, 0.01).view(-1, 2)
    arguments = z, torch.ones(len(z), 2, 1, 1)
    expected = np.logaddexp(0, z.double().numpy())
    maps = (expected**STRENGTH_EXPONENT).sum(1)
    graph = openvino.convert_model(Fusion(), example_input=arguments)
    for precision, rtol in (("f32", 0.02), ("bf16", 0.1)):
        config = {"INFERENCE_PRECISION_HINT": precision}
        answers = openvino.compile_model(graph, "CPU", config)([each.numpy() for each in arguments])
        for actual, values in zip(answers.values(), (expected, maps, maps)):
            np.testing.assert_allclose(actual.squeeze(), values, rtol=rtol, atol=1e-30)
    for actual, values in zip(Fusion()(*arguments), (expected, maps, maps)):
        np.testing.assert_allclose(actual.squeeze(), values, rtol=1e-4)


def test_the_spread_is_robust_and_has_a_floor():
    scores = np.random.default_rng(0).normal(0, 2, 1000)
    assert agreement.spread(scores) == pytest.approx(2, rel=0.1)
    assert agreement.spread(np.r_[scores, 1e9]) == pytest.approx(2, rel=0.1)
    assert agreement.spread(np.zeros(5)) == agreement.MIN_SPREAD
    assert agreement.spread(np.full(3, -1e4)) == 500


@pytest.mark.parametrize(
    "shares, reason", [(SHARES[:1], "a single image has"), (SHARES[[0, 0]], "2 images with the same")]
)
def test_int8_needs_good_images_whose_scores_differ(shares, reason, make_dataset):
    """Else any difference counts as thousands of standard deviations."""
    category = Category(make_dataset(train=4, validation=len(shares), test=1) / "discs")
    reference, never = Reference(shares), lambda prefixes: pytest.fail("it was quantised")
    with pytest.raises(UserError, match=f"measured in standard deviations.*{reason}.*add validation images"):
        choose_int8(never, category, reference, 0.2, 0)


def test_compared_images_are_spread_evenly():
    assert agreement.spread_evenly(1) == [0]
    assert agreement.spread_evenly(5) == [0, 1, 2, 3, 4]
    chosen = agreement.spread_evenly(304)
    assert len(chosen) == 16 and chosen[0] == 0 and chosen[-1] == 303 and np.ptp(np.diff(chosen)) <= 1


def test_a_process_that_ends_without_an_answer_and_a_file_that_is_no_model_get_a_sentence(
    tmp_path, monkeypatch
):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="onnxruntime cannot run this model"):
        fresh_process.score(tmp_path / "model.onnx", [], [], "cpu", "score")
    monkeypatch.setattr(fresh_process, "__name__", "deploy.no_such_module")
    with pytest.raises(UserError, match="ended with status 1"):
        fresh_process.score(tmp_path / "model.onnx", [], [], "cpu", "score")


def test_a_new_export_takes_the_old_ones_place_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "discs.xml"
    for suffix in (".xml", ".bin"):
        path.with_suffix(suffix).write_bytes(b"old")

    def write(folder):
        for suffix in (".xml", ".bin"):
            folder.with_suffix(suffix).write_bytes(b"new")

    with pytest.raises(ZeroDivisionError), exporters.replacing(path) as new:
        write(new)
        raise ZeroDivisionError
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {
        "discs.xml": b"old",
        "discs.bin": b"old",
    }
    (tmp_path / ".discs.xml.new").mkdir()
    (tmp_path / ".discs.xml.new/left by a killed run").write_bytes(b"")
    with exporters.replacing(path) as new:
        write(new)
    assert {one.name: one.read_bytes() for one in tmp_path.iterdir()} == {
        "discs.xml": b"new",
        "discs.bin": b"new",
    }
