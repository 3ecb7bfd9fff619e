"""docs/fidelity.md names files and functions: they exist. Options and sizes in it are those of the code."""

import ast
import re
from pathlib import Path

from csad.cli import training_options
from csad.pseudo_labels import checkpoints
from csad.standins import penalty_pictures
from csad.training.best_on_test import with_checkpoint

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/fidelity.md").read_text(encoding="utf-8")
PLACES = sorted(set(re.findall(r"`([\w/]+\.py)`: `(\w+)`", PAGE)))


def test_every_row_names_a_file_and_a_function():
    rows = [line for line in PAGE.split("## What it takes")[0].splitlines() if line.startswith("| ")]
    differences = [row for row in rows if not row.startswith("| what ")]
    assert len(differences) > 30 and len(PLACES) > 15
    for row in differences:
        assert re.search(r"`[\w/]+\.py`: `\w+`", row), row
        assert row.count(" | ") == 5, row


@pytest.mark.parametrize("file, name", PLACES)
def test_files_and_functions_that_are_named_exist(file, name):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert name in defined


def test_other_names_in_it_are_right():
    for module in set(re.findall(r"python -m ([\w.]+)", PAGE)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()
    options = with_checkpoint(training_options("story"), "lgst").format_help()
    for option, value in re.findall(r"`(--\w+) (\w+)`", PAGE.split("## What it takes")[0].replace("CSAD.py --download", "")):
        assert option in options and (value in options or option == "--preset")


def test_sizes_of_downloads_are_those_that_are_fetched():
    for checkpoint in (checkpoints.SAM["vit_h"], checkpoints.GROUNDING_DINO["swint_ogc"], penalty_pictures.ARCHIVE):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{checkpoint.file}`"))
        assert row.split(" | ")[1].startswith(f"{checkpoint.megabytes:,g} MB"), row
    assert str(next(one.megabytes for one in checkpoints.TEXT_ENCODER_FILES if "safetensors" in one.file)) in PAGE


def test_readme_and_method_point_to_it():
    for page in ("README.md", "docs/method.md"):
        assert "fidelity.md" in (ROOT / page).read_text(encoding="utf-8")
