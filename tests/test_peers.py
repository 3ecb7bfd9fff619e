"""Benchmarks of other methods, and of few training images: what surrounds the long runs, on stand-ins for them."""

import json
import sys

from csad.data import data_sets, files
from csad.data.workspace import Workspace
from csad.errors import UserError

import pytest
import torch

from benchmarks import all_stages, few_images, measuring, peers, peers_timing, peers_worker
from benchmarks.measuring import Usage, in_turns

# Stands in for the worker: scores are mean brightness, so that the order is known; method broken fails.
WORKER = """
import json, sys, time
from pathlib import Path
import numpy as np
job = json.loads(Path(sys.argv[2]).read_text())
target = Path(job["target"])
if sys.argv[1] == "fit":
    assert job["method"] != "padim_256"
    test = np.load(job["test"])
    assert test.shape[1:] == (3, 256, 256) and test.dtype == np.uint8 and np.load(job["train"]).shape[0] == 4
    np.save(target / "scores.npy", np.arange(len(test), dtype=np.float32))
    np.save(target / "maps.npy", np.zeros((len(test), 256, 256), np.float32))
    (target / "result.json").write_text(json.dumps({"training_seconds": 1.5, "peak_mb": 5}))
else:
    print(json.dumps({"ready": []}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": 0.01 * json.loads(line)["batch"]}), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    monkeypatch.setattr(peers, "WORKER", path)
    monkeypatch.setattr(peers, "python_of", lambda environment: peers.Path(sys.executable))
    monkeypatch.setattr(peers, "PAUSE", 0)
    return path


def test_peers_are_measured_beside_each_other(make_dataset, tmp_path, worker, monkeypatch, capsys):
    data, output = make_dataset(train=4, test=3), tmp_path / "peers"
    command = ["peers", "--dataset_root", data, "--output", output, "--threads", 1, "--turns", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--methods", "dfm_256", "padim_256"])
    peers.main()
    content = json.loads((output / "peers.json").read_text())
    dfm, padim = content["rows"]
    assert (dfm["auroc_logical"], dfm["auroc_structural"], dfm["training_seconds"]) == (100, 100, 1.5)
    assert dfm["ms_per_image"] == pytest.approx({"1": 10, "8": 10}) and dfm["peak_mb"] == 5
    assert dfm["pixel_auroc_logical"] is None  # there are no masks
    assert "failed" in padim and "ms_per_image" not in padim
    assert "DFM 256" in capsys.readouterr().out
    assert {path.name for path in output.rglob("*.npy")} == {"scores.npy"}  # no pictures, no maps

    # What is fitted is kept; other pictures or another worker are fitted anew.
    (output / "discs/dfm_256/scores.npy").unlink()
    peers.main()
    assert not (output / "discs/dfm_256/scores.npy").exists()
    worker.write_text(WORKER + "\n")
    peers.main()
    assert (output / "discs/dfm_256/scores.npy").exists()


def test_peers_without_their_environment_say_how_to_make_it(make_dataset, tmp_path, monkeypatch):
    command = ["peers", "--dataset_root", make_dataset(), "--environment", tmp_path / "none"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    with pytest.raises(UserError, match="--set_up"):
        peers.main()


def test_the_coreset_is_the_farthest_row_each_time():
    torch.manual_seed(0)
    rows = torch.randn(60, 5)
    indices = peers_worker.k_center_greedy(rows, 12)
    assert len(set(indices.tolist())) == 12
    for step in range(1, 12):
        nearest = torch.cdist(rows, rows[indices[:step]]).min(1).values
        assert nearest[indices[step]] == pytest.approx(float(nearest.max()), rel=1e-4)
    assert len(set(peers_worker.k_center_greedy(torch.ones(5, 2), 5).tolist())) == 5  # copies, each once


def test_our_models_stand_beside_with_what_their_stages_measured(make_dataset, tmp_path, monkeypatch):
    (category,) = data_sets.Dataset(make_dataset()).select(None)

    class Engine:
        branches, runtime, precision, size, has_maps = ["memory"], "torch", "fp32", 256, True
        metadata = {"precision": "fp32"}

        def predict(self, images):
            assert images.shape == (8, 3, 256, 256)

    monkeypatch.setattr(peers_timing, "open_model", lambda path, device: Engine())
    where = {name: {"logical": {"pixel_auroc": area}} for name, area in (("memory", 70.0), ("fused", 80.0))}
    usage = {"seconds": 2.0, "processor_seconds": 3.0, "peak_mb": 100.0}
    for name in ("all", "branch_memory"):
        workspace = Workspace(tmp_path / name)
        files.write_bytes(workspace.exported_model("discs", "torch"), b"")
        files.write_json(workspace.evaluation("discs", "torch").with_suffix(".json"), {"auroc_logical": 90.0})
        files.write_json(workspace.metrics("discs"), {"localisation": where})
        stages = all_stages.TRAINING if name == "all" else ["export_model_torch"]
        files.write_json(workspace.root / "all_stages.json", {"discs": dict.fromkeys(stages, usage)})
    ((fused, run),) = peers_timing.exported(category, Workspace(tmp_path / "all"), [1, 8])
    ((alone, _),) = peers_timing.exported(category, Workspace(tmp_path / "branch_memory"), [1, 8])
    assert run(8) >= 0
    columns = ("alone", "auroc_logical", "pixel_auroc_logical", "training_seconds", "peak_mb")
    assert [fused[name] for name in columns] == [None, 90, 80, 10, 100]
    assert [alone[name] for name in columns] == ["memory", 90, 70, None, None]


def test_all_take_turns():
    calls = []
    variants = [lambda name=name: calls.append(name) or len(calls) for name in "ab"]
    assert in_turns(variants, 3, "") == [[3, 5, 7], [4, 6, 8]]
    assert calls == ["a", "b"] * 4


# All stages


@pytest.fixture
def stages(monkeypatch):
    """Stages that note their commands instead of running; `stages.fail` names one that fails."""

    class Stages(list):
        fail = ""

        def __call__(self, command, log):
            name = command[1].name
            if name == self.fail:
                log.write_text(f"Traceback\nerror: {name} needs more\n")
                raise UserError(f"{name} failed")
            self.append([str(word) for word in command[1:]])
            return Usage(2.0, 3.0, 100.0)

    noted = Stages()
    monkeypatch.setattr(measuring, "measured", noted)
    return noted


def names_of(stages) -> list[str]:
    return [command[0].rpartition("/")[2] for command in stages]


def test_stages_run_once_each_and_go_on_where_they_stopped(stages, tmp_path):
    stages.fail = "patch_memory.py"
    with pytest.raises(UserError):
        all_stages.run("discs", tmp_path, ["--seed", 1])
    stages.fail = ""
    all_stages.run("discs", tmp_path, ["--seed", 1], ["torch", "onnx"])
    expected = ["pseudo_label", "train_segmentor", "CSAD", "patch_memory", "export_model", "export_model"]
    assert names_of(stages) == [f"{name}.py" for name in [*expected, "benchmark_performance"]]
    assert all("--seed 1" in " ".join(command) for command in stages)
    assert "--pseudo_labels.proposer" in stages[0] and "--with_map" in stages[5]
    timings = all_stages.read(tmp_path)["discs"]
    assert all_stages.training_seconds(timings) == 10
    assert all_stages.training_seconds({"CSAD": timings["CSAD"]}) is None
    assert "| discs | 2 | 2 | 2 | 2 | 2 | 2 |" in all_stages.table(
        all_stages.seconds(all_stages.read(tmp_path))
    )


def test_branches_alone_are_exported_beside_and_change_nothing(stages, tmp_path):
    workspace = Workspace(tmp_path)
    files.write_bytes(workspace.checkpoint("discs", "memory"), b"rows")
    files.write_text(workspace.evaluation("discs", "torch"), "scores of all")
    all_stages.export_branches("discs", tmp_path, [], ["torch"])
    (command,) = stages
    assert "--branches memory --fusion.optional []" in " ".join(command)
    alone = Workspace(tmp_path / "branch_memory")
    assert alone.checkpoint("discs", "memory").read_bytes() == b"rows"
    files.write_text(alone.evaluation("discs", "torch"), "scores of one")
    assert workspace.evaluation("discs", "torch").read_text() == "scores of all"


# Few images


def test_draws_are_nested_and_leave_the_rest_as_it_is(make_dataset, tmp_path):
    (category,) = data_sets.Dataset(make_dataset()).select(None)
    drawn = {}
    for count, draw in ((5, 0), (8, 0), (5, 1)):
        few_images.link_subset(category, tmp_path / f"{count}_{draw}" / "discs", count, draw)
        (subset,) = data_sets.Dataset(tmp_path / f"{count}_{draw}").select(None)
        assert len(subset.train) == count
        drawn[count, draw] = {path.resolve() for path in subset.train}
        assert [path.resolve() for path in subset.validation] == category.validation
        assert [path.resolve() for _, path in subset.test_images] == [
            path for _, path in category.test_images
        ]
    assert drawn[5, 0] < drawn[8, 0] and drawn[5, 0] != drawn[5, 1]


def test_few_images_are_measured_and_refusals_told(make_dataset, tmp_path, stages, monkeypatch):
    data, output = make_dataset(), tmp_path / "few"
    results_plots = pytest.importorskip("benchmarks.results_plots")

    def metrics(category, workspace):
        count, draw = map(int, workspace.name.split("_"))
        values = {"auroc": 10.0 * count + draw}
        return {
            "detection": {name: {kind: values for kind in few_images.KINDS} for name in ("memory", "fused")}
        }

    monkeypatch.setattr(all_stages, "metrics", metrics)
    command = ["few_images", "--dataset_root", data, "--output", output, "--images", 5, 8, 500, "--draws", 2]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    stages.fail = "CSAD.py"
    few_images.main()
    rows = json.loads((output / "few_images.json").read_text())["rows"]
    assert [(row["images"], row["draw"]) for row in rows] == [(n, d) for n in (5, 8, 12) for d in (0, 1)]
    assert {row["failed"] for row in rows} == {"CSAD.py needs more"}
    assert "CSAD.py needs more" in few_images.table(rows)[2]
    stages.fail = ""
    few_images.main()
    rows = json.loads((output / "few_images.json").read_text())["rows"]
    measured, nothing = "50.5 ± 0.7 / 50.5 ± 0.7", "- / -"  # columns: histogram, LGST, memory, DFM, fused
    cells = few_images.table(rows)[2].strip("| ").split(" | ")
    assert cells == ["discs", "5", nothing, nothing, measured, nothing, measured]
    assert results_plots.few_images(files.read_json(output / "few_images.json")).startswith(b"<?xml")
