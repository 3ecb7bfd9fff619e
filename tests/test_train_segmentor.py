"""Stage 2 end to end on a tiny data set: outputs, resuming, and mistakes told in a sentence."""

import copy
import shutil
import subprocess
import sys

import csad
from csad import settings
from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.training import feature_cache, loop, pseudo_label_files, segmentor_scores, stage
from csad.training import segmentor_step as steps
from csad.training.best_on_test import mean_auroc
from csad.training.schedules import cosine

import cv2
import numpy as np
import pytest
import torch
from conftest import TinyEncoder, draw_parts, job_for, make_discs, tiny_backbone

import train_segmentor
from models.patch_histogram import HISTOGRAMS
from models.segmentor import losses as train_segmentor_losses

CATEGORY, PARTS = "discs", 4
CPU = torch.device("cpu")
PROVENANCE = {"format_version": csad.FORMAT_VERSION, "stand_ins": []}
TINY = {
    "segmentor.width": 16,
    "segmentor.epochs": 3,
    "segmentor.unsupervised_from_epoch": 1,
    "segmentor.batch_size": 2,
}


@pytest.fixture
def backbone():
    return tiny_backbone()


def write_stage_1(workspace, category, trusted, side=256):
    """What pseudo_label.py would have found on the drawn discs."""
    rng, made = np.random.default_rng(7), workspace.pseudo_labels(category.name)
    histograms = []
    for path in category.train:
        _, labels = draw_parts(rng, PARTS, 128)
        labels = cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST)
        files.write_image(made.image(path.stem) / "filtered_cluster_map.png", labels)
        histograms.append([(labels == index).mean() for index in range(1, PARTS + 1)])
    files.write_array(made.trusted, np.array(trusted))
    files.write_array(made.histogram, np.array(histograms))


@pytest.fixture
def prepared(tmp_path, make_dataset):
    """(category, function that makes a workspace with stage 1's files)."""
    category = layouts.Category(make_dataset() / CATEGORY)

    def workspace(name, trusted=range(0, 12, 2), side=256):
        made = Workspace(tmp_path / name)
        write_stage_1(made, category, list(trusted), side)
        return made

    return category, workspace


def train(category, workspace, backbone, seed=0, overwrite=False, precision="fp32", **more):
    overrides = TINY | {"images.size": 256} | {f"segmentor.{key}": value for key, value in more.items()}
    chosen = settings.load(CATEGORY, "quick", overrides)
    train_segmentor.train_category(job_for(category, workspace, backbone, chosen, seed, overwrite, precision))


def outputs(workspace):
    """Relative path and bytes of everything written that stage 1 did not write."""
    written = [
        *(workspace.root / "ckpt").glob("*"),
        *(workspace.root / "anomaly_score").glob("*"),
        *(workspace.pseudo_labels(CATEGORY).root / "test_seg_output").glob("*"),
    ]
    return {str(path.relative_to(workspace.root)): path.read_bytes() for path in written}


def test_everything_of_the_contract_is_written(prepared, backbone):
    category, make = prepared
    workspace = make("work")
    noted = PROVENANCE | {"stand_ins": ["proposer tiny", "backbone tiny"]}
    files.write_json(workspace.pseudo_labels(CATEGORY).record, {"used": noted, "scored": None, "outputs": {}})
    train(category, workspace, backbone, epochs=12, unsupervised_from_epoch=8, lr=0.01)

    saved = files.read_state(workspace.checkpoint(CATEGORY, "patchhist"))
    assert saved["meta"]["classes"] == PARTS + 1 == len(saved["state"]["fc2.conv3.bias"])
    assert saved["meta"]["stand_ins"] == ["backbone tiny", "proposer tiny"]
    assert not workspace.progress(CATEGORY, "segmentor").exists()

    parameters = files.read_arrays(workspace.patch_histogram_parameters(CATEGORY))
    published = {f"{name}_{part}" for name in HISTOGRAMS for part in ("mean", "invcov", "val_score")}
    held_out = {f"{name}_{part}_score" for name in HISTOGRAMS for part in ("held_out", "incomplete")}
    assert parameters.keys() == {*published, *held_out}
    assert parameters["patch_hist_invcov"].shape == (4 * (PARTS + 1),) * 2
    scores = {
        part: files.read_array(workspace.scores(CATEGORY, "patchhist", part))
        for part in ("logi", "struc", "val")
    }
    assert [len(scores[part]) for part in ("logi", "struc", "val")] == [8, 8, 6]
    np.testing.assert_array_equal(scores["logi"][:4], scores["struc"][:4])
    assert scores["logi"][4:].min() > scores["logi"][:4].max()  # a disc is missing there

    maps = {
        path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for path in (workspace.pseudo_labels(CATEGORY).root / "test_seg_output").glob("*")
    }
    assert sorted(maps) == sorted(f"{kind}_{index:03d}.png" for kind in layouts.SPLITS for index in range(4))
    assert all(
        one.shape == (256, 256) and one.dtype == np.uint8 and one.max() <= PARTS for one in maps.values()
    )
    assert set(np.unique(maps["good_000.png"])) == set(range(PARTS + 1))


@pytest.mark.parametrize("reliability", [False, True])
def test_weights_are_chosen_by_the_scores_that_are_written(prepared, backbone, monkeypatch, reliability):
    category, make = prepared
    workspace, judged = make("work"), []

    def watched(scores):
        judged.append(scores)
        return mean_auroc(scores)

    monkeypatch.setattr(segmentor_scores, "mean_auroc", watched)
    monkeypatch.setattr(segmentor_scores, "EVALUATED_EVERY", 1)
    train(category, workspace, backbone, checkpoint="best_on_test", reliability=reliability)
    meta = files.read_state(workspace.checkpoint(CATEGORY, "patchhist"))["meta"]
    by_step = dict(zip((step for step, _ in meta["evaluations"]), judged, strict=True))
    scores = by_step[meta["selected_step"]]
    for split, part in ((layouts.LOGICAL, "logi"), (layouts.STRUCTURAL, "struc")):
        written = files.read_array(workspace.scores(CATEGORY, "patchhist", part))
        np.testing.assert_allclose(written, np.concatenate([scores[layouts.GOOD], scores[split]]), rtol=1e-9)


class Stop:
    """Presses Ctrl-C, or pulls the plug, in the middle of the n-th step."""

    def __init__(self, monkeypatch, step, how):
        self.left, self.how = step, how
        original = train_segmentor.step_losses

        def watched(*arguments):
            parts = original(*arguments)
            self.left -= 1
            if self.left == 0:
                self.how()
            return parts

        monkeypatch.setattr(train_segmentor, "step_losses", watched)


def press_control_c():
    import signal

    signal.raise_signal(signal.SIGINT)


def pull_the_plug():
    raise SystemError("power failure")


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize("how", [press_control_c, pull_the_plug])
def test_an_interrupted_run_ends_in_the_same_bytes(prepared, backbone, monkeypatch, step, how):
    category, make = prepared
    whole, broken = make("whole"), make("broken")
    train(category, whole, backbone)
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0 if how is pull_the_plug else 60)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemError)):
        Stop(patch, step, how)
        train(category, broken, backbone)
    saved = files.read_state(broken.progress(CATEGORY, "segmentor"))
    assert saved["done"] == (step if how is press_control_c else step - 1)
    train(category, broken, backbone)
    assert outputs(broken) == outputs(whole)


@pytest.mark.parametrize("how", [press_control_c, pull_the_plug])
def test_an_overwriting_run_goes_on_from_its_own_progress_alone(prepared, backbone, monkeypatch, how):
    category, make = prepared
    workspace = make("work")
    train(category, workspace, backbone)
    before, taken = outputs(workspace), []
    real = train_segmentor.step_losses
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)

    def run(broken_at=None):
        """The steps that an overwriting run takes."""
        taken.clear()
        with monkeypatch.context() as patch:
            patch.setattr(train_segmentor, "step_losses", lambda *given: (taken.append(1), real(*given))[1])
            if broken_at:
                Stop(patch, broken_at, how)
                with pytest.raises((KeyboardInterrupt, SystemError)):
                    train(category, workspace, backbone, overwrite=True)
            else:
                train(category, workspace, backbone, overwrite=True)
        return len(taken)

    steps = run()
    assert outputs(workspace) == before
    run(broken_at=4)
    assert run() == steps - (4 if how is press_control_c else 3)
    assert outputs(workspace) == before and run() == steps  # what is complete is begun anew

    run(broken_at=4)
    record = workspace.record(CATEGORY, "patchhist")
    record.write_text(
        record.read_text() + "\n"
    )  # another result than the one that the broken run was to replace
    assert run() == steps and outputs(workspace) == before


def test_an_overwriting_run_discards_the_progress_of_others(prepared, backbone, monkeypatch):
    category, make = prepared
    workspace, taken, real = make("work"), [], train_segmentor.step_losses
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, 3, press_control_c)
        train(category, workspace, backbone)
    progress = workspace.progress(CATEGORY, "segmentor")
    for content in (progress.read_bytes(), b"damaged"):
        progress.write_bytes(content)
        taken.clear()
        monkeypatch.setattr(train_segmentor, "step_losses", lambda *given: (taken.append(1), real(*given))[1])
        train(category, workspace, backbone, overwrite=True)
        assert len(taken) == 9


@pytest.mark.parametrize("name", ["filtered_cluster_map.png", "background.jpg"])
def test_replaced_label_maps_and_backgrounds_are_noticed_whoever_made_them(prepared, backbone, name):
    category, make = prepared
    workspace = make("work")
    train(category, workspace, backbone)
    folder = workspace.pseudo_labels(CATEGORY).image("002")
    labels = cv2.imread(str(folder / "filtered_cluster_map.png"), cv2.IMREAD_UNCHANGED)
    files.write_image(folder / name, np.roll(labels, 1, 0))
    with pytest.raises(UserError, match="label_maps: contents differ.*--overwrite"):
        train(category, workspace, backbone)
    files.write_image(
        workspace.pseudo_labels(CATEGORY).image("001") / "filtered_cluster_map.png", labels
    )  # not a trusted one
    train(category, workspace, backbone, overwrite=True)


def test_without_evidence_there_is_no_component_map(prepared, backbone):
    category, make = prepared
    workspace = make("work")
    train(category, workspace, backbone)
    drawn = [workspace.evidence_parameters(CATEGORY), workspace.anomaly_maps(CATEGORY, "patchhist")]
    assert all(path.exists() for path in drawn)
    train(category, workspace, backbone, evidence=False, overwrite=True)
    assert not any(path.exists() for path in drawn) and len(outputs(workspace)) > 10
    with pytest.raises(UserError, match="evidence: False -> True"):
        train(category, workspace, backbone)


def test_memory_for_scores_does_not_grow_with_the_number_of_label_maps():
    code = """
import resource, sys, numpy as np, torch
from models.histogram_evidence import HistogramEvidence
from models.patch_histogram import PatchHistogramDetector
from csad.training.segmentor_scores import SCORING_BATCH, score
maps = torch.randint(0, 5, (SCORING_BATCH, 256, 256), dtype=torch.uint8)
def peak(batches):
    scores, drawn = score(PatchHistogramDetector(5, False).double(), HistogramEvidence(5), (maps for _ in range(batches)))
    assert len(scores) == len(drawn) == batches * SCORING_BATCH
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(peak(4), peak(int(sys.argv[1]) // SCORING_BATCH))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "400"],
        cwd=train_segmentor.__file__.rpartition("/")[0],
        capture_output=True,
        text=True,
        check=True,
    )
    few, many = map(float, done.stdout.split())
    assert many - few < 50  # MB; the maps that are drawn take 6.6, all one-hot label maps at once 500


def test_a_run_interrupted_after_training_only_scores(prepared, backbone, monkeypatch):
    category, make = prepared
    workspace = make("work")
    train(category, workspace, backbone)
    before = outputs(workspace)
    workspace.scores(CATEGORY, "patchhist", "struc").unlink()
    monkeypatch.setattr(train_segmentor, "train", None)
    train(category, workspace, backbone)
    assert outputs(workspace) == before


def test_changed_validation_and_test_images_are_scored_without_training(prepared, backbone, monkeypatch):
    category, make = prepared
    workspace = make("work")
    train(category, workspace, backbone, epochs=1, unsupervised_from_epoch=0)
    before = outputs(workspace)
    monkeypatch.setattr(train_segmentor, "train", None)
    shutil.copy(category.validation[0], category.validation[0].with_name("new.png"))
    category.test("logical_anomalies")[0].unlink()
    train(category, workspace, backbone, epochs=1, unsupervised_from_epoch=0)
    after = outputs(workspace)
    scores = {
        part: len(files.read_array(workspace.scores(CATEGORY, "patchhist", part)))
        for part in ("logi", "struc", "val")
    }
    assert scores == {"logi": 7, "struc": 8, "val": 7}
    parameters, checkpoint = (
        f"anomaly_score/{CATEGORY}_patchhist_params.npz",
        f"ckpt/segmentor_{CATEGORY}_256.pth",
    )
    assert after[parameters] != before[parameters] and after[checkpoint] == before[checkpoint]


def test_diverged_training_says_so_and_leaves_nothing_behind(prepared, backbone, monkeypatch):
    category, make = prepared
    workspace = make("work")
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)
    with pytest.raises(UserError, match="diverged.* lower --segmentor.lr"):
        train(category, workspace, backbone, lr=1e30, epochs=1, unsupervised_from_epoch=0)
    assert outputs(workspace) == {}


def test_a_checkpoint_without_a_record_is_no_blank_cheque(prepared, backbone):
    category, make = prepared
    workspace = make("work")
    files.write_state(
        workspace.checkpoint(CATEGORY, "patchhist"), {"fc2.conv3.bias": torch.zeros(5)}
    )  # as published
    with pytest.raises(UserError, match="segmentor_discs_256.pth does not say what it was made from"):
        train(category, workspace, backbone)
    assert not workspace.checkpoint(CATEGORY, "patchhist").with_suffix(".json").exists()


def test_finished_work_is_skipped_and_changed_settings_are_noticed(prepared, backbone, monkeypatch, capsys):
    category, make = prepared
    workspace = make("work")
    train(category, workspace, backbone)
    before = outputs(workspace)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        train(category, workspace, backbone, seed=1)
    with pytest.raises(UserError, match="segmentor.lr"):
        train(category, workspace, backbone, lr=0.5)
    assert outputs(workspace) == before
    train(category, workspace, backbone, seed=1, overwrite=True)
    assert outputs(workspace).keys() == before.keys()
    assert outputs(workspace)["ckpt/segmentor_discs_256.pth"] != before["ckpt/segmentor_discs_256.pth"]
    monkeypatch.setattr(train_segmentor, "train", None)
    train(category, workspace, backbone, seed=1)
    assert "skipped" in capsys.readouterr().out


@pytest.mark.parametrize("trusted", [range(11), range(12), [3]])
def test_few_or_no_other_images_are_enough(prepared, backbone, trusted):
    category, make = prepared
    workspace = make("work", trusted)
    train(category, workspace, backbone, batch_size=4, epochs=2)
    assert workspace.checkpoint(CATEGORY, "patchhist").exists()


def test_label_maps_of_another_size_are_resized_without_inventing_labels(prepared):
    category, make = prepared
    data = {}
    for side in (256, 128):
        workspace = make(f"work{side}", side=side)
        trusted, classes = pseudo_label_files.read_stage_1(category, workspace)
        pictures = torch.zeros(12, 3, 256, 256)
        data[side] = pseudo_label_files.training_data(category, workspace, pictures, trusted, classes, False)
    assert set(np.unique(data[128].labels)) == set(range(PARTS + 1))
    assert (data[128].labels != data[256].labels).mean() < 0.01


def test_training_reads_what_stage_1_says_of_the_trusted_images(prepared, capsys, tmp_path):
    """Holes of classes are filled before resizing, sources are refined masks, background is any non-zero pixel."""
    _, make = prepared
    category = layouts.Category(make_discs(tmp_path / "large", train=12, size=512) / CATEGORY)
    workspace = make("work", trusted=[0, 1], side=512)
    first = workspace.pseudo_labels(CATEGORY).image(category.key(category.train[0]))
    labels = np.zeros((512, 512), np.uint8)
    labels[100:200, 100:200], labels[149:151, 149:151] = 2, 0  # a hole that resizing leaves one pixel of
    files.write_image(first / "filtered_cluster_map.png", labels)
    refined = np.where(np.indices(labels.shape)[1] < 150, 3, 200).astype(np.uint8) * (labels > 0)
    files.write_image(first / "refined_masks.png", refined)
    files.write_image(first / "background.jpg", np.where(labels == 0, 255, 0).astype(np.uint8))
    pictures = torch.zeros(12, 3, 256, 256)
    plain, data = (
        pseudo_label_files.training_data(category, workspace, pictures, np.array([0, 1]), PARTS + 1, fill)
        for fill in (False, True)
    )
    assert (plain.labels[0] == 2).sum() == 50 * 50 - 1 and (data.labels[0] == 2).sum() == 50 * 50
    assert np.unique(data.instances[0]).tolist() == [0, 3, 200]
    assert 0 < (data.backgrounds[0] & (data.labels[0] > 0)).sum() < 200  # the halo of the JPEG
    assert "1 of 2 trusted images have no refined_masks.png" in capsys.readouterr().out
    assert data.instances[1].max() == PARTS == len(np.unique(data.instances[1])) - 1


@pytest.mark.parametrize("missing", ["test", "test/good"])
def test_without_test_images_the_rest_is_written(prepared, backbone, capsys, tmp_path, missing):
    category, make = prepared
    (category.root / missing).rename(tmp_path / "elsewhere")
    workspace = make("work")
    train(category, workspace, backbone)
    assert workspace.scores(CATEGORY, "patchhist", "val").exists()
    assert not workspace.scores(CATEGORY, "patchhist", "logi").exists()
    assert "no test scores" in capsys.readouterr().out
    train(category, workspace, backbone)
    assert "skipped" in capsys.readouterr().out


def test_an_empty_test_folder_is_noticed_before_training(prepared, backbone):
    category, make = prepared
    for path in category.test("logical_anomalies"):
        path.unlink()
    with pytest.raises(UserError, match="no images in .*logical_anomalies"):
        train(category, make("work"), backbone)
    assert not make("work").checkpoint(CATEGORY, "patchhist").exists()


def damage_missing_stage(workspace, category):
    (workspace.pseudo_labels(CATEGORY).histogram).unlink()


def damage_missing_map(workspace, category):
    (workspace.pseudo_labels(CATEGORY).image("002") / "filtered_cluster_map.png").unlink()


def damage_unreadable_map(workspace, category):
    (workspace.pseudo_labels(CATEGORY).image("002") / "filtered_cluster_map.png").write_bytes(b"no picture")


def damage_class_count(workspace, category):
    files.write_array(workspace.pseudo_labels(CATEGORY).histogram, np.zeros((12, 2)))


def damage_index(workspace, category):
    files.write_array(workspace.pseudo_labels(CATEGORY).trusted, np.array([0, 99]))


def damage_no_index(workspace, category):
    files.write_array(workspace.pseudo_labels(CATEGORY).trusted, np.zeros(0))


def damage_origin(workspace, category):
    files.write_json(
        workspace.pseudo_labels(CATEGORY).record,
        {"used": PROVENANCE | {"train_images": "others"}, "scored": None, "outputs": {}},
    )


def damage_map_of_another_origin(workspace, category):
    files.write_json(
        workspace.pseudo_labels(CATEGORY).record,
        {"used": PROVENANCE, "scored": None, "outputs": {"002/filtered_cluster_map.png": "another"}},
    )


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (damage_origin, "the train images are not those that pseudo_label.py saw"),
        (
            damage_map_of_another_origin,
            "002/filtered_cluster_map.png is not the file that pseudo_label.py wrote",
        ),
        (damage_missing_stage, "filtered_component_histogram.npy is missing; run pseudo_label.py"),
        (damage_missing_map, "002/filtered_cluster_map.png is missing; run pseudo_label.py"),
        (damage_unreadable_map, "002/filtered_cluster_map.png cannot be read"),
        (damage_class_count, "has label 4, but .* knows 2 components"),
        (damage_index, "names image number 99, but .* has 12 images"),
        (damage_no_index, "should hold a list of image numbers"),
    ],
)
def test_mistakes_get_a_sentence_and_nothing_is_written(prepared, backbone, damage, sentence):
    category, make = prepared
    workspace = make("work")
    damage(workspace, category)
    with pytest.raises(UserError, match=sentence):
        train(category, workspace, backbone)
    assert not workspace.checkpoint(CATEGORY, "patchhist").exists()


def test_the_command_line_runs_the_stage(prepared, backbone, monkeypatch):
    category, make = prepared
    workspace = make("work")
    monkeypatch.setattr(stage, "build_backbone", lambda *arguments: backbone)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "train_segmentor.py",
            "--workspace",
            str(workspace.root),
            "--dataset_root",
            str(category.root.parent),
            "--preset",
            "quick",
            "--device",
            "cpu",
            *(part for key, value in TINY.items() for part in (f"--{key}", str(value))),
        ],
    )
    train_segmentor.main()
    assert workspace.checkpoint(CATEGORY, "patchhist").exists()


@pytest.fixture
def training_data():
    rng = np.random.default_rng(0)
    images, labels = zip(*(draw_parts(rng, PARTS, 256) for _ in range(8)))
    labels = np.stack(labels)
    return steps.TrainingData(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        labels,
        labels,
        labels > 9,
        np.arange(0, 8, 2),
        np.arange(1, 8, 2),
    )


def test_a_batch_depends_on_seed_category_and_step_alone(training_data):
    chosen = settings.load(CATEGORY, "quick", TINY).segmentor

    def draw(step, category, seed):
        return steps.draw_sample(training_data, chosen, step, True, category, seed)

    assert all((one == other).all() for one, other in zip(draw(3, "a", 0), draw(3, "a", 0)))
    for different in ((4, "a", 0), (3, "b", 0), (3, "a", 1)):
        assert (draw(*different).images != draw(3, "a", 0).images).any()


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_the_learning_rate_falls_to_its_final_share(share):
    overrides = {"segmentor.lr": 0.01, "segmentor.final_lr_share": share}
    chosen = settings.load(CATEGORY, "paper", overrides).segmentor
    rates = [chosen.lr * cosine(step, 100, chosen.final_lr_share) for step in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[-1] == pytest.approx(0.01 * share)
    assert rates == sorted(rates, reverse=True)


def test_the_paper_keeps_its_learning_rate():
    chosen = settings.load(CATEGORY, "paper").segmentor
    assert {chosen.lr * cosine(step, 10, chosen.final_lr_share) for step in range(10)} == {chosen.lr}


@pytest.mark.parametrize("joint_pass", [True, False])
def test_the_unsupervised_losses_wait_for_their_epoch(training_data, joint_pass):
    chosen = settings.load(CATEGORY, "quick", TINY | {"segmentor.joint_pass": joint_pass}).segmentor
    backbone, segmentor = TinyEncoder(), train_segmentor.Segmentor((8, 8, 8), 16, PARTS + 1)
    batches = steps.Batches(training_data, backbone, CPU, "fp32", "encode")
    batch = batches.batch(steps.draw_sample(training_data, chosen, 0, False, CATEGORY, 0))
    assert len(batch.unlabelled[0]) == (0 if joint_pass else 2) and batch.reference_labels.shape == (
        0,
        256,
        256,
    )
    assert steps.step_losses(segmentor, backbone, batch, chosen, "fp32").keys() == {"ce", "focal", "dice"}
    batch = batches.batch(steps.draw_sample(training_data, chosen, 0, True, CATEGORY, 0))
    assert "histogram" in steps.step_losses(segmentor, backbone, batch, chosen, "fp32")


@pytest.mark.parametrize("joint_pass, unsupervised", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("kept", [True, False])
def test_a_step_is_the_plain_losses(training_data, kept, joint_pass, unsupervised, monkeypatch):
    """Whatever is kept: encode all images, let trusted and unlabelled ones pass the segmentor one after the other
    (or together, in one batch), and take models.segmentor's losses; batch norm's statistics see both."""
    if not kept:
        monkeypatch.setattr(feature_cache, "CACHE_BYTES", 0)
    chosen = settings.load(CATEGORY, "paper", TINY | {"segmentor.joint_pass": joint_pass}).segmentor
    torch.manual_seed(0)
    encoder, segmentor = TinyEncoder(), train_segmentor.Segmentor((8, 8, 8), 16, PARTS + 1).train()
    plain = copy.deepcopy(segmentor)
    batches = steps.Batches(training_data, encoder, CPU, "fp32", "encode")
    assert (batches.features._kept is not None) == kept
    sample = steps.draw_sample(training_data, chosen, 0, unsupervised, CATEGORY, 0)
    batch = batches.batch(sample)
    found = steps.step_losses(segmentor, encoder, batch, chosen, "fp32")
    count, unlabelled = len(batch.images), training_data.images[sample.unlabelled].float()
    if joint_pass:
        logits, free = plain(encoder(torch.cat([batch.images, unlabelled]))).split(count)
    else:
        logits, free = plain(encoder(batch.images)), plain(encoder(unlabelled))
    expected = train_segmentor_losses(logits, batch.labels, free, batch.reference_labels, chosen)
    assert found.keys() == expected.keys()
    assert len(found) == (5 if unsupervised else 3)
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4), name
    for parts in (found, expected):
        sum(parts.values()).backward()
    for (name, ours), theirs in zip(segmentor.named_parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name)
    for (name, ours), theirs in zip(segmentor.named_buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_bf16_resumes_exactly_and_is_remembered(prepared, backbone, monkeypatch):
    category, make = prepared
    whole, broken = make("whole"), make("broken")
    train(category, whole, backbone, precision="bf16")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Stop(patch, 3, press_control_c)
        train(category, broken, backbone, precision="bf16")
    with pytest.raises(UserError, match="precision: bf16 -> fp32"):
        train(category, broken, backbone)
    train(category, broken, backbone, precision="bf16")
    assert outputs(broken) == outputs(whole)


def test_every_trusted_image_is_seen_before_any_is_seen_twice(training_data, monkeypatch):
    chosen = settings.load(CATEGORY, "quick", TINY).segmentor
    seen = []
    monkeypatch.setattr(
        steps, "synthesise", lambda image, labels, *rest: seen.append(labels) or (image, labels, 0)
    )
    for step in range(2):
        steps.draw_sample(training_data, chosen, step, False, CATEGORY, 0)
    found = [next(index for index in range(8) if (training_data.labels[index] == one).all()) for one in seen]
    assert sorted(found) == training_data.trusted.tolist()


def test_augmentation_is_small_and_keeps_labels(training_data):
    chosen = settings.load(CATEGORY, "quick", TINY).segmentor
    image, labels = training_data.images[:1], torch.from_numpy(training_data.labels[:1])
    changed = 0
    for step in range(10):
        sample = steps.draw_sample(training_data, chosen, step, False, CATEGORY, 0)
        new_image, new_labels = steps.augment(image, labels, sample.affine[:1], sample.photometric[:1])
        assert 0 <= new_image.min() and new_image.max() <= 255 and new_labels.dtype == torch.int64
        assert set(new_labels.unique().tolist()) <= {0, *labels.unique().tolist()}
        assert (new_labels != labels).float().mean() < 0.1
        assert abs(new_image.mean() - image.float().mean()) < 0.12 * 255
        changed += bool((new_image - image).abs().max() > 1)
    assert 3 <= changed < 10  # each pair with probability 0.5


def test_movements_turn_shift_and_scale_as_opencv_does():
    """The same movement by OpenCV, whose coordinates are pixels and which warps the other way round."""
    rng = np.random.default_rng(3)
    picture = cv2.GaussianBlur(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8), (9, 9), 0)
    angle, scale, shift = 8.0, 1.05, np.array([0.05, -0.03])
    matrix = cv2.getRotationMatrix2D((31.5, 31.5), angle, scale)
    matrix[:, 2] += shift * 63
    expected = cv2.warpAffine(
        picture, matrix, (64, 64), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT
    )

    class Drawn:
        """Gives out the wanted values in the order in which they are drawn."""

        values = iter([angle, scale - 1, shift])

        def random(self):
            return 0.0

        def uniform(self, *_):
            return next(self.values)

    movement = torch.from_numpy(steps._draw_affine(Drawn()))[None]
    images = torch.from_numpy(picture.transpose(2, 0, 1).copy())[None]
    found, labels = steps.augment(images, torch.full((1, 64, 64), 7), movement, torch.tensor([[1.0, 0.0]]))
    assert (found[0].permute(1, 2, 0).numpy() - expected).__abs__().mean() < 1
    outside = cv2.warpAffine(np.full((64, 64), 7, np.uint8), matrix, (64, 64), flags=cv2.INTER_NEAREST) == 0
    assert (labels[0].numpy()[outside] == 0).mean() > 0.9 and (labels[0].numpy()[~outside] == 7).mean() > 0.99


def test_pictures_that_are_segmented_twice_are_moved_and_moved_back(prepared, backbone, monkeypatch):
    """Noise, light and place differ, so a segmentation that minds none of them says the same twice."""
    category, workspace = prepared[:2]
    job = job_for(category, workspace, backbone, settings.load(category.name, "quick", {"images.size": 256}))
    pictures = torch.zeros(70, 3, 256, 256, dtype=torch.uint8)
    pictures[:, :, 50:90, 100:180] = 200
    seen = []

    def label_maps(segmentor, job, changed, what):
        seen.append(changed)
        yield (changed[:, 0] > 100).byte()

    monkeypatch.setattr(segmentor_scores, "label_maps", label_maps)
    plain, undone = segmentor_scores.segment_twice(None, job, pictures, (pictures[:, 0] > 100).byte())
    assert 16 <= len(plain) <= segmentor_scores.RELIABILITY_IMAGES and torch.equal(plain, undone)
    assert len({tuple((picture[0] > 100).nonzero()[0].tolist()) for picture in seen[0]}) > 5  # moved
    assert seen[0][:, :, 60:80, 110:170].float().mean((1, 2, 3)).std() > 1  # another light
