"""Weights of classes in the E-loss, by their effective number of samples (eq. 5-6), and weights for drawing samples."""

import numpy as np


def effective_numbers(counts: np.ndarray, alpha: float) -> np.ndarray:
    """Return Q_n = (1 - alpha^n) / (1 - alpha) for each class count n (below eq. 5): 1 at alpha 0, n at alpha -> 1."""
    with np.errstate(divide="ignore"):
        return -np.expm1(np.asarray(counts, dtype=np.float64) * np.log(alpha)) / (1 - alpha)


def effective_number_weights(counts: np.ndarray, alpha: float, kind: str = "normalised") -> np.ndarray:
    """Return the class weights 1 / Q_n of eq. 6, (n_classes,).

    counts : samples of each class in the whole training fold, never in a batch
    kind : normalised = the weights sum to the number of classes (Cui et al. 2019); raw = as in eq. 6; none = 1
    A class without samples has no Q_n; it gets the smallest weight, since it cannot be trained.
    """
    counts = np.asarray(counts)
    if kind == "none" or not counts.any():
        return np.ones(len(counts))
    weights = 1 / effective_numbers(np.where(counts > 0, counts, counts.max()), alpha)
    return weights if kind == "raw" else weights * len(weights) / weights.sum()


def draw_weights(targets: np.ndarray, power: float) -> np.ndarray | None:
    """Return how often each sample is drawn, relative to the others, (n,): (count of its rarest class) ** -power.

    A sample without classes counts as one of the most common class. None for power 0, which weighs all equally.

    targets : (n, n_classes) bool
    """
    if not power:
        return None
    weights = np.maximum(targets.sum(axis=0), 1.0) ** -power
    return np.where(targets, weights, weights.min()).max(axis=1)
