"""The options of stages 01 and 03, with their defaults and flags; the check has these flags too.

This module loads neither numpy nor pandas, so --help is quick.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

from common.experiments import read_recipes_file
from common.process import command_line
from common.process.command_line import ArgumentContainer, Parser, whole_number
from common.recipes import Recipe, get_recipes

KINDS = ("zstd", "raw")  # of stored images, the default first
GROUPED = ("train", "stratified")  # how external samples are split, the default first


class Levels(NamedTuple):
    """The 16-bit values that become 0 and 255."""

    black: int = 0
    white: int = 65535


WHOLE = Levels()


# --- stage 01 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IngestOptions:
    """The options of stage 01.

    recipes : name -> recipe whose images are stored; `ingest.with_sizes` fits them to the sources
    levels : of 16-bit files
    keep_going : leave out samples that cannot be used, instead of an error
    raw : store large images uncompressed; compressed ones are made again
    limit : use this many training samples; None = all
    """

    recipes: dict[str, Recipe]
    levels: Levels = WHOLE
    keep_going: bool = False
    raw: bool = False
    limit: int | None = None


def ingest_options(args: argparse.Namespace, say: Callable[[str], object] = print, keep: bool = True) -> IngestOptions:
    """Return the options from the flags of `add_ingest_flags`; `say` gets notes about the recipes' settings."""
    from common.artifacts.experiments import add_experiments, read_experiments
    from common.artifacts.layout import Layout

    layout, listed = Layout(args.work), read_recipes_file(args.recipes_file) if args.recipes_file else {}
    experiments = add_experiments(layout, listed) if keep else {**read_experiments(layout), **listed}
    recipes = get_recipes(args.recipes, args.settings, say, experiments)
    levels = Levels(args.black_level, args.white_level)
    return IngestOptions(recipes, levels, args.keep_going, args.store == "raw", args.limit)


def add_ingest_flags(parser: Parser) -> None:
    """Add the flags of stage 01 to a command line: samples, sizes and number of processes."""
    parser.add_argument(
        "--recipes",
        type=command_line.recipe_names,
        metavar="A,B",
        help="make the image sizes of these recipes (default: those of --recipes-file, or resnet50)",
    )
    command_line.add_recipes_file_flag(parser)
    command_line.add_settings_flag(parser, "change a field of the recipes, as in stage 04")
    parser.add_argument(
        "--limit", type=command_line.positive, metavar="N", help="use only N training samples, drawn at random"
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="leave out samples with missing or bad files, by name, instead of an error at the end",
    )
    add_pixel_flags(parser)
    add_jobs_flags(parser)


def add_pixel_flags(parser: Parser) -> None:
    """Add flags to a command line for how pixels become stored images."""
    parser.add_argument(
        "--store",
        choices=KINDS,
        default=KINDS[0],
        help="how images above 256 px are stored: compressed, or raw with about four times the size, which "
        f"stages 04 and 05 read three times as fast (default: {KINDS[0]})",
    )
    add_level_flags(parser)


def add_level_flags(parser: Parser) -> None:
    """Add flags to a command line for which 16-bit values become black and white."""
    parser.add_argument(
        "--white-level",
        type=whole_number(1, WHOLE.white),
        default=WHOLE.white,
        metavar="V",
        help=f"value of 16-bit files that becomes 255, for example 4095 for 12-bit cameras (default: {WHOLE.white})",
    )
    parser.add_argument(
        "--black-level",
        type=whole_number(0, WHOLE.white - 1),
        default=WHOLE.black,
        metavar="V",
        help="value of 16-bit files that becomes 0, for example 32768 if a microscope adds that to all "
        f"(default: {WHOLE.black})",
    )


def add_jobs_flags(parser: Parser) -> None:
    """Add --jobs and --cluster for stages with many short jobs."""
    parser.add_argument(
        "--jobs", type=command_line.jobs, default=-1, metavar="N", help="worker processes (default: all cores)"
    )
    command_line.add_cluster_flag(parser)


def check_levels(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse a black level that is not below the white one."""
    if args.black_level >= args.white_level:
        parser.error(f"--black-level {args.black_level} must be below --white-level {args.white_level}")


# --- stage 03 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldOptions:
    """How stage 03 splits; see `folds.make_folds`."""

    n_folds: int = 5
    max_copies: int = 4
    seed: int = 0
    external: str = GROUPED[0]
    hold_out: float = 0.0


FOLDS = FoldOptions()


def add_fold_count(parser: ArgumentContainer, kind: Callable[[str], int]) -> None:
    """Add --n-folds to a command line; kind : parses its value."""
    parser.add_argument(
        "--n-folds", type=kind, default=FOLDS.n_folds, metavar="N", help=f"number of folds (default: {FOLDS.n_folds})"
    )


def fold_options(args: argparse.Namespace) -> FoldOptions:
    """Return the options from the flags of stage 03."""
    return FoldOptions(**{field.name: getattr(args, field.name) for field in fields(FoldOptions)})
