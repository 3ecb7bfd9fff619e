"""README and docs cannot rot: links, commands, options, and names of files and functions are those of the code.

Commands in code blocks are parsed by their scripts' own parsers, with their values. Commands in code spans of sentences,
which are often parts of a command, have their options looked up. A block that does not run in a fresh clone says what it
lacks, in an HTML comment before it: <!-- needs: MVTec LOCO AD, a GPU -->.
"""

import argparse
import ast
import functools
import importlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from csad import settings
from csad.cli import overrides
from csad.pseudo_labels import checkpoints
from csad.standins import penalty_pictures

import pytest

ROOT = Path(__file__).parent.parent
OTHERS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (".github/CONTRIBUTING.md", "docs/changelog.md", "docs/third_party.md")
}
PAGES = {
    name: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (name := str(path.relative_to(ROOT))) not in OTHERS
}
CODE = [
    path
    for pattern in (
        "*.py",
        "*.sh",
        ".ci/*",
        "*.toml",
        "csad/**/*.py",
        "models/*.py",
        "benchmarks/*.py",
        "configs/**/*.yaml",
        "tests/*.py",
    )
    for path in sorted(ROOT.glob(pattern))
]
FIDELITY, METHOD = PAGES["docs/fidelity.md"], PAGES["docs/method.md"]
STAGES = {
    "check_dataset",
    "pseudo_label",
    "train_segmentor",
    "CSAD",
    "patch_memory",
    "export_model",
    "benchmark_performance",
    "report",
    "predict",
    "serve",
    "csad-predict",
    "csad-serve",
}
MODULES = {
    "predict": "csad.commands.score_images",
    "csad-predict": "csad.commands.score_images",
    "serve": "csad.commands.run_station",
    "csad-serve": "csad.commands.run_station",
}


# README


def test_readme_is_two_screens():
    assert len(PAGES["README.md"].split()) <= 1000
    assert len(PAGES["README.md"].splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES)
def test_lines_fit_but_for_tables(page):
    assert not [line for line in PAGES[page].splitlines() if len(line) > 110 and not line.startswith("|")]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_each_page_begins_with_the_question_it_answers(page):
    title, paragraph = PAGES[page].split("\n\n")[:2]
    assert title.startswith("# ") and re.match(r"\*\*[^*]+\?\*\*", paragraph), paragraph
    assert re.search(rf"\(docs/{Path(page).name}[#)]", PAGES["README.md"]), (
        f"README.md does not lead to {page}"
    )


# Links


def outside_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", re.sub(r"^(    .*|```[\s\S]*?^```)$", "", text, flags=re.MULTILINE))


def anchors(text: str) -> set[str]:
    """Those that GitHub gives headings: letters, digits, - and _; a second heading of the same name gets -1."""
    seen: dict[str, int] = {}
    for heading in re.findall(
        r"^#+ (.+)$", re.sub(r"^```[\s\S]*?^```", "", text, flags=re.MULTILINE), re.MULTILINE
    ):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        seen |= {f"{slug}-{seen[slug]}": 0} if seen[slug] else {}
    return set(seen)


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page):
    text = (PAGES | OTHERS)[page]
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code(re.sub(r"\[[^\]]*`[^\]]*\]", "[code]", text))):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), target


def test_anchors_are_those_of_github():
    assert anchors("# A `b_c.py`: d\n## What `--x` is\n## Same\n## Same\n") == {
        "a-b_cpy-d",
        "what---x-is",
        "same",
        "same-1",
    }


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_and_sections_that_code_names_exist(path):
    text = re.sub(r"\s+#?\s*", " ", path.read_text(encoding="utf-8"))
    for page, sections in re.findall(r"(docs/\w+\.md)(?:,? sections? ((?:\d(?:, | and | to )?)+))?", text):
        assert page in PAGES | OTHERS, page
        for number in re.findall(r"\d", sections):
            assert f"\n## {number} " in PAGES[page], f"{page} section {number}"


# Names of the code


@functools.cache
def defined(file: str) -> list[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


NAMES = sorted(
    {
        (page, file, name)
        for page, text in PAGES.items()
        for file, names in re.findall(r"`([\w/]+\.py)`: (`\w+`(?:, `\w+`)*)", re.sub(r"\s+", " ", text))
        for name in re.findall(r"\w+", names)
    }
)


@pytest.mark.parametrize("page, file, name", NAMES)
def test_files_and_functions_that_are_named_exist(page, file, name):
    assert defined(file).count(name) == 1


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(
        r"`((?:csad|models|benchmarks|tests|configs)/[\w/.]+\.\w+|[\w]+\.py)`", PAGES[page]
    ):
        assert (ROOT / name).exists() or name.startswith("configs/categories/"), name


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of tables but their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        line.strip("| ").split(" | ")
        for line, after in itertools.zip_longest(lines, lines[1:], fillvalue="")
        if not line.startswith("|---") and not after.startswith("|---")
    ]


def test_every_equation_leads_to_a_function():
    table = rows(METHOD.split("## Where each equation is")[1].split("\n## ")[0])
    assert len(table) >= 10
    for row in table:
        assert len(row) == 3 and re.fullmatch(r"`[\w/]+\.py`: `\w+`(, `\w+`)*", row[2]), row


def test_every_difference_names_a_file_and_a_function():
    table = rows(FIDELITY.split("## What it takes")[0])
    assert len(table) > 30
    for row in table:
        assert len(row) == 6 and re.search(r"`[\w/]+\.py`: `\w+`", row[3]), row


def test_sizes_of_downloads_are_those_that_are_fetched():
    for checkpoint in (
        checkpoints.SAM["vit_h"],
        checkpoints.GROUNDING_DINO["swint_ogc"],
        penalty_pictures.ARCHIVE,
    ):
        row = next(line for line in FIDELITY.splitlines() if line.startswith(f"| `{checkpoint.file}`"))
        assert row.split(" | ")[1].startswith(f"{checkpoint.megabytes:,g} MB"), row
    assert (
        str(next(file.megabytes for file in checkpoints.TEXT_ENCODER_FILES if "safetensors" in file.file))
        in FIDELITY
    )


# Commands


class Block(NamedTuple):
    page: str
    needs: str
    lines: tuple[str, ...]


def blocks(page: str, text: str) -> list[Block]:
    """Code blocks, indented by four or fenced, with what the comment before them says that they need."""
    pattern = r"(?:<!-- needs: ([^>]+) -->\n\n?)?(?:^```\w*\n([\s\S]*?)^```|((?:^    .*\n|^\n(?=    ))+))"
    return [
        Block(page, needs, tuple((fenced or indented).replace("\\\n", " ").splitlines()))
        for needs, fenced, indented in re.findall(pattern, text + "\n", re.MULTILINE)
    ]


def commands(block: Block, values: dict[str, list[str]]) -> list[list[str]]:
    """Every command of a block as words, variables and loops written out.

    Args:
        values: of variables from the page's blocks before, to which this one's are added.
    """
    result = []
    for line in block.lines:
        loop = re.match(r"\s*for (\w+) in (.+?); do", line)
        if loop:
            values[loop[1]] = loop[2].split()
            continue
        for command in re.split(r"&&|\|\||[;|&](?=\s|$)", re.sub(r"(^|\s)#.*", "", line)):
            assigned = re.fullmatch(r"\s*(\w+)=\"([^\"]*)\"\s*", command)
            if assigned:
                values[assigned[1]] = [assigned[2]]
                continue
            versions = [command]
            for name in re.findall(r"\$(\w+)", command):
                versions = [
                    version.replace(f"${name}", value)
                    for version in versions
                    for value in values.get(name, [f"${name}"])
                ]
            result += [words for version in versions if (words := shlex.split(version))]
    return result


def called(words: list[str]) -> tuple[str, list[str]] | None:
    """Name of our script, module or command, and what it is given; None for the commands of others."""
    for index, word in enumerate(words):
        if word in ("python", "python3") and words[index + 1 :]:
            rest = words[index + 1 :]
            if rest[0] == "-m":
                return (rest[1], rest[2:]) if rest[1].startswith("benchmarks.") else None
            return rest[0].removesuffix(".py"), rest[1:]
        if word in ("csad-predict", "csad-serve") or re.fullmatch(r"\./\w+\.sh", word):
            return word, words[index + 1 :]
    return None


class Captured(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


@functools.cache
def parser_of(name: str) -> argparse.ArgumentParser:
    """A script's own parser, as it stands when the script parses its command line."""

    def capture(parser: argparse.ArgumentParser, *_: object) -> None:
        raise Captured(parser)

    main = importlib.import_module(MODULES.get(name, name)).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)  # parse_args calls it
        patch.setattr(sys, "argv", [name])
        with pytest.raises(Captured) as captured:
            main()
    return captured.value.parser


def options(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def require_options(name: str, given: list[str]) -> None:
    if name.endswith(".sh"):
        script = (ROOT / name).read_text(encoding="utf-8")
        assert (
            all(re.search(rf"^\s+{option}\)", script, re.MULTILINE) for option in given)
            or name == "./test.sh"
        ), given
        return
    known = parser_of(name)._option_string_actions
    for option in given:
        assert option in known, f"{name} has no option {option}"


BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
VARIABLES: dict[str, dict[str, list[str]]] = {page: {} for page in PAGES}
CALLS = [
    (block, *call)
    for block in BLOCKS
    for words in commands(block, VARIABLES[block.page])
    if (call := called(words))
]


@pytest.mark.parametrize(
    "block, name, given", CALLS, ids=[f"{block.page}: {name}" for block, name, _ in CALLS]
)
def test_commands_in_blocks_are_understood(block, name, given):
    require_options(name, options(given))
    if name.endswith(".sh"):
        return
    args = argparse.ArgumentParser.parse_args(parser_of(name), given)
    if hasattr(args, "preset"):
        settings.load("cup", args.preset, overrides(args))


def spans(text: str) -> list[str]:
    return re.findall(
        r"`([^`]+)`", re.sub(r"\s+", " ", re.sub(r"^```[\s\S]*?^```", "", text, flags=re.MULTILINE))
    )


SPANS = sorted(
    {
        (page, span)
        for page, text in PAGES.items()
        for span in spans(text)
        if re.match(r"(\w+=\S+ )?(python |csad-|\./\w+\.sh|\w+\.py --)", span)
    }
)


@pytest.mark.parametrize("page, span", SPANS)
def test_commands_in_sentences_have_options_that_exist(page, span):
    words = span.split()
    call = called(["python", *words] if words[0].endswith(".py") else words)
    assert call
    require_options(call[0], options(call[1]))


@pytest.mark.parametrize("page", PAGES)
def test_options_in_sentences_exist_somewhere(page):
    known = {"--all", "--small"} | {
        option
        for name in [*STAGES, "make_synthetic_loco"]
        for option in parser_of(name)._option_string_actions
    }
    for span in spans(PAGES[page]):
        if span.startswith("--"):
            assert re.match(r"--[\w.]+", span)[0] in known, span


def test_commands_that_lack_something_in_a_fresh_clone_say_so():
    for block, name, _ in CALLS:
        rendered = any("make_synthetic_loco.py" in line for line in block.lines)
        assert block.needs or rendered or name not in STAGES, (
            f"{block.page}: {name} needs data; say <!-- needs: ... -->"
        )
    assert {block.page for block in BLOCKS if block.needs} >= {
        "README.md",
        "docs/own_data.md",
        "docs/deployment.md",
    }


def test_commands_are_read_as_a_shell_reads_them():
    text = (
        '<!-- needs: x -->\n\n    run="--a 1"\n    for s in A B; do\n'
        "        python $s.py $run --b \\\n            c  # d\n    done\n"
    )
    (block,) = blocks("page", text)
    assert block.needs == "x"
    assert [called(words) for words in commands(block, {}) if words != ["done"]] == [
        ("A", ["--a", "1", "--b", "c"]),
        ("B", ["--a", "1", "--b", "c"]),
    ]
    assert called(shlex.split("CSAD_TOKEN=x python serve.py --port 1")) == ("serve", ["--port", "1"])
    with pytest.raises(AssertionError, match="no option --typo"):
        require_options("predict", ["--typo"])


# The station as a service


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path):
    unit = re.search(r"^```ini\n([\s\S]*?)^```", PAGES["docs/deployment.md"], re.MULTILINE)[1]
    program = re.search(r"^ExecStart=(\S+)", unit, re.MULTILINE)[1]
    stand_in = tmp_path / Path(program).name
    stand_in.write_text("#!/bin/sh\n")
    stand_in.chmod(0o755)
    service = tmp_path / "csad.service"
    service.write_text(unit.replace(program, str(stand_in)))
    done = subprocess.run(["systemd-analyze", "verify", str(service)], capture_output=True, text=True)
    assert done.returncode == 0 and "csad.service" not in done.stderr, done.stderr
