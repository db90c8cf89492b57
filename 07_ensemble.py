"""Combine the test probabilities of all members, apply the thresholds and write the submission.

reads   WORK/predictions/<recipe>/test.npz of each recipe, WORK/thresholds.json, WORK/samples.csv
        WORK/left_out.csv: test samples that stage 01 left out get an empty row
        or, with --test, any predictions (.npz; .csv with Id and 28 columns; .npy with --ids), in the order in which
        stage 06 had the --oof of the same networks, and --sample
writes  WORK/submission.csv   Id, Predicted in the order of sample_submission.csv, checked (or --out); its .meta.json
                              says which folds each recipe stands on
        submissions.json beside the thresholds: where --out submissions lie, for the page

example python 07_ensemble.py --work work --recipes resnet50
        python 07_ensemble.py --test a.npz b.csv --thresholds work/thresholds.json --sample sample_submission.csv
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where Python runs with -P or -I it is not there

from common.errors import UserError
from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--recipes",
        type=command_line.recipe_names,
        default=["resnet50"],
        metavar="A,B",
        help="recipes whose probabilities are combined (default: resnet50)",
    )
    parser.add_argument(
        "--fallback",
        choices=("argmax", "empty"),
        help="where no class passes its threshold: the most probable one (default) or none",
    )
    parser.add_argument(
        "--test", type=Path, nargs="+", metavar="FILE", help="predictions to use in place of the recipes'"
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
        help="give test samples that are near-identical to labelled ones (WORK/duplicate_pairs.csv) their "
        "labels in place of the predicted ones; against the spirit of a test, so off by default",
    )
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C meanwhile ends in one message.
    import numpy as np

    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage
    from common.artifacts.tables import write_csv
    from common.data.exposure import exposure_warning
    from common.score.ensemble import combine, stack_members
    from common.score.members import (
        check_networks,
        check_origin,
        check_there,
        describe_missing_folds,
        folds_behind,
        member_files,
        read_members,
    )
    from common.score.submission import (
        check_out,
        check_submission,
        decide,
        describe_submission,
        known_labels,
        left_out_samples,
        override,
        read_submission,
        read_thresholds,
        remember_submission,
        submission_table,
        with_empty_rows,
    )

    recipes = ",".join(args.recipes)
    own = not (args.test or args.check)
    layout = Layout(args.work, args.data)
    order = layout.samples if own else args.sample or args.data / "sample_submission.csv"
    wanted = wanted_ids(args, order, own)
    if args.check:
        check_submission(read_submission(args.check), wanted)
        print(f"07_ensemble: {args.check} is a valid submission of {len(wanted)} rows")
        return
    if len(wanted) == 0:
        lost = left_out_samples(layout.left_out) if own else ()
        why = f"stage 01 left out all {len(lost)} test samples" if len(lost) else "the data has no test samples"
        print(f"07_ensemble: {why}, so there is no submission to make")
        return
    found = args.thresholds or layout.thresholds
    makes = "--oof FILES --labels CSV" if args.test else shlex.join([*layout.flags(), "--recipes", recipes])
    thresholds = read_thresholds(found, None if args.test else args.recipes, makes)
    names, sources = member_files(args.test, args.work, args.recipes, "test")
    if len(names) != len(thresholds["weights"]):
        raise UserError(
            f"{found} is for {len(thresholds['weights'])} members ({', '.join(thresholds['recipes'])}), found "
            f"{len(names)}: {', '.join(names)}; give the same networks in the same order"
        )
    makes_members = None if args.test else layout.command("05_predict_oof.py", "--recipes", recipes)
    check_there(sources, makes_members)
    if own:
        if warning := exposure_warning(args.work):
            print(warning)
        check_origin(args.work, args.recipes, "test")
        check_networks(args.work, args.recipes, "test", makes_members)
    fallback = args.fallback or thresholds.get("fallback", "argmax")
    also, known = {"ids": args.ids} if args.ids else {}, None
    if args.override_duplicates:
        also["pairs"] = layout.duplicate_pairs
        known = known_labels(layout.read_pairs(), wanted)
    if own and layout.left_out.is_file():
        also["left_out.csv"] = layout.left_out
    inputs = {
        "samples.csv" if own else "order": order,
        "thresholds.json": found,
        **dict(zip(names, sources, strict=True)),
        **also,
    }
    out = args.out or layout.submission
    check_out(out, inputs.values())
    stage = Stage(
        "07_ensemble",
        out,
        {"fallback": fallback, "recipes": names, "override_duplicates": args.override_duplicates},
        inputs,
    )
    remember_submission(args.work if own else found.parent, out)
    if stage.is_current():
        return stage.say_current()
    members = read_members(sources, args.ids, makes_members)
    probs = combine(stack_members(members, names, wanted), thresholds["combine"], thresholds["weights"])
    predicted = decide(probs, np.array(thresholds["thresholds"]), fallback)
    if known is not None:
        predicted = override(predicted, wanted, known)
    submission = submission_table(wanted, predicted)
    check_submission(submission, wanted)
    lost = left_out_samples(layout.left_out) if own else []
    submission = with_empty_rows(submission, lost) if len(lost) else submission
    behind = folds_behind(args.work, args.recipes, "test") if own else {}
    with stage.making() as record:
        write_csv(stage.artifact, submission)
        record.rows, record.notes = len(submission), behind
    print("07_ensemble: " + "\n".join(describe_submission(stage.artifact, predicted, thresholds, names, known, lost)))
    if behind:
        print("\n".join(describe_missing_folds(behind, args.work)))


def wanted_ids(args, order, own):
    """Return the Ids of the submission in its order."""
    from common.artifacts.layout import Layout
    from common.data.labels import read_csv

    if not own:
        return read_csv(order)["Id"].to_numpy()
    samples = Layout(args.work, args.data).read_samples()
    return samples.loc[samples["part"] == "test", "Id"].to_numpy()


if __name__ == "__main__":
    run(main)
