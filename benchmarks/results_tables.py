"""The tables of docs/results.md: the commands that make each, what decides its figures, and how it is rendered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from csad.branches import BRANCHES

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


class Table(NamedTuple):
    """One table, or a few that one run makes.

    Attributes:
        title: for `--list`.
        minutes: of two cores that do nothing else; for all five rendered categories and one seed.
        commands: what python is given, one after another in the repository's root; each continues where it stopped.
            results_work, photographs and .venv_peers stand for the folders that a run is given, {first} for its first
            seed, {methods} for its peers; a command with {seed} is run for each seed.
        files: what the commands leave, each in a folder of this table alone. JSON that is kept as it is, several by their
            names' last words; of all_stages.json, one for each seed, `results_content.detection`.
        render: what is kept in docs/results/{name}.json -> lines of Markdown.
        sources: paths in the repository that decide the figures.
        needs: tables whose files this one goes on from.
        plots: file name under docs/results/ -> function of `results_plots`.
        draws: number of seeds of its own; 0: those that its commands are given.
    """

    title: str
    minutes: str
    commands: Sequence[str]
    files: Sequence[str]
    render: Callable[[dict[str, Any]], list[str]]
    sources: Sequence[str]
    needs: Sequence[str] = ()
    plots: Mapping[str, str] = {}
    draws: int = 0

    @property
    def photographs(self) -> bool:
        """Whether it is about the photographs, not the rendered categories."""
        return any("--dataset_root photographs" in command for command in self.commands)

    @property
    def peers(self) -> bool:
        """Whether it needs the peers' environment."""
        return any(".venv_peers" in command for command in self.commands)


RENDER = "make_synthetic_loco.py --dataset_root results_work/rendered --seed 0"


def stages(dataset: str, name: str, seed: str = "{seed}") -> str:
    """All stages on a data set."""
    workspace = f"results_work/{name}_seed_{seed}"
    return f"-m benchmarks.all_stages --dataset_root {dataset} --workspace {workspace} --seed {seed}"


def peers(dataset: str, name: str) -> list[str]:
    """The peers beside our models of the first seed, in three formats, all branches together and each alone."""
    workspace = f"results_work/{name}_seed_{{first}}"
    ours = " ".join([workspace, *(f"{workspace}/branch_{branch}" for branch in BRANCHES)])
    return [
        stages(dataset, name, "{first}") + " --formats torch onnx openvino --single_branches",
        f"-m benchmarks.peers --environment .venv_peers --dataset_root {dataset} --methods {{methods}} "
        f"--workspace {ours} --output results_work/peers_{name}",
    ]


TABLES = {  # in the order in which they are made
    "rendered": Table(
        "rendered categories: AUROC of each branch, localisation, seconds",
        "3 for the pictures, 25 a seed",
        [RENDER, stages("results_work/rendered", "rendered")],
        ["results_work/rendered_seed_{seed}/all_stages.json"],
        results_content.render_detection,
        [*DETECTOR, *RENDERER],
        plots={"roc.svg": "roc", "training_time.svg": "training_time"},
    ),
    "photographs": Table(
        "the same of a folder of photographs",
        "4 a category and seed",
        [stages("photographs", "photographs")],
        ["results_work/photographs_seed_{seed}/all_stages.json"],
        results_content.render_detection,
        DETECTOR,
    ),
    "peers": Table(
        "anomalib beside ours on the rendered categories",
        "5 for our models in three formats, 12 a category for the peers (PatchCore's coresets)",
        peers("results_work/rendered", "rendered"),
        ["results_work/peers_rendered/peers.json"],
        results_content.render_peers,
        [*DETECTOR, *RENDERER, *ENGINES, *PEERS],
        needs=["rendered"],
        plots={"auroc_speed.svg": "tradeoff"},
    ),
    "peers_photographs": Table(
        "anomalib beside ours on the photographs",
        "2 for our models, 10 a category of 200 pictures",
        peers("photographs", "photographs"),
        ["results_work/peers_photographs/peers.json"],
        results_content.render_peers,
        [*DETECTOR, *ENGINES, *PEERS],
        needs=["photographs"],
        plots={"auroc_speed_photographs.svg": "tradeoff"},
    ),
    "few_images": Table(
        "AUROC with 10 to 200 training images, three draws, pushpins",
        "45",
        [
            RENDER,
            "-m benchmarks.few_images --dataset_root results_work/rendered --categories pushpins "
            "--output results_work/few_images",
        ],
        ["results_work/few_images/few_images.json"],
        results_content.render_few_images,
        [*DETECTOR, *RENDERER, "benchmarks/few_images.py"],
        plots={"few_images.svg": "few_images"},
        draws=few_images.DRAWS,
    ),
    "speed": Table(
        "milliseconds per picture in every runtime and precision",
        "5",
        [
            "-m benchmarks.speed --model results_work/rendered_seed_{first}/ckpt/pytorch_models/screw_bag.pth "
            "--workspace results_work/speed --batches 1 8 --turns 5"
        ],
        ["results_work/speed/speed.json"],
        results_content.render_speed,
        ENGINES,
        needs=["rendered"],
    ),
    "training_speed": Table(
        "one step of the published training",
        "10",
        [
            f"-m benchmarks.training_speed --stage {stage} --workspace results_work/training_speed"
            for stage in ("segmentor", "lgst")
        ],
        [f"results_work/training_speed/benchmark_training_{stage}.json" for stage in ("segmentor", "lgst")],
        results_content.render_training_speed,
        ["benchmarks/training_speed.py", "csad/training", "models", "configs/presets"],
    ),
}
