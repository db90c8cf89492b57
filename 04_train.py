"""Train recipes on the chosen folds with the paper's whole method, going on where an earlier run stopped.

reads   WORK/folds.csv, WORK/samples.csv, WORK/images/<size>/ and <size>.csv
writes  WORK/runs/<recipe>/fold<k>/best.pt    network of the best epoch, for stage 05
        WORK/runs/<recipe>/fold<k>/last.pt    everything needed to go on after an interruption
        WORK/runs/<recipe>/fold<k>/log.jsonl  one line an epoch
        with --find-lr only lr_find.csv and lr_find.png there

A finished fold is left alone; one that was trained on other data or settings is refused without --force.

example python 04_train.py --recipe resnet50 --folds 0,2 --set alpha=0.999 batch_size=32
"""

from common import cli
from common.artifacts import Stage, read_table
from common.parallel import run_parallel
from common.recipes import fit_to_source, get_recipe, to_dict


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--recipe", type=cli.names, default=["resnet50"], metavar="NAME",
                        help="recipe to train, or several: a,b (default: resnet50)")
    parser.add_argument("--folds", type=cli.fold_numbers, metavar="0,2", help="folds to train (default: all)")
    parser.add_argument("--force", action="store_true", help="throw away what these folds have and train anew")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="change fields of the recipe")
    parser.add_argument("--find-lr", action="store_true", help="only run the learning rate finder and save its curve")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order, crops and dropout (default: 0)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="folds to train at once, each with its share of the cores; pays for small networks on a "
                             "CPU (default: 1)")
    cli.add_hardware_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    recipes = {name: get_recipe(name, args.settings) for name in args.recipe}
    samples = read_table(args.work / "samples.csv", f"python 01_preprocess.py --data {args.data} --work {args.work}")
    folds = read_table(args.work / "folds.csv", f"python 03_make_folds.py --work {args.work}")
    numbers = args.folds if args.folds is not None else sorted(set(folds["fold"]) - {-1})
    flags = (args.device, args.precision, args.workers)

    # Imported here, so that --help and mistakes on the command line do not wait for torch.
    from common.training import known_folds, prepare, train_job, training_inputs

    known_folds(args.work, folds, numbers)
    jobs = []
    for name, recipe in recipes.items():
        recipe = fit_to_source(recipe, int(samples["side"].min()))
        inputs = None if args.find_lr else training_inputs(args.work, folds, recipe)
        for fold in numbers:
            folder, label = args.work / "runs" / name / f"fold{fold}", f"{name} fold {fold}"
            if args.find_lr:
                find_lr(args, folder, folds, recipe, fold, flags, label)
                continue
            stage = Stage("04_train", folder / "best.pt", {**to_dict(recipe), "fold": fold, "seed": args.seed}, inputs)
            if args.force or not stage.is_current(rebuilds=False):
                jobs.append((stage, args.work, recipe, fold, args.seed, flags, label))
    # Every refusal comes before the first training.
    for stage, *_ in jobs:
        prepare(stage, args.force)
    if args.jobs == 1:
        for job in jobs:
            train_job(*job)
    else:
        list(run_parallel(train_job, jobs, args.jobs, "training", unit="folds"))


def find_lr(args, folder, folds, recipe, fold, flags, label):
    """Save the curve of the learning rate finder and say what it suggests."""
    from common.inference import choose_hardware
    from common.training import load_fold, lr_range_test, save_lr_curve

    data = load_fold(args.work, folds, fold, recipe, args.seed)
    suggestion = save_lr_curve(folder, *lr_range_test(data, recipe, choose_hardware(*flags), fold, args.seed))
    print(f"{label}: highest learning rate at which the loss still falls: {suggestion:.2g}; the recipe has "
          f"{', '.join(f'{rate:g}' for rate in recipe.group_learning_rates)}; curve: {folder / 'lr_find.png'}")


if __name__ == "__main__":
    cli.run(main)
