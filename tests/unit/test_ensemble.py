import numpy as np
import pandas as pd
import pytest

from common.ensemble import align, check_submission, decide, mean_predictions, submission_table, with_empty_rows
from common.errors import UserError


def probs(*rows):
    return np.array([[value] * 28 for value in rows], dtype=np.float32)


def test_the_mean_is_taken_by_id():
    ids, mean = mean_predictions([(np.array(["a", "b"]), probs(0.2, 0.4)), (np.array(["b", "a"]), probs(0.8, 0.6))], ["x", "y"])
    assert ids.tolist() == ["a", "b"]
    np.testing.assert_allclose(mean[:, 0], [0.4, 0.6])


def test_missing_and_further_ids_are_named():
    with pytest.raises(UserError, match="y.npz lacks 1 Ids:\n  b"):
        align(np.array(["a"]), probs(1), np.array(["a", "b"]), "y.npz")
    with pytest.raises(UserError, match="y.npz has unexpected 1 Ids:\n  c"):
        align(np.array(["a", "c"]), probs(1, 1), np.array(["a"]), "y.npz")


def test_where_nothing_passes_the_most_probable_class_is_taken_or_none():
    values = probs(0.1, 0.1)
    values[0, 5], values[1, 6] = 0.9, 0.3
    thresholds = np.full(28, 0.5)
    assert submission_table(["a", "b"], decide(values, thresholds, "argmax"))["Predicted"].tolist() == ["5", "6"]
    assert submission_table(["a", "b"], decide(values, thresholds, "empty"))["Predicted"].tolist() == ["5", ""]


def test_a_probability_at_its_threshold_passes():
    assert decide(probs(0.5), np.full(28, 0.5), "empty").all()


@pytest.mark.parametrize(("ids", "predicted", "message"), [
    (["a"], ["1"], "not those of sample_submission.csv"),
    (["b", "a"], ["1", "1"], "in its order"),
    (["a", "b"], ["1", "28"], "labels other than 0 to 27: 28"),
])
def test_a_wrong_submission_is_refused(ids, predicted, message):
    with pytest.raises(UserError, match=message):
        check_submission(pd.DataFrame({"Id": ids, "Predicted": predicted}), ["a", "b"])


def test_lost_samples_have_empty_rows_at_their_places():
    lost = pd.DataFrame({"Id": ["y", "x", "z"], "place": [2, 0, 4]})
    whole = with_empty_rows(pd.DataFrame({"Id": ["a", "b"], "Predicted": ["1", "2"]}), lost)
    assert whole.to_numpy().tolist() == [["x", ""], ["a", "1"], ["y", ""], ["b", "2"], ["z", ""]]
