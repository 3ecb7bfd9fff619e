"""Stages on a Ray cluster of a head and two worker nodes, simulated on this machine: the same bytes, whatever dies meanwhile."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from csad import errors
from csad.cluster import connection
from csad.data.workspace import Workspace
from csad.errors import UserError
from csad.training import stage

import pytest
from conftest import make_three_categories

import pseudo_label

ROOT = Path(__file__).parent.parent
TINY = (
    "--preset",
    "quick",
    "--backbone",
    "efficientnet_lite0",
    "--device",
    "cpu",
    "--images.size",
    "256",
    "--lgst.steps",
    "20",
    "--lgst.width",
    "16",
    "--lgst.teacher_channels",
    "16",
    "--pseudo_labels.rotations",
    "2",
)
TWO = ("--categories", "bolts", "discs", "--seeds", "0", "1")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
PATIENCE = 120


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_three_categories(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def labelled(dataset, tmp_path_factory):
    """(contents, sentence at the end) of stage 1 without Ray."""
    workspace = tmp_path_factory.mktemp("sequential")
    said = start("pseudo_label", workspace, dataset).communicate()[0]
    return contents(workspace), said.splitlines()[-1]


@pytest.fixture
def run(dataset, monkeypatch, capsys):
    """Run a stage in this process; returns what it printed, or the sentence with which it ended."""

    def run_stage(stage: str, workspace: Path, *extra: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", command(stage, workspace, dataset, *extra)[1:])
        try:
            errors.run_script(importlib.import_module(stage).main)
        except SystemExit:
            return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return capsys.readouterr().out

    return run_stage


@pytest.fixture(scope="module")
def nodes():
    """A cluster of a head, which works on nothing, and two worker nodes."""
    utilities = pytest.importorskip("ray.cluster_utils")
    cluster = utilities.Cluster(
        initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False}
    )
    try:
        cluster.add_node(**NODE)
        cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def command(stage: str, workspace: Path, dataset: Path, *extra: str) -> list[str]:
    return [
        sys.executable,
        f"{stage}.py",
        "--workspace",
        str(workspace),
        "--dataset_root",
        str(dataset),
        *TINY,
        *extra,
    ]


def start(*arguments) -> subprocess.Popen:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("Ctrl-C is ignored here")
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until_training(driver: subprocess.Popen, workspace: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any("train LGST" in path.read_text() for path in workspace.glob(".cluster/*.bar")):
        assert driver.poll() is None and time.monotonic() < deadline, driver.communicate()[0]
        time.sleep(0.1)


def contents(workspace: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(workspace)): path.read_bytes()
        for path in workspace.rglob("*")
        if path.is_file()
        and not path.name.startswith(".")
        and not {".cluster", "damaged.unfinished"} & {*path.parts}
    }


def test_stage_1_gives_the_same_bytes_and_a_failure_does_not_stop_the_others(run, nodes, labelled, tmp_path):
    expected, sentence = labelled
    assert "1 of 3 failed, the others are finished; damaged: " in sentence and "003.png" in sentence
    assert run("pseudo_label", tmp_path, "--ray", nodes.address) == sentence
    assert contents(tmp_path) == expected


def test_ctrl_c_a_killed_driver_and_a_killed_node_change_no_byte(run, nodes, dataset, tmp_path):
    longer = (*TWO, "--lgst.steps", "400")  # long enough to be in the middle of when a signal comes
    run("CSAD", tmp_path / "sequential", *longer)
    arguments = ("CSAD", tmp_path / "ray", dataset, *longer, "--ray", nodes.address)

    driver = start(*arguments)
    wait_until_training(driver, tmp_path / "ray")
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=PATIENCE)[0]
    assert driver.returncode == 130 and "interrupted; everything finished so far is kept" in said
    assert list((tmp_path / "ray").glob("seeds/*/ckpt/*_lgst_progress.pth"))

    driver = start(*arguments)
    wait_until_training(driver, tmp_path / "ray")
    driver.kill()
    driver.communicate()

    driver = start(*arguments)  # its jobs wait until those of the lost driver have ended
    wait_until_training(driver, tmp_path / "ray")
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    nodes.add_node(**NODE)
    said = driver.communicate(timeout=PATIENCE)[0]
    assert driver.returncode == 0, said
    assert contents(tmp_path / "ray") == contents(tmp_path / "sequential")


def test_a_dry_run_names_the_jobs_and_builds_and_writes_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_backbone", None)  # it may download weights
    assert run("CSAD", tmp_path / "work", *TWO, "--dry_run").splitlines() == [
        "bolts, seed 0",
        "discs, seed 0",
        "bolts, seed 1",
        "discs, seed 1",
    ]
    assert run("pseudo_label", tmp_path / "work", "--ray", "local", "--dry_run").splitlines() == [
        f"{name}{part}"
        for name in ("bolts", "damaged", "discs")
        for part in (": begin", ": images 1 to 6", "")
    ]
    assert not (tmp_path / "work").exists()


def test_stage_1_in_parts_gives_the_same_bytes_in_any_order(run, labelled, tmp_path, monkeypatch):
    """What a cluster does, one after another: every task derived anew from the arguments, chunks backwards."""
    monkeypatch.setattr(pseudo_label, "IMAGES_PER_TASK", 4)
    done = []

    def on_a_cluster(args, jobs):
        tasks = jobs(args)
        for name in sorted(
            tasks, key=lambda name: (name in ("bolts", "discs"), "images" in name, name[::-1])
        ):
            assert all(one in done for one in tasks[name].after)
            done.append(name)
            jobs(args)[name].do()
        return {}, {}

    monkeypatch.setattr("csad.cluster.remote_jobs.run", on_a_cluster)
    run("pseudo_label", tmp_path, "--ray", "local", "--categories", "bolts", "discs")
    assert len(done) == 8
    assert contents(tmp_path) == labelled[0]


# Mistakes


def test_a_second_driver_is_refused(run, tmp_path):
    with Workspace(tmp_path).lock():
        assert "another run is working in" in run("CSAD", tmp_path, "--ray", "local")


def test_without_ray(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "--ray needs Ray; in the repository's folder, pip install '.[cluster]' installs it" in run(
        "CSAD", tmp_path, "--ray", "local"
    )
    assert not [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name not in (".csad.lock", "backbone.json")
    ]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no address"])
def test_an_address_that_does_not_answer(run, tmp_path, monkeypatch, address):
    pytest.importorskip("ray")
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 2)
    assert f"no Ray cluster answers at '{address}'; --ray takes local, auto, or HOST:PORT" in run(
        "CSAD", tmp_path, "--ray", address
    )


def test_a_node_that_does_not_see_the_drivers_files(tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "SEEN_SECONDS", 0)
    driver = connection.Driver(tmp_path, "token", Path(os.getcwd()))
    with pytest.raises(
        UserError, match="cannot see .*driver as this run wrote it.*storage that all nodes share"
    ):
        driver.enter()
    driver.marker.write_text("another run's")
    with pytest.raises(UserError, match="cannot see"):
        driver.enter()
    driver.marker.write_text("token")
    driver.enter()
