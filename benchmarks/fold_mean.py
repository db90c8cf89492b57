"""Measure what it costs that thresholds are found on single networks' probabilities and used on a mean over folds.

Reads WORK with samples held out (03_make_folds.py --hold-out 0.5) that stage 05 has predicted with all folds of a run:
thresholds are found out of fold, on single networks, and used on the held-out samples' mean over folds. With
HPA_REAL_DATA also the three real networks, on 295 labelled rows: each row's "fold" is one of them, drawn; thresholds
found on four fifths of the rows are used on the other rows' mean, twenty times.

mean              the mean with thresholds found out of fold, as stage 07 decides
logits            the mean of the logits instead
shares            thresholds moved so that each class is predicted as often as out of fold
half shares       moved half of that way, in the logit
votes             the majority of the networks, each with the thresholds
calibrated        each network calibrated, then the mean; thresholds are half of the best expected F1 out of fold
calibrated here   the same with the best expected F1 of the samples that are predicted, without their labels
own thresholds    found on means of other samples, cross-fitted: what is lost if the shift costs nothing

example python benchmarks/fold_mean.py --work work --run demo
Prints differences of macro F1 to `mean` with 95 % bootstrap intervals over samples (paired); for the real networks the
standard deviation over the repeats. The last line is a JSON object.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from thresholds import labelled_rows

from common.artifacts.layout import Layout
from common.artifacts.predictions import load_predictions
from common.data.labels import parse_targets
from common.process import command_line
from common.process.main import run
from common.score.calibration import (
    CENTRES,
    calibrated,
    calibrated_thresholds,
    class_calibration,
    expected_f1_curves,
    logit_counts,
)
from common.score.metrics import bootstrap_f1, macro_f1
from common.score.thresholds import cross_fit, repeated_folds


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--run", default="demo", metavar="NAME", help="run in the work folder (default: demo)")
    args = parser.parse_args()
    figures = {args.run: folds_of(Layout(args.work), args.run)}
    if "HPA_REAL_DATA" in os.environ:
        figures["real networks"] = real_networks()
    print(json.dumps(figures))


# --- remedies: (targets, oof, networks) -> predicted classes (n, 28) -----------------------------------------
# targets (m, 28), oof (m, 28): labelled samples, each predicted by one network; networks (k, n, 28): those to decide


def logits_of(probs: np.ndarray) -> np.ndarray:
    return logit(np.clip(probs.astype(np.float64), 1e-6, 1 - 1e-6))


def equal_shares(targets, oof, networks) -> np.ndarray:
    """Return the thresholds at which the mean predicts each class as often as `oof` does with its own, (28,)."""
    found, passing = [], (oof >= calibrated_thresholds(targets, oof)).mean(axis=0)
    for prob, share in zip(networks.mean(axis=0).T, passing, strict=True):
        levels = np.concatenate([[0], np.sort(prob), [1]])
        found.append(levels[-round(share * len(prob)) - 2 :][:2].mean())
    return np.array(found)


def half_shares(targets, oof, networks):
    thresholds = calibrated_thresholds(targets, oof)
    moved = (logits_of(thresholds) + logits_of(equal_shares(targets, oof, networks))) / 2
    return networks.mean(axis=0) >= expit(moved)


def half_of_best(q: np.ndarray) -> np.ndarray:
    """Return half of each class's highest expected F1 if `q` (n, 28) is calibrated, (28,)."""
    everything = logit_counts(np.zeros(q.shape, bool), q)[1]
    return expected_f1_curves(everything, np.tile(expit(CENTRES), (q.shape[1], 1))).max(axis=1) / 2


def calibrated_mean(here: bool) -> Callable:
    def decide(targets, oof, networks):
        coefs = class_calibration(targets, oof)
        q = np.mean([calibrated(probs, coefs) for probs in networks], axis=0)
        return q >= half_of_best(q if here else calibrated(oof, coefs))

    return decide


REMEDIES = {
    "mean": lambda targets, oof, networks: networks.mean(axis=0) >= calibrated_thresholds(targets, oof),
    "logits": lambda targets, oof, networks: (
        expit(logits_of(networks).mean(axis=0)) >= calibrated_thresholds(targets, oof)
    ),
    "shares": lambda targets, oof, networks: networks.mean(axis=0) >= equal_shares(targets, oof, networks),
    "half shares": half_shares,
    "votes": lambda targets, oof, networks: (networks >= calibrated_thresholds(targets, oof)).mean(axis=0) > 0.5,
    "calibrated": calibrated_mean(here=False),
    "calibrated here": calibrated_mean(here=True),
}


# --- a run with samples held out -----------------------------------------------------------------------------


def folds_of(layout: Layout, name: str) -> dict:
    rows = layout.read_folds().set_index("Id")
    ids, oof = load_predictions(layout.predictions(name, "oof"), "")
    files = sorted(layout.predictions(name, "held_out").parent.glob("fold*_held_out.npz"))
    held_out = [load_predictions(path, "") for path in files]
    unseen, networks = held_out[0][0], np.stack([probs for _, probs in held_out])
    labels, truth = (parse_targets(rows.loc[some, "Target"]) for some in (ids, unseen))
    decided = {remedy: decide(labels, oof, networks) for remedy, decide in REMEDIES.items()}
    own = cross_fit(truth, networks.mean(axis=0), rows.loc[unseen, "group"].to_numpy(), "calibrated")
    decided["own thresholds"] = own[0]
    scores = {remedy: np.nan_to_num(bootstrap_f1(truth, [found])).mean(axis=1) for remedy, found in decided.items()}
    print(f"{name}: {len(networks)} folds, {len(unseen)} held-out samples: {macro_f1(truth, decided['mean']):.4f}")
    figures = {}
    for remedy, found in decided.items():
        change = macro_f1(truth, found) - macro_f1(truth, decided["mean"])
        half = 1.96 * (scores[remedy] - scores["mean"]).std()
        figures[remedy] = [round(float(value), 4) for value in (change, change - half, change + half)]
        print("{:16s} {:+.4f} [{:+.4f}, {:+.4f}]".format(remedy, *figures[remedy]))
    return figures


# --- three real networks -------------------------------------------------------------------------------------


def real_networks(repeats: int = 20) -> dict:
    targets, probs = labelled_rows()
    networks, rng = np.stack(list(probs.values())), np.random.default_rng(0)
    rows, scores = np.arange(len(targets)), {}
    for fold in repeated_folds(targets, rows, repeats=repeats):
        oof = networks[rng.integers(len(networks), size=len(rows)), rows]
        for remedy, decide in REMEDIES.items():
            predicted = np.zeros(targets.shape, bool)
            for k in np.unique(fold):
                unseen = fold == k
                predicted[unseen] = decide(targets[~unseen], oof[~unseen], networks)[unseen]
            scores.setdefault(remedy, []).append(macro_f1(targets, predicted))
        own = cross_fit(targets, networks.mean(axis=0), rows, "calibrated", folds=[fold])[0]
        scores.setdefault("own thresholds", []).append(macro_f1(targets, own))
    print(f"real networks, {len(targets)} rows: {np.mean(scores['mean']):.4f}")
    figures = {}
    for remedy, values in scores.items():
        change = np.array(values) - np.array(scores["mean"])
        figures[remedy] = [round(float(change.mean()), 4), round(float(change.std()), 4)]
        print("{:16s} {:+.4f} (deviation {:.4f})".format(remedy, *figures[remedy]))
    return figures


if __name__ == "__main__":
    run(main)
