"""Find a threshold per class on out-of-fold probabilities, and score them on samples they have not seen.

reads   WORK/predictions/<recipe>/oof.npz of each recipe, and held_out.npz if there is one, WORK/folds.csv;
        or, with --oof, any predictions (.npz; .csv with Id and 28 columns; .npy with --ids) and --labels of their Ids
writes  WORK/thresholds.json   method, recipes, combine, weights, thresholds (28), calibration (28, 3), single,
                               score_cross_fitted, interval, score_in_sample, per_class, members, combinations,
                               methods; score_held_out, interval_held_out; folds that each recipe is based on, n_folds; with --reproduce
                               method, thresholds, limits, fallback

Its first figure is cross-fitted: macro F1 on rows that were not used to find thresholds or weights.

example python 06_thresholds.py --work work --recipes resnet50,senet
        python 06_thresholds.py --work work --compare demo,demo_large
        python 06_thresholds.py --oof a.npz b.csv --labels train.csv --work work
        python 06_thresholds.py --oof test.npy --ids sample_submission.csv --reproduce submission.csv --work work
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.process import command_line
from common.process.main import run


def parse_args():
    from common.score.ensemble import COMBINATIONS
    from common.score.thresholds import METHODS

    parser = command_line.parser(__doc__)
    command_line.add_recipes_flag(parser, "recipes whose probabilities are combined")
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
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.artifacts.files import write_json
    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage
    from common.data.labels import class_shares
    from common.score.compare import comparison
    from common.score.ensemble import describe_ensemble, evaluate_ensemble
    from common.score.labelled import find_labelled
    from common.score.members import describe_missing_folds, folds_behind
    from common.score.submission import reproduce

    layout = Layout(args.work, args.data)
    if args.compare:
        return print(comparison(layout, args.compare, args.method))
    if args.reproduce:
        return reproduce(layout, args.oof, args.ids, args.reproduce)
    labelled = find_labelled(layout, args.recipes, args.oof, args.labels)
    also = {name: path for name, path in {"prior": args.prior, "groups": args.groups, "ids": args.ids}.items() if path}
    settings = {
        "method": args.method,
        "combine": args.combine,
        "recipes": labelled.names,
        "common_ids": args.common_ids,
    }
    stage = Stage("06_thresholds", layout.thresholds, settings, {**labelled.inputs(), **also})
    if stage.is_current():
        return stage.say_current()
    samples = labelled.read(args.ids, args.groups, args.common_ids)
    result = {"recipes": labelled.names} | evaluate_ensemble(
        samples.targets,
        samples.stack,
        labelled.names,
        samples.groups,
        args.method,
        args.combine,
        class_shares(args.prior) if args.prior else None,
    )
    result |= labelled.held_out_score(result, args.combine)
    behind = {} if args.oof else folds_behind(args.work, args.recipes, "oof")
    with stage.making() as record:
        write_json(stage.artifact, result | behind)
        record.rows, record.notes = len(samples.targets), behind
    print("06_thresholds: " + "\n  ".join(describe_ensemble(result)))
    if behind:
        print("\n".join(describe_missing_folds(behind, args.work)))


if __name__ == "__main__":
    run(main)
