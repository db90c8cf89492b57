"""Per-class thresholds found on out-of-fold probabilities, and what they are worth on rows they have not seen.

A class is predicted where its probability is at least its threshold.
"""

import numpy as np

from common.classes import CLASS_NAMES
from common.folds import stratified_group_folds
from common.metrics import bootstrap_macro_f1, class_f1, f1_from_counts, macro_f1

GRID = np.round(np.arange(0.10, 0.901, 0.05), 2)  # 0.1 to 0.9 by 0.05, as in the paper
METHODS = ("single", "greedy")


def f1_curves(targets: np.ndarray, probs: np.ndarray, grid: np.ndarray = GRID) -> np.ndarray:
    """Return the F1 of each class at each threshold of `grid`, (n_classes, n_grid)."""
    curves = []
    for target, prob in zip(targets.T, probs.T, strict=True):
        passed = np.searchsorted(grid, prob, side="right")  # how many thresholds a probability reaches
        counts = np.stack([np.bincount(passed[rows], minlength=len(grid) + 1) for rows in (target, ~target)])
        tp, fp = counts[:, ::-1].cumsum(axis=1)[:, -2::-1]
        curves.append(f1_from_counts(tp, fp, target.sum() - tp))
    return np.array(curves)


def single_threshold(targets: np.ndarray, probs: np.ndarray, grid: np.ndarray = GRID) -> float:
    """Return the one threshold for all classes with the best macro F1; the lowest of equals."""
    return float(grid[f1_curves(targets, probs, grid).mean(axis=0).argmax()])


def greedy_thresholds(targets: np.ndarray, probs: np.ndarray, grid: np.ndarray = GRID) -> np.ndarray:
    """Return per-class thresholds by the paper's greedy search, (n_classes,).

    It starts every class at the single threshold and goes through the classes, all others fixed, moving one
    only where that raises macro F1. Macro F1 is a mean over classes, so one pass finds each class's best value.
    """
    curves = f1_curves(targets, probs, grid)
    start = curves.mean(axis=0).argmax()
    best = curves.argmax(axis=1)
    better = curves[np.arange(len(curves)), best] > curves[:, start]
    return grid[np.where(better, best, start)]


def find_thresholds(targets: np.ndarray, probs: np.ndarray, method: str) -> np.ndarray:
    """Return the thresholds of a method, (n_classes,)."""
    if method == "single":
        return np.full(targets.shape[1], single_threshold(targets, probs))
    return greedy_thresholds(targets, probs)


def cross_fit(targets, probs, groups, method: str, n_folds: int = 5, repeats: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Predict every row with thresholds found on other rows; returns one (n, n_classes) bool array per repeat.

    groups : (n,) labels; rows of one group (near-duplicates) stay on one side
    """
    n_folds = min(n_folds, len(np.unique(groups)))
    results = []
    for repeat in range(repeats):
        folds = stratified_group_folds(targets, groups, n_folds, seed + repeat)
        predicted = np.zeros(targets.shape, dtype=bool)
        for fold in range(n_folds):
            unseen = folds == fold
            predicted[unseen] = probs[unseen] >= find_thresholds(targets[~unseen], probs[~unseen], method)
        results.append(predicted)
    return results


def evaluate_thresholds(targets: np.ndarray, probs: np.ndarray, groups, method: str) -> dict:
    """Find thresholds and report what they are worth, as plain types for thresholds.json.

    score_cross_fitted : macro F1 on rows that the thresholds were not searched on, mean of the repeats
    interval : its 95 % bootstrap interval over samples; score_in_sample : on the rows of the search, flattering
    """
    thresholds = find_thresholds(targets, probs, method)
    unseen = cross_fit(targets, probs, groups, method)
    present = targets.any(axis=0)
    honest = np.mean([class_f1(targets, predicted) for predicted in unseen], axis=0)
    in_sample = class_f1(targets, probs >= thresholds)
    return {
        "method": method,
        "thresholds": [float(value) for value in thresholds],
        "single": single_threshold(targets, probs),
        "score_cross_fitted": float(honest.mean()),
        "interval": list(bootstrap_macro_f1(targets, unseen)),
        "score_in_sample": float(in_sample.mean()),
        "score_at_half": macro_f1(targets, probs >= 0.5),
        "score_cross_fitted_present": float(honest[present].mean()),
        "n_present": int(present.sum()),
        "n_samples": len(targets),
        "per_class": [{"class": name, "threshold": float(thresholds[c]), "positives": int(targets[:, c].sum()),
                       "f1_cross_fitted": float(honest[c]), "f1_in_sample": float(in_sample[c])}
                      for c, name in enumerate(CLASS_NAMES)],
    }


def score_held_out(targets: np.ndarray, probs: np.ndarray, thresholds) -> dict:
    """Return macro F1 and its interval on samples that nothing was fitted to, as plain types for thresholds.json."""
    predicted = probs >= np.array(thresholds)
    return {"score_held_out": macro_f1(targets, predicted),
            "interval_held_out": list(bootstrap_macro_f1(targets, [predicted])), "n_held_out": len(targets)}
