"""The training benchmark on networks small enough for a test."""

import json
import math
import sys

import benchmark_training
import pytest


@pytest.mark.parametrize("stage", ["lgst", "segmentor"])
def test_it_times_every_variant_and_counts_the_multiply_adds(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [
        "benchmark_training.py", "--stage", stage, "--workspace", str(tmp_path), "--device", "cpu", "--preset", "quick",
        "--backbone", "embedded", "--timed_steps", "1", "--lgst.width", "16", "--lgst.teacher_channels", "16",
        "--segmentor.width", "16"])
    benchmark_training.main()
    report = json.loads((tmp_path / f"benchmark_training_{stage}.json").read_text())
    assert {"plain fp32", "engine fp32"} <= report["variants"].keys()
    for row in report["variants"].values():
        assert row["ms_per_step"] > 0 and math.isfinite(row["floor_ms"])
    plain, engine = (report["variants"][name]["multiply_adds"] for name in ("plain fp32", "engine fp32"))
    assert 0 < engine < plain  # it leaves out what is known or not asked for
