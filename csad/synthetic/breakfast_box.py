"""breakfast_box: a white box with a divider; fruit on the left, cereal with a nut mix on the right.

Rules: the left compartment holds exactly two tangerines and one nectarine, in any order. The lower part of the right
compartment is filled with oatmeal, up to a fixed height; above it lie banana chips and almonds, mixed.
Components: tangerine, nectarine, oatmeal, banana chip, almond (the box is background).
"""

from csad.synthetic.kit import (
    Canvas,
    Category,
    Defect,
    Material,
    Patch,
    Pose,
    Shape,
    backdrop,
    bezier,
    blob,
    crooked_line,
    ellipse,
    groove,
    jitter,
    logical,
    place,
    ridges,
    rounded_box,
    shade,
    spot,
    stroke,
    structural,
    unit,
    vary,
)

import numpy as np

TANGERINE, NECTARINE, OATMEAL, BANANA_CHIP, ALMOND = 1, 2, 3, 4, 5

TABLE_COLOR = (0.40, 0.36, 0.33)
BOX_COLOR = (0.86, 0.86, 0.84)
TANGERINE_COLOR = (0.95, 0.52, 0.06)
NECTARINE_COLOR = (0.70, 0.12, 0.10)
BLUSH_COLOR = (0.92, 0.55, 0.22)
OATMEAL_COLOR = (0.70, 0.58, 0.42)
CHIP_COLOR = (0.93, 0.82, 0.48)
ALMOND_COLOR = (0.48, 0.26, 0.13)

BOX_WIDTH, BOX_HEIGHT, WALL = 0.90, 0.86, 0.018
DIVIDER_X = -0.055  # around the box's centre
TANGERINE_RADIUS, NECTARINE_RADIUS = 0.098, 0.112
OATMEAL_TOP = 0.015  # height of the oatmeal's upper edge around the box's centre
OATMEAL_SPREAD = 0.012
WRONG_LEVEL = (0.05, 0.12)  # how far off that edge is where it is an anomaly
CHIP_RADIUS, CHIPS = 0.042, 9
ALMOND_LENGTH, ALMOND_WIDTH, ALMONDS = 0.036, 0.021, 13
FEW_CHIPS, FEW_ALMONDS = (4, 7), (5, 8)  # where there are too few
FRUIT_AREA = {TANGERINE: np.pi * TANGERINE_RADIUS**2, NECTARINE: np.pi * NECTARINE_RADIUS**2}
GOOD_FRUIT = (TANGERINE, TANGERINE, NECTARINE)

# Where fruit lies in its compartment (shares of the half width and half height), by how many there are.
FRUIT_PLACES = {
    1: ((0.0, 0.0),),
    2: ((-0.35, -0.5), (0.3, 0.45)),
    3: ((-0.38, -0.62), (0.38, 0.0), (-0.38, 0.62)),
    4: ((-0.46, -0.62), (0.46, -0.38), (-0.46, 0.32), (0.46, 0.66)),
}


class Compartment:
    """A rectangle around the box's centre: `left` is the fruit's, the other one the cereal's."""

    def __init__(self, left: bool):
        edge = BOX_WIDTH / 2 - WALL
        self.x0, self.x1 = (-edge, DIVIDER_X - WALL / 2) if left else (DIVIDER_X + WALL / 2, edge)
        self.y1 = BOX_HEIGHT / 2 - WALL
        self.y0 = -self.y1

    def shape(self, top: float | None = None, bottom: float | None = None, corner: float = 0.02) -> Shape:
        """The compartment between two heights (all of it by default)."""
        top, bottom = self.y0 if top is None else top, self.y1 if bottom is None else bottom
        center = (self.x0 + self.x1) / 2, (top + bottom) / 2
        return rounded_box(center, self.x1 - self.x0, bottom - top, corner)


FRUIT_SIDE, CEREAL_SIDE = Compartment(left=True), Compartment(left=False)


def draw_box(canvas: Canvas, box: Pose) -> None:
    """The white box, seen from above: a rim and two sunken compartments."""
    white = vary(canvas.rng, BOX_COLOR, 0.05, 0.03)
    canvas.add(
        box.locate(rounded_box((0, 0), BOX_WIDTH, BOX_HEIGHT, 0.04)),
        Material(white, 0.02, gloss=0.1),
        rounding=0.012,
        lift=0.025,
    )
    for side in (FRUIT_SIDE, CEREAL_SIDE):
        canvas.add(box.locate(side.shape()), Material(shade(white, 0.72), 0.03), rounding=0)
        inner = rounded_box(
            ((side.x0 + side.x1) / 2, 0.004), side.x1 - side.x0 - 0.02, side.y1 - side.y0 - 0.02, 0.03
        )
        canvas.add(box.locate(inner), Material(shade(white, 0.86), 0.03), rounding=0.005)


def draw_tangerine(canvas: Canvas, center: np.ndarray) -> Patch | None:
    """A tangerine: pitted orange peel, a green stem end."""
    rng = canvas.rng
    radius = TANGERINE_RADIUS * jitter(rng, 0.03)
    peel = Material(vary(rng, TANGERINE_COLOR, 0.08, 0.05), 0.07, 0.006, bump=0.22, gloss=0.25, shininess=14)
    outline = ellipse(center, radius, radius * rng.uniform(0.95, 1.0), rng.uniform(0, np.pi))
    patch = canvas.add(outline, peel, label=TANGERINE, rounding=0.9 * radius, lift=0.035)
    stem = center + rng.uniform(0, 0.5) * radius * unit(rng.uniform(0, 2 * np.pi))
    canvas.add(blob(stem, 0.012, rng, 0.3), Material((0.30, 0.36, 0.14), 0.2), rounding=0.004)
    return patch


def draw_nectarine(canvas: Canvas, center: np.ndarray) -> Patch | None:
    """A nectarine: smooth dark red skin with a yellow blush and the seam of the stone."""
    rng = canvas.rng
    radius = NECTARINE_RADIUS * jitter(rng, 0.03)
    skin = Material(vary(rng, NECTARINE_COLOR, 0.12, 0.06), 0.22, 0.02, gloss=0.35, shininess=18)
    patch = canvas.add(
        ellipse(center, radius, radius * rng.uniform(0.95, 1.0), rng.uniform(0, np.pi)),
        skin,
        label=NECTARINE,
        rounding=0.9 * radius,
        lift=0.035,
    )
    turn = rng.uniform(0, 2 * np.pi)
    for share in np.linspace(0.52, 0.12, 8):
        blush = Material(BLUSH_COLOR, 0.1, 0.02, opacity=0.08)
        canvas.add(blob(center + 0.42 * radius * unit(turn), share * radius, rng, 0.15), blush, rounding=0)
    seam = crooked_line(
        center - 0.8 * radius * unit(turn + 1.2), center + 0.2 * radius * unit(turn + 1.2), rng, 0.06
    )
    canvas.add(stroke(seam, 0.005), Material((0.30, 0.05, 0.05), 0, opacity=0.5), rounding=0)
    return patch


DRAW_FRUIT = {TANGERINE: draw_tangerine, NECTARINE: draw_nectarine}


def draw_fruit(canvas: Canvas, box: Pose, fruit: list[int]) -> list[tuple[int, np.ndarray, Patch | None]]:
    """Lay fruit into its compartment, in any order; returns (kind, centre, where it landed) of each."""
    rng = canvas.rng
    side = FRUIT_SIDE
    half = np.array([side.x1 - side.x0, side.y1 - side.y0]) / 2
    middle = np.array([side.x0 + side.x1, side.y0 + side.y1]) / 2
    turned = np.array([rng.choice([-1, 1]), rng.choice([-1, 1])])
    room = half - (NECTARINE_RADIUS + 0.004)
    laid = []
    for kind, share in zip(rng.permutation(fruit), FRUIT_PLACES[len(fruit)]):
        offset = np.clip(np.array(share) * turned * half + rng.uniform(-0.012, 0.012, 2), -room, room)
        center = box.point(*(middle + offset))
        laid.append((int(kind), center, DRAW_FRUIT[int(kind)](canvas, center)))
    return laid


def draw_oatmeal(canvas: Canvas, box: Pose, top: float, bottom: float) -> None:
    """A bed of rolled oats between two heights."""
    rng = canvas.rng
    side = CEREAL_SIDE
    color = vary(rng, OATMEAL_COLOR, 0.08, 0.04)
    edge = np.linspace(side.x0 + 0.006, side.x1 - 0.006, 24)
    wavy = top + 0.006 * np.cumsum(rng.normal(0, 0.5, 24)).clip(-1, 1)
    corners = np.array([[side.x1 - 0.006, bottom - 0.006], [side.x0 + 0.006, bottom - 0.006]])
    bed = [np.concatenate([np.stack([edge, wavy], 1), corners])]
    canvas.add(
        box.locate(bed), Material(color, 0.20, 0.007, bump=0.8), label=OATMEAL, rounding=0.012, lift=0.010
    )
    for _ in range(90):
        flake = box.point(
            rng.uniform(side.x0 + 0.022, side.x1 - 0.022), rng.uniform(top + 0.018, bottom - 0.022)
        )
        shape = ellipse(flake, rng.uniform(0.011, 0.015), rng.uniform(0.007, 0.010), rng.uniform(0, np.pi))
        canvas.add(
            shape, Material(vary(rng, color, 0.16, 0.04), 0.08, 0.004, bump=0.2), rounding=0.005, lift=0.003
        )


def scatter(count: int, x0: float, x1: float, y0: float, y1: float, rng: np.random.Generator) -> np.ndarray:
    """`count` points (count, 2) spread evenly but not regularly over a rectangle (the farthest of a few tries each)."""
    low, high = np.array([x0, y0]), np.array([x1, y1])
    points = [rng.uniform(low, high)]
    while len(points) < count:
        tries = rng.uniform(low, high, (12, 2))
        distance = np.linalg.norm(tries[:, None] - np.array(points)[None], axis=2).min(axis=1)
        points.append(tries[distance.argmax()])
    return rng.permutation(np.array(points))


def draw_chip(canvas: Canvas, center: np.ndarray) -> None:
    """A dried slice of banana, with its darker core."""
    rng = canvas.rng
    size = CHIP_RADIUS * jitter(rng, 0.05)
    color = vary(rng, CHIP_COLOR, 0.08, 0.04)
    canvas.add(
        blob(center, size, rng, 0.05),
        Material(color, 0.10, 0.008, bump=0.2),
        label=BANANA_CHIP,
        rounding=0.012,
        lift=0.008,
    )
    canvas.add(
        blob(center, 0.36 * size, rng, 0.25),
        Material(shade(color, 0.78), 0.2, 0.004, 0.3, opacity=0.7),
        rounding=0,
    )


def draw_almond(canvas: Canvas, center: np.ndarray) -> None:
    """An almond: a brown drop with fine grooves along it."""
    rng = canvas.rng
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    drop = np.stack(
        [ALMOND_LENGTH * np.cos(turn), ALMOND_WIDTH * np.sin(turn) * (1 - 0.32 * np.cos(turn))], axis=1
    )
    angle = rng.uniform(0, 2 * np.pi)
    across = unit(angle + np.pi / 2)
    grooves = ridges(center, across, 0.009, 0.0012)
    skin = Material(vary(rng, ALMOND_COLOR, 0.14, 0.05), 0.15, 0.005, gloss=0.08)
    canvas.add(
        place([drop], center, angle, jitter(rng, 0.05)),
        skin,
        label=ALMOND,
        rounding=0.018,
        lift=0.010,
        relief=grooves,
    )


def draw_mix(canvas: Canvas, box: Pose, top: float, bottom: float, chips: int, almonds: int) -> None:
    """Banana chips and almonds between two heights of the cereal's compartment."""
    rng = canvas.rng
    side = CEREAL_SIDE
    margin = CHIP_RADIUS + 0.004
    area = side.x0 + margin, side.x1 - margin, top + margin, bottom - 0.6 * margin
    pieces = [(center, draw_chip) for center in scatter(max(chips, 1), *area, rng)[:chips]]
    pieces += [(center, draw_almond) for center in scatter(max(almonds, 1), *area, rng)[:almonds]]
    for index in rng.permutation(len(pieces)):
        center, draw_piece = pieces[index]
        draw_piece(canvas, box.point(*center))


def fruit_of(defect: str | None) -> list[int]:
    """Which fruit lies in the box."""
    fruit = list(GOOD_FRUIT)
    for kind, name in ((TANGERINE, "tangerine"), (NECTARINE, "nectarine")):
        if defect == f"missing_{name}":
            fruit.remove(kind)
        elif defect == f"additional_{name}":
            fruit.append(kind)
    if defect == "tangerine_for_nectarine":
        fruit[2] = TANGERINE
    elif defect == "nectarine_for_tangerine":
        fruit[1] = NECTARINE
    return fruit


def draw(canvas: Canvas, defect: str | None) -> None:
    """Paint one box; see `DEFECTS` for the names."""
    rng = canvas.rng
    backdrop(canvas, TABLE_COLOR, 0.10, 0.006)
    box = Pose(rng, (0.5, 0.5), shift=0.020, turn=0.03, zoom=0.02, mirrored=defect == "compartments_swapped")
    draw_box(canvas, box)
    if defect == "cracked_box":
        crack_box(canvas, box)
    laid = draw_fruit(canvas, box, fruit_of(defect))

    level = OATMEAL_TOP + rng.uniform(-OATMEAL_SPREAD, OATMEAL_SPREAD)
    good_level = level
    if defect == "too_much_oatmeal":
        level -= rng.uniform(*WRONG_LEVEL)
    elif defect == "too_little_oatmeal":
        level += rng.uniform(*WRONG_LEVEL)
    chips = 0 if defect == "missing_banana_chips" else CHIPS + int(rng.integers(0, 2))
    almonds = 0 if defect == "missing_almonds" else ALMONDS + int(rng.integers(0, 3))
    if defect == "few_almonds":
        almonds = int(rng.integers(*FEW_ALMONDS))
    elif defect == "few_banana_chips":
        chips = int(rng.integers(*FEW_CHIPS))
    side = CEREAL_SIDE
    if defect == "oatmeal_above_mix":
        split = -level
        draw_oatmeal(canvas, box, side.y0 + 0.006, split)
        draw_mix(canvas, box, split, side.y1, chips, almonds)
    else:
        if defect != "missing_oatmeal":
            draw_oatmeal(canvas, box, level, side.y1)
        draw_mix(canvas, box, side.y0, min(level, good_level), chips, almonds)
    mark_logical(canvas, box, defect, laid, level, good_level)
    draw_structural_defect(canvas, box, defect, laid)


def mark_logical(
    canvas: Canvas, box: Pose, defect: str | None, laid: list, level: float, good_level: float
) -> None:
    """Annotate a logical anomaly; other names are left alone."""
    fruit_area, cereal_area = box.locate(FRUIT_SIDE.shape()), box.locate(CEREAL_SIDE.shape())
    if defect in ("missing_tangerine", "missing_nectarine"):
        canvas.mark(defect, fruit_area)
    elif defect in (
        "additional_tangerine",
        "tangerine_for_nectarine",
        "additional_nectarine",
        "nectarine_for_tangerine",
    ):
        too_many = TANGERINE if defect in ("additional_tangerine", "tangerine_for_nectarine") else NECTARINE
        canvas.mark(defect, *(patch for kind, _, patch in laid if kind == too_many))
    elif defect == "compartments_swapped":
        canvas.mark(defect, fruit_area)
        canvas.mark(defect, cereal_area)
    elif defect in ("too_much_oatmeal", "too_little_oatmeal"):
        low, high = sorted((level, good_level))
        canvas.mark(defect, box.locate(CEREAL_SIDE.shape(low, high, 0.0)))
    elif defect in ("missing_almonds", "few_almonds", "missing_banana_chips", "few_banana_chips"):
        canvas.mark(defect, box.locate(CEREAL_SIDE.shape(bottom=good_level)))
    elif defect == "missing_oatmeal":
        canvas.mark(defect, box.locate(CEREAL_SIDE.shape(top=good_level)))
    elif defect == "oatmeal_above_mix":
        canvas.mark(defect, cereal_area)


def crack_box(canvas: Canvas, box: Pose) -> None:
    """Crack the empty box, from its outer wall into the fruit's compartment."""
    rng = canvas.rng
    start = np.array([-BOX_WIDTH / 2 + 0.002, rng.uniform(-0.35, 0.35)])
    end = start + (rng.uniform(0.06, 0.09), rng.uniform(-0.08, 0.08))
    path = box.locate([crooked_line(start, end, rng, 0.15)])[0]
    groove(canvas, "cracked_box", path, 0.008, (0.15, 0.14, 0.13), (1.0, 1.0, 1.0))


def draw_structural_defect(canvas: Canvas, box: Pose, defect: str | None, laid: list) -> None:
    """Damage done to a finished box; other names leave it as it is."""
    rng = canvas.rng
    _, fruit, _ = laid[rng.integers(len(laid))]
    on_fruit = fruit + rng.uniform(0.02, 0.055) * unit(rng.uniform(0, 2 * np.pi))
    if defect == "bruised_fruit":
        bruise = Material((0.34, 0.17, 0.06), 0.3, 0.008, opacity=0.7)
        spot(canvas, defect, on_fruit, rng.uniform(0.024, 0.036), bruise, crumbs=0)
    elif defect == "mould":
        fluff = Material((0.62, 0.70, 0.62), 0.35, 0.004, bump=0.6, opacity=0.9)
        spot(canvas, defect, on_fruit, rng.uniform(0.020, 0.034), fluff, crumbs=6)
    elif defect == "foreign_crumb":
        where = box.point(rng.uniform(CEREAL_SIDE.x0 + 0.05, CEREAL_SIDE.x1 - 0.05), rng.uniform(-0.36, 0.36))
        plastic = Material((0.15, 0.35, 0.70), 0.08, gloss=0.4)
        canvas.mark(
            defect,
            canvas.add(
                blob(where, rng.uniform(0.016, 0.024), rng, 0.35),
                plastic,
                label=0,
                rounding=0.010,
                lift=0.008,
            ),
        )
    elif defect == "hair":
        start = box.point(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3))
        path = bezier([start, *(start + rng.uniform(-0.14, 0.14, (3, 2)))], 24)
        canvas.add(stroke(path, 0.005), Material((0.08, 0.06, 0.05), 0), rounding=0, lift=0.004)
        canvas.mark(defect, stroke(path, 0.010))


MIX_AREA = {
    BANANA_CHIP: CHIPS * np.pi * CHIP_RADIUS**2,
    ALMOND: ALMONDS * np.pi * ALMOND_LENGTH * ALMOND_WIDTH,
}

DEFECTS: tuple[Defect, ...] = (
    logical("missing_tangerine", FRUIT_AREA[TANGERINE]),
    logical("missing_nectarine", FRUIT_AREA[NECTARINE]),
    logical("additional_tangerine", FRUIT_AREA[TANGERINE]),
    logical("additional_nectarine", FRUIT_AREA[NECTARINE]),
    logical("tangerine_for_nectarine", FRUIT_AREA[TANGERINE]),
    logical("nectarine_for_tangerine", FRUIT_AREA[NECTARINE]),
    logical("compartments_swapped"),
    logical("too_much_oatmeal"),
    logical("too_little_oatmeal"),
    logical("missing_oatmeal"),
    logical("oatmeal_above_mix"),
    logical("missing_almonds", MIX_AREA[ALMOND]),
    logical("few_almonds", MIX_AREA[ALMOND] / 2),
    logical("missing_banana_chips", MIX_AREA[BANANA_CHIP]),
    logical("few_banana_chips", MIX_AREA[BANANA_CHIP] / 2),
    structural("bruised_fruit", 0.5),
    structural("mould", 0.5),
    structural("cracked_box", 0.5),
    structural("foreign_crumb"),
    structural("hair", 0.5),
)

CLASSES = ("background", "tangerine", "nectarine", "oatmeal", "banana_chip", "almond")

CATEGORY = Category("breakfast_box", CLASSES, DEFECTS, draw)
