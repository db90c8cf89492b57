"""From raw images to submission.csv and a report page: all stages in order. Outputs that are up to date are left alone.

If --data is not given and there is no folder data, it draws demo data and trains the recipes demo and demo_large on it:
three folds, two at a time.

example bash run_all.sh --data data --work work --recipes resnet50 --folds 0,1,2,3,4
        bash run_all.sh --data data --check     what will fail, before days are spent
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common.data.options import FOLDS, add_pixel_flags
from common.experiments import read_kept, read_recipes_file
from common.process import command_line
from common.process.main import run
from common.process.stopping import SIGNALS
from common.recipes import ablation_runs

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {  # the defaults, by (on demo data, for the tables)
    (False, False): ["resnet50"],
    (False, True): ["resnet50", "gapnet_pl"],
    (True, False): ["demo", "demo_large"],
    (True, True): ["demo", "demo_gapnet"],
}
QUICK_SAMPLES = "1000"
HARDWARE = ("device", "precision", "workers", "fast", "jobs")
WEIGHTS = ("pretrained", "weights_dir")
TRACKING = ("track",)
STORAGE = ("white_level", "black_level", "store")


@dataclass(frozen=True)
class Stage:
    """One command: a script, or a module (common.demo), and its arguments."""

    script: str
    arguments: tuple[str, ...]

    def command(self, python: str) -> list[str]:
        return [python, *([] if self.script.endswith(".py") else ["-m"]), self.script, *self.arguments]


# --- the command line --------------------------------------------------------------------------------------


class Parser(command_line.Parser):
    """A parser whose error for a flag without its value shows what was found instead."""

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        self.given = list(args or ())
        return super().parse_args(self.given, namespace)

    def error(self, message: str) -> NoReturn:
        if found := re.match(r"argument (--\S+): (expected (at least )?one argument|.*found nothing)$", message):
            flag, next_ones = found[1], zip(self.given, self.given[1:], strict=False)
            value = next((after for before, after in next_ones if before == flag and after.startswith("-")), None)
            message = f"{flag} needs a value" + (f", found {value}" if value else "")
        super().error(message)


def parser() -> Parser:
    result = Parser(__doc__)
    result.prog = "bash run_all.sh"
    add = result.add_argument
    add(
        "--data",
        type=command_line.folder,
        metavar="DIR",
        help="input in the competition's layout (default: data; if that is missing, demo data is drawn)",
    )
    add(
        "--work",
        type=command_line.folder,
        default=Path("work"),
        metavar="DIR",
        help="folder for all outputs (default: work)",
    )
    add(
        "--recipes",
        type=command_line.names,
        metavar="A,B",
        help="networks to train and average (default: resnet50); python 04_train.py --list-recipes lists them",
    )
    command_line.add_recipes_file_flag(result)
    add("--folds", metavar="0,1", help="folds to train (default: all five; on demo data three)")
    command_line.add_settings_flag(result, "change fields of every recipe, as in stage 04; may be repeated")
    add(
        "--quick",
        action="store_true",
        help="a run of a few minutes on a CPU to check that everything works: sizes divided by 8, few epochs, two "
        f"folds, at most {QUICK_SAMPLES} training samples, no test-time views",
    )
    add(
        "--tables",
        action="store_true",
        help="train what the paper's Tables 1, 2 and 3 compare (every variant of each recipe) and write the tables "
        "instead of a submission",
    )
    add(
        "--keep-going",
        action="store_true",
        help="leave out samples with missing or bad files and list them, as stage 01 does",
    )
    command_line.add_weight_flags(result)
    command_line.add_tracking_flags(result)
    command_line.add_hardware_flags(result)
    add_pixel_flags(result)
    not_given = ("device", "precision", "pretrained", *STORAGE)
    result.set_defaults(**dict.fromkeys(not_given))  # what was not given is left to the stages
    add("--dry-run", action="store_true", help="print the commands, ready to paste, and run nothing")
    add(
        "--check",
        action="store_true",
        help="make nothing: report what will fail and how to fix it, and the time and disk space the run needs",
    )
    return result


def parse_args(arguments: list[str], caller: Path) -> argparse.Namespace:
    """Parse run_all.sh's arguments and fill in defaults; relative paths start at `caller`, where it was called."""
    flags = parser()
    args = flags.parse_args(arguments)
    args.demo = args.data is None and not (ROOT / "data").exists()
    args.work = absolute(args.work, caller)
    args.data = absolute(args.data, caller) if args.data else f"{args.work}/demo_data" if args.demo else "data"
    if args.pretrained not in (None, "auto", "none"):
        path = absolute(args.pretrained, caller)
        if not args.dry_run and not (ROOT / path).is_file():
            flags.error(f"--pretrained {args.pretrained}: there is no such file")
        args.pretrained = path
    if args.weights_dir:
        args.weights_dir = absolute(args.weights_dir, caller)
    listed = {}
    if args.recipes_file:
        args.recipes_file = absolute(args.recipes_file, caller)
        listed = read_recipes_file(ROOT / args.recipes_file)
    args.experiments = {**read_kept(ROOT / args.work / "experiments.json"), **listed}
    args.recipes = args.recipes or list(listed) or RECIPES[args.demo, args.tables]
    if args.quick:
        args.recipes = [f"{name}-quick" for name in args.recipes]
    if args.demo and args.jobs is None:
        args.jobs = 2
    args.n_folds = 2 if args.quick else 3 if args.demo else FOLDS.n_folds
    args.folds = args.folds or ",".join(map(str, range(args.n_folds)))
    if not are_folds(args.folds, args.n_folds):
        flags.error(
            f"--folds must be distinct numbers from 0 to {args.n_folds - 1} separated by commas, found {args.folds}"
        )
    return args


def absolute(path: Path | str, caller: Path) -> str:
    """Return a path given in the folder `caller` as seen from the project's folder, where stages run."""
    return str(path) if caller.resolve() == ROOT else str(caller / path)


def are_folds(text: str, n_folds: int) -> bool:
    parts = text.split(",")
    return len(set(parts)) == len(parts) and all(part.isdecimal() and int(part) < n_folds for part in parts)


# --- the stages --------------------------------------------------------------------------------------------


def given(args: argparse.Namespace, names: Iterable[str]) -> tuple[str, ...]:
    """Return the flags among `names` that were given, with their values."""
    result = []
    for name in names:
        value = getattr(args, name)
        if value not in (None, False, []):
            text = ",".join(dict.fromkeys(value)) if isinstance(value, list) else str(value)
            result += [f"--{name.replace('_', '-')}"] + ([] if value is True else [text])
    return tuple(result)


def stages(args: argparse.Namespace) -> list[Stage]:
    """Return the commands of a run in order, for the result of `parse_args`."""
    places = ("--data", args.data, "--work", args.work)
    shown, runs = ("--recipes", ",".join(args.recipes)), ",".join(trained_runs(args))
    folds, hardware, weights = ("--folds", args.folds), given(args, HARDWARE), given(args, WEIGHTS)
    end = [Stage("06_thresholds.py", (*places, *shown)), Stage("07_ensemble.py", (*places, *shown))]
    if args.tables:
        end = [Stage("09_tables.py", (*places, *shown, *folds))]
    return [
        *([draw_demo(args)] if args.demo else []),
        Stage("01_preprocess.py", (*places, "--recipes", runs, *stored(args), *changes(args))),
        Stage("02_dedup.py", places),
        Stage("03_make_folds.py", (*places, "--n-folds", str(args.n_folds))),
        Stage(
            "04_train.py",
            (*places, "--recipe", runs, *folds, *hardware, *weights, *given(args, TRACKING), *changes(args)),
        ),
        Stage("05_predict_oof.py", (*places, "--recipes", runs, *folds, *hardware, *predicted(args))),
        *end,
        Stage("08_report.py", places),
    ]


def check(args: argparse.Namespace) -> Stage:
    """Return stage 01's check of the whole run."""
    places = ("--data", args.data, "--work", args.work, "--recipes", ",".join(trained_runs(args)))
    folds = ("--folds", args.folds, "--n-folds", str(args.n_folds))
    others = (*stored(args), *predicted(args), *given(args, WEIGHTS), *changes(args))
    return Stage("01_preprocess.py", ("--check", *places, *folds, *others))


def draw_demo(args: argparse.Namespace) -> Stage:
    return Stage("common.demo", ("--data", args.data))


def trained_runs(args: argparse.Namespace) -> list[str]:
    """Return the recipes to train; for the tables, every variant of those asked for."""
    if not args.tables:
        return args.recipes
    return [run for name in args.recipes for run in ablation_runs(name, args.experiments).values()]


def stored(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the flags that only stage 01 has."""
    limit = ("--limit", QUICK_SAMPLES) if args.quick else ()
    return (*limit, *given(args, ["recipes_file"]), *given(args, STORAGE), *given(args, ["keep_going"]))


def predicted(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the flags of what stage 05 leaves out."""
    return (*(("--tta", "none") if args.quick else ()), *(("--no-test",) if args.tables else ()))


def changes(args: argparse.Namespace) -> tuple[str, ...]:
    return ("--set", *args.settings) if args.settings else ()


# --- running them ------------------------------------------------------------------------------------------


class Runner:
    """Runs one command after another.

    Ctrl+C reaches a command by itself; other signals to stop are passed on to it. Either way this process waits until
    the command has saved, then ends.
    """

    def __init__(self, again: str):
        """again : the command line to resume"""
        self.again, self.asked = again, 0
        self.process: subprocess.Popen | None = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if self.process and number != signal.SIGINT:
            self.process.send_signal(number)

    def run(self, command: list[str], stdout: int | None = None) -> str:
        """Run a command in the project's folder and return its output, if piped. If it fails, this process ends."""
        if self.asked:
            self.end(0)
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=stdout)
        if self.asked not in (0, signal.SIGINT):  # it came before the command was started
            self.process.send_signal(self.asked)
        output, code = self.process.communicate()[0], self.process.returncode
        self.process = None
        if self.asked or code:
            self.end(128 - code if code < 0 else code)
        return output or ""

    def end(self, code: int) -> NoReturn:
        """Exit with the code of the signal, or else of the command; print how to resume unless a stage has done so."""
        told = self.asked != signal.SIGINT and code == 128 + self.asked
        if code == 128 + signal.SIGINT or self.asked and not told:
            print(f"\nstopped; finished work is kept. To resume: {self.again}", file=sys.stderr, flush=True)
        sys.exit(128 + self.asked if self.asked else code)


def find_python(args: argparse.Namespace, runner: Runner) -> str:
    """Return the Python that runs the stages; makes .venv if needed, but not for --dry-run and --check."""
    dry = args.dry_run or args.check
    setup = ["bash", "common/setup.sh", *(["--dry-run"] if dry else []), "requirements.txt"]
    *lines, python = runner.run(setup, stdout=subprocess.PIPE).splitlines()
    print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    return sys.executable if args.check and not os.access(python, os.X_OK) else python


def run_check(args: argparse.Namespace, runner: Runner, python: str) -> None:
    """Check the run; demo data that does not exist yet is drawn into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if args.demo and not (Path(args.data) / "train.csv").exists():
            args.data = folder
        # Without the packages to draw, the check continues and reports which are missing.
        if args.demo and not subprocess.run([python, "-c", "import common.demo.data"], capture_output=True).returncode:
            runner.run(draw_demo(args).command(python))
        runner.run(check(args).command(python))


def main() -> None:
    caller = Path(os.environ.pop("RUN_ALL_FROM", os.getcwd()))
    again = shlex.join(["bash", os.environ.pop("RUN_ALL_AS", "run_all.sh"), *sys.argv[1:]])
    args = parse_args(sys.argv[1:], caller)
    os.environ["RUN_ALL_COMMAND"] = again  # the command that stages print to resume
    os.chdir(ROOT)
    runner = Runner(again)
    planned = stages(args)
    python = find_python(args, runner)
    if args.check:
        return run_check(args, runner, python)
    for stage in planned:
        if args.dry_run:
            print(shlex.join(stage.command(python)))
        else:
            runner.run(stage.command(python))


if __name__ == "__main__":
    run(main)
