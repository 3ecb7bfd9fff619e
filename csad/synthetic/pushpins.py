"""pushpins: a tray of 3 x 5 compartments with exactly one yellow pushpin in each, lying at any angle.

Rules: fifteen pins, one per compartment, all yellow. Components: pin (head and needle).
"""

from csad.synthetic.kit import (
    Canvas,
    Category,
    Color,
    Defect,
    Material,
    Patch,
    Pose,
    Shape,
    backdrop,
    bite,
    blob,
    crooked_line,
    groove,
    jitter,
    logical,
    place,
    rounded_box,
    shade,
    spot,
    stroke,
    structural,
    unit,
    vary,
)

import numpy as np

ROWS, COLUMNS = 3, 5
TRAY_WIDTH, TRAY_HEIGHT = 0.92, 0.88
RIM = 0.022  # outer wall
WALL = 0.012  # between compartments
PIN_AREA = 0.0050
PIN_LABEL = 1

TABLE_COLOR = (0.30, 0.33, 0.38)
TRAY_COLOR = (0.80, 0.82, 0.84)
FLOOR_COLOR = (0.62, 0.65, 0.69)
YELLOW = (0.96, 0.78, 0.10)
OTHER_COLORS = ((0.80, 0.12, 0.12), (0.12, 0.30, 0.75), (0.10, 0.55, 0.25))
STEEL = Material((0.72, 0.73, 0.75), texture=0.02, metal=0.8, gloss=0.4)

# Half of a pin's silhouette, (along the axis, half width): cap, waist, collar.
HEAD_PROFILE = (
    (-0.050, 0.026),
    (-0.046, 0.031),
    (-0.036, 0.031),
    (-0.032, 0.022),
    (-0.012, 0.017),
    (0.010, 0.020),
    (0.014, 0.034),
    (0.020, 0.037),
    (0.027, 0.037),
    (0.031, 0.032),
)
NEEDLE_START, NEEDLE_END, NEEDLE_WIDTH = 0.028, 0.078, 0.0075


class Tray(Pose):
    """The tray of one picture, its frame around its centre."""

    def __init__(self, rng: np.random.Generator):
        super().__init__(rng, (0.5, 0.5), shift=0.014, turn=0.03, zoom=0.02)
        self.cell = np.array([(TRAY_WIDTH - 2 * RIM) / COLUMNS, (TRAY_HEIGHT - 2 * RIM) / ROWS])

    def cell_center(self, index: int) -> np.ndarray:
        """Centre of a compartment, around the tray's centre."""
        row, column = divmod(index, COLUMNS)
        return (np.array([column, row]) - [(COLUMNS - 1) / 2, (ROWS - 1) / 2]) * self.cell

    def floor(self, index: int) -> Shape:
        """The floor of a compartment, on the canvas."""
        width, height = self.cell - WALL
        return self.locate(rounded_box(self.cell_center(index), width, height, 0.015))

    def spot_in(
        self, index: int, rng: np.random.Generator, spread: float = 1.0, shift: float = 0.0
    ) -> np.ndarray:
        """A random place in a compartment, on the canvas; `shift` moves it down by that share of the height."""
        offset = rng.uniform(-1, 1, 2) * [0.015, 0.045] * spread + [0, shift * self.cell[1]]
        return self.point(*(self.cell_center(index) + offset))


def draw_tray(canvas: Canvas, tray: Tray) -> None:
    """The tray: a raised frame, and fifteen floors sunk into it, each in the shadow of its walls."""
    plastic = vary(canvas.rng, TRAY_COLOR, 0.05, 0.03)
    floor = vary(canvas.rng, FLOOR_COLOR, 0.08, 0.04)
    canvas.add(
        tray.locate(rounded_box((0, 0), TRAY_WIDTH, TRAY_HEIGHT, 0.03)),
        Material(plastic, 0.02, gloss=0.1),
        rounding=0.012,
        lift=0.02,
    )
    toward_shadow = -canvas.light[:2] / canvas.light[2]
    for index in range(ROWS * COLUMNS):
        outline = tray.floor(index)
        canvas.add(outline, Material(shade(floor, 0.72), 0.03), rounding=0)
        width, height = tray.cell - WALL - 0.016
        inner = place(
            rounded_box((0, 0), width, height, 0.015),
            outline[0].mean(axis=0) + 0.008 * np.sign(toward_shadow) * np.minimum(abs(toward_shadow), 1),
            tray.angle,
            tray.scale,
        )
        canvas.add(inner, Material(floor, 0.05, 0.012), rounding=0.004)


def draw_pin(
    canvas: Canvas,
    center: np.ndarray,
    angle: float,
    color: Color = YELLOW,
    label: int = PIN_LABEL,
    needle_bend: float = 0.0,
) -> tuple[Patch | None, Patch | None]:
    """One pin lying on its side; returns where its head and its needle landed."""
    size = jitter(canvas.rng, 0.06)
    axis, across = unit(angle), unit(angle + np.pi / 2)
    start = center + size * NEEDLE_START * axis
    knee = center + size * (NEEDLE_START + NEEDLE_END) / 2 * axis
    tip = knee + size * (NEEDLE_END - NEEDLE_START) / 2 * unit(angle + needle_bend)
    needle = canvas.add(
        stroke(np.array([start, knee, tip]), size * NEEDLE_WIDTH),
        STEEL,
        label=label,
        rounding=0.004,
        lift=0.006,
    )

    profile = np.array(HEAD_PROFILE)
    outline = np.concatenate([profile, profile[::-1] * [1, -1]])
    plastic = Material(vary(canvas.rng, color, 0.07, 0.04), 0.03, gloss=0.5, shininess=40)
    head = canvas.add(place([outline], center, angle, size), plastic, label=label, rounding=0.024, lift=0.014)
    edge = Material(shade(plastic.color, 0.75), 0, opacity=0.5)
    for along, half_width in ((-0.034, 0.026), (0.014, 0.031)):
        middle = center + size * along * axis
        canvas.add(
            stroke(
                np.array([middle - size * half_width * across, middle + size * half_width * across]), 0.003
            ),
            edge,
            rounding=0,
        )
    return head, needle


def draw(canvas: Canvas, defect: str | None) -> None:
    """Paint one tray; see `DEFECTS` for the names."""
    rng = canvas.rng
    backdrop(canvas, TABLE_COLOR)
    tray = Tray(rng)
    draw_tray(canvas, tray)

    cells = rng.permutation(ROWS * COLUMNS)
    first, second = int(cells[0]), int(cells[1])
    pins_in = np.ones(ROWS * COLUMNS, int)
    if defect in ("missing_pin", "two_missing_pins", "moved_pin"):
        pins_in[first] = 0
    if defect == "two_missing_pins":
        pins_in[second] = 0
    if defect in ("additional_pin", "two_additional_pins"):
        pins_in[first] = 2
    if defect in ("two_additional_pins", "moved_pin"):
        pins_in[second] = 2

    for index in range(ROWS * COLUMNS):
        for number in range(pins_in[index]):
            crowded = pins_in[index] > 1
            center = tray.spot_in(
                index, rng, 0.3 if crowded else 1.0, (number - 0.5) * 0.46 if crowded else 0.0
            )
            angle = rng.uniform(0, 2 * np.pi)
            special = index == first
            if special and defect == "wrong_colour_pin":
                color = OTHER_COLORS[rng.integers(len(OTHER_COLORS))]
                canvas.mark(defect, *draw_pin(canvas, center, angle, color, label=0))
            elif special and defect == "bent_needle":
                bend = rng.choice([-1, 1]) * rng.uniform(0.8, 1.3)
                canvas.mark(defect, draw_pin(canvas, center, angle, needle_bend=bend)[1])
            elif special and defect == "broken_head":
                draw_broken_pin(canvas, center, angle)
            else:
                draw_pin(canvas, center, angle)
        if defect is not None and pins_in[index] != 1:
            canvas.mark(defect, tray.floor(index))

    if defect == "dirt":
        where = tray.spot_in(first, rng, 1.6)
        spot(
            canvas,
            defect,
            where,
            rng.uniform(0.016, 0.026),
            Material((0.25, 0.20, 0.15), 0.3, 0.004, 0.4, opacity=0.85),
        )
    elif defect == "scratched_floor":
        where = tray.spot_in(first, rng, 1.2)
        reach = 0.06 * unit(rng.uniform(0, np.pi))
        groove(
            canvas,
            defect,
            crooked_line(where - reach, where + reach, rng),
            0.005,
            (0.42, 0.44, 0.47),
            (0.92, 0.93, 0.95),
        )
    elif defect == "cracked_wall":
        row, column = rng.integers(0, ROWS), rng.integers(1, COLUMNS)
        x = (column - COLUMNS / 2) * tray.cell[0]
        y = (row - (ROWS - 1) / 2) * tray.cell[1] + rng.uniform(-0.06, 0.06)
        gap = tray.locate(blob((x, y), 0.019, rng, 0.3))
        canvas.mark(defect, canvas.add(gap, Material((0.36, 0.37, 0.40), 0.2), rounding=0.004))


def draw_broken_pin(canvas: Canvas, center: np.ndarray, angle: float) -> None:
    """A pin whose cap has a bite broken out of it, showing pale raw plastic and the floor."""
    earlier = canvas.snapshot()
    draw_pin(canvas, center, angle)
    corner = center - 0.045 * unit(angle) + canvas.rng.choice([-1, 1]) * 0.024 * unit(angle + np.pi / 2)
    bite(canvas, "broken_head", corner, 0.022, earlier, Material((0.93, 0.88, 0.62), 0.15, 0.004, 0.3))


DEFECTS: tuple[Defect, ...] = (
    logical("missing_pin", PIN_AREA),
    logical("two_missing_pins", PIN_AREA),
    logical("additional_pin", PIN_AREA),
    logical("two_additional_pins", PIN_AREA),
    logical("moved_pin", PIN_AREA),
    logical("wrong_colour_pin"),
    structural("bent_needle"),
    structural("broken_head", 0.5),
    structural("dirt", 0.5),
    structural("scratched_floor", 0.5),
    structural("cracked_wall", 0.5),
)

CATEGORY = Category("pushpins", ("background", "pin"), DEFECTS, draw)
