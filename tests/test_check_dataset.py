"""check_dataset.py: names what is wrong, says nothing against what is right, and its status tells which."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from csad import settings
from csad.data import checks, pictures
from csad.data.findings import Findings
from csad.data.layouts import Category

import numpy as np
import pytest
import tifffile
from conftest import status_of
from PIL import Image

import check_dataset

CASES = Path(__file__).parent / "cases"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the script in this process: (exit status, what it printed, what it said on stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, arguments)])
        status = status_of(check_dataset.main)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def broken(make_dataset, monkeypatch):
    """A sound data set to break: the category's folder, with masks for all anomalies; few images, which are not minded."""
    monkeypatch.setattr(checks, "MIN_TRAINING_IMAGES", 5)
    monkeypatch.setattr(checks, "MIN_VALIDATION_IMAGES", 2)
    root = make_dataset(size=256) / "discs"
    (root / "defects_config.json").write_text(
        json.dumps(
            [{"pixel_value": 9, "defect_name": "odd", "saturation_threshold": 1, "relative_saturation": True}]
        )
    )
    mask = np.zeros((256, 256), np.uint8)
    mask[20:60, 20:60] = 9
    for kind in ("logical_anomalies", "structural_anomalies"):
        for index in range(4):
            folder = root / "ground_truth" / kind / f"{index:03d}"
            folder.mkdir(parents=True)
            Image.fromarray(mask).save(folder / "000.png")
    return root


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_a_sound_data_set(broken, run):
    status, said, complaint = run("--dataset_root", broken.parent, "--false_positive_rate", 0.2)
    assert (status, "warning" in said.replace("warnings: 0", ""), "error:" in complaint) == (
        0,
        False,
        False,
    ), said
    assert "discs (MVTec LOCO AD): 12 training images; 6 validation images" in said
    assert "train/good" in said and "256x256" in said and "8-bit colour" in said
    assert (
        "6 validation images can promise 14.3 % false positives on average, 39.3 % with 95 % confidence"
        in said
    )


def test_mvtec_ad_of_the_issue(run):
    status, said, _ = run("--dataset_root", CASES / "mini_mvtec_ad")
    assert status == 4 and "cup (MVTec AD)" in said and "set aside from 5" in said
    assert "only 4 training images (and 1 set aside for validation): expect that many new good images" in said
    assert "expect that at least 1 in 2 new good images is called anomalous" in said and "warnings: 2" in said
    assert (
        "count as logical anomalies: none; as structural: crack, missing_pin; a line like 'logical: [crack]' in "
        "configs/categories/cup.yaml changes it"
    ) in said
    status, said, complaint = run("--dataset_root", CASES / "mini_train3")
    assert status == 2 and "at least 5 are needed" in said
    assert complaint.splitlines()[-1].startswith("error: the stages cannot run")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def deep(path: Path) -> None:
    Image.fromarray(np.full((256, 256), 3000, np.uint16)).save(path)


def transparent(path: Path) -> None:
    image = picture(path).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 30, 30))
    image.save(path)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(path).save(path, exif=exif)


def recompressed(root: Path) -> None:
    picture(root / "train/good/004.png").save(
        root / "validation/good/copy.png"
    )  # other compression, same pixels
    image = picture(root / "train/good/005.png")
    image.resize((200, 200), Image.Resampling.LANCZOS).resize((256, 256)).save(root / "test/good/small.png")


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def paint(path: Path, value: int, size=(256, 256)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def lossy_mask(root: Path) -> None:
    folder = root / "ground_truth/structural_anomalies/003"
    picture(folder / "000.png").point(lambda value: 255 * (value > 0)).save(folder / "000.jpg")
    (folder / "000.png").unlink()


FAULTS = {  # what breaks the data set, the status, words that have to be said
    "truncated": (lambda r: truncate(r / "train/good/007.png"), 2, ["train/good/007.png cannot be read"]),
    "empty file": (
        lambda r: (r / "test/good/001.png").write_bytes(b""),
        2,
        ["test/good/001.png cannot be read"],
    ),
    "text": (
        lambda r: (r / "validation/good/001.png").write_text("hello"),
        2,
        ["validation/good/001.png", "format is not supported"],
    ),
    "12 bits": (lambda r: deep(r / "train/good/008.png"), 2, ["train/good/008.png", "--images.white_level"]),
    "float": (
        lambda r: tifffile.imwrite(r / "train/good/f.tif", np.full((256, 256), 0.5, np.float32)),
        2,
        ["f.tif", "white_level"],
    ),
    "pages": (
        lambda r: tifffile.imwrite(
            r / "train/good/p.tif", np.zeros((2, 256, 256), np.uint8), photometric="minisblack"
        ),
        2,
        ["p.tif has 2 pages"],
    ),
    "dangling": (
        lambda r: link(r / "train/good/gone.png", r / "gone"),
        4,
        ["train/good/gone.png", "link to a missing file"],
    ),
    "pipe": (
        lambda r: os.mkfifo(r / "train/good/pipe.png"),
        4,
        ["train/good/pipe.png", "not a regular file"],
    ),
    "cycle": (lambda r: link(r / "train/good/up", r / "train"), 4, ["train/good/up", "once more"]),
    "hidden": (
        lambda r: shutil.copy(r / "train/good/003.png", r / "train/good/._003.png"),
        4,
        ["._003.png: hidden"],
    ),
    "heic": (
        lambda r: (r / "train/good/a.heic").write_bytes(b"x"),
        4,
        ["train/good/a.heic", "not a supported image format"],
    ),
    "unknown folder": (
        lambda r: shutil.copytree(r / "test/good", r / "test/blurred"),
        4,
        ["test/blurred", "4 images"],
    ),
    "mixed layouts": (
        lambda r: (
            shutil.copytree(r / "test/good", r / "test/dent"),
            paint(r / "ground_truth/dent/000_mask.png", 9),
        ),
        2,
        ["mixes two layouts"],
    ),
    "empty folder": (
        lambda r: [path.unlink() for path in (r / "validation/good").iterdir()],
        2,
        ["no images in", "validation/good"],
    ),
    "turned": (lambda r: turned(r / "train/good/009.png"), 0, ["EXIF orientation", "train/good/009.png"]),
    "alpha": (
        lambda r: transparent(r / "train/good/010.png"),
        4,
        ["transparent pixels", "train/good/010.png"],
    ),
    "leak": (
        lambda r: shutil.copy(r / "train/good/003.png", r / "test/good/new.png"),
        4,
        ["the same file in train and test: train/good/003.png = test/good/new.png"],
    ),
    "twice": (
        lambda r: shutil.copy(r / "train/good/003.png", r / "train/good/new.png"),
        4,
        ["the same file within train"],
    ),
    "near": (
        recompressed,
        4,
        [
            "nearly the same in train and validation: train/good/004.png = validation/good/copy.png",
            "train/good/005.png = test/good/small.png",
        ],
    ),
    "shape": (
        lambda r: paint(r / "train/good/wide.png", 99, (300, 200)),
        4,
        ["of another shape", "train/good/wide.png"],
    ),
    "grey": (
        lambda r: picture(r / "train/good/011.png").convert("L").save(r / "train/good/011.png"),
        4,
        ["but grey", "011.png"],
    ),
    "flat": (
        lambda r: Image.new("RGB", (256, 256)).save(r / "test/good/000.png"),
        4,
        ["one colour all over", "test/good/000.png"],
    ),
    "format": (
        lambda r: picture(r / "test/logical_anomalies/003.png").save(r / "test/logical_anomalies/z.jpg"),
        4,
        ["stored as PNG, but in another format", "z.jpg", "without a ground-truth mask"],
    ),
    "mask of none": (
        lambda r: paint(r / "ground_truth/logical_anomalies/777/000.png", 9),
        4,
        ["777/000.png", "no test image"],
    ),
    "no mask": (
        lambda r: shutil.rmtree(r / "ground_truth/logical_anomalies/002"),
        4,
        ["without a ground-truth mask: test/logical_anomalies/002.png"],
    ),
    "mask size": (
        lambda r: paint(r / "ground_truth/logical_anomalies/001/000.png", 9, (64, 64)),
        2,
        ["is 64x64, but its image 256x256"],
    ),
    "mask empty": (
        lambda r: paint(r / "ground_truth/structural_anomalies/000/000.png", 0),
        2,
        ["000/000.png is empty"],
    ),
    "mask value": (
        lambda r: paint(r / "ground_truth/structural_anomalies/001/000.png", 7),
        2,
        ["has value 7, which is not in"],
    ),
    "mask lossy": (
        lambda r: lossy_mask(r),
        4,
        ["masks in a lossy format", "ground_truth/structural_anomalies/003/000.jpg"],
    ),
    "mask damaged": (
        lambda r: (r / "ground_truth/structural_anomalies/002/000.png").write_bytes(b"x"),
        2,
        ["structural_anomalies/002/000.png cannot be read"],
    ),
    "config": (
        lambda r: (r / "defects_config.json").write_text("{"),
        2,
        ["defects_config.json cannot be read"],
    ),
    "config type": (
        lambda r: (r / "defects_config.json").write_text('["a"]'),
        2,
        ["should be a list of entries"],
    ),
    "config twice": (
        lambda r: (r / "defects_config.json").write_text(
            json.dumps(
                [
                    {"pixel_value": 9, "saturation_threshold": share, "relative_saturation": False}
                    for share in (1, 2)
                ]
            )
        ),
        2,
        ["pixel_value 9 occurs twice"],
    ),
    "config key twice": (
        lambda r: (r / "defects_config.json").write_text('[{"pixel_value": 9, "pixel_value": 8}]'),
        2,
        ["the key 'pixel_value' occurs twice"],
    ),
    "roi": (lambda r: paint(r / "roi.png", 255, (64, 64)), 2, ["roi.png is 64x64"]),
    "twins": (
        lambda r: shutil.copy(r / "test/logical_anomalies/003.png", r / "test/logical_anomalies/003.bmp"),
        2,
        ["two images in", "called '003'"],
    ),
    "bad training": (
        lambda r: shutil.copytree(r / "train/good", r / "train/good/defect"),
        2,
        ["holds a folder defect"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(broken, run, fault):
    plant, expected, words = FAULTS[fault]
    plant(broken)
    status, said, complaint = run("--dataset_root", broken.parent)
    assert all(word in said for word in words), said
    assert status == expected
    assert "Traceback" not in complaint


def test_many_faults_at_once_are_all_named(broken, run):
    alone = {
        "mixed layouts",
        "empty folder",
        "config",
        "config type",
        "config twice",
        "config key twice",
        "twins",
        "bad training",
    }  # others are not looked at then
    chosen = [fault for fault in FAULTS if fault not in alone]
    assert len(chosen) >= 20
    for fault in chosen:
        FAULTS[fault][0](broken)
    (broken.parent / "stray").mkdir()
    status, said, _ = run("--dataset_root", broken.parent)
    assert status == 2
    for fault in chosen:
        for word in FAULTS[fault][2]:
            assert word in said, (fault, word, said)
    assert "stray is not used" in said


def test_help_and_page_explain_the_status(run):
    page = (Path(__file__).parent.parent / "docs/own_data.md").read_text(encoding="utf-8")
    assert f"{check_dataset.WARNED} warnings alone" in run("--help")[1]
    assert f"{check_dataset.WARNED} with warnings alone" in page


def test_too_few_for_the_asked_rate(broken, run):
    status, said, _ = run("--dataset_root", broken.parent, "--false_positive_rate", "0.05")
    assert status == 4
    assert (
        "a false-positive rate of 0.05 needs 19 validation images on average and 59 for 95 % confidence; there are 6"
        in said
    )
    status, said, _ = run("--dataset_root", broken.parent, "--false_positive_rate", "0.01")
    assert "needs 99 validation images on average and 299 for 95 % confidence" in said
    assert run("--dataset_root", broken.parent, "--false_positive_rate", "nan")[0] == 2


def test_contact_sheets(broken, run, tmp_path):
    truncate(broken / "train/good/003.png")
    assert run("--dataset_root", broken.parent, "--output", tmp_path / "sheets")[0] == 2
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == [
        f"discs_{folder}.png"
        for folder in (
            "test_good",
            "test_logical_anomalies",
            "test_structural_anomalies",
            "train_good",
            "validation_good",
        )
    ]
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "discs_train_good.png"))
    side = pictures.THUMBNAIL
    assert (sheet[2:side, 2 + 3 * (side + 4) :][:, :side] == (200, 0, 0)).all()  # the fourth cannot be read
    expected = picture(broken / "train/good/000.png").resize((side, side), Image.Resampling.BOX)
    np.testing.assert_array_equal(sheet[2 : 2 + side, 2 : 2 + side], expected)
    status, _, complaint = run("--dataset_root", broken.parent, "--output", broken / "sheets")
    assert status == 2 and "lies in the data set" in complaint


def test_other_good_pictures_of_the_same_kind_are_no_copies(broken):
    _, seen = checks.check(Category(broken), settings.load("discs"))
    assert pictures.near_copies([one for found in seen.values() for one in found]) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(broken, run):
    (broken / "train/good/003.png").chmod(0)
    status, said, _ = run("--dataset_root", broken.parent)
    assert status == 2 and "003.png" in said


def test_a_categorys_file_and_single_settings_count(run, tmp_path, monkeypatch):
    (tmp_path / "categories").mkdir()
    (tmp_path / "categories" / "cup.yaml").write_text(
        "logical: [missing_pin]\nroi: [[[0, 0], [0.5, 0], [0.5, 1]]]\n"
    )
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    cases = "--dataset_root", CASES / "mini_mvtec_ad", "--categories", "cup"
    status, said, _ = run(*cases)
    assert status == 4 and "1 crack, 1 missing_pin" not in said and "1 missing_pin (logical), 1 crack" in said
    assert (
        "logical anomalies: missing_pin; as structural: crack; a line like 'logical: [missing_pin]'" in said
    )
    (tmp_path / "categories" / "cup.yaml").write_text("roi: [[[0, 0], [1, 1]]]\n")
    assert "at least 3 items" in run(*cases)[2]
    (tmp_path / "categories" / "cup.yaml").write_text("logical: [dent]\n")
    status, _, complaint = run(*cases)
    assert status == 2 and "no defect 'dent'" in complaint


@pytest.mark.parametrize(
    ("training", "validation", "words"),
    [
        (29, 10, ["only 29 training images: expect"]),
        (30, 9, ["only 9 validation images, which set the threshold"]),
        (30, 10, []),
    ],
)
def test_few_images_are_warned_of(tmp_path, training, validation, words):
    root = tmp_path / "cup"
    for folder, number in (("train", training), ("validation", validation)):
        for index in range(number):
            paint(root / folder / f"{index}.png", index, (8, 8))
    findings = Findings()
    checks.check_number_of_images(Category(root), findings)
    assert len(findings.warnings) == len(words)
    assert all(word in said for word, said in zip(words, findings.warnings))
    assert checks.quick_check(Category(root)) == findings.warnings


def test_what_an_operating_system_leaves_is_only_noted(broken, run):
    for name in (
        "Thumbs.db",
        "train/Thumbs.db",
        "train/good/Thumbs.db",
        "train/good/desktop.ini",
        "test/desktop.ini",
        "ground_truth/logical_anomalies/Thumbs.db",
        "../Thumbs.db",
    ):
        (broken / name).write_bytes(b"x")
    paint(broken / "train/good/@eaDir/000.png/SYNOPHOTO_THUMB_M.png", 99)  # a Synology's thumbnails
    paint(broken / "test/@eaDir/000.png", 99)
    paint(broken.parent / "__MACOSX/discs/train/good/000.png", 99)
    status, said, _ = run("--dataset_root", broken.parent)
    assert status == 0 and "warning:" not in said, said
    assert "note: not used: " in said and "Thumbs.db" in said and "made by the operating system" in said
    assert "12 training images" in said


def test_names_that_cannot_be_used(tmp_path, run):
    name = "c" * 230
    for index in range(5):
        paint(tmp_path / name / f"train/{index}.png", 40 * index)
    status, said, _ = run("--dataset_root", tmp_path)
    assert status == 2 and "has a name of more than 200 bytes" in said
    status, _, complaint = run("--dataset_root", tmp_path / name / "train/0.png")
    assert status == 2 and "0.png is a single picture" in complaint


def test_a_test_folder_that_sounds_good_is_no_defect(tmp_path, run):
    for name in ("train/good/a.png", "test/good/a.png", "test/OK/a.png", "test/bent/a.png"):
        paint(tmp_path / "cup" / name, 99)
    _, said, _ = run("--dataset_root", tmp_path)
    assert "warning: test/OK sounds like good images but counts as a defect" in said


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (
            ["Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"],
            ["VisA", "train/good", "ground_truth/anomaly"],
        ),
        (
            ["OK/S0001", "NG/BX/S0002"],
            ["Real-IAD", "from OK to train/good", "each NG/DEFECT to test/DEFECT", "ground_truth/DEFECT"],
        ),
        (["good", "bad"], ["the folders good, bad", "from good to train/good", "bad to test/bad"]),
        (
            ["Normal", "NG", "Defect"],
            ["the folders Normal, Defect, NG", "Defect to test/Defect and NG to test/NG"],
        ),
        (["ok"], ["the folder ok", "from ok to train/good"]),
        (["Train/good"], ["a folder Train", "small letters"]),
    ],
)
def test_other_layouts_are_named_with_what_to_do(tmp_path, run, folders, words):
    for folder in folders:
        paint(tmp_path / "data/cup" / folder / "000.png", 99)
    for root in (tmp_path / "data", tmp_path / "data/cup"):
        status, _, complaint = run("--dataset_root", root)
        assert status == 2 and all(word in complaint for word in words), complaint
    for index in range(5):
        paint(tmp_path / "data/plate/train" / f"{index}.png", 50 * index)
    status, said, _ = run("--dataset_root", tmp_path / "data")
    assert status == 4 and all(word in said for word in words), said
