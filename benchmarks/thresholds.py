"""Compare threshold methods: their score on unseen rows, how honest their reported figures are, and their speed.

Reads HPA_REAL_DATA: predictions/ of three real networks with 295 labelled rows, labels/train.csv.

networks   cross-fitted macro F1 of each network over 28 classes (one without positives counts 0), 5 folds, 3 repeats
simulation labels drawn from train.csv (all: 31,072 rows with its class counts) or from the 295 labelled rows (few),
           with probabilities of known distributions, so that the true macro F1 of thresholds is known: bias and spread
           of the reported figures, and how often the interval contains the truth. Each draw is kept in WORK, so a
           stopped run resumes.
forms      the true macro F1 of each method's thresholds where evidence is normal, has heavy tails, or 15 % of the
           positives look like negatives, each with weak and strong evidence; by the number of rows
speed      greedy against the same search with scikit-learn's f1_score on every candidate; a million rows

example HPA_REAL_DATA=real python benchmarks/thresholds.py --work work --draws 200
The last line is a JSON object.
"""

import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit, logit, ndtr
from sklearn.metrics import f1_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from real_data import real

from common.data.labels import parse_targets, read_labels
from common.process import command_line
from common.process.main import run
from common.process.progress import progress
from common.score.metrics import bootstrap_macro_f1, class_f1, f1_from_counts, macro_f1
from common.score.thresholds import GRID, METHODS, cross_fit, find_thresholds, greedy_thresholds, repeated_folds

NETWORKS = ("inceptionv3_650", "inceptionv4_800", "xception_512")
WITH_INTERVAL = ("greedy", "calibrated")


def main():
    parser = command_line.parser(__doc__)
    parser.add_argument("--draws", type=int, default=200, metavar="N", help="draws of the simulation (default: 200)")
    parser.add_argument(
        "--parts",
        type=command_line.names,
        default=["networks", "simulation", "forms", "speed"],
        metavar="A,B",
        help="default: all",
    )
    parser.add_argument(
        "--cases", type=command_line.names, default=["few", "all"], metavar="A,B", help="default: few,all"
    )
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="worlds of each of the forms (default: 4)")
    args = parser.parse_args()
    figures = {}
    if "networks" in args.parts:
        figures["networks"] = networks()
    if "simulation" in args.parts:
        figures["simulation"] = {case: simulation(case, args.draws, args.work) for case in args.cases}
    if "forms" in args.parts:
        figures["forms"] = forms(args.seeds)
    if "speed" in args.parts:
        figures["speed"] = speed()
    print(json.dumps(figures))


# --- three real networks -------------------------------------------------------------------------------------


def labelled_rows():
    """Return the targets of the labelled rows, and each network's probabilities for them."""
    labels = read_labels(real("predictions") / "labels.csv")
    order = pd.read_csv(real("labels") / "sample_submission.csv", dtype=str)["Id"]
    rows = pd.Series(range(len(order)), index=order)[labels["Id"]]
    return parse_targets(labels["Target"]), {
        name: np.load(real("predictions") / f"{name}.npy")[rows] for name in NETWORKS
    }


def networks() -> dict:
    """Score every method on every network, on all labelled rows and on 5 draws of 100 and 200 of them."""
    targets, probs = labelled_rows()
    rng = np.random.default_rng(0)
    cases = {"295": [np.arange(len(targets))]}
    cases |= {str(n): [rng.permutation(len(targets))[:n] for _ in range(5)] for n in (200, 100)}
    scores = {case: {method: {name: 0.0 for name in NETWORKS} for method in METHODS} for case in cases}
    rarest = {method: 0.0 for method in METHODS}
    for case, draws in progress(cases.items(), len(cases), "networks", unit="cases"):
        for rows in draws:
            folds = repeated_folds(targets[rows], np.arange(len(rows)))
            for method in METHODS:
                for name in NETWORKS:
                    unseen = cross_fit(targets[rows], probs[name][rows], None, method, folds=folds)
                    f1 = np.mean([class_f1(targets[rows], predicted) for predicted in unseen], axis=0)
                    scores[case][method][name] += f1.mean() / len(draws)
                    if case == "295":
                        rarest[method] += f1[targets.sum(axis=0) < 3].sum() / len(f1) / len(NETWORKS)
    for case in cases:
        print(f"{case} rows{'':8s}" + "".join(f"{name:>17s}" for name in NETWORKS) + "             mean")
        for method, row in scores[case].items():
            print(f"{method:16s}" + "".join(f"{value:17.4f}" for value in [*row.values(), np.mean(list(row.values()))]))
    print(
        "of the mean on 295 rows, from classes with fewer than 3 positives: "
        + ", ".join(f"{method} {value:.4f}" for method, value in rarest.items())
    )
    return {"scores": scores, "from_classes_below_3_positives": rarest}


# --- simulation of a known truth ------------------------------------------------------------------------------


class World:
    """Classes whose evidence is normal around 0 (negatives) or a separation (positives).

    The evidence is turned into a probability that is distorted by a factor and an offset in the logit, by class.

    form : normal; heavy = Student's t with 3 degrees of freedom; noisy = 15 % of the positives look like negatives
    """

    def __init__(self, targets: np.ndarray, seed: int = 7, form: str = "normal", separations=(2, 4.5)):
        rng = np.random.default_rng(seed)
        self.targets, self.share, self.form = targets, targets.mean(axis=0), form
        self.separation = rng.uniform(*separations, len(self.share))
        self.prior = logit(np.maximum(self.share, 1e-3))
        self.factor, self.offset = rng.uniform(0.5, 1.2, len(self.share)), rng.normal(0, 0.5, len(self.share))

    def draw(self, rng, n_rows: int | None = None):
        targets = self.targets[rng.integers(len(self.targets), size=n_rows or len(self.targets))]
        heavy = self.form == "heavy"
        evidence = rng.standard_t(3, targets.shape) / 1.3 if heavy else rng.normal(size=targets.shape)
        seen = targets & (rng.random(targets.shape) > 0.15) if self.form == "noisy" else targets
        evidence = evidence + self.separation * seen
        logits = (self.separation * (evidence - self.separation / 2) + self.prior) * self.factor + self.offset
        return targets, expit(logits).astype(np.float32)

    def true_macro_f1(self, thresholds) -> float:
        """Return the macro F1 of thresholds on infinitely many samples of the normal form."""
        evidence = (
            (logit(thresholds) - self.offset) / self.factor - self.prior
        ) / self.separation + self.separation / 2
        tp, fp = self.share * ndtr(self.separation - evidence), (1 - self.share) * ndtr(-evidence)
        return float(f1_from_counts(tp, fp, self.share - tp).mean())


def simulation(case: str, n_draws: int, work: Path) -> dict:
    targets = (
        labelled_rows()[0] if case == "few" else parse_targets(read_labels(real("labels") / "train.csv")["Target"])
    )
    world, path = World(targets), work / "benchmark_thresholds" / f"{case}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    with open(path, "a") as file:
        for seed in progress(
            range(len(done), n_draws), n_draws, f"simulation, {case}", unit="draws", initial=len(done)
        ):
            done.append(one_draw(world, seed))
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
    return summary(case, done[:n_draws])


def one_draw(world: World, seed: int) -> dict:
    """Return for each method the true score of its thresholds, the reported score, and the interval."""
    rng = np.random.default_rng(seed)
    targets, probs = world.draw(rng)
    folds, found = [rng.permutation(len(targets)) % 5], {}
    for method in METHODS:
        thresholds = find_thresholds(targets, probs, method)
        unseen = cross_fit(targets, probs, None, method, folds=folds)
        interval = bootstrap_macro_f1(targets, unseen) if method in WITH_INTERVAL else None
        found[method] = [
            world.true_macro_f1(thresholds),
            macro_f1(targets, unseen[0]),
            macro_f1(targets, probs >= thresholds),
            interval,
        ]
    return found


def summary(case: str, draws: list[dict]) -> dict:
    print(
        f"simulation, {case}: {len(draws)} draws; bias and spread of the reported score minus the truth\n"
        f"{'method':12s} {'truth':>7s}  {'cross-fitted':>15s}  {'in-sample':>15s}  interval contains it, mean width"
    )
    figures = {}
    for method in METHODS:
        truth, honest, flattering = np.array([draw[method][:3] for draw in draws]).T
        row = {
            "truth": truth.mean(),
            "bias": (honest - truth).mean(),
            "spread": (honest - truth).std(),
            "in_sample_bias": (flattering - truth).mean(),
            "in_sample_spread": (flattering - truth).std(),
        }
        text = ("{truth:7.4f}  {bias:+7.4f} {spread:7.4f}  {in_sample_bias:+7.4f} {in_sample_spread:7.4f}").format(
            **row
        )
        if method in WITH_INTERVAL:
            low, high = np.array([draw[method][3] for draw in draws]).T
            row |= {"coverage": float(((low <= truth) & (truth <= high)).mean()), "width": float((high - low).mean())}
            text += f"  {row['coverage']:.1%}, {row['width']:.4f}"
        print(f"{method:12s} {text}")
        figures[method] = {name: round(float(value), 4) for name, value in row.items()}
    return {"draws": len(draws), **figures}


# --- evidence of several forms -------------------------------------------------------------------------------


def forms(n_seeds: int) -> dict:
    """Print the macro F1 of each method's thresholds on 60,000 other rows, mean of the worlds of each form."""
    labels = parse_targets(read_labels(real("labels") / "train.csv")["Target"])
    cases = [
        (form, separations, n_rows)
        for n_rows in (300, 1000, 5000, len(labels))
        for form in ("normal", "heavy", "noisy")
        for separations in ((1, 3), (2, 4.5))
    ]
    print("form, separation, rows    " + "".join(f"{method:>11s}" for method in METHODS))
    figures = {}
    for form, separations, n_rows in cases:
        scores = []
        for seed in range(n_seeds):
            world, rng = World(labels, seed, form, separations), np.random.default_rng(100 + seed)
            (targets, probs), (unseen, values) = world.draw(rng, n_rows), world.draw(rng, 60_000)
            found = [find_thresholds(targets, probs, method) for method in METHODS]
            scores.append([macro_f1(unseen, values >= thresholds) for thresholds in found])
        name = f"{form} {separations[0]}-{separations[1]} {n_rows}"
        figures[name] = dict(zip(METHODS, np.mean(scores, axis=0).round(4).tolist(), strict=True))
        print(f"{name:26s}" + "".join(f"{value:11.4f}" for value in figures[name].values()), flush=True)
    return figures


# --- speed ---------------------------------------------------------------------------------------------------


def speed() -> dict:
    world = World(parse_targets(read_labels(real("labels") / "train.csv")["Target"]))
    targets, probs = world.draw(np.random.default_rng(0))
    ours, thresholds = min((timed(greedy_thresholds, targets, probs) for _ in range(5)), key=lambda pair: pair[0])
    slow, expected = timed(oracle, targets, probs)
    print(
        f"greedy on {targets.shape}: {ours:.3f} s; with scikit-learn {slow:.1f} s, {slow / ours:.0f} times as long; "
        f"same thresholds: {np.array_equal(thresholds, expected)}"
    )
    figures = {
        "greedy_s": ours,
        "oracle_s": slow,
        "ratio": slow / ours,
        "same": bool(np.array_equal(thresholds, expected)),
    }
    for method in METHODS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, gib = pool.apply(million, (method,))
        print(f"{method:12s} on a million rows: {seconds:.1f} s, {gib:.2f} GiB peak memory of the whole process")
        figures[f"million_{method}"] = [round(seconds, 2), round(gib, 2)]
    return figures


def timed(function, *arguments):
    """Return the seconds of CPU time, which hardly depend on other work on the machine, and the result."""
    started = time.process_time()
    result = function(*arguments)
    return time.process_time() - started, result


def oracle(targets, probs) -> np.ndarray:
    """Find thresholds by the paper's search as written: macro F1 of everything for every candidate."""

    def score(thresholds):
        return f1_score(targets, probs >= thresholds, average="macro", zero_division=0)

    singles = [score(np.full(targets.shape[1], t)) for t in GRID]
    best, thresholds = max(singles), np.full(targets.shape[1], GRID[int(np.argmax(singles))])
    for c in progress(range(targets.shape[1]), targets.shape[1], "oracle", unit="classes"):
        for candidate in GRID:
            trial = thresholds.copy()
            trial[c] = candidate
            value = score(trial)
            if value > best + 1e-12:
                best, thresholds = value, trial
    return thresholds


def million(method: str) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    probs = rng.random((1_000_000, 28), dtype=np.float32)
    targets = rng.random(probs.shape, dtype=np.float32) < probs * 0.1
    seconds, _ = timed(find_thresholds, targets, probs, method)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    run(main)
