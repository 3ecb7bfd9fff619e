"""Images as the method sees them: 8-bit RGB as a person sees them, resized with PIL's bilinear filter, aspect ratio not kept.

What a file means is never guessed picture by picture: where nothing says which value is white, reading it
ends with a sentence that names `--images.white_level`. Numpy and Pillow alone are needed here, so that deployment needs no more.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from csad.errors import UserError
from csad.progress import ProgressBar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from models.constants import OUTSIDE, SIZE

TRANSPARENCY_BACKGROUND = (
    255,
    255,
    255,
)  # what shows through transparent pixels: white, like paper or a web page
ORIENTATION_TAG = 0x0112

# Still-image formats whose decoders read pixels and nothing else: none that runs a program (EPS, PDF), follows references
# (WMF, FITS) or packs sizes of one icon.
_FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    "AVIF": (".avif",),
}
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}  # Pillow may be built without them
_READ = [name for name in _FORMATS if name not in _OPTIONAL or features.check(_OPTIONAL[name])]
SUFFIXES = tuple(
    suffix for name in _READ for suffix in _FORMATS[name]
)  # lower case; compare with path.suffix.lower()

# Colour with 16 bits a channel: Pillow keeps the high bytes only. Read once more in the other byte order, it gives the low ones.
_OTHER_BYTES = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}
_LARGEST_OF_12_BITS = 4095
PACKED = (
    "BGR;15",
    "BGR;16",
    "RGB;15",
    "RGB;16",
)  # raw modes with a whole pixel in 16 bits; read as 8 bits a channel

# Formats that need not keep the values they are given, and compressions within TIFF that do not.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
_LOSSY_BLACK = 16  # of 255: what such a format makes of black is darker
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")

# TIFF's tags
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _PLANES, _SUBFILE, _OLD_SUBFILE = 262, 258, 339, 284, 254, 255
_SUB_IFDS = 330

MAX_DECODED_BYTES = 2**30  # a small file may hold any number of equal pixels
_BLOCK_PIXELS = 1 << 20

_said: set[str] = set()


class TooLarge(UserError):
    """A picture that would take too much memory when decoded."""


class UnknownWhiteLevel(UserError):
    """Nothing says which value is white.

    Attributes:
        finding: what the picture holds, without advice.
    """

    def __init__(self, finding: str, advice: str):
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


@dataclass(frozen=True)
class View:
    """How the pictures of a category are seen: the same way in every stage and by the exported model.

    Attributes:
        size: side in pixels, a multiple of 256 and of `tiles`.
        white_level: see `read_rgb`.
        roi: (size, size) bool, what is inspected; the rest is grey, so that nothing in it can count. None: everything.
        tiles: the patch memory sees tiles x tiles of them.
    """

    size: int = SIZE
    white_level: float | None = None
    roi: np.ndarray | None = None
    tiles: int = 1

    def read(self, paths: Sequence[Path], description: str = "", size: int | None = None) -> np.ndarray:
        """(N, 3, size, size) uint8; with a progress bar where there is a description.

        Args:
            size: of the means over blocks, for a smaller view; the large ones are then not held together.
        """
        views = np.empty((len(paths), 3, size or self.size, size or self.size), np.uint8)
        for index, path in enumerate(
            ProgressBar(paths, desc=description, unit="image", leave=False, disable=not description)
        ):
            view = np.ascontiguousarray(read_rgb(path, self.size, self.white_level).transpose(2, 0, 1))
            if self.roi is not None:
                view[:, ~self.roi] = OUTSIDE
            views[index] = small_views(view[None], views.shape[-1])[0]
        return views

    def read_small(self, paths: Sequence[Path], description: str = "") -> np.ndarray:
        """(N, 3, 256, 256) uint8, what the paper's networks see."""
        return self.read(paths, description, SIZE)

    def read_native(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8, a picture at its own size; what lies outside the region of interest is grey here, too."""
        picture = read_rgb(path, None, self.white_level)
        if self.roi is not None:
            height, width = picture.shape[:2]
            picture[
                ~np.array(Image.fromarray(self.roi).resize((width, height), Image.Resampling.NEAREST))
            ] = OUTSIDE
        return picture

    def read_middle(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, 3, size / tiles, size / tiles) uint8: the whole picture as large as one tile, for LGST on features."""
        return self.read(paths, size=self.size // self.tiles)

    @property
    def record(self) -> dict[str, object]:
        """What records and models say of it."""
        roi = None if self.roi is None else hashlib.sha256(self.roi.tobytes()).hexdigest()[:16]
        return {"size": self.size, "white_level": self.white_level, "roi": roi, "tiles": self.tiles}


def read_rgb(
    path: str | Path | BinaryIO, size: int | None = None, white_level: float | None = None
) -> np.ndarray:
    """Read any image as (H, W, 3) uint8 RGB, the right way up, transparent pixels on `TRANSPARENCY_BACKGROUND`.

    Args:
        path: or an open file, called in sentences what its str() gives.
        size: resize to (size, size), or keep the image as it is when None.
        white_level: the stored value that is white, in files of more than 8 bits; brighter ones are white, too. None: what the
            format declares, 65535 for 16 bits.

    Raises:
        UserError: the file is missing, no image, damaged, of several pages, or would need its white level to be guessed.
    """
    with opened(path) as image:
        pixels = as_rgb(image, path, white_level)
    return pixels if size is None else resize(pixels, size)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8 as the networks see it."""
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def small_views(batch: np.ndarray, size: int = SIZE) -> np.ndarray:
    """(N, 3, S, S) uint8, S a multiple of size -> (N, 3, size, size) uint8: the mean of each block, halves rounded up, exactly.

    Raises:
        ValueError: another shape or type.
    """
    side = batch.shape[-1]
    if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-2] != side or side % size or not side:
        raise ValueError(
            f"expected (N, C, S, S) uint8 with S a multiple of {size}, got {batch.shape} {batch.dtype}"
        )
    factor = side // size
    if factor == 1:
        return batch
    # Integers, so that every machine and runtime gets the same bytes.
    total = np.zeros((*batch.shape[:2], size, size), np.uint32)
    for row in range(factor):
        for column in range(factor):
            total += batch[..., row::factor, column::factor]
    return ((total + factor * factor // 2) // (factor * factor)).astype(np.uint8)


def small_view(image: np.ndarray) -> np.ndarray:
    """`small_views` of one picture: (S, S, 3) uint8 -> (256, 256, 3) uint8."""
    return small_views(image.transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)


def read_views(
    paths: Sequence[Path], size: int, description: str, white_level: float | None = None
) -> np.ndarray:
    """`View.read` of whole pictures: (N, 3, size, size) uint8."""
    return View(size, white_level).read(paths, description)


def read_mask(path: str | Path) -> np.ndarray:
    """Read a label map or mask as (H, W) uint8, the right way up: 8-bit values as stored, of deeper ones those over 255 as 255.

    No pixel that is not zero is lost: of colours the brightest channel counts, of one bit the value is 255. A palette's indices
    are the values where its index 0 is black, as in label maps; otherwise its colours count. Lossy formats keep no
    values and leave traces around what was drawn: what is brighter than half of the brightest pixel, and than 16,
    becomes 255, the rest 0.

    Raises:
        UserError: the file is missing or unreadable.
    """
    with opened(path, "mask", "delete it and make it again") as image:
        lossy = _is_lossy(image, path)
        deep = _deep_pixels(image, path)
        if deep is not None:
            values, _ = deep
            if _white_is_zero(image):
                if image.mode == "F":
                    raise UserError(
                        f"mask {path} says that 0 is white, and not which value is black; store it as a PNG"
                    )
                values = 2 ** _bits(image) - 1 - values.astype(np.int64)
        else:
            image = ImageOps.exif_transpose(image)
            if image.mode == "P":
                image = image.convert("RGBA") if any(image.getpalette()[:3]) else image
            elif image.mode == "1":
                image = image.convert("L")
            elif image.mode != "L":
                image = image.convert("RGBA")
            values = np.array(image)
        values = values if values.ndim == 2 else _brightest(values)
    if lossy:
        return np.where(values > max(values.max() / 2, _LOSSY_BLACK), 255, 0).astype(np.uint8)
    return np.clip(np.ceil(values), 0, 255).astype(np.uint8)


def is_lossy(path: str | Path) -> bool:
    """Whether an image's format may have changed the values that it was given.

    Raises:
        UserError: the file is missing or no image.
    """
    with opened(path) as image:
        return _is_lossy(image, path)


def decoded_bytes(image: Image.Image) -> int:
    """Bytes of an `opened` image once decoded: pixels x channels x bytes per channel, at least 3 per pixel."""
    raw_mode, bits = raw_mode_of(image), _bits(image)
    deep = bits > 8 or ";16" in raw_mode and raw_mode not in PACKED or image.mode.startswith("I;16")
    channels = 4 if deep and image.mode == "LA" else len(image.getbands())  # see _deep_pixels
    return image.width * image.height * max(3, channels * {"I": 4, "F": 4}.get(image.mode, 2 if deep else 1))


def displayed_size(path: str | Path) -> tuple[int, int]:
    """(W, H) of an image as `read_rgb` returns it, its orientation applied.

    Raises:
        UserError: the file is missing or no image.
    """
    with opened(path) as image:
        width, height = image.size  # of a TIFF as displayed already
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION_TAG) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def colour_labels(labels: np.ndarray) -> np.ndarray:
    """Paint a label map (H, W) uint8 with one well-separated colour per index, (H, W, 3) uint8; 0 stays black."""
    return _PALETTE[labels]


def label_colour(label: int) -> str:
    """The colour of an index in `colour_labels`, as style sheets write it."""
    return "#" + colour_labels(np.array(label, np.uint8)).tobytes().hex()


@contextmanager
def opened(
    path: str | Path | BinaryIO, what: str = "image", advice: str = "replace it or leave it out"
) -> Iterator[Image.Image]:
    """A single-frame image, its pixels not yet read; whatever goes wrong until the block ends becomes a sentence.

    Raises:
        UserError: see `read_rgb`.
    """
    # A pipe or a device would never end.
    if isinstance(path, (str, Path)) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{what} {path} cannot be read (it is no regular file); {advice}")
    try:
        # TGA has no signature: only a file that says so by its name may be one.
        formats = [name for name in _READ if name != "TGA" or Path(str(path)).suffix.lower() == ".tga"]
        with Image.open(path, formats=[*formats, "DIB"]) as image:
            frames = getattr(image, "n_frames", 1)
            if image.format == "TIFF":
                frames = _seek_picture(image)
            if (
                frames > 1 and image.format != "MPO"
            ):  # a phone's .jpg: first the picture, then previews or gain maps
                raise UserError(
                    f"{what} {path} has {frames} pages or frames, expected one; store each as a file of its own"
                )
            if decoded_bytes(image) > MAX_DECODED_BYTES:
                raise TooLarge(
                    f"{what} {path} has {image.width} x {image.height} pixels and takes "
                    f"{decoded_bytes(image) / 1e6:.0f} MB when decoded, more than "
                    f"{MAX_DECODED_BYTES / 1e6:.0f}; make it smaller"
                )
            yield image
    except UserError:
        raise
    except FileNotFoundError as problem:
        link = ": it is a link to a file that is not there" if Path(path).is_symlink() else ""
        raise UserError(f"{what} {path} is missing{link}") from problem
    except Image.DecompressionBombError as problem:
        raise TooLarge(
            f"{what} {path} is larger than can be read safely ({problem}); make it smaller"
        ) from problem
    except Exception as problem:  # Pillow's decoders have an error of their own for every kind of damage
        reason = (
            "it is in no format that is read here"
            if isinstance(problem, UnidentifiedImageError)
            else (" ".join(str(problem).split()) or type(problem).__name__)
        )
        raise UserError(f"{what} {path} cannot be read ({reason}); {advice}") from problem


def _seek_picture(image: Image.Image) -> int:
    """Go to a TIFF's only page that is no smaller copy of another one; how many such pages there are.

    Raises:
        ValueError: the picture that the only page is a smaller copy of lies where Pillow does not look.
    """
    pictures = []
    for page in range(image.n_frames):
        image.seek(page)
        reduced = image.tag_v2.get(_SUBFILE, 0) & 1 or image.tag_v2.get(_OLD_SUBFILE) == 2
        if reduced and _SUB_IFDS in image.tag_v2:
            raise ValueError("its pages are smaller copies of a picture in a sub-directory")
        pictures += [] if reduced else [page]
    image.seek(pictures[0] if len(pictures) == 1 else 0)
    return len(pictures) or image.n_frames


def as_rgb(image: Image.Image, path: str | Path | BinaryIO, white_level: float | None = None) -> np.ndarray:
    """The pixels of an `opened` image as `read_rgb` returns them."""
    if white_level is not None and not 0 < white_level < math.inf:
        raise UserError(f"--images.white_level is {white_level}; it must be a number above 0")
    deep = _deep_pixels(image, path)
    if deep is None:
        ImageOps.exif_transpose(image, in_place=True)  # without a copy where it lies right already
        return _on_background(image, path)
    values, declared = deep
    clear = values[..., 3:] if values.ndim == 3 and values.shape[2] == 4 else None
    colours = values if clear is None else values[..., :3]
    white = white_level or declared
    if white is None or (white_level is None and white == 65535 and colours.max() <= _LARGEST_OF_12_BITS):
        held = f"values from {colours.min():g} to {colours.max():g}"
        raise UnknownWhiteLevel(
            f"image {path} holds {held} and nothing in it says which value is white",
            "set --images.white_level for the whole data set (1 for 0..1, 1023 for 10 bits, "
            "4095 for 12, 65535 for all 16)",
        )
    key = image.info.get("transparency")  # one value or colour that is transparent
    inverted = _white_is_zero(image)
    result = np.empty((*values.shape[:2], 3), np.uint8)
    for rows in _row_blocks(*values.shape[:2]):
        brightness = np.clip(colours[rows] / white, 0, 1)
        eight_bit = np.atleast_3d(np.floor((1 - brightness if inverted else brightness) * 255 + 0.5))
        opacity = None if clear is None else clear[rows] / 65535
        if key is not None and clear is None:
            opacity = np.atleast_3d(colours[rows] != np.asarray(key)).any(2, keepdims=True)
        if opacity is not None and opacity.min() < 1:
            _say_transparent(path)
            background = np.array(TRANSPARENCY_BACKGROUND) * (1 - opacity)
            eight_bit = np.floor(eight_bit * opacity + background + 0.5)
        result[rows] = eight_bit
    return result


def _on_background(image: Image.Image, path: str | Path) -> np.ndarray:
    """An 8-bit image of any mode as (H, W, 3) uint8."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.array(image)
    result = np.empty((image.height, image.width, 3), np.uint8)
    for rows in _row_blocks(image.height, image.width):
        block = image.crop((0, rows.start, image.width, rows.stop))
        if block.has_transparency_data:
            layered = block.convert("RGBA")
            if layered.getextrema()[3][0] < 255:
                _say_transparent(path)
                block = Image.new("RGBA", layered.size, (*TRANSPARENCY_BACKGROUND, 255))
                block.alpha_composite(layered)
        result[rows] = np.asarray(block.convert("RGB"))
    return result


def _row_blocks(height: int, width: int) -> Iterator[slice]:
    """Blocks of rows of about `_BLOCK_PIXELS` each, so that conversions take little memory at a time."""
    rows = max(1, _BLOCK_PIXELS // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def _deep_pixels(image: Image.Image, path: str | Path) -> tuple[np.ndarray, float | None] | None:
    """Pixels of more than 8 bits, right way up, values as stored, and the value that the format declares to be white.

    Returns:
        (H, W) or (H, W, 3 or 4) and white, None where nothing declares it; None for images of 8 bits.
    """
    arguments, raw_mode = image.tile[0].args if image.tile else None, raw_mode_of(image)
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    bits = _bits(image)
    if image.format == "TIFF" and _PHOTOMETRIC not in tags:  # Pillow takes 0 for white then, others for black
        raise UserError(f"image {path} does not say whether its value 0 is black or white; store it as a PNG")
    if image.format == "PPM" and isinstance(arguments, tuple) and image.tile[0].codec_name.startswith("ppm"):
        return _rescaled_by_pillow(image, path, arguments[-1])
    if image.mode == "F" or image.mode.startswith("I"):
        unsigned = bits == 32 and tags.get(_SAMPLE_FORMAT, (1,))[0] == 1
        values = _upright(image)
        values = values.view(np.uint32) if unsigned and image.mode == "I" else values
        if image.mode == "F" and not np.isfinite(values).all():
            raise UserError(f"image {path} holds values that are not finite; replace it or leave it out")
        _require_no_negative(values, path)
        if image.mode != "I" and image.mode != "F":
            return values, 2.0 ** (bits if tags else 16) - 1
        return values, 65535.0 if image.mode == "I" and image.format in ("PNG", "PPM") else None
    if 2 in tags.get(_SAMPLE_FORMAT, ()):  # signed, which Pillow takes no notice of in 8 bits
        values = _upright(image).view(np.int8)
        _require_no_negative(values, path)
        return values, None
    if raw_mode == "LA;16B":  # grey with alpha: read as four channels of 8 bits, it is its own bytes
        grey, clear = np.moveaxis(np.ascontiguousarray(_reread(image, "RGBA")).view(">u2"), 2, 0)
        return np.stack([grey, grey, grey, clear], 2).astype(np.uint16, copy=False), 65535.0
    planes = tags.get(_PLANES) == 2  # libtiff then hands out 8 bits, whatever the raw mode
    if raw_mode in _OTHER_BYTES and not planes:
        low = _reread(image, _OTHER_BYTES[raw_mode])
        with opened(path) as again:
            values = _upright(again).astype(np.uint16)
        values <<= 8  # in place: these are the largest pictures
        values |= low
        return values, 65535.0
    if bits > 8 or ";16" in raw_mode and raw_mode not in PACKED:
        raise UserError(
            f"image {path} stores {bits} bits a channel in a way that is not read here; store it as a PNG"
        )
    return None


def raw_mode_of(image: Image.Image) -> str:
    """Pillow's name for the layout of an image's stored bytes; empty where it has none or has read the pixels."""
    arguments = image.tile[0].args if image.tile else None  # (raw mode, ...) or the raw mode alone
    return str(arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments or "")


def _bits(image: Image.Image) -> int:
    """Bits of a channel as a TIFF's header says them; 8 for all other formats."""
    return max(getattr(image, "tag_v2", {}).get(_BITS, (8,)))


def _white_is_zero(image: Image.Image) -> bool:
    """Whether the values of a TIFF fall with brightness; Pillow inverts those of up to 8 bits only."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _is_lossy(image: Image.Image, path: str | Path) -> bool:
    if image.format == "TIFF":
        return image.info.get("compression") in _LOSSY_TIFF
    if image.format == "WEBP":
        return not _holds_lossless_webp(Path(path))
    return image.format in _LOSSY


def _holds_lossless_webp(path: Path) -> bool:
    """Pillow does not tell, but the chunk of the RIFF file that holds the pixels: VP8L or "VP8 "."""
    with open(path, "rb") as handle:
        handle.seek(12)
        while len(head := handle.read(8)) == 8:
            if head[:4] in (b"VP8L", b"VP8 "):
                return head[:4] == b"VP8L"
            length = int.from_bytes(head[4:], "little")
            handle.seek(length + length % 2, 1)
    return False


def _require_no_negative(values: np.ndarray, path: str | Path | BinaryIO) -> None:
    if values.min() < 0:
        raise UserError(
            f"image {path} holds values below 0 (down to {values.min():g}); store it with black at 0"
        )


def _rescaled_by_pillow(
    image: Image.Image, path: str | Path, largest: int
) -> tuple[np.ndarray, float | None] | None:
    """A PGM or PPM says itself which value is white; Pillow applies that, to 8 bits for colour, to 16 for grey."""
    values = _upright(image)
    if image.mode == "I":
        values = values * (largest / 65535)
        return np.round(values, out=values), float(largest)
    if largest == 65535 and values.max() <= 15:  # the 12 bits are gone already
        raise UserError(
            f"image {path} says that 65535 is white, but holds far less; store it as a PNG or TIFF"
        )
    return None


def _reread(image: Image.Image, raw_mode: str) -> np.ndarray:
    """Decode an opened image with its bytes unpacked in another way."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, (tuple, list)) else raw_mode)
        for tile in image.tile
    ]
    return _upright(image)


def _upright(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)  # without a copy where it lies right already
    return np.asarray(image)


def _brightest(channels: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H, W) of that type: the brightest colour channel, 0 where a fourth says transparent."""
    brightest = channels[..., :3].max(2)
    if channels.shape[2] < 4:
        return brightest
    return np.where(channels[..., 3] > 0, brightest, 0).astype(brightest.dtype)


def _say_transparent(path: str | Path) -> None:
    if "transparent" not in _said:
        _said.add("transparent")
        ProgressBar.write(
            f"transparent pixels are seen as white ({path} is the first picture that has some)",
            file=sys.stderr,
        )


# Black, and the colours of Okabe and Ito (2008), which colour-blind people can tell apart, too.
_DISTINCT = [
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
]


def _make_palette() -> np.ndarray:
    # Steps of the golden ratio around the hue circle keep neighbouring indices apart.
    indices = np.arange(256)
    hsv = np.stack(
        [
            (indices * 0.618034) % 1.0 * 179,
            np.full(256, 190) - indices % 3 * 40,
            np.full(256, 255) - indices % 4 * 30,
        ],
        axis=1,
    ).astype(np.uint8)
    rgb = np.asarray(
        Image.fromarray(
            np.stack([hsv[:, 0] / 179 * 255, hsv[:, 1], hsv[:, 2]], 1).astype(np.uint8)[None], mode="HSV"
        ).convert("RGB")
    )[0].copy()
    rgb[: len(_DISTINCT)] = _DISTINCT
    return rgb


_PALETTE = _make_palette()
