"""Layouts: which images a stage sees under which name, what it does not see, and what a person can get wrong."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from unittest import mock

from csad import settings
from csad.data import files, images, layouts, listing
from csad.data.checks import layout_line, unused
from csad.data.data_sets import Dataset
from csad.data.defects import DefectNames
from csad.data.layouts import GOOD, LOGICAL, STRUCTURAL, Category
from csad.data.roi import read_roi
from csad.data.workspace import Workspace
from csad.errors import UserError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

CASES = Path(__file__).parent / "cases"


def write(root: Path, *names: str, value: int = 100, size: tuple[int, int] = (12, 8)) -> Path:
    """Write grey pictures under ``root``; in a name, {n} stands for the numbers 000.. up to n."""
    for name in names:
        start, brace, rest = name.partition("{")
        count, _, end = rest.partition("}")
        for path in (
            [root / f"{start}{index:03d}{end}" for index in range(int(count))] if brace else [root / name]
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", size, value).save(path)
    return root


def relative(paths, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


# Data set and category


def test_missing_data_set_and_misspelt_category(make_dataset, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Dataset(tmp_path / "nowhere").select(None)
    dataset = Dataset(make_dataset())
    assert [category.name for category in dataset.select(None)] == ["discs"]
    with pytest.raises(UserError, match="'disks'.*it has discs"):
        dataset.select(["disks"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no category in"):
        Dataset(tmp_path / "empty").select(None)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("data/cup/train", "inside the category cup; name --dataset_root {}/data/cup for this"),
        ("data/cup/train/good", "or --dataset_root {}/data for all that lie beside it"),
        ("data/cup/test/good", "inside the category cup"),
        ("high", r"they lie in {}/high/sets/loco \(cup, pen\); name --dataset_root {}/high/sets/loco"),
        ("high/sets", "name --dataset_root {}/high/sets/loco"),
        ("flat", "{}/flat/cup has 3 pictures and no train; .* name --dataset_root {}/flat/cup"),
        ("empty", "no category in .*: the folder is empty"),
        ("packed", "it holds the archive loco.tar.xz; unpack it there"),
        ("packed/loco.tar.xz", "is an archive; unpack it"),
        ("data/cup/train/good/000.png", "a single picture; name .*: --dataset_root {}/data/cup/train/good"),
        ("packed/notes.txt", "notes.txt is a file; name the folder"),
        ("dta", r"does not exist; did you mean data\?"),
    ],
)
def test_a_wrong_folder_names_the_right_one(tmp_path, named, words):
    write(tmp_path / "data/cup", "train/good/{5}.png", "test/good/{1}.png", "test/crack/{1}.png")
    for name in ("cup", "pen"):
        write(tmp_path / "high/sets/loco" / name, "train/good/{5}.png")
    write(tmp_path / "flat", "cup/{3}.png")
    for folder in ("empty", "packed"):
        (tmp_path / folder).mkdir()
    for name in ("loco.tar.xz", "notes.txt"):
        (tmp_path / "packed" / name).touch()
    with pytest.raises(UserError, match=words.replace("{}", re.escape(str(tmp_path)))):
        Dataset(tmp_path / named).select(None)


def test_the_right_folder_may_lie_in_one_called_train(tmp_path):
    write(tmp_path / "train/cup", "train/good/{5}.png")
    write(tmp_path / "train/pen", "{5}.png")
    for root, name in (("train", "cup"), ("train/cup", "cup"), ("train/pen", "pen")):
        assert [category.name for category in Dataset(tmp_path / root).select(None)] == [name]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".JPG"])
def test_formats_and_sorted_order(make_dataset, suffix):
    category = Dataset(make_dataset(suffix=suffix)).select(None)[0]
    assert len(category.train) == 12
    assert [path.name for path in category.train] == sorted(path.name for path in category.train)
    assert images.read_rgb(category.train[0], 64).shape == (64, 64, 3)


def test_a_data_set_may_be_one_category_and_be_called_from_within(tmp_path, monkeypatch):
    write(tmp_path / "cup", "train/good/{6}.png")
    monkeypatch.chdir(tmp_path / "cup")
    (category,) = Dataset(Path(".")).select(["cup"])
    assert category.name == "cup" and len(category.train) == 5


# Layouts


def test_loco(make_dataset):
    root = make_dataset() / "discs"
    category = Category(root)
    assert category.layout == "MVTec LOCO AD" and category.tested and not category.validation_is_held_out
    assert [len(images) for images in (category.train, category.validation)] == [12, 6]
    assert [split for split, _ in category.test_images] == [
        split for split in layouts.SPLITS for _ in range(4)
    ]
    for path in [*category.train, *category.validation, *(path for _, path in category.test_images)]:
        assert category.key(path) == path.stem
    write(root, "ground_truth/logical_anomalies/001/000.png", "ground_truth/logical_anomalies/001/001.png")
    image = category.test(LOGICAL)[1]
    assert relative(category.region_masks(LOGICAL, image), root / "ground_truth" / LOGICAL) == [
        "001/000.png",
        "001/001.png",
    ]
    assert (
        category.region_masks(LOGICAL, category.test(LOGICAL)[0])
        == category.region_masks(GOOD, category.test(GOOD)[1])
        == []
    )
    assert unused(category) == []
    assert layout_line(category) == (
        "discs (MVTec LOCO AD): 12 training images; 6 validation images; test images: 4 good, "
        "4 logical_anomalies, 4 structural_anomalies"
    )


def test_mvtec_ad():
    root = CASES / "mini_mvtec_ad" / "cup"
    category = Category(root)
    assert category.layout == "MVTec AD" and category.validation_is_held_out and category.tested
    assert len(category.train) == 4 and len(category.validation) == 1
    assert relative(category.test(STRUCTURAL), root) == ["test/crack/000.png", "test/missing_pin/000.png"]
    assert category.test(LOGICAL) == []
    assert [category.key(path) for path in category.test(STRUCTURAL)] == ["crack_000", "missing_pin_000"]
    assert [DefectNames(category).of(split, path) for split, path in category.test_images] == [
        None,
        "crack",
        "missing_pin",
    ]
    assert relative(category.region_masks(STRUCTURAL, category.test(STRUCTURAL)[0]), root) == [
        "ground_truth/crack/000_mask.png"
    ]
    assert unused(category) == []
    assert layout_line(category) == (
        "cup (MVTec AD): 4 training images; 1 validation image (set aside from 5 training images, "
        "there are no others); test images: 1 good, 1 crack, 1 missing_pin"
    )
    (sorted_by_user,) = Dataset(CASES / "mini_mvtec_ad").select(None, {"cup": ["missing_pin"]})
    assert relative(sorted_by_user.test(LOGICAL), root) == ["test/missing_pin/000.png"]
    assert relative(sorted_by_user.test(STRUCTURAL), root) == ["test/crack/000.png"]
    assert "1 missing_pin (logical)" in layout_line(sorted_by_user)


def test_defects_that_are_not_there():
    with pytest.raises(UserError, match="no defect 'dent' in .*it has crack, missing_pin"):
        Category(CASES / "mini_mvtec_ad" / "cup", ("dent",))
    with pytest.raises(UserError, match="'plain folder'.*logical"):
        Category(CASES / "mini_train3" / "cup", ("dent",))


def test_mvtec_ad_with_validation_images_measures_every_defect(tmp_path):
    root = write(
        tmp_path, "train/good/{4}.png", "validation/good/{3}.png", "test/good/{1}.png", "test/crack/{2}.png"
    )
    category = Category(root)
    assert (
        category.layout == "MVTec AD"
        and len(category.validation) == 3
        and len(category.test(STRUCTURAL)) == 2
    )


def test_btad(tmp_path):
    root = write(
        tmp_path, "train/ok/{6}.bmp", "test/ok/{2}.bmp", "test/ko/{2}.bmp", "ground_truth/ko/001.png"
    )
    category = Category(root)
    assert category.layout == "BTAD" and len(category.test(GOOD)) == 2
    assert [len(category.region_masks(STRUCTURAL, path)) for path in category.test(STRUCTURAL)] == [0, 1]
    assert unused(category) == []


@pytest.mark.parametrize(
    "names",
    [
        ["train/good/{8}.png"],
        ["train/{8}.png"],
        ["{8}.png"],
        ["train/good/camera1/{4}.png", "train/good/camera2/{4}.png"],
        ["train/camera1/{4}.png", "train/camera2/night/{4}.png"],
    ],
)
def test_plain_folders(tmp_path, names):
    (category,) = Dataset(write(tmp_path / "cup", *names)).select(None)
    assert (
        category.layout == "plain folder"
        and not category.tested
        and category.test_images == []
        and category.test(GOOD) == []
    )
    assert len(category.train) == 7 and len(category.validation) == 1
    keys = {category.key(path) for path in [*category.train, *category.validation]}
    assert len(keys) == 8
    assert ("000" in keys) != ("camera1_000" in keys)
    assert "no test images" in layout_line(category)


def test_two_layouts_mixed(tmp_path):
    write(
        tmp_path,
        "train/good/{5}.png",
        "test/good/{1}.png",
        "test/crack/{1}.png",
        "ground_truth/crack/000_mask.png",
        "test/logical_anomalies/{1}.png",
    )
    with pytest.raises(UserError, match="mixes two layouts"):
        Category(tmp_path).test_images  # noqa: B018
    write(tmp_path / "other", "train/good/{5}.png", "train/ok/{5}.png")
    with pytest.raises(UserError, match="of two layouts"):
        Category(tmp_path / "other").train  # noqa: B018


@pytest.mark.parametrize("folder", ["train/good", "validation/good", "test/good", "test/crack"])
def test_an_empty_split_is_named(tmp_path, folder):
    write(
        tmp_path, "train/good/{5}.png", "validation/good/{2}.png", "test/good/{1}.png", "test/crack/{1}.png"
    )
    for path in (tmp_path / folder).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=f"no images in .*{folder}"):
        layout_line(Category(tmp_path))


def test_training_folders_that_do_not_sound_good(tmp_path):
    with pytest.raises(UserError, match="holds a folder Bad"):
        Category(write(tmp_path, "train/fine/{5}.png", "train/Bad/{5}.png")).train  # noqa: B018


def test_no_training_folder(tmp_path):
    with pytest.raises(UserError, match="train/good does not exist"):
        Category(tmp_path).train  # noqa: B018


# Validation images set aside


@pytest.mark.parametrize(
    ("count", "aside"), [(5, 1), (9, 1), (10, 2), (20, 3), (39, 6), (40, 10), (60, 10), (100, 15)]
)
def test_a_share_is_set_aside(tmp_path, count, aside):
    category = Category(write(tmp_path, f"train/good/{{{count}}}.png", size=(1, 1)))
    assert len(category.validation) == aside
    assert not set(category.train) & set(category.validation)
    assert len(category.train) + aside == count
    assert category.train == sorted(category.train) and category.validation == sorted(category.validation)


def test_the_share_depends_on_names_alone(tmp_path):
    first = Category(write(tmp_path / "a", "train/good/{40}.png", size=(1, 1)))
    other = Category(write(tmp_path / "b" / "deeper", "train/{40}.png", value=3, size=(1, 1)))
    chosen = [path.name for path in first.validation]
    assert [path.name for path in other.validation] == chosen
    assert chosen != [f"{index:03d}.png" for index in range(10)]  # not simply the first
    write(tmp_path / "a", "train/good/new.png", size=(1, 1))
    joined = Category(first.root)
    assert len(joined.train) + len(joined.validation) == 41
    assert len(set(chosen) & {path.name for path in joined.validation}) >= 9


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_to_set_aside(tmp_path, count):
    category = Category(write(tmp_path, f"train/{{{count}}}.png"))
    with pytest.raises(UserError, match=f"has {count} training images? and none for validation; at least 5"):
        category.train  # noqa: B018
    write(tmp_path, "validation/good/000.png")
    if count == 4:
        assert len(Category(tmp_path).train) == count
    else:
        with pytest.raises(UserError, match="has 1 training image; at least 4"):
            Category(tmp_path).train  # noqa: B018


# Keys


def test_keys_of_long_names_fit_any_file_system(tmp_path):
    """Long file names, many long folders, letters of several bytes: what stage 2 writes has names of at most 255 bytes."""
    odd = os.fsdecode(b"\xff" * 240)
    names = [
        "y" * 249,
        "y" * 248 + "z",
        "ä" * 120 + "a",
        "ä" * 120 + "b",
        "n" * 220,
        odd,
        odd + "a",
        *(f"{'d' * 200}/{'e' * 200}/{index}" for index in range(2)),
    ]
    paths = [tmp_path / f"{name}.png" for name in names]
    keys = listing.unique_names(paths, tmp_path)
    assert len(set(keys.values())) == len(paths) and keys[paths[4]] == "n" * 220
    assert keys == listing.unique_names(paths[::-1], tmp_path)
    for key in keys.values():
        written = Workspace(tmp_path).segmentation_output("cup", STRUCTURAL, key)
        files.write_bytes(written, b"x")
        assert written.read_bytes() == b"x"


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.sets(
        st.lists(st.sampled_from(["a", "b", "info", "a_b", "a.jpg", "é"]), min_size=1, max_size=3).map(tuple),
        min_size=1,
    ),
    st.sets(st.sampled_from([".jpg", ".png", ".jpg.png"]), min_size=1),
    st.randoms(use_true_random=False),
)
def test_keys_are_unique_whatever_the_names(places, suffixes, order):
    base = Path("/data/train")
    paths = sorted(
        {base.joinpath(*parts[:-1], parts[-1] + suffix) for parts in places for suffix in suffixes}
    )
    keys = listing.unique_names(paths, base)
    assert len(set(keys.values())) == len(paths)
    assert not any("/" in key or key in listing.RESERVED_KEYS for key in keys.values())
    shuffled = list(paths)
    order.shuffle(shuffled)
    assert listing.unique_names(shuffled, base) == keys


def test_keys_of_twins_and_reserved_names(tmp_path):
    category = Category(
        write(
            tmp_path,
            "train/a.jpg",
            "train/a.jpg.png",
            "train/b.png",
            "train/b.jpg",
            "train/info.png",
            "train/test_seg_output.png",
            "train/x/y.png",
            "train/x_y.png",
        )
    )
    found = sorted([*category.train, *category.validation])
    keys = dict(zip(relative(found, tmp_path / "train"), map(category.key, found)))
    assert keys == {
        "a.jpg": "a",
        "a.jpg.png": "a.jpg",
        "b.png": "b.png",
        "b.jpg": "b.jpg",
        "info.png": "info.png",
        "test_seg_output.png": "test_seg_output.png",
        "x/y.png": "x_y.png-" + keys["x/y.png"][-8:],
        "x_y.png": "x_y.png-" + keys["x_y.png"][-8:],
    }
    with pytest.raises(ValueError, match="no image of"):
        category.key(tmp_path / "train" / "none.png")


def test_one_object_looks_at_the_disk_once(tmp_path, monkeypatch):
    root = write(
        tmp_path, "train/good/a/{300}.png", "train/good/b/{300}.png", "test/good/{1}.png", size=(1, 1)
    )
    category = Category(root)
    looks, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: (looks.append(folder), scan(folder))[1])
    for _ in range(3):
        assert len({category.key(path) for path in [*category.train, *category.validation]}) == 600
        assert len(category.test_images) == 1
    assert sorted(map(str, looks)) == [
        str(root / name) for name in ("test/good", "train/good", "train/good/a", "train/good/b")
    ]
    write(root, "train/good/later.png")
    assert len(category.train) + 1 == len(Category(root).train) or len(category.validation) + 1 == len(
        Category(root).validation
    )
    assert Category(root).key(root / "train/good/later.png") == "later"


def test_masks_of_twins_are_not_guessed(tmp_path):
    category = Category(
        write(
            tmp_path,
            "train/good/{5}.png",
            "test/good/{1}.png",
            "test/crack/000.png",
            "test/crack/000.jpg",
            "ground_truth/crack/000_mask.png",
        )
    )
    with pytest.raises(UserError, match="two images in .*crack are called '000'"):
        category.region_masks(STRUCTURAL, category.test(STRUCTURAL)[0])


# Links and what is not used


def test_links_are_followed_and_cycles_noticed(tmp_path):
    write(tmp_path / "elsewhere", "{4}.png", "shelf/{2}.png")
    root = write(tmp_path / "cup", "train/good/{2}.png")
    good = root / "train" / "good"
    (good / "away").symlink_to(tmp_path / "elsewhere")
    (good / "again").symlink_to(tmp_path / "elsewhere" / "shelf")
    (good / "single.png").symlink_to(tmp_path / "elsewhere" / "003.png")
    (good / "up").symlink_to(root)
    (good / "itself").symlink_to(good / "itself")
    (good / "gone.png").symlink_to(tmp_path / "gone.png")
    category = Category(root)
    found = relative(sorted([*category.train, *category.validation]), good)
    assert len(found) == 2 + 4 + 2 + 1 and "single.png" in found
    reasons = {path.relative_to(good).as_posix(): why for path, why in unused(category)}
    assert set(reasons) - {"again", "away/shelf"} == {"up", "itself", "gone.png"}
    assert len(reasons) == 4  # of again and away/shelf one
    assert "once more" in reasons["up"] and "missing file" in reasons["gone.png"]
    (tmp_path / "linked").symlink_to(root)
    assert Category(tmp_path / "linked").name == "linked"


def test_whatever_is_not_used_is_named(make_dataset):
    root = make_dataset() / "discs"
    write(
        root,
        "test/unknown/{3}.png",
        "test/stray.png",
        "extra/{2}.png",
        "train/bad/{2}.png",
        "photo.png",
        "ground_truth/logical_anomalies/999/000.png",
        "ground_truth/good/000_mask.png",
    )
    (root / "train/good/a.heic").write_bytes(b"")
    (root / "train/good/.hidden.png").write_bytes(b"")
    (root / "train/good/raw").write_bytes(b"")
    (root / "readme.txt").write_text("")  # no picture anybody could miss
    (root / "roi.png").write_bytes(b"")
    (root / "defects_config.json").write_text("[]")
    category = Category(root)
    assert relative([path for path, _ in unused(category)], root) == [
        "extra",
        "ground_truth/good/000_mask.png",
        "ground_truth/logical_anomalies/999/000.png",
        "photo.png",
        "test/stray.png",
        "test/unknown",
        "train/bad",
        "train/good/.hidden.png",
        "train/good/a.heic",
        "train/good/raw",
    ]
    reasons = {path.name: why for path, why in unused(category)}
    assert (
        "3 images" in reasons["unknown"]
        and ".heic" in reasons["a.heic"]
        and "no test image" in reasons["000.png"]
    )


def test_names_need_not_be_text(tmp_path):
    folder = write(tmp_path, "train/good/{5}.png") / "train" / "good"
    try:
        os.rename(os.fsencode(folder / "000.png"), os.fsencode(folder) + b"/\xff.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    category = Category(tmp_path)
    assert "\udcff" in {category.key(path) for path in [*category.train, *category.validation]}


# Defects' names


def test_defects_of_loco_by_the_masks_values_or_the_rendered_sets_list(make_dataset):
    root = make_dataset() / "discs"
    category = Category(root)
    image = category.test(LOGICAL)[2]
    assert DefectNames(category).of(LOGICAL, image) is None
    described = root.parent.with_name("data_components") / "discs" / "classes.json"
    described.parent.mkdir(parents=True)
    described.write_text('{"anomalies": {"logical_anomalies": {"002": "no_disc"}}}')
    assert DefectNames(Category(root)).of(LOGICAL, image) == "no_disc"
    (root / "defects_config.json").write_text(
        json.dumps([{"pixel_value": 7, "defect_name": "missing"}, {"pixel_value": 9, "defect_name": "extra"}])
    )
    for number, value in enumerate((9, 7, 9)):
        write(root, f"ground_truth/logical_anomalies/002/{number:03d}.png", value=value)
    category = Category(root)
    with mock.patch.object(files, "read_json", wraps=files.read_json) as read:
        names = DefectNames(category)
        assert names.of(LOGICAL, image) == "extra + missing"
        assert names.of(LOGICAL, category.test(LOGICAL)[0]) is None
        assert names.of(GOOD, category.test(GOOD)[0]) is None
    assert read.call_count == 2  # once for each file, not for every image
    (root / "defects_config.json").write_text("{")
    with pytest.raises(UserError, match="defects_config.json cannot be read"):
        DefectNames(Category(root)).of(LOGICAL, image)


# Region of interest


@pytest.mark.parametrize(
    ("polygons", "said"),
    [
        ("[[[0, 0], [1, 1]]]", "at least 3 items"),
        ("[[[0, 0], [1, 1], [0, 2]]]", "less than or equal to 1"),
        ("[[0, 1, 2]]", "valid list"),
        ("[[[0, 0], [1, 1], [0]]]", "at least 2 items"),
        ("[[[0, 0], [1, 1], [0, .nan]]]", "Input should be "),
    ],
)
def test_polygons_that_are_none(tmp_path, monkeypatch, polygons, said):
    files.write_text(tmp_path / "categories/discs.yaml", f"roi: {polygons}\n")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    with pytest.raises(UserError, match=f"setting roi.0: .*{said}"):
        settings.load("discs")


def test_no_region_means_everything(make_dataset):
    assert read_roi(Category(make_dataset() / "discs"), 32) is None


def test_region_from_a_picture_and_from_polygons_agree(make_dataset):
    category = Category(make_dataset(size=128) / "discs")
    mask = np.zeros((128, 128), np.uint8)
    mask[:64, 32:] = 255
    from_polygon = read_roi(category, 32, [[[0.25, 0], [1, 0], [1, 0.5], [0.25, 0.5]]])
    Image.fromarray(mask).save(category.roi_file)
    assert "roi.png" in layout_line(category) and unused(category) == []
    expected = np.zeros((32, 32), bool)
    expected[:16, 8:] = True
    np.testing.assert_array_equal(read_roi(category, 32), expected)
    np.testing.assert_array_equal(from_polygon, expected)
    with pytest.raises(UserError, match="region of interest twice"):
        read_roi(category, 32, [[[0, 0], [1, 0], [1, 1]]])


def test_regions_that_are_none(make_dataset):
    category = Category(make_dataset() / "discs")
    with pytest.raises(UserError, match="is empty"):
        read_roi(category, 32, [[[0, 0], [0, 0], [0, 0]]])
    Image.new("L", (64, 128), 255).save(category.roi_file)
    with pytest.raises(UserError, match="roi.png is 64x128, but the images, like .*128x128"):
        read_roi(category, 32)
    Image.new("L", (128, 128), 0).save(category.roi_file)
    with pytest.raises(UserError, match="is empty"):
        read_roi(category, 32)


def test_lists_are_read_in_sorted_order_whatever_the_disk_says(tmp_path, monkeypatch):
    category = Category(write(tmp_path, "train/good/b/{3}.png", "train/good/a/{3}.png", "train/good/{3}.png"))
    expected = category.train, category.validation
    scan = os.scandir

    class Shuffled:
        def __init__(self, folder):
            with scan(folder) as listing:
                self.entries = list(listing)
            random.Random(str(folder)).shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *problem):
            return None

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert (category.train, category.validation) == expected


@pytest.mark.parametrize(
    ("number", "thing", "words"),
    [
        (1, "label", "1 label"),
        (0, "image", "0 images"),
        (2, "good picture", "2 good pictures"),
        (3, "category", "3 categories"),
    ],
)
def test_one_of_a_kind_is_no_plural(number, thing, words):
    assert listing.count(number, thing) == words
