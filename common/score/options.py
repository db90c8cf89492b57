"""The flags of 06_thresholds.py and 07_ensemble.py."""

import argparse
from pathlib import Path

from common.process import command_line


def add_threshold_flags(parser: argparse.ArgumentParser) -> None:
    """Add how thresholds are found, on what, and what stage 06 does instead."""
    from common.score.ensemble import COMBINATIONS  # these load NumPy, which stage 07's --help does not need
    from common.score.thresholds import METHODS

    parser.add_argument(
        "--method",
        default="calibrated",
        choices=METHODS,
        help="calibrated (default): highest expected F1 after calibration, rare classes lean on the others; "
        "half: 0.5; single: one for all classes; greedy: the paper's search; exact: every distinct probability; "
        "ratio: predict each class as often as expected",
    )
    parser.add_argument(
        "--combine",
        default="mean",
        choices=COMBINATIONS,
        help="mean: plain mean of the members (default); weighted: mean with weights found out of fold; "
        "rank: mean of ranks",
    )
    parser.add_argument(
        "--prior",
        type=Path,
        metavar="CSV",
        help="labels (Id,Target) whose class shares --method ratio must match (default: the out-of-fold samples')",
    )
    parser.add_argument(
        "--oof", type=Path, nargs="+", metavar="FILE", help="predictions to use instead of the recipes'"
    )
    parser.add_argument("--ids", type=Path, metavar="CSV", help="Ids of the rows of .npy files")
    parser.add_argument(
        "--labels", type=Path, metavar="CSV", help="Id,Target of the --oof samples (default: DATA/train.csv)"
    )
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="CSV",
        help="Id,group of the --oof samples, for example WORK/duplicates.csv: a group is never split (default: each "
        "sample is its own group)",
    )
    parser.add_argument(
        "--common-ids", action="store_true", help="leave out samples that are not in all files (default: refuse)"
    )
    parser.add_argument(
        "--reproduce",
        type=Path,
        metavar="CSV",
        help="find the thresholds that make this submission from the one --oof file",
    )
    parser.add_argument(
        "--compare",
        type=command_line.recipe_names,
        metavar="A,B",
        help="compare these runs on the samples that all of them predicted: scores, paired differences with "
        "intervals, classes won; writes WORK/comparison.json instead of thresholds",
    )


def add_submission_flags(parser: argparse.ArgumentParser) -> None:
    """Add what stage 07 combines, how it decides, and what it does instead."""
    parser.add_argument(
        "--fallback",
        choices=("argmax", "empty"),
        help="if no class passes its threshold, predict the most probable one (argmax, default) or none (empty)",
    )
    parser.add_argument(
        "--test", type=Path, nargs="+", metavar="FILE", help="predictions to use instead of the recipes'"
    )
    parser.add_argument("--ids", type=Path, metavar="CSV", help="Ids of the rows of .npy files")
    parser.add_argument("--thresholds", type=Path, metavar="JSON", help="default: WORK/thresholds.json")
    parser.add_argument(
        "--sample",
        type=Path,
        metavar="CSV",
        help="with --test: the submission's Ids in their order (default: DATA/sample_submission.csv)",
    )
    parser.add_argument("--out", type=Path, metavar="CSV", help="default: WORK/submission.csv")
    parser.add_argument("--check", type=Path, metavar="CSV", help="only check this submission against --sample")
    parser.add_argument(
        "--override-duplicates",
        action="store_true",
        help="give test samples that are near-identical to labelled ones (WORK/duplicate_pairs.csv) their labels "
        "instead of predictions; against the spirit of a test, so off by default",
    )
