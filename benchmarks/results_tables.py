"""The tables of docs/results.md: the commands that make each, what decides its figures, and how it is rendered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from csad.branches import BRANCHES
from csad.data import files
from csad.data.workspace import Workspace

from benchmarks import all_stages, few_images, results_content

STAGES = [f"{stage}.py" for stage in all_stages.TITLES]
# What decides AUROCs, but for the pictures.
DETECTOR = [
    *STAGES,
    "benchmarks/all_stages.py",
    "models",
    "configs/presets",
    "csad/branches.py",
    "csad/settings.py",
    "csad/data/deep_pixels.py",
    "csad/data/held_out.py",
    "csad/data/image_files.py",
    "csad/data/images.py",
    "csad/data/layouts.py",
    "csad/data/roi.py",
    "csad/evaluation",
    "csad/export/assembly.py",
    "csad/pseudo_labels",
    "csad/standins",
    "csad/training",
]
RENDERER = ["make_synthetic_loco.py", "csad/synthetic"]
PEERS = [f"benchmarks/{name}.py" for name in ("peers", "peers_timing", "peers_worker")]
ENGINES = ["benchmarks/speed.py", "csad/export", "csad/inference", "models"]


class Inputs(NamedTuple):
    """What a run is given."""

    work: Path  # folder of everything that the commands write
    photographs: Path | None
    environment: Path  # of the peers
    categories: tuple[str, ...] | None  # of the rendered ones; None: all
    few_categories: tuple[str, ...]
    methods: tuple[str, ...]  # of the peers
    seeds: tuple[int, ...]

    @property
    def rendered(self) -> Path:
        return self.work / "rendered"

    def stages_of(self, dataset: Path, seed: int) -> Path:
        return self.work / f"{dataset.name}_seed_{seed}"


@dataclass(frozen=True)
class Table:
    """One table, or a few that one run makes.

    Attributes:
        title: for `--list`.
        minutes: of two cores that do nothing else; for all five rendered categories and one seed.
        commands: of python, to be run one after another in the repository's root; each continues where it stopped.
        leaves: folders that start over with `--overwrite`; others' are left alone.
        collect: what the commands left -> what is kept in docs/results/{name}.json.
        render: that -> lines of Markdown.
        sources: paths in the repository that decide the figures.
        needs: tables whose files this one goes on from.
        plots: file name under docs/results/ -> function of `results_plots`.
        photographs: it needs a folder of photographs.
        peers: it needs the peers' environment.
        seeds: of its figures.
    """

    title: str
    minutes: str
    commands: Callable[[Inputs], list[list[Any]]]
    leaves: Callable[[Inputs], list[Path]]
    collect: Callable[[Inputs], dict[str, Any]]
    render: Callable[[dict[str, Any]], list[str]]
    sources: Sequence[str]
    needs: tuple[str, ...] = ()
    plots: dict[str, str] = field(default_factory=dict)
    photographs: bool = False
    peers: bool = False
    seeds: Callable[[Inputs], Sequence[int]] = lambda inputs: inputs.seeds


# Commands


def stages(inputs: Inputs, dataset: Path, *more: Any) -> list[list[Any]]:
    """All stages on a data set for each seed."""
    chosen = ["--categories", *inputs.categories] if inputs.categories and dataset == inputs.rendered else []
    return [
        ["-m", "benchmarks.all_stages", "--dataset_root", dataset]
        + ["--workspace", inputs.stages_of(dataset, seed), "--seed", seed, *chosen, *more]
        for seed in inputs.seeds
    ]


def render_pictures(inputs: Inputs) -> list[list[Any]]:
    return [["make_synthetic_loco.py", "--dataset_root", inputs.rendered, "--seed", 0]]


def peers(inputs: Inputs, dataset: Path) -> list[list[Any]]:
    """The peers beside our models of the first seed, in three formats, all branches together and each alone."""
    first = inputs._replace(seeds=inputs.seeds[:1])
    workspace = first.stages_of(dataset, first.seeds[0])
    ours = [workspace, *(workspace / f"branch_{branch}" for branch in BRANCHES)]
    chosen = ["--categories", *inputs.categories] if inputs.categories and dataset == inputs.rendered else []
    return [
        *stages(first, dataset, "--formats", "torch", "onnx", "openvino", "--single_branches"),
        ["-m", "benchmarks.peers", "--environment", inputs.environment, "--dataset_root", dataset]
        + [*chosen, "--methods", *inputs.methods, "--workspace", *ours]
        + ["--output", inputs.work / f"peers_{dataset.name}"],
    ]


def speed(inputs: Inputs) -> list[list[Any]]:
    category = inputs.categories[0] if inputs.categories else "screw_bag"
    model = Workspace(inputs.stages_of(inputs.rendered, inputs.seeds[0])).exported_model(category, "torch")
    return [
        ["-m", "benchmarks.speed", "--model", model, "--workspace", inputs.work / "speed"]
        + ["--batches", 1, 8, "--turns", 5]
    ]


def training_speed(inputs: Inputs) -> list[list[Any]]:
    return [
        ["-m", "benchmarks.training_speed", "--stage", stage, "--workspace", inputs.work / "training_speed"]
        for stage in ("segmentor", "lgst")
    ]


# The tables, in the order in which they are made


def first_seed(inputs: Inputs) -> Sequence[int]:
    return inputs.seeds[:1]


def left(inputs: Inputs, *parts: str) -> dict[str, Any]:
    """JSON that a command wrote under the work folder."""
    return files.read_json(inputs.work.joinpath(*parts))


def detection(inputs: Inputs, dataset: Path) -> dict[str, Any]:
    workspaces = {seed: inputs.stages_of(dataset, seed) for seed in inputs.seeds}
    return results_content.detection(dataset, workspaces)


TABLES = {
    "rendered": Table(
        "rendered categories: AUROC of each branch, localisation, seconds",
        "3 for the pictures, 25 a seed",
        lambda inputs: [*render_pictures(inputs), *stages(inputs, inputs.rendered)],
        lambda inputs: [inputs.stages_of(inputs.rendered, seed) for seed in inputs.seeds],
        lambda inputs: detection(inputs, inputs.rendered),
        results_content.render_detection,
        [*DETECTOR, *RENDERER],
        plots={"roc.svg": "roc", "training_time.svg": "training_time"},
    ),
    "photographs": Table(
        "the same of a folder of photographs",
        "4 a category and seed",
        lambda inputs: stages(inputs, inputs.photographs),
        lambda inputs: [inputs.stages_of(inputs.photographs, seed) for seed in inputs.seeds],
        lambda inputs: detection(inputs, inputs.photographs),
        results_content.render_detection,
        DETECTOR,
        photographs=True,
    ),
    "peers": Table(
        "anomalib beside ours on the rendered categories",
        "5 for our models in three formats, 12 a category for the peers (PatchCore's coresets)",
        lambda inputs: peers(inputs, inputs.rendered),
        lambda inputs: [inputs.work / "peers_rendered"],
        lambda inputs: left(inputs, "peers_rendered", "peers.json"),
        results_content.render_peers,
        [*DETECTOR, *RENDERER, *ENGINES, *PEERS],
        needs=("rendered",),
        plots={"auroc_speed.svg": "tradeoff"},
        peers=True,
        seeds=first_seed,
    ),
    "peers_photographs": Table(
        "anomalib beside ours on the photographs",
        "2 for our models, 10 a category of 200 pictures",
        lambda inputs: peers(inputs, inputs.photographs),
        lambda inputs: [inputs.work / f"peers_{inputs.photographs.name}"],
        lambda inputs: left(inputs, f"peers_{inputs.photographs.name}", "peers.json"),
        results_content.render_peers,
        [*DETECTOR, *ENGINES, *PEERS],
        needs=("photographs",),
        plots={"auroc_speed_photographs.svg": "tradeoff"},
        photographs=True,
        peers=True,
        seeds=first_seed,
    ),
    "few_images": Table(
        "AUROC with 10 to 200 training images, three draws",
        "45 a category",
        lambda inputs: [
            *render_pictures(inputs),
            ["-m", "benchmarks.few_images", "--dataset_root", inputs.rendered]
            + ["--categories", *inputs.few_categories, "--output", inputs.work / "few_images"],
        ],
        lambda inputs: [inputs.work / "few_images"],
        lambda inputs: left(inputs, "few_images", "few_images.json"),
        results_content.render_few_images,
        [*DETECTOR, *RENDERER, "benchmarks/few_images.py"],
        plots={"few_images.svg": "few_images"},
        seeds=lambda inputs: range(few_images.DRAWS),
    ),
    "speed": Table(
        "milliseconds per picture in every runtime and precision",
        "5",
        speed,
        lambda inputs: [inputs.work / "speed"],
        lambda inputs: left(inputs, "speed", "speed.json"),
        results_content.render_speed,
        ENGINES,
        needs=("rendered",),
        seeds=first_seed,
    ),
    "training_speed": Table(
        "one step of the published training",
        "10",
        training_speed,
        lambda inputs: [inputs.work / "training_speed"],
        lambda inputs: {
            stage: left(inputs, "training_speed", f"benchmark_training_{stage}.json")
            for stage in ("segmentor", "lgst")
        },
        results_content.render_training_speed,
        ["benchmarks/training_speed.py", "csad/training", "models", "configs/presets"],
        seeds=first_seed,
    ),
}
