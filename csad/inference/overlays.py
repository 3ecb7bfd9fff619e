"""Pictures for people: heat maps and components over an image, outlines of the truth, thumbnails as data URIs. No OpenCV."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from csad.data.label_colours import colour_labels

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FULL_HEAT = (
    3.0  # scaled anomaly-map value shown at full strength; of the validation maps' values 0.5 % lie over 1
)
CALM = 0.4  # of full heat, green: what the most unusual place of a picture that counts as normal is drawn with at most
ARRANGEMENT = "patchhist"  # the branch whose map is of components
_OPACITY = 0.65
# From blue over green and yellow to dark red, as maps of this kind usually are.
_COLOURS = bytes.fromhex("30123b 4675ed 1bcfd4 61fc6c d1e834 fe9b2d d93806 7a0402")
_HEAT = np.frombuffer(_COLOURS, np.uint8).reshape(-1, 3).astype(np.float32)
_OUTLINE = (255, 0, 200)
_TEXT, _QUIET, _RED, _GREEN = (27, 36, 48), (91, 102, 117), (184, 28, 46), (24, 110, 52)
_MIN_WIDTH = 420  # pixels of a picture with a caption, so that a sentence finds room


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8, made smaller until its longer side is at most ``side``; aspect ratio kept."""
    if max(image.shape) <= side:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(picture)


def explaining_map(maps: Mapping[str, np.ndarray], contributions: Mapping[str, float]) -> np.ndarray:
    """The largest of the branches' maps at each place, of the map of components only what explains the score.

    The map of components marks everything whose amount is unusual, which can be half a picture where one part is missing.
    What is drawn of it is the region around its maximum, and nothing where another branch contributes more than twice as
    much to the score.

    Args:
        maps: (h, w) each, scaled, by branch.
        contributions: to the score, by branch.
    """
    highest = max(contributions.values())
    drawn = [
        _peak_region(values) if branch == ARRANGEMENT else values
        for branch, values in maps.items()
        if branch != ARRANGEMENT or contributions[branch] >= highest / 2 or len(maps) == 1
    ]
    return np.max(drawn, axis=0)


def _peak_region(evidence: np.ndarray) -> np.ndarray:
    """A map (h, w) with nothing left of it but what hangs together with its maximum and reaches half of it."""
    # Copied, as what comes of an array is read-only.
    mask = Image.fromarray(((evidence >= evidence.max() / 2) & (evidence > 0)).astype(np.uint8)).copy()
    row, column = np.unravel_index(evidence.argmax(), evidence.shape)
    ImageDraw.floodfill(mask, (int(column), int(row)), 2)
    return np.where(np.asarray(mask) == 2, np.maximum(evidence, 0), 0)


def heat_overlay(image: np.ndarray, anomaly_map: np.ndarray, anomalous: bool = True) -> np.ndarray:
    """Colour an image (H, W, 3) uint8 by its scaled anomaly map (h, w): nothing at 0 and below, dark red at `FULL_HEAT`.

    Of a picture that is not ``anomalous`` the colours end at green, however high its map is: red means rejected.
    """
    scaled = np.clip(anomaly_map / FULL_HEAT, 0, 1).astype(np.float32)
    heat = _enlarge(scaled, image, Image.Resampling.BILINEAR)
    if not anomalous:
        heat = heat * min(1.0, CALM / max(float(heat.max()), CALM))
    position = heat * (len(_HEAT) - 1)
    colours = np.stack([np.interp(position, np.arange(len(_HEAT)), channel) for channel in _HEAT.T], axis=-1)
    grey = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    opacity = (_OPACITY * np.minimum(heat * 2, 1))[..., None]
    return (grey * (1 - opacity) + colours * opacity).astype(np.uint8)


def label_overlay(image: np.ndarray, label_map: np.ndarray) -> np.ndarray:
    """Paint the components of a label map (h, w) uint8 over an image (H, W, 3) uint8; background stays as it is."""
    labels = _enlarge(label_map, image, Image.Resampling.NEAREST)
    painted = (0.3 * image + 0.7 * colour_labels(labels)).astype(np.uint8)
    return np.where((labels > 0)[..., None], painted, image // 2 + 32)


def outline(image: np.ndarray, *truth: np.ndarray) -> np.ndarray:
    """Draw the border of annotated regions, (h, w) bool of any size each, around all of them in an image (H, W, 3) uint8."""
    regions = [_enlarge(region.astype(np.uint8) * 255, image, Image.Resampling.NEAREST) for region in truth]
    mask = Image.fromarray(np.max(regions, axis=0))
    thickness = 2 * max(1, round(max(image.shape) / 200)) + 1
    grown = np.asarray(mask.filter(ImageFilter.MaxFilter(thickness)))
    shrunk = np.asarray(mask.filter(ImageFilter.MinFilter(thickness)))
    drawn = image.copy()
    drawn[grown != shrunk] = _OUTLINE
    return drawn


def ring(image: np.ndarray, spot: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Draw a ring around a spot of an image (H, W, 3) uint8, which itself stays as it is.

    Args:
        spot: x and y in pixels of the image before it was made smaller.
        size: its width and height then.
    """
    x, y = (
        (position + 0.5) * side_shown / side - 0.5
        for position, side_shown, side in zip(spot, image.shape[1::-1], size)
    )
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    distance = np.hypot(rows - y, columns - x)
    radius, width = max(6.0, max(image.shape) / 22), max(1.0, max(image.shape) / 250)
    drawn = image.copy()
    drawn[abs(distance - radius) <= 2 * width] = 0
    drawn[abs(distance - radius) <= width] = 255
    return drawn


def captioned(
    picture: np.ndarray,
    title: str,
    lines: Sequence[str],
    legend: Sequence[tuple[int, str]] = (),
    red: bool = False,
) -> np.ndarray:
    """A picture (H, W, 3) uint8 with text under it, and a legend of components; a narrow one gets a white margin.

    Args:
        title: stands first, larger than the lines.
        legend: index and what people call it, of each component.
        red: the title's colour, else green.
    """
    size = int(np.clip(picture.shape[0] / 26, 12, 30))
    margin, width = size // 2, max(picture.shape[1], _MIN_WIDTH)
    small, large = (ImageFont.load_default(pixels) for pixels in (size, round(1.25 * size)))
    texts = [(line, large) for line in _wrap(title, large, width - 2 * margin)]
    texts += [(line, small) for text in lines for line in _wrap(text, small, width - 2 * margin)]
    # Higher than needed: what is not written on is cut off.
    height = picture.shape[0] + 2 * size * (len(texts) + len(legend) + 1)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    pen = ImageDraw.Draw(canvas)
    x, y = float(margin), float(picture.shape[0] + margin)
    for text, font in texts:
        pen.text((x, y), text, fill=_TEXT if font is small else _RED if red else _GREEN, font=font)
        y += 1.35 * (size if font is small else round(1.25 * size))
    y += margin / 2
    for index, name in legend:
        entry = name if name.endswith(f" {index}") else f"{index} {name}"
        room = 1.4 * size + small.getlength(entry)
        if x > margin and x + room > width - margin:
            x, y = margin, y + 1.5 * size
        colour = tuple(colour_labels(np.array(index, np.uint8)).tolist())
        pen.rectangle((x, y + 0.1 * size, x + size, y + 1.1 * size), fill=colour, outline=_QUIET)
        pen.text((x + 1.4 * size, y), entry, fill=_TEXT, font=small)
        x += room + 1.2 * size
    return np.asarray(canvas)[: int(y + (1.5 * size if legend else 0) + margin)]


def _wrap(text: str, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """Pictures of one size (H, W, 3) uint8 in a row, a little white between them."""
    height = pictures[0].shape[0]
    gap = np.full((height, max(4, height // 64), 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def data_uri(image: np.ndarray, quality: int | None = None) -> str:
    """An image (H, W, 3) uint8 inside an address that needs no file: as WebP of a quality, or as PNG."""
    kind, options = "png", {"compress_level": 1}
    if quality is not None:
        kind, options = "webp", {"quality": quality, "method": 4}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _enlarge(values: np.ndarray, image: np.ndarray, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(image.shape[1::-1], how))
