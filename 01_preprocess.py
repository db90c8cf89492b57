"""Check all images and store each sample as one 4-plane TIFF at every size that the recipes need.

reads   DATA/train.csv, DATA/sample_submission.csv, DATA/external/external.csv (optional)
        DATA/train_full_size, DATA/test_full_size (TIFF), else DATA/train, DATA/test (PNG); DATA/external
writes  WORK/samples.csv         Id, part, Target, side of the source image in pixels
        WORK/images/<size>/      <Id>.tif with the planes red, green, blue, yellow; by-source-1/ for --set size_rule=by-source
        WORK/images/<size>.csv   side; per channel: mean, standard deviation, shares of black and saturated pixels; checksum
        WORK/left_out.csv        Id, part, Target, place, reason of samples that --keep-going leaves out

example python 01_preprocess.py --data data --work work --recipes resnet50
"""

from common import cli  # first: from here on Ctrl+C is no traceback

import pandas as pd

from common.artifacts import Stage, digest, read_table, write_csv
from common.errors import listing
from common.images import WHITE
from common.labels import absent_classes, parse_targets
from common.parallel import workers
from common.preprocess import (HASH_SIZE, all_stored, bad_table, list_samples, sample_table, source_state,
                               statistics_table, store_all)
from common.recipes import fit_to_source, get_recipe


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--recipes", type=cli.recipe_names, default=["resnet50"], metavar="A,B",
                        help="make the image sizes of these recipes (default: resnet50)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="change a field of the recipes, as in stage 04")
    parser.add_argument("--limit", type=cli.positive, metavar="N", help="use only N training samples, drawn at random")
    parser.add_argument("--keep-going", action="store_true",
                        help="leave out samples with missing or bad files, by name, in place of an error at the end")
    parser.add_argument("--white-level", type=cli.positive, default=WHITE, metavar="V",
                        help="value of 16-bit files that becomes 255, such as 4095 for 12-bit cameras (default: 65535)")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="worker processes (default: all cores)")
    cli.add_cluster_flag(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    recipes = {name: get_recipe(name, args.settings) for name in args.recipes}
    samples, bad = list_samples(args.data.resolve(), args.limit)
    states = {sample: source_state(sample) for sample in samples}
    wanted = sorted({str(HASH_SIZE), *(recipe.store for recipe in recipes.values())})

    def stores_for(side):
        fitted = {name: fit_to_source(recipe, side) for name, recipe in recipes.items()}
        for name, recipe in recipes.items():
            if fitted[name] != recipe:
                print(f"the smallest source image has {side} px: {name} uses {fitted[name].size} px with crops of "
                      f"{fitted[name].crop} in place of {recipe.size} and {recipe.crop}; nothing is enlarged")
        return sorted({str(min(HASH_SIZE, side)), *(recipe.store for recipe in fitted.values())}, key=lambda s: (len(s), s))

    table, left_out = args.work / "samples.csv", args.work / "left_out.csv"
    listed = pd.DataFrame([(s.Id, s.part, s.Target) for s in samples])
    stage = Stage("01_preprocess", table,
                  {"sizes": wanted, "white_level": args.white_level, "keep_going": args.keep_going},
                  {"samples and labels": digest(listed), "image files": digest(list(states.values()))})
    if stage.is_current() and all_stored(read_table(table, "")["Id"], args.work / "images"):
        return
    with workers(args.jobs, args.cluster) as n_jobs:
        stored = store_all(samples, states, bad, stores_for, args.work.resolve(), n_jobs, args.white_level, args.keep_going)
    stage.begin()
    tables = {store: args.work / "images" / f"{store}.csv" for store in stored.statistics}
    for store, path in tables.items():
        write_csv(path, statistics_table(stored.samples, stored.statistics[store]))
    write_csv(left_out, bad_table(stored.bad, samples))
    write_csv(table, sample_table(stored.samples, stored.sides))
    stage.finish(rows=len(stored.samples), also=[left_out, *tables.values()])
    report(stored, args, left_out)


def report(stored, args, left_out):
    """Print what there is now, and what is to be wondered at."""
    counts = pd.Series([sample.part for sample in stored.samples]).value_counts()
    parts = ", ".join(f"{counts[part]} {part}" for part in ("train", "test", "external") if part in counts)
    print(f"01_preprocess: {parts} samples at {', '.join(stored.statistics)} px in {args.work / 'images'}")
    if stored.bad:
        print(f"warning: {len(stored.bad)} samples are left out here and in all stages (all of them in {left_out}):\n"
              f"{listing(stored.bad.values())}")
    if stored.peaks and max(stored.peaks) < args.white_level / 4:
        print(f"warning: the 16-bit files never exceed {max(stored.peaks)} of {args.white_level}, so most of the range is "
              f"unused and images are dark; give --white-level (4095 for a 12-bit camera)")
    absent = absent_classes(parse_targets([sample.Target for sample in stored.samples if sample.part == "train"]))
    if absent:
        print(f"warning: {len(absent)} classes have no training sample: {', '.join(absent)}")


if __name__ == "__main__":
    cli.run(main)
