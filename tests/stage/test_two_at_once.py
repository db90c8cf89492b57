"""Two people, or two cluster jobs, in one work folder: side by side on different outputs, else one message."""

import os
import signal
import subprocess
import sys
import time

import pytest

from common.artifacts.files import read_json
from common.artifacts.locks import Lock
from common.artifacts.stage import sidecar
from tests.conftest import ROOT

RECIPE, WAITING = "demo-quick", "demo-hard-quick"


@pytest.fixture
def start():
    """Return a function that starts a script and leaves it running; all are killed at the end."""
    started = []

    def run(*command):
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)


def read_until(process, beginning):
    return next(line for line in process.stdout if line.startswith(beginning))


def test_folds_are_trained_side_by_side_and_each_thing_by_one_process(run_script, start, fails, small_data, tmp_path):
    work = tmp_path / "work"
    places = ("--data", small_data, "--work", work)
    first = ("01_preprocess.py", *places, "--recipes", RECIPE)
    with Lock(work / "samples.csv"):
        message = fails(*first)
        assert (
            message.startswith(f"error: {work}/samples.csv is being made by ")
            and f"process {os.getpid()}, since" in message
        )
        assert not (work / "images").exists()
    run_script(*first)
    with Lock(work / "samples.csv"):
        assert "is up to date" in run_script(*first).stdout  # it changes nothing, so it needs no lock
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)

    train = ("04_train.py", "--work", work, "--recipe", RECIPE, "--set", "max_cycles=1", "buffers=16")
    runs = work / "runs" / RECIPE
    long = start(*train, "cycle_epochs=30000", "--folds", "0")
    wait_for(runs / "fold0" / "last.pt", long)
    short = (*train, "cycle_epochs=2", "--folds")
    run_script(*short, "1")
    assert long.poll() is None and sidecar(runs / "fold1" / "best.pt").is_file()
    message = fails(*short, "1,0", "--force")
    assert f"{runs}/fold0 is being made by " in message and f"process {long.pid}" in message
    assert "--folds 0" in message and "or stop it there, and run this again" in message
    assert (runs / "fold0" / "last.pt").is_file() and sidecar(
        runs / "fold1" / "best.pt"
    ).is_file()  # nothing is discarded

    os.kill(long.pid, signal.SIGKILL)
    run_script(*short, "0", "--force")  # a killed process blocks nobody
    assert read_json(sidecar(runs / "fold0" / "best.pt"))["epochs"] == 2

    # A process that reaches a fold that another one has taken waits, and continues after it.
    train = (
        "04_train.py",
        "--work",
        work,
        "--recipe",
        WAITING,
        "--set",
        "max_cycles=1",
        "buffers=16",
        "cycle_epochs=40",
        "evaluate_epochs=1",
        "--folds",
    )
    both = start(*train, "0,1")
    read_until(both, f"{WAITING} fold 0: epoch 1/40")
    with Lock(work / "runs" / WAITING / "fold1", wait=True):
        line = read_until(both, "waiting: ")
        assert "fold1 is being made by " in line and f"process {os.getpid()}" in line
    assert both.wait(timeout=120) == 0
    assert sidecar(work / "runs" / WAITING / "fold1" / "best.pt").is_file()

    predict = ("05_predict_oof.py", "--work", work, "--recipes", WAITING)
    with Lock(work / "predictions" / WAITING / "fold1_oof.npz"):
        waiting = start(*predict)
        read_until(waiting, "waiting: ")
    assert waiting.wait(timeout=120) == 0 and (work / "predictions" / WAITING / "oof.npz").is_file()
