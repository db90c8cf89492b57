"""Several runs in one work folder: names, files of runs, sizes, the listing, the comparison."""

import pandas as pd
import pytest

from common.artifacts.files import read_json
from common.artifacts.layout import Layout

TINY = ("cycle_epochs=1", "max_cycles=1", "buffers=16")


@pytest.fixture
def layout(run_script, small_data, tmp_path) -> Layout:
    """A work folder up to stage 03, with images of two sizes, and a file with a run."""
    (tmp_path / "my.toml").write_text(
        '[sharp]\nbase = "demo-quick"\nhard_share = 0.5\ncycle_epochs = 1\nmax_cycles = 1'
    )
    places = ("--data", small_data, "--work", tmp_path / "work")
    file = ("--recipes-file", tmp_path / "my.toml")
    run_script("01_preprocess.py", *places, *file, "--recipes", "demo-quick,sharp,demo@512-quick")
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", 2)
    return Layout(tmp_path / "work", small_data)


def test_runs_of_one_work_folder(run_script, fails, layout):
    places = layout.flags()
    run_script("04_train.py", *places, "--recipe", "demo-quick", "--set", *TINY)
    train = ("04_train.py", *places, "--recipe", "demo-quick", "--set", *TINY)
    assert "(alpha was 0.9, now 0.5); use --force" in fails(*train, "alpha=0.5")
    assert "--name NAME to keep both" in fails(*train, "alpha=0.5")
    run_script(*train, "alpha=0.5", "--name", "half")
    run_script("04_train.py", *places, "--recipe", "sharp,demo@512-quick,half", "--folds", "0")
    assert sorted(path.name for path in layout.runs.iterdir()) == ["demo-quick", "demo@512-quick", "half", "sharp"]
    assert (
        read_json(layout.network("demo@512-quick", 0).with_name("best.pt.meta.json"))["parameters"]["crop_size"] == 384
    )

    listing = run_script("04_train.py", *places, "--list-runs").stdout
    row = next(line for line in listing.splitlines() if line.split()[:1] == ["half"])
    assert "0,1" in row and "alpha=0.5" in row and ("bfloat16" in row or "float32" in row)

    # The name stands wherever a recipe's does, also in the commands that messages name.
    run_script("05_predict_oof.py", *places, "--recipes", "demo-quick,half")
    message = fails("05_predict_oof.py", *places, "--recipes", "sharp")
    assert "04_train.py" in message and "--recipe sharp --folds 1" in message
    run_script("06_thresholds.py", *places, "--recipes", "demo-quick,half")
    run_script("07_ensemble.py", *places, "--recipes", "demo-quick,half")
    assert len(pd.read_csv(layout.submission)) > 0

    out = run_script("06_thresholds.py", *places, "--compare", "demo-quick,half", "--method", "half").stdout
    assert "demo-quick - half: " in out and "folds 0,1" in out
    again = run_script("06_thresholds.py", *places, "--compare", "demo-quick,half", "--method", "half").stdout
    assert again in out
    assert [run["name"] for run in read_json(layout.comparison)["runs"]] == ["demo-quick", "half"]
    run_script("08_report.py", *places)
    assert 'id="comparison"' in layout.report.read_text()
