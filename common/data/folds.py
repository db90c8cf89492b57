"""Stratified folds on duplicate groups, a hold-out part, oversampling as a number of copies, and an audit of these."""

from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pandas as pd

from common.classes import CLASS_NAMES
from common.data.labels import parse_targets
from common.data.options import FoldOptions
from common.errors import UserError

TRAIN_ONLY = -1  # fold of samples that are never validated on
HOLD_OUT = -2  # fold of samples that are never trained on, and only scored at the end


def stratified_group_folds(targets: np.ndarray, groups: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """Assign whole groups to folds so that each class is spread evenly (iterative stratification).

    targets : (n, 28) bool; groups : (n,) labels of any kind
    Returns fold numbers, (n,) int. Raises UserError if there are fewer groups than folds.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold  # slow to import, and training does not need it

    names, group = np.unique(groups, return_inverse=True)
    n_groups = len(names)
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


def fold_numbers(folds: pd.DataFrame) -> list[int]:
    """Return the numbers of the validation folds."""
    return sorted(int(fold) for fold in set(folds["fold"]) if fold >= 0)


def class_counts(folds: pd.DataFrame, fold: int) -> np.ndarray:
    """Return the distinct training samples of each class, (28,), when `fold` is kept for validation."""
    return parse_targets(folds.loc[training_rows(folds, fold), "Target"]).sum(axis=0)


def training_rows(folds: pd.DataFrame, fold: int) -> np.ndarray:
    """Return which rows are trained on when `fold` is kept for validation, (n,) bool."""
    return ~folds["fold"].isin([fold, HOLD_OUT]).to_numpy()


def make_folds(
    duplicates: pd.DataFrame, n_folds: int, max_copies: int, seed: int, external: str = "train", hold_out: float = 0.0
) -> pd.DataFrame:
    """Return Id, Target, part, group, fold, copies of the kept samples of stage 02's table.

    external : train = external samples are for training only (fold -1), but one that shares a group with a
        competition sample gets that sample's fold; stratified = they are split like the others
    hold_out : share of the samples set aside (fold -2), also in whole groups and stratified

    No group is split. Copies are of training rows only: held-out samples have one.
    """
    kept = duplicates[duplicates["kept"] == 1].reset_index(drop=True)
    targets, groups = parse_targets(kept["Target"]), kept["group"].to_numpy()
    inner = np.ones(len(kept), dtype=bool) if external == "stratified" else (kept["part"] == "train").to_numpy()
    place = dict.fromkeys(groups, TRAIN_ONLY)
    if hold_out:
        share = share_of_groups(hold_out, len(np.unique(groups[inner])))
        aside = stratified_group_folds(targets[inner], groups[inner], share.denominator, seed) < share.numerator
        place |= dict.fromkeys(groups[inner][aside], HOLD_OUT)
        inner = inner & np.array([place[group] != HOLD_OUT for group in groups])
    place |= zip(groups[inner], stratified_group_folds(targets[inner], groups[inner], n_folds, seed), strict=True)
    folds = np.array([place[group] for group in groups])
    copies = np.ones(len(kept), dtype=int)
    copies[folds != HOLD_OUT] = oversampling_copies(targets[folds != HOLD_OUT], max_copies)
    return kept[["Id", "Target", "part", "group"]].assign(fold=folds, copies=copies)


def share_of_groups(hold_out: float, n_groups: int) -> Fraction:
    """Return the share to hold out as a fraction with at most `n_groups` parts; raises UserError if it is 0."""
    parts = min(100, n_groups)
    share = Fraction(hold_out).limit_denominator(max(parts, 1))
    if share == 0:
        raise UserError(
            f"--hold-out {hold_out:g} of {parts} distinct samples is none; give a larger share"
            if parts < 100
            else f"--hold-out {hold_out:g}: the smallest share is 0.01"
        )
    return share


def plan_folds(labelled: pd.DataFrame, options: FoldOptions) -> pd.DataFrame:
    """Return the folds that stage 03 would make from labelled samples (Id, part, Target) without duplicates."""
    return make_folds(labelled.assign(group=labelled["Id"], kept=1), **asdict(options))


def audit(folds: pd.DataFrame) -> dict:
    """Audit a fold table: counts that should be even, and counts that must be 0, as plain types.

    worst_deviation : largest difference of a class's positives in a fold from an even share
    classes_missing_folds : class -> folds without a positive of it, for classes that have any
    groups_split, copies_outside_training : must be 0
    """
    targets, fold = parse_targets(folds["Target"]), folds["fold"].to_numpy()
    numbers = fold_numbers(folds)
    positives = np.stack([targets[fold == k].sum(axis=0) for k in numbers])
    deviation = np.abs(positives - positives.mean(axis=0)).max(axis=0)
    places = [*numbers, *(place for place in (TRAIN_ONLY, HOLD_OUT) if (fold == place).any())]
    return {
        "samples": {str(place): int((fold == place).sum()) for place in places},
        "positives": {
            name: {str(place): int(targets[fold == place, c].sum()) for place in places}
            for c, name in enumerate(CLASS_NAMES)
        },
        "worst_class": CLASS_NAMES[deviation.argmax()],
        "worst_deviation": round(float(deviation.max()), 2),
        "classes_missing_folds": {
            name: [k for k, count in zip(numbers, counts, strict=True) if not count]
            for name, counts in zip(CLASS_NAMES, positives.T, strict=True)
            if counts.any() and not counts.all()
        },
        "groups_split": int((folds.groupby("group")["fold"].nunique() > 1).sum()),
        "copies_outside_training": int((folds["copies"][fold == HOLD_OUT] > 1).sum())
        + int(folds["Id"].duplicated().sum()),
        "copies": {str(n): int(count) for n, count in enumerate(np.bincount(folds["copies"])) if n and count},
    }


def describe_audit(found: dict) -> list[str]:
    """Describe an audit in a few lines."""
    names = {str(TRAIN_ONLY): "for training only", str(HOLD_OUT): "held out"}
    aside = [f"{found['samples'][place]} {name}" for place, name in names.items() if place in found["samples"]]
    sizes = ", ".join(str(n) for place, n in found["samples"].items() if place not in names)
    copies = ", ".join(f"{count} {n}x" for n, count in found["copies"].items())
    lines = [
        "; ".join([f"samples per fold: {sizes}", *aside]),
        f"worst class: {found['worst_class']}, {found['worst_deviation']:.1f} off an even share",
        f"in training: {copies}; groups split: {found['groups_split']}; copies outside training: "
        f"{found['copies_outside_training']}",
    ]
    short = found["classes_missing_folds"]
    if short:
        lines.append(f"warning: {len(short)} classes are too rare for every fold: {', '.join(short)}")
    return lines


def audit_table(found: dict) -> pd.DataFrame:
    """Return an audit's positives as a table: a row per class, a column per fold, the other parts and the sum."""
    table = pd.DataFrame.from_dict(found["positives"], orient="index").rename_axis("class")
    names = {str(TRAIN_ONLY): "training_only", str(HOLD_OUT): "held_out"}
    table.columns = [names.get(place, f"fold{place}") for place in table.columns]
    return table.assign(all=table.sum(axis=1)).reset_index()
