"""Split the kept samples into stratified folds, whole groups at a time, and oversample rare classes by copies.

reads   WORK/duplicates.csv
writes  WORK/folds.csv   Id, Target, part, group, fold, copies; fold -1 = for training only

Copies count in training only: a validation fold holds every sample once.

example python 03_make_folds.py --work work --n-folds 5
"""

from common import cli
from common.artifacts import Stage, read_table, write_csv
from common.folds import audit, make_folds


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--n-folds", type=int, default=5, metavar="N", help="number of folds (default: 5)")
    parser.add_argument("--max-copies", type=int, default=4, metavar="N",
                        help="copies of the rarest classes' samples; 1 = no oversampling (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")
    args = parser.parse_args()
    if args.n_folds < 2:
        parser.error("--n-folds must be at least 2")
    if args.max_copies < 1:
        parser.error("--max-copies must be at least 1")
    return args


def main():
    args = parse_args()
    source, table = args.work / "duplicates.csv", args.work / "folds.csv"
    duplicates = read_table(source, f"python 02_dedup.py --work {args.work}")
    stage = Stage("03_make_folds", table,
                  {"n_folds": args.n_folds, "max_copies": args.max_copies, "seed": args.seed},
                  {"duplicates.csv": source})
    if stage.is_current():
        return
    stage.begin()
    folds = make_folds(duplicates, args.n_folds, args.max_copies, args.seed)
    write_csv(table, folds)
    stage.finish(rows=len(folds))
    print("\n  ".join([f"03_make_folds: {len(folds)} samples in {args.n_folds} folds", *audit(folds)]))


if __name__ == "__main__":
    cli.run(main)
