"""Stages 02 to 07 by themselves on a small folder: what they refuse, what they skip, what depends on what."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile

from common.artifacts.files import read_json, write_json
from common.artifacts.predictions import load_predictions, save_predictions
from common.artifacts.stage import Record, Stage, sidecar
from common.data.exposure import WHOLE, judge
from common.demo.data import make_demo_data

RECIPE = "demo-quick"
TINY = ("--set", "cycle_epochs=1", "max_cycles=1", "buffers=16")


@pytest.fixture
def stages(run_script, tmp_path):
    """Return a function that runs stages by number on one work folder and returns their joint output."""

    def run(data, numbers, *more):
        places = ("--data", data, "--work", tmp_path / "work")
        names = {
            1: ("01_preprocess.py", "--recipes", RECIPE),
            2: ("02_dedup.py",),
            3: ("03_make_folds.py", "--n-folds", 2),
            4: ("04_train.py", "--recipe", RECIPE, *TINY),
            5: ("05_predict_oof.py", "--recipes", RECIPE),
            6: ("06_thresholds.py", "--recipes", RECIPE),
            7: ("07_ensemble.py", "--recipes", RECIPE),
        }
        return "".join(run_script(names[n][0], *places, *names[n][1:], *more).stdout for n in numbers)

    return run


def test_each_stage_names_the_one_that_is_missing_before_it(fails, stages, small_data, tmp_path):
    work = ("--work", tmp_path / "work")
    assert "samples.csv is missing; run: python 01_preprocess.py" in fails("02_dedup.py", *work)
    assert "duplicates.csv is missing; run: python 02_dedup.py" in fails("03_make_folds.py", *work)
    assert "samples.csv is missing; run: python 01_preprocess.py" in fails("04_train.py", *work)
    assert "folds.csv is missing; run: python 03_make_folds.py" in fails("05_predict_oof.py", *work)
    stages(small_data, [1, 2, 3])
    assert "has no finished training; run: python 04_train.py" in fails("05_predict_oof.py", *work, "--recipes", RECIPE)
    assert "oof.npz is missing; run: python 05_predict_oof.py" in fails("06_thresholds.py", *work, "--recipes", RECIPE)
    assert "thresholds.json is missing; run: python 06_thresholds.py" in fails(
        "07_ensemble.py", *work, "--recipes", RECIPE
    )


def test_the_whole_row(stages, fails, small_data, tmp_path):
    """Check all stages with one training, the slowest part of a stage test."""
    work = tmp_path / "work"
    stages(small_data, range(1, 5))

    # With one fold predicted, every later stage warns, with the commands for the other fold.
    assert "oof.npz is based on 1 of 2 folds (1)" in stages(small_data, [5], "--folds", "1")
    out = stages(small_data, [6, 7])
    told = (
        f"warning: {RECIPE} is based on 1 of 2 folds (1); for the others run: "
        f"python 04_train.py --work {work} --folds 0 --recipe {RECIPE} && "
        f"python 05_predict_oof.py --work {work} --folds 0 --recipes {RECIPE}\n"
    )
    assert out.count(told) == 2 and "6 out-of-fold samples" in out
    few = {"folds": {RECIPE: [1]}, "n_folds": 2}
    read = lambda name: {key: value for key, value in json.loads((work / name).read_text()).items() if key in few}
    assert read("thresholds.json") == read("thresholds.json.meta.json") == read("submission.csv.meta.json") == few

    # The other fold follows: both are combined.
    assert "oof.npz is based on all 2 folds (0, 1)" in stages(small_data, [5], "--folds", "0")
    out = stages(small_data, [6, 7])
    assert "macro F1" in out and "12 out-of-fold samples" in out and "submission.csv: 3 rows" in out
    assert out.count("each recipe is based on all 2 folds") == 2 and read("submission.csv.meta.json")["folds"] == {
        RECIPE: [0, 1]
    }

    # Out-of-fold: each kept sample once; test: in the order of sample_submission.csv.
    folds = pd.read_csv(work / "folds.csv", dtype=str)
    ids, probs = load_predictions(work / "predictions" / RECIPE / "oof.npz", "")
    assert sorted(ids) == sorted(folds["Id"]) and probs.dtype == np.float32
    for fold in "01":
        part, _ = load_predictions(work / "predictions" / RECIPE / f"fold{fold}_oof.npz", "")
        assert sorted(part) == sorted(folds["Id"][folds["fold"] == fold])
    parts = [load_predictions(work / "predictions" / RECIPE / f"fold{k}_test.npz", "")[1] for k in (0, 1)]
    np.testing.assert_allclose(
        load_predictions(work / "predictions" / RECIPE / "test.npz", "")[1], np.mean(parts, axis=0), atol=1e-7
    )
    submission = pd.read_csv(work / "submission.csv", dtype=str)
    assert list(submission.columns) == ["Id", "Predicted"] and list(submission["Id"]) == ["test-2", "test-0", "test-1"]
    found = json.loads((work / "thresholds.json").read_text())
    assert len(found["thresholds"]) == 28 and found["n_present"] == 3

    # A second run does nothing.
    assert stages(small_data, range(1, 8)).count("is up to date") == 3 + 2 + 6 + 2

    # One fold is trained again, elsewhere: the other fold's network and predictions stay, the rest is rebuilt.
    other = sidecar(work / "predictions" / RECIPE / "fold1_oof.npz").stat().st_mtime_ns
    stages(small_data, [4], "--folds", "0", "--force", "--seed", "5")
    record = read_json(sidecar(work / "samples.csv"))
    found = judge(["train"], [{"ranges": [[0, 4000]], "misplaced": {}}], WHOLE)
    write_json(sidecar(work / "samples.csv"), record | {"exposure": found})  # as stage 01 writes it
    out = stages(small_data, [5, 6, 7])
    assert out.count("warning: the 16-bit files use 0..4000 of 0..65535 only") == 2  # in 05 and in 07
    assert "fold0_oof.npz again (changed: network)" in out and "fold1_oof.npz is up to date" in out
    assert "thresholds.json again (changed: demo-quick)" in out and "submission.csv again" in out
    assert sidecar(work / "predictions" / RECIPE / "fold1_oof.npz").stat().st_mtime_ns == other

    # Training refuses other settings, other folds and missing folds.
    train = ("04_train.py", "--work", work, "--recipe", RECIPE)
    message = fails(*train, *TINY, "alpha=0.5", "--folds", "1")
    assert "alpha was 0.9, now 0.5" in message and "--force" in message
    assert "there is no fold 7; " in fails(*train, "--folds", "7")
    (work / "runs" / RECIPE / "fold1" / "last.pt").unlink()
    message = fails("05_predict_oof.py", "--work", work, "--recipes", RECIPE, "--checkpoint", "last")
    assert "fold1/last.pt no longer exists; predict with --checkpoint best, or run: python 04_train.py" in message
    before = (work / "runs" / RECIPE / "fold1" / "best.pt").read_bytes()
    stages(small_data, [3], "--seed", "3")
    assert "changed: folds.csv" in fails(*train, *TINY, "--folds", "1")
    message = fails("05_predict_oof.py", "--work", work, "--recipes", RECIPE)
    assert "was trained on something else (changed: folds.csv); run: python 04_train.py" in message
    assert (work / "runs" / RECIPE / "fold1" / "best.pt").read_bytes() == before


def test_sizes_by_source_go_through_all_stages(run_script, small_data, tmp_path):
    for channel in ("red", "green", "blue", "yellow"):
        for part, Id in (("train", "train-1"), ("test", "test-2")):
            path = small_data / f"{part}_full_size" / f"{Id}_{channel}.tif"
            tifffile.imwrite(path, np.kron(tifffile.imread(path), np.ones((13, 13), np.uint8)))  # 2080 px
    work, by_source = tmp_path / "work", (*TINY, "size_rule=by-source")
    places = ("--data", small_data, "--work", work)
    run_script("01_preprocess.py", *places, "--recipes", RECIPE, "--set", "size_rule=by-source")
    table = pd.read_csv(work / "images" / "by-source-8.csv").set_index("Id")
    assert table["side"].value_counts().to_dict() == {96: 13, 128: 2} and table.loc["train-1", "side"] == 128
    run_script("02_dedup.py", *places)
    run_script("03_make_folds.py", *places, "--n-folds", "2")
    run_script("04_train.py", *places, "--recipe", RECIPE, *by_source)
    run_script("05_predict_oof.py", *places, "--recipes", RECIPE)
    ids, probs = load_predictions(work / "predictions" / RECIPE / "test.npz", "")
    assert list(ids) == ["test-2", "test-0", "test-1"] and len(np.unique(probs, axis=0)) == 3


def test_a_held_out_part_is_predicted_by_all_folds_and_scored(stages, run_script, fails, small_data, tmp_path):
    work = tmp_path / "work"
    stages(small_data, [1, 2])
    out = run_script("03_make_folds.py", "--work", work, "--n-folds", "2", "--hold-out", "0.25").stdout
    assert "3 held out" in out and json.loads((work / "folds.audit.json").read_text())["copies_outside_training"] == 0
    assert pd.read_csv(work / "folds.audit.csv")["held_out"].sum() > 0
    stages(small_data, [4, 5])
    folds = pd.read_csv(work / "folds.csv", dtype={"Id": str})
    ids, _ = load_predictions(work / "predictions" / RECIPE / "held_out.npz", "")
    assert sorted(ids) == sorted(folds["Id"][folds["fold"] == -2])
    ids, _ = load_predictions(work / "predictions" / RECIPE / "oof.npz", "")
    assert sorted(ids) == sorted(folds["Id"][folds["fold"] >= 0])
    assert "on the 3 held-out samples, predicted by the mean of all folds" in stages(small_data, [6, 7])
    assert json.loads((work / "thresholds.json").read_text())["n_held_out"] == 3

    # Without a held-out part and with new networks, the old ones' predictions no longer count.
    stages(small_data, [3])
    stages(small_data, [4], "--force")
    stages(small_data, [5], "--no-test")
    assert "held-out samples" not in stages(small_data, [6])
    assert "n_held_out" not in json.loads((work / "thresholds.json").read_text())
    message = fails("07_ensemble.py", "--work", work, "--recipes", RECIPE)
    assert f"{RECIPE}/test.npz is of an earlier training of fold 0" in message and "05_predict_oof.py" in message
    stages(small_data, [5, 7])


def test_planted_duplicates_are_grouped_and_stay_together(stages, small_data, tmp_path):
    for channel in ("red", "green", "blue", "yellow"):
        source = small_data / "train_full_size" / f"train-0_{channel}.tif"
        for copy in (
            small_data / "train_full_size" / f"train-4_{channel}.tif",
            small_data / "test_full_size" / f"test-1_{channel}.tif",
        ):
            copy.write_bytes(source.read_bytes())
    out = stages(small_data, [1, 2])
    assert "1 groups of near-identical samples" in out and "2 pairs join test samples with other parts" in out
    assert "train-0  ~  test-1  0/0/0" in out
    assert (tmp_path / "work" / "duplicate_pairs.png").read_bytes().startswith(b"\x89PNG")
    duplicates = pd.read_csv(tmp_path / "work" / "duplicates.csv", dtype=str).set_index("Id")
    assert duplicates.loc["train-4", "group"] == duplicates.loc["train-0", "group"] == "train-0"
    assert (duplicates["kept"] == "1").all()  # classes are below the floor, so nothing is dropped
    stages(small_data, [2], "--floor", "0")
    duplicates = pd.read_csv(tmp_path / "work" / "duplicates.csv", dtype=str).set_index("Id")
    assert duplicates.loc["train-4", "kept"] == "0" and (duplicates["kept"] == "0").sum() == 1


def test_the_planted_duplicates_of_the_demo_data_are_found_and_no_others(stages, tmp_path):
    make_demo_data(tmp_path / "demo", n_train=60, n_test=10)
    stages(tmp_path / "demo", [1, 2])
    planted = pd.read_csv(tmp_path / "demo" / "planted_duplicates.csv", dtype=str)
    pairs = pd.read_csv(tmp_path / "work" / "duplicate_pairs.csv", dtype=str)
    assert len(planted) > 0
    assert {frozenset(pair) for pair in pairs[["Id", "other_Id"]].to_numpy()} == {
        frozenset(pair) for pair in planted[["Id", "duplicate_of"]].to_numpy()
    }


def test_black_channels_match_nothing(stages, small_data):
    for Id in ("train-0", "train-4"):
        for channel in ("red", "green", "blue", "yellow"):
            tifffile.imwrite(small_data / "train_full_size" / f"{Id}_{channel}.tif", np.zeros((160, 160), np.uint8))
    out = stages(small_data, [1, 2])
    assert "0 groups of near-identical samples" in out
    assert "2 samples have a black or constant channel and match nothing:\n  train-0\n  train-4" in out


def test_fewer_samples_than_folds(stages, fails, small_data, tmp_path):
    stages(small_data, [1, 2])
    message = fails("03_make_folds.py", "--work", tmp_path / "work", "--n-folds", "13")
    assert "12 distinct samples cannot make 13 folds" in message


def predicted(path, ids, probs):
    """Write predictions with their record, as stage 05 does."""
    save_predictions(path, ids, probs)
    Stage("05_predict_oof", path, {"folds": []}, {}).seal(Record(len(ids)))


def test_thresholds_are_for_the_recipes_they_were_found_on(stages, run_script, fails, small_data, tmp_path):
    work = tmp_path / "work"
    stages(small_data, [1, 2, 3])
    folds = pd.read_csv(work / "folds.csv", dtype=str)
    rng = np.random.default_rng(0)
    for recipe in ("a", "b"):
        predicted(work / "predictions" / recipe / "oof.npz", folds["Id"], rng.random((12, 28)))
        predicted(work / "predictions" / recipe / "test.npz", ["test-0", "test-1", "test-2"], rng.random((3, 28)))
    out = run_script("06_thresholds.py", "--work", work, "--recipes", "a,b").stdout
    assert "mean of a, b" in out
    assert "was made for a,b; run: python 06_thresholds.py" in fails("07_ensemble.py", "--work", work, "--recipes", "a")
    run_script("07_ensemble.py", "--work", work, "--recipes", "a,b")
    assert list(pd.read_csv(work / "submission.csv", dtype=str)["Id"]) == ["test-2", "test-0", "test-1"]


def test_test_samples_that_were_left_out_have_empty_rows_in_their_places(stages, run_script, small_data, tmp_path):
    work = tmp_path / "work"
    (small_data / "test_full_size" / "test-0_red.tif").unlink()
    run_script("01_preprocess.py", "--data", small_data, "--work", work, "--recipes", RECIPE, "--keep-going")
    stages(small_data, [2, 3])
    rng = np.random.default_rng(0)
    ids = pd.read_csv(work / "folds.csv", dtype=str)["Id"]
    predicted(work / "predictions" / RECIPE / "oof.npz", ids, rng.random((12, 28)))
    predicted(work / "predictions" / RECIPE / "test.npz", ["test-1", "test-2"], rng.random((2, 28)))
    assert "stage 01 left out 1 test samples, which have empty rows:\n  test-0" in stages(small_data, [6, 7])
    submission = pd.read_csv(work / "submission.csv", dtype=str, keep_default_na=False)
    assert list(submission["Id"]) == ["test-2", "test-0", "test-1"]
    assert [bool(text) for text in submission["Predicted"]] == [True, False, True]
    with open(small_data / "sample_submission.csv", "a") as file:
        file.write("test-9,0\n")  # without images, so only left_out.csv changes
    run_script("01_preprocess.py", "--data", small_data, "--work", work, "--recipes", RECIPE, "--keep-going")
    assert "submission.csv again (changed: left_out.csv)" in stages(small_data, [7])
    assert pd.read_csv(work / "submission.csv", dtype=str)["Id"].tolist()[-1] == "test-9"


def test_without_a_sample_submission_the_test_images_are_taken(stages, small_data, tmp_path):
    (small_data / "sample_submission.csv").unlink()
    told = f"{small_data}/sample_submission.csv is missing: using the 3 samples in the test folders, sorted by Id"
    assert told in stages(small_data, [1])
    samples = pd.read_csv(tmp_path / "work" / "samples.csv")
    assert list(samples.loc[samples["part"] == "test", "Id"]) == ["test-0", "test-1", "test-2"]


def test_data_without_test_samples_ends_without_a_submission(stages, run_script, small_data, tmp_path):
    shutil.rmtree(small_data / "test_full_size")
    (small_data / "sample_submission.csv").unlink()
    assert "sorted by Id" not in stages(small_data, [1])
    out = run_script("07_ensemble.py", "--work", tmp_path / "work").stdout
    assert "the data has no test samples, so there is no submission to make" in out
