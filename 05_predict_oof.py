"""Predict each fold's validation samples and all test samples with the fold's best network.

reads   WORK/runs/<recipe>/fold<k>/best.pt, WORK/folds.csv, WORK/samples.csv, WORK/images/
writes  WORK/predictions/<recipe>/fold<k>_oof.npz, fold<k>_test.npz   of one fold
        WORK/predictions/<recipe>/oof.npz    out-of-fold rows of all predicted folds, each sample once
        WORK/predictions/<recipe>/test.npz   the mean over the folds; also held_out.npz if stage 03 held samples out
        They cover --folds, and folds that earlier runs predicted the same way with networks that still exist.
        each: ids (n,), probs (n, 28) float32 in [0, 1], classes (28,)

example python 05_predict_oof.py --work work --recipes resnet50 --folds 0,1,2,3,4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.parser(__doc__)
    command_line.add_recipes_flag(parser, "recipes to predict with")
    parser.add_argument(
        "--folds", type=command_line.fold_numbers, metavar="0,2", help="folds to predict (default: all)"
    )
    command_line.add_test_flags(parser)
    parser.add_argument(
        "--view",
        default="whole",
        choices=("whole", "crops"),
        help="predict whole images (default) or the mean of five crops",
    )
    parser.add_argument(
        "--checkpoint",
        default="best",
        choices=("best", "last"),
        help="network of the best validation epoch (default) or of the last epoch",
    )
    parser.add_argument(
        "--batch-size", type=command_line.positive, default=32, metavar="N", help="images at once (default: 32)"
    )
    command_line.add_hardware_flags(parser)
    command_line.add_cluster_flag(parser)
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.artifacts.layout import Layout
    from common.process.parallel import run_jobs
    from common.score.members import describe_folds

    if args.cluster:
        args.work = args.work.resolve()  # workers run in another folder
    layout = Layout(args.work, args.data)
    folds, samples = layout.read_folds(), layout.read_samples()

    from common.data.exposure import exposure_warning
    from common.data.folds import HOLD_OUT, fold_numbers

    if warning := exposure_warning(args.work):
        print(warning)

    means = {
        "held_out": folds[folds["fold"] == HOLD_OUT],
        "test": samples[(samples["part"] == "test") & (not args.no_test)],
    }
    means = {part: rows for part, rows in means.items() if len(rows)}
    numbers = args.folds if args.folds is not None else fold_numbers(folds)
    settings = {"tta": args.tta, "view": args.view, "checkpoint": args.checkpoint}

    from common.train.checkpoints import check_alike
    from common.train.hardware import plan_hardware
    from common.train.predict import PredictionJob, combine_folds, predict_job, predicted_folds

    options, _ = plan_hardware(args, "05_predict_oof", len(args.recipes) * len(numbers), training=False)
    jobs = [
        PredictionJob(args.work, recipe, fold, folds, means, settings, args.batch_size, options)
        for recipe in args.recipes
        for fold in numbers
    ]
    for recipe in args.recipes:
        check_alike(args.work, recipe, numbers)
    run_jobs(predict_job, [(job,) for job in jobs], options.jobs, args.cluster, "predicting")
    for recipe, job in {job.name: job for job in jobs}.items():
        for part, some in predicted_folds(job, numbers).items():
            combine_folds(job, part, some)
            print(
                f"05_predict_oof: {layout.predictions(recipe, part)} {describe_folds(some, len(fold_numbers(folds)))}"
            )


if __name__ == "__main__":
    run(main)
