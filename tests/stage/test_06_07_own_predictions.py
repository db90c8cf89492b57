"""Stages 06 and 07 on predictions from elsewhere: no earlier stage has run."""

import json

import numpy as np
import pandas as pd
import pytest

from common.artifacts.predictions import save_predictions
from common.artifacts.tables import read_table
from common.data.labels import format_targets
from common.report.build import stage_table
from common.report.reader import Work
from common.report.results import errors, predictions, scores, submission
from tests.unit.test_thresholds import simulated


@pytest.fixture
def own(tmp_path):
    """A folder with out-of-fold and test predictions of two networks, labels and a sample submission."""
    targets, probs = simulated(150)
    ids, test_ids = np.array([f"s{i}" for i in range(150)]), np.array([f"t{i}" for i in range(40)])
    labels = pd.DataFrame({"Id": ids, "Target": [text or "0" for text in format_targets(targets)]})
    labels.to_csv(tmp_path / "train.csv", index=False)
    pd.DataFrame({"Id": test_ids, "Predicted": "0"}).to_csv(tmp_path / "sample_submission.csv", index=False)
    order = np.random.default_rng(0).permutation(150)
    save_predictions(tmp_path / "a.npz", ids[order], probs[order])
    pd.DataFrame(np.sqrt(probs)).assign(Id=ids).to_csv(tmp_path / "b.csv", index=False)
    test = simulated(40, seed=5)[1]
    save_predictions(tmp_path / "a_test.npz", test_ids[::-1], test[::-1])
    np.save(tmp_path / "b_test.npy", np.sqrt(test))
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def test_from_files_to_a_submission(own, run_script):
    find = (
        "06_thresholds.py",
        "--oof",
        own / "a.npz",
        own / "b.csv",
        "--labels",
        own / "train.csv",
        "--work",
        own / "w",
    )
    decide = (
        "07_ensemble.py",
        "--test",
        own / "a_test.npz",
        own / "b_test.npy",
        "--ids",
        own / "sample_submission.csv",
        "--thresholds",
        own / "w" / "thresholds.json",
        "--sample",
        own / "sample_submission.csv",
        "--out",
        own / "out.csv",
    )
    out = run_script(*find).stdout
    assert (
        "cross-fitted, 150 out-of-fold samples, mean of" in out
        and "rest on fewer than 10 positives: Nucleoplasm (" in out
    )
    found = read(own / "w" / "thresholds.json")
    assert found["method"] == "calibrated" and len(found["thresholds"]) == 28 and len(found["members"]) == 2
    assert found["per_class"][27].keys() == {
        "class",
        "threshold",
        "positives",
        "f1_cross_fitted",
        "interval",
        "f1_in_sample",
    }
    out = run_script(*decide).stdout
    assert "40 rows" in out and "labelled" in out and "WARNING" not in out
    submission = pd.read_csv(own / "out.csv", dtype=str, keep_default_na=False)
    test = np.load(own / "b_test.npy")
    expected = (test + test**2) / 2 >= np.array(found["thresholds"])
    rows = expected.any(axis=1)
    assert rows.any() and submission["Predicted"][rows].tolist() == format_targets(expected[rows])
    assert "is up to date" in run_script(*find).stdout and "is up to date" in run_script(*decide).stdout
    check_the_page(own)

    run_script(*find, "--combine", "weighted", "--method", "ratio", "--prior", own / "train.csv")
    found = read(own / "w" / "thresholds.json")
    assert found["combine"] == "weighted" and sum(found["weights"]) == pytest.approx(1) and found["method"] == "ratio"
    assert "weighted of" in run_script(*decide, "--fallback", "empty").stdout
    assert (
        "is a valid submission of 40 rows"
        in run_script("07_ensemble.py", "--check", own / "out.csv", *decide[-4:-2]).stdout
    )

    run_script("06_thresholds.py", "--oof", own / "a_test.npz", "--reproduce", own / "out.csv", "--work", own / "r")
    assert len(read(own / "r" / "thresholds.json")["limits"]) == 28
    assert "the thresholds have no scores, since --reproduce took them" in scores(Work(own / "r")).note
    assert "these predictions have no labels, since --reproduce" in predictions(Work(own / "r")).note


def check_the_page(own):
    """Check that the page shows these files and knows that all was made from them."""
    states = stage_table(Work(own / "w")).set_index("stage")[["main file", "state"]]
    assert states.loc["06 thresholds"].to_list() == ["thresholds.json", "complete"]
    assert (
        states.loc["07 ensemble"].to_list() == [str(own / "out.csv"), "complete"] and "05 predict" not in states.index
    )
    blocks = predictions(Work(own / "w")).blocks
    assert (
        blocks[0].items["mean of"] == "a.npz, b.csv" and "If a network was trained on these samples" in blocks[1].text
    )
    assert [row["name"] for row in read(own / "w" / "thresholds.json")["members"]] == ["a.npz", "b.csv"]
    (known,) = [block.items for block in scores(Work(own / "w")).blocks if block.kind == "facts"]
    assert known["samples"] == "150" and errors(Work(own / "w")).blocks[0].items["missed labels"]
    assert submission(Work(own / "w")).blocks[0].items["file"] == str(own / "out.csv")
    before = (own / "a.npz").read_bytes()
    (own / "a.npz").write_bytes(before + b" ")
    assert stage_table(Work(own / "w"))["state"].to_list()[3] == "from an older a.npz: run its stage again"
    (own / "a.npz").write_bytes(before)


def test_groups_of_other_predictions_stay_together(own, run_script):
    ids = pd.read_csv(own / "train.csv", dtype=str)["Id"]
    pd.DataFrame({"Id": ids, "group": ids.index // 3}).to_csv(own / "groups.csv", index=False)
    find = (
        "06_thresholds.py",
        "--oof",
        own / "a.npz",
        "--labels",
        own / "train.csv",
        "--work",
        own / "w",
        "--method",
        "greedy",
    )
    scores = []
    for more in ((), ("--groups", own / "groups.csv")):
        run_script(*find, *more)
        scores.append(read(own / "w" / "thresholds.json")["score_cross_fitted"])
    assert scores[0] != scores[1]


def test_what_does_not_fit_together_is_one_clear_error(own, fails, run_script):
    labels = pd.read_csv(own / "train.csv", dtype=str)
    find = ("06_thresholds.py", "--work", own / "w", "--oof", own / "a.npz", "--labels")
    labels.iloc[1:].to_csv(own / "fewer.csv", index=False)
    assert "a.npz: 1 unexpected Ids (--common-ids leaves them out):\n  s0" in fails(*find, own / "fewer.csv")
    pd.concat([labels, pd.DataFrame({"Id": ["s150"], "Target": ["3"]})]).to_csv(own / "more.csv", index=False)
    assert "a.npz: 1 missing Ids (--common-ids leaves them out):\n  s150" in fails(*find, own / "more.csv")
    out = run_script(*find, own / "more.csv", "--common-ids").stdout
    assert "150 Ids are in all files; 1 of the labelled Ids are left out" in out
    assert "none.csv is missing" in fails(*find, own / "none.csv")

    decide = (
        "07_ensemble.py",
        "--thresholds",
        own / "w" / "thresholds.json",
        "--sample",
        own / "sample_submission.csv",
        "--out",
        own / "out.csv",
        "--test",
    )
    message = fails(*decide, own / "a_test.npz", own / "b_test.npy", "--ids", own / "sample_submission.csv")
    assert "is for 1 members" in message and "found 2" in message
    assert "40 missing Ids" in fails(*decide, own / "a.npz")
    assert "the one predictions file" in fails("06_thresholds.py", "--reproduce", own / "out.csv", "--work", own / "w")
    pd.DataFrame({"Id": ["t0"], "Predicted": ["30"]}).to_csv(own / "bad.csv", index=False)
    assert "missing: 39" in fails(
        "07_ensemble.py", "--check", own / "bad.csv", "--sample", own / "sample_submission.csv"
    )


def test_test_samples_take_known_labels_only_when_asked_and_loudly(own, run_script, fails):
    run_script("06_thresholds.py", "--oof", own / "a.npz", "--labels", own / "train.csv", "--work", own / "w")
    decide = (
        "07_ensemble.py",
        "--test",
        own / "a_test.npz",
        "--work",
        own / "w",
        "--sample",
        own / "sample_submission.csv",
    )
    assert "duplicate_pairs.csv is missing; run: python 02_dedup.py" in fails(*decide, "--override-duplicates")
    pd.DataFrame(
        [("s3", "train", "t7", "test", 0, 1, 2, "11 13", "", "")],
        columns=["Id", "part", "other_Id", "other_part", "red", "green", "blue", "Target", "other_Target", "agreement"],
    ).to_csv(own / "w" / "duplicate_pairs.csv", index=False)
    assert "WARNING" not in run_script(*decide).stdout
    before = read_table(own / "w" / "submission.csv", "")
    out = run_script(*decide, "--override-duplicates").stdout
    assert "WARNING: --override-duplicates: 1 rows are NOT predictions" in out and "t7  <-  s3  11 13" in out
    after = read_table(own / "w" / "submission.csv", "")
    assert after["Predicted"][7] == "11 13" and after["Predicted"].drop(7).equals(before["Predicted"].drop(7))


def test_a_submission_does_not_take_the_place_of_its_inputs(own, run_script, fails):
    run_script("06_thresholds.py", "--oof", own / "a.npz", "--labels", own / "train.csv", "--work", own / "w")
    found = own / "w" / "thresholds.json"
    decide = (
        "07_ensemble.py",
        "--test",
        own / "a_test.npz",
        "--thresholds",
        found,
        "--sample",
        own / "sample_submission.csv",
        "--out",
    )
    for path in (own / "a_test.npz", found, own / "w" / ".." / "sample_submission.csv"):
        before = path.read_bytes()
        assert f"--out {path} is one of the inputs; give another file" in fails(*decide, path)
        assert path.read_bytes() == before
    assert f"--out {own} is a folder" in fails(*decide, own)
