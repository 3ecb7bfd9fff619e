"""splicing_connectors: two lever connectors facing each other, joined by one cable.

Rules: both connectors have the same number of clamps, 2, 3 or 5; the cable is yellow for 2, blue for 3, red for 5; it
runs from one clamp to the clamp opposite, neither taut nor in a loop. Every clamp has an orange lever, closed.
Components: connector housing, lever, cable (one class per colour).
"""

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

HOUSING, LEVER = 1, 2
CABLE_LABEL = {"yellow": 3, "blue": 4, "red": 5}
COLOR_OF_CLAMPS = {2: "yellow", 3: "blue", 5: "red"}

MAT_COLOR = (0.34, 0.37, 0.36)
HOUSING_COLOR = (0.78, 0.79, 0.78)
LEVER_COLOR = (0.92, 0.45, 0.08)
CABLE_COLOR = {"yellow": (0.90, 0.80, 0.12), "blue": (0.10, 0.28, 0.72), "red": (0.75, 0.08, 0.10)}
COPPER = Material((0.75, 0.42, 0.22), 0.1, metal=0.5, gloss=0.3)

CLAMP_PITCH, HOUSING_WIDTH, HOUSING_MARGIN = 0.115, 0.215, 0.035
LEVER_SIZE = (0.105, 0.078)
LEVER_X, LEVER_OPEN_X = -0.012, -0.070  # along the housing, the mouths towards +x
LEVER_OPEN_ANGLE = 0.35
CABLE_WIDTH = 0.032
SIDE_X = 0.325  # how far the housings' centres are from the middle
CABLE_SLACK = 0.08  # how far the cable's curve may stray
LOOP_REACH = (0.38, 0.48)  # how far a cable much too long is pulled aside
HOUSING_AREA = {clamps: HOUSING_WIDTH * (clamps * CLAMP_PITCH + HOUSING_MARGIN) for clamps in COLOR_OF_CLAMPS}
CABLE_AREA = 0.0145


class Connector(Pose):
    """One connector, on the left (`side` -1) or on the right (1); in its frame the mouths face +x."""

    def __init__(self, side: int, clamps: int, rng: np.random.Generator):
        super().__init__(
            rng, (0.5 + side * SIDE_X, 0.5), shift=0.024, turn=0.06, zoom=0.025, mirrored=side > 0
        )
        self.clamps = clamps
        self.height = clamps * CLAMP_PITCH + HOUSING_MARGIN

    def clamp_y(self, index: int) -> float:
        """Height of a clamp around the housing's centre."""
        return (index - (self.clamps - 1) / 2) * CLAMP_PITCH

    def outline(self) -> Shape:
        """The housing's outline on the canvas."""
        return self.locate(rounded_box((0, 0), HOUSING_WIDTH, self.height, 0.018))

    def mouth(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a cable enters a clamp, and a point straight in front of it, on the canvas."""
        y = self.clamp_y(index)
        return self.point(0.42 * HOUSING_WIDTH, y), self.point(0.95 * HOUSING_WIDTH, y)


def draw_connector(canvas: Canvas, connector: Connector, defect: str | None) -> None:
    """A housing with its mouths and levers, or what the anomaly leaves of it."""
    rng = canvas.rng
    if defect == "missing_connector":
        canvas.mark(defect, connector.outline())
        return
    plastic = Material(vary(rng, HOUSING_COLOR, 0.06, 0.03), 0.03, 0.01, gloss=0.2)
    orange = Material(vary(rng, LEVER_COLOR, 0.06, 0.04), 0.04, gloss=0.35)
    canvas.add(connector.outline(), plastic, label=HOUSING, rounding=0.016, lift=0.022)
    odd_clamp = int(rng.integers(connector.clamps))
    for index in range(connector.clamps):
        draw_clamp(canvas, connector, index, plastic)
        if index != odd_clamp or defect not in ("missing_lever", "open_lever"):
            draw_lever(canvas, connector, index, orange)
        elif defect == "open_lever":
            canvas.mark(defect, draw_lever(canvas, connector, index, orange, raised=True))
        else:
            y = connector.clamp_y(index)
            slot = connector.locate(rounded_box((LEVER_X, y), 0.07, 0.03, 0.006))
            canvas.add(slot, Material((0.25, 0.25, 0.26), 0.1, metal=0.3), rounding=0.004)
            canvas.mark(defect, connector.locate(rounded_box((LEVER_X, y), *LEVER_SIZE, 0.014)))
    if defect == "unequal_clamps":
        canvas.mark(defect, connector.outline())


def draw_clamp(canvas: Canvas, connector: Connector, index: int, plastic: Material) -> None:
    """The mouth of a clamp, the recess of its lever and the ridge towards the next one."""
    y = connector.clamp_y(index)
    width, height = LEVER_SIZE
    mouth = rounded_box((HOUSING_WIDTH / 2 - 0.016, y), 0.030, 0.056, 0.012)
    canvas.add(connector.locate(mouth), Material(shade(plastic.color, 0.45), 0.05), rounding=0)
    recess = rounded_box((LEVER_X, y), width + 0.014, height + 0.012, 0.01)
    canvas.add(connector.locate(recess), Material(shade(plastic.color, 0.62), 0.04), rounding=0)
    if index + 1 < connector.clamps:
        ridge = rounded_box((0, y + CLAMP_PITCH / 2), HOUSING_WIDTH - 0.03, 0.006)
        canvas.add(connector.locate(ridge), Material(shade(plastic.color, 0.7), 0), rounding=0)


def draw_lever(
    canvas: Canvas, connector: Connector, index: int, orange: Material, raised: bool = False
) -> Patch | None:
    """A lever with its grip, closed or raised; returns where it landed."""
    y = connector.clamp_y(index)
    center, angle = ((LEVER_OPEN_X, y), LEVER_OPEN_ANGLE) if raised else ((LEVER_X, y), 0.0)
    lever = connector.locate(place(rounded_box((0, 0), *LEVER_SIZE, 0.014), center, angle))
    patch = canvas.add(lever, orange, label=LEVER, rounding=0.014, lift=0.030 if raised else 0.008)
    grip = connector.locate(place(rounded_box((-0.034, 0), 0.012, 0.05, 0.004), center, angle))
    canvas.add(grip, Material(shade(orange.color, 0.72), 0), rounding=0.003)
    return patch


def draw_cable(canvas: Canvas, path: np.ndarray, color: str) -> Patch | None:
    """An insulated cable along a path."""
    sheath = Material(vary(canvas.rng, CABLE_COLOR[color], 0.08, 0.04), 0.04, gloss=0.35)
    width = CABLE_WIDTH * jitter(canvas.rng, 0.03)
    return canvas.add(stroke(path, width), sheath, label=CABLE_LABEL[color], rounding=width / 2, lift=0.014)


def cable_path(left: Connector, right: Connector, from_clamp: int, to_clamp: int, bow: float) -> np.ndarray:
    """A gentle curve from a clamp of one connector to a clamp of the other; `bow` pushes its middle up or down."""
    (start, after), (end, before) = left.mouth(from_clamp), right.mouth(to_clamp)
    lift = np.array([0, bow])
    return bezier(
        [start, after, (after * 2 + before) / 3 + lift, (after + before * 2) / 3 - 0.6 * lift, before, end],
        40,
    )


def draw(canvas: Canvas, defect: str | None) -> None:
    """Paint one pair of connectors; see `DEFECTS` for the names."""
    rng = canvas.rng
    backdrop(canvas, MAT_COLOR, 0.05, 0.012)
    clamps = int(rng.choice(list(COLOR_OF_CLAMPS)))
    counts = {-1: clamps, 1: clamps}
    odd_side = int(rng.choice([-1, 1]))
    if defect == "unequal_clamps":
        counts[odd_side] = int(rng.choice([count for count in COLOR_OF_CLAMPS if count != clamps]))
    left, right = (Connector(side, counts[side], rng) for side in (-1, 1))
    odd = left if odd_side < 0 else right

    earlier = canvas.snapshot()
    for connector in (left, right):
        draw_connector(canvas, connector, defect if connector is odd else None)
    draw_cables(canvas, left, right, COLOR_OF_CLAMPS[clamps], defect)
    draw_housing_damage(canvas, odd, earlier, defect)


def draw_cables(canvas: Canvas, left: Connector, right: Connector, color: str, defect: str | None) -> None:
    """Join the connectors, in the way that the anomaly asks for; `color` is the right one."""
    rng = canvas.rng
    if defect == "missing_cable":
        canvas.mark(defect, space_between(left, right))
        return
    if defect == "wrong_cable_colour":
        color = str(rng.choice([other for other in CABLE_COLOR if other != color]))
    from_clamp = int(rng.integers(left.clamps))
    to_clamp = min(from_clamp, right.clamps - 1)
    if defect == "cable_misplaced":
        apart = left.clamps // 2
        to_clamp = int(
            rng.choice([clamp for clamp in range(right.clamps) if abs(clamp - from_clamp) >= apart])
        )
    path = cable_path(left, right, from_clamp, to_clamp, rng.uniform(-1, 1) * CABLE_SLACK)
    if defect == "cable_looped":
        after, before = left.mouth(from_clamp)[1], right.mouth(to_clamp)[1]
        bow = np.array([0, rng.choice([-1, 1]) * rng.uniform(*LOOP_REACH)])
        path = bezier(
            [path[0], after, after + bow + (0.10, 0), before + bow - (0.10, 0), before, path[-1]], 60
        )
    if defect == "broken_cable":
        draw_broken_cable(canvas, path, color)
        return
    cable = draw_cable(canvas, path, color)
    if defect in ("wrong_cable_colour", "cable_misplaced", "cable_looped"):
        canvas.mark(defect, cable)
    elif defect == "additional_cable":
        free = int(rng.choice([clamp for clamp in range(left.clamps) if clamp != from_clamp]))
        second = cable_path(left, right, free, free, rng.uniform(-0.3, 0.3) * CABLE_SLACK)
        canvas.mark(defect, draw_cable(canvas, second, color))


def space_between(left: Connector, right: Connector) -> Shape:
    """The space between the two connectors, where a cable could be."""
    (start, _), (end, _) = left.mouth(0), right.mouth(0)
    height = min(left.height, right.height)
    return rounded_box(
        (start + end) / 2 * (1, 0) + (left.center + right.center) / 2 * (0, 1), end[0] - start[0], height
    )


def draw_broken_cable(canvas: Canvas, path: np.ndarray, color: str) -> None:
    """A cable torn apart near its middle, bare copper showing at both ends of the gap."""
    rng = canvas.rng
    middle = rng.integers(14, 26)
    gap = 3
    for half in (path[: middle - gap], path[middle + gap :]):
        draw_cable(canvas, half, color)
    strands = []
    for end, inwards in ((path[middle - gap - 1], 1), (path[middle + gap], -1)):
        direction = inwards * (path[middle + 1] - path[middle - 1])
        direction /= np.linalg.norm(direction)
        for _ in range(4):
            turned = unit(np.arctan2(direction[1], direction[0]) + rng.normal(0, 0.5))
            strand = np.array([end, end + 0.022 * turned])
            strands.append(canvas.add(stroke(strand, 0.006), COPPER, label=0, rounding=0.003, lift=0.004))
    canvas.mark("broken_cable", *strands, stroke(path[middle - gap : middle + gap], CABLE_WIDTH))


def draw_housing_damage(canvas: Canvas, connector: Connector, earlier: Snapshot, defect: str | None) -> None:
    """Damage done to a connector finished since `earlier`; other names leave it as it is."""
    rng = canvas.rng
    face = connector.point(0.075, connector.clamp_y(int(rng.integers(connector.clamps))) + 0.03)
    if defect == "chipped_housing":
        corner = connector.point(-0.48 * HOUSING_WIDTH, rng.choice([-1, 1]) * 0.48 * connector.height)
        bite(
            canvas,
            defect,
            corner,
            rng.uniform(0.040, 0.055),
            earlier,
            Material((0.92, 0.92, 0.90), 0.2, 0.005, 0.5),
        )
    elif defect == "melted_spot":
        char = Material((0.30, 0.22, 0.15), 0.4, 0.006, bump=0.5, gloss=0.3, opacity=0.85)
        spot(canvas, defect, face, rng.uniform(0.022, 0.032), char)
    elif defect == "scratched_housing":
        reach = np.array([0.4 * HOUSING_WIDTH, 0.03]) * rng.choice([-1, 1])
        path = crooked_line(connector.center - reach, connector.center + reach, rng, 0.08)
        groove(canvas, defect, path, 0.007, (0.30, 0.31, 0.31), (1.0, 1.0, 1.0))


DEFECTS: tuple[Defect, ...] = (
    logical("unequal_clamps"),
    logical("wrong_cable_colour"),
    logical("cable_misplaced"),
    logical("missing_cable", CABLE_AREA),
    logical("missing_connector", min(HOUSING_AREA.values())),
    logical("additional_cable"),
    logical("cable_looped"),
    structural("broken_cable", 0.5),
    structural("open_lever"),
    structural("missing_lever"),
    structural("chipped_housing", 0.5),
    structural("melted_spot", 0.5),
    structural("scratched_housing", 0.5),
)

CLASSES = ("background", "housing", "lever", "yellow_cable", "blue_cable", "red_cable")

CATEGORY = Category("splicing_connectors", CLASSES, DEFECTS, draw)
