"""Stratified folds on duplicate groups, and oversampling as a number of copies."""

import numpy as np
import pandas as pd
from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

from common.classes import CLASS_NAMES
from common.errors import UserError
from common.labels import parse_targets

TRAIN_ONLY = -1  # fold of samples that are never validated on


def stratified_group_folds(targets: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Assign whole groups to folds so that each class is spread evenly (iterative stratification).

    targets : (n, 28) bool; groups : (n,) labels of any kind
    Returns fold numbers, (n,) int. Raises UserError where there are fewer groups than folds.
    """
    _, group = np.unique(groups, return_inverse=True)
    n_groups = group.max() + 1
    if n_groups < n_folds:
        raise UserError(f"{n_groups} distinct samples cannot make {n_folds} folds; give more data or fewer folds")
    group_targets = np.zeros((n_groups, targets.shape[1]), dtype=bool)
    np.logical_or.at(group_targets, group, targets)
    folds = np.empty(n_groups, dtype=int)
    splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(group_targets, group_targets)):
        folds[held_out] = fold
    return folds[group]


def oversampling_copies(targets: np.ndarray, max_copies: int) -> np.ndarray:
    """Return how often each sample appears in training, (n,) int from 1 to `max_copies`.

    ceil(sqrt(target / count of the sample's rarest class)), with the median class count as the target.
    """
    counts = targets.sum(axis=0)
    if not counts.any():
        return np.ones(len(targets), dtype=int)
    target = np.median(counts[counts > 0])
    rarest = np.where(targets, counts, np.inf).min(axis=1)
    return np.clip(np.ceil(np.sqrt(target / rarest)), 1, max_copies).astype(int)


def make_folds(duplicates: pd.DataFrame, n_folds: int, max_copies: int, seed: int) -> pd.DataFrame:
    """Return Id, Target, part, group, fold, copies of the kept samples of stage 02's table.

    External samples are for training only (fold -1), but one that shares a group with a competition sample
    goes into that sample's fold, so that no group is on both sides.
    """
    kept = duplicates[duplicates["kept"] == 1].reset_index(drop=True)
    targets = parse_targets(kept["Target"])
    inner = (kept["part"] == "train").to_numpy()
    folds = stratified_group_folds(targets[inner], kept["group"][inner].to_numpy(), n_folds, seed)
    fold_of_group = dict(zip(kept["group"][inner], folds, strict=True))
    return kept[["Id", "Target", "part", "group"]].assign(
        fold=[fold_of_group.get(group, TRAIN_ONLY) for group in kept["group"]],
        copies=oversampling_copies(targets, max_copies))


def audit(folds: pd.DataFrame) -> list[str]:
    """Describe a fold table in a few lines: sizes, worst class deviation, empty classes, groups split."""
    targets = parse_targets(folds["Target"])
    fold = folds["fold"].to_numpy()
    numbers = np.unique(fold[fold >= 0])
    positives = np.stack([targets[fold == k].sum(axis=0) for k in numbers])
    deviation = np.abs(positives - positives.sum(axis=0) / len(numbers)).max(axis=0)
    worst = deviation.argmax()
    split = (folds[fold >= 0].groupby("group")["fold"].nunique() > 1).sum()
    lines = [f"samples per fold: {', '.join(str((fold == k).sum()) for k in numbers)}"
             + (f"; {(fold < 0).sum()} for training only" if (fold < 0).any() else ""),
             f"worst class: {CLASS_NAMES[worst]}, {deviation[worst]:.1f} off an even share; groups split: {split}",
             f"copies: {np.bincount(folds['copies'])[1:].tolist()} samples appear 1, 2, ... times in training"]
    short = [name for name, counts in zip(CLASS_NAMES, positives.T, strict=True) if counts.any() and not counts.all()]
    if short:
        lines.append(f"warning: {len(short)} classes are too rare for every fold: {', '.join(short)}")
    return lines
