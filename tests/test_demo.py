"""demo.sh with a stand-in for Python that only notes what it was asked to do, and the set-up of its environment."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    "make_synthetic_loco.py",
    "pseudo_label.py",
    "train_segmentor.py",
    "CSAD.py",
    "patch_memory.py",
    "export_model.py",
    "benchmark_performance.py",
    "report.py",
]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="demo.sh needs bash")


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def demo(tmp_path):
    """Start demo.sh in a folder where each script's run is a line of shell, which gets the script's name as $1."""

    def demo(script_line: str, *arguments: str, **options) -> subprocess.Popen:
        shutil.copy(ROOT / "demo.sh", tmp_path)
        executable(tmp_path / "note", script_line)
        (tmp_path / ".ci").mkdir(exist_ok=True)
        (tmp_path / ".ci/setup_environment.sh").write_text("python=./note\n")
        for workspace in ("my folder", "demo_workspace", "demo_workspace_small", "demo_workspace_seed_3"):
            (tmp_path / workspace).mkdir(exist_ok=True)
            (tmp_path / workspace / "score_combine_result.txt").touch()
        return subprocess.Popen(
            ["bash", tmp_path / "demo.sh", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return demo


def test_a_workspace_may_have_a_space_in_its_name(demo, tmp_path):
    run = demo('(IFS="|"; echo "$*") >> asked', "--small", "--workspace", "my folder", "--seed", "3")
    assert run.communicate()[1] == "" and run.returncode == 0
    asked = [line.split("|") for line in (tmp_path / "asked").read_text().splitlines()]
    assert [line[0] for line in asked] == SCRIPTS
    for line in asked[1:]:
        assert line[1:11] == [
            "--workspace",
            "my folder",
            "--dataset_root",
            "my folder/datasets/synthetic_loco",
            "--categories",
            "pushpins",
            "--preset",
            "quick",
            "--seed",
            "3",
        ]


def test_demos_of_other_pictures_have_workspaces_of_their_own(demo, tmp_path):
    """One after the other, as README lists them: pictures of other settings or another seed are not rendered into a data set."""
    for options in (["--small"], [], ["--all"], ["--seed", "3"]):
        demo('(IFS="|"; echo "$*") >> asked', *options).communicate()
    renderings = [
        line.split("|")
        for line in (tmp_path / "asked").read_text().splitlines()
        if line.startswith(SCRIPTS[0])
    ]
    folders = [line[line.index("--dataset_root") + 1].partition("/")[0] for line in renderings]
    assert folders == ["demo_workspace_small", "demo_workspace", "demo_workspace", "demo_workspace_seed_3"]


@pytest.mark.parametrize("options", [[], ["--small"], ["--all"]])
def test_every_step_is_announced_before_it_begins(demo, options):
    said = demo('[ "$1" = benchmark_performance.py ] || echo "runs $1"', *options).communicate()[0]
    lines = re.findall(r"^(\d of \d): .+ \((\w+\.py)\)$", said, re.MULTILINE)
    assert lines == [(f"{number} of 8", script) for number, script in enumerate(SCRIPTS, 1)]
    for script in set(SCRIPTS) - {"benchmark_performance.py"}:
        assert said.index(f"({script})") < said.index(f"runs {script}")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_interrupted_names_the_command_that_continues(demo, tmp_path, number, status):
    """The script's own last line, "the same command continues", would name one that nobody typed."""
    line = f"[ $1 != CSAD.py ] || {{ trap 'echo one line >&2; exit {status}' INT TERM; touch begun; sleep 9 & wait; }}"
    run = demo(line, "--small", "--workspace", "my folder", start_new_session=True)
    while not (tmp_path / "begun").exists():
        assert run.poll() is None
        time.sleep(0.02)
    os.killpg(run.pid, number)
    assert run.communicate()[1] == (
        "one line\ninterrupted at step 4 of 8; ./demo.sh --small --workspace my\\ folder continues from there\n"
    )
    assert run.returncode == status


def test_what_fails_does_so_too(demo):
    run = demo('[ "$1" != report.py ] || { echo "error: the disk is full" >&2; exit 2; }')
    assert run.communicate()[1] == (
        "error: the disk is full\n"
        "stopped at step 8 of 8; once its cause is removed, ./demo.sh continues from there\n"
    )
    assert run.returncode == 2


# The environment


@pytest.fixture
def set_up(tmp_path):
    """Source setup_environment.sh with a Python that makes environments of two empty programs; (status, stdout, stderr)."""
    (tmp_path / "requirements.lock").write_text("nothing==1\n")
    executable(
        tmp_path / "python3",
        '[ "$1" = -c ] && exit\n'
        'for name in pip python; do mkdir -p "$3/bin"; echo > "$3/bin/$name"; chmod +x "$3/bin/$name"; done\n'
        'touch "$3/pyvenv.cfg"',
    )

    def set_up(folder: str = "") -> tuple[int, str, str]:
        done = subprocess.run(
            ["bash", "-euc", f". {ROOT}/.ci/setup_environment.sh; echo ends with $python"],
            cwd=tmp_path,
            env=os.environ | {"CSAD_VENV": folder, "PYTHON": str(tmp_path / "python3")},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return set_up


@pytest.mark.parametrize("folder", ["", "envv", "an environment", "absolute"])
def test_the_folder_of_an_environment_is_named_before_it_is_made(set_up, tmp_path, folder):
    folder = str(tmp_path / folder) if folder == "absolute" else folder
    status, said, problem = set_up(folder)
    environment = tmp_path / (folder or ".venv")
    assert (status, problem) == (0, "") and (environment / ".installed").exists()
    assert said.startswith(f"Making the virtual environment {environment} (CSAD_VENV names ")
    assert ("CSAD_VENV names this folder" in said) == bool(folder)
    assert set_up(folder) == (0, f"ends with {folder or '.venv'}/bin/python\n", "")


def test_an_empty_folder_becomes_an_environment_and_one_of_other_packages_is_completed(set_up, tmp_path):
    (tmp_path / "envv").mkdir()
    assert "Making the virtual environment" in set_up("envv")[1]
    (tmp_path / "envv/.installed").unlink()
    assert "Installing into the virtual environment" in set_up("envv")[1]


@pytest.mark.parametrize("kind", ["pictures", "a system", "a file", "hidden files", "torn"])
@pytest.mark.parametrize("folder", ["", "envv"])
def test_nothing_is_installed_into_what_is_no_environment(set_up, tmp_path, folder, kind):
    path = tmp_path / (folder or ".venv")
    if kind == "a system":
        executable(path / "bin/python", "")
    elif kind == "a file":
        path.touch()
    else:
        path.mkdir()
        (path / {"pictures": "0.png", "hidden files": ".git", "torn": "pyvenv.cfg"}[kind]).touch()
    before = sorted(tmp_path.rglob("*"))
    status, said, problem = set_up(folder)
    assert status == 2 and not said
    assert problem.startswith(f"error: {path} exists and is not a virtual environment")
    assert problem.count("\n") == 1 and "CSAD_VENV" in problem
    assert sorted(tmp_path.rglob("*")) == before
