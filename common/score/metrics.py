"""Macro F1 (eq. 1-4 of the paper) from counts, so that curves and bootstraps need only one pass."""

import numpy as np
from scipy.sparse import csr_array
from scipy.special import betaincinv

N_BLOCKS = 50_000  # a bootstrap draws from at most this many
Z = 1.959964  # standard deviations on each side of a 95 % interval


def f1_from_counts(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """Return F1 = 2 TP / (2 TP + FP + FN), elementwise; 0 for a class without positives and predictions."""
    denominator = 2 * tp + fp + fn
    return np.divide(2 * tp, denominator, out=np.zeros(np.shape(denominator)), where=denominator > 0)


def class_f1(targets: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, (n_classes,), from bool arrays of shape (n_samples, n_classes)."""
    tp = (targets & predicted).sum(axis=0)
    return f1_from_counts(tp, predicted.sum(axis=0) - tp, targets.sum(axis=0) - tp)


def macro_f1(targets: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean F1 over all classes (eq. 4); a class without positives and predictions counts as 0."""
    return float(class_f1(targets, predicted).mean())


def block_counts(targets: np.ndarray, predictions: list[np.ndarray], groups: np.ndarray | None) -> np.ndarray:
    """Return the positives, and each repeat's true positives and predictions, summed over the rows of each block.

    Blocks are what a bootstrap draws: groups, or rows if there are none. If there are more than N_BLOCKS, they are
    merged at random. Returns float32 (n_blocks, (1 + 2 * n_repeats) * n_classes).
    """
    block = np.arange(len(targets)) if groups is None else np.unique(groups, return_inverse=True)[1]
    n_blocks = block.max() + 1
    if n_blocks > N_BLOCKS:
        block = np.random.default_rng(0).integers(N_BLOCKS, size=n_blocks)[block]
        n_blocks = N_BLOCKS
    rows = csr_array(
        (np.ones(len(block), dtype=np.float32), (block, np.arange(len(block)))), shape=(n_blocks, len(block))
    )
    return np.hstack(
        [rows @ targets, *(rows @ part for predicted in predictions for part in (targets & predicted, predicted))]
    )


def bootstrap_f1(
    targets: np.ndarray,
    predictions: list[np.ndarray],
    groups: np.ndarray | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Return the F1 of each class over draws of samples with replacement, mean of the repeats, (n_draws, n_classes).

    targets : (n_samples, n_classes) bool; predictions : bool arrays of that shape, one per repeat
    groups : (n_samples,) labels; a group is drawn as a whole
    NaN where a draw misses the class; all 0 for a class without positives.
    """
    rng = np.random.default_rng(seed)
    counts = block_counts(targets, predictions, groups)
    n, present, scores = len(counts), targets.any(axis=0), []
    for first in range(0, n_draws, 50):  # one matrix product is far faster than draw by draw
        weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(min(50, n_draws - first))])
        drawn = (weights.astype(np.float32) @ counts).reshape(len(weights), 1 + 2 * len(predictions), -1)
        positives, tp, called = drawn[:, :1], drawn[:, 1::2], drawn[:, 2::2]
        f1 = f1_from_counts(tp, called - tp, positives - tp).mean(axis=1)
        scores.append(np.where(positives[:, 0] + ~present > 0, f1, np.nan))
    return np.concatenate(scores)


def macro_interval(score: float, draws: np.ndarray, positives: np.ndarray) -> list[float]:
    """Return the 95 % interval of macro F1 from its bootstrap draws (n_draws, n_classes), as [low, high].

    A draw that misses a class counts 0 for it, as `macro_f1` does.

    The draws' mean lies below the score, since F1 is not linear and some draws miss rare classes. The score lies below
    the truth for the same reason, by about as much. So the interval is centred as far above the score as the draws lie
    below it; percentiles of the draws would count the bias twice. Its half width is 1.96 standard deviations of the
    draws. These get Bessel's correction n / (n - 1), with n a class's positives: a bootstrap of few samples varies too
    little. The interval always contains the score.
    """
    draws, n = np.nan_to_num(draws), np.maximum(positives, 2)
    mean = draws.mean(axis=0)
    deviations = ((draws - mean) * np.sqrt(n / (n - 1))).mean(axis=1)
    centre, half = 2 * score - mean.mean(), Z * deviations.std()
    return [float(max(0, min(score, centre - half))), float(min(1, max(score, centre + half)))]


def class_intervals(targets: np.ndarray, predictions: list[np.ndarray], draws: np.ndarray) -> np.ndarray:
    """Return the 95 % intervals of each class's F1, (n_classes, 2): percentiles of the draws, widened for few samples.

    F1 = 2 J / (1 + J) with J = TP / (TP + FP + FN), a share, so J has a Jeffreys interval, and no F1 interval is
    narrower. If a class is always or never right on three samples, all draws agree, but this interval is wide.
    """
    tp = np.mean([(targets & predicted).sum(axis=0) for predicted in predictions], axis=0)
    wrong = np.mean([(targets ^ predicted).sum(axis=0) for predicted in predictions], axis=0)
    share = np.stack([betaincinv(tp + 0.5, wrong + 0.5, level) for level in (0.025, 0.975)])
    jeffreys, percentiles = 2 * share / (1 + share), np.nanquantile(draws, [0.025, 0.975], axis=0)
    return np.stack([np.minimum(jeffreys[0], percentiles[0]), np.maximum(jeffreys[1], percentiles[1])], axis=1)


def bootstrap_macro_f1(
    targets: np.ndarray, predictions: list[np.ndarray], groups: np.ndarray | None = None
) -> list[float]:
    """Return the 95 % interval of the mean of the repeats' macro F1, [low, high]."""
    score = np.mean([macro_f1(targets, predicted) for predicted in predictions])
    return macro_interval(float(score), bootstrap_f1(targets, predictions, groups), targets.sum(axis=0))
