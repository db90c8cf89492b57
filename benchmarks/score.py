"""Score out-of-fold probabilities in ways that show the effect of a change: at 0.5, without a threshold, by rarity.

example python benchmarks/score.py --work work --recipes demo-customised,demo-hard
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.artifacts.layout import Layout
from common.artifacts.predictions import load_predictions
from common.artifacts.tables import read_table
from common.data.labels import parse_targets
from common.process import command_line
from common.process.main import run
from common.score.metrics import class_f1
from common.score.thresholds import cross_fit

RARE = 30  # a rare class has at most this many samples


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--recipes", type=command_line.recipe_names, default=["demo"], metavar="A,B", help="runs to score"
    )
    args = parser.parse_args()
    folds = read_table(args.work / "folds.csv", "bash run_all.sh").set_index("Id")
    print(f"{'run':32s} {'at 0.5':>8s} {'fitted':>8s} {'mean AP':>8s} {'rare':>8s} {'others':>8s} {'called':>8s}")
    figures = {}
    for recipe in args.recipes:
        ids, probs = load_predictions(
            Layout(args.work).predictions(recipe, "oof"), f"python 05_predict_oof.py --recipes {recipe}"
        )
        figures[recipe] = score(probs, folds.loc[ids])
        print(f"{recipe:32s} " + " ".join(f"{value:8.3f}" for value in figures[recipe].values()))
    print(json.dumps(figures))


def score(probs, rows) -> dict:
    """Return macro F1, mean average precision, and the labels predicted at 0.5 as a share of the true ones.

    Macro F1 is at 0.5 (mean of folds) and with cross-fitted greedy thresholds; mean average precision is over all
    classes, rare ones and the others.
    """
    targets, fold = parse_targets(rows["Target"]), rows["fold"].to_numpy()
    half = np.mean([class_f1(targets[fold == k], probs[fold == k] >= 0.5).mean() for k in np.unique(fold)])
    fitted = np.mean(
        [class_f1(targets, p).mean() for p in cross_fit(targets, probs, rows["group"].to_numpy(), "greedy")]
    )
    precision = np.array([average_precision_score(*pair) for pair in zip(targets.T, probs.T, strict=True)])
    rare = targets.sum(axis=0) <= RARE
    return {
        "macro_f1_at_half": half,
        "macro_f1_cross_fitted": fitted,
        "mean_average_precision": precision.mean(),
        "of_rare": precision[rare].mean() if rare.any() else np.nan,
        "of_others": precision[~rare].mean(),
        "called": (probs >= 0.5).sum() / targets.sum(),
    }


if __name__ == "__main__":
    run(main)
