"""screw_bag: a transparent zip bag with the fittings of one joint, in any arrangement.

Rules: exactly one long bolt, one short bolt, two washers and two nuts. A bolt is long or short, nothing in between.
Components: long bolt, short bolt, washer, nut (the bag is background).
"""

from csad.synthetic.kit import (
    Canvas,
    Category,
    Color,
    Defect,
    Material,
    Patch,
    Pose,
    backdrop,
    bezier,
    bite,
    crooked_line,
    distance_to_segment,
    ellipse,
    jitter,
    logical,
    place,
    regular_polygon,
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

LONG_BOLT, SHORT_BOLT, WASHER, NUT = 1, 2, 3, 4
LABEL_OF = {"long_bolt": LONG_BOLT, "short_bolt": SHORT_BOLT, "washer": WASHER, "nut": NUT}
GOOD_CONTENT = ("long_bolt", "short_bolt", "washer", "washer", "nut", "nut")

BAG_CENTER, BAG_WIDTH, BAG_HEIGHT = (0.5, 0.5), 0.84, 0.92
ZIP_Y = -0.36  # around the bag's centre
ROOM = ((-0.37, -0.29), (0.37, 0.41))  # where the fittings lie, around the bag's centre

SHANK_WIDTH, THREAD_PITCH, THREAD_HEIGHT = 0.042, 0.013, 0.0026
HEAD_WIDTH, HEAD_LENGTH = 0.080, 0.034
SHANK_LENGTH = {"long_bolt": 0.36, "short_bolt": 0.215}
WASHER_RADIUS, WASHER_HOLE = 0.058, 0.027
NUT_RADIUS, NUT_HOLE = 0.054, 0.025
AREA = {"long_bolt": 0.0178, "short_bolt": 0.0117, "washer": 0.0083, "nut": 0.0056}
SHORTENED = (0.76, 0.84)  # of a long bolt's shank, where it is an anomaly
CLEARANCE = 0.004  # fittings keep this far apart, where there is room

TABLE_COLOR = (0.80, 0.82, 0.80)
STEEL_COLOR = (0.52, 0.53, 0.56)
BRASS_COLOR = (0.60, 0.50, 0.32)
WASHER_COLOR = (0.40, 0.42, 0.46)
FILM = (0.86, 0.90, 0.93)


class Spot:
    """Where a fitting lies: a centre, a direction, and the capsule (half length, radius) it needs."""

    def __init__(self, center: np.ndarray, angle: float, half_length: float, radius: float):
        self.center, self.angle, self.half_length, self.radius = center, angle, half_length, radius

    def spine(self) -> np.ndarray:
        """Nine points along the capsule's axis, (9, 2)."""
        return self.center + np.linspace(-self.half_length, self.half_length, 9)[:, None] * unit(self.angle)

    def gap(self, other: "Spot") -> float:
        """Free space between two capsules; negative where they overlap."""
        spine = other.spine()
        return distance_to_segment(self.spine(), spine[0], spine[-1]).min() - self.radius - other.radius


def needed_room(name: str) -> tuple[float, float]:
    """Half length and radius of the capsule around a fitting."""
    if name in SHANK_LENGTH:
        return (SHANK_LENGTH[name] + HEAD_LENGTH) / 2 - 0.02, HEAD_WIDTH / 2
    return 0.0, WASHER_RADIUS if name == "washer" else NUT_RADIUS


def arrange(content: list[str], rng: np.random.Generator) -> list[Spot]:
    """Throw the fittings into the bag, largest first: each to the first free place of sixty, or to the freest."""
    low, high = np.array(ROOM)
    spots: list[Spot] = []
    for name in sorted(content, key=lambda name: -AREA[name]):
        half_length, radius = needed_room(name)
        tries: list[tuple[float, Spot]] = []
        for _ in range(60):
            angle = rng.uniform(0, 2 * np.pi)
            reach = half_length * abs(unit(angle)) + radius
            candidate = Spot(rng.uniform(low + reach, high - reach), angle, half_length, radius)
            gap = min((candidate.gap(spot) for spot in spots), default=1.0)
            tries.append((gap, candidate))
            if gap > CLEARANCE:
                break
        spots.append(max(tries, key=lambda gap_and_spot: gap_and_spot[0])[1])
    return spots


def metal(rng: np.random.Generator, color: Color = STEEL_COLOR) -> Material:
    """Zinc-plated steel (or brass), a little different for every fitting."""
    return Material(
        vary(rng, color, 0.12, 0.03), 0.05, 0.006, bump=0.05, gloss=0.25, shininess=30, metal=0.75
    )


def draw_bolt(
    canvas: Canvas, center: np.ndarray, angle: float, length: float, label: int, bend: float = 0.0
) -> list[Patch | None]:
    """A hexagon bolt lying on its side, its head towards -`angle`; `bend` turns the second half of the shank."""
    rng = canvas.rng
    size = jitter(rng, 0.04)
    material = metal(rng)
    axis, across = unit(angle), unit(angle + np.pi / 2)
    start = center - axis * (length - HEAD_LENGTH) / 2
    knee = start + axis * length * 0.5
    tip_direction = unit(angle + bend)
    end = knee + tip_direction * length * 0.5
    half = SHANK_WIDTH / 2 * size

    pieces = []
    for a, b, direction in ((start, knee, axis), (knee, end, tip_direction)):
        thread = ridges(a, direction, THREAD_PITCH, THREAD_HEIGHT)
        side = np.array([-direction[1], direction[0]]) * half
        overlap = direction * 0.004
        outline = np.array(
            [a - overlap + side, b + side, b + 0.3 * half * direction, b - side, a - overlap - side]
        )
        pieces.append(canvas.add([outline], material, label=label, rounding=half, lift=0.012, relief=thread))
    head = place(
        rounded_box((0, 0), HEAD_LENGTH * size, HEAD_WIDTH * size, 0.006),
        start - axis * HEAD_LENGTH / 2,
        angle,
    )
    pieces.append(canvas.add(head, material, label=label, rounding=0.010, lift=0.016))
    for offset in (-0.25, 0.25):  # the edges between the flats of the hexagon
        middle = start - axis * HEAD_LENGTH / 2 + across * offset * HEAD_WIDTH * size
        edge = stroke(np.array([middle - axis * 0.012, middle + axis * 0.012]), 0.003)
        canvas.add(edge, Material(shade(material.color, 0.6), 0, opacity=0.6), rounding=0)
    return pieces


def draw_washer(canvas: Canvas, center: np.ndarray, angle: float) -> list[Patch | None]:
    """A flat washer; its hole shows what lies below."""
    size = jitter(canvas.rng, 0.05)
    ring = ellipse(center, WASHER_RADIUS * size, WASHER_RADIUS * size * canvas.rng.uniform(0.95, 1.0), angle)
    return [
        canvas.add(
            ring,
            metal(canvas.rng, WASHER_COLOR),
            label=WASHER,
            holes=ellipse(center, WASHER_HOLE * size),
            rounding=0.005,
            lift=0.006,
        )
    ]


def draw_nut(canvas: Canvas, center: np.ndarray, angle: float) -> list[Patch | None]:
    """A brass-coloured hexagon nut with a threaded hole."""
    rng = canvas.rng
    size = jitter(rng, 0.05)
    material = metal(rng, BRASS_COLOR)
    hole = ellipse(center, NUT_HOLE * size)
    body = canvas.add(
        regular_polygon(center, NUT_RADIUS * size, 6, angle),
        material,
        label=NUT,
        holes=hole,
        rounding=0.012,
        lift=0.016,
    )
    dark = Material(shade(material.color, 0.5), 0.1, opacity=0.8)
    canvas.add(ellipse(center, 1.22 * NUT_HOLE * size), dark, holes=hole, rounding=0)
    return [body]


def draw_fitting(
    canvas: Canvas, name: str, where: Spot, bag: Pose, length_factor: float = 1.0, bend: float = 0.0
) -> list[Patch | None]:
    """One fitting at its spot."""
    center, angle = bag.point(*where.center), where.angle + bag.angle
    if name in SHANK_LENGTH:
        length = SHANK_LENGTH[name] * jitter(canvas.rng, 0.04) * length_factor
        return draw_bolt(canvas, center, angle, length, LABEL_OF[name], bend)
    return (draw_washer if name == "washer" else draw_nut)(canvas, center, angle)


def draw_bag(canvas: Canvas, bag: Pose) -> None:
    """The back of the bag, before the fittings."""
    outline = bag.locate(rounded_box((0, 0), BAG_WIDTH, BAG_HEIGHT, 0.02))
    canvas.add(
        outline,
        Material(FILM, 0.04, 0.05, bump=0.08, gloss=0.12, shininess=12, opacity=0.35),
        rounding=0.006,
        lift=0.008,
        shadow=0.3,
    )


def draw_film(canvas: Canvas, bag: Pose) -> None:
    """The front of the bag, over the fittings: folds that catch the light, the seams and the zip."""
    rng = canvas.rng
    half = np.array([BAG_WIDTH, BAG_HEIGHT]) / 2
    for _ in range(rng.integers(4, 9)):
        start = rng.uniform(-0.9, 0.9, 2) * half
        reach = rng.uniform(0.06, 0.25) * unit(rng.uniform(0, 2 * np.pi))
        end = np.clip(start + reach, -0.95 * half, 0.95 * half)
        fold = bezier([start, (start + end) / 2 + rng.normal(0, 0.03, 2), end], 14)
        white = Material((1.0, 1.0, 1.0), 0.1, opacity=rng.uniform(0.12, 0.35))
        canvas.add(bag.locate(stroke(fold, rng.uniform(0.002, 0.007))), white, rounding=0)
    for x in (-1, 1):
        seam = np.array([[x * (half[0] - 0.012), -half[1]], [x * (half[0] - 0.012), half[1]]])
        canvas.add(
            bag.locate(stroke(seam, 0.006)), Material((0.95, 0.97, 1.0), 0.05, opacity=0.5), rounding=0.002
        )
    for y, color in ((ZIP_Y, (0.75, 0.20, 0.22)), (ZIP_Y + 0.02, (0.90, 0.93, 0.96))):
        line = bag.locate(rounded_box((0, y), BAG_WIDTH - 0.01, 0.011, 0.003))
        canvas.add(line, Material(vary(rng, color), 0.04, gloss=0.3, opacity=0.8), rounding=0.005)


def content_of(defect: str | None) -> list[str]:
    """What lies in the bag."""
    content = list(GOOD_CONTENT)
    if defect is None:
        return content
    for name in LABEL_OF:
        if defect == f"missing_{name}":
            content.remove(name)
        elif defect == f"additional_{name}":
            content.append(name)
    for old, new, name in EXCHANGES:
        if defect == name:
            content[content.index(old)] = new
    return content


def draw(canvas: Canvas, defect: str | None) -> None:
    """Paint one bag; see `DEFECTS` for the names."""
    rng = canvas.rng
    backdrop(canvas, TABLE_COLOR)
    bag = Pose(rng, BAG_CENTER, shift=0.015, turn=0.03, zoom=0.02)
    draw_bag(canvas, bag)

    content = sorted(content_of(defect), key=lambda name: -AREA[name])
    odd_name = ODD_ONES.get(defect) if defect else None
    for number, (name, where) in enumerate(zip(content, arrange(content, rng))):
        # Of several alike, the last one is the odd one.
        if name != odd_name or name in content[number + 1 :]:
            draw_fitting(canvas, name, where, bag)
        elif defect == "long_bolt_too_short":
            canvas.mark(
                defect, *draw_fitting(canvas, name, where, bag, length_factor=rng.uniform(*SHORTENED))
            )
        elif defect == "bent_bolt":
            bend = rng.choice([-1, 1]) * rng.uniform(0.35, 0.6)
            canvas.mark(defect, draw_fitting(canvas, name, where, bag, bend=bend)[1])
        elif defect == "damaged_nut":
            earlier = canvas.snapshot()
            draw_fitting(canvas, name, where, bag)
            corner = bag.point(*where.center) + 1.05 * NUT_RADIUS * unit(rng.uniform(0, 2 * np.pi))
            bite(canvas, defect, corner, 0.024, earlier, Material((0.30, 0.27, 0.22), 0.3, 0.004, 0.4))
        elif defect == "rusty_washer":
            draw_fitting(canvas, name, where, bag)
            rust = Material((0.45, 0.24, 0.10), 0.4, 0.004, 0.4, opacity=0.8)
            spot(canvas, defect, bag.point(*where.center) + 0.042 * unit(where.angle), 0.020, rust)
        elif defect is not None:
            canvas.mark(defect, *draw_fitting(canvas, name, where, bag))

    if defect == "foreign_wire":
        center = bag.point(*rng.uniform(-0.2, 0.2, 2))
        path = bezier([center + rng.uniform(-0.12, 0.12, 2) for _ in range(4)], 24)
        copper = Material((0.72, 0.36, 0.16), 0.1, metal=0.5, gloss=0.4)
        canvas.mark(defect, canvas.add(stroke(path, 0.009), copper, rounding=0.0045, lift=0.006))
    draw_film(canvas, bag)
    if defect == "torn_bag":
        tear_bag(canvas, bag)
    elif defect is not None and defect.startswith("missing_"):
        low, high = np.array(ROOM)
        width, height = high - low
        canvas.mark(defect, bag.locate(rounded_box((low + high) / 2, width, height, 0.02)))


def tear_bag(canvas: Canvas, bag: Pose) -> None:
    """Tear the bag open from one side: a dark wedge between two bright curled edges."""
    rng = canvas.rng
    side = rng.choice([-1, 1])
    mouth = np.array([side * (BAG_WIDTH / 2 + 0.004), rng.uniform(-0.2, 0.35)])
    tip = mouth - side * np.array([rng.uniform(0.07, 0.11), rng.uniform(-0.04, 0.04)])
    lips = [mouth + (0, -0.028), mouth + (0, 0.028)]
    wedge = bag.locate([np.array([lips[0], lips[1], tip])])
    pieces = [canvas.add(wedge, Material(shade(TABLE_COLOR, 0.6), 0.05), rounding=0)]
    for lip in lips:
        curl = bag.locate(stroke(crooked_line(lip, tip, rng, 0.05), 0.007))
        pieces.append(canvas.add(curl, Material((1.0, 1.0, 1.0), 0.1, gloss=0.3), rounding=0.003, lift=0.004))
    canvas.mark("torn_bag", *pieces)


EXCHANGES = (  # (what should be there, what lies there instead, anomaly)
    ("short_bolt", "long_bolt", "two_long_bolts"),
    ("long_bolt", "short_bolt", "two_short_bolts"),
    ("nut", "washer", "washer_for_nut"),
    ("washer", "nut", "nut_for_washer"),
)

# The fitting that an anomaly concerns, where there is one to point at.
ODD_ONES = (
    {f"additional_{name}": name for name in LABEL_OF}
    | {defect: new for _, new, defect in EXCHANGES}
    | {
        "long_bolt_too_short": "long_bolt",
        "bent_bolt": "long_bolt",
        "damaged_nut": "nut",
        "rusty_washer": "washer",
    }
)

DEFECTS: tuple[Defect, ...] = (
    *(logical(f"missing_{name}", AREA[name]) for name in LABEL_OF),
    *(logical(f"additional_{name}", AREA[name]) for name in LABEL_OF),
    *(logical(defect) for _, _, defect in EXCHANGES),
    logical("long_bolt_too_short"),
    structural("bent_bolt"),
    structural("damaged_nut", 0.5),
    structural("rusty_washer", 0.5),
    structural("foreign_wire"),
    structural("torn_bag", 0.5),
)

CATEGORY = Category("screw_bag", ("background", *LABEL_OF), DEFECTS, draw)
