"""Find a threshold per class on out-of-fold probabilities, and score them on samples they have not seen.

reads   WORK/predictions/<recipe>/oof.npz of each recipe, and held_out.npz if there is one, WORK/folds.csv;
        or, with --oof, any predictions (.npz; .csv with Id and 28 columns; .npy with --ids) and --labels of their Ids
writes  WORK/thresholds.json   method, recipes, combine, weights, thresholds (28), single, score_cross_fitted, interval,
                               score_in_sample, per_class, members, combinations, methods; score_held_out,
                               interval_held_out; folds that each recipe is based on, n_folds; with --reproduce
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

from common.errors import UserError
from common.process import command_line
from common.process.main import run


def parse_args():
    from common.score.ensemble import COMBINATIONS
    from common.score.thresholds import METHODS

    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--recipes",
        type=command_line.recipe_names,
        default=command_line.RECIPES,
        metavar="A,B",
        help="recipes whose probabilities are combined (default: resnet50)",
    )
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
    from common.data.labels import parse_targets, read_labels
    from common.score.ensemble import combine, describe_ensemble, evaluate_ensemble, keep_common, stack_members
    from common.score.members import (
        check_origin,
        check_there,
        describe_missing_folds,
        folds_behind,
        held_out_files,
        labelled_rows,
        member_files,
        read_groups,
        read_members,
    )
    from common.score.thresholds import score_held_out

    if args.reproduce:
        return reproduce(args)
    if args.compare:
        from common.score.compare import comparison

        return print(comparison(Layout(args.work, args.data), args.compare, args.method))
    layout = Layout(args.work, args.data)
    hint = layout.command("05_predict_oof.py", "--recipes", ",".join(args.recipes))
    names, sources = member_files(args.oof, args.work, args.recipes, "oof")
    check_there(sources, None if args.oof else hint)
    if not args.oof:
        check_origin(args.work, args.recipes, "oof")
    labels = (args.labels or args.data / "train.csv") if args.oof else layout.folds
    labelled = read_labels(labels) if args.oof else layout.read_folds()
    aside = {} if args.oof else held_out_files(args.work, args.recipes, labelled, hint)
    also = {name: path for name, path in {"prior": args.prior, "groups": args.groups, "ids": args.ids}.items() if path}
    stage = Stage(
        "06_thresholds",
        layout.thresholds,
        {"method": args.method, "combine": args.combine, "recipes": names, "common_ids": args.common_ids},
        {"labels" if args.oof else "folds.csv": labels, **dict(zip(names, sources, strict=True)), **aside, **also},
    )
    if stage.is_current():
        return stage.say_current()
    members = read_members(sources, args.ids, None if args.oof else hint)
    wanted = labelled["Id"].to_numpy() if args.oof else members[0][0]
    if args.common_ids:
        members, wanted = keep_common(members, wanted)
    stack = stack_members(members, names, wanted, cure=" (--common-ids leaves them out)" if args.oof else "")
    rows = labelled_rows(labelled, wanted, hint)
    groups = (
        read_groups(args.groups, wanted) if args.groups else rows["group"].to_numpy() if "group" in rows else wanted
    )
    targets = parse_targets(rows["Target"])
    prior = parse_targets(read_labels(args.prior)["Target"]).mean(axis=0) if args.prior else None
    result = {"recipes": names, **evaluate_ensemble(targets, stack, names, groups, args.method, args.combine, prior)}
    if aside and len(aside) == len(sources):
        members = read_members(aside.values(), None, hint)
        rows = labelled_rows(labelled, members[0][0], hint)
        probs = combine(stack_members(members, names), args.combine, result["weights"])
        result |= score_held_out(parse_targets(rows["Target"]), probs, rows["group"].to_numpy(), result["thresholds"])
    behind = {} if args.oof else folds_behind(args.work, args.recipes, "oof")
    with stage.making() as record:
        write_json(stage.artifact, result | behind)
        record.rows, record.notes = len(wanted), behind
    print("06_thresholds: " + "\n  ".join(describe_ensemble(result)))
    if behind:
        print("\n".join(describe_missing_folds(behind, args.work)))


def reproduce(args):
    """Write the thresholds that make the submission --reproduce from the one file --oof."""
    from common.artifacts.files import write_json
    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage
    from common.score.ensemble import align
    from common.score.members import read_predictions, short_names
    from common.score.submission import check_submission, read_submission, recover

    if not args.oof or len(args.oof) != 1:
        raise UserError("--reproduce needs the one predictions file that the submission was made from: --oof FILE")
    submission = read_submission(args.reproduce)
    check_submission(submission, submission["Id"])
    ids, probs = read_predictions(args.oof[0], args.ids)
    (name,) = short_names(args.oof)
    stage = Stage(
        "06_thresholds",
        Layout(args.work).thresholds,
        {"reproduce": True},
        {name: args.oof[0], "submission": args.reproduce, **({"ids": args.ids} if args.ids else {})},
    )
    if stage.is_current():
        return stage.say_current()
    result = recover(align(ids, probs, submission["Id"], str(args.oof[0])), submission)
    with stage.making() as record:
        write_json(stage.artifact, {"recipes": [name], "combine": "mean", "weights": [1.0], **result})
        record.rows = len(ids)
    print(
        f"06_thresholds: {stage.artifact}: these thresholds and the fallback {result['fallback']} reproduce all "
        f"{len(ids)} rows of {args.reproduce}\n  " + " ".join(f"{value:g}" for value in result["thresholds"])
    )


if __name__ == "__main__":
    run(main)
