"""Command lines of the numbered scripts: shared flags, parsers of their values, and commands for messages."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from common.errors import DATA, nearest
from common.recipes import DEFAULT, run_name

ArgumentContainer = argparse._ActionsContainer  # a parser, or a group of its flags
TRACKERS = ("tensorboard", "mlflow", "wandb")  # what they do: TRACKERS in common/train/trackers.py
SEED = 0  # of trainings, unless stage 04 is given another


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose errors name the nearest known flag."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(f"unknown argument {unknown[0]}; {nearest(unknown[0].split('=')[0], flags)}")
        return values

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parser(description: str) -> Parser:
    """Return a parser with the flags that every stage takes: --data and --work."""
    result = Parser(description)
    result.add_argument(
        "--data",
        type=folder,
        default=DATA,
        metavar="DIR",
        help="input folder in the competition's layout (default: data); never written to",
    )
    result.add_argument(
        "--work", type=folder, default=Path("work"), metavar="DIR", help="folder for all outputs (default: work)"
    )
    return result


def add_hardware_flags(parser: argparse.ArgumentParser, units: str = "folds") -> None:
    """Add the flags that choose where networks run; see `hardware.HardwareOptions`.

    units : what jobs work on
    """
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: a GPU if available)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="autocast type (default: bf16 where it is faster, fp16 on older GPUs, else fp32; a CPU predicts in fp32)",
    )
    parser.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="loader processes of each job (default: 0 on the CPU; on a GPU a job's share of the cores)",
    )
    parser.add_argument(
        "--jobs",
        type=jobs,
        metavar="N",
        help=f"{units} to work on at once, each with its share of the cores and, if there are several GPUs, its own "
        "GPU (default: the number of GPUs, 1 on a CPU; more is worthwhile for small networks)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="let a GPU choose its fastest kernels: results then differ in their last digits from run to run, and "
        "between resumed and uninterrupted training (default: the same bits each time)",
    )


def add_weight_flags(parser: ArgumentContainer) -> None:
    """Add --pretrained and --weights-dir to a command line."""
    parser.add_argument(
        "--pretrained",
        default="auto",
        metavar="auto|none|FILE",
        help="start from the encoder's published ImageNet weights if available (default), from random weights, or "
        "from a file",
    )
    parser.add_argument(
        "--weights-dir",
        type=Path,
        metavar="DIR",
        help="folder of published weights, also for downloads (default: torch's hub cache)",
    )


def add_tracking_flags(parser: ArgumentContainer) -> None:
    """Add --track, and --tensorboard for one of its values; see `tracker_names` for the values."""
    parser.add_argument(
        "--track",
        action="extend",
        type=tracker_names,
        default=[],
        metavar="A,B",
        help=f"also record trainings for other programs, after each epoch: {', '.join(TRACKERS)}",
    )
    parser.add_argument(
        "--tensorboard",
        action="append_const",
        const="tensorboard",
        dest="track",
        help="the same as --track tensorboard; then: tensorboard --logdir WORK/runs",
    )


def add_test_flags(parser: ArgumentContainer) -> None:
    """Add to a command line what stage 05 predicts, and from how many views of each image."""
    parser.add_argument(
        "--tta",
        default="dihedral",
        choices=("none", "dihedral"),
        help="average over the 8 symmetries of each image (default) or not, in stage 05",
    )
    parser.add_argument("--no-test", action="store_true", help="stage 05 predicts the validation samples only")


def add_recipes_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --recipes; what : the recipes are for, as help."""
    parser.add_argument(
        "--recipes", type=recipe_names, default=DEFAULT, metavar="A,B", help=f"{what} (default: {','.join(DEFAULT)})"
    )


def add_settings_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --set, whose values become the attribute `settings`; what : it changes, as help."""
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="FIELD=VALUE", dest="settings", help=what
    )


def add_recipes_file_flag(parser: ArgumentContainer) -> None:
    """Add --recipes-file, whose runs may then be named like recipes."""
    parser.add_argument(
        "--recipes-file",
        type=Path,
        metavar="TOML",
        help='file of runs with their own names, a table each: [name], base = "resnet50", alpha = 0.999',
    )


def add_cluster_flag(parser: argparse.ArgumentParser) -> None:
    """Add --cluster to a stage that does many independent jobs."""
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="run the jobs on the workers of a dask scheduler (for example tcp://host:8786) that see the same files "
        "(default: on this machine)",
    )


def folder(text: str) -> Path:
    """Parse the path of a folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a folder, found nothing")
    return Path(text)


def names(text: str) -> list[str]:
    """Parse 'a,b' into a list of distinct names."""
    values = [part.strip() for part in text.split(",") if part.strip()]
    if not values or len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"expected distinct names separated by commas, found {text!r}")
    return values


def recipe_names(text: str) -> list[str]:
    """Parse 'a,b-variant' into a list of distinct run names (see `recipes.run_name`)."""
    return names(",".join(run_name(name) for name in names(text)))


def tracker_names(text: str) -> list[str]:
    """Parse 'tensorboard,mlflow' into a list of trackers."""
    for name in names(text):
        if name not in TRACKERS:
            raise argparse.ArgumentTypeError(f"unknown tracker {name!r}; {nearest(name, TRACKERS, every=True)}")
    return names(text)


def one_run(text: str) -> str:
    """Parse the name of one run."""
    values = recipe_names(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"expected one run, found {text!r}")
    return values[0]


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser of whole numbers of at least `low`, and at most `high` if given."""
    expected = f"above {low - 1}" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"expected a whole number {expected}, found {text!r}")
        return int(text)

    return parse


positive = whole_number(1)
not_negative = whole_number(0, 2**32 - 1)  # the largest seed that all libraries take


def jobs(text: str) -> int:
    """Parse a number of processes: a whole number above 0, or -1 for as many as there are cores."""
    return -1 if text == "-1" else positive(text)


def fold_numbers(text: str) -> list[int]:
    """Parse '0,2' into a list of distinct fold numbers."""
    values = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in values) or len(set(values)) != len(values):
        raise argparse.ArgumentTypeError(f"expected fold numbers separated by commas, for example 0,2; found {text!r}")
    return [int(part) for part in values]


def leave_out(flag: str) -> None:
    """Leave a flag out of the command to resume: it has taken effect, and again it would undo what follows."""
    sys.argv = [argument for argument in sys.argv if argument != flag]


def arguments_without(flag: str) -> list[str]:
    """Return this command line's arguments without one flag and its single value."""
    given = sys.argv[1:]
    return [
        argument
        for k, argument in enumerate(given)
        if argument != flag and not argument.startswith(f"{flag}=") and (k == 0 or given[k - 1] != flag)
    ]


def command() -> str:
    """Return the command line that the user gave: of this script, of torchrun, or of run_all.sh, which passes it on."""
    launcher = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return os.environ.get("RUN_ALL_COMMAND") or shlex.join([*launcher, *sys.argv])
