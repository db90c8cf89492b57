"""Make one HTML page on all that the work folder holds, or a page on one sample.

reads   WORK/: what the stages have written so far; a section is left out, with a note, if its stage has not run
        WORK/runs/<recipe>/fold<k>/best.pt   only with --sample, for its heat maps
writes  WORK/report.html        one file, no network: data, duplicates, folds, trainings, predictions, scores, ...
        WORK/sample_<Id>.html   with --sample: channels, probabilities and thresholds, duplicates, heat maps

The page is made from scratch each time, in seconds, so it has no sidecar and is never out of date.

example python 08_report.py --work work
        python 08_report.py --work work --sample 004cd3ba-6269-4a57-9260-ae8a93bcdd47
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P and -I leave it out

from common.errors import UserError, command
from common.process import command_line
from common.process.main import run


def parse_args():
    parser = command_line.parser(__doc__)
    parser.add_argument("--sample", metavar="ID", help="make the page of one sample instead of the whole work folder's")
    parser.add_argument(
        "--recipe",
        type=command_line.recipe_names,
        metavar="NAME",
        help="with --sample: recipe whose networks the heat maps show (default: the first of thresholds.json)",
    )
    return parser.parse_args()


def main():
    args = parse_args()

    # Imported here, so that --help and mistakes on the command line do not wait for the plots.
    from common.artifacts.files import write_text
    from common.report.build import report_page
    from common.report.reader import Work
    from common.report.sample import sample_page

    if not args.work.is_dir():
        raise UserError(f"{args.work} is missing; run: {command('run_all.sh', '--work', args.work)}")
    work = Work(args.work)
    if args.sample is not None:
        html = sample_page(work, args.sample, args.recipe[0] if args.recipe else None)
        path = args.work / f"sample_{args.sample}.html"
    else:
        html, path = report_page(work), args.work / "report.html"
    write_text(path, html)
    print(f"08_report: {path.stat().st_size / 1e6:.1f} MB, open it in a browser: {path}")


if __name__ == "__main__":
    run(main)
