"""Find a threshold per class on the averaged out-of-fold probabilities: a single one, then greedily per class.

reads   WORK/predictions/<recipe>/oof.npz of each recipe, and held_out.npz where there is one, WORK/folds.csv
writes  WORK/thresholds.json   method, recipes, thresholds (28), single, score_cross_fitted, interval,
                               score_in_sample, per_class; score_held_out, interval_held_out

Its first figure is cross-fitted: macro F1 on rows that the thresholds were not searched on.

example python 06_thresholds.py --work work --recipes resnet50
"""

from common import cli
from common.artifacts import Stage, load_predictions, read_table
from common.ensemble import mean_predictions
from common.errors import UserError, listing
from common.files import write_json
from common.labels import absent_classes, parse_targets
from common.thresholds import METHODS, evaluate_thresholds, score_held_out


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--recipes", type=cli.recipe_names, default=["resnet50"], metavar="A,B",
                        help="recipes whose probabilities are averaged (default: resnet50)")
    parser.add_argument("--method", default="greedy", choices=METHODS,
                        help="one threshold for all classes, or the paper's greedy search from there (default)")
    return parser.parse_args()


def main():
    args = parse_args()
    sources = [args.work / "predictions" / recipe / "oof.npz" for recipe in args.recipes]
    hint = f"python 05_predict_oof.py --work {args.work} --recipes {','.join(args.recipes)}"
    folds = read_table(args.work / "folds.csv", f"python 03_make_folds.py --work {args.work}")
    members = [load_predictions(path, hint) for path in sources]
    held_out = {f"{path.parent.name} held out": path for path in (source.with_name("held_out.npz") for source in sources)
                if path.is_file()}
    stage = Stage("06_thresholds", args.work / "thresholds.json", {"method": args.method, "recipes": args.recipes},
                  {"folds.csv": args.work / "folds.csv", **dict(zip(args.recipes, sources, strict=True)), **held_out})
    if stage.is_current():
        return
    stage.begin()
    labelled = folds.set_index("Id")
    rows, probs = labelled_mean(members, sources, labelled, hint)
    targets = parse_targets(rows["Target"])
    result = {"recipes": args.recipes, **evaluate_thresholds(targets, probs, rows["group"].to_numpy(), args.method)}
    if len(held_out) == len(sources):
        members = [load_predictions(path, hint) for path in held_out.values()]
        unseen, probs = labelled_mean(members, held_out.values(), labelled, hint)
        result |= score_held_out(parse_targets(unseen["Target"]), probs, result["thresholds"])
    write_json(stage.artifact, result)
    stage.finish(rows=len(rows))
    report(result, targets)


def labelled_mean(members, sources, labelled, hint):
    """Return the rows of folds.csv that are predicted, and the members' mean probabilities."""
    ids, probs = mean_predictions(members, [str(path) for path in sources])
    unknown = [Id for Id in ids if Id not in labelled.index]
    if unknown:
        raise UserError(f"the predictions have Ids that folds.csv does not have; run: {hint}\n{listing(unknown)}")
    return labelled.loc[ids], probs


def report(result, targets):
    """Print the honest score first, the flattering one second."""
    low, high = result["interval"]
    print(f"06_thresholds: macro F1 {result['score_cross_fitted']:.3f} [{low:.3f}, {high:.3f}] cross-fitted, "
          f"{result['n_samples']} out-of-fold samples, mean of {', '.join(result['recipes'])}")
    print(f"  on the rows that the thresholds were searched on, so flattering: {result['score_in_sample']:.3f}; "
          f"at 0.5: {result['score_at_half']:.3f}; single threshold: {result['single']:.2f}")
    if "score_held_out" in result:
        low, high = result["interval_held_out"]
        print(f"  on the {result['n_held_out']} samples held out, decided by the mean of all folds: "
              f"{result['score_held_out']:.3f} [{low:.3f}, {high:.3f}]")
    absent = absent_classes(targets)
    if absent:
        print(f"  over the {result['n_present']} classes present: {result['score_cross_fitted_present']:.3f}; "
              f"warning: {len(absent)} classes have no sample and count as 0: {', '.join(absent)}")


if __name__ == "__main__":
    cli.run(main)
