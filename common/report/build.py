"""The page on a work folder: a section for each stage, from its files; without them it says what to run."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from common.data.folds import fold_numbers
from common.process.progress import progress
from common.report.inputs import data, duplicates, epoch_seconds, folds, training
from common.report.page import Facts, Section, Table, render, section
from common.report.reader import Work, there
from common.report.results import errors, predictions, scores, submission
from common.report.runs import comparison


@section("Overview", "What the stages have made so far, and the figures that matter most.")
def overview(work: Work) -> list:
    blocks = [
        Table(
            "Stages",
            stage_table(work),
            "Sections below are left out until their stage has run. Folds are added up. "
            "The rows of 04 are the samples of an epoch, copies included. Its seconds are those of the epochs, without "
            "waiting.",
            {"rows": ",.0f", "seconds": ",.1f"},
            wide=True,
        )
    ]
    versions = versions_table(work)
    if len(versions):
        text = "Versions are only recorded: files of other versions are not refused."
        blocks.append(Table("Made with", versions, text, wide=True))
    found, facts = there(lambda: work.scores), {}
    if found:
        facts["macro F1, cross-fitted"] = f"{found['score_cross_fitted']:.3f}"
        facts["95 % interval"] = "{:.3f} to {:.3f}".format(*found["interval"])
        facts[work.combined] = ", ".join(found["recipes"])
    samples = there(lambda: work.samples)
    if samples is not None:
        facts["samples"] = f"{len(samples):,}"
    return [Facts(facts), *blocks] if facts else blocks


def versions_table(work: Work) -> pd.DataFrame:
    """Return a row per set of versions: what made the stages' outputs, and which of them."""
    made: dict[tuple, list[str]] = {}
    for stage, path in stage_files(work):
        versions = work.state(path)[1].get("made_with")
        if isinstance(versions, dict):
            made.setdefault(tuple((str(name), str(version)) for name, version in versions.items()), []).append(stage)
    return pd.DataFrame(
        {**dict(versions), "made": ", ".join(dict.fromkeys(stages))} for versions, stages in made.items()
    )


def stage_files(work: Work) -> list[tuple[str, Path]]:
    """Return each stage's main files."""
    layout = work.layout
    runs, recipes = there(lambda: work.runs) or {}, there(lambda: work.recipes) or []
    folds = there(lambda: work.folds)
    numbers = [] if folds is None else fold_numbers(folds)
    return [
        ("01 preprocess", layout.samples),
        ("02 dedup", layout.duplicates),
        ("03 make folds", layout.folds),
        *[("04 train", layout.network(recipe, fold)) for recipe, logs in runs.items() for fold in logs],
        *[("05 predict", layout.predictions(recipe, "oof", fold)) for recipe in recipes for fold in numbers],
        ("06 thresholds", layout.thresholds),
        *[("07 ensemble", work.folder / path) for path in work.submission_files or [layout.submission]],
        ("09 tables", layout.tables / "tables.md"),
    ]


def stage_table(work: Work) -> pd.DataFrame:
    """Return a row per stage: output, state, rows and seconds; folds in the same state together."""
    rows = []
    for stage, path in stage_files(work):
        state, record = work.state(path)
        seconds = record.get("seconds", np.nan)
        if stage == "04 train":
            seconds = epoch_seconds(work.runs[path.parts[-3]][int(path.parts[-2].removeprefix("fold"))]).sum()
        ours = path.is_relative_to(work.folder)
        name = re.sub(r"fold\d+", "fold*", str(path.relative_to(work.folder))) if ours else str(path)
        rows.append((stage, name, state, record.get("rows", np.nan), seconds))
    table = pd.DataFrame(rows, columns=["stage", "main file", "state", "rows", "seconds"])
    return table.groupby(["stage", "main file", "state"], sort=False, as_index=False).sum(min_count=1)


# The sections of the page, in order.
SECTIONS: list[Callable[[Work], Section]] = [
    overview,
    data,
    duplicates,
    folds,
    training,
    predictions,
    scores,
    comparison,
    errors,
    submission,
]


def collect(work: Work) -> list[Section]:
    """Return all sections of the page."""
    return [make(work) for make in progress(SECTIONS, len(SECTIONS), "drawing", unit="sections")]


def report_page(work: Work) -> str:
    """Return the page on a work folder as HTML."""
    return render(
        "Where does the protein sit?", f"What the work folder {work.folder.resolve().name} holds.", collect(work)
    )
