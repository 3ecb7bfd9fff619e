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
    "csad/data/image_files.py",
    "csad/data/images.py",
    "csad/data/layouts.py",
    "csad/data/roi.py",
    "csad/evaluation",
    "csad/export/assembly.py",
    "csad/pseudo_labels",
    "csad/standins",
    "csad/training",
    ":(exclude)csad/training/jobs.py",  # in which order, and in which process, decides no figure
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

    def name_of(self, dataset: Path) -> str:
        return "photographs" if dataset == self.photographs else dataset.name

    def stages_of(self, dataset: Path, seed: int) -> Path:
        return self.work / f"{self.name_of(dataset)}_seed_{seed}"

    def categories_of(self, dataset: Path) -> list[str]:
        """The option that names categories; of photographs all are taken."""
        return ["--categories", *self.categories] if self.categories and dataset == self.rendered else []


@dataclass(frozen=True)
class Table:
    """One table, or a few that one run makes.

    Attributes:
        title: for `--list`.
        minutes: of two cores that do nothing else; for all five rendered categories and one seed.
        commands: of python, to be run one after another in the repository's root; each continues where it stopped.
        render: what is kept in docs/results/{name}.json -> lines of Markdown.
        sources: paths in the repository that decide the figures.
        files: JSON files that the commands write, relative to the work folder, each in a folder of this table alone; one
            is kept as it is, several by their names' last words; none: what the stages left of each seed.
        needs: tables whose files this one goes on from.
        plots: file name under docs/results/ -> function of `results_plots`.
        photographs: it is about the photographs, not the rendered categories.
        peers: it needs the peers' environment.
        draws: number of seeds of its own; 0: those of the run, or with `files` the first of them.
    """

    title: str
    minutes: str
    commands: Callable[[Inputs, Path], list[list[Any]]]  # the data set goes along
    render: Callable[[dict[str, Any]], list[str]]
    sources: Sequence[str]
    files: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    plots: dict[str, str] = field(default_factory=dict)
    photographs: bool = False
    peers: bool = False
    draws: int = 0

    def dataset(self, inputs: Inputs) -> Path:
        if not self.photographs:
            return inputs.rendered
        assert inputs.photographs is not None  # `results.make` says so before it does anything
        return inputs.photographs

    def seeds(self, inputs: Inputs) -> Sequence[int]:
        return range(self.draws) if self.draws else inputs.seeds[: 1 if self.files else None]

    def leaves(self, inputs: Inputs) -> list[Path]:
        """Folders that start over with `--overwrite`."""
        return [inputs.work / Path(file).parent for file in self.files] or list(self._stages(inputs).values())

    def collect(self, inputs: Inputs) -> dict[str, Any]:
        """What is kept of what the commands left."""
        if not self.files:
            return results_content.detection(self.dataset(inputs), self._stages(inputs))
        contents = {
            Path(file).stem.split("_")[-1]: files.read_json(inputs.work / file) for file in self.files
        }
        return contents if len(contents) > 1 else contents.popitem()[1]

    def _stages(self, inputs: Inputs) -> dict[int, Path]:
        return {seed: inputs.stages_of(self.dataset(inputs), seed) for seed in inputs.seeds}


# Commands


def stages(inputs: Inputs, dataset: Path, *more: Any) -> list[list[Any]]:
    """All stages on a data set for each seed."""
    command = ["-m", "benchmarks.all_stages", "--dataset_root", dataset, "--workspace"]
    return [
        [*command, inputs.stages_of(dataset, seed), "--seed", seed, *inputs.categories_of(dataset), *more]
        for seed in inputs.seeds
    ]


def render_pictures(inputs: Inputs) -> list[list[Any]]:
    names = dict.fromkeys([*inputs.categories, *inputs.few_categories]) if inputs.categories else ()
    options = ["--categories", *names] if names else []
    return [["make_synthetic_loco.py", "--dataset_root", inputs.rendered, "--seed", 0, *options]]


def peers(inputs: Inputs, dataset: Path) -> list[list[Any]]:
    """The peers beside our models of the first seed, in three formats, all branches together and each alone."""
    first = inputs._replace(seeds=inputs.seeds[:1])
    workspace = first.stages_of(dataset, first.seeds[0])
    ours = [workspace, *(workspace / f"branch_{branch}" for branch in BRANCHES)]
    return [
        *stages(first, dataset, "--formats", "torch", "onnx", "openvino", "--single_branches"),
        ["-m", "benchmarks.peers", "--environment", inputs.environment, "--dataset_root", dataset]
        + [*inputs.categories_of(dataset), "--methods", *inputs.methods, "--workspace", *ours]
        + ["--output", inputs.work / f"peers_{inputs.name_of(dataset)}"],
    ]


def few(inputs: Inputs, dataset: Path) -> list[list[Any]]:
    command = ["-m", "benchmarks.few_images", "--dataset_root", dataset]
    command += ["--categories", *inputs.few_categories, "--output", inputs.work / "few_images"]
    return [*render_pictures(inputs), command]


def speed(inputs: Inputs, dataset: Path) -> list[list[Any]]:
    category = inputs.categories[0] if inputs.categories else "screw_bag"
    model = Workspace(inputs.stages_of(dataset, inputs.seeds[0])).exported_model(category, "torch")
    command = ["-m", "benchmarks.speed", "--model", model, "--workspace", inputs.work / "speed"]
    return [[*command, "--batches", 1, 8, "--turns", 5]]


def training_speed(inputs: Inputs, dataset: Path) -> list[list[Any]]:
    command = ["-m", "benchmarks.training_speed", "--stage"]
    return [
        [*command, stage, "--workspace", inputs.work / "training_speed"] for stage in ("segmentor", "lgst")
    ]


TABLES = {  # in the order in which they are made
    "rendered": Table(
        "rendered categories: AUROC of each branch, localisation, seconds",
        "3 for the pictures, 25 a seed",
        lambda inputs, dataset: [*render_pictures(inputs), *stages(inputs, dataset)],
        results_content.render_detection,
        [*DETECTOR, *RENDERER],
        plots={"roc.svg": "roc", "training_time.svg": "training_time"},
    ),
    "photographs": Table(
        "the same of a folder of photographs",
        "4 a category and seed",
        stages,
        results_content.render_detection,
        DETECTOR,
        photographs=True,
    ),
    "peers": Table(
        "anomalib beside ours on the rendered categories",
        "5 for our models in three formats, 12 a category for the peers (PatchCore's coresets)",
        peers,
        results_content.render_peers,
        [*DETECTOR, *RENDERER, *ENGINES, *PEERS],
        files=("peers_rendered/peers.json",),
        needs=("rendered",),
        plots={"auroc_speed.svg": "tradeoff"},
        peers=True,
    ),
    "peers_photographs": Table(
        "anomalib beside ours on the photographs",
        "2 for our models, 10 a category of 200 pictures",
        peers,
        results_content.render_peers,
        [*DETECTOR, *ENGINES, *PEERS],
        files=("peers_photographs/peers.json",),
        needs=("photographs",),
        plots={"auroc_speed_photographs.svg": "tradeoff"},
        photographs=True,
        peers=True,
    ),
    "few_images": Table(
        "AUROC with 10 to 200 training images, three draws",
        "45 a category",
        few,
        results_content.render_few_images,
        [*DETECTOR, *RENDERER, "benchmarks/few_images.py"],
        files=("few_images/few_images.json",),
        plots={"few_images.svg": "few_images"},
        draws=few_images.DRAWS,
    ),
    "speed": Table(
        "milliseconds per picture in every runtime and precision",
        "5",
        speed,
        results_content.render_speed,
        ENGINES,
        files=("speed/speed.json",),
        needs=("rendered",),
    ),
    "training_speed": Table(
        "one step of the published training",
        "10",
        training_speed,
        results_content.render_training_speed,
        ["benchmarks/training_speed.py", "csad/training", "models", "configs/presets"],
        files=tuple(f"training_speed/benchmark_training_{stage}.json" for stage in ("segmentor", "lgst")),
    ),
}
