"""Several runs on the same samples: scores, paired differences with intervals, and which run wins which classes."""

from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from common.artifacts.files import read_json, write_json
from common.artifacts.layout import Layout
from common.artifacts.stage import Stage, read_sidecar, sidecar
from common.data.labels import parse_targets
from common.errors import UserError
from common.score.ensemble import keep_common, stack_members
from common.score.members import check_origin, check_there, labelled_rows, read_members
from common.score.metrics import bootstrap_f1, class_f1, macro_interval
from common.score.thresholds import cross_fit, repeated_folds


@dataclass(frozen=True)
class RunScore:
    """The scores of one run.

    wins : number of classes with samples in which this run is better than all others
    """

    name: str
    macro_f1: float
    interval: list[float]
    wins: int
    per_class: list[float]


@dataclass(frozen=True)
class Difference:
    """How much higher the macro F1 of run `a` is than that of run `b`, with its paired 95 % interval over samples.

    a_wins, b_wins : number of classes in which each is better than the other
    """

    a: str
    b: str
    difference: float
    interval: list[float]
    a_wins: int
    b_wins: int


def compare_runs(targets: np.ndarray, probs: dict[str, np.ndarray], groups: np.ndarray, method: str) -> dict:
    """Score runs with cross-fitted thresholds on the same rows, and each pair's difference, as plain types for JSON.

    targets : (n, n_classes) bool; probs : name -> (n, n_classes); groups : (n,), drawn and split as a whole
    The bootstrap draws the same groups for all runs, so shared effects, for example hard samples, do not widen a
    difference's interval. It has the percentiles of the draws' differences, centred on the difference.
    """
    if len(probs) < 2:
        raise UserError(f"expected at least two runs to compare, found {', '.join(probs) or 'none'}")
    folds = repeated_folds(targets, groups)
    decided = {name: cross_fit(targets, values, groups, method, folds=folds) for name, values in probs.items()}
    f1 = {name: np.mean([class_f1(targets, made) for made in repeats], axis=0) for name, repeats in decided.items()}
    draws = {name: bootstrap_f1(targets, repeats, groups) for name, repeats in decided.items()}
    present = targets.any(axis=0)
    scores = [
        RunScore(
            name,
            float(f1[name].mean()),
            macro_interval(float(f1[name].mean()), draws[name], targets.sum(axis=0)),
            int(sum(all(f1[name][c] > f1[other][c] for other in f1 if other != name) for c in np.flatnonzero(present))),
            f1[name].tolist(),
        )
        for name in probs
    ]
    macro_draws = {name: np.nan_to_num(drawn).mean(axis=1) for name, drawn in draws.items()}
    differences = [
        Difference(
            a,
            b,
            float((f1[a] - f1[b]).mean()),
            paired_interval(float((f1[a] - f1[b]).mean()), macro_draws[a] - macro_draws[b]),
            int((f1[a] > f1[b])[present].sum()),
            int((f1[b] > f1[a])[present].sum()),
        )
        for a, b in combinations(probs, 2)
    ]
    return {
        "method": method,
        "n_samples": len(targets),
        "n_present": int(present.sum()),
        "runs": [asdict(score) for score in scores],
        "differences": [asdict(difference) for difference in differences],
    }


def compare_stage(layout: Layout, names: list[str], method: str) -> dict:
    """Return the result of `compare_runs` for stage 05's out-of-fold predictions, kept in the work folder."""
    again = layout.command("05_predict_oof.py", "--recipes", ",".join(names))
    files = {name: layout.predictions(name, "oof") for name in names}
    check_there(list(files.values()), again)
    check_origin(layout.work, names, "oof")
    parameters = {"method": method, "compare": names}
    stage = Stage("06_thresholds", layout.comparison, parameters, {"folds.csv": layout.folds, **files})
    if not stage.is_current():
        folds = layout.read_folds()
        members, wanted = keep_common(read_members(list(files.values()), None, again), folds["Id"].to_numpy())
        probs = dict(zip(names, stack_members(members, names, wanted), strict=True))
        rows = labelled_rows(folds, wanted, again)
        with stage.making() as record:
            found = compare_runs(parse_targets(rows["Target"]), probs, rows["group"].to_numpy(), method)
            write_json(stage.artifact, found)
            record.rows = len(wanted)
    return read_json(stage.artifact)


def paired_interval(difference: float, draws: np.ndarray) -> list[float]:
    """Return the 95 % interval of a difference from its draws (n_draws,), centred on it: [low, high]."""
    low, high = np.quantile(draws - draws.mean(), [0.025, 0.975])
    return [difference + float(low), difference + float(high)]


def comparison(layout: Layout, names: list[str], method: str) -> str:
    """Return the comparison of runs as text, with their folds and training times."""
    facts = {name: run_facts(layout, name) for name in names}
    return "\n  ".join(describe_comparison(compare_stage(layout, names, method), facts))


def describe_comparison(result: dict, facts: dict[str, str]) -> list[str]:
    """Describe the result of `compare_runs`, best run first.

    facts : further information on each run, for example its folds and training time
    """
    wide = max(len(run["name"]) for run in result["runs"])
    lines = [
        f"{result['n_samples']} samples that all runs predicted out of fold, {result['method']} thresholds, "
        "cross-fitted",
        f"{'run':{wide}s} macro F1 {'95 % interval':>16s} {'wins':>5s}  ",
    ]
    lines += [
        f"{run['name']:{wide}s} {run['macro_f1']:8.3f} {span(run['interval']):>16s} {run['wins']:5d}  "
        f"{facts.get(run['name'], '')}"
        for run in sorted(result["runs"], key=lambda run: -run["macro_f1"])
    ]
    lines += [f"paired differences over samples, and in how many of {result['n_present']} classes each is better:"]
    for row in result["differences"]:
        clear = "" if row["interval"][0] > 0 or row["interval"][1] < 0 else "  (may be chance)"
        lines.append(
            f"{row['a']} - {row['b']}: {row['difference']:+.3f} {span(row['interval'], '+')}, "
            f"{row['a_wins']} to {row['b_wins']} classes{clear}"
        )
    return lines


def run_facts(layout: Layout, name: str) -> str:
    """Describe the folds that a run's out-of-fold predictions are based on, and their training time."""
    record = layout.predictions(name, "oof")
    numbers = read_sidecar(record)["parameters"].get("folds", []) if sidecar(record).is_file() else []
    networks = [layout.network(name, fold) for fold in numbers]
    records = [read_sidecar(path) for path in networks if sidecar(path).is_file()]
    # Of earlier versions, only the seconds of the command that finished the training are known.
    seconds = sum(record.get("train_seconds", record.get("seconds", 0)) for record in records)
    return f"folds {','.join(map(str, numbers))}" + (f", trained {seconds / 60:.1f} min" if seconds else "")


def span(interval: list[float], sign: str = "") -> str:
    """Return an interval as text."""
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
