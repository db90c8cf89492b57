"""Sections of the page on results: predictions, scores, errors, submission."""

import numpy as np
import pandas as pd

from common.artifacts.tables import read_table
from common.classes import N_CLASSES
from common.data.labels import parse_targets
from common.report import plots
from common.report.page import Facts, Figure, Gallery, Heading, More, Note, Table, section, share
from common.report.reader import NAMES, SHOWN, Work, there
from common.score.metrics import f1_from_counts
from common.score.paper_tables import HEADINGS, TITLES
from common.score.thresholds import FEW

GRID = np.round(np.arange(0.02, 0.99, 0.02), 2)  # thresholds of the curves


# --- predictions -------------------------------------------------------------------------------------------


@section("Predictions", "Probabilities of labelled samples, beside their labels.")
def predictions(work: Work) -> list:
    from sklearn.metrics import average_precision_score

    rows, targets, probs = work.oof
    precision = np.array(
        [
            average_precision_score(target, prob) if target.any() else np.nan
            for target, prob in zip(targets.T, probs.T, strict=True)
        ]
    )
    weakest_first = [int(c) for c in np.argsort(precision, kind="stable") if targets[:, c].any()]
    table = pd.DataFrame(
        {
            "class": NAMES,
            "positives": targets.sum(axis=0),
            "expected": probs.sum(axis=0),
            "average precision": precision,
            "threshold": work.cuts,
        }
    ).iloc[weakest_first]
    panels = [class_figure(NAMES[c], targets[:, c], probs[:, c], work.cuts[c], precision[c]) for c in weakest_first]
    return [
        Facts(
            {
                "samples": whole(work, rows),
                work.combined: ", ".join(work.members),
                f"mean average precision of {len(weakest_first)} classes": f"{np.nanmean(precision):.3f}",
            }
        ),
        *origin(work),
        *([] if work.how[0] == "rank" else [calibration(targets, probs)]),
        Table(
            "Probabilities of each class",
            table,
            "Expected is the sum of the probabilities. If it is far from the number "
            "of positives, the class is over- or underestimated. Average precision needs no threshold.",
            {"expected": ",.1f", "threshold": share},
        ),
        *class_by_class(panels),
    ]


def class_by_class(panels: list[Figure]) -> list:
    """Show the first figures, and the others when the reader opens them."""
    return [
        Heading("Class by class, the weakest first"),
        Note(
            "Left, precision against recall: the higher the better; the dotted line is chance. Right, the effect of "
            "the threshold (vertical line): F1 should be at its top there, and flat, so other samples reach it too."
        ),
        *panels[:6],
        *([More(f"The other {len(panels) - 6} classes", panels[6:])] if len(panels) > 6 else []),
    ]


def whole(work: Work, rows: pd.DataFrame) -> str:
    """Return how many samples are predicted, and of how many if some folds are not."""
    validated = 0 if work.given else (work.folds["fold"] >= 0).sum()
    return f"{len(rows):,} of {validated:,}" if len(rows) < validated else f"{len(rows):,}"


def origin(work: Work) -> list[Note]:
    """Note whether networks were trained on the samples that they predict, if known, and what a rank is."""
    source = Note(
        "These predictions were given to stage 06. If a network was trained on these samples, all figures are too good."
        if work.given
        else "Out of fold: each sample is predicted by the network that did not see it in training."
    )
    ranks = Note("The members are combined by ranks: a probability here is a mean rank from 0 to 1.")
    return [source] + [ranks] * (work.how[0] == "rank")


def class_figure(name: str, target: np.ndarray, prob: np.ndarray, threshold: float, average: float) -> Figure:
    """Show a class's precision and recall, against each other and against the threshold."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(target, prob)
    precision, recall = (
        values[np.diff(recall, prepend=2.0) != 0] for values in (precision, recall)
    )  # one point per recall
    some = np.unique(np.linspace(0, len(recall) - 1, 80).round().astype(int))
    called, right = ((values[:, None] >= GRID).sum(axis=0) for values in (prob, prob[target]))
    curves = {
        "precision": np.divide(right, called, out=np.full(len(GRID), np.nan), where=called > 0),
        "recall": right / target.sum(),
        "F1": 2 * right / (called + target.sum()),
    }
    predicted = prob >= threshold
    here = f1_from_counts((target & predicted).sum(), (~target & predicted).sum(), (target & ~predicted).sum())
    return Figure(
        name,
        plots.class_panel(f"class {name}", recall[some], precision[some], GRID, curves, threshold, target.mean()),
        f"Positives: {target.sum():,}; average precision {average:.2f}, by chance {target.mean():.2f}. F1 is "
        f"{here:.2f} at the threshold {share(threshold)}, and {max(here, curves['F1'].max()):.2f} at best.",
    )


def calibration(targets: np.ndarray, probs: np.ndarray) -> Figure:
    """Show how often classes are present when predicted with a given probability."""
    tenth = np.minimum((probs * 10).astype(int), 9).ravel()
    counts = np.bincount(tenth, minlength=10)
    mean, seen = (
        np.bincount(tenth, values.ravel(), minlength=10) / np.maximum(1, counts) for values in (probs, targets)
    )
    used = counts >= 10
    series = {"all classes together": (mean[used], seen[used]), "perfect": (np.array([0, 1]), np.array([0, 1]), 5)}
    return Figure(
        "Calibration",
        plots.lines(
            "calibration",
            series,
            "predicted probability",
            "share that has the class",
            dashed=["perfect"],
            xlim=(0, 1),
            ylim=(0, 1),
        ),
        "On the dashed line probabilities equal frequencies. Above it the networks are too cautious, below it too "
        "confident. Tenths of the range with fewer than 10 predictions are left out; "
        f"{100 * counts[0] / counts.sum():.0f} % of all predictions are below 0.1.",
    )


# --- scores ------------------------------------------------------------------------------------------------


@section(
    "Scores",
    "F1 is the harmonic mean of precision and recall; macro F1 is its mean over the 28 classes. Cross-fitted means "
    "that each sample's classes were decided with thresholds found on other samples.",
)
def scores(work: Work) -> list:
    found = work.scores
    facts = {
        "macro F1, cross-fitted": f"{found['score_cross_fitted']:.3f}",
        "95 % interval": "{:.3f} to {:.3f}".format(*found["interval"]),
        "on the rows of the search": f"{found['score_in_sample']:.3f}",
        "at 0.5 for all": f"{found['score_at_half']:.3f}",
        "samples": f"{found['n_samples']:,}",
    }
    if found.get("n_present", N_CLASSES) < N_CLASSES:
        facts[f"over the {found['n_present']} classes with samples"] = f"{found['score_cross_fitted_present']:.3f}"
    if "score_held_out" in found:
        facts["held out"] = "{:.3f} ({:.3f} to {:.3f})".format(found["score_held_out"], *found["interval_held_out"])
    table = pd.DataFrame(found["per_class"]).sort_values("f1_cross_fitted", ascending=False, kind="stable")
    return [
        Facts(facts),
        *(origin(work) if work.given else []),
        *few_positives(table),
        *class_scores(table),
        *member_blocks(found.get("members")),
        *paper_blocks(work),
    ]


def few_positives(table: pd.DataFrame) -> list[Note]:
    """Name the classes whose scores are unreliable."""
    positives = table["positives"]
    kinds = {
        "Without a sample, so that they count as 0": positives == 0,
        f"With thresholds based on fewer than {FEW} positives": (positives > 0) & (positives < FEW),
    }
    return [Note(f"{text}: {', '.join(table['class'][rows])}.") for text, rows in kinds.items() if rows.any()]


def class_scores(table: pd.DataFrame) -> list:
    """Show the F1 of each class, the best first, with intervals if stage 06 has them."""
    intervals = np.array(table["interval"].to_list()) if "interval" in table else None
    names = [f"{name} ({positives:,})" for name, positives in zip(table["class"], table["positives"], strict=True)]
    marks = {"own rows, too good": table["f1_in_sample"], "cross-fitted": table["f1_cross_fitted"]}
    titles = {
        "class": "class",
        "positives": "positives",
        "threshold": "threshold",
        "f1_cross_fitted": "F1, cross-fitted",
        "interval": "95 % interval",
        "f1_in_sample": "F1, own rows",
    }
    shown = [name for name in titles if name in table]
    return [
        Figure(
            "F1 of each class",
            plots.dots("f1", names, marks, "F1", intervals=intervals, xlim=(-0.02, 1.02)),
            f"Positives in brackets. Filled marks are honest{'' if intervals is None else ', with 95 % intervals'}; a "
            "hollow mark far to the right is a threshold fitted to chance. Work on the classes at the bottom: they "
            "lower macro F1 most.",
        ),
        Table(
            "F1 of each class",
            table[shown].rename(columns=titles),
            "Sort by positives: do the rare classes have the low "
            "scores? F1 on the rows used to find the thresholds is too good.",
            {"threshold": share},
        ),
    ]


def member_blocks(members: list[dict] | None) -> list[Table]:
    """Show the score of each member of the ensemble, if stage 06 has it."""
    if not members:
        return []
    titles = {
        "name": "member",
        "score_cross_fitted": "macro F1, cross-fitted",
        "interval": "95 % interval",
        "leave_one_out": "change of the ensemble without it",
    }
    table = pd.DataFrame(members)
    shown = [name for name in table if name == "interval" or not isinstance(table[name].iloc[0], (dict, list))]
    return [
        Table(
            "Members of the ensemble",
            table[shown].rename(columns=lambda name: titles.get(name, name.replace("_", " "))),
            "A member is worth its place if the ensemble is worse without it: below 0.",
        )
    ]


def paper_blocks(work: Work) -> list:
    """Show the paper's tables, if stage 09 has made them."""
    folder = work.layout.tables
    if not (folder / "tables.md").is_file():
        return [Note(f"The paper's tables have not been made; run: bash run_all.sh --tables --work {work.folder}")]
    blocks: list = gain_figures(read_table(folder / "gains.csv", "bash run_all.sh --tables"))
    for number, title in HEADINGS.items():
        table = read_table(folder / f"table{number}.csv", "bash run_all.sh --tables").replace("", np.nan)
        titles = {
            name: TITLES[name.removesuffix("_paper")] + (", paper" if name.endswith("_paper") else "")
            for name in table.columns[2:]
        }
        table = table.astype({"fold": str, **dict.fromkeys(titles, float)}).dropna(axis="columns", how="all")
        if len(table.columns) > 2:
            blocks.append(
                Table(
                    f"The paper's Table {number}: {title}",
                    table.rename(columns=titles),
                    "Macro F1 on the "
                    "validation fold. The paper's figures are from its own split: compare gains, not levels.",
                    wide=True,
                )
            )
    return blocks


def gain_figures(gains: pd.DataFrame) -> list[Figure]:
    if gains.empty:
        return []
    names = [f"{gain.model}: {TITLES[gain.column]}" for gain in gains.itertuples()]
    marks = {"in the paper": pd.to_numeric(gains["paper"]), "here": gains["gain"]}
    return [
        Figure(
            "What each part of the method gains",
            plots.dots(
                "gains",
                names,
                {name: values for name, values in marks.items() if values.notna().any()},
                "gain in macro F1",
                intervals=gains[["low", "high"]].to_numpy(),
                reference=0,
            ),
            "Each row is compared with the previous step, with its 95 % interval. One that crosses 0 shows no gain.",
        )
    ]


# --- errors ------------------------------------------------------------------------------------------------


@section("Errors", "Where the ensemble is most certain and wrong. Look at the images: is it the network or the label?")
def errors(work: Work) -> list:
    rows, targets, probs = work.oof
    margin = log_odds(probs) - log_odds(work.cuts)
    predicted = probs >= work.cuts
    missed, false = targets & ~predicted, ~targets & predicted
    return [
        Facts(
            {
                "samples with all labels right": f"{100 * (targets == predicted).all(axis=1).mean():.0f} %",
                "missed labels": f"{missed.sum():,} of {targets.sum():,}",
                "false alarms": f"{false.sum():,}",
            }
        ),
        *([] if work.stores else [Note("No images are stored in this work folder.")]),
        *error_gallery(
            work,
            "Most confident misses",
            worst(missed, -margin),
            "Labelled with the class in bold, and predicted far below its "
            "threshold. If the green is not where the class is, the label may be wrong.",
        ),
        *error_gallery(
            work,
            "Most confident false alarms",
            worst(false, margin),
            "Predicted with the class in bold, and not labelled with it. If "
            "the green is where the class is, a label may be missing.",
        ),
        *error_tables(targets, missed, false),
        *suspect_blocks(work, suspects(work, rows, targets, probs, predicted)),
    ]


def error_gallery(work: Work, title: str, places: list[tuple[int, int]], text: str) -> list[Gallery]:
    """Show samples with their labels and predictions; places : row and class of each."""
    rows, targets, probs = work.oof
    predicted = probs >= work.cuts
    cards = [
        work.card(
            [rows["Id"][row]],
            [
                f"{NAMES[c]}: {share(probs[row, c])} (threshold {share(work.cuts[c])})",
                f"labelled {', '.join(NAMES[targets[row]])}",
                f"predicted {', '.join(NAMES[predicted[row]]) or 'none'}",
            ],
        )
        for row, c in (places if work.stores else [])
    ]
    return [Gallery(title, cards, text)] if cards else []


def log_odds(probs: np.ndarray) -> np.ndarray:
    probs = np.clip(np.asarray(probs, dtype=np.float64), 1e-9, 1 - 1e-9)
    return np.log(probs / (1 - probs))


def worst(mask: np.ndarray, confidence: np.ndarray, each: int = 2) -> list[tuple[int, int]]:
    """Return (row, class) of the most confident cells of `mask`: at most `each` per class, one per sample."""
    found: dict[int, int] = {}
    classes: list[int] = []
    cells = np.argwhere(mask)
    for row, c in cells[np.argsort(-confidence[mask], kind="stable")].tolist():
        if row not in found and classes.count(c) < each and len(found) < SHOWN:
            found[row] = c
            classes.append(c)
    return list(found.items())


def error_tables(targets: np.ndarray, missed: np.ndarray, false: np.ndarray) -> list[Table]:
    """Count the errors of each class, and which class is falsely predicted when another one is missed."""
    table = pd.DataFrame(
        {
            "class": NAMES,
            "positives": targets.sum(axis=0),
            "missed": missed.sum(axis=0),
            "false alarms": false.sum(axis=0),
        }
    )
    counts = missed.astype(int).T @ false.astype(int)
    first, second = np.nonzero(counts)
    pairs = pd.DataFrame({"missed": NAMES[first], "falsely predicted": NAMES[second], "samples": counts[first, second]})
    return [
        Table(
            "Errors of each class",
            table.sort_values("missed", ascending=False, kind="stable"),
            "Many misses and few false "
            "alarms: the threshold is high, or the class is faint. The other way round: something else looks like it.",
        ),
        Table(
            "What is predicted instead of what",
            pairs.sort_values("samples", ascending=False, kind="stable").head(40),
            "The networks cannot tell the pairs at the top apart, or these occur with common classes.",
        ),
    ]


def suspects(
    work: Work, rows: pd.DataFrame, targets: np.ndarray, probs: np.ndarray, predicted: np.ndarray
) -> pd.DataFrame:
    """Return the samples by how doubtful their labels are, most doubtful first.

    suspicion : rank from 0 to 1 of the out-of-fold loss. If the hard samplers recorded losses, the mean of that and of
        the ranks of the mean loss in training. More labels mean more loss, so a sample is ranked among those with as
        many.
    """
    clipped = np.clip(probs, 1e-6, 1 - 1e-6)
    table = pd.DataFrame(
        {
            "Id": rows["Id"],
            "labels": [", ".join(NAMES[row]) for row in targets],
            "predicted": [", ".join(NAMES[row]) or "none" for row in predicted],
            "loss out of fold": -np.where(targets, np.log(clipped), np.log(1 - clipped)).sum(axis=1),
        }
    )
    table["suspicion"] = table.groupby(np.minimum(targets.sum(axis=1), 3))["loss out of fold"].rank(pct=True)
    books = [
        book.assign(run=f"{recipe} {fold}")
        for recipe in (() if work.given else there(lambda: work.runs) or ())
        for fold, book in work.run_tables(recipe, "hard_samples.csv").items()
    ]
    if books:
        hard = pd.concat(books)
        n_labels = hard["Target"].str.split().str.len().clip(upper=3)
        hard["rank"] = hard.groupby(["run", n_labels])["mean_loss"].rank(pct=True)
        hard = hard.groupby("Id").agg(
            **{"kept by the sampler": ("share_kept", "mean"), "rank in training": ("rank", "mean")}
        )
        table = table.join(hard, on="Id")
        table["suspicion"] = (table["suspicion"] + table["rank in training"].fillna(0)) / 2
    return table.sort_values(["suspicion", "Id"], ascending=[False, True], ignore_index=True)


def suspect_blocks(work: Work, table: pd.DataFrame) -> list:
    cards = (
        [
            work.card([row.Id], [f"labelled {row.labels}", f"predicted {row.predicted}"])
            for row in table.head(SHOWN).itertuples()
        ]
        if work.stores
        else []
    )
    ranks = (
        "the mean of two ranks from 0 to 1: of the out-of-fold loss, and of the mean loss in the trainings that had "
        "the sample. Near 1, the networks cannot even memorise it"
        if "rank in training" in table
        else "the rank from 0 to 1 of the out-of-fold loss"
    )
    return [
        *(
            [Gallery("Suspects for wrong labels", cards, "Check whether the images show the labelled classes.")]
            if cards
            else []
        ),
        Table(
            "The first 100 suspects",
            table.head(100),
            f"Suspicion is {ranks}; ranked among samples with as many labels. "
            "They are for a person to check; nothing is changed automatically.",
            wide=True,
        ),
    ]


# --- submission --------------------------------------------------------------------------------------------


@section("Submission", "The submitted classes of the test samples.")
def submission(work: Work) -> list:
    table = work.submission
    predicted = parse_targets(table["Predicted"])
    ours, theirs = 100 * predicted.mean(axis=0), 100 * labelled_shares(work)
    lost = table["Id"].isin(work.left_out["Id"]).sum()
    return [
        Facts(
            {
                "file": str(work.submission_file),
                "rows": f"{len(table):,}",
                "labels per row": f"{predicted.sum(axis=1).mean():.2f}",
                "labels per labelled sample": f"{theirs.sum() / 100:.2f}",
                "empty rows": f"{(~predicted.any(axis=1)).sum():,}",
                "classes predicted": f"{predicted.any(axis=0).sum()} of {N_CLASSES}",
            }
        ),
        *([Note(f"{lost} test samples were left out by stage 01 and have empty rows.")] if lost else []),
        *frequencies(predicted.sum(axis=0), ours, theirs),
    ]


def frequencies(samples: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> list:
    """Show each class's test samples, (28,), also in % of test and of the labelled samples, as figure and table."""
    order = np.argsort(-theirs, kind="stable")
    marks = {
        name: np.where(values > 0, values, np.nan)[order]
        for name, values in (("labelled", theirs), ("submission", ours))
    }
    counts = pd.DataFrame(
        {
            "class": NAMES,
            "test samples": samples,
            "of test, %": ours,
            "of labelled, %": theirs,
            "ratio": np.divide(ours, theirs, out=np.full(N_CLASSES, np.nan), where=theirs > 0),
        }
    ).iloc[order]
    return [
        Figure(
            "Class frequencies",
            plots.dots("submission", list(NAMES[order]), marks, "share of the samples, %", log=True),
            "The two marks of a class should be close, unless test differs from the labelled samples. Far to the right "
            "the class is predicted too often; without a filled mark, never.",
        ),
        Table(
            "Class frequencies",
            counts,
            "Sort by ratio: if it is far from 1, check the class's threshold.",
            {"of test, %": ".2f", "of labelled, %": ".2f", "ratio": ".2f"},
        ),
    ]


def labelled_shares(work: Work) -> np.ndarray:
    """Return each class's share of the training samples, (28,), or without stage 01 of those that stage 06 scored."""
    samples = there(lambda: work.samples)
    if samples is not None:
        return parse_targets(samples.loc[samples["part"] == "train", "Target"]).mean(axis=0)
    return np.array([row["positives"] for row in work.scores["per_class"]]) / work.scores["n_samples"]
