"""Stage 04's own flags: recipes, variants, pretrained weights, several processes, tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common.artifacts.files import read_json
from common.artifacts.predictions import load_predictions
from common.artifacts.stage import sidecar
from common.artifacts.tables import read_table
from common.recipes import Recipe, get_recipe
from common.train.checkpoints import load_network
from common.train.dataset import Normalisation, dihedral
from common.train.fold_data import load_fold
from common.train.hardware import HardwareOptions, choose_hardware
from common.train.networks import build_encoder
from tests.conftest import ROOT

RECIPE = "demo-quick"
TINY = ("--set", "cycle_epochs=1", "max_cycles=1", "buffers=16")
RESNET18 = ("--set", "cycle_epochs=1", "max_cycles=1", "buffers=16", "encoder=resnet18")


@pytest.fixture
def work(run_script, small_data, tmp_path) -> Path:
    """A work folder up to stage 03, two folds."""
    places = ("--data", small_data, "--work", tmp_path / "work")
    run_script("01_preprocess.py", *places, "--recipes", RECIPE)
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)
    return tmp_path / "work"


@pytest.fixture
def train(run_script, work):
    return lambda *more, recipe=RECIPE: run_script("04_train.py", "--work", work, "--recipe", recipe, *more).stdout


def test_recipes_are_listed_for_people_and_for_programs(run_script):
    lines = run_script("04_train.py", "--list-recipes").stdout.splitlines()
    assert "parameters" in lines[0] and any(
        line.split()[:2] == ["gapnet_pl", "gapnet_pl"] and line.endswith("630076") for line in lines
    )
    records = json.loads(run_script("04_train.py", "--list-recipes", "--json").stdout)
    assert {"recipe", "encoder", "parameters", "learning_rates"} <= records[0].keys()


def test_class_weights_are_shown_before_training(train, work):
    out = train("--show-class-weights", "--folds", "1", "--set", "alpha=0.99")
    assert "demo-quick fold 1: alpha 0.99" in out and "Rods & rings" in out and "Q_n" in out
    assert not (work / "runs").exists()


def test_smaller_sizes_than_the_recipes_are_said_here_too(run_script, work):
    told = run_script("04_train.py", "--work", work, "--recipe", RECIPE, "--set", "image_size=1600", check=False)
    assert told.returncode == 2 and "160.csv is missing" in told.stderr
    assert (
        "demo-quick uses 160 px with crops of 96 instead of 200 and 64; nothing is enlarged. To enlarge" in told.stdout
    )


def test_variants_have_runs_of_their_own_and_ta_is_the_recipe(train, run_script, work, fails):
    train(*TINY[:3], "--folds", "0", recipe="demo-original-quick,demo-ta-quick")
    assert sorted(path.name for path in (work / "runs").iterdir()) == ["demo-original-quick", "demo-quick"]
    assert (
        read_json(sidecar(work / "runs" / "demo-original-quick" / "fold0" / "best.pt"))["parameters"]["pooling"]
        == "average"
    )
    out = run_script(
        "05_predict_oof.py",
        "--work",
        work,
        "--recipes",
        "demo-quick-original,demo-quick-ta",
        "--folds",
        "0",
        "--no-test",
    ).stdout
    assert out.count("oof samples x 8 views") == 2
    assert sorted(path.name for path in (work / "predictions" / "demo-quick").glob("*.npz")) == [
        "fold0_oof.npz",
        "oof.npz",
    ]
    message = fails("09_tables.py", "--work", work, "--recipes", "demo-quick", "--folds", "0")
    assert (
        "runs are missing; run: bash run_all.sh --tables" in message
        and "or give --partial to leave these columns empty:" in message
    )
    assert "Customised of demo-quick: demo-customised-quick has no predictions of fold 0" in message
    assert "bash run_all.sh --tables --recipes demo-quick" in message
    out = run_script("09_tables.py", "--work", work, "--recipes", "demo-quick", "--folds", "0", "--partial").stdout
    assert "## Table 3" in out and "TA + TE" in out
    run_script(
        "05_predict_oof.py",
        "--work",
        work,
        "--recipes",
        "demo-original-quick",
        "--folds",
        "0",
        "--no-test",
        "--tta",
        "none",
    )
    message = fails("09_tables.py", "--work", work, "--recipes", "demo-quick", "--folds", "0", "--partial")
    assert "run stage 05 for all runs with the same --tta, --view and --checkpoint" in message


def test_our_own_small_recipe_sees_each_image_at_one_exposure(train, run_script, work):
    train(*TINY, "--folds", "0", recipe="small_plus-quick")
    run_script("05_predict_oof.py", "--work", work, "--recipes", "small_plus-quick", "--folds", "0", "--no-test")
    path, recipe = work / "runs" / "small_plus-quick" / "fold0" / "best.pt", get_recipe("small_plus-quick", TINY[1:])
    model, normalise = load_network(path, recipe, choose_hardware(HardwareOptions("cpu", "fp32", 0), training=False))
    folds = read_table(work / "folds.csv", "")
    data = load_fold(work, folds, 0, recipe, Normalisation((0.5,) * 4, (0.5,) * 4))
    assert data.normalisation == normalise == Normalisation((64 / 255,) * 4, (24 / 255,) * 4)
    images = normalise(torch.from_numpy(np.stack([data.valid[row][0] for row in range(4)])), torch.device("cpu"))
    assert images.mean().abs() < 0.1 and images.std() == pytest.approx(0.9, abs=0.15)
    ids, probs = load_predictions(work / "predictions" / "small_plus-quick" / "fold0_oof.npz", "")
    turned = torch.stack([model.eval()(dihedral(images, turn)).sigmoid() for turn in range(8)]).mean(dim=0)
    rows = [list(ids).index(Id) for Id in data.valid.ids[:4]]
    np.testing.assert_allclose(probs[rows], turned.detach().numpy(), atol=2e-4)


def test_a_file_of_weights_its_normalisation_and_its_record(train, work, fails, tmp_path):
    torch.manual_seed(0)
    torch.save(build_encoder(Recipe(encoder="resnet18"))[0].state_dict(), tmp_path / "mine.pth")
    out = train(*RESNET18, "--folds", "0", "--pretrained", tmp_path / "mine.pth")
    start = "from mine.pth (encoder; head from random weights: the file has none), images normalised for these weights"
    assert f"demo-quick fold 0: {start}" in out
    meta = read_json(sidecar(work / "runs" / RECIPE / "fold0" / "best.pt"))
    assert meta["start"] == start and meta["mean"] == [0.485, 0.456, 0.406, 0.485]
    assert "is up to date" in train(*RESNET18, "--folds", "0")  # auto: the weights that it started from
    flags = ("04_train.py", "--work", work, "--recipe", RECIPE, *RESNET18, "--folds", "0")
    assert "(changed: weights); use --force" in fails(*flags, "--pretrained", "none")
    assert "no such file" in fails(*flags, "--pretrained", tmp_path / "other.pth")
    other = ("04_train.py", "--work", work, "--recipe", RECIPE, *TINY, "--pretrained", tmp_path / "mine.pth", "--force")
    assert "these are not weights of resnet10_narrow" in fails(*other)
    assert "is up to date" in train(*RESNET18, "--folds", "0")  # refused before --force discarded anything


def test_without_a_network_auto_says_where_the_file_goes_and_goes_on(train, work, monkeypatch, tmp_path):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    out = train(*RESNET18, "--weights-dir", tmp_path / "weights")
    assert out.count("the ImageNet weights could not be downloaded, so training starts from random weights") == 1
    assert str(tmp_path / "weights" / "resnet18-f37072fd.pth") in out and "https://download.pytorch.org" in out
    for fold in (0, 1):
        meta = read_json(sidecar(work / "runs" / RECIPE / f"fold{fold}" / "best.pt"))
        assert meta["start"] == (
            "from random weights (the published ones were not available), images normalised by the data"
        )
        log = (work / "runs" / RECIPE / f"fold{fold}" / "log.jsonl").read_text()
        assert json.loads(log)["start"] == meta["start"]


def test_parts_of_a_batch_and_bf16_train_too_and_tensorboard_has_all_folds(train, work):
    flags = (*TINY, "--micro-batch", "3", "--precision", "bf16", "--pretrained", "none")
    out = train(*flags, "--folds", "0") + train(*flags, "--tensorboard")
    assert out.count("epoch 1/1, loss") == 2 and out.count("is up to date") == 1
    assert len(pd.read_csv(work / "folds.csv")) == 12
    for fold in (0, 1):
        assert len(list((work / "runs" / RECIPE / f"fold{fold}" / "tensorboard").glob("events.out.tfevents.*"))) == 1


def test_torchrun_trains_a_fold_on_two_processes(work, run_script):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(ROOT / "04_train.py"),
        "--work",
        str(work),
        "--recipe",
        RECIPE,
        "--folds",
        "0",
        "--set",
        "cycle_epochs=1",
        "max_cycles=2",
        "buffers=16",
        "hard_warmup_epochs=1",
        "min_cycle_gain=0",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("epoch 2/2") == 1  # one process prints
    run = work / "runs" / RECIPE / "fold0"
    assert {"best.pt", "last.pt", "log.jsonl", "hard_samples.csv"} <= {path.name for path in run.iterdir()}
    rows = read_json(sidecar(run / "best.pt"))["rows"]
    assert pd.read_csv(run / "hard_samples.csv")["ranked"].sum() == rows  # of both processes
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "is up to date" in again.stdout
    assert (
        "6 oof samples" in run_script("05_predict_oof.py", "--work", work, "--recipes", RECIPE, "--folds", "0").stdout
    )


def test_a_network_of_timm_is_trained_predicted_and_shown(train, run_script, work):
    out = train("--folds", "0", "--pretrained", "none", "--set", *TINY[1:3], "encoder=timm/vit_tiny_patch16_224")
    assert "from random weights (as requested)" in out
    run_script("05_predict_oof.py", "--work", work, "--recipes", RECIPE, "--folds", "0", "--no-test")
    assert (work / "predictions" / RECIPE / "oof.npz").is_file()
    shown = run_script("08_report.py", "--work", work, "--sample", "train-0", "--recipe", RECIPE).stdout
    assert "sample_train-0.html" in shown


def test_encoders_are_listed(run_script):
    lines = run_script("04_train.py", "--list-encoders", "tf_efficientnet_lite0").stdout.splitlines()
    assert lines[0].split() == ["encoder", "parameters", "images", "published", "on", "this", "machine"]
    assert lines[1].split()[:4] == [
        "timm/tf_efficientnet_lite0",
        "3371296",
        "any",
        "tf_efficientnet_lite0-0aa007d2.pth",
    ]


def test_an_encoder_that_timm_does_not_have_is_told_before_anything_is_trained(run_script, work):
    told = run_script(
        "04_train.py", "--work", work, "--recipe", RECIPE, "--set", "encoder=timm/convnext_tini", check=False
    )
    assert told.returncode == 2 and not (work / "runs").exists()
    assert "has no network convnext_tini; did you mean timm/convnext_tiny or" in told.stderr
