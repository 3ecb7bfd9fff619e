"""Pixels of more than 8 bits a channel as a file stores them, which Pillow cuts or inverts in ways of its own.

What a file means is never guessed picture by picture: where nothing says which value is white, reading it ends with a
sentence that names `--images.white_level`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

from csad.data.image_files import PACKED, bits_of, opened, raw_mode_of, wording_of
from csad.errors import UserError

import numpy as np
from PIL import Image, ImageFile, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION, PLANAR_CONFIGURATION, SAMPLEFORMAT

# Colour with 16 bits a channel: Pillow keeps the high bytes only. Read once more in the other byte order, it gives the low ones.
_OTHER_BYTES = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}


def deep_pixels(
    image: ImageFile.ImageFile, path: str | Path | BinaryIO
) -> tuple[np.ndarray, float | None] | None:
    """Pixels of more than 8 bits, right way up, values as stored, and the value that the format declares to be white.

    Returns:
        (H, W) or (H, W, 3 or 4) and white, None where nothing declares it; None for images of 8 bits.
    """
    arguments, raw_mode = image.tile[0].args if image.tile else None, raw_mode_of(image)
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    bits, (what, advice, _) = bits_of(image), wording_of(path)
    # Pillow takes 0 for white then, others for black.
    if image.format == "TIFF" and PHOTOMETRIC_INTERPRETATION not in tags:
        raise UserError(
            f"{what} {path} does not say whether its value 0 is black or white; store it as a PNG"
        )
    if image.format == "PPM" and isinstance(arguments, tuple) and image.tile[0].codec_name.startswith("ppm"):
        return _rescaled_by_pillow(image, path, arguments[-1])
    if image.mode == "F" or image.mode.startswith("I"):
        unsigned = bits == 32 and tags.get(SAMPLEFORMAT, (1,))[0] == 1
        values = _upright(image)
        values = values.view(np.uint32) if unsigned and image.mode == "I" else values
        if image.mode == "F" and not np.isfinite(values).all():
            raise UserError(f"{what} {path} holds values that are not finite; {advice}")
        _require_no_negative(values, path)
        if image.mode != "I" and image.mode != "F":
            return values, 2.0 ** (bits if tags else 16) - 1
        return values, 65535.0 if image.mode == "I" and image.format in ("PNG", "PPM") else None
    if 2 in tags.get(SAMPLEFORMAT, ()):  # signed, which Pillow takes no notice of in 8 bits
        values = _upright(image).view(np.int8)
        _require_no_negative(values, path)
        return values, None
    if raw_mode == "LA;16B":  # grey with alpha: read as four channels of 8 bits, it is its own bytes
        grey, clear = np.moveaxis(np.ascontiguousarray(_reread(image, "RGBA")).view(">u2"), 2, 0)
        return np.stack([grey, grey, grey, clear], 2).astype(np.uint16, copy=False), 65535.0
    planes = tags.get(PLANAR_CONFIGURATION) == 2  # libtiff then hands out 8 bits, whatever the raw mode
    if raw_mode in _OTHER_BYTES and not planes:
        low = _reread(image, _OTHER_BYTES[raw_mode])
        with opened(path) as again:
            values = _upright(again).astype(np.uint16)
        values <<= 8  # in place: these are the largest pictures
        values |= low
        return values, 65535.0
    if bits > 8 or ";16" in raw_mode and raw_mode not in PACKED:
        raise UserError(
            f"{what} {path} stores {bits} bits a channel in a way that is not supported; store it as a PNG"
        )
    return None


def _require_no_negative(values: np.ndarray, path: str | Path | BinaryIO) -> None:
    if values.min() < 0:
        raise UserError(
            f"{wording_of(path).what} {path} holds values below 0 (down to {values.min():g}); store it with "
            "black at 0"
        )


def _rescaled_by_pillow(
    image: ImageFile.ImageFile, path: str | Path | BinaryIO, largest: int
) -> tuple[np.ndarray, float | None] | None:
    """A PGM or PPM says itself which value is white; Pillow applies that, to 8 bits for colour, to 16 for grey."""
    values = _upright(image)
    if image.mode == "I":
        values = values * (largest / 65535)
        return np.round(values, out=values), float(largest)
    if largest == 65535 and values.max() <= 15:  # the 12 bits are gone already
        raise UserError(
            f"{wording_of(path).what} {path} says that 65535 is white, but holds far less; store it as a PNG "
            "or TIFF"
        )
    return None


def _reread(image: ImageFile.ImageFile, raw_mode: str) -> np.ndarray:
    """Decode an opened image with its bytes unpacked in another way."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, (tuple, list)) else raw_mode)
        for tile in image.tile
    ]
    return _upright(image)


def _upright(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)  # without a copy where it lies right already
    return np.asarray(image)


def white_is_zero(image: Image.Image) -> bool:
    """Whether the values of a TIFF fall with brightness; Pillow inverts those of up to 8 bits only."""
    return getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0
