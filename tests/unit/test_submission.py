import json

import numpy as np
import pandas as pd
import pytest

from common.errors import UserError
from common.score.submission import (
    check_out,
    check_submission,
    decide,
    describe_submission,
    frequency_table,
    known_labels,
    left_out_samples,
    override,
    read_submission,
    read_thresholds,
    recover,
    remember_submission,
    remembered_submissions,
    shortest_decimal,
    submission_table,
    with_empty_rows,
)
from tests.unit.test_ensemble import probs


def test_where_nothing_passes_the_most_probable_class_is_taken_or_none():
    values = probs(0.1, 0.1)
    values[0, 5], values[1, 6] = 0.9, 0.3
    thresholds = np.full(28, 0.5)
    assert submission_table(["a", "b"], decide(values, thresholds, "argmax"))["Predicted"].tolist() == ["5", "6"]
    assert submission_table(["a", "b"], decide(values, thresholds, "empty"))["Predicted"].tolist() == ["5", ""]


def test_a_probability_at_its_threshold_passes():
    assert decide(probs(0.5), np.full(28, 0.5), "empty").all()


ROW = {"class": "a", "positives": 1}
GOOD = {"recipes": ["a", "b"], "combine": "mean", "weights": [0.5, 0.5], "thresholds": [0.5] * 28}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], "is not what stage 06 writes"),
        (GOOD | {"thresholds": [50] * 28}, "expected 28 thresholds from 0 to 1"),
        (GOOD | {"thresholds": [float("nan")] * 28}, "28 thresholds"),
        (GOOD | {"thresholds": [0.5] * 27}, "28 thresholds"),
        (GOOD | {"thresholds": ["0.5"] * 28}, "28 thresholds"),
        (GOOD | {"combine": "sum"}, "combine to be one of mean, weighted, rank"),
        (GOOD | {"weights": [1]}, "one weight from 0 to 1 per network, with sum 1"),
        (GOOD | {"weights": [1, 1]}, "one weight"),
        (GOOD | {"thresholds": [*[0.5] * 27, 50]}, "28 thresholds"),
        (GOOD | {"thresholds": [*[0.5] * 27, "0.5"]}, "28 thresholds"),
        (GOOD | {"thresholds": [-0.1, *[0.5] * 27]}, "28 thresholds"),
        (GOOD | {"recipes": ["a", 3]}, "names of networks"),
        (GOOD | {"weights": [1.5, -0.5]}, "one weight"),
        (GOOD | {"weights": [1, "0"]}, "one weight"),
        (GOOD | {"weights": [0.5, 0.499]}, "one weight"),
        (GOOD | {"weights": [1], "recipes": ["a", "b"]}, "one weight"),
        (GOOD | {"interval": [0.1, 20], "score_cross_fitted": 0.5}, "interval"),
        (GOOD | {"interval": [0.1, 0.2], "score_cross_fitted": 50}, "interval"),
        (GOOD | {"interval": [0.1, 0.2, 0.3], "score_cross_fitted": 0.2}, "interval"),
        (GOOD | {"per_class": [*[ROW] * 27, {"class": "a"}], "n_samples": 3}, "of 28 classes"),
        (GOOD | {"per_class": [*[ROW] * 27, {"class": 3, "positives": 1}], "n_samples": 3}, "of 28 classes"),
        (GOOD | {"per_class": [*[ROW] * 27, {"class": "a", "positives": -1}], "n_samples": 3}, "28 classes"),
        (GOOD | {"per_class": [ROW] * 27, "n_samples": 3}, "of 28 classes"),
        (GOOD | {"recipes": "ab"}, "names of networks"),
        (GOOD | {"fallback": "none"}, "argmax or empty as fallback"),
        (GOOD | {"interval": [0.1, 0.2]}, "score_cross_fitted and its interval"),
        (GOOD | {"interval": 3, "score_cross_fitted": 0.5}, "interval"),
        (GOOD | {"per_class": [{"class": "a"}] * 28, "n_samples": 3}, "class and positives of 28 classes"),
        (GOOD | {"per_class": [ROW] * 28, "n_samples": 0}, "and n_samples"),
        (GOOD | {"per_class": [ROW] * 28, "n_samples": 1.5}, "and n_samples"),
        ({key: GOOD[key] for key in ("recipes", "thresholds")}, "has no combine, weights"),
        (GOOD, None),
        (
            GOOD
            | {
                "per_class": [{"class": "a", "positives": 0}] * 28,
                "n_samples": 1,
                "interval": [0, 1],
                "score_cross_fitted": 1,
                "fallback": "empty",
                "weights": [0.0, 1.0],
                "thresholds": [0, 1, *[0.5] * 26],
            },
            None,
        ),
    ],
)
def test_thresholds_that_cannot_be_are_refused(tmp_path, found, expected):
    (tmp_path / "t.json").write_text(json.dumps(found))
    if expected is None:
        assert read_thresholds(tmp_path / "t.json", ["a", "b"], "CURE") == found
        return
    with pytest.raises(UserError, match=f"{expected}.*; run: python 06_thresholds.py CURE"):
        read_thresholds(tmp_path / "t.json", None, "CURE")


@pytest.mark.parametrize(
    ("ids", "predicted", "message"),
    [
        (["a"], ["1"], "not those of sample_submission.csv; missing: 1, unexpected: 0, repeated: 0"),
        (["a", "a", "b", "x"], ["1"] * 4, "missing: 0, unexpected: 1, repeated: 1"),
        (["b", "a"], ["1", "1"], "not in the order of sample_submission.csv"),
        (
            ["a", "b"],
            ["1", "28"],
            "labels 0 to 27, each at most once per row, separated by single blanks; found:\n  b: '28'",
        ),
        (["a", "b"], ["1 x", ""], "a: '1 x'"),
        (["a", "b"], ["1 01", ""], "a: '1 01'"),
    ],
)
def test_a_wrong_submission_is_refused(ids, predicted, message):
    with pytest.raises(UserError, match=message):
        check_submission(pd.DataFrame({"Id": ids, "Predicted": predicted}), ["a", "b"])


@pytest.mark.parametrize("predicted", ["1  2", " 1", "1 ", "1\t2", "1\xa02", "1,2", "01", "0 00", "1;2", "1 2 1"])
def test_labels_are_separated_by_single_blanks_only(predicted):
    with pytest.raises(UserError, match="separated by single blanks; found:\n  a: "):
        check_submission(pd.DataFrame({"Id": ["a"], "Predicted": [predicted]}), ["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            ",Id,Predicted\n0,a,1\n",
            r"has 3 columns \('', 'Id', 'Predicted'\), expected exactly Id,Predicted; pandas adds .* index=False",
        ),
        ("Unnamed: 0,Id,Predicted\n0,a,1\n", "has 3 columns .* index=False"),
        ("Id,Predicted,note\na,1,x\n", "has 3 columns .*, 'note'"),
        ("Predicted,Id\n1,a\n", "expected exactly Id,Predicted$"),
        ("Id,Predicted \na,1\n", "'Predicted '"),
        ("id,predicted\na,1\n", "'id'"),
        ("Id\na\n", "has 1 columns"),
        ("Id,Predicted\na,1,\n", r"others below \(line 2 has 3\)"),
        ("Id,Predicted,\na,1,\n", "has 3 columns"),
        ("Id;Predicted\na;1\n", "has the separator ';'"),
        ("Id,Predicted\na,1\na,2\n", "more than once"),
        ("Id,Predicted\n", "has no rows"),
    ],
)
def test_a_submission_is_checked_as_strictly_as_by_kaggle(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(UserError, match=f"s.csv .*{message}"):
        read_submission(tmp_path / "s.csv")


@pytest.mark.parametrize(
    "text", ["Id,Predicted\na,1 2\nb,\n", 'Id,Predicted\r\n"a","1 2"\r\n"b",""\r\n', "\ufeffId,Predicted\na,1 2\nb,"]
)
def test_a_submission_may_have_quotes_and_any_ends_of_lines(tmp_path, text):
    (tmp_path / "s.csv").write_text(text, encoding="utf-8", newline="")
    submission = read_submission(tmp_path / "s.csv")
    check_submission(submission, ["a", "b"])
    assert submission["Predicted"].tolist() == ["1 2", ""]


def test_a_submission_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="s.csv is missing; expected a submission with the columns Id,Predicted"):
        read_submission(tmp_path / "s.csv")


def test_lost_samples_have_empty_rows_at_their_places():
    lost = pd.DataFrame({"Id": ["y", "x", "z"], "place": [2, 0, 4]})
    whole = with_empty_rows(pd.DataFrame({"Id": ["a", "b"], "Predicted": ["1", "2"]}), lost)
    assert whole.to_numpy().tolist() == [["x", ""], ["a", "1"], ["y", ""], ["b", "2"], ["z", ""]]


def test_test_samples_take_the_labels_of_their_nearest_labelled_twin():
    pairs = pd.DataFrame(
        [
            ("t1", "test", "a", "train", 2, 2, 2, "", "3"),
            ("b", "train", "t1", "test", 0, 1, 0, "4 5", ""),
            ("t2", "test", "t3", "test", 0, 0, 0, "", ""),
            ("a", "train", "b", "train", 0, 0, 0, "3", "4 5"),
        ],
        columns=["Id", "part", "other_Id", "other_part", "red", "green", "blue", "Target", "other_Target"],
    )
    ids = np.array(["t2", "t1"])
    known = known_labels(pairs, ids)
    assert known.to_numpy().tolist() == [["t1", "b", 1, "4 5"]]
    predicted = np.zeros((2, 28), dtype=bool)
    changed = override(predicted, ids, known)
    assert submission_table(ids, changed)["Predicted"].tolist() == ["", "4 5"] and not predicted.any()
    assert known_labels(pairs, ids[:1]).empty


def test_frequencies_beside_those_of_the_labels():
    predicted = np.zeros((10, 28), dtype=bool)
    predicted[:5, 1] = predicted[:2, 2] = True
    per_class = [{"class": f"class {c}", "positives": positives} for c, positives in enumerate([0, 5, 20] + [0] * 25)]
    lines = frequency_table(predicted, per_class, 100).splitlines()
    assert lines[1].split() == ["class", "1", "5", "50.00%", "5.00%", "10.00"]
    assert lines[0].split() == ["class", "predicted", "share", "labelled", "ratio"] and len(lines) == 29
    assert lines[2].split() == ["class", "0", "0", "0.00%", "0.00%", "1.00"]  # as often as expected
    assert lines[3].split() == ["class", "2", "2", "20.00%", "20.00%", "1.00"]
    predicted[:3, 7] = True  # a class that no labelled sample has
    predicted[:, 2] = False
    first, second = frequency_table(predicted, per_class, 100).splitlines()[1:3]
    assert first.split() == ["class", "2", "0", "0.00%", "20.00%", "0.00"]
    assert second.split() == ["class", "7", "3", "30.00%", "0.00%", "inf"]


def random_submission(fallback, seed=0, n=500):
    rng = np.random.default_rng(seed)
    values = rng.random((n, 28)).astype(np.float32) ** 4
    thresholds = rng.uniform(0.3, 0.95, 28)
    return values, thresholds, submission_table(np.arange(n).astype(str), decide(values, thresholds, fallback))


@pytest.mark.parametrize("fallback", ["argmax", "empty"])
def test_thresholds_of_a_submission_make_it_again(fallback):
    values, thresholds, frame = random_submission(fallback)
    found = recover(values, frame)
    assert found["fallback"] == fallback
    again = submission_table(frame["Id"], decide(values, np.array(found["thresholds"]), fallback))
    assert again.equals(frame)
    low, high = np.array(found["limits"]).T
    assert ((low < thresholds) & (thresholds <= high)).all()


def test_a_class_that_is_never_predicted_has_a_threshold_above_all_and_of_1_at_most():
    values, _, frame = random_submission("empty")
    values[:, 3], values[0, 3] = 0.25, 0.5
    frame["Predicted"] = [" ".join(label for label in text.split() if label != "3") for text in frame["Predicted"]]
    found = recover(values, frame)
    assert found["limits"][3] == [0.5, 1.0] and found["thresholds"][3] == 1.0


def test_a_submission_that_no_thresholds_make_is_refused():
    values, _, frame = random_submission("argmax")
    frame.loc[values[:, 5].argmax(), "Predicted"] = "7 9"
    with pytest.raises(UserError, match="(?s)no thresholds make this submission.*Nuclear bodies: [0-9]+ samples"):
        recover(values, frame)


def test_the_shortest_decimal_between_two_limits():
    assert (
        shortest_decimal(0.1478, 0.1503) == 0.15
        and shortest_decimal(0.2, 0.3) == 0.3
        and shortest_decimal(0.1, 1.0) == 1
    )
    assert shortest_decimal(0.5, 0.5) == 0.5
    assert (
        shortest_decimal(0.2, 0.35) == 0.3
        and shortest_decimal(0.3, 0.35) == 0.35
        and shortest_decimal(0.29, 0.3) == 0.3
    )
    assert shortest_decimal(0.1 - 1e-10, 0.1) == 0.1 and shortest_decimal(0.25 - 1e-12, 0.25 - 1e-13) == 0.25 - 1e-13


def test_thresholds_found_for_other_recipes_are_refused(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(GOOD))
    for recipes in (["a"], ["b", "a"]):
        with pytest.raises(UserError, match="t.json was made for a,b; run: python 06_thresholds.py CURE"):
            read_thresholds(tmp_path / "t.json", recipes, "CURE")
    with pytest.raises(UserError, match="none.json is missing; run: python 06_thresholds.py CURE"):
        read_thresholds(tmp_path / "none.json", None, "CURE")


def test_what_was_written_is_described_with_all_that_is_no_prediction(tmp_path):
    predicted = np.zeros((4, 28), dtype=bool)
    predicted[0, :3] = predicted[1, 0] = predicted[2, 0] = True
    thresholds = GOOD | {
        "interval": [0.1, 0.3],
        "score_cross_fitted": 0.2,
        "n_samples": 10,
        "per_class": [{"class": f"class {c}", "positives": 1} for c in range(28)],
    }
    known = pd.DataFrame({"Id": ["t1"], "other_Id": ["s1"], "bits": [1], "Target": ["4"]})
    lost = pd.DataFrame({"Id": ["t9"], "place": [0]})
    text = "\n".join(describe_submission(tmp_path / "s.csv", predicted, thresholds, ["a", "b"], known, lost))
    assert "s.csv: 5 rows, 1.25 labels per row, 3 classes; mean of a, b" in text and "0.200 [0.100, 0.300]" in text
    assert "class 0" in text and "t1  <-  s1  4" in text and "stage 01 left out 1 test samples" in text and "t9" in text
    plain = describe_submission(tmp_path / "s.csv", predicted, GOOD, ["a", "b"], None, [])
    assert len(plain) == 1 and "4 rows" in plain[0] and "[" not in plain[0]


def test_samples_that_stage_01_left_out_are_the_test_ones_of_its_list(tmp_path):
    assert left_out_samples(tmp_path / "none.csv").empty
    table = pd.DataFrame({"Id": ["a", "b"], "part": ["train", "test"], "place": [3, 1], "reason": "cut"})
    table.to_csv(tmp_path / "l.csv", index=False)
    assert left_out_samples(tmp_path / "l.csv").astype(str).to_numpy().tolist() == [["b", "1"]]


def test_a_submission_is_not_written_over_what_it_is_made_from(tmp_path):
    (tmp_path / "a.npz").touch()
    check_out(tmp_path / "out.csv", [tmp_path / "a.npz"])
    with pytest.raises(UserError, match="is one of the inputs; give another file"):
        check_out(tmp_path / "x" / ".." / "a.npz", [tmp_path / "b.npz", tmp_path / "a.npz"])
    with pytest.raises(UserError, match="is a folder; give another file"):
        check_out(tmp_path, [])


def test_the_published_submissions_of_three_networks_come_out_cell_by_cell(real_data):
    order = pd.read_csv(real_data / "labels" / "sample_submission.csv", dtype=str)["Id"]
    for name in ("inceptionv3_650", "inceptionv4_800", "xception_512"):
        values = np.load(real_data / "predictions" / f"{name}.npy", allow_pickle=False)
        frame = pd.read_csv(real_data / "predictions" / f"{name}_submission.csv", dtype=str, keep_default_na=False)
        assert frame["Id"].equals(order)
        found = recover(values, frame)
        again = submission_table(order, decide(values, np.array(found["thresholds"]), found["fallback"]))
        assert again.equals(frame)


def test_submissions_elsewhere_are_remembered_once_the_last_one_last(tmp_path):
    for name in ("a.csv", "b.csv", "a.csv"):
        remember_submission(tmp_path, tmp_path / "x" / ".." / name)
    remember_submission(tmp_path, tmp_path / "submission.csv")  # the page finds this one anyway
    remember_submission(tmp_path / "absent", tmp_path / "c.csv")  # like a folder that cannot be written to
    assert remembered_submissions(tmp_path) == [str(tmp_path / "b.csv"), str(tmp_path / "a.csv")]
    (tmp_path / "submissions.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="submissions.json is not a list of paths; delete it"):
        remembered_submissions(tmp_path)
