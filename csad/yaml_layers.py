"""Layers of settings as YAML says them, and one over the other."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from csad.errors import UserError, did_you_mean

import yaml
from pydantic import ValidationError


class _PlainYaml(yaml.SafeLoader):
    """YAML whose numbers mean what they look like: version 1.1 takes 010 for 8, 1:30 for 90, and yes for true.

    A key that stands twice in a mapping is an error; PyYAML drops the first one.
    """

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"the key {key.value} occurs twice, in lines {lines[name]} and {line}; keep one of them"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|~|", ["n", "~", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _PlainYaml.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def parse(text: str) -> Any:
    """A YAML document; yaml.YAMLError, ValueError if it is none."""
    loader = _PlainYaml(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_layer(path: Path, sections: Collection[str]) -> dict[str, Any]:
    """What a file of configs/ says; UserError if it is no mapping whose ``sections`` are mappings."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from problem
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(
        isinstance(values, dict) for name, values in content.items() if name in sections
    ):
        raise UserError(
            f"{path} should hold sections of settings as in csad/settings.py, like configs/presets/quick.yaml"
        )
    return content


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of a later layer over them, section by section."""
    return below | {
        name: below.get(name, {}) | value if isinstance(value, dict) else value
        for name, value in above.items()
    }


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"lgst.steps": 100} -> {"lgst": {"steps": 100}}."""
    layer: dict[str, Any] = {}
    for name, value in dotted.items():
        section, key = name.split(".")
        layer = merge(layer, {section: {key: value}})
    return layer


def refusal(problem: ValidationError, known: Iterable[str]) -> str:
    """Why settings are refused, in a sentence that names the first that is wrong; ``known`` are the names of all there are."""
    error = problem.errors()[0]
    name = ".".join(str(part) for part in error["loc"][:2])  # what follows names a branch of a union
    if error["type"] == "extra_forbidden":
        return f"there is no setting {name}{did_you_mean(name, known) or '; csad/settings.py lists them all'}"
    advice = ""
    if error["type"] == "literal_error":
        advice = did_you_mean(str(error["input"]), re.findall("'([^']*)'", error["ctx"]["expected"]))
    return f"setting {name}: {error['msg']} (got {error['input']!r}){advice}"
