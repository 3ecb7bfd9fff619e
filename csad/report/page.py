"""The HTML page: its template and style lie beside this file; everything shown is escaped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from csad.evaluation.metrics import counted, mean_known

import jinja2
from markupsafe import Markup

HERE = Path(__file__).parent
# Nothing is fetched: browsers are told to refuse it, too.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PUBLISHED_AVERAGE = {"paper": 95.3, "repository": 95.6}  # mean image AUROC on MVTec LOCO AD (docs/method.md section 4)


def render(**content: Any) -> str:
    """The page as text; ``content`` is what page.html names."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["percent"] = percent
    environment.filters["mean"] = mean
    detections = [metrics["detection"] for metrics in content["metrics"]]
    shared = [key for key in detections[0] if all(key in one for one in detections)]
    averaged = counted({kind: [one[key][kind]["auroc"] for one in detections for key in ("fused",) if key in one]
                        for kind in ("logical", "structural")})
    return environment.get_template("page.html").render(
        content | {"averaged": averaged, "shared": shared, "detections": detections,
                   "policy": POLICY, "published": PUBLISHED_AVERAGE,
                   "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),
                   "script": Markup((HERE / "page.js").read_text(encoding="utf-8"))})


def percent(value: float | None) -> str:
    """One decimal; a dash where nothing was measured."""
    return "–" if value is None or math.isnan(value) else f"{value:.1f}"


def mean(values) -> float | None:
    """Of what was measured; None where nothing was."""
    average = mean_known(values)
    return None if math.isnan(average) else average
