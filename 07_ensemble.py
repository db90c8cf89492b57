"""Average the test probabilities of all recipes, apply the thresholds and write the submission.

reads   WORK/predictions/<recipe>/test.npz of each recipe, WORK/thresholds.json, WORK/samples.csv
        WORK/left_out.csv: test samples that stage 01 left out get an empty row
writes  WORK/submission.csv   Id, Predicted in the order of sample_submission.csv, checked

example python 07_ensemble.py --work work --recipes resnet50
"""

from common import cli  # first: from here on Ctrl+C is no traceback

import numpy as np
import pandas as pd

from common.artifacts import Stage, load_predictions, read_json, read_table, write_csv
from common.ensemble import align, check_submission, decide, mean_predictions, submission_table, with_empty_rows
from common.errors import UserError, listing


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--recipes", type=cli.recipe_names, default=["resnet50"], metavar="A,B",
                        help="recipes whose probabilities are averaged (default: resnet50)")
    parser.add_argument("--fallback", default="argmax", choices=("argmax", "empty"),
                        help="where no class passes its threshold: the most probable one (default) or none")
    return parser.parse_args()


def main():
    args = parse_args()
    recipes = ",".join(args.recipes)
    samples = read_table(args.work / "samples.csv", f"python 01_preprocess.py --data {args.data} --work {args.work}")
    wanted = samples.loc[samples["part"] == "test", "Id"].to_numpy()
    if len(wanted) == 0:
        print("07_ensemble: the data has no test samples, so there is no submission to make")
        return
    found = args.work / "thresholds.json"
    if not found.is_file():
        raise UserError(f"{found} is missing; run: python 06_thresholds.py --work {args.work} --recipes {recipes}")
    thresholds = read_json(found)
    if thresholds["recipes"] != args.recipes:
        raise UserError(f"{found} was made for {','.join(thresholds['recipes'])}; "
                        f"run: python 06_thresholds.py --work {args.work} --recipes {recipes}")
    sources = [args.work / "predictions" / recipe / "test.npz" for recipe in args.recipes]
    hint = f"python 05_predict_oof.py --work {args.work} --recipes {recipes}"
    members = [load_predictions(path, hint) for path in sources]
    left_out = args.work / "left_out.csv"
    stage = Stage("07_ensemble", args.work / "submission.csv", {"fallback": args.fallback, "recipes": args.recipes},
                  {"samples.csv": args.work / "samples.csv", "thresholds.json": found,
                   **dict(zip(args.recipes, sources, strict=True))})
    if stage.is_current():
        return
    stage.begin()
    ids, probs = mean_predictions(members, [str(path) for path in sources])
    predicted = decide(align(ids, probs, wanted, "the test predictions"), np.array(thresholds["thresholds"]), args.fallback)
    lost = read_table(left_out, "") if left_out.is_file() else pd.DataFrame({"part": [], "Id": [], "place": []})
    lost = lost[lost["part"] == "test"]
    submission = submission_table(wanted, predicted)
    check_submission(submission, wanted)
    submission = with_empty_rows(submission, lost)
    write_csv(stage.artifact, submission)
    stage.finish(rows=len(submission))
    low, high = thresholds["interval"]
    print(f"07_ensemble: {stage.artifact}: {len(submission)} rows, {predicted.sum(axis=1).mean():.2f} labels a row, "
          f"{predicted.any(axis=0).sum()} classes; mean of {', '.join(args.recipes)}; cross-fitted out-of-fold "
          f"macro F1 {thresholds['score_cross_fitted']:.3f} [{low:.3f}, {high:.3f}]")
    if len(lost):
        print(f"warning: {len(lost)} test samples were left out by stage 01 and have empty rows:\n{listing(lost['Id'])}")


if __name__ == "__main__":
    cli.run(main)
