"""Report what will fail before days are spent: check machine, input, labels, weights, disk and time of a whole run.

reads   what stages 01 to 05 read
writes  nothing

It takes the flags of stage 01, and some of the later stages. 01_preprocess.py --check does the same.

example python -m common.check --data data --work work --recipes resnet50
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # needed if started by its path

from common.check.checks import examine
from common.data import options
from common.experiments import asked_names
from common.process import command_line
from common.process.main import run


def parse_args() -> argparse.Namespace:
    parser = command_line.parser(__doc__ or "")
    parser.prog = "python -m common.check"
    options.add_ingest_flags(parser)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    group = parser.add_argument_group("of the later stages")
    group.add_argument("--folds", type=command_line.fold_numbers, metavar="0,2", help="folds to train (default: all)")
    options.add_fold_count(group, command_line.whole_number(2))
    command_line.add_test_flags(group)
    command_line.add_weight_flags(group)
    args = parser.parse_args()
    options.check_levels(parser, args)
    args.recipes = asked_names(args.recipes, args.recipes_file)
    return args


def main() -> None:
    examine(parse_args())


if __name__ == "__main__":
    run(main)
