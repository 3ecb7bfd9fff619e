"""The house keeps its rules: imports point down, no circles, no two files of one name, and models hold the method alone."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple, get_args

from csad.branches import BRANCHES, PAPER_BRANCHES, BranchName
from csad.data.workspace import Workspace

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("csad/**/*.py"), *ROOT.glob("models/**/*.py")])
LEVELS = [  # from the ground up
    {
        "csad",
        "csad.settings",
        "csad.yaml_layers",
        "csad.errors",
        "csad.progress",
        "csad.branches",
        "csad.processes",
    },
    {"models"},
    {"csad.inference", "csad.evaluation", "csad.data", "csad.cli", "csad.tasks"},
    {
        "csad.pseudo_labels",
        "csad.training",
        "csad.export",
        "csad.station",
        "csad.cluster",
        "csad.report",
        "csad.standins",
        "csad.synthetic",
        "csad.commands",
    },
    {"scripts"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


class Import(NamedTuple):
    module: str
    function: str | None  # in which it stands; None at the top of the file


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    if module.partition(".")[0] == "models":
        return "models"
    return ".".join(module.split(".")[:2]) if module.partition(".")[0] == "csad" else "scripts"


def imports_of(path: Path) -> Iterator[Import]:
    """What a file imports of this project, by full module names, also inside functions."""
    own = {name_of(module) for module in MODULES}

    def visit(node: ast.AST, function: str | None) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, function) for alias in child.names if alias.name in own)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{path} has a relative import"
                for alias in child.names:
                    inner = f"{child.module}.{alias.name}"
                    if inner in own or child.module in own:
                        yield Import(inner if inner in own else child.module, function)
            yield from visit(
                child, child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            )

    return visit(ast.parse(path.read_text(encoding="utf-8")), None)


IMPORTS = {path: list(imports_of(path)) for path in MODULES}


def test_every_room_has_a_level():
    rooms = {room_of(name_of(path)) for path in MODULES}
    assert rooms - {"csad"} <= LEVEL_OF.keys()
    assert sum(map(len, IMPORTS.values())) > 300


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    here = room_of(name_of(path))
    for imported, _ in IMPORTS[path]:
        there = room_of(imported)
        assert LEVEL_OF[there] <= LEVEL_OF[here], f"{name_of(path)} imports {imported}"
        assert there != "scripts", f"{name_of(path)} imports the script {imported}"


def test_there_is_no_circle_between_rooms_or_files():
    rooms, files = defaultdict(set), defaultdict(set)
    for path, imported in IMPORTS.items():
        for module, function in imported:
            if room_of(module) != room_of(name_of(path)):
                rooms[room_of(name_of(path))].add(room_of(module))
            if function is None:
                files[name_of(path)].add(module)
    TopologicalSorter(rooms).prepare()
    TopologicalSorter(files).prepare()


def test_no_two_files_have_the_same_name():
    names = Counter(path.name for path in MODULES if path.parent != ROOT and path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_rays_room_is_entered_only_where_ray_is_asked_for():
    """By a function of its own, whose callers look at ``args.ray`` first."""
    doors = {
        (name_of(path), function)
        for path, imported in IMPORTS.items()
        for module, function in imported
        if room_of(module) == "csad.cluster" and room_of(name_of(path)) != "csad.cluster"
    }
    assert doors and None not in {function for _, function in doors}
    for module, door in doors:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        calls = [
            node
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.If, ast.IfExp))
            and any(isinstance(part, ast.Name) and part.id == door for part in ast.walk(node))
        ]
        assert calls and all("args.ray" in ast.unparse(call.test) for call in calls), (module, door)


@pytest.mark.parametrize("path", sorted(ROOT.glob("models/*.py")), ids=name_of)
def test_models_know_no_files_and_no_settings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for imported, _ in IMPORTS[path]:
        assert room_of(imported) not in ("csad.data", "csad.settings"), imported
    packages = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert not packages & {
        "pathlib",
        "shutil",
        "tempfile",
        "json",
        "cv2",
        "PIL",
        "glob",
        "requests",
        "urllib",
    }
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"open", "np.load", "np.save", "np.savez", "torch.load", "torch.save", "os.listdir"}


def test_the_table_of_branches_is_complete_and_its_rows_differ(tmp_path):
    assert tuple(BRANCHES) == get_args(BranchName) and set(PAPER_BRANCHES) <= BRANCHES.keys()
    for field in ("title", "checkpoint", "state_key", "statistics"):
        assert len({getattr(branch, field) for branch in BRANCHES.values()}) == len(BRANCHES)
    workspace = Workspace(tmp_path)
    assert {branch: workspace.checkpoint("a{b}", branch).name for branch in BRANCHES} == {
        "patchhist": "segmentor_a{b}_256.pth",
        "LGST": "best_a{b}.pth",
        "memory": "memory_a{b}.pth",
        "DFM": "dfm_a{b}.pth",
    }
    assert all((ROOT / branch.stage).exists() for branch in BRANCHES.values())
