import numpy as np
from sklearn.metrics import f1_score

from common.metrics import bootstrap_macro_f1, class_f1, f1_from_counts, macro_f1

RNG = np.random.default_rng(0)
TARGETS, PREDICTED = RNG.random((2, 200, 28)) < 0.2


def test_f1_by_hand():
    # 3 right, 1 too many, 2 missed: P = 3/4, R = 3/5, F1 = 2 P R / (P + R) = 2/3
    assert f1_from_counts(np.array(3), np.array(1), np.array(2)) == 2 / 3


def test_macro_f1_equals_scikit_learn():
    TARGETS[:, 5] = PREDICTED[:, 5] = False
    expected = f1_score(TARGETS, PREDICTED, average=None, zero_division=0)
    np.testing.assert_allclose(class_f1(TARGETS, PREDICTED), expected)
    np.testing.assert_allclose(macro_f1(TARGETS, PREDICTED), expected.mean())
    assert class_f1(TARGETS, PREDICTED)[5] == 0


def test_the_interval_equals_a_slow_bootstrap():
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(200):
        rows = rng.integers(200, size=200)
        scores.append(f1_score(TARGETS[rows], PREDICTED[rows], average="macro", zero_division=0))
    low, high = bootstrap_macro_f1(TARGETS, [PREDICTED], n_draws=200, seed=3)
    np.testing.assert_allclose([low, high], np.quantile(scores, [0.025, 0.975]), atol=1e-6)


def test_the_interval_of_equal_repeats_is_that_of_one():
    one = bootstrap_macro_f1(TARGETS, [PREDICTED], n_draws=50)
    np.testing.assert_allclose(bootstrap_macro_f1(TARGETS, [PREDICTED, PREDICTED], n_draws=50), one)
