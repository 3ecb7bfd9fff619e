"""Image files before their pixels are read: the formats that are opened, and what a header says.

Numpy and Pillow alone are needed here and in `csad.data.images`, so that deployment needs no more.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from csad.errors import UserError

from PIL import Image, ImageFile, UnidentifiedImageError, features
from PIL.TiffImagePlugin import BITSPERSAMPLE, SUBIFD, TiffImageFile

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
# Lower case; compare with path.suffix.lower().
SUFFIXES = tuple(suffix for name in _READ for suffix in _FORMATS[name])
# Raw modes with a whole pixel in 16 bits; read as 8 bits a channel.
PACKED = ("BGR;15", "BGR;16", "RGB;15", "RGB;16")

# Formats that need not keep the values they are given, and compressions within TIFF that do not.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")

# Tags of TIFF that Pillow does not name.
_SUBFILE, _OLD_SUBFILE = 254, 255

_PNG_HEADER = 33  # bytes of a PNG's signature and its first chunk, which every file has

MAX_DECODED_BYTES = 2**30  # a small file may hold any number of equal pixels


class TooLarge(UserError):
    """A picture that would take too much memory when decoded."""


class Wording(NamedTuple):
    """How sentences speak of a picture to whoever can mend it."""

    what: str = "image"
    advice: str = "replace it or leave it out"  # where it cannot be read
    pages: str = "store each as a file of its own"  # where it has several


STORED = Wording()


def wording_of(path: str | Path | BinaryIO) -> Wording:
    """An open file's own, where it has one (`csad.inference.inspection.InMemory`), else `STORED`."""
    return getattr(path, "wording", STORED)


@contextmanager
def opened(path: str | Path | BinaryIO, wording: Wording | None = None) -> Iterator[ImageFile.ImageFile]:
    """A single-frame image, its pixels not yet read; whatever goes wrong until the block ends becomes a
    UserError, see `csad.data.images.read_rgb`."""
    what, advice, pages = wording or wording_of(path)
    # A pipe or a device would never end.
    if isinstance(path, (str, Path)) and os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{what} {path} cannot be read (it is not a regular file); {advice}")
    try:
        # TGA has no signature: only a file that says so by its name may be one.
        formats = [name for name in _READ if name != "TGA" or Path(str(path)).suffix.lower() == ".tga"]
        with Image.open(path, formats=[*formats, "DIB"]) as image:
            frames = getattr(image, "n_frames", 1)
            if isinstance(image, TiffImageFile):
                frames = _seek_picture(image)
            # A phone's .jpg: first the picture, then previews or gain maps.
            if frames > 1 and image.format != "MPO":
                raise UserError(f"{what} {path} has {frames} pages or frames, expected one; {pages}")
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
        is_link = isinstance(path, (str, Path)) and os.path.islink(path)
        raise UserError(
            f"{what} {path} is missing" + ": it is a link to a missing file" * is_link
        ) from problem
    except Image.DecompressionBombError as problem:
        raise TooLarge(
            f"{what} {path} is larger than can be read safely ({problem}); make it smaller"
        ) from problem
    except Exception as problem:  # Pillow's decoders have an error of their own for every kind of damage
        reason = " ".join(str(problem).split()) or type(problem).__name__
        if isinstance(problem, UnidentifiedImageError):
            reason = "its format is not supported"
        raise UserError(f"{what} {path} cannot be read ({reason}); {advice}") from problem


def displayed_size(path: str | Path) -> tuple[int, int]:
    """(W, H) of an image as `csad.data.images.read_rgb` returns it, its orientation applied. UserError if the
    file is missing or no image."""
    with opened(path) as image:
        width, height = image.size  # of a TIFF as displayed already
        turned = image.format != "TIFF" and orientation_of(image) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def orientation_of(image: ImageFile.ImageFile) -> int:
    """Exif's number for how an `opened` image lies, 1 to 8, its pixels not decoded."""
    return (_exif_of_png(image) if image.format == "PNG" else image.getexif()).get(ORIENTATION_TAG, 1)


def _exif_of_png(image: ImageFile.ImageFile) -> Image.Exif:
    """Exif may follow a PNG's pixels, so Pillow would decode them all: it is asked about a single pixel instead, among the
    chunks of Exif and text that the file has."""
    file, buffer = cast(BinaryIO, image.fp), io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    pixel, position = buffer.getvalue(), file.tell()
    chunks = [pixel[:_PNG_HEADER]]
    file.seek(_PNG_HEADER)
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big") + 4  # and its checksum
        if head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            chunks.append(head + file.read(length))
        else:
            file.seek(length, os.SEEK_CUR)
    file.seek(position)
    with Image.open(io.BytesIO(b"".join([*chunks, pixel[_PNG_HEADER:]])), formats=["PNG"]) as same:
        return same.getexif()


def decoded_bytes(image: ImageFile.ImageFile) -> int:
    """Bytes of an `opened` image once decoded: pixels x channels x bytes per channel, at least 3 per pixel."""
    raw_mode, bits = raw_mode_of(image), bits_of(image)
    deep = bits > 8 or ";16" in raw_mode and raw_mode not in PACKED or image.mode.startswith("I;16")
    channels = 4 if deep and image.mode == "LA" else len(image.getbands())  # see `csad.data.deep_pixels`
    return image.width * image.height * max(3, channels * {"I": 4, "F": 4}.get(image.mode, 2 if deep else 1))


def is_lossy(path: str | Path) -> bool:
    """Whether an image's format may have changed the values that it was given; UserError if the file is
    missing or no image."""
    with opened(path) as image:
        return holds_lossy(image, path)


def holds_lossy(image: Image.Image, path: str | Path) -> bool:
    """Whether the format of an `opened` image may have changed its values."""
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


def _seek_picture(image: TiffImageFile) -> int:
    """Go to a TIFF's only page that is no smaller copy of another one; how many such pages there are.
    ValueError if the picture that the only page is a smaller copy of lies where Pillow does not look."""
    pictures = []
    for page in range(image.n_frames):
        image.seek(page)
        reduced = image.tag_v2.get(_SUBFILE, 0) & 1 or image.tag_v2.get(_OLD_SUBFILE) == 2
        if reduced and SUBIFD in image.tag_v2:
            raise ValueError("its pages are smaller copies of a picture in a sub-directory")
        pictures += [] if reduced else [page]
    image.seek(pictures[0] if len(pictures) == 1 else 0)
    return len(pictures) or image.n_frames


def raw_mode_of(image: ImageFile.ImageFile) -> str:
    """Pillow's name for the layout of an image's stored bytes; empty where it has none or has read the pixels."""
    arguments = image.tile[0].args if image.tile else None  # (raw mode, ...) or the raw mode alone
    return str(arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments or "")


def bits_of(image: Image.Image) -> int:
    """Bits of a channel as a TIFF's header says them; 8 for all other formats."""
    return max(getattr(image, "tag_v2", {}).get(BITSPERSAMPLE, (8,)))
