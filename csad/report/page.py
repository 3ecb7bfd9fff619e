"""The HTML page: its template and style lie beside this file; everything shown is escaped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from csad.data.label_colours import label_colour
from csad.data.listing import count
from csad.evaluation.metrics import LOCO, counted, mean_known
from csad.evaluation.scores import FUSED

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent
# Nothing is fetched: browsers are told to refuse it, too.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# Mean image AUROC on MVTec LOCO AD (docs/method.md section 4).
PUBLISHED_AVERAGE = {"paper": 95.3, "repository": 95.6}

# What each branch asks, for people who never read the paper.
QUESTIONS = {
    FUSED: "the sum of those that count: the score that decides",
    "patchhist": "is the usual amount of every component there, where it usually is?",
    "LGST": "does a network that knows good pictures alone see each place as its teacher does?",
    "memory": "does each patch look like one of a good picture?",
    "DFM": "does the picture as a whole vary as good pictures do?",
}


class Outcome(NamedTuple):
    """What a threshold does to test images: good ones over it are rejected, defects that are not over it are missed."""

    rejected: int
    good: int
    missed: int
    defects: int

    @property
    def words(self) -> str:
        parts = [
            f"{number} of {count(of, what)} {'is' if 1 in (number, of) else 'are'} {how}"
            for number, of, what, how in (
                (self.rejected, self.good, "good picture", "rejected"),
                (self.missed, self.defects, "defect", "missed"),
            )
            if of
        ]
        return f"at this threshold {', '.join(parts)}" if parts else "no test images"


def render(**content: Any) -> str:
    """The page as text; ``content`` is what page.html names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= dict(percent=percent, mean=mean_known, number_of=count, breakable=breakable)
    detections = [metrics["detection"] for metrics in content["metrics"]]
    of_loco = not content["rendered"] and any(metrics["category"] in LOCO for metrics in content["metrics"])
    components = {component for card in content["cards"] for component, _ in card["legend"]} | {
        label
        for category in content["categories"]
        if category["pseudo_labels"]
        for label, *_ in category["pseudo_labels"]["labels"]
    }
    shared = [key for key in detections[0] if all(key in detection for detection in detections)]
    averaged = counted(
        {
            kind: [detection[FUSED][kind]["auroc"] for detection in detections if FUSED in detection]
            for kind in ("logical", "structural")
        }
    )
    return environment.get_template("page.html").render(
        content
        | {
            "averaged": averaged,
            "shared": shared,
            "detections": detections,
            "policy": POLICY,
            "published": PUBLISHED_AVERAGE if of_loco else {},
            "questions": QUESTIONS,
            "colours": {component: label_colour(component) for component in sorted(components)},
            "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
            "script": Markup((HERE / "page.js").read_text(encoding="utf-8")),
        }
    )


def breakable(name: str) -> Markup:
    """A name that a narrow column may break after its underscores, and nowhere else if it need not."""
    return Markup("_<wbr>").join(name.split("_"))


def percent(value: float | None) -> str:
    """One decimal; a dash where nothing was measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"
