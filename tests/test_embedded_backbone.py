"""The embedded backbone: its shape, its weights, the pictures it learned from, and the script that trained it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from errors import UserError
from models.embedded_backbone import (
    CHANNELS,
    PROVENANCE_PATH,
    WEIGHTS_PATH,
    EmbeddedBackbone,
    load_embedded_backbone,
)
from training import embedded_backbone as script
from training.formula_pictures import (
    SHAPE_KINDS,
    TEXTURE_KINDS,
    TILE_VARIANTS,
    render_labelled_picture,
    render_picture,
    texture_tile,
)


def test_four_stages_at_strides_4_8_16_32():
    backbone = EmbeddedBackbone().eval()
    assert backbone.channels == CHANNELS
    for height, width in ((64, 96), (100, 70)):
        with torch.inference_mode():
            features = backbone(torch.zeros(2, 3, height, width))
        expected = [(2, c, -(-height // s), -(-width // s)) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]
        assert [tuple(f.shape) for f in features] == expected
        assert all(f.min() >= 0 for f in features)


def test_shipped_weights_load_in_evaluation_mode():
    backbone = load_embedded_backbone()
    assert not backbone.training
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in backbone.parameters())
    with torch.inference_mode():
        features = backbone(torch.randn(1, 3, 64, 64))
    assert all(f.isfinite().all() and f.std() > 0 for f in features)


def test_shipped_files_are_small_and_tell_their_origin():
    assert WEIGHTS_PATH.stat().st_size < 8e6
    story = json.loads(PROVENANCE_PATH.read_text())
    assert story["sha256"] == hashlib.sha256(WEIGHTS_PATH.read_bytes()).hexdigest()
    assert {"command", "seed", "pictures", "steps", "versions", "losses"} <= story.keys()


def test_weights_that_do_not_match_their_provenance_are_refused(tmp_path):
    replaced = tmp_path / "embedded_backbone.pth"
    replaced.write_bytes(WEIGHTS_PATH.read_bytes()[:-1])
    with pytest.raises(UserError, match="sha256"):
        load_embedded_backbone(replaced)
    with pytest.raises(UserError, match="missing"):
        load_embedded_backbone(tmp_path / "nowhere.pth")


def test_pictures_are_the_same_for_the_same_seed():
    first, again, other = (render_picture(np.random.default_rng(seed), 96) for seed in (3, 3, 4))
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("size", (32, 100, 160))
def test_labels_are_within_their_ranges(size):
    for seed in range(8):
        picture = render_labelled_picture(np.random.default_rng(seed), size)
        assert picture.image.shape == (size, size, 3)
        kinds = ((picture.texture, len(TEXTURE_KINDS)), (picture.shape, len(SHAPE_KINDS)), (picture.instance, 256))
        for labels, classes in kinds:
            assert labels.shape == (size, size) and labels.dtype == np.uint8
            assert labels.max() < classes
        assert np.array_equal(picture.instance == 0, picture.shape == 0)


def test_every_texture_has_contrast_except_the_plain_one():
    for kind, name in enumerate(TEXTURE_KINDS):
        spread = texture_tile(kind, kind % TILE_VARIANTS).std()
        assert spread == 0 if name == "plain" else spread > 10, name


def test_a_picture_too_small_to_draw_on_is_refused():
    with pytest.raises(ValueError, match="32"):
        render_picture(np.random.default_rng(0), 16)


def _parts(rng: np.random.Generator, count: int, flawed: bool) -> Tensor:
    """One formula-made part, seen again and again under changing light and noise; the flaw is a patch moved elsewhere."""
    part = render_picture(np.random.default_rng(7), 128).astype(np.float32) / 255
    images = []
    for _ in range(count):
        image = part.copy()
        if flawed:
            (y, x), (v, u) = rng.integers(8, 96, (2, 2))
            image[y : y + 16, x : x + 16] = part[v : v + 16, u : u + 16]
        image = np.roll(image, rng.integers(-3, 4, 2), (0, 1)) * rng.uniform(0.85, 1.15) + rng.normal(0, 0.03, image.shape)
        images.append(torch.from_numpy(image.clip(0, 1).astype(np.float32)).permute(2, 0, 1))
    return (torch.stack(images) - script.IMAGENET_MEAN) / script.IMAGENET_STD


def _auroc(features: Callable[[Tensor], Tensor]) -> float:
    rng = np.random.default_rng(11)
    with torch.inference_mode():
        bank = features(_parts(rng, 24, False)).flatten(0, 1)
        scores = script.nearest_neighbour_scores(bank, features(torch.cat([_parts(rng, 24, False), _parts(rng, 24, True)])))
    return roc_auc_score([0] * 24 + [1] * 24, scores.numpy())


def test_training_beats_chance_initialisation_on_a_small_inspection_task():
    torch.manual_seed(0)
    untrained = _auroc(lambda images: script.patch_features(EmbeddedBackbone().eval(), images))
    shipped = load_embedded_backbone()
    trained = _auroc(lambda images: script.patch_features(shipped, images))
    assert trained > untrained
    assert trained > 0.8


def _batch(count: int) -> Tensor:
    pictures = np.stack([script._render((0, i)) for i in range(count)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float()


def test_damage_is_where_the_picture_changed():
    generator = torch.Generator().manual_seed(0)
    view = script.take_view(_batch(8), script.random_frames(generator, torch.zeros(8, 2)))
    damaged, visible = script.damage(view, generator)
    change = (damaged - view.image).abs().mean(1, keepdim=True)
    assert 0 < visible.mean() < script.DAMAGE_AREA[1]
    assert torch.equal(visible, (change > script.VISIBLE_CHANGE).float())


def test_an_identical_view_is_matched_patch_by_patch():
    """The correspondence of two views through one frame is the identity, so that untouched patches lie at distance 0."""
    generator = torch.Generator().manual_seed(0)
    lessons = script.Lessons(CHANNELS)
    frame = script.random_frames(generator, torch.zeros(4, 2))
    features, labels = torch.randn(4, CHANNELS[1], 8, 8), torch.zeros(4, 3, 8, 8, dtype=torch.long)
    distance, _ = lessons.correspondence(0, features, features, (frame, frame), labels, torch.zeros(4, 8, 8), generator)
    at_zero = torch.nn.functional.softplus(-lessons.distance_scale[0] * lessons.distance_threshold[0])
    assert torch.isclose(distance, at_zero, atol=1e-4)


def test_the_script_trains_resumes_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "CHECKPOINT_EVERY", 1)
    pictures = script.prepare_pictures(tmp_path, count=6, seed=0, workers=1)
    assert pictures.shape == (6, script.PICTURE_SIZE, script.PICTURE_SIZE, 6)

    whole, losses = script.train(pictures, 2, 0, tmp_path / "whole.pth")
    assert all(np.isfinite(value) for value in losses.values())

    step = script.losses_of_step
    with monkeypatch.context() as patch:
        calls = iter((step,))  # the second step never comes
        patch.setattr(script, "losses_of_step", lambda *arguments: next(calls)(*arguments))
        with pytest.raises(StopIteration):
            script.train(pictures, 2, 0, tmp_path / "broken.pth")
    resumed, _ = script.train(pictures, 2, 0, tmp_path / "broken.pth")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))

    out = tmp_path / "made" / "backbone.pth"
    script.main(["--out", str(out), "--pictures", "6", "--steps", "2", "--threads", "1", "--cache", str(tmp_path)])
    assert "wrote" in capsys.readouterr().out
    made = load_embedded_backbone(out, out.with_suffix(".json"))
    assert made.channels == CHANNELS
    assert not list(out.parent.glob("*.tmp"))


def test_evaluating_an_empty_folder_is_an_error_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="LOCO"):
        script.evaluate(EmbeddedBackbone().eval(), tmp_path)
