"""common/pipeline.py: which stages run_all.sh runs with which arguments, and how it ends when asked to stop."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from common import pipeline
from common.pipeline import check, parse_args, stages
from tests.conftest import ROOT

SCRIPTS = ["01_preprocess.py", "02_dedup.py", "03_make_folds.py", "04_train.py", "05_predict_oof.py"]


def planned(*arguments, caller=ROOT):
    """Return {script: its arguments as one line} of the stages that would run."""
    return {stage.script: " ".join(stage.arguments) for stage in stages(parse_args(list(arguments), caller))}


@pytest.fixture(autouse=True)
def no_data(monkeypatch, tmp_path):
    """A project folder without a data folder."""
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    return tmp_path


def test_without_data_the_demo_is_drawn_first():
    found = planned()
    assert list(found) == ["common.demo", *SCRIPTS, "06_thresholds.py", "07_ensemble.py", "08_report.py"]
    work = f"{ROOT}/work"
    assert found["common.demo"] == f"--data {work}/demo_data"
    assert found["03_make_folds.py"] == f"--data {work}/demo_data --work {work} --n-folds 3"
    assert found["04_train.py"].endswith("--recipe demo,demo_large --folds 0,1,2 --jobs 2")


def test_a_folder_of_data_is_taken(no_data):
    (no_data / "data").mkdir()
    found = planned()
    assert "common.demo" not in found and found["01_preprocess.py"].endswith("--recipes resnet50")
    assert "--folds 0,1,2,3,4" in found["05_predict_oof.py"] and "--jobs" not in found["04_train.py"]


def test_quick_is_small_in_every_stage():
    found = planned("--data", "x", "--recipes", "resnet50,senet", "--quick")
    assert "--recipes resnet50-quick,senet-quick --limit 1000" in found["01_preprocess.py"]
    assert found["03_make_folds.py"].endswith("--n-folds 2") and found["05_predict_oof.py"].endswith("--tta none")
    assert "--folds 0,1" in found["04_train.py"]


def test_tables_train_every_variant_and_end_in_stage_09():
    found = planned("--data", "x", "--tables", "--recipes", "resnet50,gapnet_pl", "--folds", "1")
    assert list(found) == [*SCRIPTS, "09_tables.py", "08_report.py"]
    runs = "resnet50-original,resnet50-customised,resnet50-hard,resnet50-eloss,resnet50,gapnet_pl"
    assert runs in found["01_preprocess.py"] and runs in found["04_train.py"]
    assert found["05_predict_oof.py"].endswith("--no-test")
    assert found["09_tables.py"].endswith("--recipes resnet50,gapnet_pl --folds 1")
    assert planned("--tables")["09_tables.py"].endswith("--recipes demo,demo_gapnet --folds 0,1,2")


@pytest.mark.parametrize(
    ("flags", "scripts"),
    [
        ("--device cuda:1 --precision fp16 --workers 3 --fast --jobs 4", ("04_train.py", "05_predict_oof.py")),
        ("--pretrained none --weights-dir /w", ("04_train.py",)),
        ("--track tensorboard,mlflow", ("04_train.py",)),
        ("--set alpha=0.9 l1=0", ("01_preprocess.py", "04_train.py")),
        ("--white-level 4095 --black-level 5 --store raw", ("01_preprocess.py",)),
        ("--keep-going", ("01_preprocess.py",)),
    ],
)
def test_each_flag_reaches_its_stages_alone(flags, scripts):
    found = planned("--data", "x", *flags.split())
    assert tuple(script for script, arguments in found.items() if flags in arguments) == scripts
    assert tuple(script for script, arguments in found.items() if flags.split()[0] in arguments) == scripts


def test_paths_are_the_callers(no_data, tmp_path_factory):
    caller = tmp_path_factory.mktemp("caller")
    (caller / "w.pth").touch()
    flags = ("--data", "x", "--work", "/y", "--pretrained", "w.pth")
    found = planned(*flags, caller=caller)
    assert (
        found["02_dedup.py"] == f"--data {caller}/x --work /y"
        and f"--pretrained {caller}/w.pth" in found["04_train.py"]
    )
    (no_data / "w.pth").touch()
    assert planned(*flags, caller=no_data)["02_dedup.py"] == "--data x --work /y"


def test_the_check_is_told_what_all_stages_are():
    args = parse_args(shlex.split("--data x --work y --quick --tables --recipes demo --set alpha=1 --keep-going"), ROOT)
    line = shlex.join(check(args).command("python"))
    assert line.startswith(
        f"python 01_preprocess.py --check --data {ROOT}/x --work {ROOT}/y --recipes demo-original-quick,"
    )
    assert line.endswith("--folds 0,1 --n-folds 2 --limit 1000 --keep-going --tta none --no-test --set alpha=1")


def test_parsing_needs_no_package():
    code = "import common.pipeline as p, sys; p.parse_args(['--data', 'x'], p.ROOT); print(*sys.modules)"
    end = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in end.stdout.split()} - set(sys.stdlib_module_names)
    assert loaded - {"__main__", "__mp_main__"} == {"common"}


STAGE = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.5)
    os.write(1, b'saved\\n')  # print may be interrupted by itself
    os._exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, stop)
print('begun', flush=True)
time.sleep(60)
"""
RUNNER = f"""
import sys
from common.pipeline import Runner
runner = Runner('bash run_all.sh')
runner.run([sys.executable, '-c', {STAGE!r}])
print('next')
"""


@pytest.mark.parametrize(
    ("number", "whole_group", "said"),
    [
        (signal.SIGINT, True, True),
        (signal.SIGTERM, False, False),
        (signal.SIGTERM, True, False),
        (signal.SIGHUP, False, False),
    ],
)
def test_a_stage_saves_and_one_of_both_says_how_to_go_on(number, whole_group, said):
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "begun\n"
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert "saved" in out and "next" not in out and process.returncode == 128 + number
    assert err == ("\nstopped; finished work is kept. To resume: bash run_all.sh\n" if said else "")


@pytest.mark.parametrize(
    ("code", "found"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("sys.exit(130)", 130)]
)
def test_the_code_of_a_stage_that_fails_is_the_codes_of_all(code, found):
    stage = f"import os, sys; {code}"
    body = f"import sys; from common.pipeline import Runner\nRunner('x').run([sys.executable, '-c', {stage!r}])"
    end = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert (end.returncode, "To resume: x" in end.stderr) == (found, found == 130)


def test_a_signal_between_stages_ends_before_the_next_one():
    body = (
        "import os, signal, sys, time; from common.pipeline import Runner\nrunner = Runner('x')\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nrunner.run([sys.executable, '-c', 'print(1)'])"
    )
    started = time.monotonic()
    end = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True)
    assert (
        (end.returncode, end.stdout) == (143, "") and "To resume: x" in end.stderr and time.monotonic() - started < 30
    )
