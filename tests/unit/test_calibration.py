import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import norm

from common.score.calibration import (
    CENTRES,
    EDGES,
    LIMIT,
    calibrated_thresholds,
    expected_f1_curves,
    fit_calibration,
    local_offsets,
    log_posterior,
    logit_counts,
    newton_step,
)
from common.score.metrics import class_f1
from common.score.thresholds import exact_thresholds, greedy_thresholds


def calibrated_world(n, seed=0, share=0.1):
    """Return targets and calibrated probabilities: each label is drawn with its probability."""
    rng = np.random.default_rng(seed)
    probs = expit(rng.normal(logit(share), 2, size=(n, 28))).astype(np.float32)
    return rng.random(probs.shape) < probs, probs


def test_counts_equal_a_plain_histogram():
    targets, probs = calibrated_world(500)
    probs[0, 0], probs[1, 0] = 0, 1
    positives, everything = logit_counts(targets, probs)
    assert (everything.sum(axis=1) == 500).all() and (positives.sum(axis=1) == targets.sum(axis=0)).all()
    assert everything[0, 0] == everything[0, -1] == 1
    middle = np.abs(CENTRES) < 8
    for c in range(1, 28):
        width = CENTRES[1] - CENTRES[0]
        edges = np.append(CENTRES[middle] - width / 2, CENTRES[middle][-1] + width / 2)
        expected = np.histogram(logit(probs[:, c].astype(np.float64)), edges)[0]
        np.testing.assert_array_equal(everything[c, middle], expected)


def test_probabilities_that_are_right_stay_as_they_are():
    coefs, mean = fit_calibration(*logit_counts(*calibrated_world(5000)))
    np.testing.assert_allclose(mean, [0, 1, 1], atol=0.1)
    np.testing.assert_allclose(coefs, np.tile([0, 1, 1], (28, 1)), atol=0.35)


def test_a_distortion_is_undone_also_where_classes_have_few_positives():
    """All classes have the same distortion, so a class with few positives takes it from the others."""
    targets, probs = calibrated_world(2000)
    targets[200:, :4], probs[200:, :4] = False, 0.0001  # about 20 positives
    distorted = (probs.astype(np.float64) ** 2).astype(np.float32)
    positives, everything = logit_counts(targets, distorted)
    coefs, _ = fit_calibration(positives, everything)
    for p in (0.2, 0.5, 0.8):
        found = expit(coefs @ [1, np.log(p**2), -np.log(1 - p**2)])
        np.testing.assert_allclose(found, p, atol=0.15)


def test_the_expected_curve_by_hand():
    everything, q = np.array([[2.0, 0.0, 1.0]]), np.array([[0.25, 0.5, 0.5]])
    # The upper bin: .5 right of 1 predicted, 1 expected positive: 2 * .5 / (1 + 1). All: 2 * 1 / (3 + 1).
    np.testing.assert_allclose(expected_f1_curves(everything, q), [[0.5, 0.5, 0.5]])


def test_the_threshold_is_half_the_best_f1_where_probabilities_are_right():
    targets, probs = calibrated_world(20_000)
    best = class_f1(targets, probs >= exact_thresholds(targets, probs))
    np.testing.assert_allclose(calibrated_thresholds(targets, probs), best / 2, atol=0.04)


@pytest.mark.parametrize(
    "distort", [lambda p: p, lambda p: p**3, np.sqrt, lambda p: 0.1 + 0.6 * p, lambda p: expit(logit(p) / 3)]
)
def test_it_is_better_than_greedy_on_unseen_rows_whatever_the_scale(distort):
    def scaled(probs):
        return distort(np.clip(probs.astype(np.float64), 1e-6, 1 - 1e-6)).astype(np.float32)

    unseen, values = calibrated_world(20_000, seed=1)
    gains = []
    for seed in range(3):
        targets, probs = calibrated_world(300, seed=10 + seed)
        ours, greedy = (
            class_f1(unseen, scaled(values) >= find(targets, scaled(probs))).mean()
            for find in (calibrated_thresholds, greedy_thresholds)
        )
        gains.append(ours - greedy)
    assert np.mean(gains) > 0.005


def test_a_class_without_positives_takes_what_the_others_have():
    targets, probs = calibrated_world(1000)
    targets[:, 3] = False
    found = calibrated_thresholds(targets, probs)
    assert found[3] == pytest.approx(found.mean(), abs=0.05)


def test_without_samples_the_calibration_is_the_identity():
    nothing = np.zeros((28, len(CENTRES)))
    coefs, mean = fit_calibration(nothing, nothing)
    np.testing.assert_allclose(mean, [0, 1, 1], atol=1e-9)
    np.testing.assert_allclose(coefs, np.tile([0, 1, 1], (28, 1)), atol=1e-9)


def test_a_class_whose_probabilities_mean_their_opposite_is_predicted_throughout():
    targets, probs = calibrated_world(2000, share=0.5)
    targets[:, 3] = ~targets[:, 3]  # the lower the probability, the likelier the label
    assert calibrated_thresholds(targets, probs)[3] <= probs[:, 3].min()


def small_fit(seed=0):
    """Return counts of two classes, the second with few samples, and a prior."""
    rng = np.random.default_rng(seed)
    everything = rng.integers(0, 3, (2, len(CENTRES))).astype(float)
    everything[1, 50:] = 0
    positives = np.floor(everything * rng.random(everything.shape) + 0.5)
    return (
        positives,
        everything,
        np.array([0.1, 0.9, 1.2]),
        np.array([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 3.0]]),
    )


def slow_log_posterior(coefs, positives, everything, mean, precision):
    p = expit(CENTRES)
    q = expit(coefs[0] + coefs[1] * np.log(p) - coefs[2] * np.log1p(-p))
    likelihood = sum(
        k * np.log(x) + (n - k) * np.log1p(-x) for k, n, x in zip(positives, everything, q, strict=True) if n
    )
    return likelihood - (coefs - mean) @ precision @ (coefs - mean) / 2


def test_the_log_posterior_equals_a_plain_sum():
    positives, everything, mean, precision = small_fit()
    coefs = np.array([[0.2, 0.3, 0.4], [-0.1, 1.0, 0.5]])
    expected = [slow_log_posterior(*row, mean, precision) for row in zip(coefs, positives, everything, strict=True)]
    np.testing.assert_allclose(log_posterior(coefs, positives, everything, mean, precision), expected, rtol=1e-9)


def test_newtons_steps_climb_to_the_maximum_and_give_its_curvature():
    positives, everything, mean, precision = small_fit()
    coefs, values = np.array([[8.0, -5.0, 9.0], [0.0, 1.0, 1.0]]), []  # a full step from the first overshoots
    for _ in range(60):
        coefs, covariances = newton_step(coefs, positives, everything, mean, precision)
        values.append(log_posterior(coefs, positives, everything, mean, precision))
    assert (np.diff(values, axis=0) >= -1e-9).all()
    for c in range(2):
        found = minimize(
            lambda x, c=c: -slow_log_posterior(x, positives[c], everything[c], mean, precision), mean, tol=1e-12
        )
        np.testing.assert_allclose(coefs[c], found.x, atol=1e-3)
        p = expit(CENTRES)
        features = np.stack([np.ones(len(p)), np.log(p), -np.log1p(-p)])
        q = expit(coefs[c] @ features)
        curvature = (features * (everything[c] * q * (1 - q))) @ features.T + precision
        np.testing.assert_allclose(np.linalg.inv(covariances[c]), curvature, rtol=1e-4)


def test_the_prior_is_that_of_all_classes():
    """A class without samples gets the others' calibration, not the identity."""
    targets, probs = calibrated_world(2000)
    positives, everything = logit_counts(targets, (probs.astype(np.float64) ** 2).astype(np.float32))
    positives[0] = everything[0] = 0
    coefs, mean = fit_calibration(positives, everything)
    np.testing.assert_allclose(coefs[0], mean, atol=1e-3)
    np.testing.assert_allclose(mean, coefs[1:].mean(axis=0), atol=0.02)
    assert abs(mean[1] - 0.5) < 0.15


def test_thresholds_without_any_positive_are_there_and_a_sharp_class_is_cut_in_its_gap():
    targets, probs = np.zeros((400, 28), dtype=bool), np.full((400, 28), 0.01, dtype=np.float32)
    assert np.isfinite(calibrated_thresholds(targets, probs)).all()
    targets[:100], probs[:100] = True, 0.9
    found = calibrated_thresholds(targets, probs)
    assert ((found > 0.01) & (found <= 0.9)).all()


def plain_threshold(positives, everything, q, best=None):
    """Try every bin: find the highest expected F1, its highest bin, and the last bin below not worth predicting."""
    curve = [2 * (everything * q)[k:].sum() / (everything[k:].sum() + (everything * q).sum()) for k in range(len(q))]
    last = len(q) - 1
    if best is None:
        best = max(curve)
        last = max(k for k in range(len(q)) if everything[k] and curve[k] > best - 1e-12)
    upper = [*EDGES[1:], LIMIT]
    return expit(max((upper[k] for k in range(last + 1) if q[k] < best / 2), default=EDGES[0])), best


def plain_offsets(logits, positives, everything):
    """Return a class's offsets, bin by bin: one Newton step from 0, at most 3."""
    q, offsets = expit(logits), []
    for centre in CENTRES:
        weights = norm.pdf(CENTRES, centre) / norm.pdf(0)
        gradient = (weights * (positives - everything * q)).sum()
        curvature = (weights * everything * q * (1 - q)).sum() + 5
        offsets.append(min(3, max(-3, gradient / curvature)))
    return np.array(offsets)


def test_where_many_labels_disagree_with_the_form_the_thresholds_follow_the_labels():
    """Half of the samples with p near 0.1 have the class, which no beta calibration can express."""
    for n, offset in ((0, False), (4000, True)):
        everything, positives = np.zeros((2, 1, len(CENTRES)))
        here = np.abs(CENTRES - logit(0.1)) < 0.5
        everything[0, here] = n / here.sum()
        positives[0, here] = everything[0, here] / 2
        found = local_offsets(CENTRES[None].copy(), positives, everything)[0]
        assert np.abs(found).max() <= 3
        assert (found[here] > 1.5).all() == offset and (found != 0).any() == offset
        assert np.abs(found[np.abs(CENTRES - logit(0.1)) > 8]).max() < 1e-6  # nothing is known there


def test_offsets_of_few_samples_stay_small():
    everything, positives = np.zeros((2, 1, len(CENTRES)))
    middle = len(CENTRES) // 2
    everything[0, middle] = positives[0, middle] = 1
    found = local_offsets(np.zeros((1, len(CENTRES))), positives, everything)[0]
    assert found[middle] == pytest.approx(0.5 / (0.25 + 5))


def mixed_world(falling):
    """Return 28 classes: probabilities of the classes `falling` mean the opposite; 1 and 2 have no positives."""
    targets, probs = calibrated_world(1500, share=0.4)
    targets[:, falling] = ~targets[:, falling]
    targets[:, 1:3] = False
    return targets, probs


@pytest.mark.parametrize("falling", [[], [5, 6], slice(None)], ids=["none", "two", "all"])
def test_thresholds_are_those_of_a_plain_search(falling):
    targets, probs = mixed_world(falling)
    positives, everything = logit_counts(targets, probs)
    coefs, mean = fit_calibration(positives, everything)
    features = np.stack([np.ones(len(CENTRES)), -np.logaddexp(0, -CENTRES), np.logaddexp(0, CENTRES)])
    there = [c for c in range(28) if c not in (1, 2)]
    expected, best = {}, {}
    for c in there:
        logits = coefs[c] @ features
        q = expit(logits + plain_offsets(logits, positives[c], everything[c]))
        expected[c], best[c] = plain_threshold(positives[c], everything[c], q)
    q, share = expit(mean @ features), np.mean(list(best.values()))
    expected[1] = expected[2] = plain_threshold(positives[1], everything[1], q, share)[0]
    found = calibrated_thresholds(targets, probs)
    np.testing.assert_allclose(logit(found), [logit(expected[c]) for c in range(28)], atol=1e-6)


def test_a_class_without_positives_is_never_predicted_where_even_the_last_bin_is_not_worth_it():
    found = calibrated_thresholds(*mixed_world(slice(None)))
    assert logit(found[1]) == pytest.approx(LIMIT, abs=1e-6)
