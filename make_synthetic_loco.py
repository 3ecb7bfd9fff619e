"""Render the built-in data set: five categories with logical rules, in MVTec LOCO AD's own layouts."""

import argparse
from dataclasses import fields
from pathlib import Path

from csad.data.files import path_argument
from csad.data.listing import count
from csad.errors import OptionParser, run_script
from csad.processes import workers_option
from csad.synthetic import CATEGORIES
from csad.synthetic.writer import Settings, components_root, write_dataset

SETTING_HELP = {
    "image_size": "side of the pictures in pixels",
    "train": "training pictures per category, all good",
    "validation": "validation pictures per category, all good",
    "test_good": "good test pictures per category",
    "test_logical": "test pictures with a logical anomaly per category (the kinds take turns)",
    "test_structural": "test pictures with a structural anomaly per category (the kinds take turns)",
    "seed": "the same seed gives the same bytes, whatever --workers is",
}

EPILOG = """A run that was interrupted is continued by the same command. The true component label map of every
picture goes into {dataset_root}_components, with the names of the classes and of each test picture's anomaly."""


def parse_arguments() -> argparse.Namespace:
    parser = OptionParser(
        path_option="--dataset_root",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--dataset_root",
        type=path_argument,
        default=Path("datasets/synthetic_loco"),
        help="folder to write into",
    )
    parser.add_argument(
        "--categories", nargs="+", default=list(CATEGORIES), metavar="NAME", help="categories to render"
    )
    for setting in fields(Settings):
        parser.add_argument(
            f"--{setting.name}", type=int, default=setting.default, help=SETTING_HELP[setting.name]
        )
    workers_option(parser, "processes to render with")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away what an earlier run wrote there, also with other settings, and start over",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = Settings(**{setting.name: getattr(arguments, setting.name) for setting in fields(Settings)})
    rendered = write_dataset(
        arguments.dataset_root, arguments.categories, settings, arguments.workers, arguments.overwrite
    )
    print(
        f"{count(rendered, 'picture')} rendered into {arguments.dataset_root}, "
        f"their component label maps into {components_root(arguments.dataset_root)}"
    )


if __name__ == "__main__":
    run_script(main)
