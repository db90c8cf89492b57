"""Reproduce Tables 1 to 3 of Zhang et al. 2021 from out-of-fold predictions, beside the paper's figures.

A system (a recipe) has one run for each step of the method. A column of the tables is a run and its kind of threshold.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from common.artifacts.layout import Layout
from common.artifacts.predictions import load_predictions
from common.artifacts.stage import read_sidecar, sidecar
from common.classes import N_CLASSES
from common.data.folds import fold_numbers
from common.data.labels import absent_classes, parse_targets
from common.errors import UserError
from common.score.ensemble import align
from common.score.metrics import f1_from_counts, macro_f1
from common.score.thresholds import cross_fit

MEAN, SPREAD = "mean", "standard deviation"
NO_FOLD = None  # the fold of the paper's figures for a single, unnumbered fold
N_DRAWS = 1000


class Column(NamedTuple):
    """A column: the step whose run it shows, whether thresholds are tuned (else 0.5), the column to compare it with."""

    key: str
    table: int
    title: str
    step: str
    tuned: bool
    against: str | None


COLUMNS = (
    Column("original", 1, "Original", "original", False, None),
    Column("customised", 1, "Customised", "customised", False, "original"),
    Column("hard", 1, "With hard sampler", "hard", False, "customised"),
    Column("eloss", 2, "With E-loss", "eloss", False, "hard"),
    Column("ta", 3, "TA", "ta", False, "eloss"),
    Column("te", 3, "TE", "eloss", True, "eloss"),
    Column("ta_te", 3, "TA + TE", "ta", True, "ta"),
)
TITLES = {column.key: column.title for column in COLUMNS}
SCORE_FIELDS = ["table", "model", "fold", "column", "run", "thresholds", "macro_f1", "paper", "n_samples"]
GAIN_FIELDS = ["model", "column", "against", "gain", "low", "high", "paper", "n_folds", "n_samples"]
HEADINGS = {
    1: "Original and customised networks",
    2: "With E-loss",
    3: "With optimisation in training (TA) and of thresholds (TE)",
}

# Tables 1 to 3 of the paper: recipe -> fold -> figures in the order of COLUMNS.
PAPER: dict[str, dict[int | None, tuple[float, ...]]] = {
    "resnet50": {
        0: (0.737, 0.750, 0.761, 0.770, 0.774, 0.772, 0.774),
        1: (0.729, 0.734, 0.752, 0.766, 0.769, 0.771, 0.773),
        2: (0.735, 0.746, 0.758, 0.768, 0.773, 0.769, 0.775),
        3: (0.731, 0.741, 0.749, 0.758, 0.763, 0.760, 0.765),
        4: (0.726, 0.730, 0.755, 0.762, 0.765, 0.763, 0.767),
    },
    "inceptionv4": {NO_FOLD: (0.736, 0.749, 0.756, 0.767, 0.772, 0.770, 0.772)},
    "senet": {NO_FOLD: (0.745, 0.736, 0.771, 0.782, 0.786, 0.783, 0.789)},
    # The paper's "random fold" 1, 2, 3.
    "densenet50": {
        0: (0.732, 0.738, 0.741, 0.758, 0.762, 0.760, 0.765),
        1: (0.729, 0.735, 0.748, 0.761, 0.765, 0.763, 0.766),
        2: (0.732, 0.741, 0.754, 0.766, 0.771, 0.769, 0.774),
    },
    "resnet101": {NO_FOLD: (0.742, 0.758, 0.760, 0.778, 0.782, 0.784, 0.785)},
    "gapnet_pl": {NO_FOLD: (np.nan, np.nan, np.nan, 0.765, 0.765, 0.765, 0.765)},
}


def summarise(cells: dict) -> dict:
    """Return the scores by fold, their mean and, for two or more folds, their standard deviation (ddof = 1)."""
    values = list(cells.values())
    return (
        cells
        | ({MEAN: float(np.mean(values))} if values else {})
        | ({SPREAD: float(np.std(values, ddof=1))} if len(values) > 1 else {})
    )


def paper_cells(model: str, key: str, numbers: Iterable[int]) -> dict:
    """Return the paper's figures of a column by fold, for folds among `numbers`, with their summary; or {}."""
    place = list(TITLES).index(key)
    figures = {fold: row[place] for fold, row in PAPER.get(model, {}).items()}
    if NO_FOLD in figures:
        return {MEAN: figures[NO_FOLD]}
    return summarise({fold: figures[fold] for fold in numbers if fold in figures})


# --- predictions of stage 05 -------------------------------------------------------------------------------


def validation_rows(folds: pd.DataFrame, numbers: list[int] | None) -> pd.DataFrame:
    """Return the rows of folds.csv in the given folds (None: all); raises UserError for unknown folds."""
    known = fold_numbers(folds)
    unknown = sorted(set(numbers or ()) - set(known))
    if unknown:
        raise UserError(f"there is no fold {unknown[0]}; folds.csv has the folds {', '.join(map(str, known))}")
    return folds[folds["fold"].isin(known if numbers is None else numbers)].reset_index(drop=True)


def prediction_files(work: Path, runs: Iterable[str], numbers: Collection[int]) -> dict[str, dict[int, Path]]:
    """Return the path of the out-of-fold file of each run and fold, whether it exists or not."""
    return {run: {int(fold): Layout(work).predictions(run, "oof", fold) for fold in numbers} for run in runs}


def missing_runs(systems: dict[str, dict[str, str]], files: dict[str, dict[int, Path]]) -> dict[str, list[str]]:
    """Describe by model the runs with a fold's file missing; {} if none is. One missing fold makes a missing run.

    systems : model -> step -> run name
    """
    lines: dict[str, list[str]] = {}
    for model, runs in systems.items():
        for step, run in runs.items():
            missing = [str(fold) for fold, path in files[run].items() if not path.is_file()]
            if missing:
                text = f"{TITLES[step]} of {model}: {run} has no predictions of fold {', '.join(missing)}"
                lines.setdefault(model, []).append(text)
    return lines


def check_same_views(files: dict[str, dict[int, Path]]) -> None:
    """Refuse runs that stage 05 predicted in different ways: different views would look like a gain."""
    ways = {
        path: read_sidecar(path)["parameters"]
        for paths in files.values()
        for path in paths.values()
        if sidecar(path).is_file()
    }
    for path, way in ways.items():
        first, expected = next(iter(ways.items()))
        if way != expected:
            raise UserError(
                f"{first} was predicted with {expected}, {path} with {way}; run stage 05 for all runs with the "
                "same --tta, --view and --checkpoint"
            )


def load_run(files: dict[int, Path], rows: pd.DataFrame, made_by: str) -> np.ndarray:
    """Return a run's probabilities in the order of `rows`, (n, 28); each file must have exactly the Ids of its fold."""
    probs = np.empty((len(rows), N_CLASSES), dtype=np.float32)
    for fold, path in files.items():
        here = (rows["fold"] == fold).to_numpy()
        ids, values = load_predictions(path, made_by)
        name = f"{path} is not for this folds.csv (run: {made_by})"
        probs[here] = align(ids, values, rows["Id"][here].to_numpy(), name)
    return probs


# --- scores ------------------------------------------------------------------------------------------------


def decide(probs: np.ndarray, tuned: bool, targets: np.ndarray, groups: np.ndarray) -> list[np.ndarray]:
    """Return bool predictions (n, 28): one array at 0.5, or one for each repeat of cross-fitted greedy thresholds."""
    return cross_fit(targets, probs, groups, "greedy") if tuned else [probs >= 0.5]


def fold_scores(targets: np.ndarray, folds: np.ndarray, predictions: list[np.ndarray]) -> dict[int, float]:
    """Return macro F1 (eq. 4) of each fold's rows, mean of `predictions`; a class absent from a fold counts as 0."""
    return {
        int(fold): float(
            np.mean([macro_f1(targets[folds == fold], predicted[folds == fold]) for predicted in predictions])
        )
        for fold in np.unique(folds)
    }


def paired_gain(
    targets: np.ndarray,
    folds: np.ndarray,
    after: list[np.ndarray],
    before: list[np.ndarray],
    n_draws: int = N_DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return how much better `after` is than `before`, and the (low, high) of its paired bootstrap interval.

    targets : (n, n_classes) bool; folds : (n,) fold of each row
    after, before : bool arrays like `targets`, whose scores are averaged
    A score is the mean over folds of macro F1. Rows are drawn with replacement within each fold, in ascending order of
    folds, and the same rows for both sides. A class's F1 counts as 0 in draws that miss it.
    """
    rng = np.random.default_rng(seed)
    numbers = np.unique(folds)
    sides = np.array([1 / len(after)] * len(after) + [-1 / len(before)] * len(before))
    differences = np.zeros(n_draws)
    for fold in numbers:
        here = folds == fold
        target, n = targets[here], here.sum()
        parts = [part for predicted in (*after, *before) for part in (target & predicted[here], predicted[here])]
        indicators = np.hstack([target, *parts]).astype(np.float32)
        draws = (np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(n_draws))
        weights = np.stack([draw.astype(np.float32) for draw in draws])
        counts = (weights @ indicators).astype(np.float64).reshape(n_draws, -1, target.shape[1])
        positives, tp, called = counts[:, :1], counts[:, 1::2], counts[:, 2::2]
        scores = f1_from_counts(tp, called - tp, positives - tp).mean(axis=2)  # (n_draws, predictions of both sides)
        differences += (scores * sides).sum(axis=1) / len(numbers)
    means = [np.mean(list(fold_scores(targets, folds, side).values())) for side in (after, before)]
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    return float(means[0] - means[1]), float(low), float(high)


def score_system(
    model: str, runs: dict[str, str], probs: dict[str, np.ndarray], rows: pd.DataFrame
) -> tuple[list[dict], list[dict]]:
    """Return one system's rows of tables.csv and of gains.csv as dicts.

    runs : step -> run name, in the order of the method; a system without `ta` repeats its `eloss` run there
    probs : run name -> (n, 28) in the order of `rows`; cells of missing runs are NaN
    rows : table with Id, Target, group, fold
    """
    shown = {"ta": runs["eloss"], **runs} if "eloss" in runs else runs
    columns = [column for column in COLUMNS if column.step in shown]
    targets, folds, groups = parse_targets(rows["Target"]), rows["fold"].to_numpy(), rows["group"].to_numpy()
    made_of = {column.key: (shown[column.step], column.tuned) for column in columns}
    decided = {
        (run, tuned): decide(probs[run], tuned, targets, groups)
        for run, tuned in dict.fromkeys(made_of.values())
        if run in probs
    }
    predictions = {key: decided[source] for key, source in made_of.items() if source in decided}
    scores = [
        cell
        for column in columns
        for cell in column_cells(model, column, shown[column.step], targets, folds, predictions.get(column.key))
    ]
    gains = [
        gain_cells(model, column, targets, folds, predictions[column.key], predictions[column.against])
        for column in columns  # a repeated run has no gain over itself
        if column.step in runs and column.key in predictions and column.against in predictions
    ]
    return scores, gains


def column_cells(
    model: str, column: Column, run: str, targets: np.ndarray, folds: np.ndarray, predictions: list[np.ndarray] | None
) -> list[dict]:
    """Return a column's cells: each fold, the mean, the standard deviation. NaN without predictions."""
    numbers = np.unique(folds).tolist()
    ours = summarise(fold_scores(targets, folds, predictions)) if predictions else {}
    paper = paper_cells(model, column.key, numbers)
    sizes = {fold: int((folds == fold).sum()) for fold in numbers}
    return [
        {
            "table": column.table,
            "model": model,
            "fold": str(fold),
            "column": column.key,
            "run": run,
            "thresholds": "cross-fitted" if column.tuned else "0.5",
            "macro_f1": ours.get(fold, np.nan),
            "paper": paper.get(fold, np.nan),
            "n_samples": sizes.get(fold, len(folds)),
        }
        for fold in (*numbers, MEAN, SPREAD)
    ]


def gain_cells(
    model: str,
    column: Column,
    targets: np.ndarray,
    folds: np.ndarray,
    after: list[np.ndarray],
    before: list[np.ndarray],
) -> dict:
    """Return a column's gain over the one that it adds to, as a row of gains.csv."""
    gain, low, high = paired_gain(targets, folds, after, before)
    numbers = np.unique(folds).tolist()
    assert column.against is not None
    paper = [paper_cells(model, key, numbers).get(MEAN, np.nan) for key in (column.key, column.against)]
    return {
        "model": model,
        "column": column.key,
        "against": column.against,
        "gain": gain,
        "low": low,
        "high": high,
        "paper": paper[0] - paper[1],
        "n_folds": len(numbers),
        "n_samples": len(folds),
    }


def score_systems(
    systems: dict[str, dict[str, str]], probs: dict[str, np.ndarray], rows: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return tables.csv and gains.csv of all systems as two data frames."""
    scores, gains = [], []
    for model, runs in systems.items():
        cells, steps = score_system(model, runs, probs, rows)
        scores += cells
        gains += steps
    return pd.DataFrame(scores, columns=SCORE_FIELDS), pd.DataFrame(gains, columns=GAIN_FIELDS)


# --- output ------------------------------------------------------------------------------------------------


def wide_table(scores: pd.DataFrame, gains: pd.DataFrame, table: int) -> pd.DataFrame:
    """Return one table of the paper: a row per model and fold, then mean, spread and gains; NaN where blank."""
    keys = [column.key for column in COLUMNS if column.table == table]
    lines: dict[tuple[str, str], dict] = {}
    for cell in scores[scores["table"] == table].itertuples():
        line = lines.setdefault((cell.model, cell.fold), {})
        line |= {cell.column: cell.macro_f1, f"{cell.column}_paper": cell.paper}
    for gain in gains[gains["column"].isin(keys)].itertuples():
        line = lines.setdefault((gain.model, "gain"), {})
        line |= {gain.column: gain.gain, f"{gain.column}_paper": gain.paper}
        for end in ("low", "high"):
            lines.setdefault((gain.model, f"gain {end}"), {})[gain.column] = getattr(gain, end)
    models = list(scores["model"].unique())
    order = sorted(lines, key=lambda line: models.index(line[0]))
    fields = ["model", "fold", *(field for key in keys for field in (key, f"{key}_paper"))]
    return pd.DataFrame([{"model": model, "fold": fold, **lines[model, fold]} for model, fold in order], columns=fields)


def aligned(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a Markdown table with aligned columns: the first `left` ones to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in (header, rule, *rows)
    )


def figure(value: float, style: str = ".3f") -> str:
    return "-" if np.isnan(value) else format(round(value, 3) + 0.0, style)  # + 0.0: no "-0.000"


def markdown_table(scores: pd.DataFrame, table: int) -> str:
    """Return a table with the paper's figures beside ours, '-' where one is missing."""
    wide = wide_table(scores, pd.DataFrame(columns=GAIN_FIELDS), table)
    header = ["Model", *(name for column in COLUMNS if column.table == table for name in (column.title, "paper"))]
    rows = [
        [f"{model} (fold {fold})" if fold.isdecimal() else f"{model} {fold}", *map(figure, cells)]
        for model, fold, *cells in wide.itertuples(index=False)
    ]
    return f"## Table {table}. {HEADINGS[table]}\n\n{aligned(header, rows)}"


def markdown_gains(gains: pd.DataFrame) -> str:
    """Return the gain of each column over the one that it adds to, with its interval and the paper's difference."""
    rows = [
        [
            gain.model,
            TITLES[gain.column],
            TITLES[gain.against],
            figure(gain.gain, "+.3f"),
            f"[{figure(gain.low, '+.3f')}, {figure(gain.high, '+.3f')}]",
            figure(gain.paper, "+.3f"),
        ]
        for gain in gains.itertuples()
    ]
    return "## Gains\n\n" + aligned(["Model", "Column", "over", "gain", "95 % interval", "paper"], rows, left=3)


def absent_notes(rows: pd.DataFrame, limit: int = 3) -> list[str]:
    """Count the classes without a positive in a fold and name the first ones; folds with the same share a line."""
    folds_of: dict[tuple[str, ...], list[str]] = {}
    for fold, part in rows.groupby("fold"):
        folds_of.setdefault(tuple(absent_classes(parse_targets(part["Target"]))), []).append(str(fold))
    return [
        f"Without a positive in fold {', '.join(folds)}: {len(absent)} of the {N_CLASSES} classes, each of which "
        f"counts as 0 there: {', '.join(absent[:limit])}{', ...' if len(absent) > limit else '.'}"
        for absent, folds in folds_of.items()
        if absent
    ]


def notes(systems: dict[str, dict[str, str]], missing: dict[str, list[str]], rows: pd.DataFrame) -> list[str]:
    """Return remarks on what the figures mean and what they do not."""
    remarks = [
        f"A cell is macro F1 over the {N_CLASSES} classes on the rows of one validation fold, by the network that was "
        "not trained on them. Mean and standard deviation are over folds.",
        "A class is predicted if its probability is at least 0.5; in the columns with TE, at least the class's own "
        "threshold (greedy search). These thresholds are cross-fitted over all folds shown: none is applied to rows "
        "that it was found on.",
        "Networks are those of the best validation epoch, as in the paper, chosen at 0.5 on the same rows that are "
        "scored here (unless stage 05 took the last epoch). So all columns are too good, by about the same amount.",
        "The paper's figures are from its own test split, so absolute numbers are not comparable: compare gains.",
        "Gains are differences of means over folds. Intervals are paired bootstraps over samples, drawn within folds "
        f"({N_DRAWS} draws, thresholds kept): they do not cover the effect of another training seed.",
    ]
    if any(NO_FOLD in PAPER.get(model, ()) for model in systems):
        remarks.append("The paper's figures for a single fold are in the row of the mean.")
    if "densenet50" in systems:
        remarks.append("The paper's Dense50 on its random folds 1, 2, 3 is shown at densenet50's folds 0, 1, 2.")
    remarks += [
        f"{model} has no separate run for TA: TA repeats its run of Table 2, and TA + TE repeats TE."
        for model, runs in systems.items()
        if "eloss" in runs and "ta" not in runs
    ]
    return remarks + [f"Missing: {line}." for lines in missing.values() for line in lines] + absent_notes(rows)


def markdown(scores: pd.DataFrame, gains: pd.DataFrame, remarks: list[str]) -> str:
    """Return all tables, the gains and the notes as one Markdown text."""
    return (
        "\n\n".join(
            [
                *(markdown_table(scores, table) for table in HEADINGS),
                markdown_gains(gains),
                "## Notes\n\n" + "\n".join(f"- {remark}" for remark in remarks),
            ]
        )
        + "\n"
    )
