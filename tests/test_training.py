"""What makes a loop a training: resuming, Ctrl-C, stopping where a loss is no number, kept features, what is read of stage 1."""

import os
import platform
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from csad import progress
from csad.cli import training_options
from csad.data import files, images, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.training import feature_cache, lgst_step, loop, stage
from csad.training.feature_cache import FeatureCache
from csad.training.loop import TrainingLoop
from csad.training.pseudo_label_files import read_stage_1, training_data

import numpy as np
import pytest
import torch
from conftest import TinyEncoder, tiny_backbone
from torch import nn

from models.device import choose_precision, describe_device
from models.lgst_on_features import FeatureLGST

CPU = torch.device("cpu")


# The loop


class Stopped(Exception):
    """Stands for a killed process."""


def train(
    path, steps=8, used=None, stop_at=None, how=None, seen=None, loss_of=lambda step, loss: loss, workers=0
):
    """A network that learns to give 1, one random number a step; returns its weights."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    training = TrainingLoop(
        steps,
        path,
        used or {"seed": 0},
        "cup: train",
        "--cup.lr",
        workers=workers,
        network=network,
        optimizer=optimizer,
    )

    def draw(step):
        return torch.from_numpy(np.random.default_rng([0, step]).normal(size=(1, 1)).astype(np.float32))

    for step, sample in training.samples(draw):
        assert torch.equal(sample, draw(step))
        if seen is not None:
            seen.append(step)
        loss = loss_of(step, (network(sample) - 1).square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        training.report({"loss": loss})
        if step == stop_at:
            how()
    return network.state_dict()


def kill():
    raise Stopped


@pytest.mark.parametrize("stop_at", [0, 3, 6])
@pytest.mark.parametrize(
    "how, done, error",
    [
        (kill, 0, Stopped),
        (lambda: signal.raise_signal(signal.SIGINT), 1, KeyboardInterrupt),
        (lambda: signal.raise_signal(signal.SIGTERM), 1, KeyboardInterrupt),
    ],
)
def test_resumed_is_as_if_never_interrupted(tmp_path, monkeypatch, stop_at, how, done, error):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0 if how is kill else 60)
    whole, path, seen = train(tmp_path / "whole"), tmp_path / "progress.pth", []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        train(path, stop_at=stop_at, how=how)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    resumed = train(path, seen=seen)
    assert seen == list(range(stop_at + done, 8))  # a signal waits for the end of its step
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_second_signal_ends_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "progress.pth", stop_at=2, how=twice)


def test_an_ignored_signal_stays_ignored_and_threads_are_left_alone(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(tmp_path / "progress.pth", stop_at=2, how=lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "other.pth")))
    thread.start()
    thread.join()
    assert len(found) == 1


@pytest.mark.parametrize(
    "used, said", [({"seed": 1}, "seed: 0 -> 1"), ({"seed": 0, "more": {"lr": 2}}, "more: None -> ")]
)
def test_progress_of_other_settings_is_refused_and_kept(tmp_path, monkeypatch, used, said):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)
    path = tmp_path / "progress.pth"
    with pytest.raises(Stopped):
        train(path, stop_at=3, how=kill)
    before = path.read_bytes()
    with pytest.raises(
        UserError,
        match=f"progress.pth is a training with different settings or images [(]{said}.*--overwrite",
    ):
        train(path, used=used)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_damaged_progress_gets_a_sentence(tmp_path, content):
    path = tmp_path / "progress.pth"
    files.write_state(path, torch.zeros(1)) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="progress.pth"):
        train(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [0, 9, 31])
def test_a_loss_that_is_no_number_ends_soon_and_leaves_nothing_to_go_on_from(
    tmp_path, monkeypatch, value, first
):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0)
    path, seen = tmp_path / "progress.pth", []
    with pytest.raises(UserError, match="cup: train: diverged at step .*lower --cup.lr") as problem:
        train(path, steps=200, seen=seen, loss_of=lambda step, loss: loss * value if step >= first else loss)
    assert len(seen) <= first + 20 and "\n" not in str(problem.value)
    assert not path.exists()


@pytest.mark.parametrize("workers", [1, 3])
def test_weights_are_the_same_however_many_processes_draw(tmp_path, workers):
    path = tmp_path / "progress.pth"
    expected = train(path)
    with pytest.raises(KeyboardInterrupt):
        train(path, stop_at=4, how=lambda: os.kill(os.getpid(), signal.SIGINT), workers=workers)
    seen = []
    resumed = train(path, seen=seen, workers=workers)
    assert seen == [5, 6, 7]
    for name, values in train(tmp_path / "whole.pth", workers=workers).items():
        assert torch.equal(values, expected[name]) and torch.equal(resumed[name], expected[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_while_drawing_comes_through(tmp_path, workers):
    def draw(step):
        if step == 3:
            raise UserError("003.png is gone")
        return step

    training, seen = TrainingLoop(9, tmp_path / "p.pth", {}, "cup", "--lr", workers=workers), []
    with pytest.raises(UserError, match="003.png"):
        for step, sample in training.samples(draw):
            assert sample == step
            seen.append(step)
    assert seen == [0, 1, 2]


# Progress


def test_in_a_log_file_progress_is_a_plain_line_now_and_then(monkeypatch, capsys):
    assert list(progress.ProgressBar(range(1000), desc="quick")) == list(range(1000))
    assert capsys.readouterr().err == ""  # done before there was something to say
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with progress.ProgressBar(total=4, desc="cup: train", unit="step") as bar:
        for _ in range(4):
            bar.update()
            bar.refresh()
    said = capsys.readouterr().err
    assert "\r" not in said and re.search(r"^cup: train: +50% 2/4 \[.*step.*\]$", said, re.MULTILINE)


# Kept features


@pytest.mark.parametrize("room", [0, 2**30])
def test_features_are_the_same_kept_or_not(monkeypatch, room):
    monkeypatch.setattr(feature_cache, "CACHE_BYTES", room)
    pictures = torch.randint(
        0, 256, (21, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    encoder, indices, calls = TinyEncoder(), torch.tensor([20, 3, 5, *range(6, 18)]), []

    def compute(batch):
        calls.append(len(batch))
        return encoder(batch)

    cache = FeatureCache(compute, pictures, indices, "encode")
    calls.clear()
    wanted = torch.tensor([3, 20, 3, 17])
    for found, expected in zip(cache[wanted], encoder(pictures[wanted])):
        torch.testing.assert_close(found, expected)
    assert calls == ([] if room else [4])
    for found, expected in zip(zip(*cache), encoder(pictures[indices])):
        torch.testing.assert_close(torch.cat(found), expected)
    assert not any(one.requires_grad for one in cache[wanted])


@pytest.mark.parametrize("room", [0, 2**30])
def test_encoded_images_are_the_same_kept_or_not(monkeypatch, make_dataset, room):
    monkeypatch.setattr(lgst_step, "CACHE_BYTES", room)
    paths, encoder = layouts.Category(make_dataset(train=4) / "discs").train, TinyEncoder()
    view = images.View(512)
    encoded = lgst_step.EncodedImages(paths, view, encoder, CPU, "encode")
    assert (encoded.kept is not None) == bool(room)
    torch.manual_seed(0)
    model = FeatureLGST(encoder.channels, 8, 8)
    encoded.fit(model)
    expected = tuple(one.half().float() for one in encoder(torch.from_numpy(view.read(paths))))
    torch.testing.assert_close(model.fourth_mean.flatten(), expected[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        model.sixteenth_std.flatten(), expected[2].std((0, 2, 3), correction=0), rtol=1e-3, atol=1e-4
    )
    fourth, teacher, sixteenth = encoded.batch(torch.tensor([2, 0]), model)
    torch.testing.assert_close(fourth, expected[0][[2, 0]])
    torch.testing.assert_close(sixteenth, expected[2][[2, 0]])
    torch.testing.assert_close(
        teacher, model.teacher(tuple(one[[2, 0]] for one in expected)), rtol=1e-3, atol=1e-3
    )


# What stage 2 reads of stage 1


@pytest.mark.parametrize("with_background", [True, False])
def test_published_files_are_used_as_they_are(make_dataset, tmp_path, capsys, with_background):
    category = layouts.Category(make_dataset(train=4) / "discs")
    workspace = Workspace(tmp_path / "work")
    labels = np.zeros((128, 128), np.uint8)
    labels[30:60, 30:60], labels[90:, :] = 1, 2
    for path in category.train:
        folder = workspace.pseudo_labels("discs").image(path.stem)
        files.write_image(folder / "filtered_cluster_map.png", labels)
        if with_background:
            files.write_image(folder / "background.jpg", np.where(labels == 2, 255, 0).astype(np.uint8))
    files.write_array(workspace.pseudo_labels("discs").histogram, np.full((4, 2), 0.1, np.float32))
    files.write_array(workspace.pseudo_labels("discs").trusted, np.array([2, 0]))
    trusted, classes = read_stage_1(category, workspace)
    assert trusted.tolist() == [0, 2] and classes == 3
    data = training_data(
        category, workspace, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), trusted, classes, False
    )
    assert set(np.unique(data.labels[0])) == {0, 1, 2}
    assert ("2 of 2 trusted images have no background.jpg" in capsys.readouterr().out) != with_background
    expected = data.labels[0] == (2 if with_background else 0)
    assert (data.backgrounds[0] == expected).mean() > 0.95


@pytest.mark.parametrize(
    "sizes, sentence",
    [
        (
            {"000": (128, 128), "002": (256, 256)},
            "mixed sizes: .*000.* has the size of its image, but .*002.* is 256x256",
        ),
        (
            {"000": (128, 130)},
            "000/filtered_cluster_map.png is 130x128, expected 128x128 or 256x256, the size of its image",
        ),
        (
            {"002/background.jpg": (256, 256)},
            "002/background.jpg is 256x256, expected 128x128, the size of its image",
        ),
    ],
)
def test_maps_of_another_size_than_the_image_get_a_sentence(make_dataset, tmp_path, sizes, sentence):
    category = layouts.Category(make_dataset(train=4) / "discs")
    workspace = Workspace(tmp_path / "work")
    for path in category.train:
        folder = workspace.pseudo_labels("discs").image(path.stem)
        for file in ("filtered_cluster_map.png", "background.jpg"):
            size = sizes.get(f"{path.stem}/{file}", sizes.get(path.stem, (128, 128)))
            files.write_image(folder / file, np.ones(size, np.uint8))
    with pytest.raises(UserError, match=sentence):
        training_data(
            category, workspace, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), np.array([0, 2]), 3, False
        )


# Memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other allocators")
def test_on_the_cpu_freed_memory_is_not_handed_out_anew():
    """Otherwise each layer of each batch pays again for having its pages zeroed."""
    code = """
import resource, torch
from models.device import choose_device
choose_device("cpu")
for turn in range(20):
    if turn == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000)  # 64 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(loop.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) < 15_000  # pages; handed out anew they are 150,000


@pytest.mark.parametrize(
    "options, precision",
    [
        ((), "fp32"),
        (("--preset", "quick"), "bf16"),
        (("--precision", "auto"), "bf16"),
        (("--preset", "quick", "--precision", "fp32"), "fp32"),
    ],
)
def test_the_paper_preset_trains_in_plain_fp32_unless_asked_otherwise(
    make_dataset, tmp_path, monkeypatch, options, precision
):
    monkeypatch.setattr(stage, "agreed_backbone", lambda *_: tiny_backbone())
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    args = training_options("story").parse_args(
        [
            "--workspace",
            str(tmp_path),
            "--dataset_root",
            str(make_dataset(train=2)),
            "--device",
            "cpu",
            *options,
        ]
    )
    jobs = []
    for task in stage.training_jobs(jobs.append, args).values():
        task.do()
    assert [job.precision for job in jobs] == [precision]
    assert torch.backends.cudnn.allow_tf32 == (precision != "fp32")


def test_what_ran_on_a_gpu_is_what_is_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    cuda = torch.device("cuda")
    assert describe_device(cuda, "bf16") == {"device": "GPU", "precision": "bf16, TF32 allowed"}
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    assert describe_device(cuda, "fp32") == {"device": "GPU", "precision": "fp32"}
    assert choose_precision("tf32", cuda) == "tf32"
    assert describe_device(cuda, "tf32") == {"device": "GPU", "precision": "fp32, TF32 allowed"}
    assert choose_precision("tf32", torch.device("cpu")) == "fp32"
