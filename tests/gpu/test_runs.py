"""Whole trainings on a GPU: the same bits in every run, and the scripts as users call them."""

import signal
import sys

import pytest

from common.artifacts.stage import read_sidecar
from common.train import loop
from common.train.checkpoints import load_checkpoint
from common.train.hardware import device_name
from tests.conftest import training_job
from tests.gpu.helpers import FEW_EPOCHS, RECIPES
from tests.slow.test_training import Killed, fold_data, same
from tests.stage.test_stopping import stopped


def train(folder, data, recipe, hardware):
    job = training_job(folder, recipe)
    return loop.train_fold(loop.begin_fold(job, data, hardware), job, data)


def outcome(folder) -> tuple[bytes, dict]:
    """Return what must be the same in every run: the best network's file, and the last state without times and hardware."""
    state = load_checkpoint(folder / "last.pt")
    for row in state["history"]:
        del row["hardware"]
    return (folder / "best.pt").read_bytes(), state


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("bf16", "sgd"), ("fp16", "sgd"), ("fp32", "sgd"), ("bf16", "muon"), ("fp16", "adamw")]
)
def test_runs_have_the_same_bits_with_any_loader_processes_and_when_killed(
    tmp_path, monkeypatch, hardware, precision, optimizer
):
    data, recipe = fold_data(tmp_path / "images", 24), RECIPES[optimizer]
    train(tmp_path / "whole", data, recipe, hardware(precision, 0))
    train(tmp_path / "again", data, recipe, hardware(precision, 8))
    step, done = loop.train_step, []

    def dying_step(*arguments):
        if len(done) == 5:
            raise Killed
        done.append(1)
        return step(*arguments)

    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "train_step", dying_step)
    with pytest.raises(Killed):
        train(tmp_path / "killed", data, recipe, hardware(precision, 8))
    monkeypatch.setattr(loop, "train_step", step)
    train(tmp_path / "killed", data, recipe, hardware(precision, 0))
    (network, state), *others = (outcome(tmp_path / name) for name in ("whole", "again", "killed"))
    for other_network, other_state in others:
        assert same(other_state, state) and other_network == network


def test_the_first_command_runs_and_runs_again_without_work(work, device):
    folder, out, run_all = work
    assert "04_train: 2 jobs at once" in out and "05_predict_oof: 2 jobs at once" in out and "2 loader processes" in out
    results = [path for path in folder.rglob("*") if path.suffix in (".pt", ".npz") or path.name == "submission.csv"]
    before = {path: path.stat().st_mtime_ns for path in results}
    again = run_all()
    assert len(before) > 8 and {path: path.stat().st_mtime_ns for path in results} == before
    assert again.count("is up to date") >= 1 + 1 + 1 + 2 + 4 and "epoch" not in again
    for path in (folder / "runs" / "demo" / "fold0" / "best.pt", folder / "predictions" / "demo" / "fold1_oof.npz"):
        record = read_sidecar(path)["hardware"]
        assert (
            record["device"].startswith(device_name(device).split(" (cuda")[0]) and record["kernels"] == "deterministic"
        )


def test_fast_kernels_run_and_are_recorded(work, run_script, device):
    flags = ("--work", work[0], "--folds", "0", "--device", device.type, "--fast")
    out = run_script("04_train.py", *flags, "--recipe", "demo-original", "--set", *FEW_EPOCHS, timeout=120).stdout
    out += run_script("05_predict_oof.py", *flags, "--recipes", "demo-original", "--no-test", timeout=120).stdout
    assert out.count(", fast\n") == 2
    for name in ("runs/demo-original/fold0/best.pt", "predictions/demo-original/fold0_oof.npz"):
        assert read_sidecar(work[0] / name)["hardware"]["kernels"] == "fast"


def test_sigterm_ends_a_training_in_time_with_a_checkpoint(work, device):
    command = (
        sys.executable,
        "04_train.py",
        "--work",
        work[0],
        "--recipe",
        "demo-customised",
        "--folds",
        "0",
        "--device",
        device.type,
        "--workers",
        "2",
        "--set",
        "cycle_epochs=300",
        "max_cycles=1",
        "evaluate_epochs=1",
    )
    code, output, seconds = stopped(command, signal.SIGTERM, ["epoch 2/300"], whole_group=False)
    assert code == 143 and "Traceback" not in output and "saved in epoch" in output, output
    assert seconds < 30 and (work[0] / "runs" / "demo-customised" / "fold0" / "last.pt").is_file()
