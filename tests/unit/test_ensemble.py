import numpy as np
import pytest

from common.errors import UserError
from common.score.ensemble import (
    align,
    combine,
    describe_classes,
    describe_ensemble,
    evaluate_ensemble,
    find_weights,
    keep_common,
    mean_predictions,
    stack_members,
)
from common.score.metrics import macro_f1
from common.score.thresholds import evaluate_thresholds, find_thresholds
from tests.unit.test_thresholds import simulated


def probs(*rows):
    return np.array([[value] * 28 for value in rows], dtype=np.float32)


def test_the_mean_is_taken_by_id():
    ids, mean = mean_predictions(
        [(np.array(["a", "b"]), probs(0.2, 0.4)), (np.array(["b", "a"]), probs(0.8, 0.6))], ["x", "y"]
    )
    assert ids.tolist() == ["a", "b"]
    np.testing.assert_allclose(mean[:, 0], [0.4, 0.6])
    double = stack_members([(ids, probs(0.2, 0.4).astype(np.float64))] * 2, ["x", "y"])
    assert double.shape == (2, 2, 28) and double.dtype == mean.dtype == np.float32


def test_missing_and_further_ids_are_named():
    with pytest.raises(UserError, match="y.npz: 1 missing Ids:\n  b"):
        align(np.array(["a"]), probs(1), np.array(["a", "b"]), "y.npz")
    with pytest.raises(UserError, match="y.npz: 1 unexpected Ids:\n  c"):
        align(np.array(["a", "c"]), probs(1, 1), np.array(["a"]), "y.npz")
    ids = np.array([f"s{i}" for i in range(9)])
    with pytest.raises(UserError, match="8 unexpected Ids; CURE:\n  s1\n  s2\n  s3\n  s4"):
        align(ids[::-1], probs(*range(9)), ids[:1], "y.npz", "; CURE")
    with pytest.raises(UserError, match="8 missing Ids; CURE:\n  s1\n  s2\n  s3\n  s4"):
        align(ids[:1], probs(1), ids, "y.npz", "; CURE")


def test_ranks_count_the_order_only_and_ties_alike():
    stack = np.zeros((2, 4, 28), dtype=np.float32)
    stack[0, :, 0], stack[1, :, 0] = [0.1, 0.2, 0.9, 0.3], [0.01, 0.02, 0.02, 0.5]
    # ranks 1 2 4 3 and 1 2.5 2.5 4, less a half, of 4
    np.testing.assert_allclose(combine(stack, "rank")[:, 0], [0.125, 0.4375, 0.6875, 0.75])
    np.testing.assert_allclose(combine(stack**3, "rank"), combine(stack, "rank"))


def test_a_weighted_mean_by_hand():
    stack = np.stack([probs(0.2), probs(0.6)])
    assert combine(stack, "weighted", [0.25, 0.75])[0, 0] == np.float32(0.5)


def test_weights_are_on_the_simplex_and_a_member_of_noise_gets_little():
    targets, good = simulated(400)
    noise = np.random.default_rng(1).random(good.shape).astype(np.float32)
    weights = find_weights(targets, np.stack([good, noise, good]))
    assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
    assert weights[1] < 0.1 and weights[0] == pytest.approx(weights[2])


def test_weights_equal_a_slow_search():
    targets, first = simulated(300)
    _, second = simulated(300, seed=1)
    first, second = 0.6 * first + 0.2, (first + second) / 2
    grid = np.linspace(0, 1, 201)
    cells = np.where(targets, np.stack([first, second]), 1 - np.stack([first, second]))
    likelihood = [(np.log(w * cells[0] + (1 - w) * cells[1]) / targets.sum(axis=0)).sum() for w in grid]
    assert find_weights(targets, np.stack([first, second]))[0] == pytest.approx(grid[np.argmax(likelihood)], abs=0.01)


def test_the_table_names_members_and_what_each_adds():
    targets, good = simulated(200)
    noise = np.random.default_rng(1).random(good.shape).astype(np.float32)
    result = evaluate_ensemble(targets, np.stack([good, noise]), ["good", "noise"], np.arange(200), "greedy", "mean")
    mixed = (good + noise) / 2
    good, noise = result["members"]
    assert result["combine"] == "mean" and result["weights"] == [0.5, 0.5] == [good["weight"], noise["weight"]]
    assert (good["name"], noise["name"]) == ("good", "noise")
    assert (
        good["score_cross_fitted"] > noise["score_cross_fitted"] and noise["leave_one_out"] > 0 > good["leave_one_out"]
    )
    assert noise["score_cross_fitted"] - result["score_cross_fitted"] == pytest.approx(good["leave_one_out"])
    combined = {row["combine"]: row["score_cross_fitted"] for row in result["combinations"]}
    assert combined["mean"] == pytest.approx(result["score_cross_fitted"]) and combined["weighted"] > combined["mean"]
    methods = {row["method"]: row for row in result["methods"]}
    assert methods.keys() == {"half", "single", "greedy", "exact", "ratio", "calibrated"}
    assert methods["greedy"]["score_cross_fitted"] == pytest.approx(result["score_cross_fitted"])
    assert methods["half"]["score_cross_fitted"] == pytest.approx(methods["half"]["score_in_sample"])
    for name, row in methods.items():  # thresholds of `exact` lie on probabilities
        assert row["score_in_sample"] == pytest.approx(
            macro_f1(targets, mixed >= find_thresholds(targets, mixed, name))
        )
    text = "\n".join(describe_ensemble({"recipes": ["good", "noise"], **result}))
    assert (
        text.count("<- used") == 2
        and "rest on fewer than 10 positives: Nucleoplasm (" in text
        and "held out" not in text
    )
    held_out = {"score_held_out": 0.456, "interval_held_out": [0.4, 0.5], "n_held_out": 9}
    text = "\n".join(describe_ensemble({"recipes": ["good", "noise"], **result, **held_out}))
    assert "9 held-out samples" in text and "0.456 [0.400, 0.500]" in text


def test_only_common_ids_are_kept_where_that_is_asked_for(capsys):
    members = [(np.array(["a", "b", "c"]), probs(0.1, 0.2, 0.3)), (np.array(["d", "c", "b"]), probs(0.6, 0.5, 0.4))]
    kept, wanted = keep_common(members, np.array(["c", "x", "b"]))
    assert wanted.tolist() == ["c", "b"]
    assert "2 Ids are in all files; 1 of the labelled Ids are left out" in capsys.readouterr().out
    np.testing.assert_allclose(stack_members(kept, ["x", "y"], wanted)[:, :, 0], [[0.3, 0.2], [0.5, 0.4]])
    with pytest.raises(UserError, match="no Ids in common"):
        keep_common(members, np.array(["x"]))


def test_weights_that_are_found_make_the_thresholds_too():
    targets, good = simulated(60)
    noise = np.random.default_rng(1).random(good.shape).astype(np.float32)
    stack = np.stack([good, noise])
    result = evaluate_ensemble(targets, stack, ["good", "noise"], np.arange(60), "half", "weighted")
    weights = find_weights(targets, stack)
    assert result["combine"] == "weighted" and result["weights"] == pytest.approx(weights)
    assert result["score_in_sample"] == pytest.approx(macro_f1(targets, combine(stack, "weighted", weights) >= 0.5))
    scores = {row["combine"]: row["score_cross_fitted"] for row in result["combinations"]}
    assert scores["weighted"] == result["score_cross_fitted"]


def test_one_member_is_the_whole():
    targets, good = simulated(40)
    result = evaluate_ensemble(targets, good[None], ["good"], np.arange(40), "half", "mean")
    assert result["members"] == [
        {"name": "good", "weight": 1.0, "leave_one_out": None, "score_cross_fitted": result["score_cross_fitted"]}
    ]
    assert (
        result["combinations"] == []
        and result.items() >= evaluate_thresholds(targets, good, np.arange(40), "half").items()
    )
    text = "\n".join(describe_ensemble({"recipes": ["good"], **result}))
    assert "without it" not in text and text.count("<- used") == 1


def test_weights_do_not_depend_on_classes_without_samples_and_many_samples_are_thinned_out(monkeypatch):
    targets, first = simulated(120)
    stack = np.stack([first, simulated(120, seed=1)[1] * 0.5 + first * 0.5])
    targets[:, 5] = False
    present = targets.any(axis=0)
    assert find_weights(targets, stack) == pytest.approx(
        find_weights(targets[:, present], stack[:, :, present]), abs=1e-4
    )
    assert find_weights(targets & False, stack) == pytest.approx([0.5, 0.5])  # nothing speaks for or against them
    monkeypatch.setattr("common.score.ensemble.N_WEIGHED", 60)
    assert find_weights(targets, stack) == pytest.approx(find_weights(targets[::2], stack[:, ::2]), abs=1e-6)


def test_classes_are_described_with_those_not_to_be_trusted():
    row = {"threshold": 0.25, "f1_cross_fitted": 0.5, "f1_in_sample": 0.75, "interval": [0.125, 0.875]}
    result = {
        "per_class": [{"class": name, "positives": n, **row} for name, n in (("a", 10), ("b", 9), ("c", 1), ("d", 0))],
        "n_present": 3,
        "score_cross_fitted_present": 0.5,
    }
    lines = describe_classes(result)
    assert lines[1].split() == ["a", "0.500", "0.750", "[0.125,", "0.875]", "0.250", "10"]
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "c"]
    assert "2 classes rest on fewer than 10 positives: b (9), c (1)" in lines[4]
    assert "over the 3 classes present: 0.500" in lines[5] and "1 classes have no samples and count as 0: d" in lines[5]
    assert len(describe_classes({"per_class": result["per_class"][:1]})) == 2
