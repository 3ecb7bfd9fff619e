"""Mistakes on the command line, and Ctrl-C before a script has begun: one line each, with what was probably meant."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from csad import settings
from csad.cli import training_options, with_branches
from csad.commands import run_station, score_images
from csad.data.data_sets import Dataset
from csad.data.workspace import Workspace
from csad.errors import OptionParser, UserError, did_you_mean
from csad.pseudo_labels.component_labels import set_by_a_person
from csad.standins.proposer_choice import choose_proposer
from csad.training.best_on_test import with_checkpoint

import pytest
import torch

import make_synthetic_loco

ROOT = Path(__file__).parent.parent


@pytest.fixture
def refused(capsys):
    """What a stage's parser says to arguments that it refuses."""

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            with_checkpoint(with_branches(training_options("story")), "lgst").parse_args(arguments)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said

    return refused


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--catgories", "cup"], "--categories"),
        (["--categories=cup", "--dataset-root=x"], "--dataset_root"),
        (["-workspace", "run1"], "--workspace"),
        (["--lgst.step", "3"], "--lgst.steps"),
        (["--steps", "3"], "--lgst.steps"),
        (["--lr", "0.1"], "--segmentor.lr or --lgst.lr"),
        (["--segmenter.epochs", "3"], "--segmentor.epochs"),
        (["--overwite"], "--overwrite"),
        (["preset", "quick"], "--preset"),
        (["--preset", "quik"], "quick"),
        (["--precision", "fp-32"], "fp32"),
        (["--checkpoint", "best"], "best_on_test"),
    ],
)
def test_a_misspelt_option_or_choice_names_the_one_that_was_meant(refused, arguments, meant):
    assert refused(*arguments).endswith(f"; did you mean {meant}?\n")


@pytest.mark.parametrize("option", ["--cat", "--categorie", "--over", "--wor"])
def test_half_an_option_is_not_taken_for_the_whole(refused, option):
    assert f"there is no option {option}; did you mean --" in refused(option, "cup")


def test_what_is_like_nothing_gets_no_guess(refused):
    assert refused("--qqq", "3") == "error: there is no option --qqq; --help lists the options\n"
    assert did_you_mean("zebra", ["quick", "full"]) == did_you_mean("--", ["--seed"]) == ""


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["mydata"], "--dataset_root mydata"),
        (["mydata/", "--preset", "quick"], "--dataset_root mydata/"),
        (["--preset", "quick", "my pictures"], "--dataset_root 'my pictures'"),
        (["data"], "--dataset_root data"),
        (["dataset_root", "mydata"], "--dataset_root"),
        (["device"], "--dataset_root device"),  # a folder; without it the option is likelier
        (["../images"], "--dataset_root ../images"),
        (["--seed", "3", "images"], "--images.size or --images.white_level"),
    ],
)
def test_a_path_without_its_option_is_taken_for_the_data_set(
    refused, monkeypatch, tmp_path, arguments, meant
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "device").mkdir()
    said = refused(*arguments)
    assert " belongs to no option; did you mean " in said and said.endswith(f"did you mean {meant}?\n")


def test_beside_a_data_set_another_path_gets_no_guess(refused):
    for given in (["--dataset_root", "mydata"], ["--dataset_root=mydata"]):
        assert refused(*given, "qqq") == "error: 'qqq' belongs to no option; --help lists the options\n"


def test_values_that_look_like_options_stay_values():
    parser = OptionParser()
    parser.add_argument("--threshold", type=float)
    parser.add_argument("--prompt")
    parser.add_argument("names", nargs="*")
    read = parser.parse_args(["--threshold", "-1.5", "--prompt=--x", "--", "--not_an_option"])
    assert (read.threshold, read.prompt, read.names) == (-1.5, "--x", ["--not_an_option"])


@pytest.mark.parametrize(
    ("main", "arguments", "meant"),
    [
        (score_images.main, ["photos", "--modle", "cup.onnx"], "--model"),
        (score_images.main, ["photos", "--model", "cup.onnx", "--save_map"], "--save_maps"),
        (score_images.main, ["photos", "--model", "cup.onnx", "--format", "parkuet"], "parquet"),
        (run_station.main, ["--model", "cup.onnx", "--prot", "80"], "--port"),
        (run_station.main, ["models/cup.onnx", "--port", "80"], "--model models/cup.onnx"),
        (make_synthetic_loco.main, ["mydata"], "--dataset_root mydata"),
    ],
)
def test_the_commands_that_are_no_stages_do_so_too(monkeypatch, capsys, main, arguments, meant):
    monkeypatch.setattr(sys, "argv", ["csad", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


def test_every_script_reads_its_options_so():
    """A parser of argparse's own would take half an option, and know no other name."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("csad/**/*.py")]
    assert not [
        path.name
        for path in scripts
        if path.name != "errors.py" and "argparse.ArgumentParser(" in path.read_text(encoding="utf-8")
    ]


def test_options_are_answered_without_what_takes_long_to_import():
    """Of the large packages only PyTorch, which most stages are about."""
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    large = {"sklearn", "scipy.stats", "torchvision", "timm", "onnx", "ray"}
    code = f"import sys\nfor name in {scripts}: __import__(name)\nprint([*{large}.intersection(sys.modules)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_categories_settings_and_models_that_are_not_there_name_those_that_were_meant(make_dataset, tmp_path):
    with pytest.raises(UserError, match=r"no category 'dics' .*; did you mean discs\?"):
        Dataset(make_dataset()).select(["dics"])
    with pytest.raises(UserError, match=r"\(got 'clasical'\); did you mean classical\?"):
        settings.load("none", overrides={"pseudo_labels.proposer": "clasical"})
    with pytest.raises(UserError, match=r"\(got 'memroy'\); did you mean memory\?"):
        settings.load("none", overrides={"fusion.branches": ["memroy"]})
    with pytest.raises(UserError, match=r"no setting lgst.stesp; did you mean lgst.steps\?"):
        settings.load("none", overrides={"lgst.stesp": 3})
    model = Workspace(tmp_path).exported_model("screw_bag", "onnx")
    model.parent.mkdir(parents=True)
    model.touch()
    with pytest.raises(UserError, match=r"no exported model of screwbag .*; did you mean screw_bag\?"):
        Workspace(tmp_path).exported_models(["screwbag"])


# Ctrl-C before main


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("script", ["report.py", "predict.py", "serve.py", "make_synthetic_loco.py"])
def test_an_interruption_of_the_imports_is_one_quiet_line(tmp_path, script, wrapped):
    """Some packages turn what interrupts their own imports into an ImportError."""
    interrupt = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n"
    if wrapped:
        interrupt = (
            "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt as reason:\n"
            "    raise ImportError('cannot load multiarray') from reason\n"
        )
    (tmp_path / "numpy.py").write_text(interrupt)
    done = subprocess.run(
        [sys.executable, ROOT / script, "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command starts again\n")


# Settings without effect


def test_a_setting_without_effect_is_told_only_to_who_set_it(capsys, tmp_path):
    """The files for MVTec LOCO AD's categories set some; a first run should not have to explain them."""
    names = ("bandwidth", "no_sam", "inside_grounding")
    for category in ("pushpins", "cup"):
        untouched = settings.load(category, "quick").pseudo_labels
        assert set_by_a_person(category, untouched, names) == []
        changed = {"pseudo_labels.bandwidth": 5.0, "pseudo_labels.no_sam": category == "cup"}
        touched = settings.load(category, "quick", changed).pseudo_labels
        assert set_by_a_person(category, touched, names) == ["bandwidth", "no_sam"]
        for cfg in (untouched, touched):
            cfg = cfg.model_copy(update={"proposer": "classical"})
            choose_proposer(category, cfg, tmp_path, torch.device("cpu"), False)
            said = capsys.readouterr().out
            is_told = category == "cup" and cfg.no_sam  # switched off it changes nothing
            assert ("--pseudo_labels.no_sam has no effect" in said and "leave it out" in said) == is_told
            assert is_told or not said
