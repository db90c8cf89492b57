"""Split the kept samples into stratified folds, whole groups at a time, and oversample rare classes by copies.

reads   WORK/duplicates.csv
writes  WORK/folds.csv        Id, Target, part, group, fold, copies; fold -1 = for training only, -2 = held out
        WORK/folds.audit.csv  positives of each class in each fold
        WORK/folds.audit.json the same, with the largest deviation and the counts that must be 0

Copies count in training only: a validation fold holds every sample once.

example python 03_make_folds.py --work work --n-folds 5
"""

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.data import options
from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.parser(__doc__)
    options.add_fold_count(parser, int)
    parser.add_argument(
        "--max-copies",
        type=int,
        default=options.FOLDS.max_copies,
        metavar="N",
        help=f"copies of the rarest classes' samples; 1 = no oversampling (default: {options.FOLDS.max_copies})",
    )
    parser.add_argument(
        "--external",
        default=options.FOLDS.external,
        choices=options.GROUPED,
        help="use external samples for training only (default), or split them into folds like the others",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=options.FOLDS.hold_out,
        metavar="SHARE",
        help="set this share of the samples aside, neither trained on nor validated on (default: none)",
    )
    parser.add_argument(
        "--seed",
        type=command_line.not_negative,
        default=options.FOLDS.seed,
        help=f"seed of the split (default: {options.FOLDS.seed})",
    )
    args = parser.parse_args()
    if args.n_folds < 2:
        parser.error("--n-folds must be at least 2")
    if args.max_copies < 1:
        parser.error("--max-copies must be at least 1")
    if not 0 <= args.hold_out <= 0.5:
        parser.error("--hold-out must be a share from 0 to 0.5")
    return args


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.artifacts.files import write_json
    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage
    from common.artifacts.tables import write_csv
    from common.data.folds import audit, audit_table, describe_audit, make_folds

    layout = Layout(args.work, args.data)
    duplicates = layout.read_duplicates()
    settings = asdict(options.fold_options(args))
    stage = Stage("03_make_folds", layout.folds, settings, {"duplicates.csv": layout.duplicates})
    if stage.is_current():
        return stage.say_current()
    with stage.making() as record:
        folds = make_folds(duplicates, **settings)
        found = audit(folds)
        reports = [layout.folds.with_suffix(f".audit.{kind}") for kind in ("csv", "json")]
        write_csv(layout.folds, folds)
        write_csv(reports[0], audit_table(found))
        write_json(reports[1], found)
        record.rows, record.also = len(folds), reports
    print("\n  ".join([f"03_make_folds: {len(folds)} samples in {args.n_folds} folds", *describe_audit(found)]))


if __name__ == "__main__":
    run(main)
