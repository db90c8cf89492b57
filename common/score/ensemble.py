"""Combine predictions by Id, and score each member and each way of combining."""

from collections.abc import Sequence

import numpy as np

from common.errors import UserError, listing
from common.process.progress import progress
from common.score.calibration import class_calibration
from common.score.metrics import macro_f1
from common.score.thresholds import FEW, METHODS, cross_fit, evaluate_thresholds, find_thresholds, repeated_folds

COMBINATIONS = ("mean", "weighted", "rank")
N_WEIGHED = 50_000  # weights are found on at most this many samples


def align(ids: np.ndarray, probs: np.ndarray, wanted: np.ndarray, name: str, cure: str = "") -> np.ndarray:
    """Return the rows of `probs` in the order of `wanted`; raises UserError for missing or unexpected Ids."""
    place = {Id: i for i, Id in enumerate(ids)}
    missing = [Id for Id in wanted if Id not in place]
    unexpected = sorted(set(ids) - set(wanted))
    for what, some in (("missing", missing), ("unexpected", unexpected)):
        if some:
            raise UserError(f"{name}: {len(some)} {what} Ids{cure}:\n{listing(some)}")
    return probs[[place[Id] for Id in wanted]]


def stack_members(
    members: list[tuple[np.ndarray, np.ndarray]], names: list[str], wanted: np.ndarray | None = None, cure: str = ""
) -> np.ndarray:
    """Return all members' probabilities in the order of the Ids `wanted`, (n_members, n, 28) float32.

    members : (ids, probs) with the same Ids in any order; without `wanted` the order is the first member's
    """
    wanted = members[0][0] if wanted is None else wanted
    rows = [align(ids, probs, wanted, name, cure) for (ids, probs), name in zip(members, names, strict=True)]
    return np.stack(rows).astype(np.float32, copy=False)


def keep_common(
    members: list[tuple[np.ndarray, np.ndarray]], wanted: np.ndarray
) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """Return the members' rows of Ids that all of them and `wanted` have, and these Ids."""
    common = set(wanted).intersection(*(ids for ids, _ in members))
    if not common:
        raise UserError("the files have no Ids in common")
    rows = [np.array([Id in common for Id in ids]) for ids, _ in members]
    print(f"{len(common)} Ids are in all files; {len(wanted) - len(common)} of the labelled Ids are left out")
    return (
        [(ids[some], probs[some]) for (ids, probs), some in zip(members, rows, strict=True)],
        np.array([Id for Id in wanted if Id in common]),
    )


def mean_predictions(members: list[tuple[np.ndarray, np.ndarray]], names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the Ids of the first member and the plain mean of all members' probabilities (n, 28)."""
    return members[0][0], combine(stack_members(members, names), "mean")


def combine(stack: np.ndarray, how: str, weights: np.ndarray | Sequence[float] | None = None) -> np.ndarray:
    """Return one (n, 28) float32 array from the members (n_members, n, 28).

    how : mean; weighted = mean with the given weights; rank = mean of each sample's rank within its class and member,
        as a share of the samples, so that only the order matters (for test samples: the order among test samples)
    """
    if how == "rank":
        from scipy.stats import rankdata  # slow to import, and most runs do not rank

        stack = (rankdata(stack, axis=1) - 0.5) / stack.shape[1]
    shares = np.asarray(weights if how == "weighted" else np.full(len(stack), 1 / len(stack)), dtype=np.float64)
    return np.tensordot(shares, stack, 1).astype(np.float32)


def find_weights(targets: np.ndarray, stack: np.ndarray) -> np.ndarray:
    """Return the weights on the simplex, (n_members,), whose weighted mean gives the labels the highest likelihood.

    Every class counts the same: its samples are weighted by 1 / its positives. The likelihood is concave, so there is
    one optimum. More than N_WEIGHED samples are thinned out evenly.
    """
    from scipy.optimize import minimize  # slow to import

    every = -(-len(targets) // N_WEIGHED)
    targets, stack = targets[::every], stack[:, ::every]
    given = np.where(targets, stack, 1 - stack).clip(1e-6)  # each member's probability of the truth
    positives = targets.sum(axis=0)
    importance = np.divide(1, positives, out=np.zeros(len(positives)), where=positives > 0) / max(
        1, (positives > 0).sum()
    )

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.tensordot(weights, given, 1)
        return -(np.log(mixed).sum(axis=0) @ importance), -np.einsum("mnc,nc,c->m", given, 1 / mixed, importance)

    n = len(stack)
    found = minimize(
        loss,
        np.full(n, 1 / n),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * n,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
    )
    weights = np.clip(found.x, 0, 1)
    return weights / weights.sum()


def evaluate_ensemble(
    targets: np.ndarray,
    stack: np.ndarray,
    names: list[str],
    groups: np.ndarray,
    method: str,
    how: str,
    prior: np.ndarray | None = None,
) -> dict:
    """Find weights and thresholds, and score them, their parts and their alternatives.

    Returns plain types for thresholds.json: all that `evaluate_thresholds` returns, and
    calibration : coefficients of each class (see `calibration.calibrated`), for combinations other than rank
    combine, weights : how `combine` makes one prediction from the members
    members : score_cross_fitted of each alone; leave_one_out = how the ensemble's score would change without it
    combinations, methods : score_cross_fitted of each way of combining (with this method) and of each method
    """
    folds = repeated_folds(targets, groups)

    def unseen(rows: np.ndarray | list[int], method: str, how: str) -> list[np.ndarray]:
        """Cross-fit the thresholds of some members, and their weights too."""
        if how == "weighted":
            return cross_fit(targets, stack[rows], groups, method, prior=prior, folds=folds, weigh=find_weights)
        return cross_fit(targets, combine(stack[rows], how), groups, method, prior=prior, folds=folds)

    def score(rows: np.ndarray | list[int], method: str, how: str) -> float:
        return float(np.mean([macro_f1(targets, predicted) for predicted in unseen(rows, method, how)]))

    n, everyone = len(names), np.arange(len(names))
    weights = find_weights(targets, stack) if how == "weighted" else np.full(n, 1 / n)
    mixed = combine(stack, how, weights)
    result = evaluate_thresholds(targets, mixed, groups, method, prior, unseen(everyone, method, how))
    whole, several = result["score_cross_fitted"], n > 1
    return {
        "combine": how,
        "weights": weights.tolist(),
        **result,
        **({} if how == "rank" else {"calibration": class_calibration(targets, mixed).tolist()}),
        "members": [
            {
                "name": name,
                "score_cross_fitted": score([i], method, "mean") if several else whole,
                "weight": float(weights[i]),
                "leave_one_out": score(everyone != i, method, how) - whole if several else None,
            }
            for i, name in enumerate(progress(names, n, "members", unit="members"))
        ],
        "combinations": [
            {"combine": other, "score_cross_fitted": score(everyone, method, other)}
            for other in COMBINATIONS
            if several
        ],
        "methods": [
            {
                "method": other,
                "score_cross_fitted": score(everyone, other, how),
                "score_in_sample": macro_f1(targets, mixed >= find_thresholds(targets, mixed, other, prior)),
            }
            for other in progress(METHODS, len(METHODS), "methods", unit="methods")
        ],
    }


def describe_ensemble(result: dict) -> list[str]:
    """Describe the result of `evaluate_ensemble`: the honest score first, then methods, members, classes, warnings."""
    low, high = result["interval"]
    lines = [
        f"macro F1 {result['score_cross_fitted']:.3f} [{low:.3f}, {high:.3f}] cross-fitted, {result['n_samples']} "
        f"out-of-fold samples, {result['combine']} of {', '.join(result['recipes'])}",
        f"on the rows used to find the thresholds, so too good: {result['score_in_sample']:.3f}; "
        f"at 0.5: {result['score_at_half']:.3f}; single threshold: {result['single']:.2f}",
    ]
    if "score_held_out" in result:
        low, high = result["interval_held_out"]
        lines.append(
            f"on the {result['n_held_out']} held-out samples, predicted by the mean of all folds: "
            f"{result['score_held_out']:.3f} [{low:.3f}, {high:.3f}]"
        )
    lines += [f"{'method':30s} {'cross-fitted':>12s} {'in-sample':>9s}"]
    lines += [
        f"{row['method']:30s} {row['score_cross_fitted']:12.3f} {row['score_in_sample']:9.3f}"
        f"{'  <- used' if row['method'] == result['method'] else ''}"
        for row in result["methods"]
    ]
    if len(result["members"]) > 1:
        wide = max(30, *(len(row["name"]) for row in result["members"]))
        lines += [f"{'member':{wide}s} {'cross-fitted':>12s} {'weight':>9s}   ensemble's score without it"]
        lines += [
            f"{row['name']:{wide}s} {row['score_cross_fitted']:12.3f} {row['weight']:9.2f}   "
            f"{row['leave_one_out']:+.3f}"
            for row in result["members"]
        ]
        lines += [
            f"{row['combine'] + ' of all':{wide}s} {row['score_cross_fitted']:12.3f}"
            f"{'  <- used' if row['combine'] == result['combine'] else ''}"
            for row in result["combinations"]
        ]
    return lines + describe_classes(result)


def describe_classes(result: dict) -> list[str]:
    """Describe each class's threshold and score, and warn of classes with few positives or none."""
    lines = [
        f"{'class':30s} {'cross-fitted':>12s} {'in-sample':>9s} {'95 % interval':>16s} {'threshold':>9s} "
        f"{'positives':>9s}"
    ]
    lines += [
        "{class:30s} {f1_cross_fitted:12.3f} {f1_in_sample:9.3f}   [{interval[0]:.3f}, {interval[1]:.3f}] "
        "{threshold:9.3f} {positives:9d}".format(**row)
        for row in result["per_class"]
        if row["positives"]
    ]
    few = [f"{row['class']} ({row['positives']})" for row in result["per_class"] if 0 < row["positives"] < FEW]
    if few:
        lines.append(
            f"warning: the thresholds of {len(few)} classes rest on fewer than {FEW} positives: {', '.join(few)}"
        )
    absent = [row["class"] for row in result["per_class"] if not row["positives"]]
    if absent:
        lines.append(
            f"over the {result['n_present']} classes present: {result['score_cross_fitted_present']:.3f}; "
            f"warning: {len(absent)} classes have no samples and count as 0: {', '.join(absent)}"
        )
    return lines
