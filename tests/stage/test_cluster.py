"""Stages 01, 02, 04, 05 and 10 on a dask cluster of two workers, one of which is killed."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from distributed import LocalCluster

from common.artifacts.predictions import load_predictions
from tests.conftest import ROOT

RECIPE = "demo-quick"
TINY = ("--set", "cycle_epochs=6", "max_cycles=1", "buffers=16", "finder=off")


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as local:
        yield local


def test_a_cluster_does_the_jobs_and_a_killed_worker_loses_nothing(run_script, small_data, tmp_path, cluster):
    def stages(work, *cluster_flags):
        places = ("--data", small_data, "--work", work)
        run_script("01_preprocess.py", *places, "--recipes", RECIPE, *cluster_flags)
        run_script("02_dedup.py", *places, *cluster_flags)
        run_script("03_make_folds.py", *places, "--n-folds", "2")
        return [
            (name, *flags, *places, *cluster_flags)
            for name, flags in (
                ("04_train.py", ("--recipe", RECIPE, *TINY)),
                ("05_predict_oof.py", ("--recipes", RECIPE)),
            )
        ]

    for command in stages(tmp_path / "here"):
        run_script(*command)
    train, predict = stages(tmp_path / "there", "--cluster", cluster.scheduler_address)
    process = subprocess.Popen([sys.executable, str(ROOT / train[0]), *map(str, train[1:])], cwd=tmp_path)
    checkpoint = tmp_path / "there" / "runs" / RECIPE / "fold0" / "last.pt"
    while not checkpoint.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(next(iter(cluster.workers.values())).pid, signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    run_script(*predict)
    for name in ("oof.npz", "test.npz"):
        ids, probs = load_predictions(tmp_path / "there" / "predictions" / RECIPE / name, "")
        expected_ids, expected = load_predictions(tmp_path / "here" / "predictions" / RECIPE / name, "")
        assert list(ids) == list(expected_ids)
        np.testing.assert_array_equal(probs, expected)

    images = ("--images", small_data / "test_full_size", "--model", tmp_path / "here", "--batch-size", "1")
    run_script("10_predict.py", *images, "--out", tmp_path / "one")
    run_script("10_predict.py", *images, "--out", tmp_path / "two", "--cluster", cluster.scheduler_address)
    one, two = (load_predictions(tmp_path / name / "predictions.npz", None)[1] for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one, expected[[expected_ids.tolist().index(f"test-{k}") for k in range(3)]], atol=1e-6)


def test_a_cluster_that_does_not_answer_is_one_message(fails, small_data, tmp_path, monkeypatch):
    message = fails(
        "01_preprocess.py",
        "--data",
        small_data,
        "--work",
        tmp_path,
        "--recipes",
        RECIPE,
        "--cluster",
        "tcp://127.0.0.1:9",
    )
    assert "no dask scheduler answers at tcp://127.0.0.1:9" in message and "dask scheduler" in message
