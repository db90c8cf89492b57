"""Train a recipe on the chosen folds with the paper's whole method, going on where an earlier run stopped.

reads   WORK/folds.csv, WORK/images/<size>/ and <size>.csv
writes  WORK/runs/<recipe>/fold<k>/best.pt    network of the best epoch, for stage 05
        WORK/runs/<recipe>/fold<k>/last.pt    everything needed to go on after an interruption
        WORK/runs/<recipe>/fold<k>/log.jsonl  one line an epoch
        with --find-lr only lr_find.csv and lr_find.png there

A finished fold is left alone; one that was trained on other data or settings is refused without --force.

example python 04_train.py --recipe resnet50 --folds 0,2 --set alpha=0.999 batch_size=32
"""

import shutil

from common import cli
from common.artifacts import Stage, read_table
from common.errors import UserError
from common.recipes import fit_to_source, get_recipe, to_dict


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--recipe", default="resnet50", metavar="NAME", help="recipe to train (default: resnet50)")
    parser.add_argument("--folds", type=cli.fold_numbers, metavar="0,2", help="folds to train (default: all)")
    parser.add_argument("--force", action="store_true", help="throw away what these folds have and train anew")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="change fields of the recipe")
    parser.add_argument("--find-lr", action="store_true", help="only run the learning rate finder and save its curve")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order, crops and dropout (default: 0)")
    cli.add_hardware_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    recipe = get_recipe(args.recipe, args.settings)
    samples = read_table(args.work / "samples.csv", f"python 01_preprocess.py --data {args.data} --work {args.work}")
    folds = read_table(args.work / "folds.csv", f"python 03_make_folds.py --work {args.work}")
    recipe = fit_to_source(recipe, int(samples["side"].min()))
    numbers = args.folds if args.folds is not None else sorted(set(folds["fold"]) - {-1})

    # Imported here, so that --help and mistakes on the command line do not wait for torch.
    from common.inference import choose_hardware
    from common.training import load_fold, lr_range_test, save_lr_curve, train_fold, training_inputs

    hardware = choose_hardware(args.device, args.precision, args.workers)
    inputs = training_inputs(args.work, folds, recipe)
    for fold in numbers:
        folder = args.work / "runs" / args.recipe / f"fold{fold}"
        label = f"{args.recipe} fold {fold}"
        data = load_fold(args.work, folds, fold, recipe, args.seed)
        if args.find_lr:
            suggestion = save_lr_curve(folder, *lr_range_test(data, recipe, hardware, fold, args.seed))
            print(f"{label}: highest learning rate at which the loss still falls: {suggestion:.2g}; the recipe has "
                  f"{', '.join(f'{rate:g}' for rate in recipe.group_learning_rates)}; curve: {folder / 'lr_find.png'}")
            continue
        stage = Stage("04_train", folder / "best.pt", {**to_dict(recipe), "fold": fold, "seed": args.seed}, inputs)
        if not args.force and stage.is_current():
            continue
        prepare(folder, stage, args.force)
        run = train_fold(folder, data, recipe, hardware, fold, args.seed, stage.made_from(), label)
        stage.finish(rows=len(data.train), also=[folder / "last.pt", folder / "log.jsonl"],
                     epochs=run.epoch, score_best=run.best_score)


def prepare(folder, stage, force):
    """Refuse to overwrite or continue a run that was made from something else; clear it with --force."""
    from common.training import load_checkpoint

    if force:
        shutil.rmtree(folder, ignore_errors=True)
        return
    if stage.sidecar.is_file():
        raise UserError(f"{folder} holds a finished training made from something else ({stage.why_stale()}); "
                        "use --force to throw it away and train anew, or another --work")
    if (folder / "last.pt").is_file():
        changes = stage.changes(load_checkpoint(folder / "last.pt")["made_from"])
        if changes:
            raise UserError(f"{folder} holds an unfinished training made from something else ({changes}); "
                            "use --force to throw it away and train anew, or another --work")


if __name__ == "__main__":
    cli.run(main)
