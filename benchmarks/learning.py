"""Compare training in equal seconds on equal cores: our recipes, fastai, and a plain loop; on demo data or any other.

--epochs compares our recipes after equal epochs instead.

Each run trains one fold in its own process and predicts its validation part; all time from the start of Python counts.
A short run of each arm first measures how many epochs fit. An arm's score is macro F1 over its out-of-fold
probabilities with cross-fitted greedy thresholds; mean average precision needs no thresholds. Of several learning
rates, the arm with the best score counts, which favours the others and not us. Finished runs are kept in --out: stop
and restart it at any time. Curves over several --minutes go to OUT/learning.png.

Pretrained weights against random ones, frozen or trained at other rates (with --data also on half-real images):

LITE=small_plus:optimizer=adamw:weight_decay=0.05:encoder=timm/tf_efficientnet_lite0:precision=fp32
python benchmarks/learning.py --others none --ours \\
$LITE:pretrained=none:learning_rates=1e-3+1e-3,$LITE:learning_rates=0+1e-3,$LITE:learning_rates=1e-4+3e-4+1e-3

example python benchmarks/learning.py --out learning --minutes 2,5 --seeds 0,1,2
The last line is a JSON object.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.artifacts.files import read_json, write_json
from common.artifacts.predictions import load_predictions, save_predictions
from common.artifacts.tables import read_table
from common.data.labels import parse_targets
from common.errors import UserError
from common.process import command_line
from common.process.main import run
from common.recipes import get_recipe, idle_fields
from common.score.metrics import bootstrap_macro_f1, class_f1
from common.score.thresholds import cross_fit

SHARE = 0.97  # of the available seconds that epochs are planned to fill
CALIBRATION_SECONDS = 25
SIZES = ("size_rule", "image_size", "crop_size", "size_divisor", "enlarge")
FLAGS = ("pretrained", "weights_dir", "precision")  # of 04_train.py, which an arm may give like fields
OTHERS = (
    "fastai-resnet18@0.001",
    "fastai-resnet18@0.003",
    "fastai-resnet18@0.01",
    "fastai-resnet34@0.003",
    "plain-resnet18@0.001",
    "plain-resnet18@0.003",
    "plain-ours@0.003",
    "plain-ours@0.006",
)


def numbers(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="input in the competition's layout (default: demo data)"
    )
    parser.add_argument("--out", type=Path, default=Path("learning"), metavar="DIR", help="folder for runs")
    parser.add_argument(
        "--minutes", type=numbers(float), default=[2.0, 5.0], metavar="A,B", help="minutes per run (default: 2,5)"
    )
    parser.add_argument(
        "--epochs", type=numbers(int), default=[], metavar="A,B", help="epochs per run, instead of minutes"
    )
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2], metavar="A,B", help="seeds (default: 0,1,2)")
    parser.add_argument("--n-folds", type=int, default=3, metavar="N", help="folds (default: 3)")
    parser.add_argument(
        "--ours",
        type=command_line.names,
        default=["demo", "small_plus"],
        metavar="A,B",
        help="recipes; fields, and the flags pretrained, weights_dir and precision, after colons, with + for commas: "
        "small_plus:batch_size=64:learning_rates=0+1e-3 (default: demo,small_plus)",
    )
    parser.add_argument(
        "--others",
        type=command_line.names,
        default=list(OTHERS),
        metavar="A@RATE,B@RATE",
        help=f"contestants of benchmarks/others.py and their learning rates; none (default: {','.join(OTHERS)})",
    )
    parser.add_argument(
        "--at-once",
        type=command_line.positive,
        default=1,
        metavar="N",
        help="runs at once, each with its share of the cores (default: 1)",
    )
    return parser.parse_args()


def main():
    args = parse_args()
    args.out = args.out.resolve()
    prepare(args)
    arms = args.ours + [name for name in args.others if name != "none"]
    folds = read_table(args.out / "work" / "folds.csv", "03_make_folds.py")
    jobs = [
        (arm, length, seed, fold)
        for length in lengths(args)
        for arm in arms
        for seed in args.seeds
        for fold in range(args.n_folds)
    ]
    todo = [job for job in jobs if not place(args, *job).is_file()]
    for arm in () if args.epochs else dict.fromkeys(job[0] for job in todo):
        calibrate(args, arm)
    started = time.monotonic()
    with ThreadPoolExecutor(args.at_once) as pool:
        for done, (arm, length, seed, fold) in enumerate(
            pool.map(lambda job: (run_arm(args, *job), job)[1], todo), start=1
        ):
            left = (time.monotonic() - started) / done * (len(todo) - done)
            print(
                f"{done}/{len(todo)} runs: {arm}, {length}, seed {seed}, fold {fold}; {left / 60:.0f} min left",
                flush=True,
            )
    report(args, arms, folds)


def prepare(args):
    """Run stages 01 to 03 into OUT/work."""
    data, work = args.data, args.out / "work"
    if data is None:
        data = args.out / "demo_data"
        if not (data / "train.csv").is_file():
            call(args, sys.executable, "-m", "common.demo", "--data", data)
    for script in (
        *dict.fromkeys(store_command(arm) for arm in [*args.ours, "demo"]),
        ("01_preprocess.py", "--recipes", "demo", "--set", "size_divisor=8"),
        ("02_dedup.py",),
        ("03_make_folds.py", "--n-folds", args.n_folds),
    ):
        call(args, sys.executable, *script, "--data", data.resolve(), "--work", work)


def store_command(arm: str) -> tuple[str, ...]:
    """Return the command that stores images at the sizes of an arm."""
    name, settings, _ = recipe_of(arm)
    sizes = [text for text in settings if text.partition("=")[0] in SIZES]
    return ("01_preprocess.py", "--recipes", name, *(["--set", *sizes] if sizes else []))


def recipe_of(arm: str) -> tuple[str, list[str], list[str]]:
    """Return the recipe of an arm, the fields that it changes, and its flags of 04_train.py."""
    name, *changes = arm.split(":")
    given = [change.partition("=")[::2] for change in changes]
    settings = [f"{field}={value.replace('+', ',')}" for field, value in given if field not in FLAGS]
    flags = [part for field, value in given if field in FLAGS for part in (f"--{field.replace('_', '-')}", value)]
    return name, settings, flags


def call(args, *command) -> tuple[float, str]:
    """Run a command on its share of the cores; return the seconds and its output. Raises UserError if it fails."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // args.at_once))
    started = time.monotonic()
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
    )
    if result.returncode:
        raise UserError(f"{' '.join(map(str, command))}\n{result.stderr[-2000:]}")
    return time.monotonic() - started, result.stdout


def lengths(args) -> list[str]:
    """Return the lengths of runs in words."""
    return [f"{epochs} epochs" for epochs in args.epochs] or [f"{minutes:g} min" for minutes in args.minutes]


def place(args, arm, length, seed, fold) -> Path:
    return args.out / "runs" / length.replace(" ", "_") / folder_name(arm) / f"seed{seed}_fold{fold}.npz"


def folder_name(arm: str) -> str:
    return arm.replace("/", "_")


def calibration(args, arm) -> Path:
    return args.out / "runs" / "calibration" / f"{folder_name(arm)}.json"


def train(args, arm, seed, fold, epochs, target: Path) -> dict:
    """Train and predict one fold; return the seconds in total and per epoch."""
    work, scratch = args.out / "work", target.with_suffix(".work")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name in ("samples.csv", "folds.csv", "images"):
        (scratch / name).symlink_to(work / name)
    contestant, _, rate = arm.partition("@")
    if rate:
        seconds, output = call(
            args,
            sys.executable,
            "benchmarks/others.py",
            "--contestant",
            contestant,
            "--work",
            scratch,
            "--fold",
            fold,
            "--seed",
            seed,
            "--epochs",
            epochs,
            "--rate",
            rate,
            "--out",
            target,
        )
        epoch = json.loads(output.splitlines()[-1])["epoch_seconds"]
    else:
        name, settings, flags = recipe_of(arm)
        recipe = get_recipe(name, settings)
        gain = [] if "min_cycle_gain" in idle_fields(recipe) else ["min_cycle_gain=0"]
        seconds, _ = call(
            args,
            sys.executable,
            "04_train.py",
            "--work",
            scratch,
            "--recipe",
            name,
            "--folds",
            fold,
            "--seed",
            seed,
            *flags,
            "--set",
            *settings,
            f"cycle_epochs={max(1, epochs // recipe.max_cycles)}",
            *gain,
        )
        rows = [
            json.loads(line)
            for line in (scratch / "runs" / name / f"fold{fold}" / "log.jsonl").read_text().splitlines()
        ]
        seconds += call(
            args,
            sys.executable,
            "05_predict_oof.py",
            "--work",
            scratch,
            "--recipes",
            name,
            "--folds",
            fold,
            "--no-test",
            "--checkpoint",
            "last",
        )[0]
        epoch = sum(row["seconds"] + row.get("valid_seconds", 0) for row in rows) / len(rows)
        save_predictions(target, *load_predictions(scratch / "predictions" / name / f"fold{fold}_oof.npz", ""))
    shutil.rmtree(scratch)
    return {"seconds": seconds, "epoch_seconds": epoch, "epochs": epochs}


def calibrate(args, arm) -> None:
    """Measure an arm's setup and seconds per epoch, once, after a short warm-up, with as many runs at once as later."""
    path = calibration(args, arm)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    first = train(args, arm, 0, 0, 2, path.with_suffix(".npz"))
    epochs = max(2, min(20, round(CALIBRATION_SECONDS / first["epoch_seconds"])))
    with ThreadPoolExecutor(args.at_once) as pool:
        found = list(
            pool.map(lambda k: train(args, arm, 0, 0, epochs, path.with_suffix(f".{k}.npz")), range(args.at_once))
        )
    write_json(path, max(found, key=lambda values: values["seconds"]))
    print(f"{arm}: {read_json(path)}", flush=True)


def run_arm(args, arm, length, seed, fold) -> None:
    target = place(args, arm, length, seed, fold)
    target.parent.mkdir(parents=True, exist_ok=True)
    number, unit = length.split()
    if unit == "epochs":
        epochs = int(number)
    else:
        known = read_json(calibration(args, arm))
        fixed = known["seconds"] - known["epochs"] * known["epoch_seconds"]
        epochs = max(1, int((SHARE * 60 * float(number) - fixed) / known["epoch_seconds"]))
    temporary = target.with_name("." + target.name)
    write_json(target.with_suffix(".json"), train(args, arm, seed, fold, epochs, temporary))
    temporary.rename(target)


def report(args, arms, folds) -> None:
    """Print scores with intervals, and the JSON."""
    rows = folds[folds["fold"] >= 0].set_index("Id")
    figures = {}
    for length in lengths(args):
        print(f"{length} per run, {args.n_folds} folds, seeds {', '.join(map(str, args.seeds))}")
        for arm in arms:
            found = figures[f"{arm}, {length}"] = score(args, arm, length, rows)
            low, high = found["interval"]
            print(
                f"  {arm:40s} {found['macro_f1']:.3f} [{low:.3f}, {high:.3f}]  mean AP {found['mean_ap']:.3f}  "
                f"{found['epochs']:4d} epochs, {found['seconds']:.0f} s at most; "
                f"seeds {' '.join(f'{value:.3f}' for value in found['seeds'])}"
            )
    if len(args.minutes) > 1 and not args.epochs:
        draw(args, arms, figures)
    print(json.dumps(figures))


def draw(args, arms, figures) -> None:
    """Draw each arm's score against the minutes per run, with intervals, as OUT/learning.png."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        found = [figures[f"{arm}, {length}"] for length in lengths(args)]
        scores = np.array([row["macro_f1"] for row in found])
        ends = np.abs(np.array([row["interval"] for row in found]) - scores[:, None]).T
        axes.errorbar(args.minutes, scores, ends, marker="o", markersize=4, capsize=3, label=arm)
    axes.set(
        xlabel="minutes per run, including setup",
        ylabel="macro F1, cross-fitted, 95 % interval",
        ylim=(0, 1),
        xscale="log",
    )
    axes.set_xticks(args.minutes, [f"{minutes:g}" for minutes in args.minutes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(args.out / "learning.png", dpi=120)


def score(args, arm, length, rows) -> dict:
    """Return macro F1 over the classes present: mean of all seeds and repeats, interval over samples, and by seed.

    mean_ap : mean average precision over these classes, mean of all seeds
    """
    order = rows.index[rows["fold"] < args.n_folds]
    targets, groups = parse_targets(rows.loc[order, "Target"]), rows.loc[order, "group"].to_numpy()
    seen = targets.any(axis=0)
    predicted, known, precisions = [], [], []
    for seed in args.seeds:
        paths = [place(args, arm, length, seed, fold) for fold in range(args.n_folds)]
        ids, probs = (
            np.concatenate(part) for part in zip(*(load_predictions(path, "") for path in paths), strict=True)
        )
        place_of = {Id: k for k, Id in enumerate(ids)}
        probs = probs[[place_of[Id] for Id in order]]
        precisions.append(average_precision_score(targets[:, seen], probs[:, seen], average="macro"))
        predicted.append([part[:, seen] for part in cross_fit(targets, probs, groups, "greedy")])
        known += [read_json(path.with_suffix(".json")) for path in paths]
    targets = targets[:, seen]
    seeds = [float(np.mean([class_f1(targets, part).mean() for part in parts])) for parts in predicted]
    return {
        "macro_f1": round(float(np.mean(seeds)), 4),
        "mean_ap": round(float(np.mean(precisions)), 4),
        "seeds": [round(value, 4) for value in seeds],
        "interval": [
            round(value, 4) for value in bootstrap_macro_f1(targets, [part for parts in predicted for part in parts])
        ],
        "seconds": round(max(values["seconds"] for values in known), 1),
        "epochs": known[0]["epochs"],
    }


if __name__ == "__main__":
    run(main)
