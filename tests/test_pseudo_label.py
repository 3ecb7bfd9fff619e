"""Stage 1 end to end on drawn discs: labels, files, resuming, and mistakes told in a sentence."""

import sys
from argparse import Namespace

from csad import processes, settings
from csad.data import data_sets, files, image_files, images, label_colours
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.label_matching import match_labels
from csad.pseudo_labels import beyond_clustering, component_labels, component_search, one_picture
from csad.pseudo_labels.crop_embedding import CropEmbedding
from csad.pseudo_labels.label_run import crop_weights, stand_ins
from csad.pseudo_labels.masks import PackedMasks
from csad.pseudo_labels.proposers import Proposals

import numpy as np
import pytest
import torch
from conftest import draw_parts
from test_component_features import Deepest
from torch import nn

import pseudo_label
from models.backbone import Backbone, fingerprint

IMAGES, SIDE = 8, 256


class Stopped(Exception):
    """Stands for a killed process."""


@pytest.fixture
def category(make_dataset):
    return data_sets.Dataset(make_dataset(train=IMAGES, size=SIDE)).select(None)[0]


@pytest.fixture
def label(category):
    """Run the stage: label(workspace, seed=0, overwrite=False, settings by name) -> the workspace."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU()).eval()
    backbone = Backbone("tiny", network, fingerprint(network), Deepest(network))

    def run(root, overwrite=False, seed=0, proposed_by=None, workers=1, **changes):
        named = {f"pseudo_labels.{key}": value for key, value in changes.items()} | {"images.size": 256}
        workspace = Workspace(root)
        with pytest.MonkeyPatch.context() as patch:
            if proposed_by:
                patch.setattr(pseudo_label, "choose_proposer", lambda *_: proposed_by)
            pseudo_label.PseudoLabelStage(
                category,
                workspace,
                settings.load("discs", "quick", named),
                backbone,
                torch.device("cpu"),
                Namespace(seed=seed, overwrite=overwrite, download=False),
                workers,
            ).run()
        return workspace

    return run


def contents(workspace):
    return {
        path.relative_to(workspace.root): path.read_bytes()
        for path in workspace.root.rglob("*")
        if path.is_file()
    }


def test_labels_agree_with_the_drawing_and_every_file_is_there(label, category, tmp_path, capsys):
    workspace = label(tmp_path / "w")
    info = workspace.pseudo_labels("discs").info
    trusted, histogram = (
        files.read_array(info / f"filtered_{name}.npy")
        for name in ("histogram_indices", "component_histogram")
    )
    assert histogram.shape == (IMAGES, 4) and (trusted < IMAGES).all() and len(trusted)
    predicted, true, rng = [], [], np.random.default_rng(7)
    for index, path in enumerate(category.train):
        folder = workspace.pseudo_labels("discs").image(path.stem)
        for name in ("all_masks", "refined_masks", "cluster_map", "filtered_cluster_map"):
            labels = images.read_mask(folder / f"{name}.png")
            np.testing.assert_array_equal(
                images.read_rgb(folder / f"{name}_color.png"), label_colours.colour_labels(labels)
            )
        shares = [(labels == number).mean() for number in range(1, 5)]
        np.testing.assert_allclose(histogram[index], shares)
        predicted.append(labels)
        true.append(draw_parts(rng, 4, SIDE)[1])
        assert images.read_mask(folder / "background.jpg")[0, 0] > 250
        assert not list(folder.glob("grounding_*"))
    assert match_labels(predicted, true).mean_iou > 0.9
    for name in (
        "raw_component_histogram.npy",
        "all_component_feats.npz",
        "component_num_mode.npy",
        "feature.png",
        "info.txt",
    ):
        assert (info / name).exists()
    assert files.read_array(info / "component_num_mode.npy") == 4
    record = files.read_json(info / "pseudo_label.json")["used"]
    assert record["proposer"] == "classical" and record["stand_ins"] == [
        "backbone tiny",
        "proposer classical",
    ]
    told = (info / "info.txt").read_text()
    assert "proposer classical" in told and "size of proposals, features and maps: 256x256, whatever" in told
    said = capsys.readouterr().out
    assert "instead of SAM-HQ" in said and "discs: 32 components make 4 clusters\n" in said


def test_interrupted_and_resumed_gives_the_same_files(label, tmp_path, monkeypatch):
    features = ["cnn_image", "lab"]
    whole = contents(label(tmp_path / "whole", features=features))
    for stop_at in (7, 30, 60, 83):  # written files: among proposals, and among label maps and summaries
        written, write = [], files.write_bytes

        def stopping(path, data, written=written, write=write, stop_at=stop_at):
            if len(written) == stop_at:
                raise Stopped
            written.append(path)
            write(path, data)

        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(files, "write_bytes", stopping)
            label(tmp_path / str(stop_at), features=features)
        assert contents(label(tmp_path / str(stop_at), features=features)) == whole


@pytest.mark.parametrize("features", [["lab", "position"], ["cnn_image", "lab"]])
def test_the_files_are_the_same_for_any_number_of_workers(label, tmp_path, monkeypatch, features):
    monkeypatch.setattr(processes, "MIN_PICTURES", 2)
    alone = contents(label(tmp_path / "1", features=features))
    for workers in (2, 4):
        assert contents(label(tmp_path / str(workers), features=features, workers=workers)) == alone


def test_a_category_beside_others_takes_its_share_of_the_processes(category, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(pseudo_label, "run_jobs", lambda args, jobs: given.append(args))
    monkeypatch.setattr(pseudo_label, "agreed_backbone", lambda *_: None)
    options = {"dataset_root": category.root.parent, "workspace": tmp_path, "workers": 6, "jobs": 3}
    named = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(
        sys, "argv", ["pseudo_label.py", "--preset", "quick", "--categories", "discs", *named]
    )
    pseudo_label.main()
    monkeypatch.setattr(processes, "_sharers", 3)  # a job's process knows its own category alone
    (task,) = pseudo_label.jobs(given[0]).values()
    assert task.do.__self__.workers == 2


def test_an_unreadable_picture_is_told_alike_for_any_number_of_workers(
    label, category, tmp_path, monkeypatch
):
    monkeypatch.setattr(processes, "MIN_PICTURES", 2)
    for path in category.train[4:6]:
        path.write_bytes(path.read_bytes()[:-200])  # the header is whole: only who reads it all notices
    told = set()
    for workers in (1, 4):
        with pytest.raises(UserError, match=category.train[4].name) as problem:
            label(tmp_path / str(workers), features=["lab"], workers=workers)
        told.add(str(problem.value))
        unfinished = Workspace(tmp_path / str(workers)).unfinished_pseudo_labels("discs")
        assert all((unfinished.image(path.stem) / "components.npz").exists() for path in category.train[:4])
    assert len(told) == 1


def test_a_finished_category_is_skipped_and_overwrite_starts_over(label, tmp_path, capsys):
    workspace = label(tmp_path)
    before = contents(workspace)
    label(tmp_path)
    assert "skipped" in capsys.readouterr().out
    (workspace.pseudo_labels("discs").root / "003" / "refined_masks.png").write_bytes(b"damaged")
    label(tmp_path, overwrite=True)
    assert contents(workspace) == before


def test_overwriting_harms_nothing_before_the_new_is_complete(label, category, tmp_path):
    workspace = label(tmp_path / "work")
    before = contents(workspace)
    broken = category.train[5]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    with pytest.raises(UserError, match=broken.name):
        label(tmp_path / "work", overwrite=True, rotations=3)
    after = contents(workspace)
    assert {path: content for path, content in after.items() if "unfinished" not in str(path)} == before
    broken.write_bytes(whole)
    label(tmp_path / "work", overwrite=True, rotations=3)
    assert not list(workspace.root.rglob("*.unfinished"))


def test_changed_settings_are_noticed(label, tmp_path):
    label(tmp_path)
    with pytest.raises(UserError, match="rotations: 12 -> 3"):
        label(tmp_path, rotations=3)
    with pytest.raises(UserError, match="seed"):
        label(tmp_path, seed=1)


def test_complete_files_made_by_others_are_used_and_incomplete_ones_are_not_mixed(
    label, category, tmp_path, capsys
):
    workspace = Workspace(tmp_path)
    for path in category.train:
        files.write_image(
            workspace.pseudo_labels("discs").image(path.stem) / "filtered_cluster_map.png",
            np.ones((64, 64), np.uint8),
        )
    with pytest.raises(UserError, match="filtered_component_histogram.npy is missing"):
        label(tmp_path)
    files.write_array(
        workspace.pseudo_labels("discs").info / "filtered_component_histogram.npy", np.ones((IMAGES, 1))
    )
    files.write_array(
        workspace.pseudo_labels("discs").info / "filtered_histogram_indices.npy", np.arange(IMAGES)
    )
    before = contents(workspace)
    label(tmp_path)
    assert contents(workspace) == before and "skipped" in capsys.readouterr().out


def test_images_without_parts_end_in_a_sentence(label, category, tmp_path):
    for path in category.train:
        files.write_image(path, np.full((64, 64, 3), 100, np.uint8))
    with pytest.raises(UserError, match="no parts were found"):
        label(tmp_path)


def test_one_image_without_parts_is_no_mistake(label, category, tmp_path):
    files.write_image(category.train[-1], np.full((64, 64, 3), 100, np.uint8))
    workspace = label(tmp_path, features=["cnn_image", "lab"])
    folder = workspace.pseudo_labels("discs").image(category.train[-1].stem)
    assert not images.read_mask(folder / "filtered_cluster_map.png").any()


def test_no_surviving_label_ends_in_a_sentence(label, tmp_path, monkeypatch):
    monkeypatch.setattr(beyond_clustering, "MIN_MEMBERS_VARIANTS", 5)
    with pytest.raises(UserError, match="left no label"):
        label(tmp_path)


def test_order_of_the_mask_algebra_with_a_grounding_proposer(tmp_path):
    squares = np.zeros((3, 64, 64), bool)
    squares[0, 4:20, 4:20] = squares[1, 4:20, 40:60] = squares[2, 40:60, 4:20] = True
    nothing = np.zeros((64, 64), bool)
    proposals = Proposals(
        pack(squares), background=squares[2], grounding=pack(squares[:1]), grounding_background=nothing
    )

    def refined(**changes):
        named = {f"pseudo_labels.{key}": value for key, value in changes.items()}
        return one_picture.refine(proposals, settings.load("discs", "quick", named).pseudo_labels)

    candidates, labels = refined()
    assert len(candidates) == 2 and labels.max() == 2
    assert len(refined(inside_grounding=True)[0]) == 1
    candidates, labels = refined(no_sam=True)
    assert len(candidates) == 2 and labels.max() == 1 and labels[10, 10] == 1
    one_picture.save_masks(tmp_path, proposals, candidates, labels)
    assert (tmp_path / "grounding_mask_color.png").exists() and (
        tmp_path / "grounding_background.png"
    ).exists()


def pack(masks):
    return PackedMasks.pack(masks, masks.shape[1:])


class Drawn:
    """Proposes the masks it is given, for pictures at their native size."""

    name, is_stand_in, checkpoints, working_size = "drawn", False, {}, None

    def __init__(self, masks, grounding=None):
        shape = (masks if masks is not None else grounding).shape[1:]
        self.proposals = Proposals(
            None if masks is None else pack(masks),
            np.zeros(shape, bool),
            None if grounding is None else pack(grounding),
        )

    def load(self):
        pass

    def propose(self, image):
        return self.proposals


def tiles(count):
    """As many square masks (256, 256) beside each other, each of 81 pixels."""
    masks = np.zeros((count, 256, 256), bool)
    for index, mask in enumerate(masks):
        row, column = divmod(index, 25)
        mask[row * 10 : row * 10 + 9, column * 10 : column * 10 + 9] = True
    return masks


@pytest.mark.parametrize("no_sam", [False, True])
def test_three_hundred_masks_leave_the_255_largest(label, category, tmp_path, no_sam):
    workspace = label(tmp_path, proposed_by=Drawn(tiles(300), grounding=tiles(300)), no_sam=no_sam)
    folder = workspace.pseudo_labels("discs").image(category.train[0].stem)
    for name in ("grounding_mask", "all_masks", "refined_masks"):
        assert len(np.unique(images.read_mask(folder / f"{name}.png"))) == 256


def test_one_mask_covering_everything_is_no_part(label, tmp_path):
    with pytest.raises(UserError, match="no parts were found"):
        label(tmp_path, proposed_by=Drawn(np.ones((1, 256, 256), bool)))


def test_without_automatic_masks_there_is_no_all_masks(label, category, tmp_path):
    workspace = label(tmp_path, proposed_by=Drawn(None, grounding=tiles(4)), no_sam=True)
    folder = workspace.pseudo_labels("discs").image(category.train[0].stem)
    assert (folder / "grounding_mask.png").exists() and not (folder / "all_masks.png").exists()
    label(tmp_path, overwrite=True)
    assert (folder / "all_masks.png").exists() and not (folder / "grounding_mask.png").exists()


def test_a_bad_checkpoint_leaves_everything_as_it_was(label, tmp_path):
    workspace = label(tmp_path)
    before = contents(workspace)

    class Damaged(Drawn):
        def load(self):
            raise UserError("damaged")

    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match="damaged"):
            label(root, proposed_by=Damaged(tiles(1)), overwrite=True)
    assert contents(workspace) == before


def test_images_described_together_are_described_as_one_by_one():
    rng = np.random.default_rng(0)
    drawn = [draw_parts(rng, parts, 256) for parts in (4, 1, 3)] + [(np.zeros((256, 256, 3), np.uint8),) * 2]
    pictures, label_maps = (
        [image for image, _ in drawn],
        [labels if labels.ndim == 2 else labels[..., 0] for _, labels in drawn],
    )
    embedding = CropEmbedding(Deepest(nn.Conv2d(3, 5, 3)), 4)
    together = component_search.describe(pictures, label_maps, embedding)
    for picture, labels, found in zip(pictures, label_maps, together):
        alone = component_search.describe([picture], [labels], embedding)[0]
        assert len(found["cnn_image"]) == labels.max()
        for name, values in alone.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)


PUBLISHED_CLUSTERING = {
    "variants": False,
    "lookalikes": False,
    "features": ["position"],
    "one_histogram_cluster": False,
}


def grid(rows, columns, size):
    """Squares (rows * columns, H, W) bool, well apart, all in the same place in every picture."""
    height, width = size
    masks = np.zeros((rows * columns, height, width), bool)
    for index, mask in enumerate(masks):
        row, column = divmod(index, columns)
        y, x = row * height // rows, column * width // columns
        mask[y : y + height // rows - 3, x : x + width // columns - 3] = True
    return masks


def test_native_pictures_are_proposed_described_and_painted_at_their_size(label, category, tmp_path):
    rng = np.random.default_rng(0)
    for path in category.train:
        files.write_image(path, rng.integers(0, 255, (150, 320, 3), dtype=np.uint8))
    seen = []

    class Watched(Drawn):
        def propose(self, image):
            seen.append(image)
            return super().propose(image)

    workspace = label(tmp_path, proposed_by=Watched(grid(2, 3, (150, 320))), **PUBLISHED_CLUSTERING)
    np.testing.assert_array_equal(seen[0], images.read_rgb(category.train[0]))
    labels = workspace.pseudo_labels("discs")
    for file in (
        "all_masks.png",
        "refined_masks.png",
        "cluster_map.png",
        "filtered_cluster_map.png",
        "background.jpg",
    ):
        assert image_files.displayed_size(labels.image("000") / file) == (320, 150)
    features = files.read_arrays(labels.info / "all_component_feats.npz")
    np.testing.assert_allclose(features["area"][:6, 0], grid(2, 3, (150, 320)).mean((1, 2))[0])
    assert "size of proposals, features and maps: native" in (labels.info / "info.txt").read_text()


def test_what_lies_outside_the_region_of_interest_is_grey_in_native_pictures(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)
    files.write_image(tmp_path / "0.png", picture)
    roi = np.zeros((256, 256), bool)
    roi[:, 128:] = True
    found = images.View(256, roi=roi).read_native(tmp_path / "0.png")
    assert (found[:, :30] == images.OUTSIDE).all()
    np.testing.assert_array_equal(found[:, 30:], picture[:, 30:])


def test_without_sam_instances_are_clustered_as_painted_and_split_for_synthesis(label, category, tmp_path):
    two_pieces = np.zeros((2, 256, 256), bool)
    two_pieces[0, 10:60, 10:60] = two_pieces[0, 10:60, 200:250] = two_pieces[1, 150:200, 100:150] = True
    workspace = label(
        tmp_path, proposed_by=Drawn(None, grounding=two_pieces), no_sam=True, **PUBLISHED_CLUSTERING
    )
    folder = workspace.pseudo_labels("discs").image(category.train[0].stem)
    assert images.read_mask(folder / "refined_masks.png").max() == 3
    clusters = images.read_mask(folder / "cluster_map.png")
    assert clusters[30, 30] == clusters[30, 220] != clusters[170, 120] and clusters.max() == 2


@pytest.mark.parametrize("changes", [{"no_sam": True}, {"inside_grounding": True}])
def test_a_picture_in_which_nothing_but_background_is_found_is_no_mistake(label, category, tmp_path, changes):
    class SometimesNothing(Drawn):
        """Of the first picture, Grounding DINO finds the container alone."""

        def propose(self, image):
            if image.tobytes() != images.read_rgb(category.train[0]).tobytes():
                return self.proposals
            everything = np.ones((256, 256), bool)
            return Proposals(
                self.proposals.masks,
                self.proposals.background,
                pack(np.zeros((0, 256, 256), bool)),
                everything,
            )

    squares = grid(2, 2, (256, 256))
    workspace = label(
        tmp_path, proposed_by=SometimesNothing(squares, grounding=squares), **changes, **PUBLISHED_CLUSTERING
    )
    labels = workspace.pseudo_labels("discs")
    assert not images.read_mask(labels.image(category.train[0].stem) / "filtered_cluster_map.png").any()
    assert images.read_mask(labels.image(category.train[1].stem) / "filtered_cluster_map.png").max() == 4
    assert 0 not in files.read_array(labels.trusted)


def test_more_than_twenty_clusters_are_answered_and_very_many_or_one_are_warned_of(
    label, category, tmp_path, capsys
):
    for parts, clusters, features, warning in (
        (25, 25, "position", ""),
        (35, 35, "position", "if it has fewer, one kind has several labels"),
        (10, 1, "area", "if it has several, one in place of another may go unnoticed"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beyond_clustering, "POSITION_UNIT", 0.02)
            workspace = label(
                tmp_path / str(parts),
                proposed_by=Drawn(grid(parts // 5, 5, (256, 256))),
                **PUBLISHED_CLUSTERING | {"features": [features]},
            )
        found = images.read_mask(
            workspace.pseudo_labels("discs").image(category.train[0].stem) / "filtered_cluster_map.png"
        )
        assert found.max() == clusters
        # The one line says of which category it is, whether it matters, and what to do.
        said = capsys.readouterr().out
        prefix = "discs: warning: " if warning else "discs: "
        (line,) = [line for line in said.splitlines() if f"components make {clusters} cluster" in line]
        assert line.startswith(f"{prefix}{8 * parts} components make {clusters} cluster")
        assert warning in line and all(
            (words in line) == bool(warning)
            for words in ("that is right and there is nothing to do", "--overwrite")
        )


def test_255_instances_in_each_picture_are_all_clustered(label, category, tmp_path):
    workspace = label(
        tmp_path,
        proposed_by=Drawn(None, grounding=tiles(255)),
        no_sam=True,
        **PUBLISHED_CLUSTERING | {"features": ["area"]},
    )
    folder = workspace.pseudo_labels("discs").image(category.train[0].stem)
    clusters = images.read_mask(folder / "cluster_map.png")
    np.testing.assert_array_equal(clusters > 0, tiles(255).any(0))


def test_more_clusters_than_a_label_map_holds_get_a_sentence():
    rng = np.random.default_rng(0)
    vectors = np.repeat(np.arange(300.0)[:, None], 2, 0) + rng.normal(0, 0.01, (600, 1))
    chosen = settings.load("discs", "paper").pseudo_labels
    with pytest.raises(UserError, match="fall into 300 clusters .*a label map holds 255"):
        component_labels.label_components(
            "discs", vectors, np.full(600, 0.01), np.tile([0, 1], 300), 2, 0.5, chosen
        )


def test_slivers_in_sight_are_no_components():
    labels = np.zeros((100, 100), np.uint8)
    labels[0, :10], labels[20:40, 20:40], labels[60:80, :] = 1, 2, 5
    features = component_search.describe([np.zeros((100, 100, 3), np.uint8)], [labels], None)[0]
    np.testing.assert_allclose(features["area"][:, 0], [0.04, 0.2])
    np.testing.assert_array_equal(np.unique(component_labels.paint(labels, np.array([7, 9]))), [0, 7, 9])


def test_a_number_for_the_bandwidth_is_used_with_the_weights_that_it_belongs_to(capsys):
    rng = np.random.default_rng(0)
    features = {"cnn_image": rng.random((6, 2048), np.float32), "area": rng.random((6, 1))}
    published = Backbone("wide_resnet50_2", nn.Identity(), "", deepest_origin="wide_resnet50_2.racm_in1k")
    chosen = settings.load("screw_bag", "paper").pseudo_labels
    vectors, bandwidth = component_labels.feature_space("screw_bag", features, 3, chosen, published, 0)
    assert vectors.shape == (6, 512) and bandwidth == 3.0
    unset = settings.load("screw_bag", "paper", {"pseudo_labels.bandwidth": "auto"}).pseudo_labels
    assert 0 < component_labels.feature_space("screw_bag", features, 3, unset, published, 0)[1] < 3
    encoders = Backbone("wide_resnet50_2", nn.Identity(), "", deepest_origin="wide_resnet50_2.tv2_in1k")
    vectors, bandwidth = component_labels.feature_space("screw_bag", features, 3, chosen, encoders, 0)
    assert vectors.shape == (6, 512) and 0 < bandwidth < 3
    assert (
        "bandwidth 3.0 belongs to cnn_image by wide_resnet50_2.racm_in1k, not to that by wide_resnet50_2.tv2_in1k"
        in (capsys.readouterr().out)
    )
    other = settings.load(
        "screw_bag", "paper", {"pseudo_labels.features": ["cnn_image", "area"]}
    ).pseudo_labels
    assert component_labels.feature_space("screw_bag", features, 3, other, published, 0)[1] == 1.0


def test_cnn_image_by_other_weights_is_named_as_a_stand_in():
    network = Deepest(nn.Conv2d(3, 5, 3))
    for origin, expected in (
        ("wide_resnet50_2.tv2_in1k", ["cnn_image by wide_resnet50_2.tv2_in1k"]),
        ("wide_resnet50_2.racm_in1k", []),
    ):
        backbone = Backbone("wide_resnet50_2", network, "", network, deepest_origin=origin)
        wanted = settings.load("discs", "paper", {"images.size": 256}).pseudo_labels
        assert stand_ins(Drawn(tiles(1)), wanted, backbone) == expected
        assert list(crop_weights(wanted, backbone)) == [origin]


def test_the_command_line_tells_a_mistake(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pseudo_label.py", "--workspace", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        pseudo_label.run_script(pseudo_label.main)
    assert stop.value.code == 2 and "does not exist" in capsys.readouterr().err
