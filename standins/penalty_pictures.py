"""Pictures made by formulas: something to look at when no photograph may be used.

Two users. The embedded backbone (`training/embedded_backbone.py`) learns from these pictures and from the labels that
come with them for free; the student of LGST is held at zero on them where ImageNet is not at hand (`render_picture`).

A picture is a pile of shapes in the order in which they fell, each cutting out what lies under it (the "dead leaves"
model, whose statistics of edges and scales resemble those of photographs). A shape has an outline (`SHAPE_KINDS`), a
surface (`TEXTURE_KINDS`, a grey relief that is turned, scaled and coloured), shading (flat, sloping, domed, metallic) and
sometimes a shadow. Three kinds of scene: clutter, a few composed objects on a ground, and a regular array of one shape.
At the end comes what a camera does: uneven light, blur, noise, and now and then no colour.

Everything is drawn from the generator passed in: same generator state, same picture (on the same versions of numpy and
OpenCV).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

TILE_SIZE = 256  # side of a texture tile, pixels
TILE_VARIANTS = 6  # tiles per texture kind, made once per process when first needed
TILE_SEED = 20240815
PLAIN_SHARE = 0.3  # share of the surfaces without any texture
REFERENCE_SIZE = 160  # picture side at which one unit of length is one pixel
SUBPIXEL_BITS = 4  # outlines are drawn in sixteenths of a pixel
LAST_INSTANCE = 255  # instance numbers are 8-bit; later shapes share the last one

Generator = np.random.Generator


# ---------------------------------------------------------------------------------------------------------------------
# Textures: every function returns a (TILE_SIZE, TILE_SIZE) float array of any range; `texture_tile` stretches it to 8 bits.


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates (y, x) of a tile."""
    return np.mgrid[0:TILE_SIZE, 0:TILE_SIZE].astype(np.float32)


def _spectral_noise(rng: Generator, gain: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """White noise whose spectrum is multiplied by `gain(fy, fx)`, frequencies in cycles per tile; mean 0, deviation 1."""
    frequency = np.fft.fftfreq(TILE_SIZE, 1 / TILE_SIZE)
    fy, fx = np.meshgrid(frequency, frequency, indexing="ij")
    spectrum = np.fft.fft2(rng.standard_normal((TILE_SIZE, TILE_SIZE))) * gain(fy, fx)
    spectrum[0, 0] = 0
    noise = np.fft.ifft2(spectrum).real
    return noise / (noise.std() + 1e-9)


def _clouds(rng: Generator, exponent: float) -> np.ndarray:
    return _spectral_noise(rng, lambda fy, fx: (1 + np.hypot(fy, fx)) ** -exponent)


def _band(rng: Generator, centre: float) -> np.ndarray:
    return _spectral_noise(rng, lambda fy, fx: np.exp(-(((np.hypot(fy, fx) - centre) / (0.2 * centre)) ** 2)))


def _streaks(rng: Generator, along: float, across: float) -> np.ndarray:
    """Noise drawn out along x: Gaussian low-pass at `along` and `across` cycles per tile."""
    return _spectral_noise(rng, lambda fy, fx: np.exp(-((fx / along) ** 2) - (fy / across) ** 2))


def _phase(rng: Generator, wobble: float = 0.0) -> np.ndarray:
    """Phase of a stripe pattern in turns: x over a random period, bent by `wobble` turns of smooth noise."""
    _, x = _grid()
    phase = x / rng.uniform(14, 36) + rng.uniform()
    return phase + wobble * _clouds(rng, 2.5) if wobble else phase


def _lattice(rng: Generator, offset: float = 0.0, aspect: float = 1.0) -> tuple[np.ndarray, ...]:
    """Square lattice: position inside the cell (v, u in -0.5..0.5) and the cell's row and column.

    Odd rows are shifted by `offset` cells; cells are `aspect` times wider than high.
    """
    y, x = _grid()
    period = rng.uniform(18, 40)
    row = np.floor(y / period)
    x = x / (period * aspect) + offset * (row % 2)
    column = np.floor(x)
    return y / period - row - 0.5, x - column - 0.5, row, column


def _dots(rng: Generator, offset: float) -> np.ndarray:
    v, u, _, _ = _lattice(rng, offset)
    return np.clip((rng.uniform(0.2, 0.4) - np.hypot(v, u)) * 12, 0, 1)


def _rings(rng: Generator) -> np.ndarray:
    v, u, _, _ = _lattice(rng)
    return np.clip(1 - np.abs(np.hypot(v, u) - rng.uniform(0.25, 0.36)) * 12, 0, 1)


def _crosses(rng: Generator) -> np.ndarray:
    v, u, _, _ = _lattice(rng)
    arm, width = rng.uniform(0.3, 0.42), rng.uniform(0.07, 0.14)
    return ((np.abs(u) < width) & (np.abs(v) < arm)) | ((np.abs(v) < width) & (np.abs(u) < arm))


def _joints(rng: Generator, offset: float, aspect: float) -> np.ndarray:
    v, u, row, column = _lattice(rng, offset, aspect)
    joint = (0.5 - np.abs(v) < 0.07) | (0.5 - np.abs(u) < 0.07 / aspect)
    tone = np.sin(row * 12.9 + column * 78.2) * 0.2
    return np.where(joint, -1, 0.5 + tone)


def _checks(rng: Generator) -> np.ndarray:
    _, _, row, column = _lattice(rng)
    return (row + column) % 2


def _triangles(rng: Generator) -> np.ndarray:
    v, u, _, column = _lattice(rng)
    return ((u > v) ^ (column % 2 > 0)).astype(np.float32)


def _diamonds(rng: Generator) -> np.ndarray:
    v, u, _, _ = _lattice(rng)
    return np.abs(u) + np.abs(v)


def _dashes(rng: Generator) -> np.ndarray:
    v, u, _, _ = _lattice(rng, 0.5, 2.0)
    return (np.abs(v) < 0.16) & (np.abs(u) < 0.33)


def _weave(rng: Generator, step: int) -> np.ndarray:
    """Over-and-under of two threads; `step` 1 is a plain weave, larger ones a twill."""
    v, u, row, column = _lattice(rng)
    over = (row + column) % (step + 1) == 0
    return np.where(over, np.cos(u * np.pi) * (1 - 0.5 * np.abs(v)), np.cos(v * np.pi) * (0.8 - 0.5 * np.abs(u)))


def _basket(rng: Generator) -> np.ndarray:
    v, u, row, column = _lattice(rng)
    return np.where((row + column) % 2 == 0, np.sin(u * 6 * np.pi), np.sin(v * 6 * np.pi))


def _knit(rng: Generator) -> np.ndarray:
    v, u, _, _ = _lattice(rng, 0.0, 0.7)
    return np.cos(2 * np.pi * (v + np.abs(u))) * np.cos(u * np.pi)


def _zigzag(rng: Generator) -> np.ndarray:
    y, x = _grid()
    period = rng.uniform(16, 32)
    return np.sin(2 * np.pi * (y / period + np.abs((x / (1.5 * period)) % 2 - 1)))


def _hexagons(rng: Generator) -> np.ndarray:
    y, x = _grid()
    frequency = 2 * np.pi / rng.uniform(18, 34)
    angles = np.arange(3) * np.pi / 3
    return sum(np.cos(frequency * (x * np.cos(a) + y * np.sin(a))) for a in angles)


def _ripples(rng: Generator) -> np.ndarray:
    y, x = _grid()
    cy, cx = rng.uniform(0, TILE_SIZE, 2)
    return np.sin(2 * np.pi * np.hypot(y - cy, x - cx) / rng.uniform(14, 32))


def _scattered(rng: Generator, count: int, draw: Callable[[np.ndarray, tuple[int, int], int], None]) -> np.ndarray:
    """`count` marks at random places of an empty tile; `draw(tile, centre, tone)` makes one mark."""
    tile = np.zeros((TILE_SIZE, TILE_SIZE), np.uint8)
    for x, y, tone in zip(*rng.integers(0, TILE_SIZE, (2, count)), rng.integers(128, 256, count), strict=True):
        draw(tile, (int(x), int(y)), int(tone))
    return tile


def _discs(rng: Generator, count: int, largest: int, thickness: int = -1) -> np.ndarray:
    return _scattered(
        rng, count, lambda t, c, v: cv2.circle(t, c, int(rng.integers(3, largest)), v, thickness, cv2.LINE_AA)
    )


def _ovals(rng: Generator, count: int, long: int, short: int, turned: float) -> np.ndarray:
    def draw(tile: np.ndarray, centre: tuple[int, int], tone: int) -> None:
        axes = (int(rng.integers(long // 2, long)), int(rng.integers(short // 2 + 1, short + 1)))
        cv2.ellipse(tile, centre, axes, rng.uniform(-turned, turned), 0, 360, tone, -1, cv2.LINE_AA)

    return _scattered(rng, count, draw)


def _hairs(rng: Generator, count: int, length: float, bend: float) -> np.ndarray:
    """Thin strokes of about `length` pixels in any direction, bent by up to `bend` of their length."""

    def draw(tile: np.ndarray, centre: tuple[int, int], tone: int) -> None:
        angle, way = rng.uniform(0, 2 * np.pi), np.linspace(-0.5, 0.5, 7)
        along = np.array([np.cos(angle), np.sin(angle)]) * length * rng.uniform(0.5, 1.3)
        across = np.array([-along[1], along[0]]) * bend * rng.uniform(-1, 1)
        points = np.array(centre) + way[:, None] * along + (way[:, None] ** 2 * 4) * across
        cv2.polylines(tile, [points.astype(np.int32)], False, tone, int(rng.integers(1, 4)), cv2.LINE_AA)

    return _scattered(rng, count, draw)


def _crumbs(rng: Generator) -> np.ndarray:
    def draw(tile: np.ndarray, centre: tuple[int, int], tone: int) -> None:
        corners = np.array(centre) + rng.uniform(-10, 10, (4, 2))
        cv2.fillConvexPoly(tile, cv2.convexHull(corners.astype(np.int32)), tone, cv2.LINE_AA)

    return _scattered(rng, 220, draw)


def _script(rng: Generator) -> np.ndarray:
    def draw(tile: np.ndarray, centre: tuple[int, int], tone: int) -> None:
        cv2.putText(tile, chr(rng.integers(48, 91)), centre, int(rng.integers(0, 5)), 0.9, tone, 2, cv2.LINE_AA)

    return _scattered(rng, 110, draw)


def _cells(rng: Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells of random points: distance to the nearest point, and that point's number (from 1)."""
    empty = np.full((TILE_SIZE, TILE_SIZE), 255, np.uint8)
    empty[rng.integers(0, TILE_SIZE, count), rng.integers(0, TILE_SIZE, count)] = 0
    return cv2.distanceTransformWithLabels(empty, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)


def _cell_tones(rng: Generator) -> np.ndarray:
    labels = _cells(rng, 110)[1]
    return rng.uniform(0, 1, labels.max() + 1)[labels]


def _cell_walls(rng: Generator, width: int) -> np.ndarray:
    labels = _cells(rng, 90)[1].astype(np.float32)
    wall = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    return cv2.dilate(wall.astype(np.float32), np.ones((width, width)))


_TEXTURES: dict[str, Callable[[Generator], np.ndarray]] = {
    "plain": lambda rng: np.zeros((TILE_SIZE, TILE_SIZE)),
    "grain_fine": lambda rng: _spectral_noise(rng, lambda fy, fx: np.exp(-((np.hypot(fy, fx) / 70) ** 2))),
    "grain_medium": lambda rng: _spectral_noise(rng, lambda fy, fx: np.exp(-((np.hypot(fy, fx) / 30) ** 2))),
    "grain_coarse": lambda rng: _spectral_noise(rng, lambda fy, fx: np.exp(-((np.hypot(fy, fx) / 12) ** 2))),
    "clouds_soft": lambda rng: _clouds(rng, 2.2),
    "clouds_rough": lambda rng: _clouds(rng, 1.4),
    "turbulence": lambda rng: np.abs(_clouds(rng, 1.9)),
    "ridges": lambda rng: (1 - np.abs(_band(rng, 7))).clip(0) ** 4,
    "mottle_fine": lambda rng: _band(rng, 16),
    "mottle_coarse": lambda rng: _band(rng, 7),
    "leopard": lambda rng: np.tanh(6 * _band(rng, 10) - 3),
    "maze": lambda rng: np.tanh(8 * _band(rng, 9)),
    "islands": lambda rng: np.tanh(8 * _clouds(rng, 2.2)),
    "marble": lambda rng: np.sin(9 * _clouds(rng, 2.6)),
    "contours": lambda rng: (np.sin(14 * _clouds(rng, 3.0)) > 0.8).astype(np.float32),
    "brushed": lambda rng: _streaks(rng, 2, 70),
    "fibrous": lambda rng: _streaks(rng, 8, 45),
    "rolled": lambda rng: _streaks(rng, 1, 14),
    "wood": lambda rng: np.sin(2 * np.pi * _phase(rng, 0.35)) + 0.4 * _streaks(rng, 40, 2),
    "stripes_soft": lambda rng: np.sin(2 * np.pi * _phase(rng)),
    "stripes_hard": lambda rng: (_phase(rng) % 1 > rng.uniform(0.4, 0.6)).astype(np.float32),
    "stripes_thin": lambda rng: (_phase(rng) % 1 > rng.uniform(0.8, 0.88)).astype(np.float32),
    "stripes_saw": lambda rng: _phase(rng) % 1,
    "stripes_double": lambda rng: np.sin(2 * np.pi * (p := _phase(rng))) + np.sin(6 * np.pi * p),
    "stripes_wavy": lambda rng: np.sin(2 * np.pi * _phase(rng, 0.15)),
    "zigzag": _zigzag,
    "ripples": _ripples,
    "checks": _checks,
    "triangles": _triangles,
    "diamonds": _diamonds,
    "tiles": lambda rng: _joints(rng, 0.0, 1.0),
    "bricks": lambda rng: _joints(rng, 0.5, 2.0),
    "dots_square": lambda rng: _dots(rng, 0.0),
    "dots_staggered": lambda rng: _dots(rng, 0.5),
    "rings": _rings,
    "crosses": _crosses,
    "dashes": _dashes,
    "hexagons": _hexagons,
    "weave": lambda rng: _weave(rng, 1),
    "twill": lambda rng: _weave(rng, 3),
    "basket": _basket,
    "knit": _knit,
    "spots_sparse": lambda rng: _discs(rng, 45, 9),
    "spots_dense": lambda rng: _discs(rng, 260, 14),
    "bubbles": lambda rng: _discs(rng, 130, 18, 2),
    "grains": lambda rng: _ovals(rng, 260, 13, 5, 180),
    "leaves": lambda rng: _ovals(rng, 170, 22, 8, 25),
    "crumbs": _crumbs,
    "scratches": lambda rng: _hairs(rng, 45, 130, 0.0),
    "hairs": lambda rng: _hairs(rng, 120, 55, 0.8),
    "straw": lambda rng: _hairs(rng, 380, 30, 0.05),
    "script": _script,
    "cells": _cell_tones,
    "cell_walls": lambda rng: _cell_walls(rng, 3),
    "leather": lambda rng: -_cells(rng, 160)[0],
    "mosaic": lambda rng: _cell_tones(rng) - 1.5 * _cell_walls(rng, 5),
}
TEXTURE_KINDS: tuple[str, ...] = tuple(_TEXTURES)


@cache
def texture_tile(kind: int, variant: int) -> np.ndarray:
    """The grey relief of one texture.

    Args:
        kind: index into `TEXTURE_KINDS`.
        variant: 0 .. TILE_VARIANTS - 1.

    Returns:
        (TILE_SIZE, TILE_SIZE) uint8; its 1 % and 99 % quantiles lie at 0 and 255 (a flat tile is 128). Do not write to it.
    """
    rng = np.random.default_rng((TILE_SEED, kind, variant))
    relief = np.asarray(_TEXTURES[TEXTURE_KINDS[kind]](rng), np.float32)
    low, high = np.quantile(relief, (0.01, 0.99))
    if high - low < 1e-6:
        low, high = relief.min() - 0.5, relief.max() + 0.5
    return np.clip((relief - low) / (high - low) * 255, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Outlines: every function returns closed contours, each (points, 2) as (x, y) with the shape inside the unit circle.
# Contours inside others are holes.


def _circle(radius: float = 1.0, start: float = 0.0, turn: float = 2 * np.pi, points: int = 28) -> np.ndarray:
    angle = start + np.linspace(0, turn, points)
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _regular(corners: int, radius: float = 1.0) -> np.ndarray:
    return _circle(radius, 0.0, 2 * np.pi * (1 - 1 / corners), corners)


def _box(half_width: float, half_height: float) -> np.ndarray:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (half_width, half_height)


def _superellipse(rng: Generator, power: float) -> np.ndarray:
    circle = _circle(points=36)
    return np.sign(circle) * np.abs(circle) ** power * (0.8, rng.uniform(0.3, 0.8))


def _polygon(rng: Generator) -> np.ndarray:
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 9)))
    return rng.uniform(0.6, 1, len(angle))[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def _star(rng: Generator) -> np.ndarray:
    points = int(rng.integers(4, 9))
    radius = np.where(np.arange(2 * points) % 2, rng.uniform(0.35, 0.7), 1.0)
    return _regular(2 * points) * radius[:, None]


def _blob(rng: Generator) -> np.ndarray:
    circle = _circle(points=40)
    angle = np.arctan2(circle[:, 1], circle[:, 0])
    waves = sum(rng.normal(0, 0.3 / n) * np.cos(n * angle + rng.uniform(0, 6.3)) for n in range(1, 6))
    radius = np.exp(waves)
    return circle * (radius / radius.max())[:, None]


def _gear(rng: Generator) -> np.ndarray:
    teeth = int(rng.integers(7, 14))
    return _regular(4 * teeth) * np.where(np.arange(4 * teeth) % 4 < 2, 1.0, rng.uniform(0.75, 0.88))[:, None]


def _cross(rng: Generator) -> np.ndarray:
    a = rng.uniform(0.18, 0.4)
    quarter = [(1, a), (a, a), (a, 1)]
    quarter_turn = np.array([[0, 1], [-1, 0]])
    arms = [np.array(quarter) @ np.linalg.matrix_power(quarter_turn, n) for n in range(4)]
    return np.concatenate(arms) * 0.97


def _capsule(half_width: float) -> np.ndarray:
    right = _circle(half_width, -np.pi / 2, np.pi, 12) + (1 - half_width, 0)
    return np.concatenate([right, -right])


def _bent(rng: Generator, width: float, bend: float) -> np.ndarray:
    """A strip along x of half width `width` whose middle line is a random smooth curve of height `bend`."""
    x = np.linspace(-1, 1, 18)
    y = bend * (rng.uniform(-1, 1) * (x * x - 0.4) + rng.uniform(-1, 1) * np.sin(np.pi * x + rng.uniform(0, 6.3)))
    line = np.stack([x, y], 1)
    tangent = np.gradient(line, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1) / np.linalg.norm(tangent, axis=1, keepdims=True)
    return np.concatenate([line + width * normal, (line - width * normal)[::-1]])


def _step(rng: Generator) -> np.ndarray:
    """A lead that is straight, kinks once, and goes on."""
    kink, rise, w = rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5), rng.uniform(0.05, 0.12)
    line = np.array([[-1, 0], [kink, 0], [kink + 0.2, rise], [1, rise]])
    return np.concatenate([line + (0, w), (line - (0, w))[::-1]])


def _legs(rng: Generator) -> list[np.ndarray]:
    count, width = int(rng.integers(2, 6)), rng.uniform(0.25, 0.6)
    centres = np.linspace(-0.7, 0.7, count)
    return [_box(0.7, width * 0.7 / count) * (1, 1) + (0, c) for c in centres]


def _comb(rng: Generator) -> list[np.ndarray]:
    legs = [leg + (0.25, 0) for leg in _legs(rng)]
    return [_box(0.25, 0.85) - (0.7, 0), *legs]


def _crescent(rng: Generator) -> np.ndarray:
    inner = _circle(1.0, -2.2, 4.4, 20)[::-1] * (0.65, 0.8) + (rng.uniform(0.2, 0.4), 0)
    return np.concatenate([_circle(1.0, -2.2, 4.4, 20), inner]) * -1


def _arc(rng: Generator) -> np.ndarray:
    turn, width = rng.uniform(1.5, 5.0), rng.uniform(0.1, 0.4)
    return np.concatenate([_circle(1.0, 0, turn), _circle(1 - width, 0, turn)[::-1]])


def _glyph(rng: Generator) -> list[np.ndarray]:
    """The outline of a letter or digit, traced from OpenCV's stroke fonts."""
    canvas = np.zeros((64, 64), np.uint8)
    cv2.putText(canvas, chr(rng.integers(48, 91)), (12, 52), int(rng.integers(0, 5)), 1.7, 255, int(rng.integers(3, 8)))
    contours, _ = cv2.findContours(canvas, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [(c[:, 0] - 32) / 34 for c in contours]


_SHAPES: dict[str, Callable[[Generator], list[np.ndarray]]] = {
    "disc": lambda rng: [_circle()],
    "ellipse": lambda rng: [_circle() * (1, rng.uniform(0.35, 0.8))],
    "rectangle": lambda rng: [_box(0.9, rng.uniform(0.25, 0.9))],
    "rounded": lambda rng: [_superellipse(rng, rng.uniform(0.25, 0.5))],
    "triangle": lambda rng: [_regular(3) * (1, rng.uniform(0.6, 1.1))],
    "polygon": lambda rng: [_polygon(rng)],
    "star": lambda rng: [_star(rng)],
    "blob": lambda rng: [_blob(rng)],
    "ring": lambda rng: [_circle(), _circle(rng.uniform(0.3, 0.8))],
    "frame": lambda rng: [_box(0.9, h := rng.uniform(0.5, 0.9)), _box(0.9 * (s := rng.uniform(0.5, 0.8)), h * s)],
    "nut": lambda rng: [_regular(6), _circle(rng.uniform(0.35, 0.6))],
    "gear": lambda rng: [_gear(rng), _circle(rng.uniform(0.15, 0.5))],
    "screw_head": lambda rng: [_circle(), _cross(rng) * rng.uniform(0.45, 0.7)],
    "slotted": lambda rng: [_circle(), _box(0.75, rng.uniform(0.1, 0.2))],
    "cross": lambda rng: [_cross(rng)],
    "capsule": lambda rng: [_capsule(rng.uniform(0.12, 0.4))],
    "half_disc": lambda rng: [_circle(1.0, 0, np.pi)],
    "crescent": lambda rng: [_crescent(rng)],
    "arc": lambda rng: [_arc(rng)],
    "strip": lambda rng: [_box(1, rng.uniform(0.03, 0.14))],
    "wire": lambda rng: [_bent(rng, rng.uniform(0.03, 0.1), 0.7)],
    "banana": lambda rng: [_bent(rng, rng.uniform(0.12, 0.25), 0.6)],
    "kinked": lambda rng: [_step(rng)],
    "legs": _legs,
    "comb": _comb,
    "glyph": _glyph,
}
SHAPE_KINDS: tuple[str, ...] = ("ground", *_SHAPES)
BODIES = ("rectangle", "rounded", "disc", "ellipse", "polygon", "blob", "capsule", "half_disc", "frame", "banana", "gear")
LEADS = ("legs", "wire", "kinked", "strip")
SMALL_PARTS = (
    *("disc", "ring", "rectangle", "strip", "legs", "glyph"),
    *("screw_head", "nut", "wire", "kinked", "capsule", "cross"),
)


# ---------------------------------------------------------------------------------------------------------------------
# Surfaces


def _colour(rng: Generator) -> np.ndarray:
    """An RGB colour in 0..255 (float); half of them nearly grey, as man-made things are."""
    value = rng.uniform(0.04, 1)
    saturation = rng.uniform(0, 0.25) if rng.uniform() < 0.5 else rng.uniform(0.2, 1)
    wheel = np.abs((rng.uniform() * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return 255 * value * (1 - saturation * (1 - np.clip(wheel, 0, 1)))


def _surface(rng: Generator, palette: np.ndarray, shape: tuple[int, int], unit: float) -> tuple[np.ndarray, int]:
    """A coloured texture of `shape` (height, width): the RGB patch, uint8, and the index of its kind."""
    kind = 0 if rng.uniform() < PLAIN_SHARE else int(rng.integers(1, len(TEXTURE_KINDS)))
    first = palette[rng.integers(len(palette))]
    if kind == 0:
        return np.full((*shape, 3), first, np.uint8), kind
    angle, zoom = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(0.2), np.log(0.9))) * unit**0.5
    c, s = np.cos(angle) * zoom, np.sin(angle) * zoom
    turn = np.array([[c, -s, rng.uniform(-300, 0)], [s, c, rng.uniform(-300, 0)]], np.float32)
    tile = texture_tile(kind, int(rng.integers(TILE_VARIANTS)))
    relief = cv2.warpAffine(tile, turn, shape[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    strength = rng.uniform(0.15, 1)
    second = palette[rng.integers(len(palette))] if rng.uniform() < 0.5 else first * rng.uniform(0.2, 1.8)
    ramp = np.linspace(-0.5, 0.5, 256)[:, None] * strength + 0.5 * rng.uniform(0.5, 1.2)
    colours = np.clip(first + (second - first) * ramp, 0, 255).astype(np.uint8)
    return cv2.LUT(cv2.merge([relief] * 3), colours[:, None, :]), kind


def _slope(shape: tuple[int, int], angle: float) -> np.ndarray:
    """A plane rising from -1 to 1 across `shape` in direction `angle`, float32."""
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None] * np.float32(np.cos(angle))
    return (x + y) / np.float32(abs(np.sin(angle)) + abs(np.cos(angle)))


def _shading(rng: Generator, mask: np.ndarray, light: float) -> np.ndarray | None:
    """Brightness factors over a shape's box, float32, or None for flat shapes.

    Args:
        mask: (height, width) uint8, 255 inside.
        light: direction from which the light falls, radians.
    """
    style = rng.choice(4, p=(0.4, 0.2, 0.28, 0.12))
    if style == 0:
        return None
    if style == 1:  # a slope
        return 1 + rng.uniform(0.1, 0.6) * _slope(mask.shape, rng.uniform(0, 6.3))
    if style == 2:  # a dome: height grows from the outline inwards, the light comes from the side
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
        rim = max(2.0, float(depth.max()) * rng.uniform(0.2, 1))
        depth = np.minimum(depth * np.float32(1 / rim), 1)
        height = cv2.GaussianBlur(np.sqrt(depth * (2 - depth)) * rim, (3, 3), 0)
        facing = -cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=np.cos(light) / 8)
        facing -= cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=np.sin(light) / 8)
        return np.clip(1 + rng.uniform(0.3, 1) * facing, 0.1, 2.2)
    bands = np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, 7), rng.uniform(0.4, 1.7, 7))  # bands of a bright metal
    position = ((_slope(mask.shape, rng.uniform(0, 6.3)) + 1) * 127).astype(np.uint8)
    return cv2.LUT(position, bands.astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and what is where in it.

    Attributes:
        image: (size, size, 3) uint8 RGB.
        texture: (size, size) uint8, index into `TEXTURE_KINDS`.
        shape: (size, size) uint8, index into `SHAPE_KINDS`; 0 is the ground.
        instance: (size, size) uint8, number of the topmost shape; 0 is the ground. Edges lie where it changes.
    """

    image: np.ndarray
    texture: np.ndarray
    shape: np.ndarray
    instance: np.ndarray


class _Easel:
    """A picture in the making; `place` puts one shape on top of what is there."""

    def __init__(self, rng: Generator, size: int) -> None:
        self.rng, self.size, self.unit = rng, size, size / REFERENCE_SIZE
        self.light = rng.uniform(0, 2 * np.pi)
        self.palette = np.array([_colour(rng) for _ in range(rng.integers(3, 8))])
        self.image, texture = _surface(rng, self.palette, (size, size), self.unit)
        self.labels = np.zeros((size, size, 3), np.uint8)  # texture, shape, instance
        self.labels[..., 0] = texture
        self.instances = 0

    def place(self, kind: str, centre: np.ndarray, radius: float, angle: float, shadow: float = 0.0) -> None:
        """Args: `centre` (x, y) and `radius` in pixels, `angle` in radians, `shadow` = darkness of the cast shadow, 0..1."""
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * radius
        contours = [contour @ turn + centre for contour in _SHAPES[kind](self.rng)]
        reach = 3 + radius * (0.25 if shadow else 0)  # room for soft rims and the shadow
        points = np.concatenate(contours)
        x0, y0 = np.maximum(np.floor(points.min(0) - reach), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(points.max(0) + reach), self.size).astype(int)
        if x1 - x0 < 3 or y1 - y0 < 3:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        fixed = [np.round((c - (x0, y0)) * 2**SUBPIXEL_BITS).astype(np.int32) for c in contours]
        cv2.fillPoly(mask, fixed, 255, cv2.LINE_AA, SUBPIXEL_BITS)
        below = self.image[y0:y1, x0:x1]
        if shadow:
            below[:] = self._shaded(below, mask, radius, shadow)
        patch, texture = _surface(self.rng, self.palette, mask.shape, self.unit)
        factors = _shading(self.rng, mask, self.light)
        if factors is not None:
            patch = cv2.multiply(patch, cv2.merge([factors] * 3), dtype=cv2.CV_8U)
        opacity = mask.astype(np.float32) * np.float32(1 / 255)
        below[:] = cv2.blendLinear(patch, np.ascontiguousarray(below), opacity, 1 - opacity)
        self.instances = min(self.instances + 1, LAST_INSTANCE)
        self.labels[y0:y1, x0:x1][mask > 127] = (texture, SHAPE_KINDS.index(kind), self.instances)

    def _shaded(self, below: np.ndarray, mask: np.ndarray, radius: float, shadow: float) -> np.ndarray:
        shift = np.array([np.cos(self.light), np.sin(self.light)]) * min(radius * 0.2, 6 * self.unit)
        moved = cv2.warpAffine(mask, np.float32([[1, 0, shift[0]], [0, 1, shift[1]]]), mask.shape[::-1])
        side = 2 * int(1 + 1.5 * self.unit) + 1
        factors = cv2.blur(moved, (side, side)).astype(np.float32) * np.float32(-shadow / 255) + 1
        return cv2.multiply(below, cv2.merge([factors] * 3), dtype=cv2.CV_8U)

    def clutter(self) -> None:
        """Dead leaves: many shapes anywhere, radii by a power law."""
        rng = self.rng
        names = tuple(_SHAPES)
        for _ in range(int(rng.integers(15, 50))):
            radius = min(self.unit * 6 * rng.uniform(0.02, 1) ** -0.7, self.size * 0.4)
            kind, centre, angle = names[rng.integers(len(names))], rng.uniform(0, self.size, 2), rng.uniform(0, 6.3)
            shadow = rng.uniform(0.2, 0.8) if rng.uniform() < 0.2 else 0.0
            self.place(kind, centre, radius, angle, shadow)

    def objects(self) -> None:
        """A few large things on the ground, each with parts on it and leads beside it."""
        rng = self.rng
        for _ in range(int(rng.integers(1, 6))):
            centre, radius = rng.uniform(0.1, 0.9, 2) * self.size, self.unit * rng.uniform(16, 60)
            angle, shadow = rng.uniform(0, 6.3), rng.uniform(0.2, 0.8) * (rng.uniform() < 0.6)
            axis = np.array([np.cos(angle), np.sin(angle)])
            if rng.uniform() < 0.5:
                leads = LEADS[rng.integers(len(LEADS))]
                self.place(leads, centre + axis * radius * 1.3, radius * rng.uniform(0.5, 1), angle, shadow)
            self.place(BODIES[rng.integers(len(BODIES))], centre, radius, angle, shadow)
            for _ in range(int(rng.integers(0, 6))):
                offset = rng.uniform(-0.6, 0.6, 2) * radius
                part = SMALL_PARTS[rng.integers(len(SMALL_PARTS))]
                self.place(part, centre + offset, radius * rng.uniform(0.1, 0.4), angle + rng.integers(4) * np.pi / 2)

    def array(self) -> None:
        """One shape repeated on a lattice, as on a perforated board or in a tray."""
        rng = self.rng
        kind, pitch = SMALL_PARTS[rng.integers(len(SMALL_PARTS))], self.unit * rng.uniform(16, 50)
        radius, angle, lean = pitch * rng.uniform(0.2, 0.48), rng.uniform(0, 6.3), rng.uniform(-0.4, 0.4)
        jitter = rng.uniform(0, 0.08) * pitch
        axes = pitch * np.array([[np.cos(lean), np.sin(lean)], [-np.sin(lean), np.cos(lean)]])
        reach = int(self.size / pitch / 2) + 2
        for i in range(-reach, reach + 1):
            for j in range(-reach, reach + 1):
                centre = self.size / 2 + np.array([i, j]) @ axes + rng.normal(0, 1, 2) * jitter
                if np.all((centre > -radius) & (centre < self.size + radius)):
                    self.place(kind, centre, radius, angle)

    def photograph(self) -> np.ndarray:
        """What a camera would make of it: uneven light, blur, noise, sometimes no colour."""
        rng, image = self.rng, self.image
        if rng.uniform() < 0.5:
            light = 1 + rng.uniform(0.1, 0.5) * _slope(image.shape[:2], rng.uniform(0, 6.3))
            image = cv2.multiply(image, cv2.merge([light] * 3), dtype=cv2.CV_8U)
        if rng.uniform() < 0.6:
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.35, 1.2) * self.unit**0.5)
        if rng.uniform() < 0.1:
            image = cv2.merge([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)] * 3)
        if rng.uniform() < 0.6:
            noise = rng.standard_normal(image.shape[:2], np.float32) * np.float32(rng.uniform(1, 8))
            image = cv2.add(image, cv2.merge([noise] * 3), dtype=cv2.CV_8U)
        return image


def render_labelled_picture(rng: Generator, size: int) -> LabelledPicture:
    """Draw one picture with its labels.

    Args:
        rng: source of every random choice.
        size: side in pixels, at least 32.

    Raises:
        ValueError: if `size` is below 32.
    """
    if size < 32:
        raise ValueError(f"a formula-made picture needs a side of at least 32 pixels, not {size}")
    easel = _Easel(rng, size)
    scene = rng.uniform()
    if scene < 0.45:
        easel.clutter()
    elif scene < 0.85:
        easel.objects()
    else:
        easel.array()
        easel.objects()
    texture, shape, instance = cv2.split(easel.labels)
    return LabelledPicture(easel.photograph(), texture, shape, instance)


def render_picture(rng: Generator, size: int) -> np.ndarray:
    """Draw one picture: (size, size, 3) uint8 RGB. See `render_labelled_picture` for arguments and errors."""
    return render_labelled_picture(rng, size).image
