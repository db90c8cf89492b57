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
from common.score.options import add_threshold_flags


def parse_args():
    parser = command_line.parser(__doc__)
    command_line.add_recipes_flag(parser, "recipes whose probabilities are combined")
    add_threshold_flags(parser)
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
