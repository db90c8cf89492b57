"""Stage 09 by itself, on synthetic predictions."""

import pandas as pd

from common.score import paper_tables
from tests.unit.test_tables import make_work


def test_the_script_writes_every_form_and_shows_them_again(run_script, fails, tmp_path):
    work = tmp_path / "work"
    assert "folds.csv is missing; run: python 03_make_folds.py" in fails("09_tables.py", "--work", work)
    make_work(work)
    flags = ("09_tables.py", "--work", work, "--recipes", "resnet50,gapnet_pl")
    out = run_script(*flags).stdout
    text = (work / "tables" / "tables.md").read_text()
    assert text in out and out.count("## Table") == 3
    assert {path.name for path in (work / "tables").glob("*.csv")} == {
        "table1.csv",
        "table2.csv",
        "table3.csv",
        "tables.csv",
        "gains.csv",
    }
    tidy = pd.read_csv(work / "tables" / "tables.csv")
    assert list(tidy.columns) == paper_tables.SCORE_FIELDS and len(tidy) == 5 * (7 + 4)
    assert list(pd.read_csv(work / "tables" / "gains.csv").columns) == paper_tables.GAIN_FIELDS
    again = run_script(*flags).stdout
    assert "is up to date" in again and text in again

    # A run is missing: refused with the command that makes it; with --partial its column is blank.
    (work / "predictions" / "resnet50-hard" / "fold1_oof.npz").unlink()
    message = fails(*flags)
    assert "run: bash run_all.sh --tables --recipes resnet50 --data data" in message and "--partial" in message
    assert "With hard sampler of resnet50: resnet50-hard has no predictions of fold 1\n" in message
    assert "gapnet" not in message
    out = run_script(*flags, "--partial").stdout
    assert "Missing: With hard sampler of resnet50: resnet50-hard has no predictions of fold 1." in out
    assert pd.read_csv(work / "tables" / "table1.csv")["hard"].isna().all()
    out = run_script(*flags, "--folds", "0,2").stdout  # these folds are complete
    assert "(fold 1)" not in out and "Missing" not in out
    assert "there is no fold 7" in fails(*flags, "--folds", "7")
