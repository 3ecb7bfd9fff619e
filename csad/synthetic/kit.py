"""The drawing kit shared by the five synthetic categories.

A `Canvas` is a square table top seen from above. Things are put on it one after the other, each a `Shape` (outline)
made of a `Material`; the canvas rounds the outline into a surface, lights it, lets it cast a shadow and writes its
component class into the label map. `photograph` is the camera: it turns the finished canvas into an 8-bit picture.

Units: every length and position is a fraction of the image side, x to the right, y downwards, so that the same
drawing works at any resolution. Angles are radians, turning from x towards y. Colours are sRGB triples in 0..1.
A `Shape` is a list of polygons, float arrays (N, 2), whose union is the outline.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

Shape = list[np.ndarray]
Point = Sequence[float] | np.ndarray  # (x, y)
Relief = Callable[[np.ndarray, np.ndarray], np.ndarray]  # grids of x and y -> heights
Color = tuple[float, float, float]

DISPLAY_GAMMA = 2.2
SUBPIXEL_BITS = 4  # polygon corners are rasterised at 1/16 pixel
CURVE_POINTS = 48
REFERENCE_SIDE = 512  # lens blur is stated in pixels of a picture of this side
SMALL_SIDE = 256  # below it pictures are drawn at twice their size and reduced


@dataclass(frozen=True)
class Material:
    """What a surface looks like.

    Args:
        color: sRGB triple in 0..1.
        texture: relative strength of the colour's unevenness.
        grain: size of that unevenness, fraction of the side.
        bump: roughness of the surface, as a slope (0 smooth, 0.5 very rough).
        gloss: strength of the highlight.
        shininess: sharpness of the highlight.
        metal: 0 for plastic, paper or fruit, 1 for bare metal, which mirrors its surroundings.
        opacity: 1 solid, towards 0 see-through.
    """

    color: Color
    texture: float = 0.06
    grain: float = 0.01
    bump: float = 0.0
    gloss: float = 0.0
    shininess: float = 20.0
    metal: float = 0.0
    opacity: float = 1.0


@dataclass(frozen=True)
class Patch:
    """Where a thing landed: its coverage (0..1) in the window of the canvas given by two slices."""

    window: tuple[slice, slice]
    coverage: np.ndarray


@dataclass(frozen=True)
class Snapshot:
    """A copy of a canvas: image (side, side, 3) in linear light and labels (side, side)."""

    image: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Defect:
    """One kind of anomaly.

    Args:
        name: as it appears in defects_config.json.
        kind: "logical_anomalies" or "structural_anomalies".
        saturation: enough of an annotated region to count as found: a share of the region where `relative`,
            else an area as a fraction of the image (for a missing thing, the thing's own area).
        relative: how to read `saturation`.
    """

    name: str
    kind: str
    saturation: float = 1.0
    relative: bool = True


def logical(name: str, area: float | None = None) -> Defect:
    """A logical anomaly, found once `area` (fraction of the image; None: the whole region) is."""
    return (
        Defect(name, "logical_anomalies") if area is None else Defect(name, "logical_anomalies", area, False)
    )


def structural(name: str, share: float = 1.0) -> Defect:
    """A structural anomaly, found once `share` of its region is."""
    return Defect(name, "structural_anomalies", share)


@dataclass(frozen=True)
class Category:
    """What a category module offers: its component classes (index 0 is the background), its anomalies, its painter.

    `draw(canvas, defect_name)` paints one picture; None paints a good one.
    """

    name: str
    classes: tuple[str, ...]
    defects: tuple[Defect, ...]
    draw: Callable[["Canvas", str | None], None]

    def defects_of(self, kind: str) -> list[Defect]:
        """The anomalies of one kind, in order; empty for "good"."""
        return [defect for defect in self.defects if defect.kind == kind]

    def pixel_value(self, name: str) -> int:
        """The ground-truth mask value of an anomaly: 255 for the first, downwards."""
        return 255 - [defect.name for defect in self.defects].index(name)


# ---------------------------------------------------------------------------------------------------------- shapes


def unit(angle: float) -> np.ndarray:
    """The direction (2,) at `angle`."""
    return np.array([np.cos(angle), np.sin(angle)])


def place(shape: Shape, center: Point, angle: float = 0.0, scale: float = 1.0) -> Shape:
    """A shape drawn around the origin, scaled, turned and moved to `center`."""
    turn = np.array([unit(angle), unit(angle + np.pi / 2)]) * scale
    return [polygon @ turn + np.asarray(center) for polygon in shape]


class Pose:
    """Where a thing lies on the table: a frame of its own, a little moved, turned and resized for every picture.

    Args:
        center: where its origin lies on average.
        shift, turn, zoom: the largest deviations of place (one number or one per axis), angle and size (as a share).
        mirrored: swap left and right inside the frame.
        base_turn: the average angle.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        center: Point,
        shift: float | Point,
        turn: float,
        zoom: float,
        mirrored: bool = False,
        base_turn: float = 0.0,
    ):
        self.center = np.asarray(center) + rng.uniform(-1, 1, 2) * shift
        self.angle = base_turn + rng.uniform(-turn, turn)
        self.scale = jitter(rng, zoom)
        self.flip = np.array([-1.0 if mirrored else 1.0, 1.0])

    def locate(self, shape: Shape) -> Shape:
        """A shape given in the thing's frame, on the canvas."""
        return place([polygon * self.flip for polygon in shape], self.center, self.angle, self.scale)

    def point(self, x: float, y: float) -> np.ndarray:
        """A point given in the thing's frame, on the canvas, (2,)."""
        return self.locate([np.array([[x, y]])])[0][0]


def ellipse(center: Point, radius_x: float, radius_y: float | None = None, angle: float = 0.0) -> Shape:
    """An ellipse; a circle when `radius_y` is left out."""
    turn = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    points = np.stack([radius_x * np.cos(turn), (radius_y or radius_x) * np.sin(turn)], axis=1)
    return place([points], center, angle)


def regular_polygon(center: Point, radius: float, corners: int, angle: float = 0.0) -> Shape:
    """A regular polygon with corners at `radius`."""
    turn = angle + np.arange(corners) * 2 * np.pi / corners
    return [np.asarray(center) + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)]


def rounded_box(center: Point, width: float, height: float, corner: float = 0.0, angle: float = 0.0) -> Shape:
    """A rectangle with rounded corners."""
    corner = min(corner, width / 2, height / 2)
    quarter = np.linspace(0, np.pi / 2, 8)
    points = [
        np.array([sx * (width / 2 - corner), sy * (height / 2 - corner)])
        + corner * np.stack([np.cos(start + quarter), np.sin(start + quarter)], axis=1)
        for sx, sy, start in ((1, 1, 0), (-1, 1, np.pi / 2), (-1, -1, np.pi), (1, -1, 1.5 * np.pi))
    ]
    return place([np.concatenate(points)], center, angle)


def blob(center: Point, radius: float, rng: np.random.Generator, roughness: float = 0.15) -> Shape:
    """An irregular round patch: a circle whose radius wavers by about `roughness`."""
    turn = np.linspace(0, 2 * np.pi, CURVE_POINTS, endpoint=False)
    wave = sum(rng.normal() / k * np.cos(k * turn + rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
    reach = radius * np.clip(1 + roughness * wave, 0.4, 1.6)
    return [np.asarray(center) + reach[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)]


def bezier(points: Sequence[Point], samples: int = CURVE_POINTS) -> np.ndarray:
    """A Bezier curve through its first and last control point, as a path (samples, 2)."""
    level = [np.asarray(point, float)[None] for point in points]
    t = np.linspace(0, 1, samples)[:, None]
    while len(level) > 1:
        level = [(1 - t) * a + t * b for a, b in zip(level, level[1:])]
    return level[0]


def crooked_line(start: Point, end: Point, rng: np.random.Generator, waver: float = 0.08) -> np.ndarray:
    """A path (7, 2) from start to end that strays sideways by about `waver` of its length: a crack, a scratch."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    along = np.linspace(0, 1, 7)[:, None]
    sideways = np.array([-(end - start)[1], (end - start)[0]])
    stray = rng.normal(0, waver, (7, 1)) * np.sin(np.pi * along)
    return start + along * (end - start) + stray * sideways


def stroke(path: np.ndarray, width: float) -> Shape:
    """A path (N, 2) drawn with a round pen."""
    step = np.diff(path, axis=0)
    length = np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-9)
    side = np.stack([-step[:, 1], step[:, 0]], axis=1) / length * width / 2
    quads = [np.array([a + n, b + n, b - n, a - n]) for a, b, n in zip(path, path[1:], side)]
    return quads + [joint for point in path for joint in regular_polygon(point, width / 2, 16)]


def distance_to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance (N,) of points (N, 2) from the segment start-end."""
    span = end - start
    t = np.clip((points - start) @ span / max(span @ span, 1e-12), 0, 1)
    return np.linalg.norm(points - start - t[:, None] * span, axis=1)


def ridges(origin: np.ndarray, direction: np.ndarray, pitch: float, height: float) -> Relief:
    """A relief for `Canvas.add`: waves of a given pitch and height that follow one another along `direction`."""

    def relief(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        along = (x - origin[0]) * direction[0] + (y - origin[1]) * direction[1]
        return height * np.cos(2 * np.pi * along / pitch)

    return relief


def shade(color: Color, factor: float) -> Color:
    """A darker version of a colour (factor below 1)."""
    red, green, blue = color
    return factor * red, factor * green, factor * blue


def vary(rng: np.random.Generator, color: Color, brightness: float = 0.08, tint: float = 0.03) -> Color:
    """The colour of one individual: brighter or darker by about `brightness`, each channel off by about `tint`."""
    gain = (1 + rng.uniform(-brightness, brightness)) * (1 + rng.uniform(-tint, tint, 3))
    red, green, blue = np.clip(np.asarray(color) * gain, 0.0, 1.0)
    return red, green, blue


def jitter(rng: np.random.Generator, spread: float) -> float:
    """A factor within 1 +- spread."""
    return 1 + rng.uniform(-spread, spread)


# ---------------------------------------------------------------------------------------------------------- canvas


class Canvas:
    """The table top being painted.

    Attributes:
        image: (side, side, 3) float32, linear light.
        labels: (side, side) uint8, component classes, 0 = background.
        regions: (defect name, (side, side) bool) for every annotated region.
        rng: draws everything that decides what is in the picture.
        side: pixels.

    Surface noise comes from a generator of its own, so the arrangement does not depend on the resolution.
    """

    def __init__(self, side: int, rng: np.random.Generator):
        self.side = side
        self.rng = rng
        self.texture_rng = rng.spawn(1)[0]
        self.image = np.zeros((side, side, 3), np.float32)
        self.labels = np.zeros((side, side), np.uint8)
        self.regions: list[tuple[str, np.ndarray]] = []
        azimuth = rng.uniform(-0.85, -0.35) * np.pi  # from behind, mostly from the left
        elevation = np.deg2rad(rng.uniform(42, 66))
        self.light = np.append(np.cos(elevation) * unit(azimuth), np.sin(elevation)).astype(np.float32)
        self.ambient = rng.uniform(0.35, 0.55)

    def noise(self, shape: tuple[int, int], grain: float) -> np.ndarray:
        """Smooth noise (float32, about standard normal), features of size `grain`, in a window of `shape` pixels."""
        cell = max(grain * self.side, 1.0)
        coarse = tuple(int(np.ceil(length / cell)) + 3 for length in shape)
        field = self.texture_rng.standard_normal(coarse, dtype=np.float32)
        offset = self.texture_rng.uniform(0, 1, 2) * cell
        warp = np.array(
            [[1 / cell, 0, 1 + offset[0] / cell], [0, 1 / cell, 1 + offset[1] / cell]], np.float32
        )
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        return 1.2 * cv2.warpAffine(field, warp, shape[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT)

    def cover(self, shape: Shape, holes: Sequence[np.ndarray] = (), margin: float = 0.0) -> Patch | None:
        """Rasterise a shape, antialiased, in a window `margin` wider than it; None when it lies outside the canvas."""
        corners = np.concatenate(shape) * self.side
        pad = margin * self.side + 2
        low = np.clip(np.floor(corners.min(axis=0) - pad), 0, self.side).astype(int)
        high = np.clip(np.ceil(corners.max(axis=0) + pad), 0, self.side).astype(int)
        if (high <= low).any():
            return None
        mask = np.zeros((high[1] - low[1], high[0] - low[0]), np.uint8)
        for polygons, value in ((shape, 255), (holes, 0)):
            for polygon in polygons:
                fixed = np.round((polygon * self.side - 0.5 - low) * (1 << SUBPIXEL_BITS)).astype(np.int32)
                cv2.fillPoly(mask, [fixed], value, cv2.LINE_AA, SUBPIXEL_BITS)
        return Patch((slice(low[1], high[1]), slice(low[0], high[0])), mask.astype(np.float32) / 255)

    def cast_shadow(self, patch: Patch, lift: float, strength: float) -> None:
        """Darken what lies under a thing: a crisp contact shadow, and a soft one thrown `lift` away from the light."""
        shift = -self.light[:2] / self.light[2] * lift * self.side
        move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
        thrown = cv2.warpAffine(patch.coverage, move, patch.coverage.shape[::-1])
        thrown = cv2.GaussianBlur(thrown, (0, 0), max(0.6 * lift * self.side, 0.6))
        contact = cv2.GaussianBlur(patch.coverage, (0, 0), max(0.006 * self.side, 0.6))
        self.image[patch.window] *= (1 - strength * np.maximum(thrown, 0.7 * contact))[..., None]

    def add(
        self,
        shape: Shape,
        material: Material,
        *,
        label: int | None = None,
        holes: Sequence[np.ndarray] = (),
        rounding: float = 0.01,
        lift: float = 0.0,
        shadow: float = 0.5,
        relief: Relief | None = None,
    ) -> Patch | None:
        """Put one thing on the canvas.

        Args:
            shape, holes: outline, and what is cut out of it.
            material: its surface.
            label: component class written where it covers; None leaves the label map as it is (stains, foreign bodies
                on a component); 0 makes it background.
            rounding: the distance from the outline over which the surface bends down to the table; 0 is flat.
            lift: how high the thing stands, for its shadow; 0 casts none.
            shadow: darkness of the shadow, 0..1.
            relief: height added to the surface as a function of the (x, y) coordinate grids.

        Returns:
            Where it landed, or None when it lies outside the canvas.
        """
        patch = self.cover(shape, holes, 3 * lift)
        if patch is None:
            return None
        if lift > 0:
            self.cast_shadow(patch, lift, shadow)
        normal = self._normals(patch, material, rounding, relief)
        paint = self._shade(normal, material)
        weight = (patch.coverage * material.opacity)[..., None]
        self.image[patch.window] += weight * (paint - self.image[patch.window])
        if label is not None:
            self.labels[patch.window][patch.coverage >= 0.5] = label
        return patch

    def snapshot(self) -> "Snapshot":
        """What the canvas looks like now."""
        return Snapshot(self.image.copy(), self.labels.copy())

    def reveal(self, shape: Shape, earlier: "Snapshot") -> None:
        """Inside a shape, bring back what was there earlier, image and labels."""
        patch = self.cover(shape)
        if patch is None:
            return
        self.image[patch.window] += patch.coverage[..., None] * (
            earlier.image[patch.window] - self.image[patch.window]
        )
        inside = patch.coverage >= 0.5
        self.labels[patch.window][inside] = earlier.labels[patch.window][inside]

    def mark(self, defect: str, *areas: Shape | Patch | None) -> None:
        """Annotate one region of the ground truth: the union of shapes and of things returned by `add`."""
        region = np.zeros((self.side, self.side), bool)
        for area in areas:
            patch = area if isinstance(area, Patch) or area is None else self.cover(area)
            if patch is not None:
                region[patch.window] |= patch.coverage >= 0.5
        self.regions.append((defect, region))

    def _normals(
        self, patch: Patch, material: Material, rounding: float, relief: Relief | None
    ) -> np.ndarray:
        """Unit surface normals (h, w, 3) of a thing: its rounded edge, its relief and its roughness."""
        shape = patch.coverage.shape
        height: np.ndarray = np.zeros(shape, np.float32)
        if rounding > 0:
            inside = (patch.coverage >= 0.5).astype(np.uint8)
            depth = cv2.distanceTransform(
                cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_REPLICATE), cv2.DIST_L2, 5
            )
            t = np.clip(depth[1:-1, 1:-1] / (rounding * self.side), 0, 1)
            height += rounding * self.side * np.sqrt(t * (2 - t))
            height = cv2.GaussianBlur(height, (0, 0), max(0.12 * rounding * self.side, 0.7))
        if relief is not None:
            rows, columns = patch.window
            y, x = np.mgrid[rows, columns].astype(np.float32) / self.side
            height += (relief(x, y) * self.side).astype(np.float32)
        if material.bump > 0:
            height += material.bump * material.grain * self.side * self.noise(shape, material.grain)
        slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
        slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
        normal = np.dstack([-slope_x, -slope_y, np.ones(shape, np.float32)])
        return normal / np.sqrt((normal * normal).sum(axis=2, keepdims=True))

    def _shade(self, normal: np.ndarray, material: Material) -> np.ndarray:
        """Light (h, w, 3) coming off a surface; 1 x its colour where it lies flat and even."""
        facing = np.maximum(normal @ self.light, 0)
        light = self.ambient + (1 - self.ambient) * facing / self.light[2]
        if material.metal > 0:
            mirrored = 0.65 + 0.75 * facing**3 + 0.25 * np.cos(5 * normal[..., 0] + 3 * normal[..., 1])
            light = (1 - material.metal) * light + material.metal * mirrored
        paint = light[..., None] * to_linear(material.color)
        if material.texture > 0:
            uneven = 0.7 * self.noise(normal.shape[:2], material.grain) + 0.5 * self.noise(
                normal.shape[:2], 4 * material.grain
            )
            paint *= np.clip(1 + material.texture * uneven, 0.2, 2.0)[..., None]
        if material.gloss > 0:
            halfway = self.light + np.array([0, 0, 1], np.float32)
            glint = np.maximum(normal @ (halfway / np.linalg.norm(halfway)), 0) ** material.shininess
            paint += material.gloss * glint[..., None]
        return paint.astype(np.float32)


def to_linear(color: Color) -> np.ndarray:
    """sRGB triple -> linear light (3,) float32."""
    return np.asarray(color, np.float32) ** DISPLAY_GAMMA


def backdrop(canvas: Canvas, color: Color, texture: float = 0.05, grain: float = 0.008) -> None:
    """Cover the whole canvas with a surface of its own brightness and tint."""
    everything = [np.array([[-0.1, -0.1], [1.1, -0.1], [1.1, 1.1], [-0.1, 1.1]])]
    canvas.add(
        everything, Material(vary(canvas.rng, color, 0.10, 0.05), texture, grain, bump=0.05), rounding=0
    )


def spot(
    canvas: Canvas, defect: str, center: Point, radius: float, material: Material, crumbs: int = 4
) -> None:
    """A stain or growth on whatever is there: an irregular patch with a few specks around it, annotated as `defect`."""
    rng = canvas.rng
    patches = [canvas.add(blob(center, radius, rng), material, rounding=radius / 3)]
    for _ in range(crumbs):
        beside = np.asarray(center) + unit(rng.uniform(0, 2 * np.pi)) * radius * rng.uniform(0.9, 1.3)
        patches.append(
            canvas.add(blob(beside, radius * rng.uniform(0.15, 0.3), rng), material, rounding=radius / 8)
        )
    canvas.mark(defect, *patches)


def bite(canvas: Canvas, defect: str, center: Point, radius: float, earlier: Snapshot, raw: Material) -> None:
    """Break a piece out of the thing put on since `earlier`: a rim of raw material, and in it what lay below.

    Only what has a component class is broken; the region annotated as `defect` is the missing piece with its rim.
    """
    hole = blob((0, 0), radius, canvas.rng, 0.25)
    thing = canvas.labels != earlier.labels
    whole = canvas.image.copy()
    rim = canvas.add(place(hole, center, scale=1.25), raw, rounding=0)
    canvas.image[~thing] = whole[~thing]
    canvas.reveal(place(hole, center), earlier)
    if rim is not None:
        canvas.mark(defect, Patch(rim.window, rim.coverage * thing[rim.window]))


def groove(canvas: Canvas, defect: str, path: np.ndarray, width: float, depth: Color, edge: Color) -> None:
    """A scratch or crack along a path: a dark line with a lit edge, annotated as `defect` a little wider than it is."""
    lit = stroke(path - canvas.light[:2] * width * 0.8, width)
    canvas.add(lit, Material(edge, opacity=0.6), rounding=0)
    canvas.add(stroke(path, width), Material(depth, opacity=0.9), rounding=0)
    canvas.mark(defect, stroke(path, 2.5 * width))


# ---------------------------------------------------------------------------------------------------------- camera


def glare(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The lamps' soft reflections, none to three of them, as linear light (S, S); x and y run from -1 to 1."""
    light = np.zeros_like(x)
    for _ in range(rng.integers(0, 4)):
        center, radius = rng.uniform(-1, 1, 2), rng.uniform(0.10, 0.35, 2)
        strength = rng.uniform(0.02, 0.20)
        light += strength * np.exp(-(((x - center[0]) / radius[0]) ** 2) - ((y - center[1]) / radius[1]) ** 2)
    return light.astype(np.float32)


def photograph(canvas: Canvas, size: int) -> np.ndarray:
    """The canvas as the camera sees it: (size, size, 3) uint8 RGB, under this picture's own light, focus and noise."""
    rng = canvas.rng
    gain = np.exp(rng.normal(0, 0.16))
    temperature = rng.normal(0, 0.06)
    tint = np.exp(np.array([temperature, rng.normal(0, 0.02), -temperature]))
    tilt = rng.normal(0, 0.10, 2)
    vignette = rng.uniform(0.0, 0.30)
    gamma = np.exp(rng.normal(0, 0.09)) / DISPLAY_GAMMA
    blur = rng.uniform(0.35, 0.9) * size / REFERENCE_SIDE
    grain = rng.uniform(0.006, 0.018)

    image = (
        canvas.image
        if canvas.side == size
        else cv2.resize(canvas.image, (size, size), interpolation=cv2.INTER_AREA)
    )
    if blur > 0.2:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    y, x = (np.mgrid[:size, :size].astype(np.float32) + 0.5) / size * 2 - 1
    falloff = (1 + tilt[0] * x + tilt[1] * y) * (1 - vignette * (x * x + y * y) / 2)
    image = image * (gain * tint).astype(np.float32) * falloff[..., None]
    image += glare(rng, x, y)[..., None]
    image = np.clip(image, 0, 1.5) ** np.float32(gamma)
    image += grain * canvas.texture_rng.standard_normal(image.shape, dtype=np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Picture:
    """A finished picture: image (S, S, 3) uint8 RGB, labels (S, S) uint8, and (defect name, (S, S) bool) per region."""

    image: np.ndarray
    labels: np.ndarray
    regions: list[tuple[str, np.ndarray]]


def render(category: Category, size: int, rng: np.random.Generator, defect: str | None = None) -> Picture:
    """Paint and photograph one picture of a category.

    Args:
        size: side in pixels.
        rng: decides everything; the same state gives the same picture.
        defect: name of the anomaly, None for a good picture.
    """
    canvas = Canvas(2 * size if size < SMALL_SIDE else size, rng)
    category.draw(canvas, defect)
    image = photograph(canvas, size)
    labels = cv2.resize(canvas.labels, (size, size), interpolation=cv2.INTER_NEAREST)
    regions = [
        (name, cv2.resize(region.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) >= 0.5)
        for name, region in canvas.regions
    ]
    return Picture(image, labels, regions)
