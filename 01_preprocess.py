"""Check all images and store each sample as one 4-plane TIFF at every size that the recipes need.

reads   DATA/train.csv, DATA/sample_submission.csv, DATA/external/external.csv (optional)
        DATA/train_full_size, DATA/test_full_size (TIFF), else DATA/train, DATA/test (PNG); DATA/external
writes  WORK/samples.csv         Id, part, Target, side of the source image in pixels
        WORK/images/<size>/      <Id>.tif with the planes red, green, blue, yellow
        WORK/images/<size>.csv   mean and standard deviation per channel, checksum of the pixels

example python 01_preprocess.py --data data --work work --recipes resnet50
"""

import pandas as pd

from common import cli
from common.artifacts import Stage, digest, write_csv
from common.labels import absent_classes, parse_targets
from common.preprocess import (HASH_SIZE, all_stored, list_samples, sample_table, source_state,
                               statistics_table, store_all)
from common.recipes import fit_to_source, get_recipe


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--recipes", type=cli.recipe_names, default=["resnet50"], metavar="A,B",
                        help="make the image sizes of these recipes (default: resnet50)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="change a field of the recipes, as in stage 04")
    parser.add_argument("--limit", type=int, metavar="N", help="use only N training samples, drawn at random")
    parser.add_argument("--jobs", type=int, default=-1, metavar="N", help="worker processes (default: all cores)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    return args


def main():
    args = parse_args()
    recipes = {name: get_recipe(name, args.settings) for name in args.recipes}
    samples = list_samples(args.data, args.limit)
    states = [source_state(sample) for sample in samples]
    wanted = sorted({HASH_SIZE, *(recipe.size for recipe in recipes.values())})

    def sizes_for(side):
        for name, recipe in recipes.items():
            fitted = fit_to_source(recipe, side)
            if fitted != recipe:
                print(f"the smallest source image has {side} px: {name} uses {fitted.size} px with crops of "
                      f"{fitted.crop} in place of {recipe.size} and {recipe.crop}; nothing is enlarged")
        return sorted({min(size, side) for size in wanted})

    table = args.work / "samples.csv"
    listed = pd.DataFrame([(s.Id, s.part, s.Target) for s in samples])
    stage = Stage("01_preprocess", table, {"sizes": wanted},
                  {"samples and labels": digest(listed), "image files": digest(states)})
    if stage.is_current() and all_stored(samples, args.work / "images"):
        return
    sides, statistics = store_all(samples, states, sizes_for, args.work, args.jobs)
    stage.begin()
    tables = {size: args.work / "images" / f"{size}.csv" for size in statistics}
    for size, path in tables.items():
        write_csv(path, statistics_table(samples, statistics[size]))
    write_csv(table, sample_table(samples, sides))
    stage.finish(rows=len(samples), also=tables.values())
    report(samples, statistics, args.work)


def report(samples, statistics, work):
    """Print what there is now."""
    counts = pd.Series([sample.part for sample in samples]).value_counts()
    parts = ", ".join(f"{counts[part]} {part}" for part in ("train", "test", "external") if part in counts)
    print(f"01_preprocess: {parts} samples at {', '.join(map(str, statistics))} px in {work / 'images'}")
    absent = absent_classes(parse_targets([sample.Target for sample in samples if sample.part == "train"]))
    if absent:
        print(f"warning: {len(absent)} classes have no training sample: {', '.join(absent)}")


if __name__ == "__main__":
    cli.run(main)
