"""The flags of stage 04: what it trains and how. This module loads no torch, so --help is quick."""

import argparse

from common.errors import UserError
from common.process import command_line


def check_starts(args: argparse.Namespace) -> None:
    """Refuse flags that start a training in two ways."""
    given = [
        flag
        for flag, value in (
            ("--more-cycles", args.more_cycles),
            ("--start-from", args.start_from),
            ("--pretrained", args.pretrained not in ("auto", "none")),
            ("--force", args.force and args.more_cycles),
            ("--find-lr", args.find_lr and args.more_cycles),
        )
        if value
    ]
    if args.start_from and args.pretrained == "none":
        given.append("--pretrained none")
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} contradict each other; give one of them")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add which recipes and folds are trained, under which name, and whether again."""
    parser.add_argument(
        "--recipe",
        type=command_line.recipe_names,
        metavar="A,B",
        help="recipes to train (default: those of --recipes-file, or resnet50); resnet50@1024: with images of 1024 px",
    )
    command_line.add_recipes_file_flag(parser)
    parser.add_argument(
        "--name",
        metavar="NAME",
        help="train the one --recipe, with the changes of --set, as a run of this name; in this work folder the name "
        "can then be used like a recipe's",
    )
    parser.add_argument("--folds", type=command_line.fold_numbers, metavar="0,2", help="folds to train (default: all)")
    parser.add_argument("--force", action="store_true", help="discard what these folds have and train from scratch")


def add_listing_flags(parser: argparse.ArgumentParser) -> None:
    """Add to a command line what it lists or measures instead of training."""
    parser.add_argument(
        "--list-runs", action="store_true", help="only print the runs in --work: state, score, settings that differ"
    )
    parser.add_argument("--list-recipes", action="store_true", help="only print the recipes and their networks")
    parser.add_argument(
        "--list-encoders", nargs="?", const="", metavar="PATTERN", help="only print encoders; with PATTERN also timm's"
    )
    parser.add_argument("--json", action="store_true", help="with --list-recipes: every field, as JSON")
    parser.add_argument("--show-class-weights", action="store_true", help="only print the E-loss weights of each class")
    parser.add_argument("--find-lr", action="store_true", help="only run the learning rate finder and save its curve")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add to a command line where a training starts, how it runs, and on what hardware."""
    command_line.add_weight_flags(parser)
    parser.add_argument(
        "--start-from",
        type=command_line.one_run,
        metavar="RUN",
        help="start each fold from the best network of the same fold of another run in --work, for example of smaller "
        "images; encoder, and head if it fits",
    )
    parser.add_argument(
        "--more-cycles",
        type=command_line.positive,
        metavar="N",
        help="continue finished trainings from last.pt for up to N cycles beyond their first end; the schedule and the "
        "rule to end early stay",
    )
    parser.add_argument(
        "--seed",
        type=command_line.not_negative,
        default=command_line.SEED,
        help=f"seed of weights, order, crops and dropout (default: {command_line.SEED})",
    )
    parser.add_argument(
        "--micro-batch",
        type=command_line.positive,
        metavar="N",
        help="images in memory at once; a batch accumulates gradients over several of these (default: the whole batch, "
        "halved when a GPU runs out of memory)",
    )
    parser.add_argument(
        "--on-nan",
        default="stop",
        choices=("stop", "back"),
        help="when the loss is no longer finite: stop (default), or go back to the start of the epoch with half the "
        "learning rates, at most three times",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        dest="compiled",
        help="compile the network with torch.compile before training (default: off; on CPUs it takes a minute and "
        "gains nothing)",
    )
    parser.add_argument(
        "--memory-format",
        default="channels-last",
        choices=("channels-last", "contiguous"),
        help="memory layout of tensors during training (default: channels-last, the faster one)",
    )
    command_line.add_tracking_flags(parser)
    command_line.add_hardware_flags(parser)
    command_line.add_cluster_flag(parser)
