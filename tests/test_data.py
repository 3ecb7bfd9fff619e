"""Settings, files and records: what a person can get wrong, and what must survive it."""

import errno
import os
import re
import signal
from contextlib import nullcontext

import csad
from csad import settings
from csad.cli import common_options, overrides, training_options, with_branches
from csad.data import files, records
from csad.data.workspace import Workspace
from csad.errors import UserError, defer_interrupts, run_script

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

# Settings


def test_layers_override_in_order():
    assert settings.load("screw_bag").segmentor.paste_distance == 0.1
    assert settings.load("screw_bag").lgst.steps == 60000
    quick = settings.load("screw_bag", "quick")
    assert quick.segmentor.paste_distance == 0.1
    assert quick.lgst.steps < 60000
    assert settings.load("screw_bag", "quick", {"lgst.steps": 7}).lgst.steps == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("lgst.steps", 0), ("lgst.lr", "fast"), ("segmentor.epochs", -1), ("pseudo_labels.bandwidth", "wide")],
)
def test_bad_value_is_named(name, value):
    with pytest.raises(UserError, match=name):
        settings.load("screw_bag", overrides={name: value})


@pytest.mark.parametrize("first", [3, 9])
def test_unsupervised_losses_join_before_the_end(first):
    with pytest.raises(
        UserError, match=f"segmentor.unsupervised_from_epoch: {first} is after the last epoch .*epochs: 3"
    ):
        settings.load("none", overrides={"segmentor.epochs": 3, "segmentor.unsupervised_from_epoch": first})
    assert settings.load("none", overrides={"segmentor.epochs": 3, "segmentor.unsupervised_from_epoch": 2})


def test_unknown_key_in_a_category_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "categories").mkdir()
    (tmp_path / "presets").mkdir()
    (tmp_path / "categories" / "cup.yaml").write_text("lgst:\n  stesp: 3\n")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    with pytest.raises(UserError, match="stesp"):
        settings.load("cup")
    (tmp_path / "categories" / "cup.yaml").write_text("lgst: [1")
    with pytest.raises(UserError, match="cup.yaml"):
        settings.load("cup")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("{5: capacitor, 12: 'pin, long'}", None),
        ("{0: pin}", "names.0"),
        ("{pin: 5}", "names.pin"),
        ("{5: ''}", "names.5"),
        ("{5: 7}", "names.5"),
        ("[pin]", "names:"),
        ("{5: ' pin'}", "names.5"),
        ('{5: "a\\e[31mpin"}', "names.5"),
        ("{5: a, 5: b}", "the key 5 occurs twice"),
    ],
)
def test_a_categorys_file_names_components(tmp_path, monkeypatch, names, said):
    (tmp_path / "categories").mkdir()
    (tmp_path / "categories" / "cup.yaml").write_text(f"names: {names}\n")
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    if said is None:
        assert (
            settings.load("cup").names == {5: "capacitor", 12: "pin, long"}
            and settings.load("mug").names == {}
        )
    else:
        with pytest.raises(UserError, match=re.escape(said)):
            settings.load("cup")


@pytest.mark.parametrize(
    "text, key",
    [
        ("lgst:\n  steps: 20\nlgst:\n  lr: 0.0001\n", "lgst"),
        ("lgst:\n  steps: 20\n  lr: 0.1\n  steps: 20\n", "steps"),
        ("lgst: {steps: 2, steps: 3}", "steps"),
        ('"lgst": {steps: 2}\nlgst: {lr: 1.0}', "lgst"),
        ("roi: []\nroi: [[]]\n", "roi"),
    ],
)
def test_a_key_that_stands_there_twice_is_refused(tmp_path, monkeypatch, text, key):
    (tmp_path / "categories").mkdir()
    (tmp_path / "categories" / "cup.yaml").write_text(text)
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    with pytest.raises(UserError, match=f"cup.yaml .*the key {key} occurs twice, in lines"):
        settings.load("cup")


def test_a_json_key_that_stands_there_twice_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"pixel_value": 1, "pixel_value": 2}]')
    with pytest.raises(UserError, match="the key 'pixel_value' occurs twice"):
        files.read_json(tmp_path / "a.json")


def test_every_setting_is_an_option():
    args = common_options("story").parse_args(
        ["--segmentor.lr", "1e-3", "--pseudo_labels.features", "[area, color]"]
    )
    chosen = settings.load("none", "paper", overrides(args))
    assert chosen.segmentor.lr == 1e-3
    assert chosen.pseudo_labels.features == ["area", "color"]


def test_help_tells_every_setting_with_its_meaning(monkeypatch):
    """A per cent sign in a description is none of argparse's."""
    monkeypatch.setattr(
        settings.LgstSettings.model_fields["steps"], "description", "of which 95 % at full rate"
    )
    said = " ".join(with_branches(training_options("story")).format_help().split())
    assert "of which 95 % at full rate (60000)" in said
    for section, model in settings.SECTIONS.items():
        assert all(f"--{section}.{key}" in said for key in model.model_fields)


@pytest.mark.parametrize("value", ["@photos", "a: b: c", "[x"])
def test_a_value_that_is_no_yaml_names_its_option(value):
    args = common_options("story").parse_args(["--lgst.penalty_images", value])
    with pytest.raises(UserError, match="--lgst.penalty_images .* is not valid YAML"):
        overrides(args)


def test_seeds_are_whole_numbers_that_every_generator_takes(capsys):
    parser = training_options("story")
    assert parser.parse_args(["--seed", str(2**63 - 1), "--seeds", "0", "7"]).seeds == [0, 7]
    for wrong in (["--seed", "-1"], ["--seed", "1.5"], ["--seed", str(2**63)], ["--seeds", "0", "-3"]):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(wrong)
        assert ended.value.code == 2
        assert f"'{wrong[-1]}' is not a valid seed" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["010", "1:30", "true", "inf", ".nan", "1.5", "'3'"])
def test_numbers_mean_what_they_look_like(value):
    args = common_options("story").parse_args(["--lgst.steps", value])
    with pytest.raises(UserError, match="lgst.steps"):
        settings.load("none", "paper", overrides(args))


def test_what_a_person_wrote_wins_over_a_preset(tmp_path, monkeypatch):
    for folder, name, text in (
        ("categories", "cup", "lgst: {steps: 3}"),
        ("presets", "fast", "lgst: {steps: 9, width: 16}"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(settings, "CONFIGS", tmp_path)
    chosen = settings.load("cup", "fast").lgst
    assert (chosen.steps, chosen.width) == (3, 16)


# Workspace


def test_a_workspace_serves_one_run_at_a_time(tmp_path):
    workspace = Workspace(tmp_path)
    with workspace.lock(), pytest.raises(UserError, match="another run"), Workspace(tmp_path).lock():
        pass
    with workspace.lock():
        pass


# Files


@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    arrays.arrays(
        st.sampled_from([np.uint8, np.int64, np.float64]), arrays.array_shapes(min_dims=0, max_dims=3)
    ).filter(lambda array: np.isfinite(array).all())
)
def test_arrays_come_back_as_they_were(tmp_path, array):
    files.write_array(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(files.read_array(tmp_path / "a.npy"), array)
    files.write_arrays(tmp_path / "a.npz", one=array, two=array)
    np.testing.assert_array_equal(files.read_arrays(tmp_path / "a.npz")["two"], array)


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "scores.npy"
    files.write_array(path, np.arange(3))

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_array(path, np.arange(9))
    assert files.read_array(path).tolist() == [0, 1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.npy"]


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (UserError("no such thing"), "no such thing"),
        (OSError(errno.ENOSPC, "No space left on device", "x.npy"), "disk is full"),
        (MemoryError("Unable to allocate 9 PiB"), "memory ran out"),
        (OSError(errno.EFBIG, "File too large", "x.npy"), "disk is full"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "work"), "work cannot be used"),
        (FileExistsError(errno.EEXIST, "File exists", "work"), "work cannot be used"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "work/a"), "work/a cannot be used"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "ckpt"), "ckpt cannot be used"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "too long"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(problem, words, capsys):
    def main():
        raise problem

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_interrupted_says_so_and_ends_as_shells_expect(number, status, deferred, capsys):
    def main():
        with defer_interrupts() if deferred else nullcontext() as interrupted:
            signal.raise_signal(number)
            assert deferred and interrupted()
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == status and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.startswith("interrupted; everything finished so far is kept")


@pytest.mark.parametrize(
    "first, second, at_once", [("SIGTERM", "SIGTERM", False), ("SIGINT", "SIGINT", True)]
)
def test_sigterm_twice_in_a_moment_is_one_and_ctrl_c_twice_ends_at_once(first, second, at_once):
    """A whole group of processes gets SIGTERM from the system, and a job once more from its parent."""
    reached = []

    def main():
        with defer_interrupts() as interrupted:
            signal.raise_signal(signal.Signals[first])
            signal.raise_signal(signal.Signals[second])
            reached.append(interrupted())

    if at_once:
        with pytest.raises(SystemExit):
            run_script(main)
    else:
        run_script(main)
    assert reached == ([] if at_once else [True])


def test_an_interruption_may_say_what_is_kept(capsys):
    def main():
        raise KeyboardInterrupt("interrupted; half is written")

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 130 and capsys.readouterr().err == "interrupted; half is written\n"


def test_pickles_are_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "whole.pth")
    with pytest.raises(UserError, match="whole.pth"):
        files.read_state(tmp_path / "whole.pth")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))  # NumPy pickles it
    with pytest.raises(UserError, match="objects.npy"):
        files.read_array(tmp_path / "objects.npy")


def test_damaged_files_are_named(tmp_path):
    for name, read in (
        ("a.npy", files.read_array),
        ("a.npz", files.read_arrays),
        ("a.pth", files.read_state),
        ("a.json", files.read_json),
    ):
        for content in (
            b"\x89PNG not really",
            b"",
            b"a text\n",
            b"hello world",
            b"G",
            b".\n",
        ):  # torch has an error for each
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name):
                read(tmp_path / name)
        with pytest.raises(UserError, match="missing"):
            read(tmp_path / f"no_{name}")


def test_numbers_that_are_none_are_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, np.nan]))
    np.savez(tmp_path / "a.npz", good=np.ones(2), bad=np.array([np.inf]))
    files.write_state(
        tmp_path / "a.pth", {"state": {"weight": torch.tensor([[torch.nan]]), "bias": torch.zeros(1)}}
    )
    for read in (
        lambda: files.read_array(tmp_path / "a.npy"),
        lambda: files.read_arrays(tmp_path / "a.npz"),
        lambda: files.load_checkpoint(torch.nn.Linear(1, 1), tmp_path / "a.pth"),
    ):
        with pytest.raises(UserError, match="not finite"):
            read()


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / ".a.npy.tmp").write_bytes(b"half")
    files.write_array(tmp_path / "a.npy", np.arange(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"used": {}}'])
def test_json_of_something_else_is_no_record(tmp_path, content):
    (tmp_path / "made.json").write_text(content)
    with pytest.raises(UserError, match="made.json cannot be read .*used, scored, outputs"):
        records.read_record(tmp_path / "made.json")


def test_json_has_no_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [float("nan"), {"b": (1.5, float("nan"))}]})
    assert "NaN" not in (tmp_path / "a.json").read_text()
    assert files.read_json(tmp_path / "a.json") == {"a": [None, {"b": [1.5, None]}]}


def test_text_may_hold_names_that_are_none(tmp_path):
    files.write_text(tmp_path / "a.csv", "\udcff.png, µ")
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "\\udcff.png, µ"


# Records


@pytest.fixture
def made(tmp_path):
    """A record of one checkpoint and its scores; made(**used) and made(scored=...) describe other ones."""
    outputs = [tmp_path / "made.pth", tmp_path / "made.npy"]

    def record(scored="1", **used):
        given = {"format_version": csad.FORMAT_VERSION, "seed": 0, "names": ("a", "b")} | used
        return records.Record(tmp_path / "made.json", given, outputs, {"validation": scored}, outputs[0])

    def write(record):
        files.write_state(outputs[0], {"state": {}, "meta": record.provenance | {"more": 1}})
        files.write_array(outputs[1], np.zeros(1))
        record.finish()

    record.write, record.outputs = write, outputs
    return record


def test_a_record_notices_what_changed_and_takes_nothing_away(made):
    assert made().plan(False) == records.TRAIN
    made.write(made())
    assert made().plan(False) == records.SKIP
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        made(seed=1).plan(False)
    assert made(seed=1).plan(True) == records.TRAIN
    assert all(path.exists() for path in made.outputs) and made().plan(False) == records.SKIP


def test_other_scored_images_or_a_changed_output_are_scored_anew(made):
    made.write(made())
    assert made(scored="2").plan(False) == records.SCORE
    files.write_array(made.outputs[1], np.ones(1))
    assert made().plan(False) == records.SCORE
    made.outputs[0].unlink()
    assert made().plan(False) == records.TRAIN


def test_a_run_that_ended_before_its_record_is_scored_again(made):
    made.write(made())
    made().path.unlink(missing_ok=True)
    assert made().plan(False) == records.SCORE


def test_outputs_of_others_are_used_as_they_are(tmp_path):
    files.write_array(tmp_path / "made.npy", np.zeros(1))
    assert (
        records.Record(tmp_path / "made.json", {"seed": 0}, [tmp_path / "made.npy"]).plan(False)
        == records.SKIP
    )


@pytest.mark.parametrize(
    "content, said",
    [
        (
            {"state": {}, "meta": {"format_version": csad.FORMAT_VERSION, "seed": 1, "names": ("a", "b")}},
            "made.pth was made .* [(]seed: 1 -> 0[)]; --overwrite",
        ),
        (
            {"state": {}, "meta": {"seed": 0, "names": ("a", "b")}},
            f"made.pth .*format_version: None -> {csad.FORMAT_VERSION}",
        ),
        ({"encoder.weight": torch.zeros(1)}, "made.pth does not say what it was made from"),
        (torch.zeros(1), "made.pth does not say what it was made from"),
    ],
)
def test_a_checkpoint_without_a_record_has_to_fit(made, content, said):
    files.write_state(made.outputs[0], content)
    with pytest.raises(UserError, match=said):
        made().plan(False)


def test_a_record_of_another_version_is_refused_and_overwritten(made, monkeypatch):
    made.write(made())
    monkeypatch.setattr(csad, "FORMAT_VERSION", csad.FORMAT_VERSION + 1)
    with pytest.raises(UserError, match="made.json was written by another version .*--overwrite"):
        made().plan(False)
    with pytest.raises(UserError, match="another version"):
        records.require_current(made().path, {}, [], "stage.py")
    assert made().plan(True) == records.TRAIN


def test_digests_are_of_contents(tmp_path):
    first = tmp_path / "a.bmp"
    first.write_bytes(b"1234")
    before = records.digest_images([first])
    first.write_bytes(b"4321")  # as long, and called the same
    assert records.digest_images([first]) != before


def test_files_of_other_images_are_not_combined(made, tmp_path):
    made.write(made())
    path = tmp_path / "made.json"
    assert records.require_current(path, {"validation": "1"}, made.outputs, "stage.py")
    with pytest.raises(UserError, match="validation images are not those that stage.py saw"):
        records.require_current(path, {"validation": "2"}, made.outputs, "stage.py")
    files.write_array(made.outputs[1], np.ones(1))
    with pytest.raises(UserError, match="made.npy is not the file that stage.py wrote"):
        records.require_current(path, {}, made.outputs, "stage.py")


def test_a_checkpoint_of_another_network_is_named(tmp_path):
    network = torch.nn.Linear(2, 2)
    for state in ({"state": torch.nn.Linear(3, 2).state_dict()}, {"state": {}}, {"weight": torch.zeros(1)}):
        files.write_state(tmp_path / "made.pth", state)
        with pytest.raises(UserError, match="made.pth does not hold the network"):
            files.load_checkpoint(network, tmp_path / "made.pth")
