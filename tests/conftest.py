"""Small data sets and the published reference data, shared by all tests."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

from csad.data.layouts import Category
from csad.errors import run_script
from csad.training.stage import Job, view_of

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.backbone import Backbone, fingerprint

REFERENCE = Path(__file__).parent / "reference"


# One thread count for this process and those that tests start: it decides how sums round.
THREADS = 2
os.environ["OMP_NUM_THREADS"] = str(THREADS)

# A shell starts background commands with Ctrl-C ignored, which programs rightly keep to; tests that press it need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--all-faults", action="store_true", help="tests/faults: every bad input, not one of each group alone"
    )


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_threads():
    torch.set_num_threads(THREADS)


@pytest.fixture
def reference():
    """Load tests/reference/{name}.npz as a dictionary."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(REFERENCE / f"{name}.npz", allow_pickle=False) as archive:
            return dict(archive)

    return load


class TinyEncoder(nn.Module):
    """Colours averaged over 4, 8 and 16 pixels, and projected: enough to tell coloured discs apart."""

    channels = (8, 8, 8)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("projection", torch.randn(8, 3, 1, 1, generator=generator))

    def forward(self, images):
        images = (images.float() - 115) / 58
        return tuple(
            F.conv2d(F.avg_pool2d(images, fraction), self.projection).relu() for fraction in (4, 8, 16)
        )


def tiny_backbone() -> Backbone:
    encoder = TinyEncoder().eval()
    return Backbone("tiny", encoder, fingerprint(encoder))


def job_for(category, workspace, backbone, chosen, seed=0, overwrite=False, precision="fp32") -> Job:
    """What a training stage is given for one category, on the CPU; like every process it looks at the disk anew."""
    category = Category(category.root, category.logical_defects)
    return Job(
        category,
        workspace,
        chosen,
        view_of(category, chosen),
        backbone,
        torch.device("cpu"),
        precision,
        seed,
        overwrite,
    )


def draw_parts(rng: np.random.Generator, parts: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey table with ``parts`` discs of different colours at jittered places: (RGB image, label map)."""
    image = np.full((size, size, 3), 120, np.uint8)
    labels = np.zeros((size, size), np.uint8)
    colours = [(200, 40, 40), (40, 60, 200), (230, 200, 40), (40, 160, 60)]
    for index in range(parts):
        jitter = rng.uniform(-3, 3, 2) * size / 128
        centre = ((np.array([index % 2, index // 2]) * 0.5 + 0.25) * size + jitter).astype(int)
        radius = int(size * (0.1 + 0.02 * index))
        cv2.circle(image, centre.tolist(), radius, colours[index], -1, cv2.LINE_AA)
        cv2.circle(labels, centre.tolist(), radius, index + 1, -1)
    noise = rng.normal(0, 4, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), labels


def make_discs(
    root: Path,
    category: str = "discs",
    train: int = 12,
    validation: int = 6,
    test: int = 4,
    size: int = 128,
    suffix: str = ".png",
) -> Path:
    """Write a tiny data set in LOCO's layout: four discs; logical anomalies lack one, structural ones are scratched."""
    rng = np.random.default_rng(7)
    for folder, count in (
        ("train/good", train),
        ("validation/good", validation),
        ("test/good", test),
        ("test/logical_anomalies", test),
        ("test/structural_anomalies", test),
    ):
        (root / category / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, _ = draw_parts(rng, 3 if "logical" in folder else 4, size)
            if "structural" in folder:
                cv2.line(image, (10, 20), (size - 30, size - 10), (255, 255, 255), 3)
            cv2.imwrite(str(root / category / folder / f"{index:03d}{suffix}"), image[:, :, ::-1])
    return root


def make_three_categories(root: Path) -> Path:
    """Write bolts, damaged and discs; a training picture of damaged cannot be read."""
    for name in ("bolts", "damaged", "discs"):
        make_discs(root, name, train=6, validation=2, test=2)
    (root / "damaged/train/good/003.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def make_dataset(tmp_path):
    """Write a tiny data set into this test's own folder."""
    return lambda **options: make_discs(tmp_path / "data", **options)


def exit_status(monkeypatch, main, *argv) -> int:
    """Run a script's main as from the command line, its name first."""
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    return ended.value.code


def status_of(main) -> int:
    """The exit status with which a script ends, 0 where it just returns."""
    try:
        run_script(main)
    except SystemExit as ended:
        return ended.code
    return 0


def initialise_by_he(*networks: torch.nn.Module) -> None:
    """He's weights: PyTorch's own leave outputs and gradients of so small networks at mere rounding."""
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            torch.nn.init.zeros_(module.bias)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, the one on this machine or playwright's own, with a camera that shows a test picture."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="pages in a browser need playwright (extra [dev])"
    )
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((path for name in names if (path := shutil.which(name))), None)
    arguments = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with api.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=path, args=arguments)
        except api.Error as problem:
            pytest.skip(f"no Chromium to be had here: {str(problem).splitlines()[0]}")
        yield opened
        opened.close()
