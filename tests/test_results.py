"""docs/results.md is what its JSON files say, and says which of its tables are of an older state of the code."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

from csad.data import files, layouts
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.evaluation.metrics import auroc
from csad.evaluation.spro import area_up_to

import numpy as np
import pytest
from test_docs import parser_of

from benchmarks import results, results_content
from benchmarks.results_tables import TABLES, Table

MACHINE = {
    "cpu": "Processor",
    "cores": 2,
    "instruction_sets": ["avx2"],
    "threads": 2,
    "device": "cpu",
    "packages": {"torch": "2.14.1"},
}


def without_marks_of_age(text: str) -> str:
    """They depend on git's history, which every commit changes."""
    return re.sub(rf"^{re.escape(results.OLDER)}.*\n\n", "", text, flags=re.MULTILINE)


def test_the_page_is_rendered_from_the_committed_figures():
    page = results.PAGE.read_text(encoding="utf-8")
    rendered = results.rendered(page, results.FOLDER, results.ROOT)
    assert without_marks_of_age(rendered) == without_marks_of_age(page), (
        "docs/results.md is not what docs/results/*.json say: python -m benchmarks.results --render"
    )
    assert [name for _, name, _, _ in results.MARKS.findall(page)] == list(TABLES)


def made(root: Path, **other) -> dict:
    """A table's JSON, of the commit that `root` is at."""
    state = results.state_of_code(root, ["decides.py"])
    return state | {"commits_before": [], "date": "2026-11-30", "machine": MACHINE, "seeds": [0]} | other


@pytest.fixture
def repository(tmp_path):
    """A git repository with one commit; `commit(name, text)` makes another."""
    root = tmp_path / "repository"
    root.mkdir()

    def commit(name: str, text: str) -> None:
        (root / name).write_text(text)
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        for command in (["add", "-A"], [*identity, "commit", "-q", "-m", text]):
            subprocess.run(["git", "-C", root, *command], check=True)

    subprocess.run(["git", "init", "-q", root], check=True)
    commit("decides.py", "first")
    return root, commit


def test_a_table_is_older_once_a_file_that_decides_it_is_committed(repository):
    root, commit = repository
    sources, table = ["decides.py"], made(root)
    assert results.older(root, table, sources) is None
    commit("other.py", "decides nothing")
    assert results.older(root, table, sources) is None
    commit("decides.py", "second")
    last = results.git(root, "rev-parse", "--short=7", "HEAD")
    assert f"`{last}`" in results.older(root, table, sources)
    assert results.older(root, made(root), sources) is None
    # What it was made from counts, too.
    assert results.older(root, made(root, commits_before=[table["commit"]]), sources)


def test_changes_that_are_not_committed_and_unknown_commits_are_told(repository, tmp_path):
    root, _ = repository
    assert "does not know" in results.older(root, made(root, commit="0" * 40), ["decides.py"])
    assert "does not know" in results.older(tmp_path, made(root), ["decides.py"])
    (root / "decides.py").write_text("changed")
    assert "`decides.py` had changes" in results.older(root, made(root), ["decides.py"])


def test_the_mark_of_age_stands_in_the_page(repository, monkeypatch, tmp_path):
    root, commit = repository
    table = Table("", "1", [], [], lambda content: [f"| {content} |"], ["decides.py"])
    monkeypatch.setattr(results, "TABLES", {"tiny": table})
    page = "before\n<!-- results: tiny -->\nanything\n<!-- end of tiny -->\nafter\n"
    assert "Not measured yet" in results.rendered(page, tmp_path, root)
    files.write_json(tmp_path / "tiny.json", made(root, commands=["python x.py"], content=7))
    fresh = results.rendered(page, tmp_path, root)
    assert "| 7 |" in fresh and "    python x.py\n" in fresh and results.OLDER not in fresh
    assert results.rendered(fresh, tmp_path, root) == fresh
    commit("decides.py", "second")
    older = results.rendered(fresh, tmp_path, root)
    assert results.OLDER in older and without_marks_of_age(older) == fresh


def given(work: Path, **other) -> argparse.Namespace:
    values = {"work": work, "dataset_root": work / "pictures", "environment": work / "environment"}
    values |= {"methods": ["dfm_256"], "seeds": [0, 1], "overwrite": False}
    return argparse.Namespace(**values | other)


def test_a_table_is_of_the_commit_at_which_its_work_began(repository, monkeypatch, tmp_path):
    root, commit = repository
    monkeypatch.setattr(results, "ROOT", root)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    work = tmp_path / "work"
    writes = "import os, sys; os.makedirs(sys.argv[1], exist_ok=True); open(sys.argv[1] + '/x.json', 'w').write('[1]')"
    fails = shlex.join(["-c", f"{writes}; raise SystemExit(2)"]) + " results_work/left"
    table = Table("", "1", [fails], ["results_work/left/x.json"], None, ["decides.py"])
    first = results.git(root, "rev-parse", "HEAD")
    with pytest.raises(UserError, match="exit status 2"):
        results.make("tiny", table, given(work))
    commit("decides.py", "second")
    checks = f"import sys; assert sys.argv[1:] == ['{work}/left', '{work}/pictures', '0']"
    works = table._replace(commands=[shlex.join(["-c", checks]) + " results_work/left photographs {first}"])
    results.make("tiny", works, given(work))
    content = files.read_json(tmp_path / "results" / "tiny.json")
    assert content["commit"] == first and content["content"] == [1] and content["seeds"] == [0]
    assert content["commands"][0].endswith(" results_work/left photographs 0")
    # Started over, it is of the commit of today, and what other tables made stays.
    other = work / "other.json"
    other.touch()
    (work / "left/of_before").touch()
    works = table._replace(commands=[shlex.join(["-c", writes]) + " results_work/left"])
    results.make("tiny", works, given(work, overwrite=True))
    assert not (work / "left/of_before").exists() and other.exists()
    content = files.read_json(tmp_path / "results" / "tiny.json")
    assert content["commit"] == results.git(root, "rev-parse", "HEAD")
    with pytest.raises(UserError, match="make that with --only other first"):
        results.make("next", table._replace(needs=["other"]), given(work))


def test_nothing_is_started_over_that_cannot_be_made(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", repository[0])
    left = Table("", "1", [], ["results_work/left/x.json"], None, [], needs=["other"])
    for name, table, problem in (
        ("photographs", TABLES["photographs"], "needs photographs"),
        ("next", left, "--only other"),
    ):
        folders = [tmp_path / "photographs_seed_0", tmp_path / "left"]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        with pytest.raises(UserError, match=problem):
            results.make(name, table, given(tmp_path, dataset_root=None, overwrite=True))
        assert all(folder.exists() for folder in folders)


def test_seeds_and_files_of_tables(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ROOT", repository[0])
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    kept = []
    monkeypatch.setattr(results_content, "detection", lambda *arguments: kept.append(arguments))
    for stage in ("segmentor", "lgst"):
        files.write_json(tmp_path / f"training_speed/benchmark_training_{stage}.json", {"stage": stage})
    for name in ("photographs", "training_speed"):
        results.make(name, TABLES[name]._replace(commands=["-c '{seed}'"]), given(tmp_path))
    assert kept == [(tmp_path / "rendered", {seed: tmp_path / f"photographs_seed_{seed}" for seed in (0, 1)})]
    content = files.read_json(tmp_path / "results/training_speed.json")["content"]
    assert content == {stage: {"stage": stage} for stage in ("segmentor", "lgst")}
    assert files.read_json(tmp_path / "results/photographs.json")["seeds"] == [0, 1]


@pytest.mark.parametrize("name", TABLES)
def test_commands_of_tables_are_understood(name, tmp_path):
    for command in results.given(TABLES[name].commands, given(tmp_path)):
        words = shlex.split(command)
        script = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
        _, unknown = argparse.ArgumentParser.parse_known_args(
            parser_of(script), words[2 if words[0] == "-m" else 1 :]
        )
        assert not unknown


@pytest.mark.parametrize("name", TABLES)
def test_files_that_decide_a_table_exist(name):
    paths = [path.removeprefix(":(exclude)") for path in TABLES[name].sources]
    assert [path for path in paths if not (results.ROOT / path).exists()] == []


# What is kept and rendered


def test_roc_curves_have_the_area_that_auroc_says():
    rng = np.random.default_rng(0)
    good, anomalous = rng.normal(0, 1, 500), rng.normal(1, 1, 500)
    curve = results_content.true_positive_rates(good, anomalous)
    area = area_up_to(results_content.RATES, curve, 1.0)
    assert 100 * area == pytest.approx(auroc(good, anomalous), abs=0.3)
    np.testing.assert_array_equal(results_content.true_positive_rates(good, good + 100), 1)


def test_detection_is_read_from_what_the_stages_left(make_dataset, tmp_path):
    dataset, workspace = make_dataset(train=4, test=3), Workspace(tmp_path / "work")
    values = {"auroc": 87.65}
    detection = {
        name: {kind: values for kind in results_content.KINDS} for name in ("memory", "a+b", "fused")
    }
    where = {"logical": {"spro": {"0.05": 12.3}, "pixel_auroc": 45.6}, "structural": {"missing": "no masks"}}
    metrics = {"detection": detection, "localisation": {"fused": where}, "weights": {"memory": 1.0}}
    files.write_json(workspace.metrics("discs"), metrics)
    usage = {"seconds": 12.0, "processor_seconds": 20.0, "peak_mb": 900.0}
    files.write_json(workspace.root / "all_stages.json", {"discs": {"pseudo_label": usage}})
    for part in ("logi", "struc"):
        files.write_array(workspace.scores("discs", "memory", part), np.array([0.0, 1, 2, 3, 4, 5]))
    images = [f"test/{split}/00{index}.png" for split in layouts.SPLITS for index in range(3)]
    table = "image,split,score\n" + "".join(f"{image},x,{number}\n" for number, image in enumerate(images))
    files.write_text(workspace.evaluation("discs", "torch"), table)

    content = results_content.detection(dataset, {0: workspace.root, 1: workspace.root})
    assert content["roc"]["memory"]["logical"] == [1.0] * 41 == content["roc"]["fused"]["structural"]
    lines = results_content.render_detection(content)
    assert "| discs | 87.7 / 87.7 | 87.7 / 87.7 | memory 1 |" in lines
    assert "| average | 87.7 ± 0.0 / 87.7 ± 0.0 | 87.7 ± 0.0 / 87.7 ± 0.0 |" in lines
    assert "| discs | 12.3 / - | 45.6 / - |" in lines and "| discs | 12 |  |  |  |  |  |" in lines
