"""Macro F1 (eq. 1-4 of the paper) from counts, so that curves and bootstraps need no second pass."""

import numpy as np


def f1_from_counts(tp, fp, fn):
    """Return F1 = 2 TP / (2 TP + FP + FN), elementwise; 0 where a class has no positives and no predictions."""
    denominator = 2 * tp + fp + fn
    return np.divide(2 * tp, denominator, out=np.zeros(np.shape(denominator)), where=denominator > 0)


def class_f1(targets: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the F1 of each class, (n_classes,), from bool arrays of shape (n_samples, n_classes)."""
    tp = (targets & predicted).sum(axis=0)
    return f1_from_counts(tp, predicted.sum(axis=0) - tp, targets.sum(axis=0) - tp)


def macro_f1(targets: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean F1 over all classes (eq. 4); a class without positives and predictions counts as 0."""
    return float(class_f1(targets, predicted).mean())


def bootstrap_macro_f1(targets, predictions: list[np.ndarray], n_draws: int = 1000, seed: int = 0, level: float = 0.95):
    """Return the (low, high) percentile interval of macro F1 over draws of samples with replacement.

    targets : (n_samples, n_classes) bool; predictions : bool arrays of that shape, whose scores are averaged
    A class's F1 counts as 0 in draws that miss it, as in `macro_f1`.
    """
    rng = np.random.default_rng(seed)
    n = len(targets)
    indicators = np.hstack([part for predicted in predictions
                            for part in (targets & predicted, predicted & ~targets, targets & ~predicted)]).astype(np.float32)
    scores = []
    for _ in range(n_draws):
        weights = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float32)
        tp, fp, fn = np.moveaxis((weights @ indicators).reshape(len(predictions), 3, -1), 1, 0)
        scores.append(f1_from_counts(tp, fp, fn).mean())
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
