import numpy as np
import pytest
from sklearn.metrics import f1_score

from common.classes import CLASS_NAMES
from common.data.folds import stratified_group_folds
from common.errors import UserError
from common.score.thresholds import (
    GRID,
    METHODS,
    cross_fit,
    evaluate_thresholds,
    exact_thresholds,
    f1_curves,
    find_thresholds,
    greedy_thresholds,
    ratio_thresholds,
    repeated_folds,
    score_held_out,
    single_threshold,
)


def simulated(n=300, classes=28, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.random((n, classes)) < np.linspace(0.02, 0.4, classes)
    probs = 1 / (1 + np.exp(-(rng.normal(size=targets.shape) + 2 * targets - 1.5)))
    return targets, probs.astype(np.float32)


def macro(targets, predicted):
    return f1_score(targets, predicted, average="macro", zero_division=0)


def test_the_grid_is_the_papers():
    assert GRID.tolist() == [
        0.1,
        0.15,
        0.2,
        0.25,
        0.3,
        0.35,
        0.4,
        0.45,
        0.5,
        0.55,
        0.6,
        0.65,
        0.7,
        0.75,
        0.8,
        0.85,
        0.9,
    ]


def test_curves_equal_scikit_learn_also_on_the_thresholds_themselves():
    targets, probs = simulated(100)
    probs[:30] = np.round(probs[:30] * 20) / 20
    probs = probs.astype(float)  # NumPy 1 would round each threshold to 32 bits
    curves = f1_curves(targets, probs)
    for k, threshold in enumerate(GRID):
        np.testing.assert_allclose(curves[:, k], f1_score(targets, probs >= threshold, average=None, zero_division=0))


def test_single_and_greedy_equal_a_slow_search():
    targets, probs = simulated()
    scores = [macro(targets, probs >= t) for t in GRID]
    single = GRID[int(np.argmax(scores))]
    assert single_threshold(targets, probs) == single
    slow = np.full(28, single)
    best = max(scores)
    for c in range(28):
        for t in GRID:
            trial = slow.copy()
            trial[c] = t
            score = macro(targets, probs >= trial)
            if score > best + 1e-12:
                best, slow = score, trial
    np.testing.assert_array_equal(greedy_thresholds(targets, probs), slow)


def test_a_class_without_positives_keeps_the_single_threshold():
    targets, probs = simulated()
    targets[:, 3] = False
    assert greedy_thresholds(targets, probs)[3] == single_threshold(targets, probs)


def test_exact_equals_a_slow_search_of_every_distinct_probability():
    targets, probs = simulated(40)
    probs = np.round(probs, 2).astype(float)  # NumPy 1 would round each threshold to 32 bits
    targets[:, 3] = False
    found = exact_thresholds(targets, probs)
    assert found[3] == single_threshold(targets, probs)
    for c in range(28):
        candidates = np.append(np.unique(probs[:, c]), single_threshold(targets, probs))
        scores = [f1_score(targets[:, c], probs[:, c] >= t, zero_division=0) for t in candidates]
        assert f1_score(targets[:, c], probs[:, c] >= found[c], zero_division=0) == max(scores)
        assert not scores[-1] < max(scores) or found[c] == candidates[int(np.argmax(scores))]


def test_ratio_predicts_as_many_as_are_to_be_expected():
    targets, probs = simulated()
    np.testing.assert_array_equal((probs >= ratio_thresholds(targets, probs)).sum(axis=0), targets.sum(axis=0))
    prior = np.linspace(0, 1, 28)
    found = (probs >= ratio_thresholds(targets, probs, prior)).sum(axis=0)
    np.testing.assert_array_equal(found, np.round(prior * 300))
    four = np.array([[0.2], [0.4], [0.8], [0.1]]).repeat(28, axis=1)
    np.testing.assert_allclose(ratio_thresholds(targets[:4], four, np.full(28, 0.5)), 0.3)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_28_thresholds_whatever_the_data(method):
    targets, probs = simulated(60)
    for some in (targets, targets & False, targets | True):
        for values in (probs, probs * 0, probs * 0 + 1, np.round(probs)):
            found = find_thresholds(some, values.astype(np.float32), method)
            assert found.shape == (28,) and np.isfinite(found).all()


def test_weights_are_found_on_the_other_rows_too():
    targets, probs = simulated(100)
    seen = []

    def weigh(some, members):
        seen.append((len(some), members.shape))
        return np.array([1.0, 0.0])

    found = cross_fit(targets, np.stack([probs, probs * 0]), np.arange(100), "greedy", repeats=1, weigh=weigh)
    assert len(seen) == 5 and all(shape == (2, n, 28) and n < 100 for n, shape in seen)
    np.testing.assert_array_equal(
        found[0], cross_fit(targets, probs.astype(np.float64), np.arange(100), "greedy", repeats=1)[0]
    )


def test_cross_fitting_draws_its_folds_from_seed_0():
    rng = np.random.default_rng(3)
    probs = rng.random((80, 28))
    targets, groups = rng.random((80, 28)) < probs, np.arange(80)
    found, again, other = (
        cross_fit(targets, probs, groups, "greedy", folds=folds)
        for folds in (None, repeated_folds(targets, groups), repeated_folds(targets, groups, seed=1))
    )
    np.testing.assert_array_equal(found, again)
    assert not np.array_equal(found, other)


def test_cross_fitted_rows_do_not_see_their_own_labels():
    targets, probs = simulated(120)
    groups = np.arange(120) // 2
    predicted = cross_fit(targets, probs, groups, "greedy", n_folds=4, repeats=1)[0]
    changed = targets.copy()
    changed[:2] = ~changed[:2]  # one group's labels
    thresholds = [find_thresholds(t[2:], probs[2:], "greedy") for t in (targets, changed)]
    np.testing.assert_array_equal(*thresholds)
    assert predicted.shape == (120, 28)


def test_the_report_has_the_contracts_fields_and_no_flattery_on_noise():
    rng = np.random.default_rng(0)
    targets, probs = rng.random((400, 28)) < 0.1, rng.random((400, 28))
    result = evaluate_thresholds(targets, probs, np.arange(400), "greedy")
    assert result.keys() >= {
        "method",
        "thresholds",
        "single",
        "score_cross_fitted",
        "interval",
        "score_in_sample",
        "per_class",
    }
    assert len(result["thresholds"]) == len(result["per_class"]) == 28
    assert result["score_in_sample"] > result["score_cross_fitted"]
    low, high = result["interval"]
    assert low < result["score_cross_fitted"] < high


def test_the_reports_figures_are_those_of_its_parts():
    targets, probs = simulated(80)
    probs[:40] = np.round(probs[:40], 1)  # some of them at 0.5
    groups = np.arange(80) // 2
    result = evaluate_thresholds(targets, probs, groups, "exact")
    thresholds, unseen = exact_thresholds(targets, probs), cross_fit(targets, probs, groups, "exact")
    assert len(unseen) == 3
    assert (result["method"], result["n_samples"], result["n_present"]) == ("exact", 80, int(targets.any(axis=0).sum()))
    assert result["thresholds"] == thresholds.tolist() and result["single"] == single_threshold(targets, probs)
    assert result["score_cross_fitted"] == pytest.approx(np.mean([macro(targets, predicted) for predicted in unseen]))
    assert result["score_in_sample"] == pytest.approx(macro(targets, probs >= thresholds))
    assert result["score_at_half"] == pytest.approx(macro(targets, probs >= 0.5))
    row, c = result["per_class"][20], 20
    assert row.keys() == {"class", "threshold", "positives", "f1_cross_fitted", "interval", "f1_in_sample"}
    assert (row["class"], row["threshold"], row["positives"]) == (CLASS_NAMES[c], thresholds[c], targets[:, c].sum())
    assert row["f1_cross_fitted"] == pytest.approx(np.mean([f1_score(targets[:, c], p[:, c]) for p in unseen]))
    assert row["f1_in_sample"] == pytest.approx(f1_score(targets[:, c], probs[:, c] >= thresholds[c]))
    low, high = row["interval"]
    assert 0 <= low < row["f1_cross_fitted"] < high <= 1


def test_repeats_are_three_of_five_folds_or_of_as_many_as_there_are_groups():
    targets, _ = simulated(40)
    folds = repeated_folds(targets, np.arange(40))
    assert [sorted(set(fold)) for fold in folds] == [[0, 1, 2, 3, 4]] * 3
    for repeat, fold in enumerate(folds):
        np.testing.assert_array_equal(fold, stratified_group_folds(targets, np.arange(40), 5, seed=repeat))
    assert [sorted(set(fold)) for fold in repeated_folds(targets, np.arange(40) % 2, repeats=1)] == [[0, 1]]
    with pytest.raises(
        UserError, match="40 samples in 1 groups leave none to test thresholds on; give at least 2 groups"
    ):
        repeated_folds(targets, np.zeros(40))


def test_held_out_samples_are_scored_with_the_thresholds_as_they_are():
    targets, probs = simulated(60)
    thresholds = probs[0].tolist()  # one sample lies on each of them
    result = score_held_out(targets, probs, np.arange(60), thresholds)
    assert result.keys() == {"score_held_out", "interval_held_out", "n_held_out"} and result["n_held_out"] == 60
    assert result["score_held_out"] == pytest.approx(macro(targets, probs >= np.array(thresholds, dtype=np.float32)))
    low, high = result["interval_held_out"]
    assert low < result["score_held_out"] < high


def test_equal_scores_keep_the_lower_threshold_and_the_single_one():
    targets, probs = np.zeros((6, 2), dtype=bool), np.zeros((6, 2))
    targets[:3, 0], probs[:3, 0], probs[3:, 0] = True, 0.62, 0.38  # every threshold from .4 to .6 is right
    targets[:3, 1], probs[:3, 1], probs[3:, 1] = True, 0.82, 0.48  # from .5 to .8
    assert single_threshold(targets, probs) == 0.5
    assert greedy_thresholds(targets, probs).tolist() == [0.5, 0.5]  # .4 would be as good for the first class
    assert exact_thresholds(targets, probs).tolist() == [0.5, 0.5]
    assert ratio_thresholds(targets, probs).tolist() == pytest.approx([0.5, 0.65])


def test_the_methods_have_their_names():
    assert list(METHODS) == ["half", "single", "greedy", "exact", "ratio", "calibrated"]
    targets, probs = simulated(60)
    assert find_thresholds(targets, probs, "half").tolist() == [0.5] * 28
    assert find_thresholds(targets, probs, "single").tolist() == [single_threshold(targets, probs)] * 28
    for name, search in (("greedy", greedy_thresholds), ("exact", exact_thresholds), ("ratio", ratio_thresholds)):
        np.testing.assert_array_equal(find_thresholds(targets, probs, name), search(targets, probs))


def test_absent_classes_count_as_zero_and_are_left_out_of_the_second_score():
    targets, probs = simulated()
    targets[:, :14] = False
    result = evaluate_thresholds(targets, probs, np.arange(300), "greedy")
    assert result["n_present"] == 14
    assert result["score_cross_fitted"] == pytest.approx(result["score_cross_fitted_present"] / 2)


def test_on_real_predictions_greedy_flatters_itself_and_calibration_is_better_on_unseen_rows(real_data):
    import pandas as pd

    from common.data.labels import parse_targets

    labels = pd.read_csv(real_data / "predictions" / "labels.csv", dtype=str)
    order = pd.read_csv(real_data / "labels" / "sample_submission.csv", dtype=str)["Id"]
    rows = pd.Series(range(len(order)), index=order)[labels["Id"]]
    for name in ("inceptionv3_650", "inceptionv4_800", "xception_512"):
        probs = np.load(real_data / "predictions" / f"{name}.npy", allow_pickle=False)[rows]
        targets, ids = parse_targets(labels["Target"]), labels["Id"].to_numpy()
        greedy = evaluate_thresholds(targets, probs, ids, "greedy")
        assert 0.7 < greedy["score_cross_fitted"] < greedy["score_in_sample"] < 0.95
        calibrated = evaluate_thresholds(targets, probs, ids, "calibrated")
        assert calibrated["score_cross_fitted"] > greedy["score_cross_fitted"]
