"""Check all images and store each sample as one 4-plane TIFF at every size that the recipes need.

reads   DATA/train.csv, DATA/sample_submission.csv, DATA/external/external.csv (optional)
        DATA/train_full_size, DATA/test_full_size (TIFF), else DATA/train, DATA/test (PNG); DATA/external
writes  WORK/samples.csv         Id, part, Target, side of the source image in pixels
        WORK/images/<size>/      <Id>.tif with planes red, green, blue, yellow; by-source-1/ with size_rule=by-source
        WORK/images/<size>.csv   side; checksum; per channel: mean, deviation, shares of black and saturated pixels
        WORK/left_out.csv        Id, part, Target, place, reason of samples that --keep-going leaves out

Sizes: a recipe keeps its image_size if at least three quarters of the source images have that many pixels. If fewer
do, all images are stored at the largest size that three quarters have, with crops of three quarters of it. Samples
that are still smaller are refused by name; --keep-going leaves them out, --set enlarge=true enlarges them (give it to
stage 04 too).

example python 01_preprocess.py --data data --work work --recipes resnet50
        python 01_preprocess.py --data data --work work --recipes resnet50 --check    only report what will fail
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.data import options
from common.errors import UserError
from common.experiments import asked_names
from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.parser(__doc__)
    options.add_ingest_flags(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="make nothing: check machine, input, labels, weights, disk and time of a whole run, and report what "
        "will fail and how to fix it (its own flags: --check --help)",
    )
    args = parser.parse_args()
    options.check_levels(parser, args)
    args.recipes = asked_names(args.recipes, args.recipes_file)
    return args


def main():
    if "--check" in sys.argv:
        from common.check.__main__ import main as check

        return check()
    args = parse_args()

    # Imported here, so that --help does not wait for pandas.
    from common.artifacts.layout import Layout
    from common.data import ingest
    from common.process.parallel import workers

    layout, plan = Layout(args.work, args.data), plan_of(args)
    stage = ingest.preprocess_stage(args.work, plan)
    if stage.is_current() and ingest.all_stored(layout.read_samples()["Id"], layout.images):
        return stage.say_current()
    with stage.making() as record:
        with workers(args.jobs, args.cluster) as n_jobs:
            plan = ingest.store(ingest.check(plan, n_jobs), n_jobs)
        record.also = ingest.write_tables(plan, layout)
        record.rows, exposure = len(plan.usable), ingest.judge_exposure(plan)
        record.notes = {"exposure": exposure, "arguments": command_line.arguments_without("--work")}
    print("01_preprocess: " + "\n".join(ingest.describe(plan, exposure, layout)))


def plan_of(args):
    """Return the plan: the samples with the state of their files, and the options."""
    from common.data import ingest
    from common.process.parallel import workers

    data, work = args.data.resolve(), args.work.resolve()
    if work == data or data in work.parents:
        raise UserError(f"--work {args.work} is in --data {args.data}, which is never written to; give another --work")
    asked = options.ingest_options(args)
    with workers(args.jobs, args.cluster) as n_jobs:
        plan = ingest.make_plan(data, work, asked, n_jobs)
    if plan.options.keep_going and not asked.keep_going:
        print("samples that cannot be used are left out, as in the previous run with --keep-going")
    return plan


if __name__ == "__main__":
    run(main)
