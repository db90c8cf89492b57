"""Find near-identical samples by perceptual hashes, group them, and choose which stay for training.

reads   WORK/samples.csv, WORK/images/128/
writes  WORK/duplicates.csv       Id, part, Target, near_group (first of the near-identical ones), group (stays in one
                                  fold), kept (1 or 0) of every labelled sample
        WORK/duplicate_pairs.csv  all pairs within the distance, with test samples too; distances in bits of 64
        WORK/duplicate_pairs.png  the closest pairs, the farthest pairs within, the closest ones outside: to check

Nothing is removed from test. Within a group of duplicates one sample per distinct label set stays. More stay if a class
would fall below --floor samples. Thresholds are for the red, green and blue channel; all must hold.

example python 02_dedup.py --work work --threshold 12,12,12
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.data.options import add_jobs_flags
from common.process import command_line
from common.process.main import run

BEYOND = 6  # bits above the thresholds up to which the contact sheet shows doubtful pairs


def parse_args():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--threshold",
        type=thresholds,
        default=(12, 12, 12),
        metavar="R,G,B",
        help="largest distance in bits of 64 per channel, or one for all (default: 12)",
    )
    parser.add_argument(
        "--floor", type=int, default=50, metavar="N", help="keep at least N samples of each class, if it has them (50)"
    )
    parser.add_argument(
        "--external-groups",
        default="antibody",
        choices=("antibody", "none"),
        help="keep external fields of one antibody in one fold (default), or treat each separately",
    )
    add_jobs_flags(parser)
    return parser.parse_args()


def thresholds(text):
    values = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(values) not in (1, 3) or len(values) != len(text.split(",")) or max(values) > 64:
        raise argparse.ArgumentTypeError(f"expected one or three distances from 0 to 64, found {text!r}")
    return tuple(values * 3)[:3]


def main():
    args = parse_args()

    # Imported here: --help needs none of it, and Ctrl+C during imports ends in one message.
    from common.artifacts.layout import Layout
    from common.artifacts.stage import Stage
    from common.artifacts.tables import write_csv
    from common.data.duplicates import describe_duplicates, doubtful_pairs, duplicate_tables, hash_images
    from common.data.ingest import hash_store
    from common.data.pictures import SHOWN, save_pair_sheet
    from common.process.parallel import workers

    layout = Layout(args.work, args.data)
    samples = layout.read_samples()
    store = hash_store(samples["side"])
    stage = Stage(
        "02_dedup",
        layout.duplicates,
        {"thresholds": args.threshold, "floor": args.floor, "external_groups": args.external_groups},
        {"samples.csv": layout.samples, "images": layout.store_table(store)},
    )
    if stage.is_current():
        return stage.say_current()
    crcs, folder = layout.read_store(store, samples["Id"])["crc"], layout.store(store)
    with stage.making() as record:
        with workers(args.jobs, args.cluster) as n_jobs:
            hashes, flat = hash_images(folder, samples["Id"], crcs, n_jobs)
        duplicates, pairs = duplicate_tables(
            samples, hashes, flat, args.threshold, args.floor, by_antibody=args.external_groups == "antibody"
        )
        doubtful = doubtful_pairs(samples, hashes, flat, args.threshold, BEYOND, SHOWN)
        sheet = layout.duplicate_pairs.with_suffix(".png")
        write_csv(layout.duplicate_pairs, pairs)
        save_pair_sheet(sheet, folder, pairs, doubtful)
        write_csv(layout.duplicates, duplicates)
        record.rows, record.also = len(duplicates), [layout.duplicate_pairs, sheet]
    found = describe_duplicates(samples, flat, duplicates, pairs, layout.duplicate_pairs)
    print("02_dedup: " + "\n".join(found))


if __name__ == "__main__":
    run(main)
