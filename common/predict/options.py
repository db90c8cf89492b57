"""The flags of 10_predict.py and what they mean; loads neither torch nor pandas, so --help is quick."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.data.options import add_level_flags, check_levels
from common.process import command_line
from common.process.command_line import Parser

if TYPE_CHECKING:
    from common.predict.inputs import InputOptions
    from common.predict.run import Settings

WINDOWS = ("max", "mean")  # how those of one field are combined, the default first
# How missing channels are filled (rows of batches.FILLINGS); what that costs in macro F1 on the demo data, out of fold,
# where it is 0.751 with all channels; and the share of 50 real images that keep their labels. See docs/new_images.md.
FILLED = {"red": "copy of yellow", "blue": "mean", "yellow": "copy of red"}
PRICES = {"red": 0.044, "blue": 0.291, "yellow": 0.061}
KEPT = {"red": 0.80, "blue": 0.56, "yellow": 0.72}


def add_flags(parser: Parser) -> None:
    """Add all flags to the command line."""
    parser.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of images, or a CSV file with Id and red, green, blue, yellow or file; optionally missing, "
        "pixel_size",
    )
    parser.add_argument(
        "--model",
        type=command_line.folder,
        default=Path("work"),
        metavar="MODEL",
        help="work folder with trained runs, or a package (default: work)",
    )
    parser.add_argument("--out", type=command_line.folder, required=True, metavar="DIR", help="folder for the answers")
    parser.add_argument(
        "--recipes", type=command_line.recipe_names, metavar="A,B", help="use these runs (default: those of stage 06)"
    )
    parser.add_argument(
        "--folds", type=command_line.fold_numbers, metavar="0,2", help="use the networks of these folds (default: all)"
    )
    add_image_flags(parser)
    add_answer_flags(parser)
    command_line.add_hardware_flags(parser, "parts of the images")
    command_line.add_cluster_flag(parser)


def add_image_flags(parser: Parser) -> None:
    """Add the flags for how images are read."""
    parser.add_argument(
        "--channels",
        type=channels,
        metavar="red=2,green=0",
        help="number (from 0) or name of each colour's channel in files with several; colours not given are missing "
        "(default: by the names in the file)",
    )
    parser.add_argument(
        "--missing", type=colours, default=(), metavar="yellow", help="channels that none of the images has"
    )
    parser.add_argument(
        "--pixel-size",
        type=micrometres,
        metavar="UM",
        help="micrometres of the images' pixels, instead of what files say (the competition's: 0.08 at 2048 px)",
    )
    add_level_flags(parser)
    parser.add_argument(
        "--keep-going", action="store_true", help="leave out images that cannot be used, by name, instead of an error"
    )


def add_answer_flags(parser: Parser) -> None:
    """Add the flags for how answers are made and shown."""
    parser.add_argument(
        "--windows",
        default=WINDOWS[0],
        choices=WINDOWS,
        help="a field of several windows has the largest of their probabilities (default), or their mean",
    )
    parser.add_argument(
        "--tta",
        choices=("none", "dihedral"),
        help="average over the 8 symmetries of each image or not (default: as the thresholds were found)",
    )
    parser.add_argument("--html", action="store_true", help="also make a page of all images to open in a browser")
    parser.add_argument(
        "--heat-maps",
        type=command_line.names,
        metavar="ID,ID",
        help="with --html: show where the networks find evidence for the predicted classes of these images",
    )
    parser.add_argument(
        "--batch-size",
        type=command_line.positive,
        metavar="N",
        help="windows at once (default: 32 on a GPU, 8 on a CPU); a batch is what a kill may lose",
    )


def channels(text: str) -> dict[str, str]:
    """Parse --channels."""
    from common.data.stacks import parse_channels

    try:
        return parse_channels(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def colours(text: str) -> tuple[str, ...]:
    """Parse --missing into the channels' order."""
    from common.data.sources import CHANNELS
    from common.predict.inputs import wrong_colours

    given = command_line.names(text)
    if wrong := wrong_colours(given):
        raise argparse.ArgumentTypeError(wrong)
    return tuple(channel for channel in CHANNELS if channel in given)


def micrometres(text: str) -> float:
    """Parse --pixel-size."""
    from common.data.stacks import PLAUSIBLE, in_micrometres, plausible

    size = plausible(in_micrometres(text, "um"))
    if size is None:
        low, high = PLAUSIBLE
        raise argparse.ArgumentTypeError(f"expected micrometres from {low:g} to {high:g}, found {text!r}")
    return size


def check_flags(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse flags that do not fit together."""
    check_levels(parser, args)
    if args.heat_maps and not args.html:
        parser.error("--heat-maps are shown on the page: give --html too")
    if args.out.resolve() == args.model.resolve():
        parser.error(f"--out {args.out} is the model's own folder; give another one")
    if args.channels and (both := set(args.channels) & set(args.missing)):
        parser.error(f"--channels and --missing both name {', '.join(sorted(both))}")


def input_options(args: argparse.Namespace) -> "InputOptions":
    """Return how images are read."""
    from common.data.options import Levels
    from common.predict.inputs import InputOptions

    levels = Levels(args.black_level, args.white_level)
    return InputOptions(args.channels, args.missing, args.pixel_size, levels, args.keep_going)


def settings_of(args: argparse.Namespace) -> "Settings":
    """Return what changes answers."""
    from common.data.options import Levels
    from common.predict.run import Settings

    return Settings(Levels(args.black_level, args.white_level), args.tta, args.windows)
