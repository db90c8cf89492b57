"""Loader processes of folds that train in parallel."""

import multiprocessing

import numpy as np
import pytest

from common.data.images import write_planes
from common.process.parallel import run_parallel
from common.train.dataset import ImageSet, loader

RECIPE = "demo-quick"


def test_folds_at_once_have_loader_processes_and_the_same_results(run_script, small_data, tmp_path):
    work, results = tmp_path / "work", []
    places = ("--data", small_data, "--work", work)
    for script, *flags in (
        ("01_preprocess.py", "--recipes", RECIPE),
        ("02_dedup.py",),
        ("03_make_folds.py", "--n-folds", 2),
    ):
        run_script(script, *places, *flags)
    for at_once in ((), ("--jobs", 2, "--workers", 1)):
        out = run_script(
            "04_train.py",
            *places,
            "--recipe",
            RECIPE,
            "--set",
            "cycle_epochs=1",
            "max_cycles=1",
            "buffers=16",
            "--force",
            *at_once,
        ).stdout
        out += run_script("05_predict_oof.py", *places, "--recipes", RECIPE, *at_once).stdout
        assert out.count("2 jobs at once, each on CPU") == out.count("1 loader process,") == (2 if at_once else 0)
        results.append(
            [(work / name).read_bytes() for name in (f"runs/{RECIPE}/fold1/best.pt", f"predictions/{RECIPE}/oof.npz")]
        )
    assert results[0] == results[1]


def load(folder, method):
    """Load two batches in a loader process, in a process with another default start method."""
    multiprocessing.set_start_method(method, force=True)
    images = ImageSet(folder, np.array(["a", "b"]), np.eye(2, 28, dtype=bool))
    return [batch.numpy().copy() for batch, _ in loader(images, 1, False, [[0], [1]])]


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_worker_process_starts_loader_processes_whatever_the_default(tmp_path, method):
    for number, Id in enumerate("ab"):
        write_planes(tmp_path / f"{Id}.tif", np.full((4, 32, 32), number, np.uint8))
    for _, batches in run_parallel(load, [(tmp_path, method)] * 2, 2, "loading"):
        assert [batch.mean() for batch in batches] == [0, 1]
