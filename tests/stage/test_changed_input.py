"""A changed input: only what depends on it is made again, and no training is discarded without --force."""

from dataclasses import replace

import pandas as pd
import pytest

from common.artifacts.stage import sidecar
from common.artifacts.tables import read_table
from common.errors import UserError
from common.recipes import get_recipe
from common.train.distributed import Team
from common.train.hardware import HardwareOptions
from common.train.jobs import Request, plan
from common.train.loop import train_job
from tests.conftest import write_sample

RECIPE = "demo-quick"
TINY = ("--set", "cycle_epochs=1", "max_cycles=1", "buffers=16")


def test_one_image_or_label_changed(run_script, fails, small_data, tmp_path):
    work = tmp_path / "work"
    places = ("--data", small_data, "--work", work)
    commands = [
        ("01_preprocess.py", *places, "--recipes", RECIPE),
        ("02_dedup.py", *places),
        ("03_make_folds.py", *places, "--n-folds", 2),
        ("04_train.py", *places, "--recipe", RECIPE, *TINY),
        ("05_predict_oof.py", *places, "--recipes", RECIPE),
        ("06_thresholds.py", *places, "--recipes", RECIPE),
        ("07_ensemble.py", *places, "--recipes", RECIPE),
    ]
    stages = lambda *numbers: "".join(run_script(*commands[n - 1]).stdout for n in numbers)
    times = lambda: {
        path: path.stat().st_mtime_ns for path in work.rglob("*") if path.suffix in (".tif", ".npz", ".pt")
    }
    check = lambda: run_script(*commands[0], "--check", "--n-folds", 2, "--folds", 0, *TINY, check=False)
    changed = lambda before: {path.name for path, time in times().items() if before.get(path) != time}
    stages(1, 2, 3, 4, 5, 6, 7)
    networks = {path: path.read_bytes() for path in work.rglob("best.pt")}
    assert f"already begun or trained, to be resumed: {RECIPE} fold 0" in check().stdout

    # A test image: its stored copies, the test predictions and what is made from these.
    before = times()
    write_sample(small_data / "test_full_size", "test-1", seed=7)
    out = stages(1, 2, 3, 4, 5, 6, 7)
    assert changed(before) == {"test-1.tif", "fold0_test.npz", "fold1_test.npz", "test.npz"}
    assert "samples.csv again (changed: image files)" in out and "duplicates.csv again (changed: images)" in out
    assert (
        "folds.csv is up to date" in out
        and out.count("best.pt is up to date") == 2
        and "thresholds.json is up to date" in out
    )
    assert "fold0_test.npz again (changed: images)" in out and "submission.csv again (changed: demo-quick)" in out

    # A training image: every fold is trained or validated on it, so training asks for --force.
    before = times()
    write_sample(small_data / "train_full_size", "train-3", seed=7)
    told = check().stdout
    assert f"stage 01 will run again (changed: image files); already trained: {RECIPE} fold 0" in told
    assert "-> if images or labels change, these will need --force; another --work keeps them" in told
    stages(1)
    assert changed(before) == {"train-3.tif"}
    message = fails(*commands[3])
    assert "fold0 holds a finished training made from something else (changed: images); use --force" in message
    assert "was trained on something else (changed: images); run: python 04_train.py" in fails(*commands[4])

    # As before: nothing needs to be made, the networks fit again.
    write_sample(small_data / "train_full_size", "train-3")
    assert stages(1, 4).count("best.pt is up to date") == 2

    # A label: no image changes, training asks for --force.
    before = times()
    labels = pd.read_csv(small_data / "train.csv", dtype=str)
    labels.loc[labels["Id"] == "train-3", "Target"] = "0 21"
    labels.to_csv(small_data / "train.csv", index=False)
    out = stages(1, 2, 3)
    assert not changed(before) and "samples.csv again (changed: samples and labels)" in out
    assert "holds a finished training made from something else (changed: folds.csv); use --force" in fails(*commands[3])
    assert {path: path.read_bytes() for path in work.rglob("best.pt")} == networks
    assert all(sidecar(path).is_file() for path in networks)
    told = check()
    assert told.returncode == 2 and told.stdout.count("will fail") == 1
    assert "fold0 was trained on something else (changed: folds.csv)" in told.stdout
    assert f"python 04_train.py --data {small_data} --work {work} --recipe {RECIPE} --folds 0 --force" in told.stdout


def test_a_fold_that_had_to_wait_is_not_trained_on_other_folds_than_its_record_names(run_script, small_data, tmp_path):
    work = tmp_path / "work"
    places = ("--data", small_data, "--work", work)
    run_script("01_preprocess.py", *places, "--recipes", RECIPE)
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)
    recipes = {RECIPE: get_recipe(RECIPE, list(TINY[1:]))}
    (job,) = plan(Request(work, recipes, [0], pretrained="none"), read_table(work / "folds.csv", ""), Team())
    run_script("03_make_folds.py", *places, "--n-folds", 3)
    with pytest.raises(
        UserError,
        match=r"another process rewrote its inputs while this command ran \(changed: folds.csv\); run it again",
    ):
        train_job(replace(job, hardware=HardwareOptions("cpu", "fp32", 0)))
    assert not (work / "runs" / RECIPE / "fold0" / "best.pt").exists()
