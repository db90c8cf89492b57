"""Check all images and store each sample as one 4-plane TIFF at every size that the recipes need.

reads   DATA/train.csv, DATA/sample_submission.csv, DATA/external/external.csv (optional)
        DATA/train_full_size, DATA/test_full_size (TIFF), else DATA/train, DATA/test (PNG); DATA/external
writes  WORK/samples.csv         Id, part, Target, side of the source image in pixels
        WORK/images/<size>/      <Id>.tif with planes red, green, blue, yellow; by-source-1/ with size_rule=by-source
        WORK/images/<size>.csv   side; checksum; per channel: mean, deviation, shares of black and saturated pixels
        WORK/left_out.csv        Id, part, Target, place, reason of samples that --keep-going leaves out

Sizes: a recipe keeps its image_size where at least three quarters of the source images have that many pixels. Where
fewer do, all images are stored at the largest size that three quarters have, with crops of three quarters of it.
Samples that are still smaller are refused by name; --keep-going leaves them out, --set enlarge=true enlarges them (give
it to stage 04 too).

example python 01_preprocess.py --data data --work work --recipes resnet50
        python 01_preprocess.py --data data --work work --recipes resnet50 --check    what will fail
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where Python runs with -P or -I it is not there

from common.errors import UserError
from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--recipes",
        type=command_line.recipe_names,
        default=["resnet50"],
        metavar="A,B",
        help="make the image sizes of these recipes (default: resnet50)",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="change a field of the recipes, as in stage 04",
    )
    parser.add_argument(
        "--limit", type=command_line.positive, metavar="N", help="use only N training samples, drawn at random"
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="leave out samples with missing or bad files, by name, in place of an error at the end",
    )
    parser.add_argument(
        "--white-level",
        type=command_line.white_level,
        default=65535,
        metavar="V",
        help="value of 16-bit files that becomes 255, such as 4095 for 12-bit cameras (default: 65535)",
    )
    parser.add_argument(
        "--store",
        choices=("zstd", "raw"),
        default="zstd",
        help="how images above 256 px are stored: compressed, or raw in about four times the room, which "
        "stages 04 and 05 read three times as fast (default: zstd)",
    )
    parser.add_argument(
        "--black-level",
        type=command_line.black_level,
        default=0,
        metavar="V",
        help="value of 16-bit files that becomes 0, such as 32768 where a microscope adds that to all (default: 0)",
    )
    parser.add_argument(
        "--jobs", type=command_line.jobs, default=-1, metavar="N", help="worker processes (default: all cores)"
    )
    command_line.add_cluster_flag(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="make nothing: look at machine, input, labels, weights, room and time of a whole run, and say what "
        "will fail and how to mend it (its own flags: --check --help)",
    )
    if "--check" in sys.argv:
        command_line.add_check_flags(parser)
    args = parser.parse_args()
    if args.black_level >= args.white_level:
        parser.error(f"--black-level {args.black_level} must be below --white-level {args.white_level}")
    return args


def main():
    args = parse_args()

    # Imported here: --check says which packages are missing, --help needs none, and Ctrl+C meanwhile is one message.
    if args.check:
        from common.check.checks import examine

        return examine(args)
    from common.artifacts.layout import Layout
    from common.artifacts.tables import write_csv
    from common.data.exposure import Levels
    from common.data.ingest import (
        all_stored,
        bad_table,
        describe,
        drop_outdated,
        kept_going,
        known_states,
        list_samples,
        preprocess_stage,
        sample_table,
        statistics_table,
        store_all,
        wanted_stores,
    )
    from common.process.parallel import workers
    from common.recipes import get_recipes

    levels = Levels(args.black_level, args.white_level)
    data, work, raw = args.data.resolve(), args.work.resolve(), args.store == "raw"
    if work == data or data in work.parents:
        raise UserError(f"--work {args.work} is in --data {args.data}, which is never written to; give another --work")
    recipes = get_recipes(args.recipes, args.settings)
    samples, bad = list_samples(data, args.limit)
    if kept_going(work) and not args.keep_going:
        args.keep_going = True
        print("samples that cannot be used are left out, as --keep-going of the run before says")
    with workers(args.jobs, args.cluster) as n_jobs:
        states = known_states(samples, work, n_jobs)

    layout = Layout(args.work, args.data)
    stage = preprocess_stage(
        args.work,
        samples,
        states,
        wanted_stores(recipes.values()),
        levels,
        args.keep_going,
        raw,
        any(recipe.enlarge for recipe in recipes.values()),
    )
    if stage.is_current() and all_stored(layout.read_samples()["Id"], layout.images):
        return stage.say_current()
    with stage.making() as record:
        with workers(args.jobs, args.cluster) as n_jobs:
            stored = store_all(samples, states, bad, recipes, work, n_jobs, levels, args.keep_going, raw)
        for store, statistics in stored.statistics.items():
            write_csv(layout.store_table(store), statistics_table(stored.samples, statistics))
        drop_outdated(layout.images, stored.statistics, stored.samples, states, levels)
        write_csv(layout.left_out, bad_table(stored.bad, samples))
        write_csv(layout.samples, sample_table(stored.samples, stored.sides))
        record.rows = len(stored.samples)
        record.also = [layout.left_out, *map(layout.store_table, stored.statistics)]
        record.notes = {"exposure": stored.exposure, "arguments": command_line.arguments_without("--work")}
    print("01_preprocess: " + "\n".join(describe(stored, args.work)))


if __name__ == "__main__":
    run(main)
