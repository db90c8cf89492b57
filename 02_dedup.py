"""Find near-identical samples by perceptual hashes, group them, and choose which stay for training.

reads   WORK/samples.csv, WORK/images/128/
writes  WORK/duplicates.csv       Id, part, Target, group, kept (1 or 0) of every labelled sample
        WORK/duplicate_pairs.csv  all pairs within the distance, with test samples too; distances in bits of 64

Nothing is removed from test. Within a group of duplicates one sample for each distinct label set stays, unless
a class would fall below --floor samples. Thresholds are for the red, green and blue channel, all must hold.

example python 02_dedup.py --work work --threshold 12,12,12
"""

import argparse

import numpy as np

from common import cli
from common.artifacts import Stage, read_table, write_csv
from common.errors import listing
from common.hashing import duplicate_tables, hash_file
from common.parallel import run_parallel
from common.preprocess import HASH_SIZE


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--threshold", type=thresholds, default=(12, 12, 12), metavar="R,G,B",
                        help="largest distance in bits of 64 per channel, or one for all (default: 12)")
    parser.add_argument("--floor", type=int, default=50, metavar="N",
                        help="take no class below N kept samples (default: 50)")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="worker processes (default: all cores)")
    return parser.parse_args()


def thresholds(text):
    values = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(values) not in (1, 3) or len(values) != len(text.split(",")) or max(values) > 64:
        raise argparse.ArgumentTypeError(f"expected one or three distances from 0 to 64, found {text!r}")
    return tuple(values * 3)[:3]


def main():
    args = parse_args()
    samples = read_table(args.work / "samples.csv", f"python 01_preprocess.py --data {args.data} --work {args.work}")
    folder = args.work / "images" / str(min(HASH_SIZE, samples["side"].min()))
    table, pair_table = args.work / "duplicates.csv", args.work / "duplicate_pairs.csv"
    stage = Stage("02_dedup", table, {"thresholds": args.threshold, "floor": args.floor},
                  {"samples.csv": args.work / "samples.csv", "images": folder.with_suffix(".csv")})
    if stage.is_current():
        return
    stage.begin()
    hashes, flat = np.empty((len(samples), 3, 8), dtype=np.uint8), np.empty(len(samples), dtype=bool)
    jobs = [(folder / f"{Id}.tif",) for Id in samples["Id"]]
    for i, result in run_parallel(hash_file, jobs, args.jobs, "hashing"):
        hashes[i], flat[i] = result
    duplicates, pairs = duplicate_tables(samples, hashes, flat, args.threshold, args.floor)
    write_csv(pair_table, pairs)
    write_csv(table, duplicates)
    stage.finish(rows=len(duplicates), also=[pair_table])
    report(samples, flat, duplicates, pairs, pair_table)


def report(samples, flat, duplicates, pairs, pair_table):
    """Print how many there are, what happened to them, and the matches between labelled and test samples."""
    groups = duplicates["group"].value_counts()
    print(f"02_dedup: {(groups > 1).sum()} groups of near-identical samples; {(duplicates['kept'] == 0).sum()} of "
          f"{len(duplicates)} labelled samples are left out of training")
    if flat.any():
        print(f"{flat.sum()} samples have a black or constant channel and match nothing:\n"
              f"{listing(samples['Id'][flat])}")
    to_test = pairs[(pairs["part"] == "test") != (pairs["other_part"] == "test")]
    if len(to_test):
        print(f"{len(to_test)} pairs join a labelled and a test sample (kept; listed in {pair_table}):\n"
              f"{listing((to_test['Id'] + '  ~  ' + to_test['other_Id']).tolist())}")


if __name__ == "__main__":
    cli.run(main)
