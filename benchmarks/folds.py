"""Measure how evenly stage 03 splits the real labels, and how long that takes.

Reads HPA_REAL_DATA/labels: train.csv (each sample is its own group) and HPAv18RBGY_wodpl.csv (the fields of one
antibody are a group). Per class: `off` is the largest difference of a fold's positives from n / 5, where n counts the
positives in all validation folds; `least` is the fewest positives in a fold. A class with at least 5 groups must be in
every fold.

example HPA_REAL_DATA=real python benchmarks/folds.py
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_data import real

from common.classes import CLASS_NAMES
from common.data.duplicates import antibodies, connect
from common.data.folds import make_folds
from common.data.labels import parse_targets, read_labels
from common.process import command_line
from common.process.main import run

N_FOLDS, MAX_COPIES, SEED = 5, 4, 0


def parse_args():
    parser = command_line.Parser(__doc__)
    parser.add_argument(
        "--repeats", type=command_line.positive, default=3, metavar="N", help="runs; the fastest counts (default: 3)"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    labels = real("labels")
    train = table(labels / "train.csv", "train")
    both = pd.concat([train, table(labels / "HPAv18RBGY_wodpl.csv", "external")], ignore_index=True)
    cases = {
        "train": (train, "train"),
        "both, external=train": (both, "train"),
        "both, external=stratified": (both, "stratified"),
    }
    seconds, folds = {name: [] for name in cases}, {}
    for _ in range(args.repeats):
        for name, (duplicates, external) in cases.items():
            started = time.perf_counter()
            folds[name] = make_folds(duplicates, N_FOLDS, MAX_COPIES, SEED, external)
            seconds[name].append(time.perf_counter() - started)
    report({name: {"seconds": round(min(seconds[name]), 2), **spread(folds[name])} for name in cases})


def table(path: Path, part: str) -> pd.DataFrame:
    """Return a label file as stage 02 writes it without near-identical images: Id, part, Target, group, kept."""
    frame = read_labels(path).assign(part=part, kept=1)
    links = antibodies(frame)  # none for train
    return frame.assign(group=frame["Id"].to_numpy()[connect(len(frame), links)])


def spread(folds: pd.DataFrame) -> dict:
    """Measure how even the validation folds are, per class."""
    inner = folds[folds["fold"] >= 0]
    targets = parse_targets(inner["Target"].to_numpy())
    positives = np.stack([targets[inner["fold"] == k].sum(axis=0) for k in range(N_FOLDS)])
    n_groups = np.array([inner["group"][has].nunique() for has in targets.T])
    off = np.abs(positives - positives.sum(axis=0) / N_FOLDS).max(axis=0)
    return {
        "rows": len(folds),
        "validated_rows": len(inner),
        "groups": int(inner["group"].nunique()),
        "worst_deviation": round(float(off.max()), 1),
        "worst_class": CLASS_NAMES[off.argmax()],
        "worst_share": round(float((off * N_FOLDS / positives.sum(axis=0)).max()), 3),
        "classes_that_miss_a_fold": int(((n_groups >= N_FOLDS) & (positives == 0).any(axis=0)).sum()),
        "groups_split": int((folds.groupby("group")["fold"].nunique() > 1).sum()),
        "class_positives": positives.sum(axis=0).tolist(),
        "class_groups": n_groups.tolist(),
        "class_deviation": off.round(1).tolist(),
        "class_least": positives.min(axis=0).tolist(),
    }


def report(figures: dict) -> None:
    """Print the classes of each case side by side, a summary of each case, and the JSON."""
    print(f"{'':30s}" + "".join(f" | {name:>30s}" for name in figures))
    print(f"{'class':30s}" + f" | {'n':>6s} {'groups':>7s} {'off':>7s} {'least':>7s}" * len(figures))
    columns = ("class_positives", "class_groups", "class_deviation", "class_least")
    for c, name in enumerate(CLASS_NAMES):
        cells = ([case[column][c] for column in columns] for case in figures.values())
        print(f"{name:30s}" + "".join(" | {:6d} {:7d} {:7.1f} {:7d}".format(*values) for values in cells))
    for name, case in figures.items():
        print(
            "{0}: {rows} rows in {seconds} s; {validated_rows} in folds, {groups} groups; worst deviation "
            "{worst_deviation} ({worst_class}), at most {worst_share:.1%} of a class's n / 5; classes of at least 5 "
            "groups that miss a fold: {classes_that_miss_a_fold}; groups split: {groups_split}".format(name, **case)
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    run(main)
