"""Several trainings at once: seeds, processes, failures and interruptions."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from errors import UserError, run_script
from loco import files, layout, seeds
from models.device import all_devices
from training.ahead import draw_ahead
from training.fleet import run_all
from training.interruption import interrupts_wait

CPU = torch.device("cpu")


def write(path, device):
    path.write_text(f"{device} {os.getpid()} {os.environ.get('TQDM_POSITION')}")


def mistake(device):
    raise UserError("no such picture")


def crash(device):
    raise MemoryError("out of memory\nsecond line")


def forbidden(device):
    raise OSError(errno.EACCES, "Permission denied", "scores.npy")


def fill_the_disk(device):
    raise OSError(errno.ENOSPC, "No space left on device", "scores.npy")


def die(device):
    os.kill(os.getpid(), signal.SIGKILL)


def stop_when_asked(started, saved, device):
    """A training loop: says that it runs, and saves when it is interrupted."""
    with interrupts_wait() as interrupted:
        started.write_text("")
        for _ in range(600):
            if interrupted():
                saved.write_text("")
                raise KeyboardInterrupt
            time.sleep(0.1)


@pytest.mark.parametrize("devices, extra", [([CPU], {}), ([CPU, CPU], {"killed": die})])
def test_one_that_fails_does_not_take_the_others_along(tmp_path, devices, extra, capfd):
    jobs = {"wrong": mistake, "broken": crash, "forbidden": forbidden, **extra,
            **{name: partial(write, tmp_path / name) for name in ("first", "second")}}
    with pytest.raises(UserError, match="no such picture") as said:
        run_all(jobs, devices)
    assert f"{len(jobs) - 2} of {len(jobs)} failed" in str(said.value)
    assert "broken: MemoryError: out of memory" in str(said.value)
    assert "forbidden: no permission to write or read scores.npy" in str(said.value)
    assert "PermissionError" not in capfd.readouterr().err
    if extra:
        assert "killed: its process ended with status -9" in str(said.value)
    pids = {(tmp_path / name).read_text().split()[1] for name in ("first", "second")}
    assert (str(os.getpid()) in pids) == (len(devices) == 1)


@pytest.mark.parametrize("devices", [[CPU], [CPU, CPU]])
def test_a_full_disk_ends_the_whole_run(tmp_path, devices, capfd):
    before = ({"wrong": mistake} if len(devices) == 1 else
              {"long": partial(stop_when_asked, tmp_path / "started", tmp_path / "saved")})
    jobs = before | {"full": fill_the_disk, "last": partial(write, tmp_path / "last")}
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run_all(jobs, devices))
    said = capfd.readouterr().err
    assert ended.value.code == 2
    assert "error: the disk is full while writing scores.npy" in said
    assert ("wrong failed: no such picture" in said) == (len(devices) == 1)
    assert "Traceback" not in said
    assert not (tmp_path / "last").exists()


def test_a_single_job_speaks_for_itself():
    with pytest.raises(UserError, match="^no such picture$"):
        run_all({"only": mistake}, [CPU, CPU])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_together_all_save(tmp_path, number):
    """Ctrl-C goes to the whole process group, SIGTERM to the parent alone: either way every training saves, once."""
    script = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
if __name__ == "__main__":
    from functools import partial
    from pathlib import Path
    import torch
    from errors import run_script
    from test_fleet import stop_when_asked
    from training.fleet import run_all
    folder = Path({str(tmp_path)!r})
    run_script(lambda: run_all({{name: partial(stop_when_asked, folder / f"started {{name}}", folder / f"saved {{name}}")
                                for name in "ab"}}, [torch.device("cpu")] * 2))
"""
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], start_new_session=True, stderr=subprocess.PIPE,
                               text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("started *"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert sorted(path.name for path in tmp_path.glob("saved *")) == ["saved a", "saved b"], said
    assert process.returncode == 2 and "interrupted" in said, said


def test_sigterm_waits_for_the_step_and_a_second_one_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with interrupts_wait() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGTERM)
        assert interrupted()
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_draws_come_in_order_one_step_ahead_from_another_thread():
    drawn = []

    def draw(step):
        drawn.append(step)
        assert threading.current_thread() is not threading.main_thread()
        return step * step
    found = []
    for value in draw_ahead(draw, 2, 6):
        found.append(value)
        assert len(drawn) <= len(found) + 1
    assert found == [4, 9, 16, 25]
    assert list(draw_ahead(draw, 3, 3)) == []


def test_a_draw_that_fails_says_so():
    def draw(step):
        raise UserError("picture is damaged")
    with pytest.raises(UserError, match="damaged"):
        next(draw_ahead(draw, 0, 2))


def test_every_gpu_is_used_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert all_devices("auto") == [torch.device("cuda", index) for index in range(3)]
    assert all_devices("cpu") == [CPU]


def test_seeds_have_workspaces_of_their_own_that_share_the_pseudo_labels(tmp_path):
    workspace = layout.Workspace(tmp_path)
    assert workspace.of_seeds(None) == {None: workspace}
    homes = workspace.of_seeds([3, 5])
    assert list(homes) == [3, 5]
    for seed, home in homes.items():
        assert home.info("c") == workspace.info("c")
        assert home.checkpoints == workspace.checkpoints
        for path in (home.segmentor("c"), home.lgst("c"), home.scores("c", "LGST", "val"), home.combined_scores,
                     home.segmentation_output("c", "good", Path("000.png")), home.exported_model("c", "torch")):
            assert path.is_relative_to(tmp_path / "seeds" / str(seed))


def test_mean_and_deviation_over_seeds():
    runs = [{"a": {"lgst": {"auroc": 90.0}, "name": "x", "other": None}, "b": {"lgst": {"auroc": 70.0}, "extra": 1}},
            {"a": {"lgst": {"auroc": 94.0}, "name": "x"}, "b": {"lgst": {"auroc": 70.0}}}]
    found = seeds.over_seeds(runs)
    assert found["a"] == {"lgst auroc": (92.0, pytest.approx(8**0.5))}
    assert found["b"] == {"lgst auroc": (70.0, 0.0)}
    assert found["average"]["lgst auroc"] == (81.0, pytest.approx(2**0.5))
    lines = seeds.table(found, [0, 7])
    assert "seeds 0, 7" in lines[0]
    assert any(line.startswith("average") and "81.000 ± 1.414" in line for line in lines)


def test_two_seeds_run_through_all_stages(tmp_path, make_dataset, monkeypatch):
    """Stage 1 once, the others per seed; the tables give mean and deviation; the same seed gives what --seed gives."""
    import benchmark_performance
    import CSAD
    import export_model
    import pseudo_label
    import train_segmentor
    dataset = make_dataset(train=12, validation=4, test=3)
    options = ["--workspace", str(tmp_path / "w"), "--dataset_root", str(dataset), "--preset", "quick", "--backbone", "embedded",
               "--device", "cpu", "--pseudo_labels.proposer", "classical", "--pseudo_labels.rotations", "2",
               "--segmentor.epochs", "1", "--segmentor.width", "16", "--lgst.steps", "2", "--lgst.width", "16",
               "--lgst.teacher_channels", "16"]

    def run(stage, *more):
        monkeypatch.setattr(sys, "argv", [stage.__name__, *options, *more])
        stage.main()
    run(pseudo_label)
    for stage in (train_segmentor, CSAD, export_model, benchmark_performance):
        run(stage, "--seeds", "0", "1")
    work = layout.Workspace(tmp_path / "w")
    text = work.over_seeds("score_combine_result").read_text()
    assert "seeds 0, 1" in text and "detection patchhist+LGST logical auroc" in text and " ± " in text and "stand-ins" in text
    assert "auroc_mean" in work.over_seeds("export_report_torch_fp32").read_text()
    homes = work.of_seeds([0, 1])
    for home in homes.values():
        assert home.combined_scores.read_text().startswith("DISCS:")
        assert list(home.root.rglob("good_000.png"))
    run(CSAD, "--seed", "1")
    first, second = (files.read_state(home.lgst("discs"))["state"] for home in (work, homes[1]))
    assert all(torch.equal(first[key], second[key]) for key in first)
