"""Train recipes on the chosen folds with the paper's whole method, resuming where an earlier run stopped.

reads   WORK/folds.csv, WORK/samples.csv, WORK/images/<size>/ and <size>.csv
writes  WORK/runs/<recipe>/fold<k>/best.pt    network of the best epoch, for stage 05
        WORK/runs/<recipe>/fold<k>/last.pt    everything needed to resume after an interruption
        WORK/runs/<recipe>/fold<k>/log.jsonl  one line per epoch
        WORK/runs/<recipe>/fold<k>/lr_find.csv, .png             curve of the learning rate finder
        WORK/runs/<recipe>/fold<k>/hard_samples.csv              Ids that the hard sampler kept most often
        WORK/runs/<recipe>/fold<k>/bad_batch.csv                 Ids and losses of the batch whose loss is not finite
        WORK/runs/<recipe>/fold<k>/hard_classes.csv              classes among the kept samples, per epoch
        WORK/runs/<recipe>/fold<k>/tensorboard/, wandb/, mlflow.txt   with --track

A finished fold is left alone. One that was trained on other data or settings is refused without --force.
A recipe's variants of the paper's ablation: resnet50-original, -customised, -hard, -eloss; resnet50 has everything.

example python 04_train.py --recipe resnet50 --folds 0,2 --set alpha=0.999 batch_size=32
        torchrun --nproc-per-node 4 04_train.py --recipe senet --folds 0
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.process import command_line
from common.process.main import run
from common.recipes import describe_fits, fit_to_source
from common.train.options import add_listing_flags, add_run_flags, add_training_flags, check_starts


def parse_args():
    parser = command_line.parser(__doc__)
    add_run_flags(parser)
    command_line.add_settings_flag(parser, "change fields of the recipe")
    add_listing_flags(parser)
    add_training_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    check_starts(args)

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.artifacts.experiments import asked_recipes
    from common.artifacts.layout import Layout
    from common.process.parallel import run_jobs

    if args.list_recipes or args.list_runs or args.list_encoders is not None:
        return print(listing(args))
    if args.cluster:
        args.work = args.work.resolve()  # workers run in another folder
    layout = Layout(args.work, args.data)
    recipes = asked_recipes(layout, args.recipe, args.settings, args.name, args.recipes_file)
    samples, folds = layout.read_samples(), layout.read_folds()

    # Imported here, so that --help and mistakes on the command line do not wait for torch.
    from common.data.folds import fold_numbers
    from common.train.checkpoints import prepare
    from common.train.continuing import continue_trainings
    from common.train.fold_data import known_folds
    from common.train.hardware import plan_hardware
    from common.train.jobs import Request, plan
    from common.train.loop import train_job
    from common.train.lr_finder import find_lr
    from common.train.trackers import check_trackers, track_finished

    trackers = check_trackers(args.track)
    numbers = args.folds if args.folds is not None else fold_numbers(folds)
    known_folds(args.work, folds, numbers)
    fitted = {name: fit_to_source(recipe, int(samples["side"].min())) for name, recipe in recipes.items()}
    if args.show_class_weights:
        from common.check.listing import class_weight_listing

        return print(class_weight_listing(fitted, folds, numbers))
    for line in describe_fits(recipes, fitted):
        print(line)
    options, hardware = plan_hardware(args, "04_train", len(recipes) * len(numbers))
    team = hardware.team
    force = args.force or args.find_lr
    request = Request(args.work, fitted, numbers, args.seed, force, args.pretrained, args.weights_dir, args.start_from)
    if args.more_cycles:
        continue_trainings(request, folds, team, args.more_cycles)
    jobs = plan(request, folds, team)
    if not args.find_lr:
        # Every refusal comes before the first training, and before --force deletes anything.
        if team.is_main:
            prepare([job.stage for job in jobs], args.force)
        team.agree("prepared")
        command_line.leave_out("--force")
    options = replace(options, jobs=max(1, min(options.jobs, len(jobs))))
    jobs = [replace(job, hardware=options, on_nan=args.on_nan, track=trackers) for job in jobs]
    do = find_lr if args.find_lr else train_job
    run_jobs(do, [(job,) for job in jobs], options.jobs, args.cluster, "training")
    if team.is_main:
        trained = {(job.name, job.fold) for job in jobs}
        track_finished(trackers, layout, (run for run in product(recipes, numbers) if run not in trained))
    team.leave()


def listing(args):
    """Return the recipes, the encoders, or the runs of the work folder, as text."""
    if args.list_recipes:
        from common.check.listing import recipe_listing

        return recipe_listing(args.json)
    if args.list_encoders is not None:
        from common.check.listing import encoder_listing

        return encoder_listing(args.list_encoders, args.weights_dir)
    from common.report.reader import Work
    from common.report.runs import run_listing

    return run_listing(Work(args.work))


if __name__ == "__main__":
    run(main)
