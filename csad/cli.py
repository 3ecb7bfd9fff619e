"""The options that the scripts share, and what they name: the workspace, the data set's chosen categories, and their settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import csad
from csad import settings, yaml_layers
from csad.branches import BRANCHES
from csad.data import data_sets, layouts
from csad.data.files import path_argument
from csad.data.workspace import Workspace
from csad.errors import OptionParser, UserError
from csad.processes import number_of_processes

import yaml


class Selection(NamedTuple):
    """See `select`; ``chosen`` holds each category's settings, by its name."""

    workspace: Workspace
    dataset: data_sets.Dataset
    categories: list[layouts.Category]
    chosen: dict[str, settings.Settings]


def select(args: argparse.Namespace) -> Selection:
    """Take the options that all scripts share (`common_options`).

    Raises:
        UserError: the data set or a category is not there, or a setting is wrong.
    """
    workspace = Workspace(args.workspace)
    dataset = data_sets.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories, logical_defects(args.preset))
    given = overrides(args)
    return Selection(
        workspace,
        dataset,
        categories,
        {category.name: settings.load(category.name, args.preset, given) for category in categories},
    )


def logical_defects(preset: str) -> dict[str, list[str]]:
    """Category -> the defects that its file in configs/categories/ calls logical."""
    names = [path.stem for path in sorted((settings.CONFIGS / "categories").glob("*.yaml"))]
    return {name: settings.load(name, preset).logical for name in names}


def common_options(description: str) -> argparse.ArgumentParser:
    """The options that all stages share, with every single setting as an option of its own."""
    parser = OptionParser(
        path_option="--dataset_root",
        description=description,
        usage="%(prog)s [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"CSAD {csad.__version__}")
    common = parser.add_argument_group("common options")
    common.add_argument(
        "--workspace",
        type=path_argument,
        default=Path("."),
        help="folder under which everything is written (default: the current one)",
    )
    common.add_argument(
        "--dataset_root",
        type=path_argument,
        help="data set (default: WORKSPACE/datasets/mvtec_loco_anomaly_detection)",
    )
    common.add_argument(
        "--categories", nargs="+", metavar="NAME", help="default: every category of the data set"
    )
    common.add_argument(
        "--preset",
        default=settings.PAPER,
        choices=sorted(
            [settings.PAPER, *(path.stem for path in (settings.CONFIGS / "presets").glob("*.yaml"))]
        ),
        help="paper: the published numbers (default); quick: minutes on two CPU cores; full: the published stages "
        "with the added branches, for a GPU",
    )
    common.add_argument(
        "--tiles",
        dest="memory.tiles",
        default=argparse.SUPPRESS,
        metavar="2x2",
        help="the same as --memory.tiles, for small defects in large photographs",
    )
    common.add_argument(
        "--backbone",
        default="auto",
        help="auto, wide_resnet50_2 (published), efficientnet_lite0 (in a package), or a convolutional "
        "network of timm's",
    )
    common.add_argument("--backbone_weights", type=path_argument, help="state dict of that backbone")
    common.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    common.add_argument("--seed", type=seed, default=0, help="of all random draws (default: 0)")
    common.add_argument(
        "--overwrite", action="store_true", help="start over instead of skipping what is done"
    )
    single = parser.add_argument_group(
        "single settings",
        "in brackets the value of the preset paper; other presets and the category's file change some",
    )
    for section, model in settings.SECTIONS.items():
        for key, field in model.model_fields.items():
            meaning = f"{field.description or ''} ({in_words(field.default)})".strip()
            single.add_argument(
                f"--{section}.{key}",
                dest=f"{section}.{key}",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=meaning.replace("%", "%%"),
            )
    return parser


def in_words(default: Any) -> str:
    """A setting's default, as one would type it."""
    if isinstance(default, list):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def training_options(description: str) -> argparse.ArgumentParser:
    """The options of the stages that train networks."""
    parser = common_options(description)
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "tf32", "fp32"],
        help="of training: bf16 convolutions where the hardware is made for them (auto, the default of all "
        "presets but paper), plain fp32 without TF32 (the default of paper), or fp32 whose convolutions "
        "on CUDA may use TF32, as PyTorch has it by itself",
    )
    return with_cluster(with_seeds(parser))


def with_cluster(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--jobs``, ``--ray`` and ``--dry_run``, for the stages that work category by category."""
    parser.add_argument(
        "--jobs",
        type=number_of_processes,
        default=1,
        metavar="N",
        help="categories and seeds side by side in N processes, each with its share of the cores (default: 1); "
        "the last digits of scores depend on the number of threads",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="categories and seeds as tasks of a Ray cluster: local (all of this machine), auto (the cluster it "
        "belongs to), or HOST:PORT; default: one after another, without Ray (docs/cluster.md)",
    )
    parser.add_argument("--dry_run", action="store_true", help="only print the jobs' names")
    return parser


def with_seeds(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--seeds``, for the stages after the first."""
    parser.add_argument(
        "--seeds",
        type=seed,
        nargs="+",
        metavar="SEED",
        help="several seeds at once, instead of --seed: each in WORKSPACE/seeds/SEED, all with the "
        "pseudo-labels of WORKSPACE; tables give mean and standard deviation",
    )
    return parser


def with_branches(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--branches``, for the stages that fuse."""
    parser.add_argument(
        "--branches",
        nargs="+",
        dest="fusion.branches",
        default=argparse.SUPPRESS,
        metavar="BRANCH",
        help=f"whose scores are added: {', '.join(BRANCHES)}; the same as --fusion.branches",
    )
    return parser


def seed(text: str) -> int:
    """A seed from the command line; NumPy takes no negative ones, PyTorch none of more than 64 bits."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a valid seed; it must be a whole number from 0 to {2**63 - 1}"
        )
    return int(text)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The single settings given on the command line, parsed as YAML.

    Raises:
        UserError: a value is no YAML.
    """
    values = {}
    for name, value in vars(arguments).items():
        if "." in name:
            if isinstance(value, list):
                values[name] = value
                continue
            try:
                values[name] = yaml_layers.parse(value)
            except (yaml.YAMLError, ValueError) as problem:
                raise UserError(
                    f"--{name} {value} is not valid YAML ({' '.join(str(problem).split())}); "
                    f"plain text may need quotes of its own: --{name} '\"{value}\"'"
                ) from problem
    return values
