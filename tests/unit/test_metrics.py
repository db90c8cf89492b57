import numpy as np
import pytest
from sklearn.metrics import f1_score

from common.score.metrics import (
    bootstrap_f1,
    bootstrap_macro_f1,
    class_f1,
    class_intervals,
    f1_from_counts,
    macro_f1,
    macro_interval,
)

RNG = np.random.default_rng(0)
TARGETS, PREDICTED = RNG.random((2, 200, 28)) < 0.2


def test_f1_by_hand():
    # 3 right, 1 false, 2 missed: P = 3/4, R = 3/5, F1 = 2 P R / (P + R) = 2/3
    assert f1_from_counts(np.array(3), np.array(1), np.array(2)) == 2 / 3


def test_macro_f1_equals_scikit_learn():
    TARGETS[:, 5] = PREDICTED[:, 5] = False
    expected = f1_score(TARGETS, PREDICTED, average=None, zero_division=0)
    np.testing.assert_allclose(class_f1(TARGETS, PREDICTED), expected)
    np.testing.assert_allclose(macro_f1(TARGETS, PREDICTED), expected.mean())
    assert class_f1(TARGETS, PREDICTED)[5] == 0


def test_the_draws_equal_a_slow_bootstrap():
    rng = np.random.default_rng(3)
    draws = bootstrap_f1(TARGETS, [PREDICTED], n_draws=60, seed=3)
    for draw in draws:
        rows = rng.integers(200, size=200)
        expected = f1_score(TARGETS[rows], PREDICTED[rows], average=None, zero_division=0)
        missed = TARGETS.any(axis=0) & ~TARGETS[rows].any(axis=0)
        np.testing.assert_allclose(draw, np.where(missed, np.nan, expected), atol=1e-6)


@pytest.mark.parametrize("n_draws", [1, 50, 51, 120])
def test_there_are_as_many_draws_as_are_asked_for(n_draws):
    assert bootstrap_f1(TARGETS, [PREDICTED], n_draws=n_draws).shape == (n_draws, 28)
    assert len(bootstrap_f1(TARGETS[:9, :2], [PREDICTED[:9, :2]])) == 1000


def test_groups_are_drawn_whole():
    twice = np.repeat(np.arange(200), 2)
    alone, doubled = bootstrap_f1(TARGETS, [PREDICTED]), bootstrap_f1(TARGETS[twice], [PREDICTED[twice]], groups=twice)
    np.testing.assert_allclose(alone, doubled, atol=1e-6)
    assert bootstrap_f1(TARGETS[twice], [PREDICTED[twice]]).std() < alone.std()  # the same rows treated as independent


def test_the_draws_of_equal_repeats_are_those_of_one():
    one, two = (bootstrap_f1(TARGETS, [PREDICTED] * n, n_draws=50) for n in (1, 2))
    np.testing.assert_allclose(one, two)


def test_rows_beyond_the_blocks_are_thrown_together(monkeypatch):
    expected = bootstrap_f1(TARGETS, [PREDICTED])
    monkeypatch.setattr("common.score.metrics.N_BLOCKS", 100)
    found = bootstrap_f1(TARGETS, [PREDICTED])
    assert (
        abs(found.mean() - expected.mean()) < 0.01
        and 0.8 < found.mean(axis=1).std() / expected.mean(axis=1).std() < 1.25
    )


def test_the_interval_by_hand():
    # Draws of two classes: their means .5 and .3 lie .05 below the score, so the centre lies .05 above it. Deviations
    # are +-.1 times sqrt(2 / 1) in the class with two positives and +-.2 in the one with very many, over 2 classes.
    draws = np.array([[0.4, 0.1], [0.6, 0.5]] * 100)
    half = 1.959964 * (0.1 * np.sqrt(2) + 0.2) / 2
    np.testing.assert_allclose(macro_interval(0.45, draws, np.array([2, 10**9])), [0.5 - half, 0.5 + half])
    assert macro_interval(0.45, np.full((9, 2), 0.4), np.array([5, 5]))[0] == 0.45  # it contains the score


def test_a_class_that_is_always_right_on_three_samples_is_not_certain():
    targets = np.zeros((100, 2), dtype=bool)
    targets[:3, 0] = targets[:50, 1] = True
    intervals = class_intervals(targets, [targets], bootstrap_f1(targets, [targets]))
    # Jeffreys interval of 3 of 3: from .466; 2 J / (1 + J) = .635
    np.testing.assert_allclose(intervals[:, 0], [0.635, 0.975], atol=0.001)
    assert (intervals[:, 1] > 0.999).all()


def test_a_class_interval_holds_the_percentiles_of_wide_draws():
    targets = np.arange(4000)[:, None] < 2000  # many, so the Jeffreys interval is narrow
    predicted = np.roll(targets, 1000, axis=0)  # half of them right: F1 = .5
    draws = np.linspace(0.1, 0.9, 201)[:, None]
    np.testing.assert_allclose(class_intervals(targets, [predicted], draws), [[0.12, 0.88]])
    low, high = class_intervals(targets, [predicted], np.full((9, 1), 0.5))[0]
    assert 0.45 < low < 0.5 < high < 0.55  # if all draws agree, the Jeffreys interval remains


def test_the_interval_of_a_known_truth_covers_it():
    """Classes have 4 to 40 positives. Half are found, with as many false ones: F1 = 2 .5 / (.5 + .5 + 1) = .5."""
    rng, inside = np.random.default_rng(0), 0
    share = np.linspace(0.01, 0.1, 28)
    for _ in range(60):
        targets = rng.random((400, 28)) < share
        predicted = np.where(targets, rng.random((400, 28)) < 0.5, rng.random((400, 28)) < 0.5 * share / (1 - share))
        low, high = bootstrap_macro_f1(targets, [predicted])
        inside += low <= 0.5 <= high
    assert 52 <= inside <= 60
