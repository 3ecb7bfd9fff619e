"""Reading images and masks: as a person sees them, or a sentence."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

from csad.data import files, image_files, images, pictures
from csad.errors import UserError

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageFile

CASES = Path(__file__).parent / "cases"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (6, 9, 3), dtype=np.uint16)
few_examples = hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def eight_bits(values: np.ndarray, white: float = 65535) -> np.ndarray:
    return np.floor(np.minimum(values / white, 1) * 255 + 0.5).astype(np.uint8)


def test_neither_torch_nor_opencv_is_needed():
    code = "import sys; from csad.data import images, layouts, roi; sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0


# As a person sees them


@pytest.mark.parametrize(
    "suffix", [".png", ".bmp", ".tif", ".webp", ".gif", ".ppm", ".tga", ".qoi", ".jp2", ".PNG"]
)
def test_lossless_formats_give_their_pixels(tmp_path, suffix):
    if suffix.lower() not in image_files.SUFFIXES:
        pytest.skip("Pillow was built without it")
    picture = Image.fromarray(PIXELS if suffix != ".gif" else np.repeat(PIXELS[..., :1], 3, 2))
    picture.save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / f"a{suffix}"), np.asarray(picture))


def test_no_format_that_runs_or_refers_to_anything(tmp_path):
    assert not {".eps", ".ps", ".pdf", ".wmf", ".svg"} & set(image_files.SUFFIXES)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="its format is not supported"):
        images.read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(tmp_path, suffix, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 200, 40, 40
    upright[8:, 24:] = 40, 40, 200
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".webp": {"lossless": True}, ".jpg": {"quality": 100, "subsampling": 0}}.get(suffix, {})
    Image.fromarray(np.ascontiguousarray(undo[orientation](upright))).save(
        tmp_path / f"a{suffix}", exif=exif, **options
    )
    np.testing.assert_allclose(images.read_rgb(tmp_path / f"a{suffix}").astype(int), upright, atol=6)
    assert image_files.displayed_size(tmp_path / f"a{suffix}") == (32, 16)
    if suffix != ".jpg":
        assert images.read_mask(tmp_path / f"a{suffix}").shape == (16, 32)
        assert images.read_mask(tmp_path / f"a{suffix}")[0, 0] == 200


def test_turned_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(DEEP[..., 0]).copy()).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png")[..., 1], eight_bits(DEEP[..., 0]))


def test_the_camera_picture_of_the_issue():
    turned, upright = images.read_rgb(CASES / "exif6_good.jpg"), images.read_rgb(CASES / "upright_good.jpg")
    assert np.abs(turned.astype(int) - upright).mean() < 2  # turned wrongly: 32
    assert images.read_rgb(CASES / "anomalous_005.webp", 256).shape == (256, 256, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L key", "RGB key"])
def test_hidden_pixels_do_not_count(tmp_path, mode, capsys, monkeypatch):
    monkeypatch.setattr(images, "_said", set())
    grey = np.full((4, 4), 90, np.uint8)
    clear = np.zeros((4, 4), np.uint8)
    clear[:, :2] = 255
    hidden = np.where(clear, grey, 7)
    if mode == "P":
        picture = Image.fromarray(np.where(clear, 0, 1).astype(np.uint8))
        picture.putpalette([90, 90, 90, 7, 7, 7])
        picture.save(tmp_path / "a.png", transparency=1)
    elif mode.endswith("key"):
        Image.fromarray(hidden).convert(mode[:-4]).save(
            tmp_path / "a.png", transparency=7 if mode[0] == "L" else (7, 7, 7)
        )
    else:
        picture = Image.merge("LA", [Image.fromarray(hidden), Image.fromarray(clear)])
        picture.convert(mode).save(tmp_path / "a.png")
    expected = np.where(clear[..., None], 90, images.TRANSPARENCY_BACKGROUND)
    for _ in range(2):
        np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.png"), expected)
    assert capsys.readouterr().err.count("transparent") == 1


def test_a_phones_second_picture_inside_is_left_alone(tmp_path):
    first, second = (
        Image.fromarray(np.full((8, 8, 3), 200, np.uint8)),
        Image.fromarray(np.full((8, 8, 3), 10, np.uint8)),
    )
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert images.read_rgb(tmp_path / "a.jpg").mean() > 190


# More than 8 bits


def save_deep(path: Path, values: np.ndarray, way: str) -> None:
    if way == "cv2":
        cv2.imwrite(str(path), values[..., ::-1] if values.shape[2] == 3 else values[..., [2, 1, 0, 3]])
    else:
        options = {"big": {"byteorder": ">"}, "zlib": {"compression": "zlib", "predictor": True}}.get(way, {})
        tifffile.imwrite(
            path, values, photometric="rgb", extrasamples=["unassalpha"][: values.shape[2] - 3], **options
        )


@pytest.mark.parametrize(
    ("name", "way"), [("a.png", "cv2"), ("a.tif", "plain"), ("a.tif", "big"), ("a.tif", "zlib")]
)
def test_16_bit_colour_keeps_its_low_bytes(tmp_path, name, way):
    save_deep(tmp_path / name, DEEP, way)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / name), eight_bits(DEEP))
    save_deep(tmp_path / name, DEEP >> 4, way)
    with pytest.raises(UserError, match="--images.white_level"):
        images.read_rgb(tmp_path / name)
    np.testing.assert_array_equal(
        images.read_rgb(tmp_path / name, white_level=4095), eight_bits(DEEP >> 4, 4095)
    )
    opaque = np.dstack([DEEP, np.full(DEEP.shape[:2], 65535, np.uint16)])
    opaque[0, :, 3] = 0
    save_deep(tmp_path / name, opaque, way)
    read = images.read_rgb(tmp_path / name)
    np.testing.assert_array_equal(read[1:], eight_bits(DEEP)[1:])
    assert (read[0] == images.TRANSPARENCY_BACKGROUND).all()


def test_16_bit_grey_with_alpha(tmp_path):
    # No library here writes it: a PNG by hand.
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.stack([DEEP[..., 0], np.where(np.arange(9) < 5, 65535, 0)[None].repeat(6, 0)], 2).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 6, 16, 4, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
    read = images.read_rgb(tmp_path / "a.png")
    np.testing.assert_array_equal(read[:, :5, 2], eight_bits(DEEP[:, :5, 0]))
    assert (read[:, 5:] == 255).all()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int16, np.float32])
def test_ranges_that_nothing_declares_are_never_guessed(tmp_path, dtype):
    values = np.linspace(0, 1, 54).reshape(6, 9) * (1 if dtype == np.float32 else 20000)
    tifffile.imwrite(tmp_path / "a.tif", values.astype(dtype))
    with pytest.raises(UserError, match="a.tif holds values from 0 to .*--images.white_level"):
        images.read_rgb(tmp_path / "a.tif")
    white = float(values.max())
    read = images.read_rgb(tmp_path / "a.tif", white_level=white)
    np.testing.assert_array_equal(read[..., 0], eight_bits(values.astype(dtype), white))
    # Half as bright is half as bright: no picture is stretched by its own maximum.
    assert images.read_rgb(tmp_path / "a.tif", white_level=2 * white).max() == 128


def test_the_grey_pictures_of_the_issue():
    expected = images.read_rgb(CASES / "grey8.png").astype(int)
    for name, white in (("float01.tif", 1), ("grey12_in_16.png", 4095)):
        with pytest.raises(UserError, match="--images.white_level"):
            images.read_rgb(CASES / name)
        assert np.abs(images.read_rgb(CASES / name, white_level=white) - expected).max() <= 1
    np.testing.assert_array_equal(
        images.read_rgb(CASES / "grey8.png", white_level=4095), expected
    )  # 8 bits are 8 bits


def test_formats_that_say_their_white_level(tmp_path):
    values = DEEP[..., 0] >> 4
    (tmp_path / "a.pgm").write_bytes(b"P5 9 6 4095\n" + values.astype(">u2").tobytes())
    for white in (None, 4095):
        np.testing.assert_array_equal(
            images.read_rgb(tmp_path / "a.pgm", white_level=white)[..., 0], eight_bits(values, 4095)
        )
    (tmp_path / "b.pgm").write_bytes(b"P5 9 6 65535\n" + values.astype(">u2").tobytes())
    (tmp_path / "c.ppm").write_bytes(b"P6 3 6 65535\n" + values.astype(">u2").tobytes())
    for name in ("b.pgm", "c.ppm"):
        with pytest.raises(UserError, match=name):
            images.read_rgb(tmp_path / name)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_no_brightness(tmp_path, value):
    values = np.zeros((4, 4), np.float32)
    values[2, 2] = value
    tifffile.imwrite(tmp_path / "a.tif", values)
    with pytest.raises(UserError, match="a.tif"):
        images.read_rgb(tmp_path / "a.tif", white_level=1)


@pytest.mark.parametrize("level", [0, -1, float("nan"), float("inf")])
def test_a_white_level_that_is_none(level):
    with pytest.raises(UserError, match="white_level"):
        images.read_rgb(CASES / "float01.tif", white_level=level)


def test_planes_of_16_bits_are_not_read_wrongly(tmp_path):
    for options in ({}, {"compression": "zlib"}):
        planes = DEEP.transpose(2, 0, 1).copy()
        tifffile.imwrite(tmp_path / "a.tif", planes, photometric="rgb", planarconfig="separate", **options)
        with pytest.raises(UserError, match="stores 16 bits a channel in a way"):
            images.read_rgb(tmp_path / "a.tif")


# What is no single whole picture


@pytest.mark.parametrize("suffix", [".tif", ".gif", ".webp", ".png"])
def test_several_pages_are_refused(tmp_path, suffix):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="2 pages or frames"):
        images.read_rgb(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp", ".gif", ".jp2"])
def test_truncated_files_are_named(tmp_path, suffix):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        buffer, {".jpg": "JPEG", ".tif": "TIFF", ".jp2": "JPEG2000"}.get(suffix, suffix[1:].upper())
    )
    for share in (0.02, 0.5, 0.9):
        (tmp_path / f"half{suffix}").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
        for read in (images.read_rgb, images.read_mask):
            with pytest.raises(UserError, match="half"):
                read(tmp_path / f"half{suffix}")


def test_what_is_no_image(tmp_path):
    for read in (images.read_rgb, images.read_mask, image_files.displayed_size):
        for content in (b"", b"a text\n", b"\x89PNG not really", bytes(2000)):
            (tmp_path / "a.png").write_bytes(content)
            with pytest.raises(UserError, match="a.png"):
                read(tmp_path / "a.png")
        with pytest.raises(UserError, match="missing"):
            read(tmp_path / "none.png")
        with pytest.raises(UserError, match="cannot be read"):
            read(tmp_path)
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match="link.png is missing: it is a link"):
        images.read_rgb(tmp_path / "link.png")


def test_decompression_bombs(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    with pytest.raises(UserError, match="bomb.png is larger than can be read safely"):
        images.read_rgb(tmp_path / "bomb.png")


# Masks


@few_examples
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20))),
    st.sampled_from([".png", ".bmp", ".tif"]),
)
def test_label_maps_come_back_as_they_were(tmp_path, labels, suffix):
    files.write_image(tmp_path / f"labels{suffix}", labels)
    np.testing.assert_array_equal(images.read_mask(tmp_path / f"labels{suffix}"), labels)


@few_examples
@given(
    arrays.arrays(st.sampled_from([np.uint16, np.int32, np.float32]), (3, 5), elements=st.integers(0, 60000))
)
def test_no_pixel_of_a_deep_mask_is_lost(tmp_path, values):
    values[0, 0] = 256  # its low byte is 0
    tifffile.imwrite(tmp_path / "mask.tif", values)
    mask = images.read_mask(tmp_path / "mask.tif")
    np.testing.assert_array_equal(mask, np.minimum(values, 255).astype(np.uint8))
    np.testing.assert_array_equal(mask > 0, values > 0)


def test_masks_in_colour_one_bit_palette_and_fractions(tmp_path):
    inside = np.zeros((4, 6), bool)
    inside[1:3, 2] = True
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[inside] = 0, 0, 3
    Image.fromarray(colour).save(tmp_path / "colour.png")
    opaque = np.dstack([colour, np.full((4, 6), 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "alpha.png")
    Image.fromarray(inside).save(tmp_path / "bit.png")
    save_deep(tmp_path / "deep.png", colour.astype(np.uint16), "cv2")
    tifffile.imwrite(tmp_path / "float.tif", inside.astype(np.float32) * 0.5)
    for name, palette in (("labels.png", [0, 0, 0, 0, 90, 0]), ("reversed.png", [255, 255, 255, 0, 0, 0])):
        picture = Image.fromarray((inside if name == "labels.png" else ~inside).astype(np.uint8))
        picture.putpalette(palette)
        picture.save(tmp_path / name)
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(images.read_mask(path) > 0, inside, err_msg=path.name)
    assert images.read_mask(tmp_path / "labels.png").max() == 1  # an index is a label
    assert images.read_mask(tmp_path / "bit.png").max() == 255


# Views


@hypothesis_settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(1, 255))
def test_small_views_are_exact_block_means(factor, seed, largest):
    side = 256 * factor
    batch = np.random.default_rng(seed).integers(0, largest + 1, (1, 3, side, side)).astype(np.uint8)
    blocks = batch.reshape(1, 3, 256, factor, 256, factor).sum((3, 5), dtype=np.int64)
    pixels = factor * factor
    expected = (2 * blocks + pixels) // (2 * pixels)  # halves up
    np.testing.assert_array_equal(images.small_views(batch), expected)


def test_small_views_refuse_other_shapes():
    for batch in (
        np.zeros((1, 3, 300, 300), np.uint8),
        np.zeros((1, 3, 512, 256), np.uint8),
        np.zeros((1, 3, 256, 256)),
        np.zeros((3, 256, 256), np.uint8),
    ):
        with pytest.raises(ValueError, match="expected"):
            images.small_views(batch)


def test_views_are_the_images_in_order(tmp_path):
    for value in (10, 20):
        Image.fromarray(np.full((5, 8, 3), value, np.uint8)).save(tmp_path / f"{value}.png")
    views = images.View(32).read([tmp_path / "20.png", tmp_path / "10.png"], "read")
    assert views.shape == (2, 3, 32, 32) and views.dtype == np.uint8
    assert views[0].mean() == 20 and views[1].mean() == 10


# TIFF's photometric interpretations, sample formats and pages; packed 16-bit pixels

RAMP = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)


def test_white_at_zero_is_the_same_picture_in_8_and_16_bits():
    expected = images.read_rgb(CASES / "black_is_zero_16.tif").astype(int)
    for name in ("white_is_zero_16.tif", "white_is_zero_8.tif"):
        assert np.abs(images.read_rgb(CASES / name) - expected).max() <= 1, name


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}])
def test_white_at_zero_in_every_depth_that_is_read(tmp_path, options):
    expected = eight_bits(RAMP)
    tifffile.imwrite(tmp_path / "a.tif", 65535 - RAMP, photometric="miniswhite", **options)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.tif")[..., 0], expected)
    tifffile.imwrite(tmp_path / "a.tif", 4095 - (RAMP >> 4), photometric="miniswhite", **options)
    with pytest.raises(UserError, match="--images.white_level"):
        images.read_rgb(tmp_path / "a.tif")
    np.testing.assert_array_equal(
        images.read_rgb(tmp_path / "a.tif", white_level=4095)[..., 0], eight_bits(RAMP >> 4, 4095)
    )
    tifffile.imwrite(tmp_path / "a.tif", 255 - expected, photometric="miniswhite", **options)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.tif")[..., 0], expected)
    tifffile.imwrite(
        tmp_path / "a.tif", 1 - RAMP.astype(np.float32) / 65535, photometric="miniswhite", **options
    )
    read = images.read_rgb(tmp_path / "a.tif", white_level=1)[..., 0].astype(int)
    assert np.abs(read - expected).max() <= 1
    with pytest.raises(UserError, match="0 is white"):
        images.read_mask(tmp_path / "a.tif")


def test_a_mask_with_white_at_zero(tmp_path):
    inside = np.zeros((4, 6), bool)
    inside[1:3, 2] = True
    for dtype in (np.uint8, np.uint16):
        tifffile.imwrite(
            tmp_path / "a.tif",
            np.where(inside, 0, np.iinfo(dtype).max).astype(dtype),
            photometric="miniswhite",
        )
        np.testing.assert_array_equal(images.read_mask(tmp_path / "a.tif"), np.where(inside, 255, 0))


def test_a_tiff_that_does_not_say_what_0_means(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RAMP, metadata=None)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    tag = content.index((262).to_bytes(2, "little") + (3).to_bytes(2, "little"))
    content[tag : tag + 2] = (263).to_bytes(
        2, "little"
    )  # another tag in the place of PhotometricInterpretation
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(UserError, match="black or white"):
        images.read_rgb(tmp_path / "a.tif")


def test_signed_8_bits_are_read_as_signed_16_bits_are(tmp_path):
    with pytest.raises(UserError, match="holds values below 0"):
        images.read_rgb(CASES / "signed8.tif")
    tifffile.imwrite(tmp_path / "a.tif", (RAMP >> 9).astype(np.int8))
    with pytest.raises(UserError, match="a.tif holds values from 0 to 127 .*--images.white_level"):
        images.read_rgb(tmp_path / "a.tif")
    np.testing.assert_array_equal(
        images.read_rgb(tmp_path / "a.tif", white_level=127)[..., 0], eight_bits(RAMP >> 9, 127)
    )


def test_packed_16_bit_pixels():
    read = images.read_rgb(CASES / "rgb16-565.bmp")
    with Image.open(CASES / "rgb16-565.bmp") as picture:
        np.testing.assert_array_equal(read, np.asarray(picture.convert("RGB")))
    assert read.shape == (64, 127, 3) and np.ptp(read) == 255


def write_pages(path: Path, *pages: tuple[np.ndarray, int]) -> None:
    """Pages, each with its NewSubfileType: 1 is a smaller copy."""
    with tifffile.TiffWriter(path) as tiff:
        for pixels, subfile_type in pages:
            tiff.write(pixels, photometric="rgb", subfiletype=subfile_type, metadata=None, contiguous=False)


def test_smaller_copies_in_a_tiff_are_passed_over(tmp_path):
    small = PIXELS[::3, ::3].copy()
    for pages in (
        [(PIXELS, 0), (small, 1)],
        [(small, 1), (PIXELS, 0)],
        [(PIXELS, 0), (PIXELS[::2, ::2].copy(), 1), (small, 1)],
    ):
        write_pages(tmp_path / "a.tif", *pages)
        np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.tif"), PIXELS)
        assert image_files.displayed_size(tmp_path / "a.tif") == (9, 6)
    write_pages(tmp_path / "a.tif", (DEEP[::3, ::3].copy(), 1), (DEEP, 0))
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "a.tif"), eight_bits(DEEP))
    for pages in (
        [(PIXELS, 0), (PIXELS, 0)],
        [(PIXELS, 0), (small, 1), (PIXELS, 0)],
        [(PIXELS, 1), (small, 1)],
    ):
        write_pages(tmp_path / "a.tif", *pages)
        with pytest.raises(UserError, match="2 pages"):
            images.read_rgb(tmp_path / "a.tif")


def test_a_tiff_whose_picture_lies_in_a_sub_directory(tmp_path):
    """As cameras write them: the first page is small, and the picture in a SubIFD, which Pillow does not read."""
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(PIXELS[::3, ::3].copy(), photometric="rgb", subfiletype=1, subifds=1, metadata=None)
        tiff.write(PIXELS, photometric="rgb", subfiletype=0, metadata=None)
    with pytest.raises(UserError, match="smaller copies"):
        images.read_rgb(tmp_path / "a.tif")
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as tiff:
        tiff.write(PIXELS, photometric="rgb", subifds=1, metadata=None)
        tiff.write(PIXELS[::3, ::3].copy(), photometric="rgb", subfiletype=1, metadata=None)
    np.testing.assert_array_equal(images.read_rgb(tmp_path / "pyramid.tif"), PIXELS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("read", [images.read_rgb, images.read_mask, image_files.displayed_size])
def test_a_pipe_is_no_image(tmp_path, read):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png cannot be read .*not a regular file"):
        read(tmp_path / "a.png")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


ORIENTATION_8 = (
    b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x08\x00\x00\x00\x00\x00\x00"
)
XMP = b'<rdf:Description tiff:Orientation="8"/>'


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize(
    "said",
    [
        chunk(b"eXIf", ORIENTATION_8),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(
            b"zTXt",
            b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n26\n" + ORIENTATION_8.hex().encode()),
        ),
    ],
    ids=["eXIf", "XMP", "raw profile"],
)
def test_wherever_a_png_says_how_it_lies_its_pixels_are_not_decoded_for_it(
    tmp_path, monkeypatch, said, place
):
    """At 1600 x 1280 that took 60 ms a picture, in stage 4 four times for each training image."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(buffer, "PNG")
    content, at = buffer.getvalue(), 33 if place == "before the pixels" else -12
    (tmp_path / "a.png").write_bytes(content[:at] + said + content[at:])
    assert images.read_rgb(tmp_path / "a.png").shape == (30, 20, 3)
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image.size) or load(image))
    assert image_files.displayed_size(tmp_path / "a.png") == (20, 30)
    with image_files.opened(tmp_path / "a.png") as image:
        assert pictures.header_fields(image)["turned"]  # check_dataset.py
    assert (30, 20) not in decoded


# Lossy masks


def test_the_jpeg_mask_of_the_issue():
    mask = images.read_mask(CASES / "002_mask.jpg")
    np.testing.assert_array_equal(mask > 0, images.read_mask(CASES / "002_mask.png") > 0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 75}),
        ("a.jpg", {"quality": 95}),
        ("a.webp", {"quality": 60}),
        ("a.tif", {"compression": "jpeg"}),
        ("a.jp2", {"irreversible": True, "quality_layers": [6]}),
        ("a.avif", {"quality": 5}),
    ],
)
@pytest.mark.parametrize("value", [255, 120])
def test_traces_of_lossy_compression_are_no_defect(tmp_path, name, options, value):
    if Path(name).suffix not in image_files.SUFFIXES:
        pytest.skip("Pillow was built without it")
    labels = np.zeros((64, 64), np.uint8)
    cv2.circle(labels, (30, 25), 13, value, -1)
    Image.fromarray(labels).save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as picture:
        assert (np.asarray(picture.convert("L")) > 0).sum() > (labels > 0).sum(), "no traces to be seen"
    assert image_files.is_lossy(tmp_path / name)
    mask = images.read_mask(tmp_path / name)
    assert set(np.unique(mask)) == {0, 255}
    assert (mask.astype(bool) != labels.astype(bool)).sum() <= 12
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / name, **options)
    assert not images.read_mask(tmp_path / name).any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.bmp", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.webp", {"lossless": True}),
        ("a.webp", {"lossless": True, "icc_profile": b"a profile" * 11}),
    ],
)
def test_lossless_masks_keep_their_values(tmp_path, name, options):
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(labels).save(tmp_path / name, **options)
    assert not image_files.is_lossy(tmp_path / name)
    np.testing.assert_array_equal(images.read_mask(tmp_path / name), labels)


def test_what_most_pictures_are_like(tmp_path):
    grey, red = Image.new("RGB", (30, 20), (9, 9, 9)), Image.new("RGB", (30, 20), (200, 9, 9))
    for index in range(5):
        grey.save(tmp_path / f"{index}.png")
    Image.new("L", (20, 20)).save(tmp_path / "5.png")
    paths = sorted(tmp_path.iterdir())
    assert images.usual_picture(paths, None) == {"size": [30, 20], "grey": True}
    red.save(paths[0])
    assert images.usual_picture(paths, None) == {"size": [30, 20], "grey": False}
