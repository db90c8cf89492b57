"""Download external training samples from the Human Protein Atlas: the images that a table of labels names.

reads   a table with Id,Target, for example HPAv18RBGY_wodpl.csv; Ids are <antibody>_<plate>_<well>_<field>
writes  images/<Id>_<colour>.jpg, external.csv (the complete samples), missing.csv (the files that could not be had)

Stage 01 reads the folder as DATA/external. Files that are complete are kept, so the same command resumes.

example python -m common.external --list HPAv18RBGY_wodpl.csv --out data/external --classes 8,9,10,15,27
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # needed if started by its path

from common.process import command_line
from common.process.main import run

RATE, CONNECTIONS = 10, 8


def parse_args() -> argparse.Namespace:
    parser = command_line.Parser(__doc__ or "")
    parser.prog = "python -m common.external"
    parser.add_argument("--list", type=Path, required=True, metavar="CSV", help="table of samples: Id,Target")
    parser.add_argument(
        "--out",
        type=command_line.folder,
        default=Path("data/external"),
        metavar="DIR",
        help="folder to write (default: data/external)",
    )
    parser.add_argument(
        "--classes", type=classes, metavar="8,9", help="only samples with at least one of these labels (default: all)"
    )
    parser.add_argument("--limit", type=command_line.positive, metavar="N", help="only the first N of these samples")
    parser.add_argument(
        "--host",
        default="v18",
        metavar="v18|current|URL",
        help="release of the atlas to ask (default: v18, the competition's), or a URL with {antibody}, {field} and "
        "{colour}",
    )
    parser.add_argument(
        "--rate", type=positive_number, default=RATE, metavar="N", help=f"requests a second (default: {RATE})"
    )
    parser.add_argument(
        "--jobs",
        type=command_line.whole_number(1, 64),
        default=CONNECTIONS,
        metavar="N",
        help=f"connections at once, from 1 to 64 (default: {CONNECTIONS})",
    )
    return parser.parse_args()


def classes(text: str) -> list[int]:
    """Parse '8,9' into a list of distinct labels."""
    return [command_line.whole_number(0, 27)(part) for part in command_line.names(text)]


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def main() -> None:
    args = parse_args()
    from common.external.atlas import download  # imports pandas: --help needs none

    download(args.list, args.out, args.host, args.classes, args.limit, args.rate, args.jobs)


if __name__ == "__main__":
    run(main)
