"""juice_bottle: a glass bottle of one of three juices, closed, with two labels on its belly.

Rules: the bottle is filled up to the foot of its neck; the upper label shows the fruit whose juice is inside (cherry:
red, banana: yellow, orange: orange), straight and centred; the lower label is the text "100% Juice".
Components: the three liquids, the three fruits, the paper of the fruit label, the text label, the cap.
"""

from collections.abc import Callable

from csad.synthetic.kit import (
    Canvas,
    Category,
    Defect,
    Material,
    Patch,
    Pose,
    Shape,
    Snapshot,
    backdrop,
    bezier,
    bite,
    blob,
    crooked_line,
    ellipse,
    groove,
    logical,
    ridges,
    rounded_box,
    shade,
    spot,
    stroke,
    structural,
    unit,
    vary,
)

import cv2
import numpy as np

FRUITS = ("cherry", "banana", "orange")
LIQUID_LABEL = {"cherry": 1, "banana": 2, "orange": 3}
FRUIT_LABEL = {"cherry": 4, "banana": 5, "orange": 6}
PAPER, TEXT, CAP = 7, 8, 9

WALL_COLOR = (0.58, 0.62, 0.68)
GLASS_COLOR = (0.80, 0.87, 0.88)
LIQUID_COLOR = {"cherry": (0.60, 0.07, 0.12), "banana": (0.95, 0.86, 0.45), "orange": (0.95, 0.52, 0.08)}
PAPER_COLOR = (0.95, 0.93, 0.87)
TEXT_COLOR = (0.16, 0.38, 0.26)
CAP_COLOR = (0.22, 0.24, 0.28)

# Right half of the bottle's silhouette around its centre, (half width, y), from the mouth down.
PROFILE = np.array(
    [
        (0.068, -0.385),
        (0.068, -0.300),
        (0.074, -0.270),
        (0.105, -0.230),
        (0.150, -0.190),
        (0.180, -0.150),
        (0.190, -0.110),
        (0.190, 0.400),
        (0.182, 0.425),
        (0.160, 0.440),
    ]
)
GLASS_THICKNESS = 0.012
FILL_Y = -0.225  # surface of the liquid, around the bottle's centre
FILL_SPREAD = 0.008
LOW_FILL, HIGH_FILL = (0.04, 0.11), (0.035, 0.065)  # how far off it is where it is an anomaly
FRUIT_LABEL_Y, TEXT_LABEL_Y = 0.03, 0.285
PAPER_SIZE, TEXT_SIZE = (0.235, 0.225), (0.265, 0.095)


class Bottle(Pose):
    """The bottle of one picture, its frame around its centre."""

    def __init__(self, rng: np.random.Generator):
        super().__init__(rng, (0.5, 0.53), shift=(0.025, 0.015), turn=0.03, zoom=0.03)

    def silhouette(self, inset: float = 0.0, top: float = -1.0, bottom: float = 1.0) -> Shape:
        """The bottle's outline, `inset` further in, between the heights `top` and `bottom`."""
        half, y = PROFILE[:, 0] - inset, np.minimum(PROFILE[:, 1], PROFILE[-1, 1] - inset)
        level = np.linspace(max(top, y[0]), min(bottom, y[-1]), 80)
        width = np.interp(level, y, half)
        return self.locate(
            [np.concatenate([np.stack([width, level], 1), np.stack([-width, level], 1)[::-1]])]
        )


def draw_glass(canvas: Canvas, bottle: Bottle) -> None:
    """The empty bottle with its shadow on the wall."""
    glass = Material(GLASS_COLOR, 0.02, gloss=0.15, opacity=0.55)
    canvas.add(bottle.silhouette(), glass, rounding=0.05, lift=0.03, shadow=0.45)


def draw_liquid(canvas: Canvas, bottle: Bottle, fruit: str, surface: float) -> None:
    """The juice up to `surface`, darker towards the bottom, with a lighter rim where it meets the glass."""
    rng = canvas.rng
    color = vary(rng, LIQUID_COLOR[fruit], 0.12, 0.07)
    body = bottle.silhouette(GLASS_THICKNESS, surface)
    canvas.add(body, Material(color, 0.05, 0.03), label=LIQUID_LABEL[fruit], rounding=0.12)
    sediment = bottle.silhouette(GLASS_THICKNESS, rng.uniform(0.28, 0.34))
    canvas.add(sediment, Material(shade(color, 0.85), 0.05, opacity=0.35), rounding=0.12)
    width = np.interp(surface, PROFILE[:, 1], PROFILE[:, 0]) - GLASS_THICKNESS
    foam = Material(tuple(0.5 + 0.5 * np.array(color)), 0.1, 0.004, opacity=0.8)
    canvas.add(
        bottle.locate(ellipse((0, surface + 0.004), width, 0.007)),
        foam,
        label=LIQUID_LABEL[fruit],
        rounding=0.004,
    )


def draw_cap(canvas: Canvas, bottle: Bottle) -> Patch | None:
    """A crimped metal cap."""
    cap = bottle.locate(rounded_box((0, -0.395), 0.160, 0.066, 0.012))
    enamel = Material(vary(canvas.rng, CAP_COLOR, 0.15, 0.06), 0.03, gloss=0.35)
    ribs = ridges(bottle.center, unit(bottle.angle), 0.0135, 0.0022)
    return canvas.add(cap, enamel, label=CAP, rounding=0.03, lift=0.010, relief=ribs)


def draw_reflections(canvas: Canvas, bottle: Bottle) -> None:
    """Window light on the glass: a long streak on one side, a short one on the neck."""
    rng = canvas.rng
    side = rng.choice([-1, 1])
    white = Material((1.0, 1.0, 1.0), 0.05, opacity=rng.uniform(0.15, 0.55))
    for start, end, x in (
        (rng.uniform(-0.12, 0.05), rng.uniform(0.20, 0.37), rng.uniform(0.140, 0.165)),
        (-0.36, -0.28, 0.040),
    ):
        canvas.add(
            bottle.locate(stroke(np.array([[side * x, start], [side * x, end]]), rng.uniform(0.008, 0.018))),
            white,
            rounding=0,
        )


Locate = Callable[[Shape], Shape]  # from a thing's own frame onto the canvas


def draw_cherry(canvas: Canvas, where: Locate) -> list[Patch | None]:
    """Two cherries on their stalks."""
    rng = canvas.rng
    green = Material((0.20, 0.42, 0.14), 0.1)
    red = Material(vary(rng, (0.72, 0.05, 0.10)), 0.05, gloss=0.5, shininess=25)
    knot = (0.015, -0.068)
    pieces = [
        canvas.add(
            where(stroke(bezier([knot, (x, -0.03), (x, 0.01)], 10), 0.006)),
            green,
            label=FRUIT_LABEL["cherry"],
            rounding=0,
        )
        for x in (-0.034, 0.036)
    ]
    pieces += [
        canvas.add(where(ellipse(center, 0.037)), red, label=FRUIT_LABEL["cherry"], rounding=0.03, lift=0.003)
        for center in ((-0.036, 0.030), (0.038, 0.038))
    ]
    return pieces


def draw_banana(canvas: Canvas, where: Locate) -> list[Patch | None]:
    """Two bananas side by side, brown at the ends."""
    yellow = Material(vary(canvas.rng, (0.93, 0.74, 0.10)), 0.08, gloss=0.2)
    pieces = []
    for dx, dy in ((0.012, -0.020), (-0.004, 0.014)):
        outer = bezier([(-0.078 + dx, -0.02 + dy), (-0.03 + dx, 0.075 + dy), (0.078 + dx, 0.03 + dy)], 20)
        inner = bezier([(0.078 + dx, 0.024 + dy), (0.0 + dx, 0.020 + dy), (-0.072 + dx, -0.03 + dy)], 20)
        pieces.append(
            canvas.add(
                where([np.concatenate([outer, inner])]),
                yellow,
                label=FRUIT_LABEL["banana"],
                rounding=0.018,
                lift=0.003,
            )
        )
        tip = where(ellipse((-0.075 + dx, -0.025 + dy), 0.007))
        pieces.append(canvas.add(tip, Material((0.32, 0.22, 0.08)), label=FRUIT_LABEL["banana"], rounding=0))
    return pieces


def draw_orange(canvas: Canvas, where: Locate) -> list[Patch | None]:
    """An orange with a leaf."""
    peel = Material(vary(canvas.rng, (0.95, 0.50, 0.05)), 0.08, 0.004, bump=0.15, gloss=0.25)
    leaf = Material((0.22, 0.48, 0.14), 0.1)
    outline = bezier([(0.0, -0.048), (0.02, -0.095), (0.07, -0.08)], 16)
    back = bezier([(0.07, -0.08), (0.05, -0.04), (0.0, -0.048)], 16)
    return [
        canvas.add(
            where(ellipse((0, 0.012), 0.060)), peel, label=FRUIT_LABEL["orange"], rounding=0.05, lift=0.003
        ),
        canvas.add(
            where([np.concatenate([outline, back])]), leaf, label=FRUIT_LABEL["orange"], rounding=0.006
        ),
    ]


DRAW_FRUIT = {"cherry": draw_cherry, "banana": draw_banana, "orange": draw_orange}


class Sticker(Pose):
    """One label, its frame around its centre: stuck on the bottle with a little sloppiness of its own."""

    def __init__(self, bottle: Bottle, rng: np.random.Generator, x: float, y: float, base_turn: float = 0.0):
        super().__init__(rng, (x, y), shift=0.009, turn=0.03, zoom=0.02, base_turn=base_turn)
        self.bottle = bottle

    def locate(self, shape: Shape) -> Shape:
        """A shape given in the label's frame, on the canvas."""
        return self.bottle.locate(super().locate(shape))


def draw_fruit_label(canvas: Canvas, sticker: Sticker, fruit: str) -> list[Patch | None]:
    """Cream paper with a thin frame and a fruit; returns the paper, then the fruit's pieces."""
    paper = Material(vary(canvas.rng, shade(PAPER_COLOR, 0.94), 0.08, 0.04), 0.03, 0.006)
    piece = canvas.add(
        sticker.locate(rounded_box((0, 0), *PAPER_SIZE, 0.02)),
        paper,
        label=PAPER,
        rounding=0.003,
        lift=0.004,
        shadow=0.3,
    )
    return [piece, *DRAW_FRUIT[fruit](canvas, sticker.locate)]


def draw_text_label(canvas: Canvas, sticker: Sticker) -> Patch | None:
    """A green strip printed "100% Juice"."""
    ink = Material(vary(canvas.rng, TEXT_COLOR, 0.20, 0.10), 0.04, 0.006)
    piece = canvas.add(
        sticker.locate(rounded_box((0, 0), *TEXT_SIZE, 0.012)),
        ink,
        label=TEXT,
        rounding=0.003,
        lift=0.004,
        shadow=0.3,
    )
    print_text(canvas, sticker, "100% Juice")
    return piece


def print_text(canvas: Canvas, sticker: Sticker, text: str) -> None:
    """Print a line of white text across a label."""
    font, height_px = cv2.FONT_HERSHEY_DUPLEX, 64
    (width, height), _ = cv2.getTextSize(text, font, 2.0, 4)
    stencil = np.zeros((height + height_px, width + height_px), np.uint8)
    cv2.putText(stencil, text, (height_px // 2, height + height_px // 2 - 4), font, 2.0, 255, 4, cv2.LINE_AA)
    strip_width = 0.86 * TEXT_SIZE[0]
    strip_height = strip_width * stencil.shape[0] / stencil.shape[1]
    corners = sticker.locate(rounded_box((0, 0), strip_width, strip_height))[0][[24, 16, 0]] * canvas.side
    source = np.array([[stencil.shape[1], 0], [0, 0], [stencil.shape[1], stencil.shape[0]]], np.float32)
    warp = cv2.getAffineTransform(source, corners.astype(np.float32))
    ink = (
        cv2.warpAffine(stencil, warp, (canvas.side, canvas.side), flags=cv2.INTER_AREA).astype(np.float32)
        / 255
    )
    canvas.image += 0.9 * ink[..., None] * (0.85 - canvas.image)


def draw(canvas: Canvas, defect: str | None) -> None:
    """Paint one bottle; see `DEFECTS` for the names."""
    rng = canvas.rng
    backdrop(canvas, WALL_COLOR, 0.03, 0.02)
    bottle = Bottle(rng)
    fruit = FRUITS[rng.integers(len(FRUITS))]
    other = FRUITS[(FRUITS.index(fruit) + rng.integers(1, len(FRUITS))) % len(FRUITS)]

    surface = FILL_Y + rng.uniform(-FILL_SPREAD, FILL_SPREAD)
    if defect == "fill_too_low":
        surface = FILL_Y + rng.uniform(*LOW_FILL)
    elif defect == "fill_too_high":
        surface = FILL_Y - rng.uniform(*HIGH_FILL)
    draw_glass(canvas, bottle)
    if defect != "empty_bottle":
        draw_liquid(canvas, bottle, fruit, surface)
    if defect == "particle_in_liquid":
        where = bottle.point(rng.uniform(-0.12, 0.12), rng.uniform(-0.155, -0.115))
        spot(
            canvas,
            defect,
            where,
            rng.uniform(0.013, 0.020),
            Material((0.12, 0.10, 0.08), 0.3, opacity=0.85),
            crumbs=2,
        )

    bare = canvas.snapshot()
    upper = Sticker(bottle, rng, 0.0, FRUIT_LABEL_Y)
    lower = Sticker(bottle, rng, 0.0, TEXT_LABEL_Y)
    if defect == "labels_swapped":
        upper, lower = Sticker(bottle, rng, 0.0, TEXT_LABEL_Y - 0.03), Sticker(bottle, rng, 0.0, -0.03)
    elif defect == "fruit_label_misplaced":
        side = rng.choice([-1, 1])
        x = side * rng.uniform(0.045, 0.065)
        upper = Sticker(bottle, rng, x, FRUIT_LABEL_Y - 0.02, side * rng.uniform(0.12, 0.3))
    elif defect == "text_label_misplaced":
        y = TEXT_LABEL_Y + rng.uniform(0.05, 0.075)
        lower = Sticker(bottle, rng, 0.0, y, rng.choice([-1, 1]) * rng.uniform(0.08, 0.15))

    upper_area = upper.locate(rounded_box((0, 0), *PAPER_SIZE, 0.02))
    lower_area = lower.locate(rounded_box((0, 0), *TEXT_SIZE, 0.012))
    if defect == "two_text_labels":
        canvas.mark(defect, upper_area, draw_text_label(canvas, upper))
    elif defect != "missing_fruit_label":
        pieces = draw_fruit_label(canvas, upper, other if defect == "wrong_fruit" else fruit)
        if defect == "wrong_fruit":
            canvas.mark(defect, *pieces[1:])
    if defect == "two_fruit_labels":
        lower = Sticker(bottle, rng, 0.0, TEXT_LABEL_Y - 0.01)
        canvas.mark(defect, draw_fruit_label(canvas, lower, fruit)[0])
    elif defect != "missing_text_label":
        draw_text_label(canvas, lower)
    draw_cap(canvas, bottle)

    if defect in ("fill_too_low", "fill_too_high"):
        canvas.mark(defect, bottle.silhouette(GLASS_THICKNESS, min(surface, FILL_Y), max(surface, FILL_Y)))
    elif defect == "empty_bottle":
        canvas.mark(defect, bottle.silhouette(GLASS_THICKNESS, FILL_Y))
    elif defect in ("missing_fruit_label", "fruit_label_misplaced"):
        canvas.mark(defect, upper_area)
    elif defect in ("missing_text_label", "text_label_misplaced"):
        canvas.mark(defect, lower_area)
    elif defect == "labels_swapped":
        canvas.mark(defect, upper_area)
        canvas.mark(defect, lower_area)
    else:
        draw_structural_defect(canvas, bottle, upper, bare, defect)
    draw_reflections(canvas, bottle)


def draw_structural_defect(
    canvas: Canvas, bottle: Bottle, label: Sticker, bare: Snapshot, defect: str | None
) -> None:
    """Damage done to a finished bottle, which was `bare` before its labels; other names leave it as it is."""
    rng = canvas.rng
    width, height = PAPER_SIZE
    if defect == "scratched_label":
        start = np.array([-0.40 * width, rng.uniform(-0.4, 0.4) * height])
        end = np.array([rng.uniform(0.0, 0.4) * width, rng.uniform(-0.4, 0.4) * height])
        path = label.locate([crooked_line(start, end, rng, 0.05)])[0]
        groove(canvas, defect, path, 0.006, (0.45, 0.42, 0.38), (1.0, 1.0, 0.98))
    elif defect == "torn_label":
        corner = label.point(rng.choice([-1, 1]) * 0.45 * width, rng.choice([-1, 1]) * 0.45 * height)
        fibre = Material((0.74, 0.71, 0.66), 0.15, 0.004, bump=0.4)
        bite(canvas, defect, corner, rng.uniform(0.032, 0.048), bare, fibre)
    elif defect == "stained_glass":
        where = bottle.point(rng.uniform(-0.11, 0.11), rng.uniform(0.18, 0.21))
        spot(
            canvas,
            defect,
            where,
            rng.uniform(0.020, 0.032),
            Material((0.85, 0.86, 0.82), 0.3, 0.006, bump=0.3, opacity=0.7),
        )
    elif defect == "cracked_glass":
        side = rng.choice([-1, 1])
        start = np.array([side * 0.176, rng.uniform(-0.08, 0.36)])
        end = start - (side * rng.uniform(0.05, 0.06), rng.uniform(-0.06, 0.06))
        groove(
            canvas,
            defect,
            bottle.locate([crooked_line(start, end, rng, 0.15)])[0],
            0.005,
            (0.10, 0.11, 0.12),
            (1.0, 1.0, 1.0),
        )
    elif defect == "dented_cap":
        x = rng.choice([-1, 1]) * rng.uniform(0.02, 0.05)
        dent = bottle.locate(blob((x, -0.394), 0.023, rng, 0.2))
        canvas.mark(
            defect,
            canvas.add(dent, Material((0.60, 0.61, 0.62), 0.2, 0.005, bump=0.4, metal=0.6), rounding=0.02),
        )


PAPER_AREA = PAPER_SIZE[0] * PAPER_SIZE[1]
TEXT_AREA = TEXT_SIZE[0] * TEXT_SIZE[1]

DEFECTS: tuple[Defect, ...] = (
    logical("fill_too_low"),
    logical("fill_too_high"),
    logical("empty_bottle"),
    logical("wrong_fruit"),
    logical("missing_fruit_label", PAPER_AREA),
    logical("missing_text_label", TEXT_AREA),
    logical("labels_swapped"),
    logical("two_fruit_labels"),
    logical("two_text_labels"),
    logical("fruit_label_misplaced", PAPER_AREA),
    logical("text_label_misplaced", TEXT_AREA),
    structural("particle_in_liquid", 0.5),
    structural("scratched_label", 0.5),
    structural("torn_label", 0.5),
    structural("stained_glass", 0.5),
    structural("cracked_glass", 0.5),
    structural("dented_cap", 0.5),
)

CLASSES = (
    "background",
    "cherry_juice",
    "banana_juice",
    "orange_juice",
    "cherry",
    "banana",
    "orange",
    "fruit_label",
    "text_label",
    "cap",
)

CATEGORY = Category("juice_bottle", CLASSES, DEFECTS, draw)
