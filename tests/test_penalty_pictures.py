"""Where LGST's penalty pictures come from, and what happens to a broken archive of them."""

import hashlib
import io
import json
import sys
import zipfile
from dataclasses import replace

from csad import settings
from csad.data import layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.standins import penalty_pictures
from csad.standins.penalty_pictures import PenaltyPictures

import numpy as np
import pytest
from conftest import job_for, tiny_backbone
from PIL import Image
from test_checkpoints import Server
from test_checkpoints import server as server  # a fixture

import CSAD


def jpeg(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small one where the published one is expected: three red training images, and blue ones of the other splits."""
    path = tmp_path / "work/ckpt/tiny-imagenet-200.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as content:
        for index in range(3):
            content.writestr(
                f"tiny-imagenet-200/train/n0144{index}/images/n0144{index}_0.JPEG", jpeg((200, 30 * index, 0))
            )
        content.writestr("tiny-imagenet-200/train/n01440/n01440_boxes.txt", "n01440_0.JPEG 0 62 10 63\n")
        content.writestr("tiny-imagenet-200/val/images/val_0.JPEG", jpeg((0, 0, 255)))
        content.writestr("tiny-imagenet-200/test/images/test_0.JPEG", jpeg((0, 0, 255)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(penalty_pictures, "ARCHIVE", replace(penalty_pictures.ARCHIVE, sha256=digest))
    penalty_pictures._opened.cache_clear()
    return path


def test_training_images_are_drawn_from_the_archive_itself(archive):
    pictures = PenaltyPictures("tiny-imagenet", archive.parent)
    assert pictures.stand_ins == []
    drawn = [pictures.draw(np.random.default_rng(seed)) for seed in range(40)]
    assert all(one.shape == (1, 3, 256, 256) and one.dtype == np.float32 for one in drawn)
    colours = {
        tuple(one[0, :, 128, 128].astype(int)) for one in drawn if one[0, 0, 0, 0] > one[0, 2, 0, 0] + 50
    }
    assert len(colours) == 3 and all(blue < 10 for _, _, blue in colours)  # no image of another split
    assert 4 < sum((one[0, 0] == one[0, 2]).all() for one in drawn) < 20  # grey with p 0.3
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]  # nothing is unpacked


def test_only_the_centre_is_seen_enlarged(archive, monkeypatch):
    """64 -> 512 -> centre 256: the central 32x32, eight times as large."""
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 255, (64, 64, 3), np.uint8)
    with zipfile.ZipFile(archive, "w") as content:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        content.writestr("tiny-imagenet-200/train/a/images/a_0.JPEG", buffer.getvalue())
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(penalty_pictures, "ARCHIVE", replace(penalty_pictures.ARCHIVE, sha256=digest))
    penalty_pictures._opened.cache_clear()
    found = (
        PenaltyPictures("tiny-imagenet", archive.parent).draw(np.random.default_rng(0))[0].transpose(1, 2, 0)
    )
    enlarged = np.array(Image.fromarray(picture).resize((512, 512), Image.Resampling.BILINEAR))[
        128:384, 128:384
    ]
    np.testing.assert_array_equal(found, enlarged)


def test_auto_takes_the_archive_where_it_is_there_and_says_what_stands_in(archive, tmp_path, capsys):
    assert settings.load("none").lgst.penalty_images == "auto"
    assert PenaltyPictures("auto", archive.parent).stand_ins == [] and not capsys.readouterr().out
    assert PenaltyPictures("auto", tmp_path).stand_ins == ["bundled penalty pictures"]
    assert "put tiny-imagenet-200.zip into" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"tiny-imagenet-200\.zip is missing; fetch it with --download \(248 MB\)"
    ):
        PenaltyPictures("tiny-imagenet", tmp_path)


@pytest.mark.parametrize("source", ["auto", "tiny-imagenet"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: data[:200] + b"\x00" + data[201:], lambda data: b""]
)
def test_a_broken_archive_is_one_sentence_before_any_training(archive, make_dataset, damage, source):
    archive.write_bytes(damage(archive.read_bytes()))
    before = archive.read_bytes()
    category = layouts.Category(make_dataset(train=2, validation=2, test=1) / "discs")
    chosen = settings.load(
        "discs", "quick", {"images.size": 256, "lgst.student": "pixels", "lgst.penalty_images": source}
    )
    workspace = Workspace(archive.parent.parent)
    with pytest.raises(
        UserError, match="is not the published archive .* --download, or take --lgst.penalty_images bundled"
    ):
        CSAD.train_category(job_for(category, workspace, tiny_backbone(), chosen))
    assert archive.read_bytes() == before
    assert [path for path in workspace.root.rglob("*") if path.is_file()] == [archive]


def test_download_fetches_the_archive_continues_it_and_trains_with_it(
    archive, server: Server, make_dataset, monkeypatch
):
    """A download that broke off half-way, then the same command again."""
    content = archive.read_bytes()
    archive.unlink()
    archive.with_name(archive.name + ".part").write_bytes(content[:1000])
    monkeypatch.setattr("test_checkpoints.CONTENT", content)
    known = server.checkpoint(archive.name, penalty_pictures.ARCHIVE.sha256)
    monkeypatch.setattr(penalty_pictures, "ARCHIVE", known)
    monkeypatch.setattr("csad.training.stage.agreed_backbone", lambda *_: tiny_backbone())
    command = [
        "CSAD.py",
        "--workspace",
        archive.parent.parent,
        "--dataset_root",
        make_dataset(train=4, validation=2, test=1),
        "--device",
        "cpu",
        "--download",
        "--lgst.width",
        "8",
        "--lgst.teacher_channels",
        "8",
        "--lgst.steps",
        "2",
        "--lgst.batch_size",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--lgst.penalty_images", "bundled", "--dry_run"])
    CSAD.main()
    assert server.asked_for == []
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    CSAD.main()
    assert server.asked_for == ["bytes=1000-"] and archive.read_bytes() == content
    noted = json.loads((archive.parent / "best_discs.json").read_text())["used"]
    assert noted["stand_ins"] == ["backbone tiny"]


def test_the_published_archive_is_named_with_its_checksum():
    assert penalty_pictures.ARCHIVE.url.startswith("https://") and len(penalty_pictures.ARCHIVE.sha256) == 64
