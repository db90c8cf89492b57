"""Measure the macro F1 of no skill: a constant predictor and an untrained network, on the folds of a work folder.

example python benchmarks/baselines.py --work work --recipe demo
The last line is a JSON object.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.artifacts.files import read_json
from common.artifacts.tables import read_table
from common.classes import N_CLASSES
from common.data.labels import parse_targets
from common.process import command_line
from common.process.main import run
from common.recipes import get_recipe
from common.score.metrics import macro_f1
from common.score.thresholds import evaluate_thresholds


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--recipe", default="demo", help="network to leave untrained (default: demo)")
    args = parser.parse_args()
    folds = read_table(args.work / "folds.csv", "bash run_all.sh")
    folds = folds[folds["fold"] >= 0]
    targets = parse_targets(folds["Target"])
    everything = macro_f1(targets, np.ones(targets.shape, dtype=bool))

    from common.train.fold_data import image_set, load_fold
    from common.train.hardware import choose_hardware
    from common.train.predict import mean_probabilities, predict_logits, views
    from common.train.run import new_run

    recipe, hardware = get_recipe(args.recipe), choose_hardware()
    probs = np.zeros((len(folds), N_CLASSES), dtype=np.float32)
    for fold in sorted(folds["fold"].unique()):
        rows = (folds["fold"] == fold).to_numpy()
        data = load_fold(args.work, folds, fold, recipe)
        logits = predict_logits(
            new_run(recipe, data, hardware, fold, 0).model,
            data.normalisation,
            image_set(args.work, recipe, folds[rows]),
            hardware,
            views("none"),
        )
        probs[rows] = mean_probabilities(logits)
    untrained = evaluate_thresholds(targets, probs, folds["group"].to_numpy(), "greedy")
    figures = {
        "constant_all_classes": everything,
        "untrained_cross_fitted": untrained["score_cross_fitted"],
        "untrained_interval": untrained["interval"],
    }
    found = args.work / "thresholds.json"
    if found.is_file():
        trained = read_json(found)
        figures |= {"trained_cross_fitted": trained["score_cross_fitted"], "trained_interval": trained["interval"]}
    for name, value in figures.items():
        print(f"{name:24s} {np.round(value, 3)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    run(main)
