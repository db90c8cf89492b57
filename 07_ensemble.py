"""Combine the test probabilities of all members, apply the thresholds and write the submission.

reads   WORK/predictions/<recipe>/test.npz of each recipe, WORK/thresholds.json, WORK/samples.csv
        WORK/left_out.csv: test samples that stage 01 left out get an empty row
        or, with --test, any predictions (.npz; .csv with Id and 28 columns; .npy with --ids), in the order in which
        stage 06 got the --oof of the same networks, and --sample
writes  WORK/submission.csv   Id, Predicted in the order of sample_submission.csv, checked (or --out); its .meta.json
                              says which folds each recipe is based on
        submissions.json beside the thresholds: where --out submissions are, for the page

example python 07_ensemble.py --work work --recipes resnet50
        python 07_ensemble.py --test a.npz b.csv --thresholds work/thresholds.json --sample sample_submission.csv
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.process import command_line
from common.process.main import run
from common.score.options import add_submission_flags


def parse_args():
    parser = command_line.parser(__doc__)
    command_line.add_recipes_flag(parser, "recipes whose probabilities are combined")
    add_submission_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    import numpy as np

    from common.artifacts.layout import Layout
    from common.artifacts.tables import write_csv
    from common.data.exposure import exposure_warning
    from common.score import submission
    from common.score.members import describe_missing_folds, folds_behind

    layout, own = Layout(args.work, args.data), not (args.test or args.check)
    order = layout.samples if own else args.sample or args.data / "sample_submission.csv"
    wanted = submission.wanted_ids(layout, order, own)
    if args.check:
        submission.check_submission(submission.read_submission(args.check), wanted)
        return print(f"07_ensemble: {args.check} is a valid submission of {len(wanted)} rows")
    lost = submission.left_out_samples(layout.left_out) if own else []
    if len(wanted) == 0:
        why = f"stage 01 left out all {len(lost)} test samples" if len(lost) else "the data has no test samples"
        return print(f"07_ensemble: {why}, so there is no submission to make")
    ensemble = submission.find_ensemble(layout, args.recipes, args.test, args.thresholds)
    if own and (warning := exposure_warning(args.work)):
        print(warning)
    known = submission.known_labels(layout.read_pairs(), wanted) if args.override_duplicates else None
    stage = stage_of(args, layout, ensemble, order)
    submission.remember_submission(args.work if own else ensemble.path.parent, stage.artifact)
    if stage.is_current():
        return stage.say_current()
    probs, thresholds = ensemble.predict(args.ids, wanted), np.array(ensemble.thresholds["thresholds"])
    predicted = submission.decide(probs, thresholds, stage.parameters["fallback"])
    if known is not None:
        predicted = submission.override(predicted, wanted, known)
    table = submission.submission_table(wanted, predicted)
    submission.check_submission(table, wanted)
    behind = folds_behind(args.work, args.recipes, "test") if own else {}
    with stage.making() as record:
        write_csv(stage.artifact, submission.with_empty_rows(table, lost) if len(lost) else table)
        record.rows, record.notes = len(wanted) + len(lost), behind
    found = submission.describe_submission(stage.artifact, predicted, ensemble.thresholds, ensemble.names, known, lost)
    print("07_ensemble: " + "\n".join(found))
    if behind:
        print("\n".join(describe_missing_folds(behind, args.work)))


def stage_of(args, layout, ensemble, order):
    """Return what is made from what."""
    from common.artifacts.stage import Stage
    from common.score.submission import check_out

    own, fallback = not args.test, args.fallback or ensemble.thresholds.get("fallback", "argmax")
    inputs = {"samples.csv" if own else "order": order, "thresholds.json": ensemble.path}
    inputs |= dict(zip(ensemble.names, ensemble.files, strict=True))
    if args.ids:
        inputs["ids"] = args.ids
    if args.override_duplicates:
        inputs["pairs"] = layout.duplicate_pairs
    if own and layout.left_out.is_file():
        inputs["left_out.csv"] = layout.left_out
    out = args.out or layout.submission
    check_out(out, inputs.values())
    parameters = {"fallback": fallback, "recipes": ensemble.names, "override_duplicates": args.override_duplicates}
    return Stage("07_ensemble", out, parameters, inputs)


if __name__ == "__main__":
    run(main)
