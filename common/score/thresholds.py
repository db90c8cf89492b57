"""Find per-class thresholds on out-of-fold probabilities, and score them on rows they have not seen.

A class is predicted where its probability is at least its threshold.
"""

from collections.abc import Callable, Sequence

import numpy as np

from common.classes import CLASS_NAMES
from common.data.folds import stratified_group_folds
from common.errors import UserError
from common.score.calibration import calibrated_thresholds
from common.score.metrics import (
    bootstrap_f1,
    bootstrap_macro_f1,
    class_f1,
    class_intervals,
    f1_from_counts,
    macro_f1,
    macro_interval,
)

GRID = np.round(np.arange(0.10, 0.901, 0.05), 2)  # 0.1 to 0.9 by 0.05, as in the paper
FEW = 10  # positives; below that, a class's threshold gets a warning


# --- searches: (targets, probs) -> thresholds (n_classes,) ---------------------------------------------------


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
    """Return the single threshold for all classes with the best macro F1; the lowest of equals."""
    return float(grid[f1_curves(targets, probs, grid).mean(axis=0).argmax()])


def greedy_thresholds(targets: np.ndarray, probs: np.ndarray, grid: np.ndarray = GRID) -> np.ndarray:
    """Return per-class thresholds by the paper's greedy search, (n_classes,).

    Every class starts at the single threshold. The search goes through the classes, with all others fixed, and moves a
    threshold only if that raises macro F1. As macro F1 is a mean over classes, one pass finds each class's best value.
    """
    curves = f1_curves(targets, probs, grid)
    start = curves.mean(axis=0).argmax()
    best = curves.argmax(axis=1)
    better = curves[np.arange(len(curves)), best] > curves[:, start]
    return grid[np.where(better, best, start)]


def exact_thresholds(targets: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return per-class thresholds as `greedy_thresholds` does, with every distinct probability as a candidate.

    The best one is always a positive sample's: moving up to the next positive only removes false positives.
    """
    thresholds = np.full(targets.shape[1], single_threshold(targets, probs))
    for c in np.flatnonzero(targets.any(axis=0)):
        target, prob = targets[:, c], probs[:, c]
        right, every = np.sort(prob[target]), np.sort(prob)
        candidates = np.append(np.unique(right), thresholds[c])
        tp, called = (len(values) - np.searchsorted(values, candidates) for values in (right, every))
        curve = f1_from_counts(tp, called - tp, len(right) - tp)
        if curve.max() > curve[-1]:
            thresholds[c] = candidates[curve.argmax()]
    return thresholds


def ratio_thresholds(targets: np.ndarray, probs: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
    """Return the thresholds at which each class is predicted as often as expected, (n_classes,).

    prior : (n_classes,) expected shares of the samples; by default those of the targets
    A threshold lies halfway between the last probability that passes and the first that does not.
    """
    n_passing = np.round((targets.mean(axis=0) if prior is None else prior) * len(probs)).astype(int)
    thresholds = []
    for prob, n in zip(probs.T, n_passing, strict=True):
        levels = np.concatenate([[0.0], np.sort(prob), [1.0]])
        thresholds.append(levels[-n - 2 :][:2].mean())
    return np.array(thresholds)


METHODS = {
    "half": lambda targets, probs, prior: np.full(targets.shape[1], 0.5),
    "single": lambda targets, probs, prior: np.full(targets.shape[1], single_threshold(targets, probs)),
    "greedy": lambda targets, probs, prior: greedy_thresholds(targets, probs),
    "exact": lambda targets, probs, prior: exact_thresholds(targets, probs),
    "ratio": ratio_thresholds,
    "calibrated": lambda targets, probs, prior: calibrated_thresholds(targets, probs),
}


def find_thresholds(targets: np.ndarray, probs: np.ndarray, method: str, prior: np.ndarray | None = None) -> np.ndarray:
    """Return the thresholds of a method of the table METHODS, (n_classes,)."""
    return METHODS[method](targets, probs, prior)


# --- honest figures ------------------------------------------------------------------------------------------


def repeated_folds(
    targets: np.ndarray, groups: np.ndarray, n_folds: int = 5, repeats: int = 3, seed: int = 0
) -> list[np.ndarray]:
    """Return fold numbers (n,) for each repeat: stratified, groups kept whole, at most as many folds as groups."""
    n_folds = min(n_folds, len(np.unique(groups)))
    if n_folds < 2:
        raise UserError(
            f"{len(targets)} samples in {n_folds} groups leave none to test thresholds on; give at least 2 groups"
        )
    return [stratified_group_folds(targets, groups, n_folds, seed + repeat) for repeat in range(repeats)]


def cross_fit(
    targets: np.ndarray,
    probs: np.ndarray,
    groups: np.ndarray,
    method: str,
    n_folds: int = 5,
    repeats: int = 3,
    seed: int = 0,
    prior: np.ndarray | None = None,
    folds: list[np.ndarray] | None = None,
    weigh: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Predict every row with thresholds found on other rows; return one (n, n_classes) bool array per repeat.

    groups : (n,) labels; rows of one group (near-duplicates) stay on one side
    folds : the result of `repeated_folds`, if available
    weigh : with it, `probs` holds members (n_members, n, n_classes), and weigh(targets, members) returns the weights of
        their mean, which are found on the other rows too
    """
    results = []
    for fold in folds or repeated_folds(targets, groups, n_folds, repeats, seed):
        predicted = np.zeros(targets.shape, dtype=bool)
        for k in np.unique(fold):
            unseen = fold == k
            mixed = probs if weigh is None else np.tensordot(weigh(targets[~unseen], probs[:, ~unseen]), probs, 1)
            predicted[unseen] = mixed[unseen] >= find_thresholds(targets[~unseen], mixed[~unseen], method, prior)
        results.append(predicted)
    return results


def evaluate_thresholds(
    targets: np.ndarray,
    probs: np.ndarray,
    groups: np.ndarray,
    method: str,
    prior: np.ndarray | None = None,
    unseen: list[np.ndarray] | None = None,
) -> dict:
    """Find thresholds and score them; return plain types for thresholds.json.

    unseen : the result of `cross_fit`, if available
    score_cross_fitted : macro F1 on rows that were not used to find the thresholds, mean of the repeats
    interval : its 95 % bootstrap interval over samples (whole groups), also per class
    score_in_sample : on the rows used to find the thresholds, so too good
    """
    thresholds = find_thresholds(targets, probs, method, prior)
    unseen = unseen or cross_fit(targets, probs, groups, method, prior=prior)
    present = targets.any(axis=0)
    honest = np.mean([class_f1(targets, predicted) for predicted in unseen], axis=0)
    in_sample = class_f1(targets, probs >= thresholds)
    draws = bootstrap_f1(targets, unseen, groups)
    intervals = class_intervals(targets, unseen, draws).tolist()
    return {
        "method": method,
        "thresholds": [float(value) for value in thresholds],
        "single": single_threshold(targets, probs),
        "score_cross_fitted": float(honest.mean()),
        "interval": macro_interval(float(honest.mean()), draws, targets.sum(axis=0)),
        "score_in_sample": float(in_sample.mean()),
        "score_at_half": macro_f1(targets, probs >= 0.5),
        "score_cross_fitted_present": float(honest[present].mean()),
        "n_present": int(present.sum()),
        "n_samples": len(targets),
        "per_class": [
            {
                "class": name,
                "threshold": float(thresholds[c]),
                "positives": int(targets[:, c].sum()),
                "f1_cross_fitted": float(honest[c]),
                "interval": intervals[c],
                "f1_in_sample": float(in_sample[c]),
            }
            for c, name in enumerate(CLASS_NAMES)
        ],
    }


def score_held_out(
    targets: np.ndarray, probs: np.ndarray, groups: np.ndarray, thresholds: Sequence[float] | np.ndarray
) -> dict:
    """Return macro F1 and its interval on samples that nothing was fitted to, as plain types for thresholds.json."""
    predicted = probs >= np.array(thresholds)
    return {
        "score_held_out": macro_f1(targets, predicted),
        "interval_held_out": bootstrap_macro_f1(targets, [predicted], groups),
        "n_held_out": len(targets),
    }
