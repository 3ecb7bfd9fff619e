"""What a script works on, as its command line names it: the workspace, the data set's chosen categories, and their settings."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import settings
from data import layouts
from data.workspace import Workspace


class Selection(NamedTuple):
    """See `select`; ``chosen`` holds each category's settings, by its name."""

    workspace: Workspace
    dataset: layouts.Dataset
    categories: list[layouts.Category]
    chosen: dict[str, settings.Settings]


def select(args: argparse.Namespace) -> Selection:
    """Take the options that all scripts share (`settings.command_line`).

    Raises:
        UserError: the data set or a category is not there, or a setting is wrong.
    """
    workspace = Workspace(args.workspace)
    dataset = layouts.Dataset(args.dataset_root or workspace.default_dataset)
    categories = dataset.select(args.categories, settings.logical_defects(args.preset))
    overrides = settings.overrides(args)
    return Selection(workspace, dataset, categories,
                     {category.name: settings.load(category.name, args.preset, overrides) for category in categories})
