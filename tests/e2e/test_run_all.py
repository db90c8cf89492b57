"""run_all.sh as users call it: to the end, again, killed midway, and with mistakes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from common.artifacts.predictions import load_predictions
from common.report.build import SECTIONS
from tests.browser import check_page
from tests.conftest import ROOT

TINY = ("--quick", "--recipes", "demo", "--set", "cycle_epochs=3", "--set", "max_cycles=1", "--set", "buffers=16")


def test_killed_at_any_time_it_ends_in_the_same_submission(run_script, run_stages, small_data, tmp_path):
    def run(work):
        return run_script("run_all.sh", "--data", small_data, "--work", tmp_path / work, *TINY).stdout

    run_stages("--data", small_data, "--work", tmp_path / "whole", *TINY)
    checkpoint = tmp_path / "killed" / "runs" / "demo-quick" / "fold0" / "last.pt"
    command = ["bash", str(ROOT / "run_all.sh"), "--data", str(small_data), "--work", str(tmp_path / "killed"), *TINY]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"},
    )
    while not checkpoint.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "submission.csv").exists()
    run("killed")
    for name in ("submission.csv", "thresholds.json", "folds.csv", "predictions/demo-quick/oof.npz"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    started = time.monotonic()
    again = run("killed")
    assert "making" not in again and again.count("is up to date") == 1 + 1 + 1 + 2 + 6 + 1 + 1
    assert time.monotonic() - started < 60


def test_dry_run_prints_commands_that_can_be_pasted(run_script, small_data, tmp_path):
    strange = tmp_path / "my data's"
    shutil.copytree(small_data, strange)
    out = run_script(
        "run_all.sh",
        "--data",
        strange,
        "--work",
        tmp_path / "work",
        "--quick",
        "--black-level",
        "5",
        "--store",
        "raw",
        "--dry-run",
    ).stdout
    assert not (tmp_path / "work").exists()
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == [
        "01_preprocess.py",
        "02_dedup.py",
        "03_make_folds.py",
        "04_train.py",
        "05_predict_oof.py",
        "06_thresholds.py",
        "07_ensemble.py",
        "08_report.py",
    ]
    hardware = ("--device", "cuda:1", "--precision", "fp16", "--workers", "3", "--fast", "--jobs", "4")
    out = run_script("run_all.sh", "--data", strange, "--work", tmp_path / "work", "--dry-run", *hardware).stdout
    assert [" ".join(hardware) in line for line in out.splitlines()] == [False] * 3 + [True] * 2 + [False] * 3
    assert "--black-level 5 --store raw" in lines[0] and "--black-level" not in "".join(lines[1:])
    subprocess.run(["bash", "-c", lines[0]], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "work" / "samples.csv").is_file()


STRANGE = "a 'b' \"c\" $(touch owned) `touch owned`; touch owned & * \\, -e \n"


@pytest.mark.parametrize(
    "flags",
    [
        ("--data", STRANGE),
        ("--recipes", STRANGE.strip()),
        ("--set", STRANGE),
        ("--folds", STRANGE),
        ("--tables", "--recipes", STRANGE),
        (STRANGE,),
    ],
)
def test_names_are_never_run(fails, small_data, tmp_path, flags):
    message = fails("run_all.sh", "--data", small_data, "--work", tmp_path / STRANGE, *flags)
    assert message.startswith("error: ")
    assert not any((folder / "owned").exists() for folder in (ROOT, tmp_path, tmp_path / STRANGE))


def test_strange_names_come_back_from_a_dry_run(run_script, small_data, tmp_path):
    out = run_script(
        "run_all.sh",
        "--data",
        tmp_path / STRANGE,
        "--work",
        tmp_path / "w",
        "--recipes",
        "demo",
        "--pretrained",
        STRANGE,
        "--weights-dir",
        STRANGE,
        "--dry-run",
    ).stdout
    read = subprocess.run(
        ["bash", "-c", f"python() {{ printf '%s\\0' \"$@\"; }}; {out.replace(sys.executable, 'python')}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert read.split("\0").count(str(tmp_path / STRANGE)) == 8  # each of the eight stages


def test_several_fields_are_set_at_once_as_in_stage_04(run_script, small_data, tmp_path):
    out = run_script(
        "run_all.sh",
        "--data",
        small_data,
        "--work",
        tmp_path,
        "--set",
        "alpha=0.9",
        "l1=0",
        "--quick",
        "--set",
        "batch_size=8",
        "--dry-run",
    ).stdout
    assert out.count("--set alpha=0.9 l1=0 batch_size=8\n") == 2


def test_the_tables_come_from_one_command_and_use_what_is_there(run_script, small_data, tmp_path):
    flags = (
        "--data",
        small_data,
        "--work",
        tmp_path,
        "--quick",
        "--recipes",
        "demo,demo_gapnet",
        "--folds",
        "0,1",
        "--set",
        "cycle_epochs=1",
        "--set",
        "max_cycles=1",
        "--pretrained",
        "none",
    )
    out = run_script("run_all.sh", "--tables", *flags).stdout
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(
        [
            "demo-original-quick",
            "demo-customised-quick",
            "demo-hard-quick",
            "demo-eloss-quick",
            "demo-quick",
            "demo_gapnet-quick",
        ]
    )
    for heading in (
        "## Table 1",
        "## Table 2",
        "## Table 3",
        "## Gains",
        "demo-quick (fold 1)",
        "demo_gapnet-quick mean",
    ):
        assert heading in out
    assert (tmp_path / "tables" / "tables.md").read_text() in out
    scores = pd.read_csv(tmp_path / "tables" / "tables.csv")
    assert len(scores) == 7 * 4 + 4 * 4  # columns of demo and of the baseline x two folds, mean and spread

    shutil.rmtree(tmp_path / "runs" / "demo-hard-quick" / "fold1")
    again = run_script("run_all.sh", "--tables", *flags).stdout
    assert again.count("epoch 1/1") == 1 and "demo-hard-quick fold 1: epoch 1/1" in again
    assert again.split("## Table 1")[1] == out.split("## Table 1")[1]  # still the same network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fodls", "0"], "unknown argument --fodls; did you mean --folds?"),
        (["--folds", "0,5"], "--folds must be distinct numbers from 0 to 4"),
        (["--folds"], "--folds needs a value"),
        (["--work", ""], "--work needs a value"),
        (["--set", "--quick"], "--set needs a value, found --quick"),
        (
            ["--recipes", "resnet50", "--set", "learning_rate=0.1"],
            "no effect on resnet50, which has learning_rates=0.01,0.02",
        ),
        (["--folds", "0,0"], "--folds must be distinct numbers from 0 to 4 separated by commas, found 0,0"),
        (["--folds", "0,,1"], "--folds must be distinct numbers"),
        (["--pretrained", "/nowhere.pth"], "--pretrained /nowhere.pth: there is no such file"),
        (["--recipes", "resnet5"], "unknown recipe 'resnet5'; did you mean resnet50?"),
        (["--tables", "--recipes", "resnet5"], "unknown recipe 'resnet5'; did you mean resnet50?"),
        (["--pretrained", "nowhere.pth", "--recipes", "demo", "--quick"], "nowhere.pth: there is no such file"),
        (["--set", "alfa=0"], "unknown recipe field 'alfa'; did you mean alpha?"),
        (["--data", "nowhere"], "train.csv is missing"),
    ],
)
def test_mistakes_end_at_once_with_one_message(fails, small_data, tmp_path, arguments, message):
    data = [] if "--data" in arguments else ["--data", small_data]
    assert message in fails("run_all.sh", *data, "--work", tmp_path / "work", *arguments)


def test_the_real_63_samples_end_in_a_valid_submission(real_run, real_data):
    work, out = real_run
    assert out.splitlines()[-1].endswith(str(work / "report.html"))
    assert "classes have no samples and count as 0" in out
    submission = pd.read_csv(work / "submission.csv", dtype=str, keep_default_na=False)
    test_ids = {path.name.rsplit("_", 1)[0] for path in (real_data / "kaggle_png" / "test").iterdir()}
    assert set(submission["Id"]) == test_ids and len(submission) == 13
    assert all(0 <= int(label) <= 27 for text in submission["Predicted"] for label in text.split())
    ids, _ = load_predictions(work / "predictions" / "resnet50-quick" / "oof.npz", "")
    assert len(set(ids)) == 50


def test_the_page_of_the_real_samples_in_a_browser(
    real_run, browser
):  # in this file, so that no second process repeats that run
    folder, _ = real_run
    check_page(browser, folder / "report.html")
    assert browser.execute_script("return document.querySelectorAll('main > section').length") == len(SECTIONS)
    notes = browser.execute_script(
        "return [...document.querySelectorAll('.left-out-note')].map(note => note.textContent)"
    )
    assert len(notes) == 1 and "No runs have been compared" in notes[0]
